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


def cluster(folder: Path) -> Trace:
    """Half an hour of code completion on a cluster that is served in turns: silences of minutes, self-exciting calls.

    A Hawkes process (each call brings 0.85 others on average, within milliseconds or within seconds) while the cluster
    is served, heavy-tailed off-times between; prompts of a workspace resemble each other, answers are a line.
    """
    rng = stream(15, "cluster")
    phases = np.stack([40 * (rng.pareto(1.6, 60) + 0.2), 45 * (rng.pareto(1.2, 60) + 0.2)], axis=1)
    ends = np.cumsum(phases)
    roots = np.sort(rng.random(3600)) * HOUR
    roots = roots[np.searchsorted(ends, roots) % 2 == 0]
    level = rng.lognormal(np.log(1450), 0.75, roots.size)
    times, levels, born, own = [roots], [level], roots, level
    while born.size:
        children = rng.poisson(0.85, born.size)
        every = int(children.sum())
        delay = np.where(rng.random(every) < 0.7, rng.exponential(0.012, every), 0.8 * rng.pareto(2.2, every))
        born, own = np.repeat(born, children) + delay, np.repeat(own, children)
        times.append(born)
        levels.append(own)
    arrival, level = np.concatenate(times), np.concatenate(levels)
    order = np.argsort(arrival)[:8819]
    columns = {"arrival": arrival[order], "request_tokens": _tokens(rng, level[order], 0.3, 7437, order.size)}
    columns["response_tokens"] = _tokens(rng, 12.0, 1.2, 1900, order.size)
    return _trace("cluster", columns)


def loops(folder: Path) -> Trace:
    """Two days in whole seconds: scripts that ask again once answered, limits that refuse them, and conversations.

    A script has 1 to 15 workers, each sends when its answer is there, for minutes to hours; when more than 8 requests a
    second come in, those above fail at once. People talk by day, with sessions and two models.
    """
    rng = stream(16, "loops")
    parts = []
    for begin in np.sort(rng.random(9)) * 44 * HOUR:
        workers, until = int(rng.integers(1, 16)), begin + 60 * rng.lognormal(np.log(10), 1.1)
        prompt, answer = rng.lognormal(np.log(500), 0.9), rng.lognormal(np.log(30), 0.9)
        for _ in range(workers):
            size = int((until - begin) / (1.0 + answer / 25)) + 2
            out = _tokens(rng, answer, 0.5, 2000, size)
            at = begin + rng.random() * 5 + np.cumsum(0.8 + out / 25 * rng.lognormal(0, 0.3, size))
            kept = at < until
            parts.append((at[kept], _tokens(rng, prompt, 0.2, 8000, size)[kept], out[kept], np.full(kept.sum(), -1)))
    day = np.array([5, 3, 2, 1, 1, 1, 1, 3, 12, 45, 60, 50, 25, 35, 55, 60, 60, 50, 30, 30, 32, 30, 25, 15])
    for hour in range(48):
        for begin in HOUR * (hour + rng.random(rng.poisson(day[hour % 24] / 2))):
            turns = int(np.ceil(rng.pareto(1.3) + 0.4))
            at = begin + np.cumsum(np.append(0, rng.lognormal(np.log(100), 1.2, turns - 1)))
            out = _tokens(rng, 200, 0.8, 3000, turns)
            prompt = np.cumsum(_tokens(rng, 60, 1.2, 4000, turns) + np.append(0, out[:-1]))
            parts.append((at, prompt, out, np.full(turns, len(parts))))
    at, request, response, session = (np.concatenate([part[side] for part in parts]) for side in range(4))
    order = np.argsort(np.floor(at), kind="stable")
    at, request, response, session = np.floor(at)[order], request[order], response[order], session[order]
    failed = (np.arange(at.size) - np.searchsorted(at, at)) >= 8
    table = pl.DataFrame(
        {"arrival": at - at[0], "request_tokens": request, "response_tokens": np.where(failed, 0, response)}
    )
    table = table.with_columns(
        failed=pl.Series(failed),
        service=pl.Series(np.where(session < 0, "api", "conversation")),
        model=pl.Series(np.where(session % 3 == 0, "GPT-4", "ChatGPT")),
        session=pl.Series(session).replace(-1, None),
    ).with_columns(turn=pl.when(pl.col("session").is_not_null()).then(pl.int_range(pl.len()).over("session") + 1))
    return Trace.of(table, TraceMeta(source="loops", format="test", tick=1.0, rows=len(table)))


def agents(folder: Path) -> Trace:
    """One hour of tool agents on a clock of 3 s: runs of steps whose prompts grow, fleets that begin together."""
    rng = stream(17, "agents")
    times, request, response = [], [], []
    for begin in np.sort(rng.random(260)) * HOUR:
        system = rng.choice([1200, 3500, 6800, 9000])
        for _ in range(1 + int(rng.pareto(1.3) * 1.5)):
            steps = int(rng.geometric(0.12))
            out = _tokens(rng, 70, 1.0, 2000, steps)
            tool = _tokens(rng, 250, 1.3, 20_000, steps)
            times.append(begin + rng.exponential(4) + np.cumsum(out / 30 + rng.lognormal(np.log(4), 0.9, steps)))
            request.append(np.minimum(system + np.cumsum(tool), 120_000))
            response.append(out)
    columns = {
        "arrival": np.concatenate(times),
        "request_tokens": np.concatenate(request),
        "response_tokens": np.concatenate(response),
    }
    keep = columns["arrival"] < HOUR
    return _trace("agents", {key: value[keep] for key, value in columns.items()}, tick=3.0)


def busy(folder: Path) -> Trace:
    """Ten minutes of a large service: 55 requests/s whose rate wanders, clients that retry, two kinds of prompts."""
    rng = stream(18, "busy")
    step = 0.5
    wander = np.empty(int(600 / step))
    state = 0.0
    for k in range(wander.size):
        state = state * (1 - step / 45) + rng.normal(0, 0.35 * np.sqrt(2 * step / 45))
        wander[k] = state
    counts = rng.poisson(42 * step * np.exp(wander))
    at = (np.repeat(np.arange(wander.size), counts) + rng.random(counts.sum())) * step
    again = rng.random(at.size) < 0.06
    at = np.concatenate([at, at[again] + 1.0 + rng.exponential(0.2, again.sum())])
    chat = rng.random(at.size) < 0.55 + 0.25 * np.sin(at / 95)
    request = np.where(chat, _tokens(rng, 700, 1.0, 16_000, at.size), _tokens(rng, 3800, 0.35, 16_000, at.size))
    response = np.where(chat, _tokens(rng, 180, 0.7, 1500, at.size), _tokens(rng, 40, 0.9, 1500, at.size))
    return _trace("busy", {"arrival": at, "request_tokens": request, "response_tokens": response})


CASES: dict[str, Callable[[Path], Trace]] = {
    one.__name__: one
    for one in (
        clumped, clients, completion, floods, ties, pool, mixed, seconds, week, talks, outages, few, thin, cascade,
        cluster, loops, agents, busy,
    )
}  # fmt: skip


def hard_traces(folder: Path) -> dict[str, Trace]:
    return {name: case(folder) for name, case in CASES.items()}
