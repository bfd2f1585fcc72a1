"""The style sheet of the page; the classes c0 to c7 are the colours of runs."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #fff; --ink: #1d2129; --soft: #667085; --line: #dfe3e8;
  --bad: #c5362b; --good: #1a7f4b; --extra: #ffdcd7; --missing: #d9f2e2;
  --c0: #2563c9; --c1: #d9730d; --c2: #1f8f5f; --c3: #b03a8f; --c4: #8a6d1d; --c5: #0f8ca8; --c6: #7a52cc;
  --c7: #6b7280 }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --card: #1b1f26; --ink: #e4e7ec; --soft: #98a2b3;
  --line: #333a45; --bad: #ff8a7a; --good: #5fd39a; --extra: #5c2620; --missing: #1d4a33;
  --c0: #6ea0f5; --c1: #f2a154; --c2: #55c794; --c3: #e07fc4; --c4: #d0b356; --c5: #4cc3de; --c6: #b196f0;
  --c7: #a4adba } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 0 auto;
max-width: 76rem;
  padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: .5rem 0 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem }
h3 { font-size: .95rem; margin: 0 0 .5rem }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem } a { color: var(--c0) }
.facts, figcaption, .label { color: var(--soft); font-size: .85rem }
.trouble { color: var(--bad); font-size: .9rem; margin: .25rem 0 }
.scroll { overflow-x: auto; max-width: 100% } .scroll:focus-visible { outline: 2px solid var(--c0) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; overflow-wrap: normal }
caption { text-align: left; color: var(--soft) }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top }
thead th, tbody tr { border-bottom: 1px solid var(--line) } th { font-weight: 600 }
tbody th { font-weight: 400; color: var(--soft); min-width: 6rem }
td { overflow-wrap: anywhere; min-width: 5rem }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem }
.plots figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .6rem;
background: var(--card); min-width: 0 }
.plots figcaption { display: flex; flex-wrap: wrap; gap: 0 .8rem } .plots b { color: var(--ink); font-weight: 600 }
svg { display: block; width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: var(--soft) }
svg .grid { stroke: var(--line); stroke-width: 1 } svg path { fill: none; stroke-width: 1.6; stroke-linejoin: round }
svg .faint { opacity: .3; stroke-width: 1 } svg .dots { stroke-dasharray: 4 3 }
svg path.area { stroke: none; opacity: .85 }
path.c0 { stroke: var(--c0) } path.c1 { stroke: var(--c1) } path.c2 { stroke: var(--c2) }
path.c3 { stroke: var(--c3) }
path.c4 { stroke: var(--c4) } path.c5 { stroke: var(--c5) } path.c6 { stroke: var(--c6) }
path.c7 { stroke: var(--c7) }
.dot.c0, .area.c0 { fill: var(--c0) } .dot.c1, .area.c1 { fill: var(--c1) } .dot.c2, .area.c2 { fill: var(--c2) }
.dot.c3, .area.c3 { fill: var(--c3) } .dot.c4, .area.c4 { fill: var(--c4) } .dot.c5, .area.c5 { fill: var(--c5) }
.dot.c6, .area.c6 { fill: var(--c6) } .dot.c7, .area.c7 { fill: var(--c7) }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: 0 0 .75rem }
.chip i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .35em }
i.c0 { background: var(--c0) } i.c1 { background: var(--c1) } i.c2 { background: var(--c2) }
i.c3 { background: var(--c3) }
i.c4 { background: var(--c4) } i.c5 { background: var(--c5) } i.c6 { background: var(--c6) }
i.c7 { background: var(--c7) }
i.dots { border: 2px dotted var(--soft) }
.card { border: 1px solid var(--line); border-left: 4px solid var(--line); border-radius: 8px; padding: .9rem;
margin: .9rem 0; background: var(--card) }
.card.wrong { border-left-color: var(--bad) } .card.right { border-left-color: var(--good) }
.pictures { display: flex; flex-wrap: wrap; gap: .75rem; margin-bottom: .5rem }
.pictures figure { margin: 0; max-width: min(100%, 320px) }
@media (min-width: 48rem) { .card:has(> .pictures) { display: grid; gap: 1.25rem;
  grid-template-columns: minmax(8rem, 17rem) minmax(0, 1fr) }
  .card .pictures { align-content: start } }
.pictures img { display: block; max-width: 100%; min-width: min(100%, 7rem); border-radius: 4px }
.label { margin: .6rem 0 .1rem } .label:first-child { margin-top: 0 }
.text { white-space: pre-wrap; max-height: 24rem; overflow-y: auto }
ins { background: var(--extra); text-decoration: none }
del { background: var(--missing); text-decoration: underline dotted }
#only { margin-right: .4em } body:has(#only:checked) .card.right { display: none }
details { margin: .5rem 0 } summary { cursor: pointer; color: var(--soft) }
pre { font: 12.5px/1.5 ui-monospace, monospace; background: var(--card); border: 1px solid var(--line);
border-radius: 8px; padding: .75rem; overflow-wrap: normal }"""
