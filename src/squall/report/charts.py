"""The charts of a report as declarations: from data to an altair chart, for the page (interactive) or a PNG.

Every chart overlays named series, one colour each in the order of the names; the colours and everything else that
depends on a light or dark page are in `theme`, not in the charts. Times are in seconds on the way in.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from squall.characterize.concurrency import dispersion
from squall.characterize.summary import bin_width
from squall.run import Run

if TYPE_CHECKING:
    import altair as alt

    from squall.characterize import Stream
    from squall.characterize.lengths import Histogram
    from squall.characterize.summary import Octaves

Latency = Mapping[str, np.ndarray]
"""Columns by request, as `squall.run.metrics.latencies` gives them."""

POINTS = 400
"""A curve that stands for a sample has at most this many points."""
BINS = 240
"""A series over time has at most this many bins."""
HEIGHT = 220

# Okabe and Ito's colours, which readers with any colour vision tell apart (Color Universal Design, 2008), the darker
# ones lightened for a dark page and the lighter ones darkened for a light one. Black and yellow have no contrast there.
LIGHT = ("#0072B2", "#D55E00", "#00875F", "#B5598F", "#A87400", "#2E86C1", "#6B6B6B")
DARK = ("#56B4E9", "#F28C4E", "#2DC49A", "#DE9CC4", "#E6B23C", "#9CCBEA", "#A8A8A8")

_DURATION = (
    "datum.value == 0 ? '0' : abs(datum.value) < 0.001 ? format(datum.value * 1000000, '~g') + ' µs' : "
    "abs(datum.value) < 1 ? format(datum.value * 1000, '~g') + ' ms' : "
    "abs(datum.value) < 60 ? format(datum.value, '~g') + ' s' : "
    "abs(datum.value) < 3600 ? format(datum.value / 60, '~g') + ' min' : "
    "abs(datum.value) < 86400 ? format(datum.value / 3600, '~g') + ' h' : format(datum.value / 86400, '~g') + ' d'"
)


def theme(dark: bool = False) -> dict[str, Any]:
    """The Vega-Lite config for a light or a dark page; the background is left to the page."""
    text, faint, grid = ("#c9ccd1", "#8b9096", "#2c3036") if dark else ("#3b4046", "#6f757c", "#e7e9ec")
    font = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
    return {
        "background": None,
        "font": font,
        "view": {"stroke": None},
        "range": {
            "category": list(DARK if dark else LIGHT),
            "heatmap": ["#1c2329", "#256a99", "#c4e6fb"] if dark else ["#f1f5f9", "#4f9bcb", "#00375a"],
        },
        "axis": {
            "labelColor": faint,
            "titleColor": text,
            "gridColor": grid,
            "domain": False,
            "ticks": False,
            "labelFontSize": 11,
            "titleFontSize": 11,
            "titleFontWeight": "normal",
            "labelPadding": 6,
            "titlePadding": 8,
        },
        "axisY": {
            "tickCount": 5,
            "titleAnchor": "end",
            "titleAngle": 0,
            "titleAlign": "left",
            "titleY": -10,
            "titleX": 0,
        },
        "axisX": {"tickCount": 6, "labelOverlap": True, "labelFlush": True},
        "legend": {
            "labelColor": text,
            "titleColor": text,
            "titleFontWeight": "normal",
            "orient": "top",
            "offset": 24,
            "title": None,
            "symbolType": "stroke",
            "labelLimit": 0,
        },
        "title": {"color": text, "anchor": "start", "fontSize": 13},
        "rule": {"color": faint},
        "text": {"color": faint, "fontSize": 11},
        "line": {"strokeWidth": 1.8, "strokeJoin": "round"},
    }


def save_png(chart: "alt.LayerChart", path: str | Path, dark: bool = False, width: int = 720) -> Path:
    """Write `chart` as a PNG of `width` px at twice the resolution, with its legend, on a plain background."""
    import vl_convert

    spec = declaration(chart)
    spec["width"] = width
    for layer in spec["layer"]:
        color = layer.get("encoding", {}).get("color")
        if isinstance(color, dict) and "scale" in color and len(color["scale"]["domain"]) > 1:
            color["legend"] = {"columns": 3}
    config = theme(dark) | {"background": "#15171a" if dark else "#ffffff", "padding": 16}
    path = Path(path)
    path.write_bytes(vl_convert.vegalite_to_png(spec, config=config, scale=2))
    return path


def declaration(chart: "alt.LayerChart") -> dict[str, Any]:
    """`chart` as a Vega-Lite specification without altair's own theme and without the address of its schema."""
    spec: dict[str, Any] = chart.to_dict()
    for key in ("config", "$schema"):
        spec.pop(key, None)
    return spec


def rate_over_time(streams: "Mapping[str, Stream]") -> "alt.LayerChart":
    """Requests/s over the trace; over its mean where traces of very different spans lie over each other."""
    rows: list[dict[str, Any]] = []
    relative = differ(streams)
    for name, stream in streams.items():
        series = stream.rate_series
        unit = (stream.rate or 1.0) if relative else 1.0
        rows += [
            {"name": name, "x": series.start + k * series.width, "y": count / series.width / unit}
            for k, count in enumerate(series.counts)
        ]
    y = _axis("rate / mean rate" if relative else "requests/s")
    return _curves(rows, streams, x=_course(rows, streams), y=y, step=True)


def differ(streams: "Mapping[str, Stream]") -> bool:
    """Are the spans so different that they cannot share an axis of time?"""
    spans = [_span(stream) for stream in streams.values()]
    return max(spans) > 3 * min(spans)


def _span(stream: "Stream") -> float:
    return stream.rate_series.width * len(stream.rate_series.counts)


def _course(rows: list[dict[str, Any]], streams: "Mapping[str, Stream]") -> dict[str, Any]:
    """The axis of the time since the start, or of the share of the trace where spans differ much."""
    if not differ(streams):
        return _time(rows)
    for row in rows:
        stream = streams[row["name"]]
        row["x"] = (row["x"] - stream.rate_series.start) / _span(stream)
    return _axis("share of the trace that is over", format=".0%", domain=(0, 1))


def alpha_over_time(streams: "Mapping[str, Stream]") -> "alt.LayerChart":
    """The shape alpha of the Gamma fit of the gaps in each window; 1 is Poisson, less is bursty."""
    rows: list[dict[str, Any]] = []
    for name, stream in streams.items():
        series = stream.gamma_windows.series
        step = float(np.diff(series.start).min()) if len(series.start) > 1 else 0.0
        for k, (start, alpha) in enumerate(zip(series.start, series.alpha, strict=True)):
            if k and start - series.start[k - 1] > 1.5 * step:
                rows.append({"name": name, "x": start - step, "y": None})  # no line over windows without a fit
            rows.append({"name": name, "x": start, "y": alpha})
    return _curves(
        rows, streams, x=_course(rows, streams), y=_axis("alpha", log=True), reference=(1.0, "Poisson"), points=True
    )


def dispersion_curves(arrivals: Mapping[str, np.ndarray], finest: float = 0.1) -> "alt.LayerChart":
    """Variance / mean of the counts in bins of growing length, from sorted `arrivals`; 1 at every scale is Poisson."""
    rows: list[dict[str, Any]] = []
    for name, times in arrivals.items():
        span = float(times[-1] - times[0]) if times.size else 0.0
        if span <= 0:
            continue
        # Bins finer than a tenth of the mean gap only say that requests are points.
        low = max(finest, span / times.size / 10)
        # Twice as long each time, so that the bins of one scale are made of those of the one before.
        scales = tuple(low * 2.0**k for k in range(int(np.floor(np.log2(max(span / 10 / low, 0.5)))) + 1))
        rows += [{"name": name, "x": x, "y": y} for x, y in dispersion(times, scales) if y > 0]
    x = _axis("length of the bins", log=True, duration=True)
    return _curves(rows, arrivals, x=x, y=_axis("variance / mean", log=True), reference=(1.0, "Poisson"), points=True)


def lengths(histograms: "Mapping[str, Histogram]", title: str, names: Sequence[str]) -> "alt.LayerChart":
    """Densities on a logarithmic axis, as shares of requests per bin of a quarter doubling, so that areas are shares.

    `names` are all series of the page's section, so that colours stay the same where one has no histogram.
    """
    rows: list[dict[str, Any]] = []
    for name, histogram in histograms.items():
        total = sum(histogram.counts)
        height = 0.0
        for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
            if low > 0:
                height = count / total / float(4 * np.log2(high / low))
                rows.append({"name": name, "x": low, "y": height, "to": high, "share": count / total})
        rows.append({"name": name, "x": histogram.edges[-1], "y": height, "to": histogram.edges[-1], "share": 0.0})
    extra = {"to": ("up to", ",.0f"), "share": ("share of requests", ".2%")}
    x, y = _axis(title, log=True, format=",d"), _axis("share of requests per bin", format=".0%")
    return _curves(rows, names, x=x, y=y, step=True, filled=True, extra=extra)


def hours(streams: "Mapping[str, Stream]") -> "alt.LayerChart":
    """Mean requests per hour of the day."""
    rows = [
        {"name": name, "x": hour, "y": value}
        for name, stream in streams.items()
        for hour, value in enumerate([*stream.hour_of_day, *stream.hour_of_day[-1:]])
    ]
    x = _axis("hour of the day", domain=(0, 24), values=tuple(range(0, 25, 3)))
    return _curves(rows, streams, x=x, y=_axis("requests/h"), step=True, filled=True)


def hour_boxes(streams: "Mapping[str, Stream]", what: str, title: str) -> "alt.LayerChart":
    """Totals per hour by hour of the day: a box over the middle half of the days with a line at the median.

    `what` is a field of the hour boxes: `requests`, `request_tokens` or `response_tokens`. The extremes, which floods
    carry out of sight, are in the tooltip.
    """
    import altair as alt

    names = list(streams)
    rows = [
        {"name": name, "x": hour, "y": box.median, "low": box.q1, "high": box.q3, "least": box.min, "most": box.max}
        for name, stream in streams.items()
        for hour, box in enumerate(getattr(stream.hours, what))
    ]
    fields = {"least": "least", "low": "lower quartile", "y": "median", "high": "upper quartile", "most": "most"}
    encoded = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("x:O", title="hour of the day", axis=alt.Axis(values=list(range(0, 24, 3)), labelAngle=0, grid=False)),
        xOffset=alt.XOffset("name:N", sort=names, scale=alt.Scale(domain=names)),
        color=alt.Color("name:N", scale=alt.Scale(domain=names), legend=None),
        tooltip=[
            *([alt.Tooltip("name:N", title="title")] if len(names) > 1 else []),
            alt.Tooltip("x:O", title="hour"),
            *(alt.Tooltip(f"{field}:Q", title=label, format=",.4~r") for field, label in fields.items()),
        ],
    )
    boxes = encoded.mark_bar(opacity=0.45).encode(
        y=alt.Y("low:Q", title=title, stack=None, axis=alt.Axis(format="~s")), y2="high:Q"
    )
    medians = encoded.mark_tick(thickness=2).encode(y=alt.Y("y:Q", title=title))
    return alt.layer(boxes, medians).properties(width="container", height=HEIGHT)


def working_day_alpha(streams: "Mapping[str, Stream]", names: Sequence[str] = ()) -> "alt.LayerChart":
    """The mean alpha of each slot of the working day; the fit of all days' gaps together is in the tooltip.

    `names` are all series of the page's section, so that colours stay the same where one has no such day.
    """
    rows: list[dict[str, Any]] = []
    for name, stream in streams.items():
        day = stream.working_day
        for k, start in enumerate(day.start):
            alpha, beta = day.parameters.alpha[k], day.parameters.beta[k]
            pooled = {"pooled": day.pooled.alpha[k], "rate": day.rate[k], "beta": beta, "windows": day.windows[k]}
            rows.append({"name": name, "x": start / 3600, "y": alpha, **pooled})
    x = _axis("hour of the day", domain=(0, 24), values=tuple(range(0, 25, 3)))
    extra = {"beta": ("beta, 1/s", ",.4~r"), "pooled": ("alpha, pooled", ",.4~r"), "rate": ("requests/s", ",.4~r")}
    extra["windows"] = ("days with a fit", ",d")
    y = _axis("alpha", log=True)
    return _curves(rows, names or streams, x=x, y=y, reference=(1.0, "Poisson"), points=True, extra=extra)


def burst_sizes(streams: "Mapping[str, Stream]", scale: float) -> "alt.LayerChart":
    """Each burst at `scale` as a point: when it began and how many requests it held; the largest 100 of each stream."""
    rows: list[dict[str, Any]] = []
    for name, stream in streams.items():
        for series in (one.series for one in stream.bursts if one.scale == scale):
            for start, length, requests in zip(series.start, series.length, series.requests, strict=True):
                minutes = {"minutes": length / 60, "rate": requests / length}
                rows.append({"name": name, "x": start, "y": requests, **minutes})
    extra = {"minutes": ("minutes", ",.4~r"), "rate": ("requests/s", ",.4~r")}
    y = _axis("requests in the burst", log=True, format=",d")
    return _curves(rows, streams, x=_course(rows, streams), y=y, points=True, line=False, extra=extra)


def failed_share_over_time(streams: "Mapping[str, Stream]") -> "alt.LayerChart":
    """Share of the requests that failed, over the trace."""
    rows: list[dict[str, Any]] = []
    for name, stream in streams.items():
        series = stream.failures.series
        rows += [
            {"name": name, "x": series.start + k * series.width, "y": lost / count if count else None}
            for k, (count, lost) in enumerate(zip(series.requests, series.failed, strict=True))
        ]
    return _curves(rows, streams, x=_course(rows, streams), y=_axis("failed", format=".0%"), step=True)


def failed_share_by_alpha(streams: "Mapping[str, Stream]") -> "alt.LayerChart":
    """Share of the requests that failed, by the shape alpha of the gaps in their window."""
    rows = [
        {"name": name, "x": max(bucket.low, 0.125) * 2**0.5, "y": bucket.failed_share, "n": bucket.requests}
        for name, stream in streams.items()
        for bucket in stream.failures.by_alpha
    ]
    x, y = _axis("alpha of the window", log=True), _axis("failed", format=".1%")
    return _curves(rows, streams, x=x, y=y, points=True, extra={"n": ("requests", ",d")})


def cache_hits(streams: "Mapping[str, Stream]") -> "alt.LayerChart":
    """Share of prompt blocks that a prefix cache of x tokens holds, if it forgets the least recently used."""
    rows = [
        {"name": name, "x": size.blocks * (stream.prefixes.block_size or 1), "y": size.hit_share}
        for name, stream in streams.items()
        for size in stream.prefixes.cache
    ]
    x, y = _axis("tokens in the cache", log=True, format="~s"), _axis("share of blocks that hit", format=".0%")
    return _curves(rows, streams, x=x, y=y, points=True)


def response_band(streams: "Mapping[str, Stream]") -> "alt.LayerChart":
    """Median response by request length as a line, the mean dashed (of one or two), the middle 90 % as a band."""
    import altair as alt

    rows = [
        {"name": name, "x": (band.low * band.high) ** 0.5, "y": max(band.p50, 1), "low": max(band.p5, 1)}
        | {"high": max(band.p95, 1), "mean": max(band.mean, 1.0), "n": band.n}
        for name, stream in streams.items()
        for band in stream.response_bands
    ]
    extra = {"mean": ("mean", ",.4~r"), "low": ("5 %", ",d"), "high": ("95 %", ",d"), "n": ("requests", ",d")}
    x = _axis("request tokens", log=True, format=",d")
    y = _axis("response tokens", log=True, format="~s")
    chart = _curves(rows, streams, x=x, y=y, points=True, extra=extra)
    names, found = list(streams), len({row["name"] for row in rows})
    data, color = alt.InlineData(values=rows), alt.Color("name:N", scale=alt.Scale(domain=names), legend=None)
    place = alt.X("x:Q", **_channel("x", x, rows))
    band = alt.Chart(data).mark_area(clip=True, opacity=0.16 if found <= 2 else 0.07)
    low = alt.Y("low:Q", stack=None, **_channel("y", y, rows))
    chart.layer.insert(0, band.encode(x=place, y=low, y2="high:Q", color=color))
    if found <= 2:  # more lines over each other are mud
        mean = alt.Chart(data).mark_line(clip=True, strokeDash=[4, 3], strokeWidth=1.2)
        chart.layer.insert(
            1, mean.encode(x=place, y=alt.Y("mean:Q", stack=None, **_channel("y", y, rows)), color=color)
        )
    return chart


def families(streams: "Mapping[str, Stream]") -> "alt.LayerChart":
    """How far each fitted family is from the lengths: KS distance by family, requests and responses side by side."""
    import altair as alt

    names = list(streams)
    rows = [
        {"name": name, "family": fit.family, "side": side, "y": fit.ks, "rank": k, "bic": fit.bic / lengths.n}
        for name, stream in streams.items()
        for side, lengths in (("request", stream.request_tokens), ("response", stream.response_tokens))
        for k, fit in enumerate(lengths.fits, start=1)
    ]
    chart = alt.Chart(alt.InlineData(values=rows)).mark_point(filled=True, size=70, opacity=0.9)
    encoded = chart.encode(
        x=alt.X("y:Q", title="KS distance", scale=alt.Scale(domainMin=0)),
        y=alt.Y("family:N", title=None, axis=alt.Axis(grid=True, labelLimit=200)),
        yOffset=alt.YOffset("side:N", sort=["request", "response"]),
        color=alt.Color("name:N", scale=alt.Scale(domain=names), legend=None),
        shape=alt.Shape(
            "side:N", scale=alt.Scale(domain=["request", "response"], range=["circle", "triangle-up"])
        ).legend(title=None, offset=8, symbolFillColor="#888", symbolStrokeColor="#888"),
        tooltip=[
            *([alt.Tooltip("name:N", title="title")] if len(names) > 1 else []),
            alt.Tooltip("family:N"),
            alt.Tooltip("side:N"),
            alt.Tooltip("y:Q", title="KS distance", format=".3f"),
            alt.Tooltip("rank:Q", title="place by BIC"),
            alt.Tooltip("bic:Q", title="BIC per request", format=",.4~r"),
        ],
    )
    return alt.layer(encoded).properties(width="container", height=HEIGHT)


def autocorrelation(streams: "Mapping[str, Stream]") -> "alt.LayerChart":
    """Autocorrelation of the counts by lag."""
    rows: list[dict[str, Any]] = [
        {"name": name, "x": k * (stream.periodicity.autocorrelation_bin or 0.0), "y": value}
        for name, stream in streams.items()
        for k, value in enumerate(stream.periodicity.autocorrelation)
    ]
    bins = {s.periodicity.autocorrelation_bin for s in streams.values() if s.periodicity.autocorrelation}
    if len(bins) < 2:
        return _curves(rows, streams, x=_time(rows, "lag"), y=_axis("autocorrelation"), reference=(0.0, ""))
    rows = [row for row in rows if row["x"] > 0]
    x = _axis("lag", log=True, duration=True)
    return _curves(rows, streams, x=x, y=_axis("autocorrelation"), reference=(0.0, ""))


def spectrum(streams: "Mapping[str, Stream]") -> "alt.LayerChart":
    """Power of the counts over the mean power of the frequencies around, by period; 1 is noise."""
    rows = [
        {"name": name, "x": period, "y": max(strength, 0.1)}
        for name, stream in streams.items()
        for period, strength in zip(
            stream.periodicity.spectrum.period, stream.periodicity.spectrum.strength, strict=True
        )
    ]
    alarm = max((s.periodicity.spectrum.alarm or 0.0 for s in streams.values()), default=0.0)
    x, y = _axis("period", log=True, duration=True), _axis("power / mean around", log=True)
    return _curves(rows, streams, x=x, y=y, reference=(alarm, "beyond noise") if alarm else None)


def goodness(streams: "Mapping[str, Stream]") -> "alt.LayerChart":
    """Windows by the distance of their gaps from the fitted Gamma, in units in which 1.36 is the limit of the test."""
    rows: list[dict[str, Any]] = []
    for name, stream in streams.items():
        found, total = stream.gamma_windows.goodness, stream.gamma_windows.fitted
        rows += [
            {"name": name, "x": edge, "y": count / total, "windows": count}
            for edge, count in zip(found.edges, found.windows, strict=True)
            if total
        ]
    x = _axis(
        "√n × KS distance (1.36: the 5 % limit; the last bin holds all beyond)",
        values=(0, 0.4, 0.8, 1.36, 2, 3, 4),
        format=".3~r",
    )
    y = _axis("share of windows", format=".0%")
    return _curves(rows, streams, x=x, y=y, step=True, filled=True, extra={"windows": ("windows", ",d")})


def turns(streams: "Mapping[str, Stream]") -> "alt.LayerChart":
    """Share of the conversations with more than x turns."""
    rows: list[dict[str, Any]] = []
    for name, stream in streams.items():
        left = 1.0
        for k, share in enumerate(stream.conversations.turns_shares, start=1):
            rows.append({"name": name, "x": k, "y": left, "share": share})
            left = max(left - share, 0.0)
    x, y = _axis("turns", format="d"), _axis("share with so many or more", format=".0%", domain=(0, 1))
    return _curves(rows, streams, x=x, y=y, points=True, extra={"share": ("with just so many", ".1%")})


def growth(streams: "Mapping[str, Stream]") -> "alt.LayerChart":
    """Mean request length at each turn of the conversation."""
    rows = [
        {"name": name, "x": turn.turn, "y": turn.request_mean, "median": turn.request_p50}
        | {"response": turn.response_mean, "n": turn.requests}
        for name, stream in streams.items()
        for turn in stream.conversations.by_turn
    ]
    extra = {"median": ("median", ",.4~r"), "response": ("mean response", ",.4~r"), "n": ("requests", ",d")}
    x, y = _axis("turn", format="d"), _axis("mean request tokens", format="~s")
    return _curves(rows, streams, x=x, y=y, points=True, extra=extra)


def octaves(
    found: "Mapping[str, Octaves]", names: Sequence[str], title: str, *, of: str, duration: bool = False
) -> "alt.LayerChart":
    """Shares by factors of 2 on a logarithmic axis; what lies below 1 stands at 1/2. `of` names what is counted."""
    rows: list[dict[str, Any]] = []
    for name, histogram in found.items():
        total = sum(histogram.counts)
        steps = zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
        for low, high, count in steps:
            rows.append({"name": name, "x": low or 0.5, "y": count / total, "to": high, "count": count})
        rows.append({"name": name, "x": histogram.edges[-1], "y": count / total, "to": high, "count": count})
    extra = {"to": ("up to", ",.4~r"), "count": (of, ",d")}
    x, y = _axis(title, log=True, duration=duration, format=",~r"), _axis(f"share of {of}", format=".0%")
    return _curves(rows, names, x=x, y=y, step=True, filled=True, extra=extra)


def burst_runs(streams: "Mapping[str, Stream]", scale: float) -> "alt.LayerChart":
    """How long the bursts at `scale` last (solid) and the pauses between them (dashed): shares by factors of 2."""
    import altair as alt

    names = list(streams)
    rows: list[dict[str, Any]] = []
    for name, stream in streams.items():
        for one in (one for one in stream.bursts if one.scale == scale):
            for state, found in (("burst", one.on_runs), ("pause", one.off_runs)):
                total = sum(found.counts)
                rows += [
                    {"name": name, "state": state, "x": low * scale, "y": count / total, "count": count}
                    for low, count in zip(found.edges, found.counts, strict=False)
                    if low > 0
                ]
    x, y = _axis("length, from", log=True, duration=True), _axis("share of runs", format=".0%")
    color = alt.Color("name:N", scale=alt.Scale(domain=names), legend=None)
    dash = alt.StrokeDash("state:N", scale=alt.Scale(domain=["burst", "pause"], range=[[1, 0], [4, 3]]))
    tooltip = [
        *([alt.Tooltip("name:N", title="title")] if len(names) > 1 else []),
        alt.Tooltip("state:N"),
        alt.Tooltip("x:Q", title="from (s)", format=",.4~r"),
        alt.Tooltip("y:Q", title="share of runs", format=".1%"),
        alt.Tooltip("count:Q", title="runs", format=",d"),
    ]
    chart = alt.Chart(alt.InlineData(values=rows)).mark_line(point=alt.OverlayMarkDef(size=30))
    encoded = chart.encode(
        x=alt.X("x:Q", **_channel("x", x, rows)),
        y=alt.Y("y:Q", stack=None, **_channel("y", y, rows)),
        color=color,
        strokeDash=dash.legend(title=None, symbolStrokeColor="#888"),
        detail="state:N",
        tooltip=tooltip,
    )
    return alt.layer(encoded).properties(width="container", height=HEIGHT)


def failed_share_by_length(streams: "Mapping[str, Stream]") -> "alt.LayerChart":
    """Share of the requests that failed, by request length."""
    rows = [
        {"name": name, "x": (bucket.low * bucket.high) ** 0.5, "y": bucket.failed_share, "n": bucket.requests}
        for name, stream in streams.items()
        for bucket in stream.failures.by_request_length
    ]
    x, y = _axis("request tokens", log=True, format=",d"), _axis("failed", format=".1%")
    return _curves(rows, streams, x=x, y=y, points=True, extra={"n": ("requests", ",d")})


DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def week_by_hour(stream: "Stream") -> "alt.LayerChart":
    """Mean requests/h on each hour of the week as colour."""
    rows = [
        {"x": hour, "day": day, "y": value}
        for day, hours in zip(DAYS, stream.weeks.hours, strict=True)
        for hour, value in enumerate(hours)
    ]
    return _heat_map(rows, "hour of the day", "requests/h", tuple(range(0, 24, 3)))


def week_by_day(stream: "Stream") -> "alt.LayerChart":
    """Requests of each day as colour, a column for each week."""
    rows = [
        {"x": week + 1, "day": day, "y": value}
        for week, values in enumerate(stream.weeks.days)
        for day, value in zip(DAYS, values, strict=True)
        if value is not None
    ]
    return _heat_map(rows, "week", "requests/day", ())


def _heat_map(rows: list[dict[str, Any]], x: str, title: str, ticks: Sequence[int]) -> "alt.LayerChart":
    """`rows` of x, day and y as a rectangle each."""
    import altair as alt

    axis = alt.Axis(grid=False, labelAngle=0, **({"values": list(ticks)} if ticks else {}))
    tooltip = [alt.Tooltip("day:N"), alt.Tooltip("x:O", title=x), alt.Tooltip("y:Q", title=title, format=",.4~r")]
    chart = alt.Chart(alt.InlineData(values=rows)).mark_rect(cornerRadius=2)
    encoded = chart.encode(
        x=alt.X("x:O", title=x, axis=axis),
        y=alt.Y("day:N", title=None, sort=list(DAYS), scale=alt.Scale(domain=list(DAYS))),
        color=alt.Color("y:Q", title=title, legend=alt.Legend(title=title, format="~s")),
        tooltip=tooltip,
    )
    return alt.layer(encoded).properties(width="container", height=HEIGHT)


def latency_cdf(runs: Mapping[str, Latency], which: str, title: str, offered: Mapping[str, int]) -> "alt.LayerChart":
    """Share of the requests *offered* that were answered within x: a run with failures ends below 100 %.

    `which` is a column of the latencies (`ttft`, `e2e`, `tpot`), of requests that succeeded.
    """
    rows: list[dict[str, Any]] = []
    for name, latency in runs.items():
        values = latency[which][latency["ok"]]
        values = np.sort(np.maximum(values[np.isfinite(values)], 1e-4))
        if not values.size:
            continue
        places = _places(values.size)
        shares = (places + 1) / max(offered[name], values.size)
        rows += [{"name": name, "x": float(x), "y": float(y)} for x, y in zip(values[places], shares, strict=True)]
    x = _axis(title, log=True, duration=True)
    return _curves(rows, runs, x=x, y=_axis("share of requests offered", format=".0%", domain=(0, 1)), step=True)


def arrivals_over_time(runs: Mapping[str, Latency]) -> "alt.LayerChart":
    """Requests scheduled per second."""
    rows = _binned({name: (latency["scheduled"], None) for name, latency in runs.items()}, _end(runs))
    return _curves(rows, runs, x=_time(rows), y=_axis("requests/s"), step=True)


def failures_over_time(runs: Mapping[str, Latency]) -> "alt.LayerChart":
    """Requests that failed, per second, by the time they were scheduled for."""
    rows = _binned({name: (latency["scheduled"], ~latency["ok"]) for name, latency in runs.items()}, _end(runs))
    return _curves(rows, runs, x=_time(rows), y=_axis("failures/s"), step=True)


def in_flight(runs: Mapping[str, Latency]) -> "alt.LayerChart":
    """Requests due and not yet ended, whether queued at the client, queued at the server or being answered."""
    end = _end(runs)
    width = bin_width(end, BINS)
    grid = np.arange(0.0, end + width, width)
    rows: list[dict[str, Any]] = []
    for name, latency in runs.items():
        begun = np.sort(latency["scheduled"][np.isfinite(latency["scheduled"])])
        ended = np.sort(ends(latency)[np.isfinite(ends(latency))])
        count = np.searchsorted(begun, grid, "right") - np.searchsorted(ended, grid, "right")
        rows += [{"name": name, "x": float(x), "y": int(y)} for x, y in zip(grid, count, strict=True)]
    return _curves(rows, runs, x=_time(rows), y=_axis("requests in flight"), step=True)


def system(
    runs: Mapping[str, Run], column: str, title: str, *, share: bool = False, per_second: bool = False
) -> "alt.LayerChart":
    """A column of the runs' time series over bins: its mean summed over replicas, a `share` of the fullest replica, or
    what happened `per_second`.
    """
    import polars as pl

    end = max((float(run.series["time"].max() or 0.0) for run in runs.values()), default=0.0)  # type: ignore[arg-type]
    width = bin_width(end, BINS)
    over_replicas = pl.col(column).max() if share else pl.col(column).sum()
    rows: list[dict[str, Any]] = []
    for name, run in runs.items():
        samples = run.series.drop_nulls(["time", column]).with_columns(x=(pl.col("time") // width) * width)
        value = pl.col(column).sum() / width if per_second else pl.col(column).mean()
        binned = samples.group_by("x", "replica").agg(value).group_by("x").agg(over_replicas).sort("x")
        rows += [{"name": name, "x": x, "y": y} for x, y in binned.select("x", column).iter_rows()]
    y = _axis(title, format=".0%", domain=(0, 1)) if share else _axis(title)
    return _curves(rows, runs, x=_time(rows), y=y, step=True)


def latency_over_time(runs: Mapping[str, Latency], which: str, title: str) -> "alt.LayerChart":
    """The median of `which` (`ttft`, `e2e`, `tpot`) of the requests that were due in each bin and succeeded."""
    width = bin_width(_end(runs), BINS)
    rows: list[dict[str, Any]] = []
    for name, latency in runs.items():
        known = latency["ok"] & np.isfinite(latency[which]) & np.isfinite(latency["scheduled"])
        order = np.argsort(latency["scheduled"][known], kind="stable")
        values = latency[which][known][order]
        bins, firsts = np.unique(latency["scheduled"][known][order] // width, return_index=True)
        medians = [float(np.median(part)) for part in np.split(values, firsts[1:])] if values.size else []
        rows += [{"name": name, "x": float(k) * width, "y": y} for k, y in zip(bins, medians, strict=True)]
    y = _axis(title, duration=True)
    return _curves(rows, runs, x=_time(rows), y=y, step=True)


def latency_against(runs: Mapping[str, tuple[Latency, Run]], column: str, title: str) -> "alt.LayerChart":
    """TTFT of a request against a column of the time series (summed over replicas) when it was due."""
    import polars as pl

    rows: list[dict[str, Any]] = []
    for name, (latency, run) in runs.items():
        samples = run.series.drop_nulls(["time", column]).group_by("time").agg(pl.col(column).sum()).sort("time")
        known = np.flatnonzero(latency["ok"] & np.isfinite(latency["ttft"]) & np.isfinite(latency["scheduled"]))
        if samples.is_empty() or not known.size:
            continue
        chosen = known[np.unique(np.linspace(0, known.size - 1, POINTS).astype(np.int64))]
        place = np.searchsorted(samples["time"].to_numpy(), latency["scheduled"][chosen], side="left")
        x = samples[column].cast(pl.Float64).to_numpy()[place.clip(max=len(samples) - 1)]
        y = np.maximum(latency["ttft"][chosen], 1e-4)
        rows += [{"name": name, "x": float(a), "y": float(b)} for a, b in zip(x, y, strict=True)]
    y_axis = _axis("TTFT", log=True, duration=True)
    return _curves(rows, runs, x=_axis(title), y=y_axis, line=False)


def ends(latency: Latency) -> np.ndarray:
    """When each request was over (nan: never)."""
    return np.fmax(latency["ended"], latency["end"])


def _places(size: int) -> np.ndarray:
    """Indexes into a sorted sample that keep its shape: all, or evenly spaced ones and finer ones in the upper tail."""
    if size <= POINTS:
        return np.arange(size)
    body = np.linspace(0, 0.99, POINTS * 3 // 4)
    tail = 1 - np.geomspace(0.01, 1 / size, POINTS - body.size - 1)
    return np.unique(np.rint(np.concatenate((body, tail, [1.0])) * (size - 1)).astype(np.int64))


def _end(runs: Mapping[str, Latency]) -> float:
    last = [np.nanmax(np.append(latency["scheduled"], 0.0)) for latency in runs.values()]
    over = [np.nanmax(np.append(ends(latency), 0.0)) for latency in runs.values()]
    return float(max(*last, *over, 0.0))


def _binned(events: Mapping[str, tuple[np.ndarray, np.ndarray | None]], end: float) -> list[dict[str, Any]]:
    """Events (times, and which of them count) per second in at most BINS bins of one round width."""
    width = bin_width(end, BINS)
    rows: list[dict[str, Any]] = []
    for name, (times, counted) in events.items():
        times = times if counted is None else times[counted]
        times = times[np.isfinite(times)]
        counts = np.bincount((np.maximum(times, 0) // width).astype(np.int64), minlength=int(end // width) + 1)
        rows += [{"name": name, "x": k * width, "y": float(count) / width} for k, count in enumerate(counts)]
    return rows


def _time(rows: list[dict[str, Any]], title: str = "time") -> dict[str, Any]:
    """The axis of a time since the start, or a lag, with the values of `rows` in the unit that suits their range."""
    longest = max((row["x"] for row in rows), default=0.0)
    size, unit = next(((size, unit) for size, unit in _UNITS if longest >= 3 * size), (1.0, "s"))
    for row in rows:
        row["x"] = row["x"] / size
    return _axis(f"{title} ({unit})", format=",~f")


_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def _axis(
    title: str,
    *,
    log: bool = False,
    duration: bool = False,
    format: str = ",~f",
    domain: tuple[float, float] | None = None,
    values: Sequence[float] | None = None,
) -> dict[str, Any]:
    """What `_curves` needs to know of an axis."""
    return {"title": title, "log": log, "duration": duration, "format": format, "domain": domain, "values": values}


def _curves(
    rows: list[dict[str, Any]],
    names: Iterable[str],
    *,
    x: dict[str, Any],
    y: dict[str, Any],
    step: bool = False,
    filled: bool = False,
    points: bool = False,
    line: bool = True,
    reference: tuple[float, str] | None = None,
    extra: Mapping[str, tuple[str, str]] | None = None,
) -> "alt.LayerChart":
    """`rows` of name, x, y as one curve per name, with a tooltip at each point, panning and zooming along x.

    Without `line` only the points are drawn.
    """
    import altair as alt

    names = list(names)
    data = alt.InlineData(values=rows)
    color = alt.Color("name:N", scale=alt.Scale(domain=names), legend=None)
    # The tooltip shows a field of the name "title" as its heading.
    tooltip = [alt.Tooltip("name:N", title="title")] if len(names) > 1 else []
    tooltip += [_tooltip(channel, axis) for channel, axis in (("x", x), ("y", y))]
    tooltip += [alt.Tooltip(f"{field}:Q", title=title, format=form) for field, (title, form) in (extra or {}).items()]
    encoded = alt.Chart(data).encode(
        x=alt.X("x:Q", **_channel("x", x, rows)), y=alt.Y("y:Q", stack=None, **_channel("y", y, rows)), color=color
    )
    shape: dict[str, Any] = {"interpolate": "step-after"} if step else {}
    # A plain wheel scrolls the page; with Ctrl or Alt, or by a pinch, it zooms. Clipping keeps a zoomed curve inside.
    zoom = alt.selection_interval(
        name="zoom", bind="scales", encodings=["x"], zoom="wheel![event.ctrlKey || event.altKey]", clear="dblclick"
    )
    # Not Vega-Lite's `nearest`: under it, version 6.4 shows text in tooltips as "undefined".
    under = alt.selection_point(name="under", on="pointerover", clear="pointerout", empty=False)
    drawn = encoded.mark_line(clip=True, **shape) if line else encoded.mark_circle(clip=True, size=18, opacity=0.9)
    layers = [drawn.add_params(zoom)]
    if filled and len(names) <= 2:  # more areas over each other are mud
        layers.insert(0, encoded.mark_area(clip=True, opacity=0.12, **shape))
    if points and line:
        layers.append(encoded.mark_circle(clip=True, size=18, opacity=0.9))
    halo = encoded.mark_circle(clip=True, size=160).encode(
        opacity=alt.condition(under, alt.value(0.6), alt.value(0)), tooltip=tooltip
    )
    layers.append(halo.add_params(under))
    if reference:
        height, label = reference
        at = alt.Chart(alt.InlineData(values=[{"y": height, "label": label}])).encode(y="y:Q")
        layers.append(at.mark_rule(strokeDash=[4, 4]))
        layers.append(
            at.mark_text(align="right", baseline="bottom", dy=-3).encode(text="label:N", x=alt.value("width"))
        )
    return alt.layer(*layers).properties(width="container", height=HEIGHT)


def _channel(channel: str, axis: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The arguments of the encoding of `channel` (x or y)."""
    import altair as alt

    look: dict[str, Any] = {"labelExpr": _DURATION} if axis["duration"] else {"format": axis["format"]}
    values = axis["values"] or (
        _ticks([row[channel] for row in rows if row[channel] is not None], axis["duration"]) if axis["log"] else None
    )
    if values:
        look |= {"values": list(values), "tickCount": len(values)}
    scale: dict[str, Any] = {"type": "log", "nice": False} if axis["log"] else {}
    if axis["domain"] is not None:
        scale["domain"] = list(axis["domain"])
    return {"title": axis["title"], "axis": alt.Axis(**look), "scale": alt.Scale(**scale) if scale else alt.Undefined}


def _ticks(values: Sequence[float], duration: bool) -> list[float]:
    """Ticks of a logarithmic axis over `values` > 0: powers of ten, and multiples of them where there are few.

    From a minute on, those of a `duration` are whole minutes, hours and days.
    """
    if not values:
        return []
    low, high = float(np.log10(min(values))), float(np.log10(max(values)))
    steps = range(1, 10) if high - low < 0.8 else (1, 2, 5) if high - low < 3 else (1,)
    decades = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
    if not duration:
        return ticks
    return [tick for tick in ticks if tick < 60] + list(_LONG_FINE if len(steps) > 1 else _LONG)


_LONG = (60.0, 600.0, 3600.0, 21600.0, 86400.0, 604800.0, 2592000.0)
_LONG_FINE = (60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0, 86400.0, 172800.0, 432000.0)


def _tooltip(channel: str, axis: dict[str, Any]) -> "alt.Tooltip":
    import altair as alt

    title = f"{axis['title']} (s)" if axis["duration"] else axis["title"]
    form = axis["format"] if axis["format"].endswith("%") else ",.4~r"
    return alt.Tooltip(f"{channel}:Q", title=title, format=".1%" if form == ".0%" else form)
