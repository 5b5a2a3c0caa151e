"""The page of a fidelity comparison: the verdict, what a server would feel, and the statistics behind it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squall.errors import InputError
from squall.fidelity import BANDS, AtScale, Compared, Distribution, Downstream, Fidelity, metric_name
from squall.report.page import write_sections
from squall.report.sections import Entry, Figure, Origin, Row, Section, Table
from squall.report.terminal import duration, number, percent
from squall.units import in_words

if TYPE_CHECKING:
    import altair as alt

REAL, GENERATED = "real", "generated"
_HEIGHT = 220
_VERDICTS = {
    "alike": "The generated trace behaves like the real one.",
    "alike in part": "The generated trace behaves like the real one in part.",
    "not alike": "The generated trace does not behave like the real one.",
}


def write_fidelity(found: Fidelity, out: str | Path, title: str | None = None) -> Path:
    """Write the page of `found` to `out` (.html) and return its path. Raises InputError for another suffix."""
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise InputError(f"{path}: a report is an HTML file; give a name that ends in .html.")
    lead = [f"{_VERDICTS[found.verdict]} {found.summary[0]}", *found.summary[1:]]
    write_sections(
        path,
        title or f"{_short(found.generated)} beside {_short(found.real)}",
        sections(found),
        _origins(found),
        lead=lead,
    )
    return path


def sections(found: Fidelity) -> list[Section]:
    """Downstream, arrivals, lengths, conversations and failures, all numbers."""
    legend = [Entry(REAL, _short(found.real)), Entry(GENERATED, _draws(found))]
    return [
        _downstream(found),
        Section(
            "Arrivals",
            f"Lines are the real trace and the median of the generated ones; the shade is their range{_over(found)}.",
            legend=legend,
            figures=_arrivals(found),
        ),
        Section("Lengths", "Of answered requests.", legend=legend, figures=_lengths(found)),
        *_sessions(found),
        Section("All numbers", "", tables=[_distances(found), _numbers(found)]),
    ]


# ---------------------------------------------------------------------------------------------------------- downstream


def _downstream(found: Fidelity) -> Section:
    target = found.target
    loads = sorted({one.load for one in found.downstream})
    text = (
        f"Both traces run through {target['replicas']} x {target['model']} on {target['gpu']} ({found.step_time}). "
        f"Load 100 % is {number(found.capacity)} requests/s, what this cluster sustains for the real trace's lengths; "
        "all traces are compressed in time by the same factor."
    )
    figures = [
        Figure(
            f"ratio-{metric}",
            metric_name(metric),
            _intervals(found, metric),
            "Generated / real: the median (dot) and the range of the draws (line). 1 is the real trace; "
            "the shade is what counts as the same."
            if metric in BANDS
            else "Generated / real: the median (dot) and the range of the draws (line). 1 is the real trace.",
        )
        for metric in ("ttft_p90", "ttft_p99", "e2e_mean", "peak_kv")
        if any(one.metric == metric and one.ratio for one in found.downstream)
    ]
    tables = [_felt(found)]
    if found.baselines:
        tables.append(_beside(found))
    return Section(
        "What a server would feel", text, [], [Entry(f"{100 * load:g} % load") for load in loads], tables, figures
    )


def _felt(found: Fidelity) -> Table:
    rows = []
    for k, one in enumerate(found.downstream):
        first = k == 0 or found.downstream[k - 1].load != one.load
        rows.append(
            Row(f"{metric_name(one.metric)} at {100 * one.load:g} %", _cells(one, _unit(one.metric)), group=first)
        )
    note = "Ratio: median of generated / real. A dash: unknown, or 0 in the real trace."
    return Table("Downstream", _HEAD, rows, note, marked=False)


_HEAD = ("", "real", "generated", "range", "ratio", "real inside range")


def _beside(found: Fidelity) -> Table:
    columns = [(one.load, one.metric) for one in found.downstream if one.metric in BANDS]
    head = ("ratio to real", *(f"{metric_name(metric)}, {100 * load:g} %" for load, metric in columns))
    sources = [("this one", found.downstream), *((one.name, one.downstream) for one in found.baselines)]
    rows = []
    for name, downstream in sources:
        by_place = {(one.load, one.metric): one for one in downstream}
        rows.append(Row(name, [_ratio(by_place[place]) for place in columns]))
    note = (
        "Median ratio [range of the draws], and * where the real value lies outside of the range. Below the first row: "
        "what is left of the real trace if only a part of its structure is kept: smooth arrivals with the lengths in "
        "place, its arrivals with the lengths shuffled, blocks of its time in random order."
    )
    return Table("Beside simpler ways to generate", head, rows, note, marked=False)


def _ratio(one: Downstream) -> str:
    if one.ratio is None or not one.real or one.low is None or one.high is None:
        return "-"
    if one.inside is None:
        return f"{one.ratio:.2f}"
    return f"{one.ratio:.2f} [{one.low / one.real:.2f}, {one.high / one.real:.2f}]{'' if one.inside else '*'}"


def _intervals(found: Fidelity, metric: str) -> "alt.LayerChart":
    """Ratio to the real trace with its range: a row for each source, a colour for each load."""
    import altair as alt

    sources = [("this one", found.downstream), *((one.name, one.downstream) for one in found.baselines)]
    loads = sorted({one.load for one in found.downstream})
    rows: list[dict[str, Any]] = []
    for name, downstream in sources:
        for one in downstream:
            if one.metric != metric or not one.real or not one.ratio or one.low is None or one.high is None:
                continue
            low, high = max(one.low / one.real, 1e-3), max(one.high / one.real, 1e-3)
            rows.append(
                {
                    "source": name,
                    "load": f"{100 * one.load:g} % load",
                    "ratio": max(one.ratio, 1e-3),
                    "low": low,
                    "high": high,
                    "range": f"{one.ratio:.3g} ({low:.3g} to {high:.3g})",
                }
            )
    names = list(dict.fromkeys(row["source"] for row in rows))
    ends = [row[key] for row in rows for key in ("low", "high")] + [0.8, 1.25]
    scale = alt.Scale(type="log", domain=[min(ends) * 0.95, max(ends) * 1.05], nice=False)
    ticks = [
        tick
        for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 1, 1.25, 2, 5, 10, 20, 50)
        if min(ends) <= tick <= max(ends)
    ]
    x = alt.X("ratio:Q", title="generated / real", scale=scale, axis=alt.Axis(values=ticks, format="~g"))
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        y=alt.Y("source:N", title=None, sort=names, axis=alt.Axis(labelLimit=170)),
        yOffset=alt.YOffset("load:N", sort=[f"{100 * load:g} % load" for load in loads]),
        color=alt.Color("load:N", scale=alt.Scale(domain=[f"{100 * load:g} % load" for load in loads]), legend=None),
        tooltip=[
            alt.Tooltip("source:N", title="title"),
            alt.Tooltip("load:N"),
            alt.Tooltip("range:N", title="ratio (range)"),
        ],
    )
    layers = []
    if metric in BANDS:
        low, high = BANDS[metric]
        band = alt.Chart(alt.InlineData(values=[{"low": low, "high": high}]))
        layers.append(band.mark_rect(opacity=0.14, color="#888").encode(x=alt.X("low:Q", scale=scale), x2="high:Q"))
    one_line = alt.Chart(alt.InlineData(values=[{"ratio": 1}])).mark_rule(strokeDash=[4, 4]).encode(x=x)
    layers += [
        one_line,
        base.mark_rule(strokeWidth=2.5, opacity=0.75, strokeCap="round").encode(
            x=alt.X("low:Q", scale=scale), x2="high:Q"
        ),
        base.mark_circle(size=60, opacity=1).encode(x=x),
    ]
    height = max(90, 16 * len(names) * max(len(loads), 1) + 10)
    return alt.layer(*layers).properties(width="container", height=height)


# ---------------------------------------------------------------------------------------------------------- statistics


def _arrivals(found: Fidelity) -> list[Figure]:
    figures = []
    if "gaps" in found.distributions:
        distance = f"Kolmogorov-Smirnov distance {number(found.ks['gaps'])} (0: the same, 1: nothing in common)."
        figures.append(
            Figure(
                "fidelity-gaps",
                "Gaps between arrivals",
                _shares(found.distributions["gaps"], "gap", seconds=True),
                f"Share of the gaps that are x or shorter. {distance}",
            )
        )
    if found.dispersion:
        figures.append(
            Figure(
                "fidelity-dispersion",
                "Burstiness over scales",
                _over_scales(found.dispersion, "variance / mean", log=True),
                "Variance / mean of the counts in bins of growing length: 1 at every scale is Poisson; where a curve "
                "rises, bursts are longer than that.",
            )
        )
    if any(one.real is not None for one in found.autocorrelation):
        figures.append(
            Figure(
                "fidelity-autocorrelation",
                "Memory of the load",
                _over_scales(found.autocorrelation, "correlation"),
                "Correlation of the counts in neighbouring bins: how much a busy bin says about the next.",
            )
        )
    return figures


def _lengths(found: Fidelity) -> list[Figure]:
    figures = []
    for key, name in (("request_tokens", "Request"), ("response_tokens", "Response")):
        if key in found.distributions:
            figures.append(
                Figure(
                    f"fidelity-{name.lower()}",
                    f"{name} lengths",
                    _shares(found.distributions[key], "tokens"),
                    f"Share of the {name.lower()}s of x tokens or fewer. Kolmogorov-Smirnov distance "
                    f"{number(found.ks[key])}, Wasserstein {number(found.wasserstein[key])} tokens.",
                )
            )
    for key, name in (("request_tokens", "Request"), ("response_tokens", "Response")):
        curve = found.lengths_in_time[key]
        if any(one.real is not None for one in curve):
            figures.append(
                Figure(
                    f"fidelity-{name.lower()}-in-time",
                    f"{name} lengths in time",
                    _over_scales(curve, "variance ratio", log=True),
                    "Variance of a bin's mean length over that of the same lengths in random order: 1 means that "
                    "lengths do not know what time it is.",
                )
            )
    return figures


def _shares(of: Distribution, title: str, seconds: bool = False) -> "alt.LayerChart":
    """Two distribution functions and the range of the generated ones."""
    least = min(value for value in (*of.real, *of.generated, *of.low) if value > 0) if max(of.real) > 0 else 1.0
    rows: list[dict[str, Any]] = []
    for name, values in ((REAL, of.real), (GENERATED, of.generated)):
        rows += [
            {"name": name, "x": max(value, least), "y": share} for value, share in zip(values, of.share, strict=True)
        ]
    band = [
        {"x": max(low, least), "x2": max(high, least), "y": share}
        for low, high, share in zip(of.low, of.high, of.share, strict=True)
    ]
    return _layers(rows, band, title, "share", seconds=seconds, log_x=True, percent_y=True)


def _over_scales(curve: Sequence[AtScale], title: str, log: bool = False) -> "alt.LayerChart":
    """The real and the generated curve over the length of the bins, and the range of the generated ones."""
    known = [one for one in curve if one.real is not None and one.generated is not None]
    rows: list[dict[str, Any]] = [{"name": REAL, "x": one.scale, "y": one.real} for one in known]
    rows += [{"name": GENERATED, "x": one.scale, "y": one.generated} for one in known]
    band = [{"x": one.scale, "y": one.low, "y2": one.high} for one in known if one.low is not None]
    if log:
        rows = [row for row in rows if row["y"] > 0]
        band = [row for row in band if (row["y"] or 0) > 0]
    return _layers(rows, band, "length of the bins", title, seconds=True, log_x=True, log_y=log, points=True)


_SECONDS = (
    "datum.value < 0.001 ? format(datum.value * 1e6, '~g') + ' µs' : datum.value < 1 ? "
    "format(datum.value * 1e3, '~g') + ' ms' : datum.value < 60 ? format(datum.value, '~g') + ' s' : "
    "datum.value < 3600 ? format(datum.value / 60, '~g') + ' min' : format(datum.value / 3600, '~g') + ' h'"
)


def _layers(
    rows: list[dict[str, Any]],
    band: list[dict[str, Any]],
    x_title: str,
    y_title: str,
    *,
    seconds: bool = False,
    log_x: bool = False,
    log_y: bool = False,
    percent_y: bool = False,
    points: bool = False,
) -> "alt.LayerChart":
    import altair as alt

    look: dict[str, Any] = {"labelExpr": _SECONDS} if seconds else {"format": "~s"}
    if points:
        look["values"] = [1, 2, 5, 10, 30, 60, 120, 300, 600]
    elif log_x:
        look["values"] = _decades([row["x"] for row in rows])
    x_axis = alt.Axis(**look)
    upright: dict[str, Any] = {"format": ".0%" if percent_y else "~g"}
    y_axis = alt.Axis(**upright, **({"values": _decades([row["y"] for row in rows])} if log_y else {}))
    x_scale = alt.Scale(type="log", nice=False) if log_x else alt.Scale()
    y_scale = alt.Scale(type="log", nice=False) if log_y else alt.Scale()
    colour = alt.Color("name:N", scale=alt.Scale(domain=[REAL, GENERATED]), legend=None)
    chart = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("x:Q", title=x_title, axis=x_axis, scale=x_scale),
        y=alt.Y("y:Q", title=y_title, axis=y_axis, scale=y_scale),
        color=colour,
        tooltip=[
            alt.Tooltip("name:N", title="title"),
            alt.Tooltip("x:Q", title=f"{x_title} (s)" if seconds else x_title, format=",.4~r"),
            alt.Tooltip("y:Q", title=y_title, format=".1%" if percent_y else ",.4~r"),
        ],
    )
    layers = []
    if band:
        shade = [{**row, "name": GENERATED} for row in band]
        across = {"x2": "x2:Q"} if "x2" in band[0] else {"y2": "y2:Q"}
        orient = "horizontal" if "x2" in band[0] else "vertical"
        area = alt.Chart(alt.InlineData(values=shade)).mark_area(opacity=0.18, orient=orient, clip=True)
        layers.append(
            area.encode(
                x=alt.X("x:Q", scale=x_scale, axis=x_axis, title=x_title),
                y=alt.Y("y:Q", scale=y_scale, axis=y_axis, title=y_title),
                color=colour,
                **across,
            )
        )
    layers.append(chart.mark_line(clip=True))
    layers.append(
        chart.mark_circle(size=30, clip=True) if points else chart.mark_circle(size=120, opacity=0, clip=True)
    )
    return alt.layer(*layers).properties(width="container", height=_HEIGHT)


def _decades(values: Sequence[float]) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, and 2 and 5 times them over less than three decades."""
    if not values:
        return []
    low, high = math.log10(min(values)), math.log10(max(values))
    steps = (1, 2, 5) if high - low < 3 else (1,)
    ticks = [float(f"{step}e{decade}") for decade in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    return [tick for tick in ticks if min(values) * 0.999 <= tick <= max(values) * 1.001]


def _sessions(found: Fidelity) -> list[Section]:
    rows = []
    for key, label, shown in (
        ("turns", "mean turns of a session", number),
        ("single", "sessions of one turn", percent),
        ("pause_p50", "median time between turns", duration),
    ):
        if key in found.conversations:
            rows.append(Row(label, _cells(found.conversations[key], shown), group=key == "turns"))
    for key, label, shown in (
        ("share", "failed requests", percent),
        ("after_failure", "failed, of those after a failed one", percent),
    ):
        if key in found.failures and any(one.real or one.generated for one in found.failures.values()):
            rows.append(Row(label, _cells(found.failures[key], shown), group=key == "share"))
    if not rows:
        return []
    return [
        Section(
            "Conversations and failures", "", tables=[Table("Conversations and failures", _HEAD, rows, marked=False)]
        )
    ]


def _distances(found: Fidelity) -> Table:
    rows = [
        Row(key.replace("_", " "), [number(distance), number(found.wasserstein[key])])
        for key, distance in found.ks.items()
    ]
    note = "Medians over the draws. Wasserstein: mean distance after the best pairing, in tokens or seconds."
    return Table("Distances", ("", "Kolmogorov-Smirnov", "Wasserstein"), rows, note, marked=False)


def _numbers(found: Fidelity) -> Table:
    rows = [Row(key.replace("_", " "), _cells(one, number)) for key, one in found.numbers.items()]
    for k, (key, one) in enumerate(found.spearman.items()):
        rows.append(Row(f"Spearman {key.replace('_', ', ')}", _cells(one, number), group=k == 0))
    for k, at in enumerate(found.dispersion):
        rows.append(Row(f"dispersion of counts, {in_words(at.scale)}", _cells(at, number), group=k == 0))
    return Table("Numbers", _HEAD, rows, marked=False)


def _cells(one: Compared, shown: Any) -> list[str]:
    spread = "-" if one.low is None or one.inside is None else f"{shown(one.low)} to {shown(one.high)}"
    inside = "-" if one.inside is None else ("yes" if one.inside else "no")
    return [shown(one.real), shown(one.generated), spread, number(one.ratio), inside]


def _unit(metric: str) -> Any:
    return {"peak_kv": percent, "preemptions": number}.get(metric, duration)


def _origins(found: Fidelity) -> list[Origin]:
    target = [
        (key.replace("_", " "), str(value))
        for key, value in found.target.items()
        if isinstance(value, str | int | float)
    ]
    draws = [("source", found.generated), ("draws", ", ".join(f"seed {seed}" for seed in found.seeds) or "one trace")]
    return [
        Origin("real", [("source", found.real), *(("note", note) for note in found.notes)]),
        Origin("generated", draws),
        Origin("modelled cluster", [*target, ("step time", found.step_time or "-")]),
    ]


def _draws(found: Fidelity) -> str:
    return f"{len(found.seeds)} draws" if found.seeds else _short(found.generated)


def _over(found: Fidelity) -> str:
    return f" over {len(found.seeds)} draws" if found.seeds else ", which a single trace does not have"


def _short(source: str) -> str:
    return source if "://" in source else Path(source).name or source
