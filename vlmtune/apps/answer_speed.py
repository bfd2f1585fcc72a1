"""What answers cost, by the size of the images: users choose a resolution by it."""

from collections.abc import Mapping, Sequence
from typing import Any

_SIDES = (256, 512, 768, 1024, 1536, 2048, 3072, 4096)  # pixels of a square of the same area


def speed_by_size(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the rows of each class of image sizes, smallest first.

    All images of a row count together. Where several rows were answered at once, each has an equal share of the time.

    Args:
        rows: of predictions.

    Returns:
        size, samples, image_tokens, prompt_tokens, output_tokens, seconds and tokens_per_second per class; all but the
        first two are means per sample, tokens_per_second is output tokens over seconds.
    """
    classes: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        classes.setdefault(_class_of(row), []).append(row)
    found = []
    for number in sorted(classes):
        members = classes[number]
        means = {name: _mean(members, name) for name in ('image_tokens', 'prompt_tokens', 'output_tokens', 'seconds')}
        rate = means['output_tokens'] / means['seconds'] if means['seconds'] else 0.0
        found.append(dict(size=_label(number), samples=len(members), **means, tokens_per_second=round(rate, 2)))
    return found


def speed_table(classes: Sequence[Mapping[str, Any]]) -> str:
    """The classes as a table of plain text."""
    head = ('images', 'samples', 'image tokens', 'prompt tokens', 'output tokens', 's/sample', 'tokens/s')
    lines = [head]
    for one in classes:
        tokens = (f'{one[name]:.1f}' for name in ('image_tokens', 'prompt_tokens', 'output_tokens'))
        lines.append(
            (one['size'], str(one['samples']), *tokens, f'{one["seconds"]:.4f}', f'{one["tokens_per_second"]:.1f}')
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = []
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        shown.append('  '.join(cells))
    return '\n'.join(shown)


def _class_of(row: Mapping[str, Any]) -> int:
    area = sum(width * height for width, height in row['image_sizes'])
    if not area:
        return -1
    return next((i for i, side in enumerate(_SIDES) if area <= side * side), len(_SIDES))


def _label(number: int) -> str:
    if number < 0:
        return 'none'
    if number == len(_SIDES):
        return f'over {_SIDES[-1]} x {_SIDES[-1]}'
    return f'to {_SIDES[number]} x {_SIDES[number]}'


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return round(sum(row[name] for row in rows) / len(rows), 6)
