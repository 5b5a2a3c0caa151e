"""Breaking ties: requests that a coarse clock recorded at one time, put at separate times inside its tick.

A clock that counts whole ticks records t for everything in [t, t + tick). Which time a request had in there is unknown,
so any choice is an assumption: "spread" draws sorted uniform times (what independent requests would do), "even" spaces
them evenly (as smooth as possible). Both keep the order of the requests; "keep" leaves them at one time.
"""

from typing import Literal

import numpy as np
import polars as pl

from squall.errors import InputError
from squall.progress import note
from squall.seeds import DEFAULT_SEED, stream
from squall.trace.table import Trace

PIECE = 1 << 17
"""Requests that are drawn at once."""

TieRule = Literal["keep", "spread", "even"]


def break_ties(trace: Trace, rule: TieRule, seed: int = DEFAULT_SEED) -> Trace:
    """`trace` with the requests of one tick at separate times by `rule`; recorded as a step, and the tick is gone.

    A trace whose clock is fine (no tick in its metadata) stays as it is, with a note.
    """
    if rule == "keep":
        return trace
    if rule not in ("spread", "even"):
        raise InputError(f"--ties {rule}: the rules are keep, spread and even.")
    tick = trace.meta.tick
    if tick is None:
        note(f"--ties {rule}: the clock of {trace.meta.source} is fine enough; nothing to spread.")
        return trace.replace(trace.table, f"--ties {rule} (no ticks)")
    arrivals = trace.table["arrival"].to_numpy()
    times = despread(arrivals, tick, seed) if rule == "spread" else even(arrivals, tick)
    step = f"--ties {rule} --seed {seed}" if rule == "spread" else f"--ties {rule}"
    return trace.replace(
        trace.table.with_columns(pl.Series("arrival", times)), f"{step} (ticks of {tick:g} s)", tick=None
    )


def despread(arrivals: np.ndarray, tick: float, seed: int = DEFAULT_SEED) -> np.ndarray:
    """Arrivals recorded in ticks, put at sorted uniform times inside their tick ("sorted-uniform"); sorted seconds.

    A clock that counts whole ticks records t for everything in [t, t + tick), so each arrival is drawn from there (or
    up to the next recorded time, where that is nearer). The order of the requests stays; `seed` fixes the draw.
    """
    arrivals = np.asarray(arrivals, dtype=float)
    sizes, width = _ticks(arrivals, tick)
    spread, random = np.empty(arrivals.size), stream(seed, "despread")
    # In pieces of whole ticks, which stay in the cache; no draw leaves its tick, so that they sort one by one.
    until = np.cumsum(sizes)
    cuts = np.unique(np.append(np.searchsorted(until, np.arange(PIECE, arrivals.size, PIECE)) + 1, sizes.size))
    first = begin = 0
    for last in cuts.tolist():
        end = int(until[last - 1])
        drawn = np.repeat(width[first:last], sizes[first:last]) * random.random(end - begin)
        drawn += arrivals[begin:end]
        drawn.sort(kind="stable")  # five times faster here, where only neighbours change places
        spread[begin:end] = drawn
        first, begin = last, end
    return spread


def even(arrivals: np.ndarray, tick: float) -> np.ndarray:
    """Arrivals recorded in ticks, the n of each at the middles of n equal parts of it; sorted seconds."""
    arrivals = np.asarray(arrivals, dtype=float)
    sizes, width = _ticks(arrivals, tick)
    place = np.arange(arrivals.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return arrivals + np.repeat(width / sizes, sizes) * (place + 0.5)


def _ticks(arrivals: np.ndarray, tick: float) -> tuple[np.ndarray, np.ndarray]:
    """Requests of each distinct time, and the seconds from it to the next one or for one tick, if that is less."""
    last = np.append(np.flatnonzero(arrivals[1:] != arrivals[:-1]), arrivals.size - 1)
    recorded = arrivals[last]
    return np.diff(last, prepend=-1), np.minimum(np.diff(recorded, append=np.inf), tick)
