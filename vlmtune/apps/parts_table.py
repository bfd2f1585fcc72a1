"""What is trained, as a table."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # reports read the file, and need no model
    from vlmtune.models.supervised_finetune import PartReport


def parts_table(rows: 'Sequence[PartReport]', *, lr: float) -> str:
    """One line per part: mode, parameters, trainable ones, learning rate."""
    lines = [f'{"part":<16}{"mode":<8}{"parameters":>16}{"trainable":>14}{"lr":>12}']
    for row in rows:
        rate = _rate(row, lr)
        shown = '-' if rate is None else f'{rate:.3g}'
        lines.append(f'{row.part:<16}{row.mode:<8}{row.parameters:>16,}{row.trainable:>14,}{shown:>12}')
    total, trainable = sum(row.parameters for row in rows), sum(row.trainable for row in rows)
    lines.append(f'{"all":<24}{total:>16,}{trainable:>14,}{f"{trainable / total:.2%}":>12}')
    return '\n'.join(lines)


def write_parts(rows: 'Sequence[PartReport]', path: Path, *, lr: float) -> None:
    """The same as JSON, for reports: one object per part; ``lr`` is null of a frozen one."""
    content = [asdict(row) | dict(lr=_rate(row, lr)) for row in rows]
    path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


def _rate(row: 'PartReport', lr: float) -> float | None:
    return None if row.mode == 'frozen' else lr if row.lr is None else row.lr
