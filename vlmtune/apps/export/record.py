"""``vlmtune_export.json``: what an adapter of ours needs to be put on its base exactly as it was trained."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vlmtune.utils.errors import CheckpointError
from vlmtune.utils.json_files import read_object, write_json

RECORD_FILE = 'vlmtune_export.json'
_VERSION = 1


@dataclass(frozen=True)
class ExportRecord:
    """How an export was trained.

    Attributes:
        family: ``config.model_type`` of the base.
        quantization: of the base in training: None, 'nf4', 'int8'.
        dtype: of the base in training.
        vocab_size: rows of the embeddings, if tokens were added; else None.
        parts: part -> (mode, trained weights).
        config: name of the recipe.
        data: names of the data sets.
        iteration: optimizer steps.
        metrics: 'test' and 'validation' -> metric -> value, where the run measured the checkpoint.
    """

    family: str
    quantization: str | None = None
    dtype: str = 'bfloat16'
    vocab_size: int | None = None
    parts: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    config: str | None = None
    data: Sequence[str] = ()
    iteration: int | None = None
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def write_record(record: ExportRecord, folder: Path) -> None:
    """Write it beside the adapter."""
    content = dict(version=_VERSION, **asdict(record))
    write_json(folder / RECORD_FILE, content)


def read_record(folder: Path) -> ExportRecord | None:
    """What is noted beside an adapter; None for an adapter that others made.

    Raises:
        CheckpointError: it is not what ``write_record`` wrote.
    """
    if not (folder / RECORD_FILE).is_file():
        return None
    content = read_object(folder / RECORD_FILE)
    names = [field.name for field in fields(ExportRecord) if field.name != 'metrics' or 'metrics' in content]
    if content.get('version') != _VERSION or any(name not in content for name in names):
        raise CheckpointError(f'{folder / RECORD_FILE} is not a version {_VERSION} record of an adapter')
    return ExportRecord(**{name: content[name] for name in names})
