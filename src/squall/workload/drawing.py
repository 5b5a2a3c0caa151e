"""Draw: from a workload model to a trace; and the smooth baselines that a trace is compared with."""

from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from squall.errors import InputError
from squall.seeds import DEFAULT_SEED, stream
from squall.trace import Trace, TraceMeta, write_trace
from squall.units import Duration, in_words, seconds
from squall.workload.concurrency import DAY
from squall.workload.model import Workload, read_workload

MOST_REQUESTS = 200_000_000
"""A draw is refused above this: it would not fit into memory."""
MOST_WINDOWS = 20_000_000
"""A draw over more windows than this is refused for the same reason."""
Process = Literal["uniform", "poisson", "gamma"]


def generate(
    workload: Workload | str | Path,
    *,
    out: str | Path | None = None,
    duration: Duration | None = None,
    requests: int | None = None,
    rate: float | None = None,
    start: Duration | None = None,
    seed: int = DEFAULT_SEED,
) -> Trace:
    """A new trace drawn from `workload` (a model, its file, or a profile `burstgpt://…`), written to `out` if given.

    It holds what arrives in `duration` seconds (default: the fitted span; for profiles one day), but at most `requests`
    rows; with `requests` alone it runs until it has them. It begins at `start`, an offset into the model's time. `rate`
    rescales the expected mean rate over the drawn span: beta is multiplied, the CV of the gaps stays. The same seed
    gives the same bytes. Raises InputError if nothing arrives in that time.
    """
    model, name = named(workload)
    begin = 0.0 if start is None else seconds(start, "--start")
    if rate is not None and not 0 < rate < float("inf"):
        raise InputError(f"--rate {rate}: a rate must be above 0 requests/s.")
    if requests is not None and requests < 1:
        raise InputError(f"--requests {requests}: a trace needs at least 1 request.")
    if duration is not None or requests is None:
        span = model.span if duration is None else seconds(duration, "--duration")
        if span <= 0:
            raise InputError("--duration 0: a trace needs some time, such as 10m.")
        table = _draw(model, begin, span, rate, seed)
    else:
        span = 1.05 * requests / (rate or model.mean_rate) + 1.0
        while len(table := _draw(model, begin, span, rate, seed)) < requests:
            span *= 2
            if span > 1e10:
                raise InputError(f"--requests {requests}: {name} does not bring so many in {in_words(span)}.")
    if requests is not None:
        table = table.head(requests)
    if table.is_empty():
        raise InputError(
            f"{name}: no request arrives in the {in_words(span)} from {in_words(begin)} with seed {seed}; "
            "draw a longer duration, or another start or seed."
        )
    trace = Trace.of(table, _meta(model, name, begin, len(table), seed, rate))
    if out is not None:
        write_trace(trace, out)
    return trace


def smooth(trace: Trace, process: Process, *, cv: float | None = None, seed: int = DEFAULT_SEED) -> Trace:
    """`trace` with smooth arrivals at the same mean rate: only the times change; rows, lengths and their order stay.

    "uniform" gaps are all equal; "poisson" gaps are exponential; "gamma" gaps have the given `cv`. First and last
    arrival are those of the trace, so that the mean rate is equal, not only expected to be.
    """
    if process not in ("uniform", "poisson", "gamma"):
        raise InputError(f"{process}: no such process; there are uniform, poisson and gamma.")
    if (process == "gamma") != (cv is not None) or (cv is not None and not 0 < cv < float("inf")):
        raise InputError(
            f"{process} with cv {cv}: gamma needs a cv above 0, and uniform and poisson have theirs (0 and 1)."
        )
    first = float(trace.table["arrival"][0])
    if process == "uniform" or len(trace) < 3:
        arrival = first + np.linspace(0, trace.span, len(trace))
    else:
        gaps = stream(seed, f"smooth {process}").standard_gamma((cv or 1.0) ** -2.0, len(trace) - 1)
        total = np.cumsum(gaps)
        arrival = first + np.concatenate([[0.0], total / (total[-1] or 1.0)]) * trace.span
    step = (
        f"{process} arrivals" + (f" with CV {cv:g}" if cv else "") + ("" if process == "uniform" else f", seed {seed}")
    )
    return trace.replace(trace.table.with_columns(arrival=pl.Series(arrival)), step, tick=None)


def bootstrap(trace: Trace, block: Duration, *, seed: int = DEFAULT_SEED) -> Trace:
    """`trace` cut into stretches of `block` seconds that begin at random times, put together to the same span.

    The non-parametric yardstick of a model (circular block bootstrap, Politis and Romano, 1992): rows keep their
    lengths and their neighbours, whatever lasts longer than a block is lost. Sessions are left out, being cut.
    """
    length = seconds(block, "--block")
    span = trace.span + trace.span / max(len(trace) - 1, 1)
    if not 0 < length <= span:
        raise InputError(f"--block {length:g}: a block has more than 0 and at most the trace's {span:g} s.")
    arrival = trace.table["arrival"].to_numpy() - float(trace.table["arrival"][0])
    blocks = int(np.ceil(span / length))
    begin = stream(seed, "bootstrap").random(blocks) * span
    twice = np.concatenate([arrival, arrival + span])  # a block that runs over the end goes on at the beginning
    first, last = np.searchsorted(twice, begin), np.searchsorted(twice, begin + length)
    size = last - first
    place = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size) + np.repeat(first, size)
    times = twice[place] - np.repeat(begin, size) + np.repeat(np.arange(blocks) * length, size)
    kept = times < span
    if not kept.any():
        raise InputError(
            f"{trace.meta.source}: no request lies in the blocks of {in_words(length)} drawn with seed {seed}."
        )
    rows = trace.table[(place % arrival.size)[kept]].with_columns(
        arrival=pl.Series(times[kept]), session=pl.lit(None, pl.Int64), turn=pl.lit(None, pl.Int32)
    )
    step = f"bootstrap in blocks of {in_words(length)}, seed {seed}"
    return trace.replace(rows.sort("arrival", maintain_order=True), step, tick=None)


def rescale(trace: Trace, rate: float, seed: int = DEFAULT_SEED) -> Trace:
    """`trace` modelled and drawn anew over the same span at the mean `rate` (requests/s): the scale method `model`."""
    from squall.workload.fitting import fit

    drawn = generate(fit(trace, seed=seed), rate=rate, seed=seed)
    return trace.replace(
        drawn.table,
        tick=drawn.meta.tick,
        midnight=drawn.meta.midnight,
        weekday=drawn.meta.weekday,
        clock=0.0,
        speed=1.0,
    )


def named(workload: Workload | str | Path) -> tuple[Workload, str]:
    """The workload that is meant (a model, its file, or a profile) and its name."""
    if isinstance(workload, Workload):
        return workload, workload.source
    if "://" in str(workload):
        from squall.workload.profiles import named_workload

        return named_workload(str(workload)), str(workload)
    return read_workload(workload), str(workload)


def _draw(model: Workload, begin: float, span: float, rate: float | None, seed: int) -> pl.DataFrame:
    """Requests of all classes over `span` seconds from `begin`, sorted by arrival."""
    if any((begin + span) / one.arrivals.window > MOST_WINDOWS for one in model.classes):
        raise InputError(
            f"{in_words(begin + span)} are more than {MOST_WINDOWS:,} windows of the model; ask for a shorter duration."
        )
    paths = [one.arrivals.path(begin, begin + span, seed) for one in model.classes]
    expected = sum(path.expected for path in paths)
    factor = 1.0
    if rate is not None:
        if expected == 0:
            raise InputError(
                f"--rate {rate:g}: the model has no request in the {in_words(span)} from {in_words(begin)}, "
                "so there is nothing to scale; draw a longer duration or another start."
            )
        factor = rate * span / expected
    if expected * factor > MOST_REQUESTS:
        raise InputError(
            f"about {expected * factor:,.0f} requests would be drawn; ask for a shorter duration or a lower rate."
        )
    tables = [
        one.draw(path.scaled(factor), seed, index)
        for index, (one, path) in enumerate(zip(model.classes, paths, strict=True))
    ]
    before = 0
    for index, table in enumerate(tables):
        tables[index] = table.with_columns(pl.col("session") + before)
        before += table["session"].n_unique()
    return pl.concat(tables).sort("arrival", maintain_order=True)


def _meta(model: Workload, name: str, begin: float, rows: int, seed: int, rate: float | None) -> TraceMeta:
    since = None if model.midnight is None else model.midnight + begin
    weekday = None
    if since is not None and model.weekday is not None:
        weekday = (model.weekday + int(since // DAY)) % 7
    return TraceMeta(
        source=name,
        format="generated",
        licence=model.licence,
        attribution=model.attribution,
        midnight=None if since is None else since % DAY,
        weekday=weekday,
        tick=max((getattr(one.arrivals, "tick", None) or 0.0 for one in model.classes), default=0.0) or None,
        rows=rows,
        seed=seed,
        steps=[f"--rate {rate:g} (model scaling)"] if rate else [],
        notes=model.notes,
    )
