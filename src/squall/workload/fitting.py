"""Fit: from a trace to a workload model, class by class, and how well the model agrees with the trace."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from squall.errors import InputError
from squall.progress import progress
from squall.seeds import DEFAULT_SEED, stream
from squall.trace import Trace, TraceSource, open_trace
from squall.units import Duration, in_words, seconds
from squall.workload.concurrency import RenewalFit, fit_renewal
from squall.workload.conversations import fit_conversations
from squall.workload.cascade import fit_cascade
from squall.workload.choosing import Bench, freest, held_out
from squall.workload.episodes import Episodes, fit_episodes
from squall.workload.failures import fit_failures
from squall.workload.lengths import fit_lengths, ks_distance, spearman
from squall.workload.model import ClassFit, ClassModel, Workload, save_workload

KINDS = ("auto", "episodes", "cascade", "renewal")
FEWEST_WINDOWS = 6
"""A trace with fewer windows than this is fitted in smaller ones."""
NO_BETTER = 0.05
"""Held-out log-likelihoods per request that differ by less than this say nothing."""
_SMALLER = (600, 300, 120, 60, 30, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.01, 0.001)


def fit(
    trace: TraceSource,
    *,
    out: str | Path | None = None,
    kind: str = "auto",
    window: Duration = "20m",
    method: Literal["moments", "mle"] = "moments",
    **options: Any,
) -> Workload:
    """A workload model of `trace`, written to `out` (JSON) if given.

    Per (service, model) class: when requests arrive, the joint law of the lengths, conversations where sessions are
    recorded, and failures. `kind` says what the arrivals are made of: "renewal" (the rate and the Gamma shape of the
    gaps in each `window`), "episodes" (the trace's own course, with lengths that move with it), or "auto", which takes
    for each class the one that predicts a random half of its arrivals better from the other half, and "episodes" where
    neither does. `method` estimates the shapes by "moments" or by maximum likelihood ("mle"). `options` are the trace
    options, among them the seed (for ties and for times inside a coarse clock tick).

    Raises InputError for a trace that has no rate: a single request, or all requests at one time.
    """
    if kind not in KINDS:
        raise InputError(f"--kind {kind}: no such kind of arrivals; there are {', '.join(KINDS)}.")
    if method not in ("moments", "mle"):
        raise InputError(f"--method {method}: no such estimator; there are moments and mle.")
    seed = int(options.get("seed", DEFAULT_SEED))
    source = open_trace(trace, **options)
    if len(source) < 2 or source.span <= 0:
        raise InputError(
            f"{source.meta.source}: {len(source)} request{'s' if len(source) > 1 else ''} at a single time say nothing "
            "about a rate; a fit needs a trace with requests at two times or more."
        )
    # n requests make n - 1 gaps; one more mean gap gives the span in which n are expected.
    span = source.span + source.span / (len(source) - 1)
    slot, notes = _fitting_window(seconds(window, "--window"), span)
    parts = source.table.partition_by("service", "model", maintain_order=True)
    parts.sort(key=len, reverse=True)
    with progress("Fitting", total=len(parts)) as done:
        classes = []
        for index, part in enumerate(parts):
            classes.append(_fit_class(part, source, span, slot, method, kind, seed, index))
            done(index + 1)
    meta = source.meta
    workload = Workload(
        source=meta.source,
        sha256=meta.sha256,
        licence=meta.licence,
        attribution=meta.attribution,
        steps=meta.steps,
        notes=[*meta.notes, *notes, *_left_out(source), *_holds(classes)],
        span=span,
        midnight=_plus(meta.midnight, float(source.table["arrival"][0])),
        weekday=meta.weekday,
        method=method,
        seed=seed,
        classes=classes,
    )
    if out is not None:
        save_workload(workload, out)
    return workload


def _fit_class(
    rows: pl.DataFrame,
    source: Trace,
    span: float,
    window: float,
    method: Literal["moments", "mle"],
    kind: str,
    seed: int,
    index: int,
) -> ClassModel:
    arrival = rows["arrival"].to_numpy() - source.table["arrival"][0]
    request, response = rows["request_tokens"].to_numpy(), rows["response_tokens"].to_numpy()
    failed = rows["failed"].to_numpy()
    answered = ~failed
    rng = stream(seed, "fit", index)
    tick = source.meta.tick
    windows, quality = fit_renewal(arrival, span, window, tick=tick, method=method, seed=seed)
    conversations = None
    if rows["session"].null_count() < len(rows):
        # A row without a session is a conversation of its own.
        alone = pl.int_range(-1, -len(rows) - 1, -1, eager=True)
        session = rows["session"].rank("dense").cast(pl.Int64).fill_null(alone).to_numpy()
        conversations = fit_conversations(arrival, session, request, answered, rng)
    model = ClassModel(
        service=rows["service"][0],
        model=rows["model"][0],
        arrivals=windows,
        lengths=fit_lengths(request[answered], response[answered], rng) if answered.any() else None,
        conversations=conversations,
        failures=fit_failures(arrival, failed, request[failed]),
    )
    if kind == "cascade":
        import msgspec

        arrivals = fit_cascade(
            arrival, answered, request, response, model.lengths, span,
            tick=tick, sessions=conversations is not None, rng=rng, seed=seed,
        )  # fmt: skip
        model, reason = msgspec.structs.replace(model, arrivals=arrivals), "cascade: asked for"
    elif kind != "renewal":
        course = fit_episodes(arrival, answered, request, response, span, tick=tick, rng=rng)
        model, reason = _choose(kind, model, course, arrival, rows, span, window, tick, seed)
    else:
        reason = "renewal: asked for"
    return _with_fit(model, rows, arrival, span, quality, reason, seed, index)


def _choose(
    kind: str,
    windows: ClassModel,
    course: Episodes,
    arrival: np.ndarray,
    rows: pl.DataFrame,
    span: float,
    window: float,
    tick: float | None,
    seed: int,
) -> tuple[ClassModel, str]:
    """The model of a class in windows, or in its course with as much freedom as it bears; and why."""
    import msgspec

    bench = Bench(arrival, rows, span)
    ours, check = freest(msgspec.structs.replace(windows, arrivals=course), bench, seed)
    freedom = f"freedom {ours.arrivals.freedom:g}, with which a queue is off by {check.words}"  # type: ignore[union-attr]
    if kind != "auto":
        return ours, f"{kind}: asked for; {freedom}"
    theirs = bench.check(windows, seed)
    likelihood = held_out(arrival, span, window, tick=tick, seed=seed)
    said = (
        f"windows of {in_words(window)}: {theirs.words}; log-likelihood of a held-out half of the arrivals, per request, "
        f"{likelihood[0]:.4g} by its course and {likelihood[1]:.4g} in windows"
    )
    if likelihood[1] > likelihood[0] + NO_BETTER and theirs.worst <= max(check.worst, 1.0):
        return windows, f"renewal: predicts better, and a queue is off no more. {said}; episodes: {freedom}"
    return ours, f"episodes: {freedom}; {said}"


def _with_fit(
    model: ClassModel,
    rows: pl.DataFrame,
    arrival: np.ndarray,
    span: float,
    quality: RenewalFit,
    reason: str,
    seed: int,
    index: int,
) -> ClassModel:
    """`model` with its goodness of fit: its laws, and one draw over the fitted span, against the rows."""
    import msgspec

    drawn = model.draw(model.arrivals.path(0.0, span, seed), seed, index)
    real, new = (table.filter(~pl.col("failed")) for table in (rows, drawn))
    pairs = [(t["request_tokens"].to_numpy(), t["response_tokens"].to_numpy()) for t in (real, new)]
    law = model.lengths
    result = ClassFit(
        reason=reason,
        requests=len(rows),
        windows=quality.windows,
        fitted=quality.fitted,
        alpha=quality.alpha,
        ks_gaps=quality.ks,
        ks_request=ks_distance(pairs[0][0], law.request) if law else None,
        ks_response=ks_distance(pairs[0][1], law.response) if law else None,
        rate=(len(rows) / span, len(drawn) / span),
        spearman=(spearman(*pairs[0]), spearman(*pairs[1])) if law else None,
        dispersion=_dispersion(arrival, drawn["arrival"].to_numpy(), span),
        failed_share=(float(rows["failed"].mean() or 0.0), float(drawn["failed"].mean() or 0.0)),  # type: ignore[arg-type]
        turns=(_mean_turns(rows), _mean_turns(drawn)) if model.conversations else None,
    )
    return msgspec.structs.replace(model, fit=result)


def _dispersion(real: np.ndarray, drawn: np.ndarray, span: float, scale: float = 60.0) -> tuple[float, float] | None:
    """Index of dispersion of counts in bins of `scale` seconds, trace and draw; None if the span holds too few bins."""
    from squall.characterize.concurrency import dispersion

    found = [dispersion(times, (scale,), 0.0, span) if times.size else [] for times in (real, drawn)]
    return (found[0][0][1], found[1][0][1]) if all(found) else None


def _mean_turns(rows: pl.DataFrame) -> float:
    sessions = rows["session"].drop_nulls()
    return (len(sessions) / sessions.n_unique()) if len(sessions) else 1.0


def _fitting_window(window: float, span: float) -> tuple[float, list[str]]:
    """The window for this span, and a note if it is not the one asked for."""
    if window <= 0:
        raise InputError("--window 0: windows need a length, such as 20m.")
    if span >= FEWEST_WINDOWS * window:
        return window, []
    smaller = next((w for w in _SMALLER if w < window and span >= FEWEST_WINDOWS * w), span / FEWEST_WINDOWS)
    return smaller, [
        f"The trace spans {in_words(span)}, fewer than {FEWEST_WINDOWS} windows of {in_words(window)}: "
        f"fitted in windows of {in_words(smaller)}."
    ]


def _left_out(source: Trace) -> list[str]:
    lost = [name for name in ("elapsed", "prefix") if source.table[name].null_count() < len(source)]
    return (
        [f"The model has no {' and no '.join(lost)}: a drawn trace lacks {'them' if len(lost) > 1 else 'it'}."]
        if lost
        else []
    )


def _holds(classes: list[ClassModel]) -> list[str]:
    if not any(isinstance(one.arrivals, Episodes) for one in classes):
        return []
    return [
        f"The model holds the trace at a coarser grain (times and length classes of its requests): "
        "treat it with the same care as the trace."
    ]


def _plus(midnight: float | None, shift: float) -> float | None:
    return None if midnight is None else midnight + shift
