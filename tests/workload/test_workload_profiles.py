"""The built-in profiles against the published statistics of BurstGPT, each over a month and several seeds.

Two kinds of tolerance, both from the sampling error of a month (30 days):

* Where the seeds' months scatter little, the mean over the seeds agrees with the published value within four standard
  errors of that mean (estimated from the seeds) plus a floor for rounding of the published figure.
* The API comes in floods of hours with a heavy tail (dispersion of daily counts 33,000): shares, hourly CV and the hour
  of day of one month scatter by tens of percent. There the published value, itself from one sample of 61 days, must lie
  inside the range of the seeds' months, which fails by chance in 2^(1 - seeds) of all cases.
"""

from statistics import mean, stdev

import numpy as np
import polars as pl
import pytest

from squall.errors import InputError
from squall.trace import open_trace
from squall.workload import PROFILES, profile
from squall.workload.profiles import draw, named_workload

DAYS = 30
SEEDS = range(8)
# Part 1, published: share of rows; request p50 of successes, p90 of all rows, p99 of successes; response p50, p90, p99;
# correlation (part 3, by service); failed share.
PUBLISHED = {
    ("api", "ChatGPT"): (0.774, (221, 2161, 3403), (26, 187, 1628), 0.183, 0.014),
    ("api", "GPT-4"): (0.118, (466, 1105, 2813), (40, 1038, 1350), 0.183, 0.010),
    ("conversation", "ChatGPT"): (0.072, (533, 1664, 2481), (229, 543, 952), 0.438, 0.055),
    ("conversation", "GPT-4"): (0.036, (576, 1843, 3504), (240, 549, 954), 0.438, 0.055),
}
NAMES = dict(zip(("chatgpt-api", "gpt4-api", "chatgpt-conversation", "gpt4-conversation"), PUBLISHED, strict=True))


def hourly(table: pl.DataFrame) -> np.ndarray:
    return np.bincount((table["arrival"] // 3600).cast(pl.Int64).to_numpy(), minlength=24 * DAYS).astype(float)


def peak_to_trough(counts: np.ndarray) -> float:
    day = counts.reshape(-1, 24).mean(0)
    return float(day.max() / day.min()) if day.min() else float("inf")


def of_class(rows: pl.DataFrame) -> dict[str, float]:
    ok = rows.filter(~pl.col("failed"))
    return {
        "request p50": ok["request_tokens"].quantile(0.5),
        "request p90": rows["request_tokens"].quantile(0.9),
        "request p99": ok["request_tokens"].quantile(0.99),
        "response p50": ok["response_tokens"].quantile(0.5),
        "response p90": ok["response_tokens"].quantile(0.9),
        "response p99": ok["response_tokens"].quantile(0.99),
        "correlation": np.corrcoef(ok["request_tokens"], ok["response_tokens"])[0, 1],
        "failed": rows["failed"].mean(),
    }


@pytest.fixture(scope="module")
def months() -> list[dict]:
    """Statistics of `all` for each seed."""
    result = []
    for seed in SEEDS:
        table = profile("all", seed=seed, duration=f"{DAYS}d").table
        api, conversation = (hourly(table.filter(pl.col("service") == name)) for name in ("api", "conversation"))
        parts = {key: table.filter((pl.col("service") == key[0]) & (pl.col("model") == key[1])) for key in PUBLISHED}
        result.append(
            {
                "api": api,
                "conversation": conversation,
                "classes": {key: of_class(rows) for key, rows in parts.items()},
                "shares": {key: len(rows) / len(table) for key, rows in parts.items()},
                "failed": table["failed"].mean(),
                "tokens": (table["request_tokens"].mean(), table["response_tokens"].mean()),
            }
        )
    return result


def agrees(values: list[float], published: float, floor: float) -> None:
    error = 4 * stdev(values) / len(values) ** 0.5 + floor
    assert mean(values) == pytest.approx(published, abs=error), f"{values} against {published}"
    assert error < 0.35 * abs(published), "the sampling error is too large for this test to say anything"


def inside(values: list[float], published: float) -> None:
    assert min(values) <= published <= max(values), f"{sorted(values)} against {published}"


@pytest.mark.parametrize("key", PUBLISHED)
def test_lengths_correlation_and_failures_of_each_class(months, key):
    _, request, response, correlation, failed = PUBLISHED[key]
    found = [month["classes"][key] for month in months]
    # Published to the token, and drawn to the token: 2 % for the steps between the table's levels, and half a token.
    for side, points in (("request", request), ("response", response)):
        for name, value in zip(("p50", "p90", "p99"), points, strict=True):
            agrees([one[f"{side} {name}"] for one in found], value, 0.02 * value + 0.5)
    agrees([one["correlation"] for one in found], correlation, 0.03)
    # Published to a tenth of a percent of the rows.
    agrees([one["failed"] for one in found], failed, 0.0005)


@pytest.mark.parametrize("name", NAMES)
def test_a_month_of_one_class_alone_has_its_lengths_and_failures(name):
    _, request, response, correlation, failed = PUBLISHED[NAMES[name]]
    # Sessions make the lengths of a month of conversations vary by 5 % (50 seeds); six months by 2 %.
    months = 6 if "conversation" in name else 1
    table = profile(name, seed=11, duration=f"{months * DAYS}d").table
    assert table.select("service", "model").unique().row(0) == NAMES[name]
    found = of_class(table)
    for side, points in (("request", request), ("response", response)):
        for point, value in zip(("p50", "p90", "p99"), points, strict=True):
            assert found[f"{side} {point}"] == pytest.approx(value, rel=0.07)
    assert found["correlation"] == pytest.approx(correlation, abs=0.06)
    assert found["failed"] == pytest.approx(failed, rel=0.4)


def test_the_whole_fails_as_often_as_published_and_is_as_long(months):
    inside([month["failed"] for month in months], 0.0178)
    agrees([month["tokens"][0] for month in months], 610.6, 0.02 * 610.6)
    agrees([month["tokens"][1] for month in months], 123.3, 0.02 * 123.3)


def test_class_shares(months):
    for key, (share, *_) in PUBLISHED.items():
        inside([month["shares"][key] for month in months], share)
    # Without sampling: the model's own expectation.
    workload = named_workload("all")
    expected = dict(zip(((one.service, one.model) for one in workload.classes), workload.shares, strict=True))
    for key, (share, *_) in PUBLISHED.items():
        assert expected[key] == pytest.approx(share, abs=0.003)
    assert workload.mean_rate == pytest.approx(0.2713, rel=0.02)


def test_conversation_follows_the_clock(months):
    counts = [month["conversation"] for month in months]
    # The mean level drifts over weeks (a tenth a month), the shape does not.
    agrees([one.mean() for one in counts], 105.3, 1.0)
    agrees([one.std() / one.mean() for one in counts], 0.86, 0.02)
    agrees([peak_to_trough(one) for one in counts], 45.6, 4.0)
    hours = np.mean([one.reshape(-1, 24).mean(0) for one in counts], axis=0)
    assert int(hours.argmax()) in (15, 16)
    assert int(hours.argmin()) in (5, 6)
    inside([one.var() / one.mean() for one in counts], 78)


def test_api_floods_and_falls_silent(months):
    counts = [month["api"] for month in months]
    agrees([(one == 0).mean() for one in counts], 636 / 1464, 0.01)
    inside([one.std() / one.mean() for one in counts], 2.60)
    inside([one.var() / one.mean() for one in counts], 5890)
    inside([peak_to_trough(one) for one in counts], 11.3)

    def memory(one: np.ndarray, lag: int) -> float:
        off = one - one.mean()
        return float((off[:-lag] * off[lag:]).mean() / one.var())

    inside([memory(one, 1) for one in counts], 0.68)
    inside([memory(one, 24) for one in counts], 0.06)
    daily = [one.reshape(-1, 24).sum(1) for one in counts]
    inside([one.var() / one.mean() for one in daily], 33_236)


def test_the_typical_61_days_of_the_api_are_like_the_measured_ones():
    """Medians over 40 drawn paths as long as part 1; each has one real counterpart, so only gross errors can show."""
    arrivals = named_workload("chatgpt-api").classes[0].arrivals
    found = []
    for seed in range(40):
        path = arrivals.path(0, 61 * 86_400, seed)
        # Loads of ChatGPT alone, brought to those of both models, which share the path.
        load = path.rate.reshape(-1, 12).mean(1) * 3600 / arrivals.scale
        day = load.reshape(61, 24)
        found.append([load.std() / load.mean(), peak_to_trough(load), day.sum(1).var() / day.sum(1).mean()])
    cv, swing, dispersion = np.median(found, axis=0)
    assert cv == pytest.approx(2.60, rel=0.15)
    assert swing == pytest.approx(11.3, rel=0.5)
    assert dispersion == pytest.approx(33_236, rel=0.3)


def test_a_flood_is_a_plateau():
    table = profile("all", seed=3, duration="60d").table.filter(pl.col("service") == "api")
    fine = np.bincount((table["arrival"] // 300).cast(pl.Int64).to_numpy(), minlength=60 * 288).reshape(-1, 12)
    busy = fine[fine.sum(1) > 4000]
    # The 5-minute counts of the published flood have a CV of 0.20, which also holds what changes between its hours.
    cv = np.sqrt((busy.var(1) / busy.mean(1) ** 2).mean())
    assert busy.shape[0] > 20
    assert cv == pytest.approx(0.20, abs=0.06)


def test_conversations_have_the_turns_and_pauses_of_part_3():
    table = profile("chatgpt-conversation", seed=5, duration=f"{DAYS}d").table.sort("session", "turn")
    turns = table.group_by("session").len()["len"]
    # 13,000 sessions; the end of the month cuts some.
    assert turns.mean() == pytest.approx(4.18, rel=0.06)
    for k, share in enumerate((0.355, 0.204, 0.119, 0.076, 0.051), start=1):
        assert (turns == k).mean() == pytest.approx(share, abs=0.02)
    assert turns.quantile(0.99) == pytest.approx(31, abs=4)
    pause = table["arrival"].diff().filter(table["turn"] > 1)
    # Pauses end at an arrival of the class, which comes every 20 s by day and every 10 min by night.
    # Those beyond half an hour often end in the night, where nobody is there to end them: they come out longer.
    for level, seconds, error in (
        (0.1, 20, 0.2),
        (0.25, 42, 0.2),
        (0.5, 131, 0.2),
        (0.75, 533, 0.2),
        (0.9, 2340, 0.35),
    ):
        assert pause.quantile(level) == pytest.approx(seconds, rel=error)
    first = table.filter(pl.col("turn") == 1)["request_tokens"].mean() / table["request_tokens"].mean()
    assert first == pytest.approx(170 / 953, abs=0.05)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_a_trace_source(name):
    trace = open_trace(f"burstgpt://{name}", seed=2)
    assert trace.meta.format == "profile"
    assert trace.meta.source == f"burstgpt://{name}"
    assert trace.meta.licence == "CC BY 4.0"
    assert "doi 10.1145/3711896.3737413" in trace.meta.attribution
    drawn = draw(name, 2)
    assert (drawn.meta.midnight, drawn.meta.weekday, drawn.meta.tick) == (0.0, 2, None)
    assert drawn.table["arrival"][-1] <= 86_400
    # Opened as a TRACE, its clock starts at the first request.
    assert trace.table.drop("arrival").equals(drawn.table.drop("arrival"))


def test_a_query_chooses_the_part():
    part = draw("all?duration=2h&start=10h&rate=3", 4)
    assert part.meta.midnight == 36_000.0
    assert part.table["arrival"][-1] <= 7200
    # Floods scatter the count of two hours far more than sqrt(n); the expected rate is exact.
    assert len(part) == pytest.approx(21_600, rel=0.15)
    assert len(draw("all?requests=10", 4)) == 10
    assert part.table.equals(profile("all", seed=4, duration="2h", start="10h", rate=3.0).table)


@pytest.mark.parametrize(
    "name", ["", "chatgpt", "ALL", "all/x", "all?days=3", "all?rate=fast", "all?duration=soon", "../x"]
)
def test_an_unknown_profile_or_key_is_refused(name):
    with pytest.raises(InputError):
        draw(name, 0)
