"""Results as Markdown, for a terminal and for docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loadtests.proxy.cases import Bar
from loadtests.proxy.pairs import Judged, Result, Spread, failures, figure_of

_BARS = {
    "per_core": "per core",
    "p50": "p50",
    "p99": "p99",
    "rate": "rate",
    "kib_each": "KiB each",
    "failures": "failures",
}


def markdown(results: Sequence[Result], about: dict[str, Any]) -> str:
    """A table of figures and one of bars for each case, then what they were measured on."""
    return "\n".join([*(_case(result) for result in results), machine(about), ""])


def machine(about: dict[str, Any]) -> str:
    """What the figures depend on, in one paragraph."""
    programs = "; ".join(f"{name}: {version}" for name, version in about["versions"].items())
    return (
        f"{about['measured_at']}: {about['cores']} × {about['cpu']}, {about['memory_gib']} GiB, kernel "
        f"{about['kernel']}; revision {about['revision']}, {about['rustc']}; {programs}. Medians of {about['pairs']} "
        f"rounds of {about['seconds']:g} s."
    )


def _case(result: Result) -> str:
    case = result.case
    if case.is_held:
        return "\n".join([*_held(result), "", *(describe(judged) for judged in map(result.judge, case.bars)), ""])
    base = case.subjects[0].label
    lines = [f"### {case.name}", "", case.about, ""]
    lines += [
        f"| | {case.unit}/s | per core | {base} ÷ it | p50 ms | p99 ms | p99.9 ms | failures | foreign cores |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(result, subject.label, base) for subject in case.subjects if result.runs.get(subject.label)]
    lines += ["", *(describe(judged) for judged in map(result.judge, case.bars)), ""]
    return "\n".join(lines)


def _held(result: Result) -> list[str]:
    lines = [f"### {result.case.name}", "", result.case.about, "", "| | connections | KiB each |", "|---|---|---|"]
    for label, runs in result.runs.items():
        each = result.spread(label, figure_of("kib_each", result.case))
        lines.append(f"| {label} | {runs[0]['ready']:,} | {spread_text(each)} |")
    return lines


def _row(result: Result, label: str, base: str) -> str:
    def figure(quantity: str) -> Spread | None:
        return result.spread(label, figure_of(quantity, result.case))

    ratio = result.ratio(base, label, figure_of("per_core", result.case)) if label != base else None
    latencies = [figure(quantity) if result.case.is_latency else None for quantity in ("p50", "p99", "p99.9")]
    foreign = result.spread(label, lambda run: float(run["foreign_cores"]))
    cells = [
        label,
        _number(figure("rate")),
        _number(figure("per_core")),
        spread_text(ratio),
        *(f"{of.median / 1e3:.2f}" if of else "–" for of in latencies),
        str(sum(map(failures, result.runs[label]))),
        f"{foreign.median:.2f}" if foreign else "–",
    ]
    return f"| {' | '.join(cells)} |"


def _number(of: Spread | None) -> str:
    return f"{of.median:,.0f} ± {of.mad:,.0f}" if of else "–"


def spread_text(of: Spread | None) -> str:
    """A median with its range."""
    return f"{of.median:.2f} [{of.least:.2f}..{of.most:.2f}]" if of else "–"


def describe(judged: Judged) -> str:
    """A bar and whether it was cleared, as an item of a list."""
    bar, value = judged.bar, judged.value
    said = {None: "not measured", True: "met", False: "missed"}[judged.met]
    return f"- {demand(bar)}: {'' if value is None else f'{value:,.2f}, '}**{said}**"


def demand(bar: Bar) -> str:
    """What a bar asks for."""
    what = f"{bar.subject}, {_BARS[bar.quantity]}"
    if bar.against is not None:
        what += f" minus {bar.against}'s, µs" if bar.is_difference else f" ÷ {bar.against}'s"
    limits = [f"≥ {bar.at_least:g}"] if bar.at_least is not None else []
    limits += [f"≤ {bar.at_most:g}"] if bar.at_most is not None else []
    return f"{what} {' and '.join(limits)}"
