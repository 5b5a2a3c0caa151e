"""Charts say what the data say: curves against hand-made samples, and pictures without a browser."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reportable import run, trace

from squall.characterize import characterize
from squall.report import charts
from squall.run.metrics import latencies, per_request


def rows(chart: Any, name: str) -> list[tuple[float, float]]:
    """The points of the series `name`."""
    spec = charts.declaration(chart)
    data = spec.get("data") or spec["layer"][0]["data"]
    values = data["values"] if "values" in data else spec["datasets"][data["name"]]
    return [(row["x"], row["y"]) for row in values if row["name"] == name]


def latency(values: list[float], failed: int = 0) -> dict[str, np.ndarray]:
    ttft = np.array(values + [np.nan] * failed)
    return {"ttft": ttft, "ok": np.isfinite(ttft)}


def test_a_cdf_of_the_offered_ends_below_one_where_requests_failed() -> None:
    curves = charts.latency_cdf({"a": latency([3.0, 1.0, 2.0], failed=1)}, "ttft", "TTFT", {"a": 4})
    assert rows(curves, "a") == [(1.0, 0.25), (2.0, 0.5), (3.0, 0.75)]


def test_a_large_cdf_keeps_its_shape_and_its_tail() -> None:
    sample = 0.001 + np.random.default_rng(0).exponential(1, 100_000)
    points = np.array(rows(charts.latency_cdf({"a": latency(sample.tolist())}, "ttft", "TTFT", {"a": 100_000}), "a"))
    assert len(points) <= charts.POINTS
    assert points[-1] == pytest.approx([sample.max(), 1.0])
    assert points[:, 1] == pytest.approx([(sample <= x).mean() for x in points[:, 0]], abs=1e-9)
    assert (points[:, 1] > 0.999).sum() > 20


def test_in_flight_counts_what_is_due_and_not_over() -> None:
    columns = {"scheduled": np.array([0.0, 1.0, 5.0]), "ended": np.array([3.0, 2.0, np.nan]), "end": np.full(3, np.nan)}
    points = dict(rows(charts.in_flight({"a": columns}), "a"))
    assert [points[t] for t in (0.0, 1.0, 2.0, 3.0, 5.0)] == [1, 2, 1, 0, 1]


def test_poisson_arrivals_stay_at_one_on_all_scales() -> None:
    times = np.cumsum(np.random.default_rng(0).exponential(0.1, 50_000))
    scales, index = np.array(rows(charts.dispersion_curves({"a": times}), "a")).T
    bins = (times[-1] - times[0]) // scales
    assert (np.abs(index - 1) < 5 * np.sqrt(2 / bins)).all()


def test_failures_and_arrivals_count_requests() -> None:
    columns = {"a": latencies(per_request(run(requests=300).table))}
    for chart, count in (
        (charts.arrivals_over_time, 300),
        (charts.failures_over_time, int((~columns["a"]["ok"]).sum())),
    ):
        points = rows(chart(columns), "a")
        width = points[1][0] - points[0][0]
        assert sum(y for _, y in points) * width == pytest.approx(count)


def test_series_of_replicas_are_summed_and_shares_are_highest() -> None:
    made = run()
    doubled = made.series.with_columns(replica=0).vstack(made.series.with_columns(replica=1))
    both = type(made)(made.table, made.meta, doubled.cast(dict(made.series.schema)))
    one, two = (dict(rows(charts.system({"a": r}, "waiting", "waiting"), "a")) for r in (made, both))
    assert two == {x: pytest.approx(2 * y) for x, y in one.items()}
    one, two = (rows(charts.system({"a": r}, "kv_used", "use", share=True), "a") for r in (made, both))
    assert one == two


def test_colours_stay_with_their_series() -> None:
    """A run that recorded no series has no curve, but keeps its place in the order of colours."""
    chart = charts.system({"live": run(kind="replay"), "simulated": run()}, "waiting", "waiting")
    domain = charts.declaration(chart)["layer"][0]["encoding"]["color"]["scale"]["domain"]
    assert domain == ["live", "simulated"]


def test_palettes_have_contrast_and_one_colour_per_series() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert len(charts.LIGHT) == len(charts.DARK) == len(set(charts.LIGHT)) == len(set(charts.DARK))
    assert min(contrast(colour, "#ffffff") for colour in charts.LIGHT) > 3  # WCAG 2.2, graphics
    assert min(contrast(colour, "#17191c") for colour in charts.DARK) > 3


@pytest.mark.parametrize("dark", [False, True])
def test_a_chart_is_drawn_as_png(tmp_path: Path, dark: bool) -> None:
    stream = characterize(trace()).total
    path = charts.save_png(
        charts.rate_over_time({"a": stream, "b": stream}), tmp_path / "chart.png", dark=dark, width=400
    )
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width = int.from_bytes(content[16:20], "big")
    assert 800 <= width <= 1000


def values(chart: Any) -> list[dict[str, Any]]:
    spec = charts.declaration(chart)
    data = spec.get("data") or spec["layer"][0]["data"]
    return data["values"] if "values" in data else spec["datasets"][data["name"]]


def test_the_weekly_maps_and_boxes_hold_what_was_characterised() -> None:
    stream = characterize(trace(8000, days=15.0)).total
    cells = {(row["x"], row["day"]): row["y"] for row in values(charts.week_by_day(stream))}
    assert len(cells) == 15
    assert cells[3, "Mon"] == stream.weeks.days[2][0]
    cells = {(row["x"], row["day"]): row["y"] for row in values(charts.week_by_hour(stream))}
    assert len(cells) == 168
    assert cells[23, "Sun"] == stream.weeks.hours[6][23]
    for what in ("requests", "request_tokens", "response_tokens"):
        rows = values(charts.hour_boxes({"a": stream}, what, "title"))
        box = getattr(stream.hours, what)[5]
        (row,) = (row for row in rows if row["x"] == 5)
        numbers = (row["least"], row["low"], row["y"], row["high"], row["most"])
        assert numbers == (box.min, box.q1, box.median, box.q3, box.max)


def test_bursts_slots_failures_and_caches_are_drawn_as_they_are() -> None:
    stream = characterize(trace(8000, days=4.0)).total
    found = next(one for one in stream.bursts if one.scale == 600)
    assert [y for _, y in rows(charts.burst_sizes({"a": stream}, 600.0), "a")] == found.series.requests
    assert len(rows(charts.working_day_alpha({"a": stream}), "a")) == 72
    shares = [y for _, y in rows(charts.failed_share_by_alpha({"a": stream}), "a")]
    assert shares == [bucket.failed_share for bucket in stream.failures.by_alpha]
    counted = zip(stream.failures.series.requests, stream.failures.series.failed, strict=True)
    expected = [lost / count if count else None for count, lost in counted]
    assert [y for _, y in rows(charts.failed_share_over_time({"a": stream}), "a")] == expected
    assert rows(charts.cache_hits({"a": stream}), "a")[-1][1] == stream.prefixes.cache[-1].hit_share
