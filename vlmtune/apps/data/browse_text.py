"""``vlmtune browse-data --text``: samples in a terminal."""

from collections.abc import Iterator, Sequence

from vlmtune.apps.data.shown_samples import ShownPack, ShownSample
from vlmtune.data.token_runs import TokenRun

_LEARNED, _CONTROL, _IMAGE, _PLAIN = '\033[32m', '\033[33m', '\033[34m', '\033[0m'


def as_text(shown: Sequence[ShownSample], packs: Sequence[ShownPack], *, colours: bool) -> str:
    """Samples and packs as text.

    Args:
        shown: the chosen samples.
        packs: the first packs.
        colours: show what is learned in green; without, it stands between ⟦ and ⟧.
    """
    return '\n'.join([*_lines(shown, packs, colours=colours)])


def _lines(shown: Sequence[ShownSample], packs: Sequence[ShownPack], *, colours: bool) -> Iterator[str]:
    for sample in shown:
        yield (
            f'== sample {sample.index}, {sample.where}: {sample.tokens:,} tokens, {sample.supervised:,} learned, '
            f'{sample.patches:,} vision patches'
        )
        for image in sample.images:
            boxes = f', boxes: {image.boxes}' if image.boxes else ''
            trouble = f': {image.trouble}' if image.trouble else ''
            yield f'   {_printable(image.name)}, {image.size.width} x {image.size.height} pixels{boxes}{trouble}'
        yield ''.join(_run(run, colours=colours) for run in sample.runs)
        yield ''
    for pack in packs:
        inside = ' | '.join(f'{index} ({tokens:,})' for index, _, tokens in pack.samples)
        yield f'== pack {pack.number}: {pack.tokens:,} of {pack.room:,} tokens ({pack.tokens / pack.room:.1%})'
        yield f'   samples (tokens): {inside}'


def _run(run: TokenRun, *, colours: bool) -> str:
    text = f'[{run.tokens:,} image tokens]' if run.kind == 'image' else _printable(run.text)
    if not colours:
        return f'⟦{text}⟧' if run.learned else text
    colour = {'control': _CONTROL, 'image': _IMAGE}.get(run.kind, '')
    colour = _LEARNED if run.learned else colour
    return f'{colour}{text}{_PLAIN}' if colour else text


def _printable(text: str) -> str:
    """Without what would steer the terminal."""
    return ''.join(c if c.isprintable() or c in '\n\t' else f'\\x{ord(c):02x}' for c in text)
