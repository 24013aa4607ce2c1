"""Results as one HTML page with its plots inside it: no script, no font, nothing to fetch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from loadtests.proxy.pairs import Result, Spread, figure_of
from loadtests.proxy.table import describe, machine

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2230;
  background: #fcfcfa; }
h2 { margin-top: 3rem; } p.about, p.machine { color: #565e70; }
svg { width: 100%; height: auto; display: block; margin: 1rem 0; }
text { font: 13px system-ui, sans-serif; fill: #1c2230; }
text.axis { fill: #565e70; font-size: 12px; } .met { color: #1b7a3d; } .missed { color: #b3261e; }
.first { fill: #2a6f97; } .other { fill: #a9b8c4; } .range { stroke: #1c2230; stroke-width: 1.5; }
.p50 { fill: #2a6f97; } .p99 { fill: #e0a458; } .p999 { fill: #c1553b; } .grid { stroke: #e3e3dd; }
"""
_WIDTH, _LEFT, _RIGHT, _ROW = 880, 190, 160, 30


def html(results: Sequence[Result], about: dict[str, Any]) -> str:
    """The whole page."""
    sections = "".join(_section(result) for result in results)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Sandgate's plane and other proxies</title><style>{_STYLE}</style>"
        f"<h1>Sandgate's plane and other proxies</h1>"
        "<p>Bars are medians, whiskers the range over the rounds. Per core: work done per second of the proxy's "
        f'processor time.</p><p class="machine">{escape(machine(about))}</p>{sections}</html>\n'
    )


def _section(result: Result) -> str:
    case = result.case
    labels = [subject.label for subject in case.subjects if result.runs.get(subject.label)]
    quantity = "kib_each" if case.is_held else "per_core"
    figures = [(label, result.spread(label, figure_of(quantity, case))) for label in labels]
    title = "KiB each" if case.is_held else f"{case.unit} per core"
    plots = _bars(title, [(label, of) for label, of in figures if of is not None])
    if case.is_latency:
        plots += _latencies(result, labels)
    items = "".join(_item(result, index) for index in range(len(case.bars)))
    missing = f"<p>Not installed: {escape(', '.join(result.missing))}.</p>" if result.missing else ""
    about = f'<p class="about">{escape(case.about)}</p>'
    return f"<h2>{escape(case.name)}</h2>{about}{plots}<ul>{items}</ul>{missing}"


def _item(result: Result, index: int) -> str:
    judged = result.judge(result.case.bars[index])
    text = describe(judged).removeprefix("- ").replace("**", "")
    kind = {None: "", True: "met", False: "missed"}[judged.met]
    return f'<li class="{kind}">{escape(text)}</li>'


def _bars(title: str, rows: Sequence[tuple[str, Spread]]) -> str:
    """Horizontal bars with whiskers, the first in the colour of its own."""
    if not rows:
        return ""
    scale = (_WIDTH - _LEFT - _RIGHT) / max(of.most for _, of in rows)
    shapes = [f'<text class="axis" x="{_LEFT}" y="16">{escape(title)}</text>']
    for index, (label, of) in enumerate(rows):
        y = 28 + index * _ROW
        middle, end = y + 10, _LEFT + of.most * scale
        shapes += [
            f'<text x="{_LEFT - 10}" y="{y + 15}" text-anchor="end">{escape(label)}</text>',
            _rect("other" if index else "first", y, of.median * scale),
            f'<line class="range" x1="{_LEFT + of.least * scale:.1f}" x2="{end:.1f}" y1="{middle}" y2="{middle}"/>',
            f'<text x="{end + 8:.1f}" y="{y + 15}">{of.median:,.0f}</text>',
        ]
    return _svg(28 + len(rows) * _ROW, shapes, title)


def _latencies(result: Result, labels: Sequence[str]) -> str:
    """For each subject a bar as long as its p99.9, in it its p99 and p50."""
    rows = []
    for label in labels:
        of = [result.spread(label, figure_of(quantity, result.case)) for quantity in ("p50", "p99", "p99.9")]
        rows.append((label, [each.median / 1e3 for each in of if each is not None]))
    longest = max((max(values) for _, values in rows if values), default=0.0)
    if longest <= 0:
        return ""
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    title = "latency in ms: p50, p99, p99.9"
    shapes = [f'<text class="axis" x="{_LEFT}" y="16">{title}</text>']
    for index, (label, values) in enumerate(rows):
        y = 28 + index * _ROW
        shapes.append(f'<text x="{_LEFT - 10}" y="{y + 15}" text-anchor="end">{escape(label)}</text>')
        for kind, value in reversed(list(zip(("p50", "p99", "p999"), values, strict=True))):
            shapes.append(_rect(kind, y, value * scale))
        text = " / ".join(f"{value:.2f}" for value in values)
        shapes.append(f'<text x="{_LEFT + values[-1] * scale + 8:.1f}" y="{y + 15}">{text}</text>')
    return _svg(28 + len(rows) * _ROW, shapes, title)


def _rect(kind: str, y: int, width: float) -> str:
    return f'<rect class="{kind}" x="{_LEFT}" y="{y}" width="{width:.1f}" height="20" rx="2"/>'


def _svg(height: int, shapes: Sequence[str], title: str) -> str:
    head = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    return f"{head}{''.join(shapes)}</svg>"
