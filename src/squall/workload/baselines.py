"""Baselines: what a trace would be with smoother arrivals, or put together from stretches of itself."""

from typing import Literal

import numpy as np
import polars as pl

from squall.errors import InputError
from squall.seeds import DEFAULT_SEED, stream
from squall.trace import Trace
from squall.units import Duration, in_words, seconds

Process = Literal["uniform", "poisson", "gamma"]


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
