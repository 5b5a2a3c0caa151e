"""Fit: from a trace to a workload model, class by class, and how well the model agrees with the trace."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from squall.errors import InputError
from squall.progress import progress
from squall.seeds import DEFAULT_SEED, stream
from squall.trace import Trace, TraceOptions, TraceSource, open_trace, read_servegen
from squall.trace.ties import despread
from squall.units import Duration, in_words, seconds
from squall.workload.cascade import FEWEST as CASCADE_FEWEST
from squall.workload.cascade import fit_cascade
from squall.workload.choosing import Bench, freest, held_out
from squall.workload.clients import fit_clients, fit_pool
from squall.workload.concurrency import DAY, Renewal, RenewalFit, fit_renewal
from squall.workload.conversations import fit_conversations
from squall.workload.episodes import Episodes, fit_episodes
from squall.workload.failures import Failures, fit_failures
from squall.workload.lengths import fit_lengths, ks_distance, spearman
from squall.workload.model import Arrivals, ClassFit, ClassModel, Workload, save_workload
from squall.workload.resampling import BLOCKS, Bootstrap, fit_bootstrap
from squall.workload.resampling import MOST_REQUESTS as MOST_ROWS
from squall.workload.slots import (
    WARM_UP,
    Slots,
    as_slots,
    duration,
    hours_of,
    played,
    warmed,
    weibull_windows,
    with_theta,
    working_day,
)

KINDS = ("auto", "episodes", "cascade", "renewal", "bootstrap", "clients")
FEW = 100
"""With fewer requests than this a fit says that it is uncertain."""
FEWEST_WINDOWS = 6
"""A trace with fewer windows than this is fitted in smaller ones."""
MOST_PAIRS = 500_000
"""Of so many pairs of lengths, evenly taken, the rank correlation is printed."""
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
    gaps: Literal["gamma", "weibull", "auto"] = "gamma",
    zipf: bool = False,
    day: str | None = None,
    average: Literal["pooled", "parameters"] | None = None,
    playback: Duration | None = None,
    warm_up: int | None = None,
    warm_up_rate: float | None = None,
    block: Duration | None = None,
    **options: Any,
) -> Workload:
    """A workload model of `trace`, written to `out` (JSON) if given.

    Per (service, model) class: when requests arrive, the joint law of the lengths, conversations where sessions are
    recorded, and failures. `kind` says what the arrivals are made of:

    * "episodes": the trace's own course, loosened, with lengths and failures that move with it;
    * "cascade": a few numbers per time scale, which have not seen the hour that they draw;
    * "renewal": the rate and the shape of the gaps in each `window`, as in the paper;
    * "bootstrap": the trace's rows in blocks of `block` s ("auto", the default: that which a queue tells apart least);
    * "clients": each session, or where none are recorded each model, as a client with rates and lengths of its own;
    * "auto": episodes, unless windows predict a random half of the arrivals better from the other half and a simulated
      queue does not tell their draws from the trace.

    With kind "renewal" only: `method` estimates shapes by "moments" or maximum likelihood ("mle"); `gaps` are "gamma",
    "weibull", or the likelier ("auto"); `zipf` gives the request lengths Zipf(theta(t)); `day` (such as "8h:25h") makes
    one representative working day of the windows in these hours, their gaps pooled over the days or their parameters
    averaged (`average`); `playback` plays each window for so long; `warm_up` requests come first, at `warm_up_rate`.
    A folder with a ServeGen pool gives the clients of the pool (kind "clients" or "auto"; no other option).
    `options` are the trace options, among them the seed (for ties and for times inside a coarse clock tick).

    Raises InputError for a trace that has no rate (a single request, or all at one time), and for options that the kind
    does not use.
    """
    plan = Plan(kind, method, gaps, zipf, day, average, playback, warm_up, warm_up_rate, block)
    if out is not None and not Path(out).parent.is_dir():
        raise InputError(f"--out {out}: there is no directory {Path(out).parent}; make it, or name another.")
    seed = int(options.get("seed", DEFAULT_SEED))
    if isinstance(trace, str | Path) and Path(trace).is_dir():
        return _fit_pool(trace, plan, out, options)
    source = open_trace(trace, **options)
    if len(source) < 2 or source.span <= 0:
        raise InputError(_no_rate(source))
    # n requests make n - 1 gaps; one more mean gap gives the span in which n are expected.
    span = source.span + source.span / (len(source) - 1)
    slot, notes = _fitting_window(seconds(window, "--window"), span)
    parts = source.table.partition_by("service", "model", maintain_order=True)
    parts.sort(key=len, reverse=True)
    with progress("Fitting", total=len(parts)) as done:
        classes = []
        for index, part in enumerate(parts):
            classes.append(_fit_class(part, source, span, slot, plan, seed, index))
            done(index + 1)
    meta = source.meta
    workload = Workload(
        source=meta.source,
        sha256=meta.sha256,
        licence=meta.licence,
        attribution=meta.attribution,
        steps=meta.steps,
        notes=[*meta.notes, *notes, *_remarks(source), *_left_out(source), *_holds(classes)],
        span=max([span] if plan.keeps_the_clock else [one.arrivals.edges[-1] for one in classes]),  # type: ignore[union-attr]
        midnight=_plus(meta.midnight, float(source.table["arrival"][0])) if plan.keeps_the_clock else None,
        weekday=meta.weekday if plan.keeps_the_clock else None,
        method=method,
        seed=seed,
        classes=classes,
    )
    if out is not None:
        save_workload(workload, out)
    return workload


def _fit_pool(folder: str | Path, plan: "Plan", out: str | Path | None, options: dict[str, Any]) -> Workload:
    """The model of a ServeGen pool."""
    if plan.kind not in ("auto", "clients"):
        raise InputError(f"--kind {plan.kind}: {folder} is a pool of clients; leave --kind out.")
    usual = TraceOptions()
    for name, value in options.items():
        if name != "seed" and value != getattr(usual, name, value):
            raise InputError(f"--{name.replace('_', '-')}: {folder} is a pool of clients, which has no requests yet.")
    pool = read_servegen(folder)
    arrivals, lengths, notes = fit_pool(pool)
    one = ClassModel(
        service=None, model=None, arrivals=arrivals, lengths=lengths, failures=Failures(0.0, 0.0, 0.0), fit=None
    )
    workload = Workload(
        source=str(folder),
        licence="Apache-2.0",
        attribution="ServeGen (Xiang et al., arXiv 2505.09999), https://github.com/alibaba/ServeGen, Apache-2.0.",
        notes=notes,
        span=pool.span,
        classes=[one],
    )
    if out is not None:
        save_workload(workload, out)
    return workload


class Plan:
    """What kind of arrivals is asked for, with its options checked."""

    def __init__(
        self,
        kind: str,
        method: str,
        gaps: str,
        zipf: bool,
        day: str | None,
        average: str | None,
        playback: Duration | None,
        warm_up: int | None,
        warm_up_rate: float | None,
        block: Duration | None,
    ) -> None:
        for name, value, known in (
            ("--kind", kind, KINDS),
            ("--method", method, ("moments", "mle")),
            ("--gaps", gaps, ("gamma", "weibull", "auto")),
            ("--average", average or "pooled", ("pooled", "parameters")),
        ):
            if value not in known:
                raise InputError(f"{name} {value}: there is no such choice; there are {', '.join(known)}.")
        for name, used in (
            ("--gaps", gaps != "gamma"),
            ("--zipf", zipf),
            ("--day", day is not None),
            ("--playback", playback is not None),
            ("--warm-up", warm_up is not None),
        ):
            if used and kind != "renewal":
                raise InputError(f"{name}: only windows have it; add --kind renewal.")
        if average is not None and day is None:
            raise InputError("--average: says how days become one; add --day 8h:25h.")
        if warm_up_rate is not None and warm_up is None:
            raise InputError("--warm-up-rate: there is no warm-up; add --warm-up 1000.")
        if (warm_up is not None and warm_up < 1) or (warm_up_rate is not None and not 0 < warm_up_rate < float("inf")):
            raise InputError("--warm-up: at least 1 request at a rate above 0 is needed.")
        if block is not None and kind != "bootstrap":
            raise InputError("--block: only the bootstrap has blocks; add --kind bootstrap.")
        self.kind, self.method, self.gaps, self.zipf, self.average = kind, method, gaps, zipf, average or "pooled"
        self.hours = None if day is None else hours_of(day)
        self.playback, self.warm_up = duration(playback, "--playback"), warm_up
        self.warm_up_rate = warm_up_rate or WARM_UP["rate"]
        self.block = None if block in (None, "auto") else duration(block, "--block")

    @property
    def keeps_the_clock(self) -> bool:
        """Whether time 0 of the model is the trace's, and its span the trace's."""
        return self.hours is None and self.playback is None and self.warm_up is None

    @property
    def plain(self) -> bool:
        """Whether the windows are drawn as they were fitted, with Gamma gaps."""
        return self.keeps_the_clock and self.gaps == "gamma" and not self.zipf


def _fit_class(
    rows: pl.DataFrame, source: Trace, span: float, window: float, plan: Plan, seed: int, index: int
) -> ClassModel:
    import msgspec

    arrival = rows["arrival"].to_numpy() - source.table["arrival"][0]
    request, response = rows["request_tokens"].to_numpy(), rows["response_tokens"].to_numpy()
    failed = rows["failed"].to_numpy()
    answered = ~failed
    rng = stream(seed, "fit", index)
    tick = source.meta.tick
    windows, quality = fit_renewal(arrival, span, window, tick=tick, method=plan.method, seed=seed)  # type: ignore[arg-type]
    conversations = None
    if plan.kind != "bootstrap" and rows["session"].null_count() < len(rows):
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
    kind, reason = plan.kind, f"{plan.kind}: asked for"
    arrivals: Arrivals = windows
    if kind == "renewal" and not plan.plain:
        times = np.minimum(despread(arrival, tick, seed), np.nextafter(span, 0)) if tick else arrival
        arrivals, reason = _slots(plan, windows, times, request, answered, source)
    elif kind == "cascade":
        if arrival.size < CASCADE_FEWEST:
            reason = f"renewal: a cascade needs {CASCADE_FEWEST} requests or more, and there are {arrival.size}"
        else:
            arrivals = fit_cascade(
                arrival, answered, request, response, model.lengths, span,
                tick=tick, sessions=conversations is not None, rng=rng, seed=seed,
            )  # fmt: skip
    elif kind == "clients":
        if rows["session"].null_count() == len(rows):
            raise InputError(
                f"--kind clients: {source.meta.source} records no sessions to tell clients by; name the column that "
                "does with --columns (session=NAME). Classes of service and model are kept apart by every kind."
            )
        owner = rows["session"].fill_null(-1).to_numpy()
        arrivals = fit_clients(arrival, owner, answered, request, response, span, window, tick=tick, rng=rng, seed=seed)
        model, reason = model.as_clients(arrivals), f"clients: asked for; {len(arrivals.clients):,} clients"
    elif kind == "bootstrap":
        arrivals, reason = _bootstrap(plan, model, arrival, rows, span, tick, seed)
    elif kind != "renewal":
        course = fit_episodes(arrival, answered, request, response, span, tick=tick, rng=rng)
        model, reason = _choose(kind, model, course, arrival, rows, span, window, tick, seed)
        arrivals = model.arrivals
    model = msgspec.structs.replace(model, arrivals=arrivals)
    return _with_fit(model, rows, arrival, span, quality, reason, plan.keeps_the_clock, seed, index)


def _slots(
    plan: Plan, windows: Renewal, times: np.ndarray, request: np.ndarray, answered: np.ndarray, source: Trace
) -> tuple[Slots, str]:
    """The windows as the paper's experiments use them; and what was made of them."""
    slots, said = as_slots(windows), "renewal: asked for"
    if plan.gaps != "gamma":
        weibull, gain = weibull_windows(windows, times, plan.method)
        if plan.gaps == "weibull" or gain > 0:
            slots = weibull
        said += f"; Weibull gaps are {abs(gain):.3g} nats a gap {'likelier' if gain > 0 else 'less likely'} than Gamma"
    if plan.zipf:
        slots = with_theta(slots, times[answered], request[answered])
        said += f"; requests Zipf, theta {np.median(slots.theta):.3g} in the median window"
    if plan.hours is not None:
        meta = source.meta
        if meta.midnight is None or meta.weekday is None:
            raise InputError(
                f"--day: the clock of {meta.source} does not say which weekday and hour it is, and a working "
                "day needs both."
            )
        midnight = meta.midnight + float(source.table["arrival"][0])
        slots = working_day(slots, times, midnight % DAY, (meta.weekday + int(midnight // DAY)) % 7, plan.hours,
                            plan.average)  # fmt: skip
        said += f"; {len(slots.rate)} slots of the working day, {plan.average}"
    if plan.playback is not None:
        slots = played(slots, plan.playback)
        said += f"; each played for {in_words(plan.playback)}"
    if plan.warm_up is not None:
        slots = warmed(slots, plan.warm_up, plan.warm_up_rate)
        said += f"; after {plan.warm_up:,} requests of warm-up at {plan.warm_up_rate:g}/s"
    return slots, said


def _bootstrap(
    plan: Plan, model: ClassModel, arrival: np.ndarray, rows: pl.DataFrame, span: float, tick: float | None, seed: int
) -> tuple[Bootstrap, str]:
    """The rows in blocks of the length asked for, or of that which a queue tells apart from the trace the least."""
    import msgspec

    if len(rows) > MOST_ROWS:
        raise InputError(
            f"--kind bootstrap: {model.name} has {len(rows):,} rows, more than the {MOST_ROWS:,} that a model keeps; "
            "take a sample (--sample), a part (--between), or another kind."
        )
    failed, request, response = (rows[name].to_numpy() for name in ("failed", "request_tokens", "response_tokens"))
    known = fit_bootstrap(arrival, failed, request, response, span, plan.block or min(30.0, span), tick=tick)
    if plan.block is not None:
        return known, f"bootstrap: asked for, in blocks of {in_words(known.block)}"
    bench = Bench(arrival, rows, span)
    checks = {}
    for block in BLOCKS:
        if 5 * block <= span and block > 2 * (tick or 0.0):
            tried = msgspec.structs.replace(known, block=block)
            checks[block] = bench.check(msgspec.structs.replace(model, arrivals=tried), seed)
    if not checks:
        return known, f"bootstrap: asked for, in blocks of {in_words(known.block)}; the span is too short to choose"
    best = min(checks, key=lambda block: checks[block].distance)
    return msgspec.structs.replace(known, block=best), (
        f"bootstrap: asked for, in blocks of {in_words(best)}, with which a queue is off by {checks[best].words}"
    )


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
    """The model of a class in its course with as much freedom as it bears, or in windows if they do; and why."""
    import msgspec

    bench = Bench(arrival, rows, span)
    ours, check = freest(msgspec.structs.replace(windows, arrivals=course), bench, seed)
    freedom = f"freedom {ours.arrivals.freedom:g}, with which a queue is off by {check.words}"  # type: ignore[union-attr]
    if kind != "auto":
        return ours, f"{kind}: asked for; {freedom}"
    theirs = bench.check(windows, seed)
    likelihood = held_out(arrival, span, window, tick=tick, seed=seed)
    said = (
        f"windows of {in_words(window)}: {theirs.words}; log-likelihood of a held-out half of the arrivals, per "
        f"request, {likelihood[0]:.4g} by its course and {likelihood[1]:.4g} in windows"
    )
    if likelihood[1] > likelihood[0] + NO_BETTER and theirs.worst <= max(check.worst, 1.0):
        return windows, f"renewal: predicts better, and a queue is off no more. {said}; episodes: {freedom}"
    return ours, f"episodes: {freedom}; {said}"


def _no_rate(source: Trace) -> str:
    """What is wrong with a trace in which no time passes, and what can be done with it."""
    many = f"{len(source):,} requests" if len(source) > 1 else "1 request"
    coarse = f" (its clock counts {source.meta.tick:g} s)" if source.meta.tick and len(source) > 1 else ""
    offer = (
        "replay or simulate it as it is; a fit needs requests at two times or more"
        if len(source) == 1 or not coarse
        else "with --ties spread they are put inside the tick, and can be fitted"
    )
    return f"{source.meta.source}: {many} at a single time{coarse} say nothing about a rate: {offer}."


def _remarks(source: Trace) -> list[str]:
    """What a degenerate trace cannot tell, one sentence each."""
    table, remarks = source.table, []
    if len(table) < FEW:
        remarks.append(f"{len(table)} requests: rates and lengths are those of this sample, and uncertain.")
    if bool(table["failed"].all()):
        remarks.append("All requests failed: draws have no response lengths, and nothing in them can be served.")
    gaps = np.diff(table["arrival"].to_numpy())
    if gaps.size > 1 and float(gaps.max()) - float(gaps.min()) <= 1e-6 * float(gaps.mean()):
        remarks.append("All gaps are equal: draws are as regular, and say nothing about burstiness.")
    return remarks


def _with_fit(
    model: ClassModel,
    rows: pl.DataFrame,
    arrival: np.ndarray,
    span: float,
    quality: RenewalFit,
    reason: str,
    comparable: bool,
    seed: int,
    index: int,
) -> ClassModel:
    """`model` with its goodness of fit: its laws, and one draw over the fitted span, against the rows."""
    import msgspec

    drawn = pl.DataFrame(model.draw(model.arrivals.path(0.0, span, seed), seed, index))
    real, new = (table.filter(~pl.col("failed")) for table in (rows, drawn))
    some = [t.gather_every(-(-len(t) // MOST_PAIRS)) if len(t) else t for t in (real, new)]
    pairs = [(t["request_tokens"].to_numpy(), t["response_tokens"].to_numpy()) for t in some]
    law = model.lengths
    result = ClassFit(
        reason=reason,
        requests=len(rows),
        windows=quality.windows,
        fitted=quality.fitted,
        alpha=quality.alpha,
        ks_gaps=quality.ks,
        ks_request=ks_distance(real["request_tokens"].to_numpy(), law.request) if law else None,
        ks_response=ks_distance(real["response_tokens"].to_numpy(), law.response) if law else None,
        rate=(len(rows) / span, len(drawn) / span),
        spearman=(spearman(*pairs[0]), spearman(*pairs[1])) if law else None,
        dispersion=_dispersion(arrival, drawn["arrival"].to_numpy(), span) if comparable else None,
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
    if any(isinstance(one.arrivals, Bootstrap) for one in classes):
        return ["The model holds the rows of the trace: times and lengths. Treat it as the trace."]
    if any(isinstance(one.arrivals, Episodes) for one in classes):
        return [
            "The model holds the trace at a coarser grain (times and length classes of its requests): treat it with "
            "the same care as the trace."
        ]
    return []


def _plus(midnight: float | None, shift: float) -> float | None:
    return None if midnight is None else midnight + shift
