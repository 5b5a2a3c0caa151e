"""What repeats: hours of the day, days of the week, dominant periods, and the average working day.

Hours and days are those of the clock, counted from the midnight before the first arrival; only those of which the
trace covers at least 95 % enter a box or a map. A trace is called periodic if its hourly counts repeat after 24 h with
an autocorrelation of at least 0.3. Dominant periods are the peaks of the periodogram |FFT|^2 of the counts that rise
above the median of their half octave of frequencies further than noise would: the power of noise over its local mean
is exponentially distributed, whatever the slow trend of the spectrum (Percival and Walden, Spectral Analysis, 1993).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from msgspec import Struct

from squall.characterize.concurrency import MAXIMUM_WINDOWS, GammaWindows, bin_counts, gamma_shape
from squall.characterize.summary import bin_width, dot, position, sums_of_runs

HOUR, DAY, WEEK = 3600.0, 86400.0, 604800.0
WHOLE = 0.95
"""An hour or a day counts if the trace covers this share of it."""
REPEATS = 0.3
"""From this autocorrelation of the hourly counts at 24 h on, a trace is called periodic."""
FALSE_ALARM = 1e-3
"""Probability that the highest of all peaks of noise is called a period."""
MOST_PERIODS = 5
MOST_POINTS = 300
MOST_LAGS = 336
"""Hours."""
WORKING_DAYS = 5
"""Monday to Friday."""
MOST_SLOTS = 1440
"""Slots of less than a minute are no profile of a day."""

Average = Literal["parameters", "pooled"]


class Box(Struct, frozen=True, kw_only=True):
    """Five numbers on the `n` observed hours of one hour of the day; null if there was none."""

    n: int = 0
    min: float | None = None
    q1: float | None = None
    median: float | None = None
    q3: float | None = None
    max: float | None = None


class HourBoxes(Struct, frozen=True, kw_only=True):
    """Totals per hour, by hour of the day (24 boxes each); empty if the clock is unknown or the trace under a day."""

    requests: list[Box] = []
    request_tokens: list[Box] = []
    response_tokens: list[Box] = []
    """Of the requests that arrived in the hour."""


class Weeks(Struct, frozen=True, kw_only=True):
    """The weekly maps; empty if the weekday is unknown. Days and hours begin with Monday, 0 h."""

    start: float | None = None
    """The Monday, 0 h, of the first row of `days`: s on the trace's clock."""
    days: list[list[int | None]] = []
    """Requests of each day, a row of 7 per week; null for days that the trace does not cover."""
    hours: list[list[float]] = []
    """Mean requests/h on the 24 hours of the 7 weekdays; empty for less than a week."""


class Period(Struct, frozen=True, kw_only=True):
    """A peak of the periodogram."""

    period: float
    """s"""
    share: float
    """Of the variance of the counts, with the two neighbouring frequencies."""
    strength: float
    """Power over the mean power around it; 1 is noise."""


class Spectrum(Struct, frozen=True, kw_only=True):
    """The periodogram of the counts, longest period first, at most 300 points: the highest of its neighbours each."""

    period: list[float] = []
    """s"""
    strength: list[float] = []
    """Power over the mean power around it; 1 is noise."""
    alarm: float | None = None
    """What noise exceeds anywhere once in a thousand series."""


class Periodicity(Struct, frozen=True, kw_only=True):
    """How much of the hourly counts repeats; null where the trace is shorter than two periods."""

    verdict: Literal["periodic", "aperiodic"] | None = None
    """Do hourly counts repeat after 24 h (`acf_day` >= 0.3)?"""
    acf_hour: float | None = None
    """Autocorrelation of the hourly counts at 1 h."""
    acf_day: float | None = None
    """The same at 24 h."""
    acf_week: float | None = None
    """The same at 168 h."""
    hour_of_day_share: float | None = None
    """Share of the variance of the hourly counts that the hour of day explains."""
    hour_of_week_share: float | None = None
    """Share that the hour of the week explains."""
    cv: float | None = None
    """CV of the hourly counts."""
    empty_share: float | None = None
    """Share of hours without a request."""
    peak_to_mean: float | None = None
    """Fullest hour over the mean hour."""
    bin: float | None = None
    """Bins of the spectrum, s: an hour, or less for a short trace."""
    spectrum: Spectrum = Spectrum()
    autocorrelation: list[float] = []
    """Of the counts in bins of an hour (`bin` for traces of less than two days), at lags of 0, 1, 2, … bins, to two
    weeks or half the trace."""
    autocorrelation_bin: float | None = None
    """s"""
    periods: list[Period] = []
    """Periods that stand out of the spectrum, the strongest first, at most 5."""


class DayProfile(Struct, frozen=True, kw_only=True):
    """Gamma parameters by slot of the day; null in slots without a fit."""

    alpha: list[float | None] = []
    beta: list[float | None] = []
    """1/s"""


class WorkingDay(Struct, frozen=True, kw_only=True):
    """The average working day (Monday to Friday) in slots of one window; empty without clock, weekday or such a day."""

    slot: float | None = None
    """s"""
    days: int = 0
    """Working days that the trace touches."""
    start: list[float] = []
    """Start of each slot, s after midnight."""
    windows: list[int] = []
    """Windows with a fit in each slot."""
    rate: list[float | None] = []
    """Requests/s that were really there, silent days included; null in slots that the trace does not cover."""
    parameters: DayProfile = DayProfile()
    """Means of alpha and of beta over the days, as BurstGPT's authors publish; their quotient is not the mean rate."""
    pooled: DayProfile = DayProfile()
    """One fit of all gaps of the slot, over all days."""


@dataclass(frozen=True)
class Hours:
    """What arrived in each hour of the clock that the trace touches; arrays have one value per hour."""

    first: int
    """The first of them, counted from the midnight before arrival 0."""
    requests: np.ndarray
    request_tokens: np.ndarray
    response_tokens: np.ndarray
    covered: np.ndarray
    """Share of the hour that lies inside the trace."""

    @property
    def of_day(self) -> np.ndarray:
        """Hour of the day, 0 to 23."""
        return (self.first + np.arange(self.requests.size)) % 24


def clock_hours(
    arrivals: np.ndarray, request: np.ndarray, response: np.ndarray, start: float, end: float, midnight: float
) -> Hours | None:
    """Requests and tokens per hour of the clock over [start, end] s; None if that is too long to be a trace.

    `arrivals` are sorted seconds, `request` and `response` their tokens; `midnight` is the time of day at arrival 0, s.
    """
    first, last = int((start + midnight) // HOUR), int((end + midnight) // HOUR)
    if last - first >= MAXIMUM_WINDOWS:
        return None
    hours = last - first + 1
    begin = (first + np.arange(hours)) * HOUR - midnight
    counts = np.diff(np.searchsorted(arrivals, begin[1:]), prepend=0, append=arrivals.size)
    return Hours(
        first=first,
        requests=counts,
        request_tokens=sums_of_runs(request, counts),
        response_tokens=sums_of_runs(response, counts),
        covered=(np.minimum(begin + HOUR, end) - np.maximum(begin, start)) / HOUR,
    )


def hour_boxes(hours: Hours | None) -> HourBoxes:
    """Boxes by hour of the day over the hours that the trace covers; empty for less than a day of them."""
    if hours is None or np.count_nonzero(hours.covered >= WHOLE) < 24:
        return HourBoxes()
    members = [np.flatnonzero((hours.of_day == hour) & (hours.covered >= WHOLE)) for hour in range(24)]

    def boxes(series: np.ndarray) -> list[Box]:
        return [_box(np.sort(series[member])) for member in members]

    return HourBoxes(
        requests=boxes(hours.requests),
        request_tokens=boxes(hours.request_tokens),
        response_tokens=boxes(hours.response_tokens),
    )


def _box(ordered: np.ndarray) -> Box:
    if ordered.size == 0:
        return Box()
    low, q1, median, q3, high = (ordered[position(share, ordered.size)].item() for share in (0, 0.25, 0.5, 0.75, 1))
    return Box(n=ordered.size, min=low, q1=q1, median=median, q3=q3, max=high)


def weekly_maps(hours: Hours | None, midnight: float | None, weekday: int | None) -> Weeks:
    """Requests by day and week, and by hour and weekday; `weekday` is that of the midnight before arrival 0."""
    if hours is None or midnight is None or weekday is None:
        return Weeks()
    # Rows begin with the Monday before; hours outside the trace are covered by nothing.
    monday = (hours.first // 24 + weekday) // 7 * 7 - weekday
    before = hours.first - 24 * monday
    weeks = -(-(before + hours.requests.size) // 168)

    def laid_out(series: np.ndarray) -> np.ndarray:
        return np.pad(series.astype(float), (before, weeks * 168 - before - series.size)).reshape(weeks, 7, 24)

    counts, covered = laid_out(hours.requests), laid_out(hours.covered)
    known, daily = covered.mean(2) >= WHOLE, counts.sum(2)
    if not known.any():
        return Weeks()
    first, last = np.flatnonzero(known.any(1))[[0, -1]].tolist()
    days = [
        [int(count) if whole else None for count, whole in zip(*row, strict=True)]
        for row in zip(daily[first : last + 1], known[first : last + 1], strict=True)
    ]
    observed = covered.sum(0)
    whole_week = hours.covered.sum() >= 168 * WHOLE and (observed > 0).all()
    return Weeks(
        start=(monday + 7 * first) * DAY - midnight,
        days=days,
        hours=(counts.sum(0) / observed).tolist() if whole_week else [],
    )


def hour_of_day(hours: Hours | None) -> list[float]:
    """Mean requests per hour in each of the 24 hours of the day, over the time observed; empty for less than a day."""
    if hours is None or hours.covered.sum() < 24:
        return []
    return (np.bincount(hours.of_day, hours.requests) / np.bincount(hours.of_day, hours.covered)).tolist()


def day_of_week(hours: Hours | None, weekday: int | None) -> list[float]:
    """Mean requests per day on each weekday, Monday first; `weekday` is that of the midnight before arrival 0.

    Empty if that is unknown or if less than a week was observed.
    """
    if hours is None or weekday is None or hours.covered.sum() < 168:
        return []
    day = ((hours.first + np.arange(hours.requests.size)) // 24 + weekday) % 7
    return (np.bincount(day, hours.requests) / np.bincount(day, hours.covered / 24)).tolist()


def peak_to_trough(cycle: list[float]) -> float | None:
    """Highest over lowest value of a daily cycle; None if there is none or if its trough is empty."""
    return max(cycle) / min(cycle) if cycle and min(cycle) > 0 else None


def periodicity(arrivals: np.ndarray, start: float, end: float) -> Periodicity:
    """Daily and weekly repetition of the counts in the whole hours from `start` to `end`, and their spectrum.

    `arrivals` are sorted seconds, spread inside the clock's ticks, where it has any.
    """
    width = min(HOUR, bin_width(end - start, 2000))
    bins = int((end - start) // width)
    if not 32 <= bins <= MAXIMUM_WINDOWS:
        return Periodicity()
    counts = bin_counts(arrivals, width, start, end)[:bins].astype(float)
    periods, power = spectrum(counts, width)
    if width < HOUR or bins < 48:
        hours = int((end - start) // HOUR)
        if hours < 48:
            lags = correlogram(counts, counts.size // 2)
            return Periodicity(
                bin=width, periods=periods, spectrum=power, autocorrelation=lags, autocorrelation_bin=width
            )
        counts = bin_counts(arrivals, HOUR, start, end)[:hours].astype(float)
    day, mean = autocorrelation(counts, 24), counts.mean()
    return Periodicity(
        verdict=None if day is None else "periodic" if day >= REPEATS else "aperiodic",
        acf_hour=autocorrelation(counts, 1),
        acf_day=day,
        acf_week=autocorrelation(counts, 168),
        hour_of_day_share=_explained(counts, 24),
        hour_of_week_share=_explained(counts, 168),
        cv=float(counts.std() / mean) if mean > 0 else None,
        empty_share=float(np.mean(counts == 0)),
        peak_to_mean=float(counts.max() / mean) if mean > 0 else None,
        bin=width,
        spectrum=power,
        autocorrelation=correlogram(counts, min(MOST_LAGS, counts.size // 2)),
        autocorrelation_bin=HOUR,
        periods=periods,
    )


def spectrum(counts: np.ndarray, width: float) -> tuple[list[Period], Spectrum]:
    """Dominant periods of `counts` in bins of `width` s, at most half as long as the series, and the whole spectrum.

    The strongest period is the first.
    """
    off = counts - counts.mean()
    power = np.abs(np.fft.rfft(off)) ** 2
    power[0] = 0.0
    total = float(power.sum())
    if total <= 1e-12 * dot(counts, counts) * counts.size:
        return [], Spectrum()
    frequency = np.arange(power.size)
    # Bands of half an octave, but of 8 frequencies at least; the median of exponential noise is log 2 of its mean.
    band = np.maximum(np.floor(2 * np.log2(np.maximum(frequency, 1) / 8)), 0).astype(int)
    first = np.flatnonzero(np.diff(band, prepend=-1))
    middles = [float(np.median(part)) for part in np.split(power, first[1:])]
    background = np.maximum(np.asarray(middles)[np.cumsum(np.diff(band, prepend=0) > 0)] / np.log(2), 1e-12 * total)
    strength = power / background
    around = np.convolve(power, np.ones(3), mode="same")
    highest = (power[1:-1] > power[:-2]) & (power[1:-1] >= power[2:])
    alarm = -np.log(-np.expm1(np.log1p(-FALSE_ALARM) / power.size))
    found = [k for k in (np.flatnonzero(highest) + 1).tolist() if k >= 2 and strength[k] > alarm]
    found.sort(key=lambda k: -around[k])
    periods = [
        Period(period=counts.size * width / k, share=min(float(around[k] / total), 1.0), strength=float(strength[k]))
        for k in found[:MOST_PERIODS]
    ]
    # Neighbours on a logarithmic axis are one point, at the highest of them, so that no peak is lost.
    group = np.floor(np.log(frequency[2:]) / np.log(power.size) * MOST_POINTS).astype(int)
    first = np.flatnonzero(np.diff(group, prepend=-1))
    highest_of = [2 + a + int(np.argmax(strength[2 + a : 2 + b])) for a, b in pairwise([*first.tolist(), group.size])]
    return periods, Spectrum(
        period=[counts.size * width / k for k in highest_of],
        strength=strength[highest_of].tolist(),
        alarm=float(alarm),
    )


def working_day(
    windows: GammaWindows, start: float, end: float, midnight: float | None, weekday: int | None
) -> WorkingDay:
    """The average working day in the `windows` (whose `phase` was `midnight`) of a trace of [start, end] s."""
    slots = round(DAY / windows.window)
    if midnight is None or weekday is None or not 1 <= slots <= MOST_SLOTS or abs(slots * windows.window - DAY) > 1e-6:
        return WorkingDay()
    order = np.round((windows.start + midnight) / windows.window).astype(np.int64)
    slot, day = order % slots, order // slots
    at_work = (day + weekday) % 7 < WORKING_DAYS
    if not at_work.any():
        return WorkingDay()

    def total(values: np.ndarray, where: np.ndarray = at_work) -> np.ndarray:
        return np.bincount(slot[where], values[where], slots)

    # The trace may begin before the first window of this class and end after its last.
    per_day = np.arange(int((start + midnight) // DAY), int(np.ceil((end + midnight) / DAY)))
    working = per_day[(per_day + weekday) % 7 < WORKING_DAYS]
    begin = working[:, None] * DAY + np.arange(slots) * windows.window - midnight
    observed = np.clip(np.minimum(begin + windows.window, end) - np.maximum(begin, start), 0, None).sum(0)
    fitted = windows.fitted & at_work
    with np.errstate(invalid="ignore", divide="ignore"):
        number = total(np.ones(slot.size), fitted)
        return WorkingDay(
            slot=windows.window,
            days=working.size,
            start=(np.arange(slots) * windows.window).tolist(),
            windows=number.astype(int).tolist(),
            rate=_known(total(windows.count.astype(float)) / np.where(observed > 0, observed, np.nan)),
            parameters=_profile(total(windows.alpha, fitted) / number, total(windows.beta, fitted) / number),
            pooled=_pooled(windows, slot, at_work, slots),
        )


def _pooled(windows: GammaWindows, slot: np.ndarray, at_work: np.ndarray, slots: int) -> DayProfile:
    """One fit per slot from the windows' moments, which add up; slots with fewer than 10 gaps have none."""
    used = at_work & (windows.gaps > 0)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(slot[used], (windows.gaps * values)[used], slots) / gaps

    gaps = np.bincount(slot[used], windows.gaps[used].astype(float), slots)
    middle = mean(windows.mean)
    variance = mean(windows.variance + windows.mean**2) - middle**2
    usable = (gaps >= 10) & (variance > 1e-12 * middle**2)
    if windows.method == "moments":
        alpha = np.where(usable, middle**2 / variance, np.nan)
    else:
        alpha = gamma_shape(np.where(usable, np.log(middle) - mean(windows.log_mean), np.nan))
    return _profile(alpha, alpha / middle)


def _profile(alpha: np.ndarray, beta: np.ndarray) -> DayProfile:
    return DayProfile(alpha=_known(alpha), beta=_known(beta))


def _known(values: np.ndarray) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in values.tolist()]


def autocorrelation(series: np.ndarray, lag: int) -> float | None:
    """Sample autocorrelation at `lag`; None for fewer than two lags of data or a constant series."""
    if series.size < 2 * lag:
        return None
    off = series - series.mean()
    total = dot(off, off)
    return dot(off[lag:], off[:-lag]) / total if total > 0 else None


def correlogram(series: np.ndarray, lags: int) -> list[float]:
    """Sample autocorrelation at lags 0 to `lags`; empty for a constant series."""
    off = series - series.mean()
    power = np.abs(np.fft.rfft(off, 2 * series.size)) ** 2
    found = np.fft.irfft(power)[: lags + 1]
    return (found / found[0]).tolist() if dot(off, off) > 1e-12 * dot(series, series) else []


def _explained(series: np.ndarray, period: int) -> float | None:
    """Share of the variance of `series` that the mean of each phase of `period` explains; None as above."""
    if series.size < 2 * period or series.var() == 0:
        return None
    phase = np.arange(series.size) % period
    means = np.bincount(phase, series) / np.bincount(phase)
    return float(1 - ((series - means[phase]) ** 2).mean() / series.var())
