"""What is trained, as a table."""

from collections.abc import Sequence

from vlmtune.models.supervised_finetune import PartReport


def parts_table(rows: Sequence[PartReport], *, lr: float) -> str:
    """One line per part: mode, parameters, trainable ones, learning rate."""
    lines = [f'{"part":<16}{"mode":<8}{"parameters":>16}{"trainable":>14}{"lr":>12}']
    for row in rows:
        rate = '-' if row.mode == 'frozen' else f'{lr if row.lr is None else row.lr:.3g}'
        lines.append(f'{row.part:<16}{row.mode:<8}{row.parameters:>16,}{row.trainable:>14,}{rate:>12}')
    total, trainable = sum(row.parameters for row in rows), sum(row.trainable for row in rows)
    lines.append(f'{"all":<24}{total:>16,}{trainable:>14,}{f"{trainable / total:.2%}":>12}')
    return '\n'.join(lines)
