"""What a plan depends on: everything, by name, so that two plans can be told apart in words."""

import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmtune.data.images import ImageRoot
from vlmtune.data.planning import RowPlanner
from vlmtune.data.processor import Processor
from vlmtune.data.sources import fingerprint

_PACKAGE = Path(__file__).resolve().parents[1]
_SOURCES = ('structures.py', 'families.py', 'data/**/*.py')  # of this package, which make tokens out of rows
_LIBRARIES = ('transformers', 'tokenizers', 'pillow')
_NOT_MEANT = ('_name_or_path', 'transformers_version', 'dtype')  # of a model's config


def plan_key(planner: RowPlanner) -> dict[str, str] | str:
    """{ingredient: value or hash}; or, in words, the ingredient that nothing can tell from another of its kind."""
    rows = fingerprint(planner.rows)
    if rows is None:
        return 'rows in memory that are not plain data'
    root = planner.image_folder
    folder, hosts = (root.folder, root.hosts) if isinstance(root, ImageRoot) else (root, ())
    parts = dict(
        rows=rows,
        max_length=str(planner.max_length),
        overlong=planner.overlong,
        image_folder='None' if folder is None else os.path.abspath(folder),
        url_hosts=' '.join(hosts),
        code=_code(),
        **_processor_parts(planner.processor),
    )
    for name, function in (('dataset_map_fn', planner.map_row), ('template_map_fn', planner.map_template)):
        described = describe_function(function)
        if described is None:
            return f'a {name} that is not a plain function of a file with plain arguments'
        parts[name] = described
    return parts


def _processor_parts(processor: Processor) -> dict[str, str]:
    tokenizer, config = processor.tokenizer, processor.config.to_dict()
    image_processor = processor.image_processor
    return dict(
        tokenizer=_hash(type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str()),
        chat_template=_hash(tokenizer.chat_template),
        special_tokens=_hash(tokenizer.special_tokens_map, tokenizer.all_special_tokens, processor.special_tokens),
        image_processor=_hash(None if image_processor is None else image_processor.to_dict()),
        joint_settings=_hash(processor.joint_settings),
        model_config=_hash({name: value for name, value in config.items() if name not in _NOT_MEANT}),
    )


def describe_function(function: Callable[..., Any]) -> str | None:
    """Name, arguments and, of functions that are not vlmtune's own, a hash of their file; None if it cannot be told."""
    arguments: list[Any] = []
    while isinstance(function, functools.partial):
        arguments.append([list(function.args), function.keywords])
        function = function.func
    try:
        file = inspect.getsourcefile(function)
        told = json.dumps(arguments, sort_keys=True)
    except TypeError:  # no function, or arguments that are no plain data
        return None
    if file is None or not inspect.isfunction(function) or function.__closure__:
        return None
    name = f'{function.__module__}.{function.__qualname__}'
    path = Path(file).resolve()
    source = '' if path.is_relative_to(_PACKAGE) else f' in a file of {_hash_of_files([path])}'
    return f'{name}{told if arguments else ""}{source}'


@functools.cache
def _code() -> str:
    files = sorted(path for pattern in _SOURCES for path in _PACKAGE.glob(pattern))
    versions = [f'{name} {importlib.metadata.version(name)}' for name in _LIBRARIES]
    return f'vlmtune {_hash_of_files(files)}, {", ".join(versions)}'


def _hash_of_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]


def describe_difference(old: dict[str, str], new: dict[str, str]) -> str:
    """What differs, in words: ``max_length (2048 -> 4096), chat_template``."""
    changed = []
    for name in sorted({*old, *new}):
        before, after = old.get(name, 'none'), new.get(name, 'none')
        if before != after:
            short = len(before) + len(after) < 60 and not name.endswith(('_fn', 'rows'))
            changed.append(f'{name} ({before} -> {after})' if short else name)
    return ', '.join(changed)
