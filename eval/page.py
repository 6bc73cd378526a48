"""The frame of the report: HTML head and style. No network, light and dark, desktop and phone."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbfa; --panel: #fff; --ink: #191d24; --soft: #626a77; --rule: #e3e4e6;
   --good: #0b7a4b; --bad: #b3372b;
  --s0: #8b929d; --s1: #2f6fd0; --s2: #d9822b; --s3: #12916a; --s4: #a44fb0; --s5: #c2404e; --s6: #2a9fb0; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --panel: #1b1f26; --ink: #e8eaee; --soft: #9aa3b1; --rule: #2e343e;
   --good: #4cc38a; --bad: #f0776a;
  --s0: #8f97a4; --s1: #6ba2f5; --s2: #f0a55a; --s3: #3fc79a; --s4: #cf86da; --s5: #f0808c; --s6: #5ccad8; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: clamp(1.2rem, 0.9rem + 1.3vw, 1.6rem); line-height: 1.4; font-weight: 600; margin: 0 0 20px;
  letter-spacing: -0.01em; text-wrap: pretty; }
h2 { font-size: 1.2rem; margin: 0 0 12px; letter-spacing: -0.01em; }
h3 { font-size: 1rem; margin: 0 0 8px; display: flex; flex-wrap: wrap; gap: 4px 10px; align-items: baseline; }
section { margin-top: 48px; }
small, .about, .arms, .legend, footer, figcaption { color: var(--soft); }
small { font-size: 0.8rem; font-weight: 400; }
.about { margin: 0 0 16px; max-width: 72ch; font-size: 0.92rem; }
.arms { margin: 0 0 12px; font-size: 0.9rem; }
.note { border-left: 3px solid var(--s2); padding: 4px 12px; margin: 0 0 12px; }
.dot { display: inline-block; width: 0.62em; height: 0.62em; border-radius: 50%; margin-right: 0.4em; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; }
.card, .panel, .strip, .charts figure { background: var(--panel); border: 1px solid var(--rule); border-radius: 10px; padding: 16px; }
.card span { display: block; color: var(--soft); font-size: 0.85rem; }
.card strong { display: block; font-size: 1.9rem; line-height: 1.3; font-weight: 600;
  font-variant-numeric: tabular-nums; letter-spacing: -0.02em; }
.panel { margin-bottom: 12px; }
.split { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 24px; align-items: center; }
figure { margin: 0; }
.forest { max-width: 480px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 11.5px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; font-variant-numeric: tabular-nums; }
svg .soft { fill: var(--soft); } svg .ink { fill: var(--ink); font-size: 13px; }
svg .grid { stroke: var(--rule); } svg .zero { stroke: var(--soft); stroke-dasharray: 3 3; }
mark { border-radius: 99px; padding: 1px 9px; font-size: 0.75rem; font-weight: 500; background: none; border: 1px solid currentColor; }
mark.held { color: var(--good); } mark.seen { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; min-width: 100%; }
th, td { text-align: left; padding: 7px 20px 7px 0; border-bottom: 1px solid var(--rule); white-space: nowrap; font-weight: 400; }
td b { font-weight: 600; margin-right: 0.6em; }
.split td small { display: block; }
thead th { color: var(--soft); font-size: 0.82rem; }
tbody tr:last-child > * { border-bottom: 0; }
.strips { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, calc(var(--n) * 112px + 34px)), 1fr)); }
.strip { padding: 12px 16px; }
.prompt { margin: 0 0 8px; font-size: 0.92rem; }
.cells { display: grid; grid-template-columns: repeat(var(--n), minmax(72px, 128px)); gap: 10px; overflow-x: auto; }
.cells img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 5px; }
.cells img.small { image-rendering: pixelated; }
.cells figcaption { font-size: 0.8rem; line-height: 1.4; margin-top: 5px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.cells figcaption span { color: var(--ink); font-variant-numeric: tabular-nums; }
.up { color: var(--good); font-size: 0.7em; } .down { color: var(--bad); font-size: 0.7em; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 12px; font-size: 0.9rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); gap: 12px; }
.charts figure { padding: 12px 14px; }
.charts figcaption { font-size: 0.85rem; margin-bottom: 6px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 4px 28px;
  margin-top: 20px; }
ul { margin: 0 0 16px; padding-left: 1.1em; font-size: 0.92rem; } li { margin-bottom: 4px; }
details { border-bottom: 1px solid var(--rule); padding: 8px 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: 0.82rem; background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: 12px; }
footer { margin-top: 48px; font-size: 0.85rem; border-top: 1px solid var(--rule); padding-top: 12px; max-width: none; }
@media (max-width: 760px) { main { padding: 24px 14px 48px; }
  .split { grid-template-columns: minmax(0, 1fr); gap: 12px; } section { margin-top: 36px; }
  .card, .panel, .strip { padding: 12px; } .cells { gap: 6px; } th, td { padding-right: 12px; } td small { font-size: 0.75rem; } }
"""


def document(title: str, body: str) -> str:
    """A whole HTML page. `title` is text, `body` is HTML."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body><main>{body}</main></body></html>\n'
