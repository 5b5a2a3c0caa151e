"""What the numbers say, in plain sentences: every sentence carries the number that it rests on."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from squall.characterize.lengths import Lengths
from squall.units import in_words

if TYPE_CHECKING:
    from squall.characterize import Stream

CLUSTERED = 3.0
"""From this index of dispersion on, counts are called clustered: three times the variance of Poisson arrivals."""
POISSON_GAPS = (0.8, 1.25)
"""Gap CVs that are called close to Poisson."""
MOST_CLASSES = 6
"""Classes that get sentences of their own."""
MANY = 0.1
"""Bursts that hold a smaller share of the requests are not spoken of."""
FEW = 10
"""Fewer gaps or failures than this say nothing."""
NO_FAMILY = 0.1
"""From this KS distance on, even the best family is called a poor fit."""


def sentences(total: "Stream", classes: "list[Stream]") -> list[str]:
    """Sentences on the whole trace, and for each of the largest classes what a mixture of classes would distort."""
    found = [*_clock(total), *_burstiness(total), *_windows(total)]
    found += [*_lengths("Request", total.request_tokens), *_lengths("Response", total.response_tokens)]
    found += [*_length_time(total), *_conversations(total), *_prefixes(total)]
    if len(classes) == 1:
        return [*found, *_cycle(total), *_bursts(total), *_dependence(total), *_failures(total)]
    for stream in classes[:MOST_CLASSES]:
        about = " ".join((*_cycle(stream), *_bursts(stream), *_dependence(stream), *_failures(stream)))
        if about:
            found.append(f"{stream.name}: {about}")
    return found


def _clock(stream: "Stream") -> Iterator[str]:
    tick, gaps = stream.gamma_windows.tick, stream.gaps
    if tick and gaps.cv and gaps.spread_cv and abs(gaps.spread_cv / gaps.cv - 1) > 0.1:
        yield (
            f"Times are recorded in ticks of {in_words(tick)}: the recorded gap CV of {gaps.cv:.2f} is an artefact; "
            f"spread inside the ticks it is {gaps.spread_cv:.2f}."
        )


def _burstiness(stream: "Stream") -> Iterator[str]:
    cv, inside, window = (
        stream.gaps.spread_cv or stream.gaps.cv,
        stream.gamma_windows.cv.p50,
        stream.gamma_windows.window,
    )
    if cv is None or stream.gaps.n < FEW:
        return
    low, high = POISSON_GAPS
    poisson = low <= cv <= high
    if cv > high and inside is not None and inside <= high:
        yield (
            f"Gaps have a CV of {cv:.2f} over the whole trace but {inside:.2f} inside windows of {in_words(window)}: "
            "slow changes of the rate, more than bursts, make the first."
        )
    else:
        name = "look Poisson" if poisson else "are bursty" if cv > high else "are more regular than Poisson"
        yield f"Gaps {name} (CV {cv:.2f})."
    curve = [(point.scale, point.spread_index or point.index) for point in stream.dispersion]
    if not curve:
        return
    scale, index = max(curve, key=lambda point: point[1])
    first = next((scale for scale, index in curve if index >= CLUSTERED), None)
    if first is None:
        yield f"Counts do not cluster: their dispersion is {index:.2g} at most (at {in_words(scale)}; Poisson is 1)."
        return
    # What gaps of this CV would give if they were independent of each other: a renewal process levels off at CV^2.
    renewal = max(cv**2, 1)
    changes = f", where independent gaps would give {_figure(renewal)}" if index > CLUSTERED * renewal else ""
    yield (
        f"{'Yet counts' if poisson else 'Counts'} cluster from {in_words(first)} on: their dispersion grows to "
        f"{_figure(index)} at {in_words(scale)}{changes} (Poisson is 1)."
    )


def _windows(stream: "Stream") -> Iterator[str]:
    fits = stream.gamma_windows
    if fits.alpha.p50 is not None:
        few = f"; {fits.skipped:,} more have too few gaps" if fits.skipped else ""
        yield (
            f"Gamma fits of the gaps per {in_words(fits.window)}: median alpha {fits.alpha.p50:.2f}, bursty "
            f"(alpha < 1) in {fits.bursty:,} of {fits.fitted:,} windows, rejected (KS, 5 %) in {fits.rejected:,}{few}."
        )


def _cycle(stream: "Stream") -> Iterator[str]:
    daily, acf = stream.hour_of_day, stream.periodicity.acf_day
    if acf is not None and stream.periodicity.verdict == "aperiodic":
        yield f"Hourly counts do not repeat daily (autocorrelation at 24 h {acf:.2f}): aperiodic."
    elif daily and stream.peak_to_trough:
        peak, trough = int(np.argmax(daily)), int(np.argmin(daily))
        repeats = f" (autocorrelation at 24 h {acf:.2f})" if acf is not None else ""
        yield f"The day peaks at {peak} h, {_figure(stream.peak_to_trough)} times the trough at {trough} h{repeats}."
    elif acf is not None:
        yield f"Hourly counts repeat daily (autocorrelation at 24 h {acf:.2f})."


def _lengths(name: str, lengths: Lengths) -> Iterator[str]:
    fit = lengths.best_fit
    if fit is None or lengths.n < FEW:
        return
    poor = ", a poor fit: use the data" if fit.ks > max(NO_FAMILY, 1.358 / np.sqrt(lengths.n)) else ""
    *others, last = [f"{mode.tokens:,.0f}" for mode in lengths.modes] or [""]
    peaks = f"; their {len(lengths.modes)} peaks lie at {', '.join(others)} and {last} tokens" if others else ""
    yield f"{name} lengths are nearest to {fit.family} (KS {fit.ks:.2f}{poor}){peaks}."


def _dependence(stream: "Stream") -> Iterator[str]:
    rank, pearson = stream.correlation.spearman, stream.correlation.pearson
    if rank is not None and pearson is not None and stream.correlation.n >= FEW:
        noise = max(0.1, 2 / np.sqrt(stream.correlation.n))
        strength = "hardly depend on" if abs(rank) < noise else "grow with" if rank > 0 else "shrink with"
        yield f"Responses {strength} the request length (Spearman {rank:+.2f}, Pearson {pearson:+.2f})."


def _length_time(stream: "Stream") -> Iterator[str]:
    point = next((point for point in stream.length_time if point.cv and point.shuffled_cv), None)
    if point and point.cv and point.shuffled_cv and abs(np.log(point.cv / point.shuffled_cv)) > np.log(1.2):
        more = "more" if point.cv > point.shuffled_cv else "less"
        yield (
            f"Lengths hang together with time: the tokens per {in_words(point.scale)} vary {more} (CV {point.cv:.2f}) "
            f"than with shuffled lengths ({point.shuffled_cv:.2f})."
        )


def _conversations(stream: "Stream") -> Iterator[str]:
    talk = stream.conversations
    if not talk.sessions or talk.turns.mean is None or talk.single_share is None:
        return
    yield (
        f"{talk.sessions:,} conversations of {talk.turns.mean:.3g} turns (at most {talk.turns.max:,}); "
        f"{_percent(talk.single_share)} have a single one."
    )
    if talk.gaps.p50 is not None:
        share = talk.history_share
        history = f"; {_percent(share)} of the follow-ups resend the history" if share is not None else ""
        yield f"Half of the silences inside a conversation are shorter than {in_words(talk.gaps.p50)}{history}."


def _bursts(stream: "Stream") -> Iterator[str]:
    """At the scale at which bursts hold most requests."""
    found = max(stream.bursts, key=lambda one: one.request_share, default=None)
    if found is not None and found.bursts and found.length.p50 is not None and found.request_share >= MANY:
        bursts = f"{found.bursts:,} burst{'s' if found.bursts > 1 else ''}"
        hold = "hold" if found.bursts > 1 else "holds"
        yield (
            f"{bursts} (above twice the mean per {in_words(found.scale)}, median length {in_words(found.length.p50)}) "
            f"{hold} {_percent(found.request_share)} of the requests in {_percent(found.time_share)} of the time."
        )


def _prefixes(stream: "Stream") -> Iterator[str]:
    shared = stream.prefixes
    if shared.hit_share is None or shared.shared.p50 is None:
        return
    half = next((size for size in shared.cache if size.hit_share >= shared.hit_share / 2), None)
    lasting = f"; {half.blocks:,} blocks get half of that" if half is not None and half.hit_share > 0 else ""
    hits = f"{100 * shared.hit_share:.1f} %"
    yield f"A prefix cache that forgets nothing would hold {hits} of the prompts' blocks{lasting}."


def _failures(stream: "Stream") -> Iterator[str]:
    lost = stream.failures
    if lost.dispersion is None or lost.bins_with_failures is None or lost.failed < FEW:
        return
    if lost.dispersion >= 1.5:
        yield (
            f"Failures cluster: {_figure(lost.dispersion)} times the variance of independent ones, all {lost.failed:,} "
            f"in {lost.bins_with_failures:,} bins of {in_words(lost.bin)}."
        )
    else:
        yield f"Failures come independently of each other (dispersion {lost.dispersion:.2g} in {in_words(lost.bin)})."


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
