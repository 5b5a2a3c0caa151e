"""Bursty test cases for workload models, made of the real traces, the profiles and plain point processes.

No model was fitted with these in mind: they differ in what is hard. `hard_traces(folder)` gives them by name, `folder`
holds the real traces (SQUALL_TRACES).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from squall.seeds import stream
from squall.trace import Trace, TraceMeta, open_trace, read_servegen

HOUR = 3600.0


def _conv(folder: Path) -> Trace:
    return open_trace(folder / "azure-2023" / "AzureLLMInferenceTrace_conv.csv")


def _trace(name: str, columns: dict[str, np.ndarray], tick: float | None = None) -> Trace:
    if tick:
        columns["arrival"] = np.floor(columns["arrival"] / tick) * tick
    table = pl.DataFrame(columns).sort("arrival", maintain_order=True)
    return Trace.of(table, TraceMeta(source=name, format="test", tick=tick, rows=len(table)))


def _tokens(rng: np.random.Generator, median: np.ndarray | float, sigma: float, most: int, size: int) -> np.ndarray:
    return np.clip(np.rint(median * rng.lognormal(0, sigma, size)), 1, most).astype(int)


def clumped(folder: Path) -> Trace:
    """Half of Azure's conversations in bursts with heavy-tailed sizes and lognormal silences between them."""
    trace, rng = _conv(folder), stream(5, "clumped")
    rows = len(trace) // 2
    times: list[float] = []
    now = 0.0
    while len(times) < rows:
        size = min(900, int(np.ceil(rng.pareto(1.2) * 8 + 1)))
        times += list(now + np.cumsum(rng.standard_gamma(0.35, size) / 0.35 / rng.lognormal(np.log(25), 0.8)))
        now = times[-1] + rng.lognormal(np.log(6), 1.3)
    return trace.replace(trace.table.head(rows).with_columns(arrival=pl.Series(np.array(times[:rows]))), tick=None)


def clients(folder: Path) -> Trace:
    """Azure's conversations by response length, dealt to twelve clients: four steady, eight in bursts of like ones."""
    trace, rng = _conv(folder), stream(6, "clients")
    table, arrival = trace.table.sort("response_tokens"), np.empty(len(trace))
    for client, rows in enumerate(np.array_split(np.arange(len(trace)), 12)):
        if client % 3 == 0:
            arrival[rows] = rng.random(rows.size) * trace.span
            continue
        size = np.minimum((rng.pareto(1.3, rows.size) * 20 + 5).astype(int), rows.size)
        owner = np.repeat(np.arange(rows.size), size)[: rows.size]
        begin = rng.random(rows.size) * trace.span
        arrival[rng.permutation(rows)] = begin[owner] + rng.exponential(0.5, rows.size)
    return Trace.of(table.with_columns(arrival=pl.Series(arrival)), trace.meta)


def completion(folder: Path) -> Trace:
    """One hour of a code-completion-like service: typing spells of users in bursts, long prompts, short answers.

    Bursts of one user a few ms apart inside spells of seconds to tens of seconds, spells inside busy stretches.
    """
    rng = stream(7, "completion")
    times, request, response = [], [], []
    now = 0.0
    while now < HOUR:
        spells = rng.poisson(rng.lognormal(np.log(3), 0.9)) + 1
        for begin in now + np.sort(rng.random(spells)) * rng.lognormal(np.log(15), 0.8):
            size = min(400, int(np.ceil(rng.pareto(1.15) * 5)))
            gaps = np.where(rng.random(size) < 0.6, rng.exponential(0.004, size), rng.exponential(0.35, size))
            level = rng.lognormal(np.log(1500), 0.55)
            times.append(begin + np.cumsum(gaps))
            request.append(_tokens(rng, level, 0.35, 7400, size))
            response.append(_tokens(rng, 13, 1.05, 1900, size))
        now += rng.lognormal(np.log(18), 1.2)
    columns = {"arrival": np.concatenate(times), "request_tokens": np.concatenate(request)}
    columns["response_tokens"] = np.concatenate(response)
    keep = columns["arrival"] < HOUR
    return _trace("completion", {key: value[keep][:9000] for key, value in columns.items()})


def floods(folder: Path) -> Trace:
    """Batch jobs: thousands of requests at one client's own length at 60/s, minutes of trickle between them."""
    rng = stream(8, "floods")
    times = [np.sort(rng.random(1200)) * 2 * HOUR]
    lengths = [(np.full(1200, 700.0), np.full(1200, 160.0))]
    for begin in np.cumsum(rng.exponential(600, 12)):
        size = int(rng.pareto(1.4) * 350 + 40)
        times.append(begin + np.cumsum(rng.gamma(0.5, 2.0 / rng.lognormal(np.log(25), 0.7), size)))
        lengths.append((np.full(size, rng.lognormal(np.log(900), 0.9)), np.full(size, rng.lognormal(np.log(90), 1.1))))
    request, response = (np.concatenate([pair[side] for pair in lengths]) for side in (0, 1))
    size = request.size
    return _trace(
        "floods",
        {
            "arrival": np.concatenate(times),
            "request_tokens": _tokens(rng, request, 0.25, 16_000, size),
            "response_tokens": _tokens(rng, response, 0.4, 2_000, size),
        },
    )


def ties(folder: Path) -> Trace:
    """Fan-out: every call asks 1 to 120 times at the very same instant on a fine clock, alike prompts."""
    rng = stream(9, "ties")
    calls = np.sort(rng.random(700)) * HOUR
    size = np.minimum((rng.pareto(1.1, 700) * 3 + 1).astype(int), 120)
    level = rng.lognormal(np.log(800), 0.9, 700)
    return _trace(
        "ties",
        {
            "arrival": np.repeat(calls, size),
            "request_tokens": _tokens(rng, np.repeat(level, size), 0.1, 16_000, int(size.sum())),
            "response_tokens": _tokens(rng, 120.0, 0.9, 2_000, int(size.sum())),
        },
    )


def pool(folder: Path) -> Trace:
    """Two hours of the ServeGen pool's clients at a quarter of their rates, superposed: renewal gaps, own lengths."""
    rng = stream(10, "pool")
    found = read_servegen(folder / "servegen" / "deepseek-r1")
    begin, end = 8 * HOUR, 9 * HOUR
    times, request, response = [], [], []
    for client in found.clients:
        for start, rate, pattern, shape in zip(client.start, client.rate, client.pattern, client.shape, strict=True):
            block = client.block_at(start)
            if not begin <= start < end or rate == 0 or block is None or not block.input_tokens.values.size:
                continue
            wanted = rate * found.window / 4
            draws = int(wanted + 6 * wanted**0.5 / min(1, shape) + 20)
            gaps = rng.gamma(shape, 1 / shape, draws) if pattern == "gamma" else rng.weibull(shape, draws)
            at = np.cumsum(gaps / gaps.mean() / (rate / 4)) * rng.random(1) ** 0.02
            at = at[at < found.window]
            times.append(start - begin + at)
            for pmf, out in ((block.input_tokens, request), (block.output_tokens, response)):
                out.append(rng.choice(pmf.values, at.size, p=pmf.probabilities / pmf.probabilities.sum()))
    columns = {"arrival": np.concatenate(times)}
    for name, parts in (("request_tokens", request), ("response_tokens", response)):
        columns[name] = np.clip(np.concatenate(parts), 1, 30_000).astype(int)
    return _trace("pool", columns)


def mixed(folder: Path) -> Trace:
    """A third of Azure's conversations and half of Mooncake's on one clock: two services in one class."""
    rng = stream(11, "mixed")
    parts = [_conv(folder), open_trace(folder / "mooncake" / "conversation_trace.jsonl", ties="spread")]
    tables = [
        part.table.filter(pl.Series(rng.random(len(part)) < share)).select(
            "arrival", "request_tokens", "response_tokens"
        )
        for part, share in zip(parts, (1 / 3, 1 / 2), strict=True)
    ]
    return Trace.of(pl.concat(tables).sort("arrival"), TraceMeta(source="mixed", format="test"))


def seconds(folder: Path) -> Trace:
    """`completion` on a clock of whole seconds."""
    trace = completion(folder)
    return trace.replace(trace.table.with_columns(pl.col("arrival").floor()), tick=1.0)


def week(folder: Path) -> Trace:
    """Five days of BurstGPT's API floods (the profile), in whole seconds, with failures."""
    trace = open_trace("burstgpt://gpt4-api?duration=5d&start=2d", seed=3)
    return trace.replace(trace.table.with_columns(pl.col("arrival").floor()), tick=1.0)


def talks(folder: Path) -> Trace:
    """Four days of BurstGPT's conversations (the profile) in whole seconds: sessions, failures, day and night."""
    trace = open_trace("burstgpt://gpt4-conversation?duration=4d", seed=4)
    return trace.replace(trace.table.with_columns(pl.col("arrival").floor()), tick=1.0)


def outages(folder: Path) -> Trace:
    """`clumped` with a tenth of the requests failed in outages of half a minute."""
    trace, rng = clumped(folder), stream(12, "outages")
    arrival = trace.table["arrival"].to_numpy()
    phase = np.cumsum(rng.exponential(np.tile([30.0, 300.0], 400)))
    failed = (np.searchsorted(phase, arrival) % 2 == 0) & (rng.random(arrival.size) < 0.8)
    answer = pl.when(pl.Series(failed)).then(0).otherwise(pl.col("response_tokens"))
    return trace.replace(trace.table.with_columns(failed=pl.Series(failed), response_tokens=answer))


def few(folder: Path) -> Trace:
    """The first 400 requests of `completion`."""
    trace = completion(folder)
    return trace.replace(trace.table.head(400))


def thin(folder: Path) -> Trace:
    """One in twenty of `clumped`'s and Azure's requests: 1,450 rows, long silences."""
    rng = stream(13, "thin")
    tables = [part.table.filter(pl.Series(rng.random(len(part)) < 0.05)) for part in (clumped(folder), _conv(folder))]
    return Trace.of(pl.concat(tables).sort("arrival"), TraceMeta(source="thin", format="test"))


def cascade(folder: Path) -> Trace:
    """Half of Azure's conversations under a rate that is bursty at all scales (lognormal cascade, 0.1 s to 1 h)."""
    trace, rng = _conv(folder), stream(14, "cascade")
    rows = len(trace) // 2
    load = np.ones(1)
    for _ in range(15):
        share = 1 / (1 + np.exp(rng.normal(0, 0.55, load.size)))
        load = np.stack([load * share, load * (1 - share)], axis=1).ravel()
    arrival = np.sort(
        np.interp(rng.random(rows), np.append(0, np.cumsum(load / load.sum())), np.linspace(0, HOUR, load.size + 1))
    )
    return trace.replace(trace.table.head(rows).with_columns(arrival=pl.Series(arrival)), tick=None)


CASES: dict[str, Callable[[Path], Trace]] = {
    one.__name__: one
    for one in (
        clumped, clients, completion, floods, ties, pool, mixed, seconds, week, talks, outages, few, thin, cascade,
    )
}  # fmt: skip


def hard_traces(folder: Path) -> dict[str, Trace]:
    return {name: case(folder) for name, case in CASES.items()}
