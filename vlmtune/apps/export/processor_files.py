"""The files of tokenizer, chat template and image processor that stand beside weights."""

import tempfile
from pathlib import Path
from typing import Any

from vlmtune.data import Processor
from vlmtune.data.processor_files import IMAGE_FILE, JOINT_FILE, JOINT_TEMPLATE_FILE, SOURCE_FILES
from vlmtune.layouts import read_config
from vlmtune.utils.errors import CheckpointError, ModelError
from vlmtune.utils.guarded_copy import copy_present
from vlmtune.utils.json_files import write_json
from vlmtune.utils.pretrained import read_source_json

_TEXT_FILES = (
    'tokenizer_config.json', 'tokenizer.json', 'tokenizer.model', 'special_tokens_map.json', 'added_tokens.json',
    'vocab.json', 'merges.txt', 'chat_template.jinja', JOINT_TEMPLATE_FILE,
)  # fmt: skip


def overlay_processor_files(source: Path, target: Path) -> None:
    """Copy the processor files that ``source`` has over those in ``target``; what it lacks stays as it is.

    Raises:
        CheckpointError: see ``copy_inside``.
    """
    if (source / 'chat_template.jinja').is_file():
        (target / JOINT_TEMPLATE_FILE).unlink(missing_ok=True)  # it would win over the file of the source
    copy_present((*_TEXT_FILES, *SOURCE_FILES), source=source, target=target)
    joint = read_source_json(str(target), JOINT_FILE) or {}
    if 'image_processor' in joint and (source / IMAGE_FILE).is_file() and not (source / JOINT_FILE).is_file():
        del joint['image_processor']  # the newer way to write the same thing; it would win over the file of the source
        write_json(target / JOINT_FILE, joint)


def image_differences(trained: Processor, own: Processor) -> dict[str, tuple[Any, Any]]:
    """{setting: (of the training, of the files)} where two image processors of one class differ."""
    here, there = ({} if part.image_processor is None else part.image_processor.to_dict() for part in (trained, own))
    both = sorted(set(here) & set(there))
    return {name: (here[name], there[name]) for name in both if here[name] != there[name]}


def write_processor_files(base: str, *, over: Path, folder: Path) -> None:
    """Write the processor files of ``base`` into ``folder``, then those of the folder ``over`` where it has some.

    Raises:
        ModelError: the files of the base cannot be read.
    """
    Processor(base).save(folder)
    overlay_processor_files(over, folder)


def load_processor(base: str, *, over: Path | None = None, **settings: Any) -> Processor:
    """The processor of ``base``, with the files of the folder ``over`` where it has some.

    Args:
        base: a folder or a hub id.
        over: of an adapter.
        settings: of ``Processor``, which win over what both say.

    Raises:
        ModelError: the files cannot be read.
        CheckpointError: those of ``over`` belong to another model.
        ConfigError: a setting cannot be right.
    """
    if over is None:
        return Processor(base, **settings)
    with tempfile.TemporaryDirectory() as folder:
        read_config(base).save_pretrained(folder)
        write_processor_files(base, over=over, folder=Path(folder))
        try:
            processor = Processor(folder, **settings)
        except ModelError as error:
            reason = str(error).replace(folder, f'{over} on {base}')
            raise CheckpointError(f'{over} does not fit {base}, it was made for another model: {reason}') from error
    processor.source = base  # what messages name; the folder is gone
    return processor
