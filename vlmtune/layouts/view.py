"""A checkpoint in any layout, seen as transformers would have written it: config and processor files, no weights."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from vlmtune.families import FAMILIES, LAYOUTS, find_family
from vlmtune.layouts.config_checks import check_numbers
from vlmtune.layouts.layout import Layout
from vlmtune.layouts.token_ids import find_token_id
from vlmtune.utils.errors import ModelError
from vlmtune.utils.guarded_copy import copy_inside
from vlmtune.utils.imports import import_name
from vlmtune.utils.pretrained import (
    FAILURES,
    NO_WEIGHTS,
    check_source,
    find_folder,
    load_pretrained,
    read_source_json,
    reason_of,
)

CONFIG_FILE, TEMPLATE_FILE = 'config.json', 'chat_template.jinja'


def find_layout(name_or_path: str, *, revision: str | None = None) -> Layout | None:
    """The layout of a checkpoint, by the model type in its config.json; None where transformers or our class reads it.

    Args:
        name_or_path: a folder or a hub id.
        revision: of a hub id.
    """
    return _layout_of(_raw_config(name_or_path, revision))


def _layout_of(raw: Mapping[str, Any]) -> Layout | None:
    # Configs that were written by code of their own may lack the model type; they name the class of that code.
    architectures = raw.get('architectures')
    names = (raw['model_type'],) if 'model_type' in raw else architectures if isinstance(architectures, list) else ()
    dotted = next((LAYOUTS[str(name)] for name in names if str(name) in LAYOUTS), None)
    return None if dotted is None else import_name(dotted)


def read_config(name_or_path: str, *, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedConfig:
    """The config of the class that trains a checkpoint, whatever its layout.

    Args:
        name_or_path: a folder or a hub id.
        trust_remote_code: for checkpoints that neither transformers nor the table of families knows.
        revision: of a hub id.

    Raises:
        ModelError: it cannot be read.
        ConfigError: code of a hub id would be run whose commit is not named.
    """
    raw = _raw_config(name_or_path, revision, trust_remote_code=trust_remote_code)
    layout = _layout_of(raw)
    if layout is not None:
        return _native_config(layout, raw, name_or_path, revision)
    model_type = str(raw.get('model_type'))
    _make_known(model_type)
    if not trust_remote_code and 'model_type' in raw and model_type not in CONFIG_MAPPING:
        try:
            find_family(model_type)  # transformers would ask for code of the checkpoint, which is no way out
        except ModelError as error:
            raise ModelError(f'{name_or_path}/{CONFIG_FILE}: {error}') from error
    return load_pretrained(AutoConfig, name_or_path, trust_remote_code=trust_remote_code, revision=revision)


@contextmanager
def native_view(name_or_path: str, *, revision: str | None = None) -> Iterator[str]:
    """Inside, a folder or hub id from which config and processor files can be read as transformers writes them.

    Raises:
        ModelError: the checkpoint's layout is known, but something in it is not.
    """
    raw = _raw_config(name_or_path, revision)
    layout = _layout_of(raw)
    if layout is None:
        yield name_or_path
        return
    source = find_folder(name_or_path, revision=revision, patterns=NO_WEIGHTS)
    with tempfile.TemporaryDirectory(prefix='vlmtune-view-') as folder:
        _native_config(layout, raw, name_or_path, revision).save_pretrained(folder)
        try:
            layout.write_processor_files(source, Path(folder))
            _copy_template(source, Path(folder), image_token=layout.image_token)
        except FAILURES as error:
            raise ModelError(
                f'{name_or_path}: files of its tokenizer or image processor hold what is of no use: '
                f'{type(error).__name__}: {reason_of(error)}'
            ) from error
        try:
            yield folder
        except ModelError as error:  # the user knows the source, and the view will be gone
            raise ModelError(str(error).replace(folder, name_or_path)) from error


def _copy_template(source: Path, folder: Path, *, image_token: str | None) -> None:
    """That of an export of ours that was trained with another one; one that shows no image is of the bare LLM."""
    own = source / TEMPLATE_FILE
    if own.is_file() and (image_token is None or image_token in own.read_text('utf-8')):
        copy_inside(own, folder / TEMPLATE_FILE, root=source, error=ModelError)


def _make_known(model_type: str) -> None:
    """Tell AutoConfig of a config class of ours."""
    family = FAMILIES.get(model_type)
    if family is not None and family.model is not None:
        AutoConfig.register(model_type, import_name(family.model).config_class, exist_ok=True)


def _native_config(layout: Layout, raw: dict[str, Any], name_or_path: str, revision: str | None) -> PreTrainedConfig:
    try:
        config = layout.read_config(raw)
    except ModelError as error:  # of ours, which know the name of the file only
        raise ModelError(f'{name_or_path}/{error}' if str(error).startswith(CONFIG_FILE) else str(error)) from error
    except FAILURES as error:
        raise ModelError(f'{name_or_path}/{CONFIG_FILE} is not that of a {layout.name}: {reason_of(error)}') from error
    if layout.image_token is not None:
        source = find_folder(name_or_path, revision=revision, patterns=NO_WEIGHTS)
        config.image_token_id = find_token_id(source, layout.image_token)
    _make_known(config.model_type)  # also to who reads the view's config.json
    return config


def _raw_config(name_or_path: str, revision: str | None, *, trust_remote_code: bool = False) -> dict[str, Any]:
    source = check_source(name_or_path, trust_remote_code=trust_remote_code, revision=revision)
    raw = read_source_json(source, CONFIG_FILE, revision=revision) or {}
    check_numbers(raw, f'{name_or_path}/{CONFIG_FILE}')
    return raw
