"""The style of the page: light and dark, from a phone's width up. No scripts, nothing fetched."""

from __future__ import annotations

#: Forbids the page all scripts and all fetching, whatever text should have slipped in.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0;
  --panel: #f5f7f9; --note: #fff4d6;
  --c0: #0065bd; --c1: #c2410c; --c2: #15803d; --c3: #9333ea; --c4: #be185d; --c5: #0e7490;
  --c6: #854d0e; --c7: #475569; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --ink: #e6e9ed; --soft: #a3adb8; --line: #363d46; --panel: #1d2127;
    --note: #3a3115;
    --c0: #62b0ff; --c1: #ff9d5c; --c2: #5fd38a; --c3: #c79bff; --c4: #ff86b9; --c5: #55cfe6;
    --c6: #e0b34f; --c7: #a9b6c6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
nav a { margin-right: .9rem; } a { color: var(--c0); }
li { margin: .35rem 0; } .soft, figcaption { color: var(--soft); font-size: .85rem; }
.note { background: var(--note); border-radius: 8px; padding: .3rem 1rem; }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .28rem .6rem; text-align: right;
  white-space: nowrap; vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; }
th.name, td.name { text-align: left; }
td.long { white-space: normal; min-width: 9rem; max-width: 40rem; }
details { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .8rem;
  margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--panel); padding: .8rem; border-radius: 8px; overflow-x: auto;
  font-size: .82rem; white-space: pre-wrap; }
.plots { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.maps { grid-template-columns: repeat(auto-fill, minmax(min(100%, 200px), 1fr)); }
figure { margin: 0; min-width: 0; } .plots figure { background: var(--panel); border-radius: 8px;
  padding: .6rem; }
.pictures { display: grid; gap: .5rem; margin: .3rem 0 1rem;
  grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); }
.pictures figure { max-width: 256px; }
.pictures img { width: 100%; display: block; border-radius: 4px; }
img.small { image-rendering: pixelated; }
.none { aspect-ratio: 1; display: grid; place-items: center; border: 1px dashed var(--line);
  color: var(--soft); font-size: .85rem; border-radius: 4px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg text.small { font-size: 11px; fill: var(--soft); } svg text.bold { font-weight: 600; }
svg text.end { text-anchor: end; } svg text.middle { text-anchor: middle; }
svg text.halo { paint-order: stroke; stroke: var(--panel); stroke-width: 3px; fill: var(--ink); }
svg line { stroke: var(--line); } svg line.ink { stroke: var(--ink); }
svg .dashed { stroke-dasharray: 3 3; } svg line.thick { stroke-width: 2; }
svg line.thin { stroke-width: 1; opacity: .6; }
svg .pale { fill-opacity: .35; stroke: none; } svg .hollow { fill: var(--panel); stroke-width: 2; }
svg .front { fill: none; stroke: var(--soft); stroke-dasharray: 4 3; }
svg rect { stroke: var(--panel); }
""" + "\n".join(
    f"svg line.c{n} {{ stroke: var(--c{n}); }} "
    f"svg circle.c{n}:not(.hollow), svg rect.c{n} {{ fill: var(--c{n}); }} "
    f"svg circle.c{n}.hollow {{ stroke: var(--c{n}); }}"
    for n in range(8)
)
