"""Baselines: what a trace would be with smoother arrivals, or put together from stretches of itself."""

from typing import Literal

import numpy as np
import polars as pl

from squall.errors import InputError
from squall.seeds import DEFAULT_SEED, stream
from squall.trace import Trace
from squall.units import Duration, in_words, seconds
from squall.workload.process import WEIBULL, variation

Process = Literal["uniform", "poisson", "gamma", "weibull", "maf"]
_FUNCTIONS = 500
_POPULARITY = 3.54
"""Standard deviation of the log popularity for which the top 18.6 % of the functions make 99.6 % of the invocations
(Shahrad et al., Serverless in the Wild, ATC 2020): Phi(s - 0.893) = 0.996."""
_TIMERS, _TIMED = 0.16, 0.02
"""Share of the functions that a timer invokes, and of the invocations that are theirs (the same paper)."""
_FORMS = "uniform, poisson, gamma:CV, weibull:CV, maf or bootstrap:BLOCK (such as gamma:2.5, bootstrap:30s)"


def rearranged(trace: Trace, arrivals: str, seed: int = DEFAULT_SEED) -> Trace:
    """`trace` with the arrivals that a text names: the option `--arrivals`. Raises InputError that lists the texts."""
    name, colon, value = arrivals.partition(":")
    if name == "bootstrap" and value:
        return bootstrap(trace, value, seed=seed)
    if name in ("gamma", "weibull") and value:
        try:
            return smooth(trace, name, cv=float(value), seed=seed)  # type: ignore[arg-type]
        except ValueError:
            raise InputError(f"--arrivals {arrivals}: {value!r} is not a number; write {_FORMS}.") from None
    if name not in ("uniform", "poisson", "maf") or colon:
        raise InputError(f"--arrivals {arrivals}: write {_FORMS}.")
    return smooth(trace, name, seed=seed)  # type: ignore[arg-type]


def smooth(trace: Trace, process: Process, *, cv: float | None = None, seed: int = DEFAULT_SEED) -> Trace:
    """`trace` with other arrivals at the same mean rate: only the times change; rows, lengths and their order stay.

    "uniform" gaps are all equal; "poisson" gaps are exponential; "gamma" and "weibull" gaps have the given `cv`; "maf"
    is a mix of functions like those of Azure Functions, see `_functions`. First and last arrival are those of the
    trace, so that the mean rate is equal, not only expected to be.
    """
    known = ("uniform", "poisson", "gamma", "weibull", "maf")
    if process not in known:
        raise InputError(f"{process}: no such process; there are {', '.join(known)}.")
    if (process in ("gamma", "weibull")) != (cv is not None) or (cv is not None and not 0 < cv < float("inf")):
        raise InputError(f"{process} with cv {cv}: gamma and weibull need a cv above 0, and the others have theirs.")
    first, size = float(trace.table["arrival"][0]), len(trace)
    rng = stream(seed, f"smooth {process}")
    if process == "uniform" or size < 3:
        arrival = first + np.linspace(0, trace.span, size)
    elif process == "maf":
        arrival = _functions(size, trace.span, rng)
        arrival = first + (arrival - arrival[0]) / ((arrival[-1] - arrival[0]) or 1.0) * trace.span
    else:
        if process == "weibull":
            gaps = rng.standard_exponential(size - 1) ** (1 / _weibull_shape(float(cv or 1.0)))
        else:
            gaps = rng.standard_gamma((cv or 1.0) ** -2.0, size - 1)
        total = np.cumsum(gaps)
        arrival = first + np.concatenate([[0.0], total / (total[-1] or 1.0)]) * trace.span
    step = (
        f"{process} arrivals" + (f" with CV {cv:g}" if cv else "") + ("" if process == "uniform" else f", seed {seed}")
    )
    return trace.replace(trace.table.with_columns(arrival=pl.Series(arrival)), step, tick=None)


def _functions(size: int, span: float, rng: np.random.Generator) -> np.ndarray:
    """Sorted times of `size` invocations over `span` s of many functions, some very popular and most hardly used.

    As the trace of Azure Functions (MAF) counts them, by function and minute: popularity is lognormal, timers come at
    a fixed period, and the others' rate differs from minute to minute by a factor that is exponential (assumed), with
    invocations at uniform times inside the minute.
    """
    popularity = rng.lognormal(0.0, _POPULARITY, _FUNCTIONS)
    timer = rng.random(_FUNCTIONS) < _TIMERS
    for group, share in ((timer, _TIMED), (~timer, 1 - _TIMED)):
        popularity[group] *= share / popularity[group].sum()
    calls = rng.multinomial(size, popularity / popularity.sum())
    times = []
    for number, fixed in zip(calls.tolist(), timer.tolist(), strict=True):
        if number == 0:
            continue
        if fixed:
            times.append((np.arange(number) + rng.random()) / number * span)
            continue
        minutes = max(1, int(np.ceil(span / 60)))
        load = rng.standard_exponential(minutes)
        minute = np.searchsorted(np.cumsum(load) / load.sum(), rng.random(number), side="right")
        times.append((np.minimum(minute, minutes - 1) + rng.random(number)) * (span / minutes))
    return np.sort(np.concatenate(times))


def _weibull_shape(cv: float) -> float:
    """The shape of a Weibull law with this CV, which falls with the shape."""
    from scipy.optimize import brentq

    def excess(shape: float) -> float:
        return variation(WEIBULL, shape) - cv

    low, high = 0.05, 1000.0
    if not excess(low) >= 0 >= excess(high):
        raise InputError(f"weibull with cv {cv:g}: a cv between {variation(WEIBULL, high):.2g} and "
                         f"{variation(WEIBULL, low):.2g} is needed.")  # fmt: skip
    return float(brentq(excess, low, high))


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
