"""Derive the built-in profiles: prints src/squall/workload/burstgpt.json.

    SQUALL_TRACES=... python benchmarks/derive_profiles.py > src/squall/workload/burstgpt.json

Input: the aggregates and excerpts of BurstGPT in $SQUALL_TRACES/burstgpt (an hourly series of part 1, a 5-minute series
of two stretches of it, the request lengths of its first 500 rows, 418 conversation rows of part 3), and the statistics
of the full files that are published, which stand as constants below. Output: fitted and derived parameters only.
With `--explain` it prints the intermediate figures to standard error. docs/profiles.md says what is measured and what
is assumed.
"""

import os
import sys
from pathlib import Path

import numpy as np
import polars as pl
from scipy.optimize import brentq, nnls
from scipy.special import ndtr, ndtri

from squall.workload.concurrency import HOUR, Daily, Floods, renewal
from squall.workload.conversations import Conversations, Growth, Seating
from squall.workload.failures import Failures
from squall.workload.lengths import GaussianCopula, Lengths, Quantiles
from squall.workload.model import ClassModel, Workload, as_json

FOLDER = Path(os.environ["SQUALL_TRACES"]) / "burstgpt"
DAYS = 61

# Published statistics of the full files. Part 1 by class: share of all rows, rows that succeeded, request quantiles
# (p50 of successes; p90 with the failed rows, which carry 0; p99 of successes), response quantiles (successes),
# failed share. Part 3: correlations, sessions, gap CVs.
CLASSES = {
    ("api", "ChatGPT"): (0.774, 1.09e6, (221, 2161, 3403), (26, 187, 1628), 0.014),
    ("api", "GPT-4"): (0.118, 167e3, (466, 1105, 2813), (40, 1038, 1350), 0.010),
    ("conversation", "ChatGPT"): (0.072, 97e3, (533, 1664, 2481), (229, 543, 952), 0.055),
    ("conversation", "GPT-4"): (0.036, 48e3, (576, 1843, 3504), (240, 549, 954), 0.055),
}
MEAN_TOKENS = (610.6, 123.3)  # part 1, all rows, failed ones included
PEARSON = {"api": 0.183, "conversation": 0.438}  # part 3
LARGEST = (29665, 7315)  # part 1, successes
API_GAP_CV = ((0.1, 0.67), (0.5, 1.50), (0.9, 5.22))  # part 3, inside 5-minute windows
TURNS = (0.355, 0.204, 0.119, 0.076, 0.051, 0.037, 0.028, 0.021, 0.018, 0.013)  # part 3, P(turns = 1 .. 10)
TURNS_MEAN, TURNS_P99, TURNS_MAX, SESSIONS = 4.18, 31, 436, 55920
PAUSE = ((0.1, 20), (0.25, 42), (0.5, 131), (0.75, 533), (0.9, 2340), (0.99, 78903))  # part 3, s
PAUSE_MEAN = 5709
FIRST_TURN, ALL_TURNS = 170, 953  # part 3, mean request tokens
GROWTH_P50, GROWTH_P10 = 125, -124  # part 3, request tokens per turn

ATTRIBUTION = (
    'Derived from BurstGPT (Wang et al., "BurstGPT: A Real-World Workload Dataset to Optimize LLM Serving Systems", '
    "KDD 2025, doi 10.1145/3711896.3737413), https://github.com/HPMLL/BurstGPT, CC BY 4.0. "
    "Changes: excerpted / aggregated."
)

LEVELS = np.concatenate([[0, 1e-4, 1e-3, 0.005], np.arange(0.01, 0.99, 0.01), [0.99, 0.995, 0.999, 0.9999, 1]])


def explain(*figures: object) -> None:
    if "--explain" in sys.argv:
        print(*figures, file=sys.stderr)


def log_normal_pieces(
    points: list[tuple[float, float]], low: float, floor: float, rows: float, cap: float, bend: float = 1.0
) -> Quantiles:
    """Quantiles through `points` (level, value), with log value linear in the normal score between them.

    Below the first point the slope is `low`, above the last it is that of the last piece, up to the level 1 - 1/rows.
    A `bend` above 1 lets the pieces sag between their ends, which lowers the mean.
    """
    level, value = np.array(points).T
    z, y = ndtri(level), np.log(value)
    at = ndtri(np.clip(LEVELS, 1 / rows, 1 - 1 / rows))
    slope = (y[-1] - y[-2]) / (z[-1] - z[-2])
    piece = np.clip(np.searchsorted(z, at, side="right") - 1, 0, z.size - 2)
    along = np.clip((at - z[piece]) / (z[piece + 1] - z[piece]), 0, 1) ** bend
    found = y[piece] + along * (y[piece + 1] - y[piece])
    found = np.where(at < z[0], y[0] + low * (at - z[0]), np.where(at > z[-1], y[-1] + slope * (at - z[-1]), found))
    values = np.clip(np.exp(found), floor, cap)
    return Quantiles([round(float(p), 4) for p in LEVELS], [float(f"{v:.5g}") for v in values])


def autocorrelation(x: np.ndarray, lag: int) -> float:
    d = x - x.mean()
    return float((d[:-lag] * d[lag:]).mean() / x.var())


def dispersion_of(hourly: np.ndarray, hours: int) -> float:
    """Variance / mean of the counts in bins of so many hours."""
    counts = hourly[: hourly.size // hours * hours].reshape(-1, hours).sum(1)
    return float(counts.var() / counts.mean())


# ------------------------------------------------------------------------------------------------------- conversation


def conversation_arrivals() -> tuple[list[float], list[float], list[tuple[float, float]]]:
    """Requests/s by hour on working days and weekends, and the drift of the level: from the hourly series of part 1."""
    counts = pl.read_csv(FOLDER / "burstgpt_1_hourly.csv")["conversation"].to_numpy().reshape(DAYS, 24).astype(float)
    weekend = np.isin(np.arange(DAYS) % 7, (3, 4))  # day 0 is a Wednesday
    mean = np.where(weekend[:, None], counts[weekend].mean(0), counts[~weekend].mean(0))
    off, busy = ((counts - mean) / mean).ravel(), mean.ravel() > 40
    lags = [1, 2, 3, 4, 6, 9, 12, 18, 24, 36, 48, 72, 96, 120, 144, 168]
    covariance = [float(((off**2 - 1 / mean.ravel())[busy]).mean())]  # the Poisson part is not drift
    covariance += [float((off[:-lag] * off[lag:])[busy[:-lag] & busy[lag:]].mean()) for lag in lags]
    memories = (0.5, 12.0, 500.0)
    kernels = np.exp(-np.array([0, *lags])[:, None] / np.array(memories))
    variance, _ = nnls(kernels, np.array(covariance))
    explain(
        "conversation: relative autocovariance",
        dict(zip([0, *lags], np.round(covariance, 3), strict=True)),
        "parts",
        variance,
    )
    drift = [(round(float(np.sqrt(np.log1p(v))), 3), m) for v, m in zip(variance, memories, strict=True) if v > 1e-4]
    return (counts[~weekend].mean(0) / HOUR).tolist(), (counts[weekend].mean(0) / HOUR).tolist(), drift


def conversation_ripple() -> float:
    """Log sd of the rate between neighbouring 5-minute bins of day 0, 09:00 to 21:00, beyond Poisson."""
    count = five_minutes()["request_count"][108:252].to_numpy().astype(float)
    excess = (np.diff(count) ** 2).mean() / 2 - count.mean()
    return round(float(np.sqrt(np.log1p(excess / count.mean() ** 2))), 3)


def five_minutes() -> pl.DataFrame:
    return pl.read_csv(FOLDER / "burstgpt_1_5min_excerpt.csv")


def survival() -> list[float]:
    """P(at least k turns): as published to k = 11, then power laws through p99 and the largest session."""
    head = 1 - np.concatenate([[0], np.cumsum(TURNS)])
    knots = np.log([len(head), TURNS_P99 + 1, TURNS_MAX])

    def tail(bend: float) -> np.ndarray:
        ends = np.log([head[-1], 0.01, 1 / SESSIONS])
        k = np.log(np.arange(len(head) + 1, TURNS_MAX + 1))
        # The bend lowers or lifts the outer piece between its fixed ends.
        return np.exp(
            np.interp(k, knots, ends) + bend * np.clip(k - knots[1], 0, None) * np.clip(knots[2] - k, 0, None)
        )

    bend = brentq(lambda b: head.sum() + tail(b).sum() - TURNS_MEAN, -3, 3)
    whole = np.minimum.accumulate(np.concatenate([head, tail(bend)]))
    explain("turns: mean", whole.sum(), "bend", bend)
    return [float(f"{s:.5g}") for s in whole]


def pauses() -> Quantiles:
    """Pauses in a session through the published quantiles; the largest is set so that the mean is the published one."""

    def table(largest: float) -> Quantiles:
        points = [(0.001, 1.0), *PAUSE, (1 - 1e-5, largest)]
        return log_normal_pieces(points, 1.0, 1.0, 1e5, largest)

    largest = brentq(lambda x: table(x).mean - PAUSE_MEAN, 1e5, 1e8)
    explain("pauses: largest", largest, "mean", table(largest).mean)
    return table(largest)


def growth(request: Quantiles, turns: list[float]) -> Growth:
    """Scores by turn that reproduce part 3's mean of first turns against all turns, and p50 and p10 of the growth."""
    starts = [1, 2, 3, 4, 6, 10, 20]
    reached = np.array(turns)
    weight = np.add.reduceat(reached, np.array(starts) - 1) / reached.sum()
    sessions = Conversations(turns, Quantiles([0, 1], [1, 2]), Growth([1], [1.0], [0.0], [1.0], 0.0))
    session, turn, _ = Seating(sessions, np.random.default_rng(1)).seat(np.arange(60_000.0))
    order = np.lexsort((turn, session))
    same = np.diff(session[order]) == 0

    def scores(low: float, rise: float, memory: float) -> Growth:
        later = np.log(starts)
        mean = np.where(np.array(starts) == 1, -low, rise * later)
        mean[1:] -= (weight @ mean) / weight[1:].sum()
        sd = np.full(len(starts), np.sqrt(max(0.05, 1 - weight @ mean**2)))
        rounded = [[round(float(v), 4) for v in part] for part in (weight, mean, sd)]
        return Growth(starts, rounded[0], rounded[1], rounded[2], memory)

    best, loss = None, np.inf
    for rise in (0.6, 0.8, 1.0):
        for memory in (0.95, 0.97, 0.98):
            for low in (1.0, 1.1, 1.2):
                one = scores(low, rise, memory)
                tokens = request.at(one.draw(session, turn, np.random.default_rng(2)))
                change = np.diff(tokens[order])[same] / tokens.mean()
                figures = np.array([tokens[turn == 1].mean() / tokens.mean(), *np.quantile(change, (0.5, 0.1))])
                wanted = np.array([FIRST_TURN, GROWTH_P50, GROWTH_P10]) / ALL_TURNS
                miss = float((((figures - wanted) / 0.1) ** 2).sum())
                if miss < loss:
                    best, loss = one, miss
                    explain("growth", rise, memory, low, figures.round(3), "wanted", wanted.round(3))
    assert best is not None
    return best


# ---------------------------------------------------------------------------------------------------------------- API


def api_arrivals() -> Floods:
    """The API's silence by hour of day, its loads and their memory: from the hourly series of part 1."""
    counts = pl.read_csv(FOLDER / "burstgpt_1_hourly.csv")["api"].to_numpy().astype(float)
    busy = counts[counts > 0]
    levels = [
        0,
        0.05,
        0.1,
        0.15,
        0.2,
        0.25,
        0.3,
        0.4,
        0.5,
        0.6,
        0.7,
        0.8,
        0.85,
        0.9,
        0.925,
        0.95,
        0.965,
        0.975,
        0.985,
        0.995,
        1,
    ]
    load = Quantiles(levels, [float(f"{v:.4g}") for v in np.quantile(busy, levels)])
    # Straight lines between sparse points of a heavy tail lie above it: bring the mean back to the measured one.
    factor = busy.mean() / load.mean
    load = Quantiles(levels, [float(f"{v * factor:.4g}") for v in load.values])
    silence = (counts.reshape(DAYS, 24) == 0).mean(0)
    cv = log_normal_pieces(list(API_GAP_CV), 0.63, 0.1, 1e3, 20.0)
    flood = five_minutes()["request_count"][259:].to_numpy().astype(float)
    noise = float(np.trapezoid(np.square(cv.values), cv.levels)) / flood.mean()
    ripple = round(float(np.sqrt(max(0.0, (flood.std() / flood.mean()) ** 2 - noise))), 3)
    explain(
        "API: load factor", factor, "flood CV", flood.std() / flood.mean(), "of it gaps", noise**0.5, "ripple", ripple
    )

    lags = (1, 2, 3, 4, 6, 8, 12, 24)
    wanted = np.array([autocorrelation(counts, lag) for lag in lags])
    on = np.array([autocorrelation((counts > 0).astype(float), lag) for lag in lags])
    target = np.array([dispersion_of(counts, scale) for scale in (1, 3, 12, 24)])
    best, loss = None, np.inf
    hours = 24 * 7 * 300
    for fast in (0.5, 1.0, 2.0):
        for slow in (4.0, 6.0, 8.0, 12.0, 20.0):
            for weight in (0.0, 0.1, 0.2, 0.3):
                memory = [(weight, fast), (1 - weight, slow)]
                model = Floods("api", silence.tolist(), load, memory, 0.0, Quantiles([0, 1], [1, 1]))
                rate = model.path(0, hours * HOUR, 7).rate.reshape(hours, 12).mean(1) * HOUR
                found = np.array([autocorrelation(rate, lag) for lag in lags])
                found_on = np.array([autocorrelation((rate > 0).astype(float), lag) for lag in lags])
                miss = float(((found - wanted) ** 2).sum() + ((found_on - on) ** 2).sum() / 10)
                spread = np.array([dispersion_of(rate, scale) for scale in (1, 3, 12, 24)])
                miss += float((np.log(spread / target) ** 2).sum() / 10)
                if miss < loss:
                    best, loss = memory, miss
                    explain(
                        "API memory",
                        memory,
                        "load",
                        found.round(2),
                        wanted.round(2),
                        "on",
                        found_on.round(2),
                        on.round(2),
                    )
                    explain("  dispersion", spread.round(), target.round())
    assert best is not None

    def empty(part: float) -> float:
        model = Floods("api", np.round(silence * part, 4).tolist(), load, best, ripple, cv)
        arrivals = renewal(model.path(0, hours * HOUR, 7), np.random.default_rng(7))
        return 1 - np.unique(arrivals // HOUR).size / hours

    # An hour with little load can be empty by chance: so many hours less are silent.
    part = brentq(lambda x: empty(x) - (counts == 0).mean(), 0.7, 1.0, xtol=1e-3)
    explain("API: silence kept", part, "empty", empty(part))
    active = (1 - silence.mean()) / (1 - silence.mean() * part)
    load = Quantiles(levels, [float(f"{v * active:.4g}") for v in load.values])
    return Floods("api", np.round(silence * part, 4).tolist(), load, best, ripple, cv)


# ------------------------------------------------------------------------------------------------- lengths, failures


def lengths(service: str, model: str, bend: float) -> Lengths:
    _, rows, request, response, failed = CLASSES[service, model]
    if service == "conversation":
        first = np.loadtxt(FOLDER / "burstgpt_1_conv_first500_request_tokens_capped1023.txt")
        first = first[first > 0]
        low_request = float(np.log(np.median(first) / np.quantile(first, 0.1)) / 1.2816)
        head = pl.read_csv(FOLDER / "burstgpt_3_conversation_head418.csv", infer_schema_length=None)["Response tokens"]
        low_response = float(np.log(head.median() / head.quantile(0.1)) / 1.2816)
    else:
        low_request = float(np.log(request[1] / request[0]) / 1.2816)
        low_response = float(np.log(response[1] / response[0]) / 1.2816)
    p90 = (0.9 - failed) / (1 - failed)
    points = [(0.5, request[0]), (p90, request[1]), (0.99, request[2])]
    asked = log_normal_pieces(points, low_request, 1, rows, LARGEST[0])
    answered = log_normal_pieces(
        list(zip((0.5, 0.9, 0.99), response, strict=True)), low_response, 1, rows, LARGEST[1], bend
    )
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((2, 400_000))
    a = asked.at(ndtr(x))

    def miss(r: float) -> float:
        return float(np.corrcoef(a, answered.at(ndtr(r * x + np.sqrt(1 - r * r) * y)))[0, 1]) - PEARSON[service]

    return Lengths(asked, answered, GaussianCopula(round(float(brentq(miss, 0, 0.99)), 3)))


def api_response_bend() -> float:
    """The one free parameter of the API's response laws, set so that the mean of all rows is the published one."""

    def miss(bend: float) -> float:
        parts = [
            share * (1 - failed) * lengths(service, model, bend if service == "api" else 1.0).response.mean
            for (service, model), (share, _, _, _, failed) in CLASSES.items()
        ]
        return sum(parts) - MEAN_TOKENS[1]

    return float(brentq(miss, 1.0, 5.0, xtol=1e-3))


def failures(service: str, model: str) -> Failures:
    """Severity and length of outages from the 5-minute bins: day 0 for conversations, day 10's flood for the API."""
    bins = five_minutes()[:259] if service == "conversation" else five_minutes()[259:]
    n, f = (bins[name].to_numpy().astype(float) for name in ("request_count", "zero_response_count"))
    share = CLASSES[service, model][4]
    here = f.sum() / n.sum()
    # P(another request of the bin fails | one fails), and the same for the bins 1, 2, … later.
    same = (f * (f - 1)).sum() / (f * (n - 1)).sum()
    later = np.array([(f[:-k] * f[k:]).sum() / (f[:-k] * n[k:]).sum() for k in range(1, 7)])
    excess = np.concatenate([[same], later]) - here
    # Mean lag inside one bin is a third of it (100 s).
    lag = np.concatenate([[100.0], 300.0 * np.arange(1, 7)])
    grid = np.geomspace(60, 7200, 200)
    decay = np.exp(-lag[None, :] / grid[:, None])
    amplitude = (decay @ excess) / (decay**2).sum(1)
    best = int(np.argmin(((excess[None, :] - amplitude[:, None] * decay) ** 2).sum(1)))
    severity = float(min(1.0, max(share, here + amplitude[best])))
    outage = float(grid[best]) / (1 - share / severity)
    explain(
        "failures",
        service,
        "here",
        here,
        "same bin",
        same,
        "later",
        later.round(3),
        "T",
        grid[best],
        "severity",
        severity,
    )
    zero = Quantiles([0, 1], [0, 0])  # 25,427 of part 1's 25,443 failed rows record a request of 0 tokens
    return Failures(share, round(severity, 4), round(outage, 1), zero)


def main() -> None:
    working_day, weekend, drift = conversation_arrivals()
    ripple, turns, pause, api = conversation_ripple(), survival(), pauses(), api_arrivals()
    bend = api_response_bend()
    grown = growth(lengths("conversation", "ChatGPT", 1.0).request, turns)
    explain("API response bend", bend)
    explain("conversation ripple", ripple, "drift", drift)
    classes = []
    for (service, model), (share, *_) in CLASSES.items():
        of_service = share / sum(part for (name, _), (part, *_) in CLASSES.items() if name == service)
        law = lengths(service, model, bend if service == "api" else 1.0)
        explain(service, model, "means", law.request.mean, law.response.mean, "copula", law.copula)
        conversations = None
        if service == "api":
            arrivals = Floods("api", api.silence, api.load, api.memory, api.ripple, api.cv, round(of_service, 5))
        else:
            hours = [[float(f"{r * of_service:.5g}") for r in day] for day in (working_day, weekend)]
            arrivals = Daily("conversation", 2, hours[0], hours[1], drift, ripple, 1.0)
            conversations = Conversations(turns, pause, grown)
        classes.append(
            ClassModel(
                service=service,
                model=model,
                arrivals=arrivals,
                lengths=law,
                conversations=conversations,
                failures=failures(service, model),
            )
        )
    means = [
        sum(
            share * (1 - one.failures.share) * getattr(one.lengths, side).mean
            for one, (share, *_) in zip(classes, CLASSES.values(), strict=True)
        )
        for side in ("request", "response")
    ]
    explain("mean tokens", means, "published", MEAN_TOKENS)
    workload = Workload(
        source="burstgpt://all",
        licence="CC BY 4.0",
        attribution=ATTRIBUTION,
        notes=[
            "Made from published statistics of BurstGPT parts 1 and 3 and counts of part 1; it holds no row of it.",
            "Assumed, not measured: length laws between and beyond the published quantiles, part 3's correlations for "
            "part 1, one weather for both API models, growth by turn. See docs/profiles.md.",
        ],
        span=86400.0,
        midnight=0.0,
        weekday=2,
        classes=classes,
    )
    sys.stdout.buffer.write(as_json(workload))


if __name__ == "__main__":
    main()
