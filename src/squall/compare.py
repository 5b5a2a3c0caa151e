"""Two runs: which of their differences are real?

Each metric's difference gets an interval from resampling both runs in blocks of neighbouring requests
(run/resampling.py), so that a queue that lasted a minute counts as one event and not as its thousand requests. Where
the two runs answered the same requests, both are resampled together, request by request: what both owe to the trace
cancels, and small differences become visible. Otherwise each is resampled by itself.

Many metrics are compared at once, and one in twenty looks different by chance. So the verdicts come from p-values that
are corrected by Holm's method (1979): with alpha 0.05, the chance that any of the verdicts is wrong is at most 5 %.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import polars as pl

from squall.errors import InputError
from squall.run.files import read_run
from squall.run.metrics import latencies, per_request, requests_that_met
from squall.run.resampling import (
    CELLS,
    FEWEST_BLOCKS,
    PARTS,
    Deviations,
    Statistic,
    cells_of,
    deviations,
    error,
    quantile,
    ratio,
    swings,
)
from squall.run.slo import SLO, parse_slo
from squall.run.table import Run, RunSource
from squall.seeds import DEFAULT_SEED
from squall.units import in_words
from squall.verb import callable_room

LATENCIES = ("ttft", "e2e", "tpot")
LEVELS = ("mean", "p50", "p90", "p95", "p99")
RATES = ("throughput", "output_token_throughput", "goodput")
SHARES = ("failed_share", "goodput_share")
METRICS = (*(f"{name}_{level}" for name in LATENCIES for level in LEVELS), *RATES, *SHARES)
_HIGHER_IS_BETTER = (*RATES, "goodput_share")
_NEEDS_SLO = ("goodput", "goodput_share")
BEYOND = 10
"""A percentile is compared if at least so many values are expected above it: P99 needs 1,000 requests."""
SWINGS = 8
"""Runs are compared if their latency (TTFT, E2E and the one compared) went from its lowest to its highest quarter at
least so often."""
SWINGS_OF_TAILS = 24
"""The same for P95, P99, shares and goodput, which few of those swings reach."""
ANSWERS = 100
"""A run is compared if it lasts at least so many times as long as its mean answer: who fly together are alike."""

Verdict = Literal["better", "worse", "equal", "cannot tell"]


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two runs."""

    title: str
    source: str
    kind: str
    state: str
    verdict: str
    verdict_reasons: list[str]
    requests: int
    """Offered, as far as they are compared."""
    failed: int
    trace: str | None


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of B against A."""

    metric: str
    a: float | None
    b: float | None
    n_a: int
    """Values that the metric rests on: requests that succeeded, requests offered, or seconds of a rate."""
    n_b: int
    relative: bool
    """Whether change, low and high are relative to A (b / a - 1), or differences (b - a; shares, and where A is 0)."""
    change: float | None
    low: float | None
    """Of the interval at confidence 1 - alpha, for this metric alone; null where none can be given."""
    high: float | None
    p_value: float | None
    p_adjusted: float | None
    """Corrected for the number of metrics (Holm)."""
    block: float | None
    """Requests (seconds for rates) that were taken as one event."""
    blocks: float | None
    """How many of those a run has; of the run that has fewer."""
    least: float | None
    """How far from 0 the change is at least: the nearer end of the interval, or, where pairs are too few for one, the
    smallest change in an eighth of the runs."""
    needed: int | None
    """Where no interval can be given: about how many requests the shorter run would need for one; null if unknown."""
    verdict: Verdict
    """Of B: better, worse, equal (the same numbers), or cannot tell."""
    sentence: str


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `compare`. Latencies in seconds, from schedule, of requests that succeeded; rates per second."""

    a: Side
    b: Side
    paired: bool
    pairs: int
    """Requests that were compared one by one; 0 if unpaired."""
    pairing: str
    """Why."""
    alpha: float
    tolerance: float
    correction: str
    summary: list[str]
    """What is better, what is worse, what cannot be told: plain sentences."""
    regressions: list[str]
    """Metrics in which B is worse, and by more than the tolerance."""
    trusted: bool
    """False if one of the runs is CLIENT-LIMITED."""
    differences: list[Difference]
    notes: list[str]


def compare(
    a: RunSource,
    b: RunSource,
    *,
    metric: str | Sequence[str] | None = None,
    alpha: float = 0.05,
    slo: str | None = None,
    tolerance: float = 0.0,
    seed: int = DEFAULT_SEED,
) -> Comparison:
    """Compare run `b` with run `a` (the reference), metric by metric.

    Parameters
    ----------
    a, b
        Runs or their files.
    metric
        Names out of `METRICS` (several, or one text with commas). Not given: all that both runs have.
    alpha
        The intervals are at confidence 1 - alpha; the chance of any wrong verdict is at most alpha.
    slo
        Limits like `ttft=1s,tpot=100ms,e2e=30s` for goodput and its share.
    tolerance
        How much worse B may be before it counts as a regression: a share of A (0.05), or of 1 for shares.

    Raises InputError if a run cannot be read, a metric is unknown, or the two have nothing in common to compare.
    """
    if not 0 < alpha < 0.5:
        raise InputError(f"--alpha {alpha:g}: it is the chance of a wrong verdict; give a number such as 0.05 or 0.01.")
    if not 0 <= tolerance < float("inf"):
        raise InputError(f"--tolerance {tolerance:g}: it is a share such as 0.05.")
    limits = None if slo is None else parse_slo(slo)
    asked = _asked(metric, limits)
    runs = read_run(a), read_run(b)
    tables = [_requests(run, source) for run, source in zip(runs, (a, b), strict=True)]
    paired, same_clock, why, tables = _pair(runs, tables)
    views = [_View(table, limits) for table in tables]
    found = []
    for index, name in enumerate(asked):
        one = _difference(name, views, paired and (same_clock or name not in RATES), alpha, seed, index)
        if one is not None:
            found.append(one)
        elif metric is not None:
            raise InputError(f"--metric {name}: one of the runs has no value of it.")
    if not found:
        raise InputError("compare: the two runs have no metric in common.")
    found = [_judged(one, adjusted, alpha) for one, adjusted in zip(found, _holm(found), strict=True)]
    sides = [_side(run, source, view) for run, source, view in zip(runs, (a, b), views, strict=True)]
    worse = [one for one in found if one.verdict == "worse" and (one.least or 0.0) > tolerance]
    return Comparison(
        a=sides[0],
        b=sides[1],
        paired=paired,
        pairs=len(tables[0]) if paired else 0,
        pairing=why,
        alpha=alpha,
        tolerance=tolerance,
        correction=f"Holm over {len(found)} metrics",
        summary=_summary(found),
        regressions=[one.metric for one in worse],
        trusted=all(run.meta.verdict != "CLIENT-LIMITED" for run in runs),
        differences=found,
        notes=_notes(runs, views, found),
    )


def _asked(metric: str | Sequence[str] | None, limits: SLO | None) -> list[str]:
    if metric is None:
        return [name for name in METRICS if limits or name not in _NEEDS_SLO]
    names = [part for text in ([metric] if isinstance(metric, str) else metric) for part in text.split(",")]
    names = list(dict.fromkeys(name.strip() for name in names))
    for name in names:
        if name not in METRICS:
            raise InputError(f"--metric {name}: there is no such metric; there are {', '.join(METRICS)}.")
        if name in _NEEDS_SLO and limits is None:
            raise InputError(f"--metric {name}: it needs an SLO; give one with --slo ttft=1s,….")
    return names


# ------------------------------------------------------------------------------------------------------------- pairing


def _requests(run: Run, source: RunSource) -> pl.DataFrame:
    """One row per request, by schedule, with the columns of `latencies` and the lengths that were asked for."""
    if not len(run):
        raise InputError(f"{run.meta.title if isinstance(source, Run) else source}: there is no request in this run.")
    requests = per_request(run.table)
    asked = requests.select(
        "request",
        asked=pl.coalesce("asked_request_tokens", "request_tokens"),
        wanted=pl.coalesce("asked_response_tokens", pl.when(pl.col("status") == "ok").then("response_tokens")),
    )
    return asked.with_columns(**{name: pl.Series(column) for name, column in latencies(requests).items()}).sort(
        "scheduled", "request"
    )


def _pair(runs: tuple[Run, Run], tables: list[pl.DataFrame]) -> tuple[bool, bool, str, list[pl.DataFrame]]:
    """Whether the runs are of the same requests, and on the same schedule; why; and the rows to compare."""
    hashes = [run.meta.trace.sha256 if run.meta.trace else None for run in runs]
    if all(hashes) and hashes[0] != hashes[1]:
        return False, False, "unpaired: the runs are of different traces", tables
    both = tables[0].join(tables[1], on="request", suffix="_b", maintain_order="left")
    if len(both) < 0.5 * max(map(len, tables)):
        return False, False, "unpaired: the runs have few requests in common", tables
    known = both.filter(pl.all_horizontal(pl.col("asked", "asked_b").is_not_null()))
    alike = len(known) == len(both) and bool((known["asked"] == known["asked_b"]).all())
    wanted = both.drop_nulls(["wanted", "wanted_b"])
    other = int((wanted["wanted"] != wanted["wanted_b"]).sum())
    if not alike or other > 0.01 * len(both):
        return False, False, "unpaired: the same row asks for other lengths in the two runs", tables
    times = [both[name].to_numpy() - both[name].min() for name in ("scheduled", "scheduled_b")]
    span = max(times[0].max(), 1e-9)
    same_clock = bool(np.nanmax(np.abs(times[0] - times[1])) <= 1e-6 * span + 1e-4)
    if not same_clock and not all(hashes):
        return False, False, "unpaired: the schedules differ, and no hash says that the traces are the same", tables
    left_out = sum(map(len, tables)) - 2 * len(both)
    why = f"paired: the same {len(both):,} requests" + ("" if same_clock else ", at different times")
    if left_out:
        why += f"; {left_out:,} that only one run has are left out"
    kept = both["request"]
    position = pl.DataFrame({"request": kept, "place": np.arange(len(kept))})
    return True, same_clock, why, [table.join(position, on="request").sort("place").drop("place") for table in tables]


# ------------------------------------------------------------------------------------------------------------- metrics


class _View:
    """The statistics of one run, by metric; `None` where the run has no value of it."""

    def __init__(self, requests: pl.DataFrame, limits: SLO | None) -> None:
        self.column = {name: requests[name].to_numpy() for name in requests.columns}
        self.cell = cells_of(len(requests))
        self.cells = int(self.cell[-1]) + 1
        self.size = len(requests)
        self.ok = self.column["ok"].astype(bool)
        self.met = requests_that_met(self.column, limits) if limits else None
        scheduled, ended = self.column["scheduled"], np.fmax(self.column["ended"], self.column["end"])
        self.begin = float(np.nanmin(scheduled))
        self.ended = ended
        self._known: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._swings: dict[str, float] = {}
        self.span = float(np.nanmax(ended)) - self.begin if np.isfinite(ended).any() else 0.0

    def exact(self, name: str) -> tuple[float | None, int]:
        """The metric as `squall metrics` gives it, and how many values it rests on."""
        if name in RATES:
            if not self.span > 0:
                return None, 0
            return float(self._events(name).sum() / self.span), round(self.span)
        if name in SHARES:
            return float(self._share(name).mean()), self.size
        latency, _, level = name.rpartition("_")
        values, _, ordered = self._latency(latency)
        if not values.size:
            return None, 0
        found = values.mean() if level == "mean" else _percentile(ordered, float(level[1:]))
        return float(found), values.size

    def statistic(self, name: str, width: float) -> Statistic:
        """The metric over cells of requests, or, for rates, over cells of `width` seconds from the first schedule."""
        if name in RATES:
            cells = int(np.ceil(self.span / width)) + 1
            weights = self._events(name)
            kept = np.isfinite(self.ended) & (weights > 0)
            place = np.clip((self.ended[kept] - self.begin) // width, 0, cells - 1).astype(np.int64)
            events = np.bincount(place, weights[kept], cells)
            covered = np.clip(self.span - np.arange(cells) * width, 0.0, width)
            return ratio(events, covered)
        if name in SHARES:
            offered = np.bincount(self.cell, minlength=self.cells)
            return ratio(np.bincount(self.cell, self._share(name), self.cells), offered)
        latency, _, level = name.rpartition("_")
        values, cell, ordered = self._latency(latency)
        if level == "mean":
            return ratio(np.bincount(cell, values, self.cells), np.bincount(cell, minlength=self.cells))
        return quantile(values, cell, self.cells, float(level[1:]) / 100, ordered)

    def swings(self, latency: str) -> float:
        """How often the latency swung from its lowest quarter to its highest; without bound where no value is known."""
        if latency not in self._swings:
            values = self._latency(latency)[0]
            self._swings[latency] = swings(values) if values.size else float("inf")
        return self._swings[latency]

    def lasts(self) -> float:
        """Time in which requests were scheduled, in mean answers; without bound where there was none."""
        values = self._latency("e2e")[0]
        mean = float(values.mean()) if values.size else 0.0
        return float(np.nanmax(self.column["scheduled"]) - self.begin) / mean if mean > 0 else float("inf")

    def _latency(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The known values of requests that succeeded, their cells, and the values sorted."""
        if name not in self._known:
            known = self.ok & np.isfinite(self.column[name])
            values = self.column[name][known]
            self._known[name] = values, self.cell[known], np.sort(values)
        return self._known[name]

    def _share(self, name: str) -> np.ndarray:
        return ~self.ok if name == "failed_share" else self.met  # type: ignore[return-value]

    def _events(self, name: str) -> np.ndarray:
        if name == "output_token_throughput":
            return np.where(self.ok, np.nan_to_num(self.column["tokens"]), 0.0)
        return (self.ok if name == "throughput" else self.met).astype(float)  # type: ignore[union-attr]


def _percentile(ordered: np.ndarray, level: float) -> float:
    """Of sorted values, linear between them as in `squall metrics`."""
    place = level / 100 * (ordered.size - 1)
    below = int(place)
    above = min(below + 1, ordered.size - 1)
    return float(ordered[below] + (place - below) * (ordered[above] - ordered[below]))


def _difference(
    name: str, views: Sequence[_View], paired: bool, alpha: float, seed: int, index: int
) -> Difference | None:
    (a, n_a), (b, n_b) = (view.exact(name) for view in views)
    if a is None or b is None:
        return None
    relative = name not in SHARES and a > 0 and b > 0
    change = b / a - 1 if relative else b - a
    plain: dict[str, Any] = {
        "metric": name, "a": a, "b": b, "n_a": n_a, "n_b": n_b, "relative": relative, "change": change,
        "low": None, "high": None, "p_value": None, "p_adjusted": None, "block": None, "blocks": None,
        "least": None, "needed": None, "verdict": "cannot tell", "sentence": "",
    }  # fmt: skip
    latency, _, level = name.rpartition("_")
    if level in LEVELS[1:]:
        needed = BEYOND / (1 - float(level[1:]) / 100)
        if min(n_a, n_b) < needed - 1e-6:
            return Difference(**plain | _too_few(name, min(n_a, n_b), round(needed)))
    # A long answer hides in E2E that the queue never moved: TTFT has to have swung too.
    swung = min(view.swings(of) for view in views for of in {"ttft", "e2e", *({latency} & {*LATENCIES})})
    if a != b and (short := _too_short(name, views, swung)):
        return Difference(**plain | short | (_in_each_part(name, views) if paired else {}))
    width = max(max(view.span for view in views) / (CELLS // 2), 1e-9)
    statistics = [view.statistic(name, width) for view in views]
    if paired:
        errors = _together(statistics, relative, seed, index)
    else:
        of_a, of_b = (deviations(one, seed, index, k, relative=relative) for k, one in enumerate(statistics))
        errors = of_b.less(of_a)
    per_cell = width if name in RATES else max(view.size / view.cells for view in views)
    plain |= {"block": errors.block * per_cell, "blocks": errors.blocks}
    if not np.isfinite(errors.values).all():
        return Difference(**plain)
    if a == b and not errors.values.any():
        return Difference(**plain | {"verdict": "equal"})
    if short := _too_short(name, views, swung):
        return Difference(**plain | short)
    if latency not in LATENCIES and errors.blocks < FEWEST_BLOCKS and errors.values.any():
        return Difference(**plain | _too_alike(name, errors.blocks, min(view.size for view in views)))
    middle = np.log(b / a) if relative else b - a
    most = max(swung - 1, 1.0)
    down, up = errors.interval(alpha, most)
    p_value = _p_value(middle, down if middle > 0 else up, alpha, min(errors.freedom, most))
    if paired:
        level_error = max(map(_relative_error, [name] * 2, statistics))
        down, up = _with_level(middle, down, up, level_error, alpha, min(PARTS - 1, most))
    low, high = middle + down, middle + up
    if name in SHARES:
        low, high = max(low, -a), min(high, 1 - a)
    if relative:
        low, high = np.expm1(max(low, -50.0)), np.expm1(min(high, 50.0))  # finite, whatever it is
    least = min(abs(low), abs(high)) if low > 0 or high < 0 else 0.0
    found = {"low": float(low), "high": float(high), "least": float(least), "p_value": p_value}
    return Difference(**plain | found)


GROSS = 2.0
"""Factor between two latencies that pairs are told of however short they are."""


def _in_each_part(name: str, views: Sequence["_View"]) -> dict[str, Any]:
    """Of pairs too short for an interval, whether a latency of B is GROSS times A's, or A's of B's, in each eighth.

    The same arrivals make the same luck, so what is as large all along is no chance, however long the queues. p is of
    the eighths' mean by Student's t, with its error doubled: they are not independent.
    """
    from scipy.stats import t

    latency, _, level = name.rpartition("_")
    if latency not in LATENCIES:
        return {}
    factors = []
    for rows in np.array_split(np.arange(views[0].size), PARTS):
        ends = []
        for view in views:
            values = view.column[latency][rows]
            values = values[np.isfinite(values) & view.ok[rows]]
            if not values.size:
                return {}
            ends.append(values.mean() if level == "mean" else np.percentile(values, float(level[1:])))
        if min(ends) <= 0:
            return {}
        factors.append(np.log(ends[1] / ends[0]))
    found = np.array(factors)
    if found.min() < np.log(GROSS) and found.max() > -np.log(GROSS):
        return {}
    wide = 2 * found.std(ddof=1) / np.sqrt(PARTS)
    p_value = float(2 * t.sf(abs(found.mean()) / wide, PARTS - 1)) if wide > 0 else 0.0
    return {"least": float(abs(np.expm1(found[np.abs(found).argmin()]))), "p_value": p_value}


def _together(statistics: Sequence[Statistic], relative: bool, seed: int, index: int) -> Deviations:
    """Both runs in the same resamples: the difference of their (logarithms of the) statistics."""
    a, b = statistics
    size = max(a.influence.size, b.influence.size)
    shaped: Callable = np.log if relative else (lambda values: values)

    def estimate(weights: np.ndarray) -> np.ndarray:
        of_a, of_b = (one.estimate(weights[:, : one.influence.size]) for one in statistics)
        return shaped(of_b) - shaped(of_a)

    def scaled(one: Statistic) -> np.ndarray:
        padded = np.pad(one.influence, (0, size - one.influence.size))
        return padded / one.value if relative and one.value > 0 else padded

    return deviations(Statistic(estimate, scaled(b) - scaled(a)), seed, index)


def _relative_error(name: str, statistic: Statistic) -> float:
    """The standard error of one run's statistic as a part of it; of a share, as a part of the rarer side."""
    value = min(statistic.value, 1 - statistic.value) if name in SHARES else statistic.value
    return error(statistic.influence) / value if value > 0 else 0.0


MOST_OF_LEVEL = 0.9
"""Bound of (Student's t x relative error)^2 in `_with_level`, beyond which the far end would have no bound."""


def _with_level(
    middle: float, down: float, up: float, level_error: float, alpha: float, freedom: float
) -> tuple[float, float]:
    """`down` and `up`, widened by what the runs do not know of their common load.

    Pairs know little of how far apart the two servers would be under a longer queue than they saw. A difference grows
    with the queues, about as the latency does, so besides what resampling found it has a relative error like that of
    the latency itself. Those true differences d are in the interval for which (found - d)^2 <= h^2 + (t e d)^2, with
    the half-width h found, the relative error e and Student's t (as in Fieller's theorem, 1954). 0 is outside if and
    only if it was.
    """
    from scipy.stats import t

    g = min((float(t.ppf(1 - alpha / 2, freedom)) * level_error) ** 2, MOST_OF_LEVEL)
    size = abs(middle)
    towards, away = (-down, up) if middle > 0 else (up, -down)
    near = (size - np.sqrt(towards**2 * (1 - g) + size**2 * g)) / (1 - g)
    far = (size + np.sqrt(away**2 * (1 - g) + size**2 * g)) / (1 - g)
    return (near - size, far - size) if middle > 0 else (size - far, size - near)


def _p_value(middle: float, reach: float, alpha: float, freedom: float) -> float:
    """Two-sided, from the side of the interval that faces 0: below alpha if and only if the interval leaves 0 out."""
    from scipy.stats import t

    if reach == 0:
        return 0.0 if middle else 1.0
    error = abs(reach) / t.ppf(1 - alpha / 2, freedom)
    return float(2 * t.sf(abs(middle) / error, freedom))


def _holm(found: Sequence[Difference]) -> list[float | None]:
    """Holm's step-down p-values: the k-th smallest of m times (m - k + 1), never falling."""
    tested = sorted((k for k, one in enumerate(found) if one.p_value is not None), key=lambda k: found[k].p_value or 0)
    adjusted: list[float | None] = [None] * len(found)
    highest = 0.0
    for rank, k in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * (found[k].p_value or 0.0)))
        adjusted[k] = highest
    return adjusted


# --------------------------------------------------------------------------------------------------------------- words


def _judged(one: Difference, adjusted: float | None, alpha: float) -> Difference:
    verdict: Verdict = one.verdict
    if adjusted is not None and verdict != "equal" and adjusted < alpha and one.change:
        verdict = "better" if (one.change > 0) == (one.metric in _HIGHER_IS_BETTER) else "worse"
    judged = msgspec.structs.replace(one, p_adjusted=adjusted, verdict=verdict)
    if verdict in ("better", "worse") and one.low is None:
        return msgspec.structs.replace(judged, sentence=_sentence_of_parts(judged))
    return msgspec.structs.replace(judged, sentence=one.sentence or _sentence(judged, alpha))


def name_of(metric: str) -> str:
    """A metric for people: `P99 TTFT`, `mean E2E`, `throughput`."""
    latency, _, level = metric.rpartition("_")
    if latency in LATENCIES:
        return f"{level.upper() if level != 'mean' else level} {latency.upper()}"
    return {"failed_share": "failure share", "goodput_share": "share that met the SLO"}.get(
        metric, metric.replace("_", " ")
    )


def change_of(one: Difference, change: float | None) -> str:
    """A change of a metric for tables: `+12.3 %`, `-0.4 pt` (points of a share)."""
    if change is None:
        return "-"
    if change == 0:
        return "0"
    if one.relative:
        return f"{100 * change:+.3g} %" if change < 9 else f"x {1 + change:.3g}" if change < 99 else "over x 100"
    return f"{100 * change:+.3g} pt" if one.metric in SHARES else f"{change:+.3g}"


def value_of(metric: str, value: float | None) -> str:
    """A value of a metric for people, with its unit."""
    if value is None:
        return "-"
    if metric in SHARES:
        return f"{100 * value:.3g} %"
    return in_words(value) if metric.rpartition("_")[0] in LATENCIES else f"{value:.4g}/s"


def _sentence(one: Difference, alpha: float) -> str:
    name, values = name_of(one.metric), f"{value_of(one.metric, one.b)} against {value_of(one.metric, one.a)}"
    if one.verdict == "equal":
        return f"{name}: the same in both ({value_of(one.metric, one.b)})."
    if one.low is None or one.high is None or one.change is None:
        return f"{name}: cannot tell ({values}); the runs show no spread to judge by."
    interval = f"{100 * (1 - alpha):g} % interval {_range(one)}"
    if one.verdict == "cannot tell":
        chance = ""
        if one.low > 0 or one.high < 0:
            chance = "; among so many metrics one interval leaves 0 out by chance"
        return f"{name}: cannot tell; B's is {_change(one, one.change)} ({values}), {interval}{chance}."
    return f"B's {name} is {_change(one, one.change)} ({values}), {interval}."


def _sentence_of_parts(one: Difference) -> str:
    values = f"{value_of(one.metric, one.b)} against {value_of(one.metric, one.a)}"
    change = _change(one, one.change or 0.0)
    return (
        f"B's {name_of(one.metric)} is {change} ({values}), by a factor of {GROSS:g} or more in each eighth of the "
        f"runs, which are too short for an interval: about {one.needed or 0:,} requests are needed."
    )


def _change(one: Difference, change: float) -> str:
    if not one.relative:
        unit = " points" if one.metric in SHARES else (" s" if one.metric.rpartition("_")[0] in LATENCIES else "/s")
        size = abs(change) * (100 if one.metric in SHARES else 1)
        return f"{size:.2g}{unit} {_direction(change)}"
    if change > 99:
        return "over 100 times as high"
    if change > 2:
        return f"{1 + change:.3g} times as high"
    return f"{_percent(change)} % {_direction(change)}"


def _range(one: Difference) -> str:
    low, high = one.low or 0.0, one.high or 0.0
    if low > 0 or high < 0:
        near, far = sorted((low, high), key=abs)
        if one.relative and low > 2:
            return f"{1 + near:.3g} to {1 + far:.3g} times" if far < 99 else f"{1 + near:.3g} to over 100 times"
        if one.relative and far <= 2:
            return f"{_percent(near)} to {_percent(far)} %"
    return f"{_change(one, low)} to {_change(one, high)}"


def _percent(share: float) -> str:
    size = 100 * abs(share)
    return f"{size:.0f}" if size >= 9.95 else f"{size:.2g}"


def _direction(change: float) -> str:
    return "lower" if change < 0 else "higher"


def _too_few(name: str, n: int, needed: int) -> dict[str, Any]:
    said = f"{name_of(name)}: cannot tell; {n:,} requests are too few, {needed:,} are needed."
    return {"needed": needed, "sentence": said}


def _too_alike(name: str, blocks: float, requests: int) -> dict[str, Any]:
    needed = _rounded(requests * FEWEST_BLOCKS / blocks)
    said = (
        f"{name_of(name)}: cannot tell; neighbours are so alike that a run amounts to {blocks:.2g} independent "
        f"stretches; {FEWEST_BLOCKS:g} are needed, about {needed:,} requests."
    )
    return {"needed": needed, "sentence": said}


def _too_short(name: str, views: Sequence["_View"], swung: float) -> dict[str, Any] | None:
    """Why the runs cannot speak for longer ones, and how many requests would do; None if they can."""
    requests = min(view.size for view in views)
    rare = name.endswith(("_p95", "_p99")) or name in (*SHARES, *_NEEDS_SLO)
    wanted = SWINGS_OF_TAILS if rare else SWINGS
    lasts = min(view.lasts() for view in views)
    needed = _rounded(requests * max(wanted / max(swung, 1.0), ANSWERS / max(lasts, 1e-9)))
    if lasts < ANSWERS:
        why = f"it lasts only {lasts:.2g} times as long as the mean answer, and {ANSWERS} times are needed"
    elif swung < wanted:
        why = f"it swung only {swung:.0f} times between fast and slow, and {wanted} times are needed"
    else:
        return None
    said = f"{name_of(name)}: cannot tell; a run of {requests:,} requests is too short: {why}, "
    return {"needed": needed, "sentence": f"{said}about {needed:,} requests."}


def _rounded(requests: float) -> int:
    """Up, to two digits."""
    step = 10 ** max(int(np.floor(np.log10(requests))) - 1, 0)
    return int(np.ceil(requests / step)) * step


def _summary(found: Sequence[Difference]) -> list[str]:
    told = [one.sentence for word in ("worse", "better") for one in found if one.verdict == word]
    short = {
        name_of(one.metric): one.needed for one in found if one.verdict == "cannot tell" and one.needed is not None
    }
    unknown = [name_of(one.metric) for one in found if one.verdict == "cannot tell" and one.needed is None]
    same = [name_of(one.metric) for one in found if one.verdict == "equal"]
    if same:
        told.append(f"The same in both: {', '.join(same)}.")
    if unknown:
        told.append(f"Cannot tell: {', '.join(unknown)}.")
    if short:
        needed = sorted(set(short.values()))
        by = [f"{', '.join(name for name in short if short[name] == n)} (about {n:,} requests)" for n in needed]
        told.append(f"Too short to tell, and what would do: {'; '.join(by)}.")
    return told


def _side(run: Run, source: RunSource, view: _View) -> Side:
    return Side(
        title=run.meta.title,
        source=run.meta.title or "run" if isinstance(source, Run) else str(source),
        kind=run.meta.kind,
        state=run.meta.state,
        verdict=run.meta.verdict,
        verdict_reasons=run.meta.verdict_reasons,
        requests=view.size,
        failed=int((~view.ok).sum()),
        trace=run.meta.trace.source if run.meta.trace else None,
    )


def _notes(runs: tuple[Run, Run], views: Sequence[_View], found: Sequence[Difference]) -> list[str]:
    notes = []
    for name, run in zip("AB", runs, strict=True):
        if run.meta.verdict == "CLIENT-LIMITED":
            notes.append(
                f"{name} is CLIENT-LIMITED ({'; '.join(run.meta.verdict_reasons)}): its latencies are not the server's."
            )
        if run.meta.state != "complete":
            notes.append(f"{name} is {run.meta.state}: it holds only what happened until then.")
        if not run.meta.open_loop:
            notes.append(f"{name} was sent in a closed loop: it had less load whenever it was slow.")
    shares = [float((~view.ok).mean()) for view in views]
    if abs(shares[0] - shares[1]) > 0.01:
        notes.append(
            f"{100 * shares[0]:.3g} % of A's requests failed and {100 * shares[1]:.3g} % of B's: latencies are of "
            "those that succeeded, and a server that refuses looks faster."
        )
    kinds = {run.meta.kind for run in runs}
    if "simulation" in kinds:
        uncalibrated = any("uncalibrated" in (run.meta.step_time or "") for run in runs)
        notes.append(
            "The intervals are of the requests' chance, not of the simulator's error"
            + (", which is not even calibrated." if uncalibrated else ".")
        )
    if len({run.meta.started for run in runs if run.meta.started}) == 2:
        notes.append(
            "Two runs at two times: whatever else changed between them (noise, warm caches) is in the difference."
        )
    return notes


callable_room(__name__)
