"""Hours, days, weeks, periods and the working day against loops, closed forms and the published series of BurstGPT."""

import numpy as np
import polars as pl
import pytest

from squall.characterize.concurrency import dispersion, gamma_windows
from squall.characterize.cycles import (
    Hours,
    clock_hours,
    day_of_week,
    hour_boxes,
    hour_of_day,
    peak_to_trough,
    periodicity,
    spectrum,
    weekly_maps,
    working_day,
)

DAY = 86400.0


def hours(arrivals: np.ndarray, end: float, midnight: float = 0.0, start: float = 0.0) -> Hours:
    found = clock_hours(arrivals, np.full(arrivals.size, 3), np.full(arrivals.size, 2), start, end, midnight)
    assert found is not None
    return found


def test_hours_and_weekdays_are_counted_over_the_time_observed() -> None:
    # One request every ten minutes for 10.5 days from a Friday, 06:00: every hour has 6, every day 144.
    arrivals = np.arange(0, 10.5 * DAY, 600.0)
    end = 10.5 * DAY
    all_hours = hours(arrivals, end, 6 * 3600.0)
    assert hour_of_day(all_hours) == pytest.approx([6.0] * 24)
    assert day_of_week(all_hours, 4) == pytest.approx([144.0] * 7)
    assert hour_of_day(None) == []
    assert hour_of_day(hours(arrivals[:100], arrivals[99])) == []
    assert day_of_week(all_hours, None) == []
    night = hours(arrivals[(arrivals % DAY < 6 * 3600)], end, 6 * 3600.0)
    by_hour = hour_of_day(night)
    assert [hour for hour, mean in enumerate(by_hour) if mean > 0] == [6, 7, 8, 9, 10, 11]
    assert peak_to_trough(by_hour) is None
    friday = day_of_week(hours(arrivals[:108], end, 6 * 3600.0), 4)
    assert [day for day, mean in enumerate(friday) if mean > 0] == [4]


def test_boxes_hold_the_five_numbers_of_whole_hours() -> None:
    rng = np.random.default_rng(3)
    begin, end = 0.4 * 3600, 9.2 * DAY
    arrivals = np.sort(rng.uniform(begin, end, 5000))
    boxes = hour_boxes(hours(arrivals, end, start=begin))
    for hour in range(24):
        counts = []
        for day in range(10):
            low = day * DAY + hour * 3600
            if low >= begin and low + 3600 <= end:
                counts.append(int(((arrivals >= low) & (arrivals < low + 3600)).sum()))
        counts.sort()
        box, n = boxes.requests[hour], len(counts)
        five = [counts[0], counts[n // 4], counts[n // 2], counts[3 * n // 4], counts[-1]]
        assert [box.n, box.min, box.q1, box.median, box.q3, box.max] == [n, *five]
        assert boxes.request_tokens[hour].median == 3 * counts[n // 2]
        assert boxes.response_tokens[hour].max == 2 * counts[-1]
    assert hour_boxes(hours(arrivals[:50], arrivals[49])).requests == []


def test_the_weekly_maps_lie_on_the_calendar() -> None:
    # From a Wednesday, 12:00, for 12.5 days; request k of day d stands for the date.
    start_of_day = 12 * 3600.0
    arrivals = np.concatenate([d * DAY - start_of_day + np.arange(d + 1) * 60.0 + 1 for d in range(1, 13)])
    found = weekly_maps(hours(arrivals, 12.5 * DAY, start_of_day), start_of_day, 2)
    assert found.start == -2 * DAY - start_of_day
    assert found.days == [
        [None, None, None, 2, 3, 4, 5],  # the Wednesday is there by half
        [6, 7, 8, 9, 10, 11, 12],
        [13, None, None, None, None, None, None],
    ]
    # Monday has days 5 and 12, all of their requests in the hour from midnight.
    assert found.hours[0][0] == pytest.approx((6 + 13) / 2)
    assert found.hours[2][12] == 0.0
    assert weekly_maps(None, None, 2).days == []
    short = weekly_maps(hours(arrivals[:5], 3 * DAY, start_of_day), start_of_day, 2)
    assert short.days
    assert short.hours == []


def test_the_spectrum_finds_the_periods_that_are_there_and_none_in_noise() -> None:
    rng = np.random.default_rng(0)
    t = np.arange(1440.0)
    rate = 60 + 30 * np.sin(2 * np.pi * t / 24) + 12 * np.sin(2 * np.pi * t / 8)
    found, _ = spectrum(rng.poisson(rate).astype(float), 3600.0)
    assert [round(one.period / 3600) for one in found] == [24, 8]
    # Variance of the counts: 450 + 72 of the two waves and 60 of Poisson noise.
    assert found[0].share == pytest.approx(450 / 582, abs=0.03)
    assert found[1].share == pytest.approx(72 / 582, abs=0.03)
    noise = [spectrum(rng.poisson(50, 1000).astype(float), 60.0)[0] for _ in range(40)]
    assert sum(map(len, noise)) <= 2
    walk = [spectrum(np.cumsum(rng.normal(size=1000)), 60.0)[0] for _ in range(40)]
    assert sum(map(len, walk)) <= 8  # a trend is not a period
    assert spectrum(np.full(100, 7.0), 60.0)[0] == []


def test_a_short_trace_has_a_spectrum_in_finer_bins() -> None:
    # A job every 5 minutes, 20 requests in 2 s, over Poisson arrivals of 1/s for an hour.
    rng = np.random.default_rng(1)
    jobs = (np.arange(0, 3600, 300)[:, None] + rng.uniform(0, 2, (12, 20))).ravel()
    arrivals = np.sort(np.concatenate([rng.uniform(0, 3600, 3600), jobs]))
    found = periodicity(arrivals, 0.0, 3600.0)
    assert found.verdict is None
    assert found.bin == 2.0
    assert any(300 / one.period == pytest.approx(round(300 / one.period), abs=0.02) for one in found.periods)


# The columns of burstgpt_1_hourly.csv against the published statistics of BurstGPT part 1.
@pytest.mark.parametrize(
    ("service", "ratio", "peak", "trough", "daily", "weekly", "hourly_index", "daily_index", "cv", "empty"),
    [
        ("conversation", 45.6, (16, 237.0), (6, 5.2), 0.78, 0.80, 78, None, 0.86, 40),
        ("api", 11.3, (12, 1662.3), (7, 147.0), 0.06, 0.01, 5890, 33236, 2.60, 636),
        ("all", 11.7, (14, 1795.9), (7, 153.3), 0.07, 0.02, 5322, None, 2.33, 36),
    ],
)
def test_the_hourly_series_of_burstgpt(
    traces,  # type: ignore[no-untyped-def]
    service: str,
    ratio: float,
    peak: tuple[int, float],
    trough: tuple[int, float],
    daily: float,
    weekly: float,
    hourly_index: float,
    daily_index: float | None,
    cv: float,
    empty: int,
) -> None:
    counts = pl.read_csv(traces / "burstgpt" / "burstgpt_1_hourly.csv")[service].to_numpy()
    arrivals = np.concatenate([hour * 3600 + np.arange(n) * (3600 / max(n, 1)) for hour, n in enumerate(counts)])
    end = len(counts) * 3600.0
    clock = hours(arrivals, end)
    by_hour = hour_of_day(clock)
    assert peak_to_trough(by_hour) == pytest.approx(ratio, abs=0.05)
    assert by_hour[peak[0]] == max(by_hour) == pytest.approx(peak[1], abs=0.05)
    assert by_hour[trough[0]] == min(by_hour) == pytest.approx(trough[1], abs=0.05)
    repeats = periodicity(arrivals, 0, end)
    assert repeats.acf_day == pytest.approx(daily, abs=0.005)
    assert repeats.acf_week == pytest.approx(weekly, abs=0.005)
    assert repeats.cv == pytest.approx(cv, abs=0.005)
    assert repeats.empty_share == pytest.approx(empty / 1464)
    index = dict(dispersion(arrivals, (3600.0, 86400.0), 0.0, end))
    assert index[3600.0] == pytest.approx(hourly_index, abs=0.6)
    if daily_index:
        assert index[86400.0] == pytest.approx(daily_index, abs=1)
    # The paper: conversations are periodic, the API is not.
    periods = [round(one.period / 3600, 1) for one in repeats.periods]
    assert repeats.verdict == ("periodic" if service == "conversation" else "aperiodic")
    assert (24.0 in periods) == (service == "conversation")
    week = weekly_maps(clock, 0.0, 2)
    assert len(week.days) == 9
    assert week.days[0][:2] == [None, None]
    if service == "api":
        assert week.days[0][2:] == [14, 4, 1, 2, 1]
        assert week.days[1][:6] == [43, 246, 57, 975, 146378, 89828][:6]
        assert week.days[5][5] == 515  # day 38
    if service == "conversation":
        weekend = [day for row in week.days for day in row[5:] if day is not None]
        working = [day for row in week.days for day in row[:5] if day is not None]
        assert np.mean(weekend) < 0.6 * np.mean(working)
        # Boxes of the figure: about 45 + 25 (0 h), 185 + 85 (15-16 h) for the two models together, by eye.
        boxes = hour_boxes(clock).requests
        assert boxes[16].n == 61
        assert boxes[16].median == pytest.approx(270, rel=0.2)
        assert boxes[5].median == pytest.approx(9, abs=5)


@pytest.mark.parametrize("method", ["moments", "mle"])
def test_the_working_day_recovers_its_slots_and_both_averages_differ(method: str) -> None:
    # Four weeks; from 9 to 17 h on working days alpha 0.5, rate 0.5/s or 0.1/s from day to day.
    rng = np.random.default_rng(5)
    parts = []
    for day in range(28):
        rate = 0.5 if day % 2 else 0.1
        if day % 7 < 5:
            gaps = rng.gamma(0.5, 1 / (0.5 * rate), int(8 * 3600 * rate * 1.2))
            times = 9 * 3600 + np.cumsum(gaps)
            parts.append(day * DAY + times[times < 17 * 3600])
        else:
            parts.append(day * DAY + np.sort(rng.uniform(0, DAY, 5000)))
    arrivals = np.concatenate(parts) - 3600.0  # the trace begins at 1 h
    windows = gamma_windows(arrivals, 1200.0, method=method, phase=3600.0)  # type: ignore[arg-type]
    found = working_day(windows, 0.0, 28 * DAY - 3600.0, 3600.0, 0)
    assert (found.slot, found.days, len(found.start)) == (1200.0, 20, 72)
    assert set(np.flatnonzero(found.windows)) == set(range(27, 51))
    inside = slice(28, 50)
    alpha = np.array(found.parameters.alpha[inside], float)
    assert alpha.mean() == pytest.approx(0.5, abs=0.05)
    assert np.mean(np.array(found.rate[inside], float)) == pytest.approx(0.3, rel=0.05)
    # Pooling a fast and a slow day keeps the mean gap, and makes the gaps look burstier than on any day.
    pooled_alpha, pooled_beta = (np.array(values[inside], float) for values in (found.pooled.alpha, found.pooled.beta))
    # By moments: E = 10/3, E x^2 = 60 for gaps of mean 2 (five of six) and 10, so alpha = (100/9) / (60 - 100/9).
    expected = 0.227 if method == "moments" else 0.43
    assert pooled_alpha.mean() == pytest.approx(expected, abs=0.03)
    rate = (pooled_beta / pooled_alpha).mean()
    assert rate == pytest.approx(np.mean(np.array(found.rate[inside], float)), rel=0.1)
    assert found.parameters.alpha[0] is None


def test_pooled_moments_are_those_of_all_gaps() -> None:
    rng = np.random.default_rng(6)
    arrivals = np.sort(rng.uniform(0, 5 * DAY, 30_000))
    windows = gamma_windows(arrivals, 3600.0)
    found = working_day(windows, 0.0, 5 * DAY, 0.0, 0)
    gaps, slot = np.diff(arrivals), (arrivals[1:] // 3600).astype(int) % 24
    for hour in (0, 13):
        mine = gaps[slot == hour]
        alpha = mine.mean() ** 2 / mine.var()
        assert found.pooled.alpha[hour] == pytest.approx(alpha)
        assert found.pooled.beta[hour] == pytest.approx(alpha / mine.mean())
        fits = windows.alpha[hour::24]
        assert found.parameters.alpha[hour] == pytest.approx(np.mean(fits))


def test_without_calendar_or_whole_slots_there_is_no_working_day() -> None:
    arrivals = np.arange(0, 3 * DAY, 60.0)
    for window, midnight, weekday in (
        (0.5, 0.0, 0),
        (1200.0, None, 0),
        (1200.0, 0.0, None),
        (7000.0, 0.0, 0),
        (1200.0, 0.0, 5),
    ):
        end = arrivals[-1] if weekday != 5 else 1.5 * DAY
        inside = arrivals[arrivals <= end]
        found = working_day(gamma_windows(inside, window, phase=midnight or 0.0), 0.0, end, midnight, weekday)
        assert found.start == []
