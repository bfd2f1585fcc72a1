"""The HTML page of ``vlmtune browse-data``: one file, no script, nothing fetched; texts of rows are escaped."""

from collections.abc import Sequence
from string import Template

from vlmtune.apps.data.shown_samples import ShownImage, ShownPack, ShownSample
from vlmtune.apps.html.pictures import data_uri
from vlmtune.apps.html.words import page, text
from vlmtune.data.token_runs import TokenRun

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 1.5em auto; padding: 0 1em; color: #222;
  overflow-wrap: anywhere }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em } h3 { font-size: 1em; margin: 0 }
article { border-top: 1px solid #ccc; padding: 1em 0 }
.facts, figcaption { color: #666; font-size: 90%; margin: .3em 0 }
.text { white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: 13px }
.learned { background: #c9f0cf }
.control { color: #a14a00; border: 1px solid #e0b080; border-radius: 3px; margin: 0 1px }
.image { background: #dfe8ff; border-radius: 3px; padding: 0 4px; font-style: italic }
.images { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: .5em 0; max-width: 400px }
img { max-width: 100%; min-width: 6em; border: 1px solid #ccc } .trouble { color: #b00020 }
.pack { display: flex; height: 1.6em; background: #eee; border: 1px solid #999; margin: .2em 0 }
.pack span { border-right: 2px solid #fff; background: #9db8e8; overflow: hidden; font-size: 11px; padding-left: 2px }
.pack span:nth-child(even) { background: #b9cdf0 }"""
_BODY = Template("""
<p>$count of $samples samples, pictures as they are stored, text as the model gets it:
<span class="learned">learned</span>, not learned, <span class="control">control token</span>,
<span class="image">image tokens, counted</span>.</p>
$shown
<h2>Packs</h2>
<p>The first of the first epoch. Samples in a pack do not see each other; grey is left free.</p>
$packs""")


def as_page(shown: Sequence[ShownSample], packs: Sequence[ShownPack], *, title: str, samples: int) -> str:
    """The page.

    Args:
        shown: the chosen samples.
        packs: the first packs.
        title: of the page.
        samples: how many there are in all.
    """
    body = _BODY.substitute(
        count=f'{len(shown):,}',
        samples=f'{samples:,}',
        shown='\n'.join(map(_sample, shown)),
        packs='\n'.join(map(_pack, packs)),
    )
    return page(body, title=title, style=_STYLE)


def _sample(sample: ShownSample) -> str:
    images = ''.join(map(_figure, sample.images))
    return (
        f'<article id="sample-{sample.index}"><h3>sample {sample.index}, {text(sample.where)}</h3>'
        f'<p class="facts">{sample.tokens:,} tokens, {sample.supervised:,} learned, '
        f'{sample.patches:,} vision patches</p>'
        f'<div class="images">{images}</div>'
        f'<div class="text">{"".join(map(_run, sample.runs))}</div></article>'
    )


def _run(run: TokenRun) -> str:
    classes = [*(['learned'] if run.learned else []), *([] if run.kind == 'text' else [run.kind])]
    shown = f'{run.tokens:,} image tokens' if run.kind == 'image' else text(run.text)
    return f'<span class="{" ".join(classes)}">{shown}</span>' if classes else shown


def _figure(image: ShownImage) -> str:
    boxes = f', boxes: {image.boxes}' if image.boxes else ''
    caption = f'{text(image.name)}, {image.size.width} x {image.size.height} pixels{boxes}'
    if image.picture is None:
        picture = f'<p class="trouble">{text(image.trouble)}</p>'
    else:
        picture = f'<img src="{data_uri(image.picture)}" alt="">'
    return f'<figure>{picture}<figcaption>{caption}</figcaption></figure>'


def _pack(pack: ShownPack) -> str:
    pieces = ''.join(
        f'<span style="flex: 0 0 {100 * tokens / pack.room:.3f}%; box-sizing: border-box" '
        f'title="sample {index}, {text(where)}: {tokens:,} tokens">{index}</span>'
        for index, where, tokens in pack.samples
    )
    return (
        f'<p class="facts">pack {pack.number}: {len(pack.samples)} samples, {pack.tokens:,} of {pack.room:,} tokens '
        f'({pack.tokens / pack.room:.1%})</p><div class="pack">{pieces}</div>'
    )
