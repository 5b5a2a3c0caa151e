"""The verb `calibrate`: how long do the steps of this engine take? Asked of a recorded run, or of a live server.

A live server is asked in closed loop, from the outside: one request at a time with prompts of rising length (what a
prefill costs), several at one moment (what its API server costs), short prompts at rising concurrency (what a step
costs), long prompts (what the KV cache costs), and a mixture in open loop. Where tokens come one by one, their times
tell how long each step took (simulate/seen.py), and the step time is fitted to that, not to latencies that hang on
queues. Then it is held to account: bursty arrivals with other lengths at three loads are predicted from the fit and
compared with what happened. All this is sent in several rounds, so that what is fitted and what is predicted are of the
same time (machines drift), and that it shows how far equal real runs differ among themselves.
"""

import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import polars as pl

from squall.errors import InputError, SquallError
from squall.files import check_place
from squall.progress import progress
from squall.replay import replay
from squall.run.table import Run, RunSource
from squall.seeds import DEFAULT_SEED, stream
from squall.simulate.calibrate import (
    DECISIVE,
    Calibration,
    Errors,
    Fit,
    Recording,
    Spread,
    calibrate_run,
    calibration_of,
    disagreement,
    errors_between,
    errors_over_runs,
    fit_coefficients,
    requests_of,
    roofline_names,
    simulated_requests,
    slowed,
    spread_of,
    table_names,
    write_calibration,
)
from squall.simulate.cluster import ENGINES, Cluster, resolve
from squall.simulate.engine import run_requests
from squall.simulate.hardware import GPU, MODELS, Model, find_model
from squall.simulate.records import TICKS
from squall.simulate.seen import FEWEST, Steps, steps_seen
from squall.simulate.step_time import BOUNDS, StepTable, StepTime
from squall.trace.table import Trace, TraceMeta
from squall.units import Duration, seconds
from squall.verb import callable_room

__all__ = ["Calibration", "calibrate"]

LOADS = (0.3, 0.7, 1.1)
"""Of the validation, as shares of the rate that the first guess of the cluster sustains."""

MIXED = (0.6, 1.0)
"""Of the mixtures, which are sent between the tests so that what is fitted and what is tested are of the same time."""

SQUARED = 15.0
"""Everything is measured in rounds, of which there are the root of (seconds of the budget / this): a longer budget
makes them more, since machines drift, and longer, since queues need time to grow."""

BURSTS, APART = 4, 0.3
"""How many times in a round several requests are sent at one moment, and the seconds between."""

IDLE = 10.0
"""Seconds after which nothing of a measurement is left in a server."""

TOGETHER = (1, 4, 16)
"""So many."""

FEW = 4
"""An API server that turns from one to the other in the middle of its work hands over the first of many so late that a
model of one after another would take it for the price of something else. So of bursts of more than this many only the
order of events is looked at, not the delay."""

UNKNOWN_GPU = GPU("as measured", 1e6, 1.0, 1.0)
"""Stands for the accelerator when none is named: a table of measured steps needs no peaks."""

STRAIGHT = 0.02
"""How much a bend in the table counts against a relative error of the same size."""

STREAMED = ("batch", "context", "mixed")
"""The measurements in which requests have several tokens, so that steps can be seen."""

KNOTS = tuple(1 << k for k in range(15))
"""Tokens of a step at which a table has its points, as far as they were measured."""


def calibrate(
    *,
    run: RunSource | None = None,
    url: str | None = None,
    out: str | Path | None = None,
    first: int | None = None,
    model: str | Model | None = None,
    gpu: str | GPU | None = None,
    tp: int = 1,
    kv_blocks: int | None = None,
    block_size: int | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    max_model_len: int | None = None,
    engine: str | None = None,
    prefix_caching: bool | None = None,
    budget: Duration | None = None,
    served_model: str | None = None,
    api_key_env: str | None = None,
    seed: int = DEFAULT_SEED,
) -> Calibration:
    """Fit the simulator's step time to a recorded run, or to a live vLLM server.

    Parameters
    ----------
    run
        A Run or a table with at least `sent`, `first_token`, `last_token` (seconds), `request_tokens`,
        `response_tokens`. It must hold all requests that the engine served.
    url
        A live OpenAI-compatible server that nobody else uses, instead of `run`. Its limits are read from `/metrics`.
    out
        Where to write the calibration (JSON), if anywhere.
    first
        With `run`: fit on the first so many requests (by `sent`) only; the others then test the fit. Without it, all
        are used, and the fit is tested by what the first half alone predicts for the second.
    model, gpu, tp, kv_blocks, block_size, max_num_seqs, max_num_batched_tokens, max_model_len, engine
        What was measured, as for `simulate`; kv_blocks is the server's `num_gpu_blocks`. A run needs model and gpu
        (and is asked for kv_blocks too if they are unknown). A live server needs none: without `gpu` its steps become
        a table instead of a roofline.
    prefix_caching
        Whether the engine caches prefixes, as vLLM does unless told not to: then a preempted request that resumes finds
        those of its own blocks that were not given out since. Not given: as the live server says, or else yes.
    budget
        With `url`: about how long the measurements may take, seconds or `3m`.
    served_model, api_key_env
        With `url`: as for `replay`.
    seed
        Of the search, and of the lengths and arrivals that are sent.

    Raises
    ------
    InputError
        If the run, the server or a value cannot be used.
    """
    limits = {
        "kv_blocks": kv_blocks,
        "block_size": block_size,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
    }
    if out is not None:
        check_place(out, reads=run)
    if (run is None) == (url is None):
        raise InputError("calibrate: give either --run (a recorded run) or --url (a live server).")
    if run is not None:
        live = {"--budget": budget, "--served-model": served_model, "--api-key-env": api_key_env}
        for flag in (flag for flag, value in live.items() if value is not None):
            raise InputError(f"{flag} has no effect with --run: it is about a live server.")
        for flag, value in (("--model", model), ("--gpu", gpu)):
            if value is None:
                raise InputError(f"{flag} is missing: a recorded run does not say what it ran on.")
        return calibrate_run(
            run=run,
            out=out,
            first=first,
            seed=seed,
            model=model,
            gpu=gpu,
            tp=tp,
            engine=engine,
            own_blocks=prefix_caching is not False,
            **limits,
        )
    if first is not None:
        raise InputError("--first has no effect with --url: a live server is tested on runs of its own.")
    server = _Server(url or "", served_model, api_key_env or "OPENAI_API_KEY")
    limit = seconds("3m" if budget is None else budget, "--budget")
    return _calibrate_live(server, model, gpu, tp, engine, prefix_caching, limits, limit, seed, out)


class _Server:
    """A live server: its limits, and requests sent to it."""

    def __init__(self, url: str, served_model: str | None, api_key_env: str) -> None:
        self.url, self.served_model, self.api_key_env = url, served_model, api_key_env
        self.base = url.rstrip("/").removesuffix("/v1")

    def get(self, path: str) -> str:
        """The text at `path`; "" if the server has no such page."""
        import os

        key = os.environ.get(self.api_key_env)
        request = urllib.request.Request(self.base + path, headers={"Authorization": f"Bearer {key}"} if key else {})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
                return answer.read(1 << 22).decode("utf-8", "replace")
        except urllib.error.HTTPError:
            return ""
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", error)
            why = getattr(why, "strerror", None) or why
            raise InputError(f"--url {self.url}: {path} cannot be read ({why}); is the server up?") from error

    def counter(self, name: str) -> float | None:
        """The sum of a counter or gauge over its labels; None if there is none of that name."""
        found = re.findall(rf"^{re.escape(name)}(?:\{{[^\n]*\}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        return sum(map(float, found)) if found else None

    def send(
        self, arrival: np.ndarray, prompt: np.ndarray, response: np.ndarray, *, at_once: int | None = None, seed: int
    ) -> Run:
        """The requests, at their times or `at_once` together as fast as they are answered."""
        columns = {"arrival": arrival, "request_tokens": prompt, "response_tokens": response}
        trace = Trace.of(columns, TraceMeta(source="calibration", format="generated"))
        run = replay(
            trace,
            url=self.url,
            model=self.served_model,
            api="completions",
            api_key_env=self.api_key_env,
            max_concurrency=at_once,
            drain_timeout=600.0,
            seed=seed,
        )
        lost = int((run.table["status"] != "ok").sum())
        if lost > 0.1 * len(run.table):
            said = run.table.filter(pl.col("status") != "ok").row(0, named=True)
            raise SquallError(
                f"--url {self.url}: {lost} of {len(run.table)} requests failed"
                f" ({said['status']}: {said['message'] or said['reason']}); nothing can be calibrated on that."
            )
        return run

    def repeated(self, count: int, prompt: int, response: int, at_once: int, seed: int) -> Run:
        """`count` equal requests, `at_once` together."""
        return self.send(np.zeros(count), np.full(count, prompt), np.full(count, response), at_once=at_once, seed=seed)

    @contextmanager
    def watched(self) -> Iterator[list[tuple[float, ...]]]:
        """Yields a list that holds, at the end, the (running, waiting, KV share) seen meanwhile."""
        seen: list[tuple[float, ...]] = []
        over = threading.Event()
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")

        def watch() -> None:
            while not over.wait(0.1):
                text = self.get("/metrics")
                row = [re.findall(rf"^{name}(?:\{{[^\n]*\}})? (\S+)$", text, re.MULTILINE) for name in names]
                seen.append(tuple(sum(map(float, values)) for values in row))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            over.set()
            thread.join()


class _Measured(NamedTuple):
    """One batch of requests and what it was for."""

    kind: str
    """`prefill`, `burst`, `batch`, `context` or `mixed`."""
    table: pl.DataFrame
    at_once: int
    run: Run


class _Sending(NamedTuple):
    """One real run of a test."""

    run: Run
    table: pl.DataFrame
    preempted: int | None
    """How often the server preempted meanwhile; None if it does not count."""


class _Rounds(NamedTuple):
    """All that was measured."""

    cluster: Cluster
    """The server's limits; where no GPU was named, with the first guess of its step table."""
    guessed: Cluster
    """What the loads of the tests are shares of."""
    by_round: list[list[_Measured]]
    tests: list[list[_Sending]]
    """By load and round."""

    @property
    def measured(self) -> list[_Measured]:
        return [it for them in self.by_round for it in them]


def _calibrate_live(
    server: _Server,
    model: str | Model | None,
    gpu: str | GPU | None,
    tp: int,
    engine: str | None,
    prefix_caching: bool | None,
    limits: dict[str, int | None],
    budget: float,
    seed: int,
    out: str | Path | None,
) -> Calibration:
    if budget < 30:
        raise InputError(f"--budget {budget:g}: a live calibration needs at least 30 s.")
    words, said, engines = _limits_of(server, model, engine, limits)
    words |= {"gpu": UNKNOWN_GPU if gpu is None else gpu, "tp": tp}
    if prefix_caching is not None:
        words["own_blocks"] = prefix_caching
    with progress("Measuring the server"):
        rounds = _measured_in_rounds(server, words, engines[0], said, budget, seed, a_table=gpu is None)
    recordings = [Recording(it.table, len(it.table)) for it in rounds.measured]
    fit = _fitted(rounds, recordings, engines, said, seed, a_table=gpu is None)
    slower = [_slower([it.run for it in them if it.kind in STREAMED], fit.cluster) for them in rounds.by_round]
    validation, spread = _judged(rounds.tests, fit.cluster, slower)
    lengths = _long_tailed(fit.cluster, stream(seed, "calibration capacity"))
    found, assumed = (_capacity(of, *lengths) for of in (fit.cluster, rounds.guessed))
    said.append(
        f"The loads are shares of the first guess of the capacity; of the fitted one they are"
        f" {', '.join(f'{load * assumed / found:.2f}' for load in LOADS)}."
    )
    errors = _errors_by_kind(rounds.measured, fit.cluster) | validation
    result = calibration_of(fit, errors, recordings, server.url, said)
    result = msgspec.structs.replace(result, spread=spread, slower=slower)
    write_calibration(result, out)
    return result


def _measured_in_rounds(
    server: _Server, words: dict[str, Any], engine: str, said: list[str], budget: float, seed: int, *, a_table: bool
) -> _Rounds:
    """Microbenchmarks, mixtures and tests, all of them in each round; limits that are not told are looked for first."""
    budget_told = words["max_num_batched_tokens"] is not None
    if words["max_num_seqs"] is None:
        words["max_num_seqs"] = _most_at_once(server, words, said, seed)
    cluster = resolve(**words, engine=engine)
    rounds = max(2, int(np.sqrt(budget / SQUARED)))
    by_round = [_microbenchmarks(server, cluster, 0.25 * budget / rounds, seed)]
    if not budget_told:
        cluster = _with_budget(server, cluster, said)
    if a_table:
        cluster = msgspec.structs.replace(cluster, step_time=_first_guess(by_round[0], cluster))
    tests = _tests(cluster, 0.55 * budget / rounds / len(LOADS), seed)
    sendings: list[list[_Sending]] = [[] for _ in tests]
    for turn in range(rounds):
        if turn > 0:
            by_round.append(_microbenchmarks(server, cluster, 0.25 * budget / rounds, seed + 100 * turn))
        for place in range(len(tests)):
            if place > 0:
                share = MIXED[place - 1]
                by_round[turn].append(_mixed(server, cluster, share, 0.1 * budget / rounds, seed + 100 * turn))
            k = (place + turn) % len(tests)  # what recurs on the machine must not always meet the same test
            sendings[k].append(_counted(server, tests[k], seed + 1000 * (k + 1) + turn))
    found = _Rounds(cluster, cluster, by_round, sendings)
    if a_table:  # from all rounds: the fit stays near it where the steps say little
        guess = _first_guess(found.measured, cluster)
        found = found._replace(cluster=msgspec.structs.replace(cluster, step_time=guess))
    return found


def _fitted(
    rounds: _Rounds, recordings: list[Recording], engines: list[str], said: list[str], seed: int, *, a_table: bool
) -> Fit:
    """The best fit to what was measured, of one for each of the engines that it may be."""
    steps = _seen(rounds.measured, rounds.cluster)
    cluster = _with_front(rounds.measured, rounds.cluster, steps)
    # What a step takes is known from the steps, if any were seen: latencies hang on queues as well.
    quiet = [it for it in rounds.measured if it.kind not in STREAMED and it.at_once <= FEW]
    alone = recordings if steps is None else [_one_after_another(quiet)]
    front = ("a0", *(("s_in", "s_out") if steps is None else ()))
    fits = []
    for name in engines:
        of = msgspec.structs.replace(cluster, engine=name)
        gap = ("o_gap",) if of.profile.async_scheduling else ()
        shape = (*table_names(of.step_time), *gap) if a_table else (*roofline_names(of), "a1")
        fits.append(fit_coefficients(of, alone, (*shape, *front), seed, steps))
    against = [disagreement(each.cluster, recordings) for each in fits]
    fit = fits[int(np.argmin(against))]
    if len(fits) > 1:
        lead = max(against) - min(against)
        unsure = " That is no proof: give --engine if you know (on a CPU vLLM's steps are synchronous)."
        said.append(
            "Whether steps are scheduled asynchronously cannot be read from a server: both were fitted, and"
            f" {fit.cluster.engine} explains the latencies better (by {lead:.1f} in the log likelihood)."
            + (unsure if lead < DECISIVE else "")
        )
    return fit


def _errors_by_kind(measured: list[_Measured], cluster: Cluster) -> dict[str, Errors]:
    """Of what the fit was made of."""
    errors = {}
    for kind in ("prefill", "burst", "batch", "context", "mixed"):
        those = [it for it in measured if it.kind == kind]
        if those:
            tables = [it.table for it in those]
            each = [simulated_requests(table, cluster) for table in tables]
            off = errors_between(pl.concat(tables), pl.concat(each), None)
            steps_off = _steps_off([it.run for it in those], [cluster] * len(those))
            errors[kind] = msgspec.structs.replace(off, steps=steps_off)
    return errors


def _limits_of(
    server: _Server, model: str | Model | None, engine: str | None, given: dict[str, int | None]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """The keywords of `resolve` as the server tells them (what is given wins), notes, and the engines it may be."""
    said: list[str] = []
    words: dict[str, Any] = dict(given)
    info = re.search(r"^vllm:cache_config_info\{([^\n]*)\}", server.get("/metrics"), re.MULTILINE)
    labels = dict(re.findall(r'(\w+)="([^"]*)"', info.group(1))) if info else {}
    for word, label in (("kv_blocks", "num_gpu_blocks"), ("block_size", "block_size")):
        if words[word] is None and labels.get(label, "").isdigit():
            words[word] = int(labels[label])
    words["own_blocks"] = labels.get("enable_prefix_caching", "True") != "False"
    if words["kv_blocks"] is None:
        raise InputError(
            f"--url {server.url}: its /metrics do not tell the number of KV blocks (vllm:cache_config_info); give"
            " --kv-blocks, without which no calibration means anything."
        )
    try:
        listed = msgspec.json.decode(server.get("/v1/models") or "{}").get("data") or [{}]
        version = msgspec.json.decode(server.get("/version") or "{}").get("version", "")
    except (msgspec.DecodeError, AttributeError) as error:
        raise InputError(f"--url {server.url}: /v1/models is not what an OpenAI-compatible server answers.") from error
    served = next((each for each in listed if each.get("id") == server.served_model), listed[0])
    if words["max_model_len"] is None and isinstance(served.get("max_model_len"), int):
        words["max_model_len"] = served["max_model_len"]
    words["model"] = _model_of(model, served, said)
    if engine is not None:
        return words, said, [engine]
    number = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if len(number) < 2:
        said.append("The server does not tell its version; it is taken for vllm-0.24. Give --engine if it is another.")
    known = [(tuple(map(int, re.findall(r"\d+", name))), name) for name in ENGINES if not name.endswith("-sync")]
    name = max((each for each in known if len(number) < 2 or each[0] <= number), default=min(known))[1]
    return words, said, [name, f"{name}-sync"] if f"{name}-sync" in ENGINES else [name]


def _model_of(model: str | Model | None, served: dict[str, Any], said: list[str]) -> Model:
    """The model's shape: as given, from the folder that the server loaded (if it is here), or by its name."""
    if model is not None:
        return find_model(model)
    root = str(served.get("root") or "")
    for name in (root, str(served.get("id") or "")):
        if Path(name, "config.json").is_file() or name.lower().rpartition("/")[2] in MODELS:
            return find_model(name)
    said.append(
        f"The shape of the model {served.get('id')} is not known here (give --model); a nominal one stands in the"
        " file, of which a table of measured steps uses nothing."
    )
    return msgspec.structs.replace(MODELS["llama-3.2-1b"], name=str(served.get("id") or "unknown"))


def _most_at_once(server: _Server, words: dict[str, Any], said: list[str], seed: int) -> int:
    """max_num_seqs, seen from outside: how many run while others wait though the KV cache has room."""
    tokens = (words["kv_blocks"] - 1) * (words["block_size"] or 16)
    largest = 1
    for count in (32, 128, 512, 2048):
        if 48 * count > 0.8 * tokens:
            break
        with server.watched() as seen:
            server.repeated(count, 16, 24, count, seed + count)
        largest = max([largest, *(int(row[0]) for row in seen)])
        if any(row[1] > 0 and row[2] < 0.9 and row[0] < count for row in seen[1:]):
            full = [int(row[0]) for row in seen if row[1] > 0]
            said.append(
                f"max_num_seqs {max(full)} was seen, not told; give --max-num-seqs if that is not the server's."
            )
            return max(full)
    said.append(
        f"max_num_seqs was not reached with {largest} requests at once; 256 is assumed. Give --max-num-seqs to be sure."
    )
    return 256


def _with_budget(server: _Server, cluster: Cluster, said: list[str]) -> Cluster:
    """The token budget of a step, from the histogram of tokens per step: the highest that was seen, if one was."""
    text = server.get("/metrics")
    found = re.findall(r'^vllm:iteration_tokens_total_bucket\{[^\n]*le="([0-9.]+)"[^\n]*\} (\S+)$', text, re.MULTILINE)
    counts = sorted((float(edge), float(count)) for edge, count in found)
    steps = np.diff([0.0, *(count for _, count in counts)])
    reached = [edge for (edge, _), new in zip(counts, steps, strict=True) if new > 0]
    if not reached or reached[-1] <= 512:
        return cluster
    # Budgets are powers of two, as are the edges; a longer prompt than the budget fills a step to it.
    said.append(
        f"max_num_batched_tokens is taken as {cluster.max_num_batched_tokens:,}; the largest step seen had at most"
        f" {reached[-1]:,.0f} tokens. Give --max-num-batched-tokens if the server has another."
    )
    return cluster


def _microbenchmarks(server: _Server, cluster: Cluster, limit: float, seed: int) -> list[_Measured]:
    """Closed loops with one thing varied at a time, in about `limit` seconds."""
    longest = min(cluster.max_model_len - 2, int(0.9 * cluster.usable_blocks * cluster.block_size))
    warm = server.repeated(2, min(64, longest // 2), 16, 1, seed)  # discarded, but for the length of a step
    step = _step(warm.table)
    measured: list[_Measured] = []
    number = [seed]

    def measure(kind: str, count: int, prompt: int, response: int, at_once: int) -> None:
        number[0] += 1
        run = server.repeated(count, prompt, response, at_once, number[0])
        measured.append(_Measured(kind, requests_of(run, server.url)[0], at_once, run))

    began = time.monotonic()
    for length in _ladder(16, longest, 4):
        measure("prefill", 4, length, 1, 1)
        if time.monotonic() - began > 0.3 * limit:
            break
    for size in TOGETHER:
        if size > cluster.max_num_seqs:
            break
        waves = np.repeat(np.arange(BURSTS) * (APART + 2 * step), size)
        run = server.send(waves, np.full(len(waves), 16), np.ones(len(waves), int), seed=seed + 50 + size)
        measured.append(_Measured("burst", requests_of(run, server.url)[0], size, run))
    room = cluster.usable_blocks * cluster.block_size
    sizes = [size for size in _ladder(1, cluster.max_num_seqs, 2) if size * 48 <= room]
    each = 0.4 * limit / len(sizes)
    for size in sizes:
        response = int(np.clip(each / (2 * step), 16, 96))
        response = min(response, room // size - 16)
        measure("batch", 2 * size if size < 64 else size, 16, response, size)
        step = max(step, _step(measured[-1].table))
    for size in _ladder(1, max(1, cluster.max_num_seqs // 2), 4):
        prompt = min(longest - 40, room // size - 40)
        if prompt >= 128:
            measure("context", 2 * size, prompt, 32, size)
        if time.monotonic() - began > limit:
            break
    return measured


def _step(table: pl.DataFrame) -> float:
    """The median time per token after the first."""
    gaps = table["response_tokens"].to_numpy() - 1
    took = (table["last_token"] - table["first_token"]).to_numpy()
    return float(np.median(took[gaps > 0] / gaps[gaps > 0])) if (gaps > 0).any() else 0.01


def _ladder(low: int, high: int, factor: int) -> list[int]:
    """low, low*factor, … and at the end `high`."""
    steps = []
    while low < high:
        steps.append(low)
        low *= factor
    return [*steps, high]


def _first_guess(measured: list[_Measured], cluster: Cluster) -> StepTime:
    """A table of step times by non-negative least squares on medians: of TTFT alone, and of the gaps between tokens."""
    from scipy.optimize import nnls

    rows: list[tuple[float, float, float, float, float, float]] = []  # tokens, sequences, KV, pairs, a first token, s
    for it in measured:
        prompt, response = it.table["request_tokens"][0], it.table["response_tokens"][0]
        if it.kind == "prefill" and prompt <= cluster.max_num_batched_tokens:
            ttft = (it.table["first_token"] - it.table["sent"]).median()
            rows.append((prompt, 1, 0, prompt**2 / 2, 1, float(ttft)))  # type: ignore[arg-type]
        elif it.kind in ("batch", "context"):
            gap = it.run.table["chunks"].list.diff().list.median().median()
            n = it.at_once
            rows.append((n, n, n * (prompt + response / 2), 0, 0, float(gap)))  # type: ignore[arg-type]
    tokens, sequences, kv, pairs, first, took = np.array(rows).T
    knots = np.array([knot for knot in KNOTS if knot <= tokens.max()], dtype=float)
    if len(knots) < 2:
        knots = np.array([1.0, max(2.0, tokens.max())])
    rise = np.concatenate(
        [np.ones((len(rows), 1)), np.clip((tokens[:, None] - knots[:-1]) / np.diff(knots), 0, 1)], axis=1
    )
    rise[:, -1] = np.maximum(0, (tokens - knots[-2]) / (knots[-1] - knots[-2]))
    matrix = np.column_stack([rise, sequences, kv, pairs, first]) / took[:, None]
    # A knot is met by few measurements: between a bend of the base and the attention term, a straight base is likelier.
    widths = np.diff(knots)
    straight = np.zeros((max(0, len(widths) - 1), matrix.shape[1]))
    for k in range(len(straight)):
        straight[k, k + 1], straight[k, k + 2] = -1 / widths[k], 1 / widths[k + 1]
        straight[k] *= STRAIGHT * widths[k + 1] / np.median(took)
    matrix = np.concatenate([matrix, straight])
    scale = np.abs(matrix).max(axis=0)
    wanted = np.concatenate([np.ones(len(rows)), np.zeros(len(straight))])
    solution = nnls(matrix / scale, wanted)[0] / scale
    base = np.cumsum(solution[: len(knots)])
    per_sequence, per_kv, per_pair, ingest = solution[len(knots) :]
    table = StepTable(
        points=list(zip(knots.tolist(), base.tolist(), strict=True)),
        per_sequence=float(per_sequence),
        per_kv_token=float(per_kv),
        per_attention_pair=float(per_pair),
    )
    return msgspec.structs.replace(
        cluster.step_time, table=table, o0=0.0, o1=0.0, o_gap=0.0, a0=float(min(ingest, BOUNDS["a0"].high))
    )


def _one_after_another(measured: list[_Measured]) -> Recording:
    """One recording of them all, with the server idle in between: to simulate one is faster than many."""
    tables, end = [], 0.0
    for it in measured:
        shift = end - it.table["sent"].to_numpy().min()
        tables.append(it.table.with_columns(pl.col("sent", "first_token", "last_token") + shift))
        end = float(tables[-1]["last_token"].to_numpy().max()) + IDLE
    table = pl.concat(tables)
    return Recording(table, len(table))


def _seen(measured: list[_Measured], cluster: Cluster) -> Steps | None:
    """The steps that were seen; None if too few were."""
    steps = steps_seen([it.run for it in measured if it.kind in STREAMED], cluster.max_num_batched_tokens)
    return steps if len(steps.took) >= FEWEST else None


def _with_front(measured: list[_Measured], cluster: Cluster, steps: Steps | None) -> Cluster:
    """`cluster` with the `a0`, `s_in` and `s_out` that explain the bursts at the idle server best.

    Where steps were seen, `s_out` is known from the tokens in them, and each size of burst may have a delay of its own.
    """
    bursts = [it for it in measured if it.kind == "burst"]
    best, least = cluster.step_time, np.inf
    seen = steps is not None and not np.isnan(steps.apart).all()
    results = np.linspace(0, 1e-3, 11)
    if steps is not None and seen:
        # All results of a step are gone through before the first is written, which takes as long again.
        results = np.minimum([2 * np.nanmedian(steps.apart)], BOUNDS["s_out"].high)
    for s_in, s_out in product(np.linspace(0, 5e-3, 11), results):
        step = msgspec.structs.replace(cluster.step_time, a0=0.0, s_in=float(s_in), s_out=float(s_out))
        there = msgspec.structs.replace(cluster, step_time=step)
        left, scale = [], []
        for it in bursts:
            waves = it.table["request"].to_numpy() // it.at_once
            real = (it.table["first_token"] - it.table["sent"]).to_numpy()
            simulated = simulated_requests(it.table, there)["ttft"].to_numpy()
            # Which of those sent at one moment comes first is chance.
            left.append(real[np.lexsort((real, waves))] - simulated[np.lexsort((simulated, waves))])
            scale.append(np.median(real))
        delays = np.array([np.median(each) for each in left])
        alone = [it.at_once == 1 for it in bursts]
        a0 = np.clip(np.median(delays[alone] if seen and any(alone) else delays), 0.0, BOUNDS["a0"].high)
        over = delays if seen else np.full(len(delays), a0)
        misfit = sum(np.abs(each - by).mean() / size for each, by, size in zip(left, over, scale, strict=True))
        if misfit < least:
            best, least = msgspec.structs.replace(step, a0=float(a0)), misfit
    return msgspec.structs.replace(cluster, step_time=best)


def _mixed(server: _Server, cluster: Cluster, share: float, span: float, seed: int) -> _Measured:
    """An open loop of Poisson arrivals, at about `share` of what the first guess sustains."""
    seed += 80 + int(10 * share)  # no seed, so no prompt, of others
    random = stream(seed, "calibration mix")
    lengths = [np.clip(random.uniform(0.1, 1.9, 2000) * mean, 8, None).astype(int) for mean in _typical(cluster)]
    run = server.send(*_arrivals(cluster, lengths, share, span, 1.0, random), seed=seed)
    return _Measured("mixed", requests_of(run, server.url)[0], 0, run)


def _typical(cluster: Cluster) -> tuple[float, float]:
    """Mean prompt and response tokens that fill both the KV cache and the batch when the server is full."""
    room = cluster.usable_blocks * cluster.block_size
    total = min(cluster.max_model_len / 6, 1.4 * room / cluster.max_num_seqs)
    return 0.55 * total, 0.45 * total


def _capacity(cluster: Cluster, prompt: np.ndarray, response: np.ndarray) -> float:
    """Requests/s of such lengths that the cluster ends while its queue is full."""
    ends = np.sort(run_requests(np.zeros(len(prompt)), prompt, response, cluster).attempts["last"]) / TICKS
    low, high = len(ends) // 5, len(ends) * 4 // 5
    return float((high - low) / (ends[high] - ends[low]))


def _arrivals(
    cluster: Cluster,
    lengths: list[np.ndarray],
    share: float,
    span: float,
    cv: float,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gamma arrivals at `share` of the cluster's own saturation rate, for `span` seconds of work, and their lengths."""
    prompt, response = lengths
    rate = share * _capacity(cluster, prompt, response)
    count = int(np.clip(rate * span / max(1.0, share), 10, len(prompt)))
    gaps = random.gamma(1 / cv**2, cv**2 / rate, count)
    return np.cumsum(gaps), prompt[:count], response[:count]


def _tests(cluster: Cluster, span: float, seed: int) -> list[tuple[np.ndarray, ...]]:
    """What is sent to test the fit, at each of LOADS: arrivals, prompts, responses."""
    random = stream(seed, "calibration test")
    return [_arrivals(cluster, _long_tailed(cluster, random), load, span, 2.0, random) for load in LOADS]


def _long_tailed(cluster: Cluster, random: np.random.Generator) -> list[np.ndarray]:
    """Lognormal lengths, 2,000 of prompts and of responses."""
    return [
        np.clip(random.lognormal(np.log(mean) - 0.245, 0.7, 2000), 4, 4 * mean).astype(int)
        for mean in _typical(cluster)
    ]


def _counted(server: _Server, sent: tuple[np.ndarray, ...], seed: int) -> _Sending:
    before = server.counter("vllm:num_preemptions_total")
    run = server.send(*sent, seed=seed)
    after = server.counter("vllm:num_preemptions_total")
    preempted = None if before is None or after is None else int(after - before)
    return _Sending(run, requests_of(run, server.url)[0], preempted)


def _slower(runs: list[Run], cluster: Cluster) -> float:
    """How many times as long as on `cluster` the steps that were seen in `runs` took; 1 if too few were."""
    steps = steps_seen(runs, cluster.max_num_batched_tokens)
    return float(steps.took.sum() / steps.seconds(cluster).sum()) if len(steps.took) >= FEWEST else 1.0


def _steps_off(runs: list[Run], clusters: list[Cluster]) -> float | None:
    """Predicted / seen - 1 of the time of the steps that were seen in `runs`, each on its cluster; None if too few."""
    each = [steps_seen([run], cluster.max_num_batched_tokens) for run, cluster in zip(runs, clusters, strict=True)]
    if sum(len(steps.took) for steps in each) < FEWEST:
        return None
    predicted = sum(steps.seconds(cluster).sum() for steps, cluster in zip(each, clusters, strict=True))
    return float(predicted / sum(steps.took.sum() for steps in each) - 1)


def _judged(
    sendings: list[list[_Sending]], cluster: Cluster, slower: list[float]
) -> tuple[dict[str, Errors], dict[str, Spread]]:
    """By load: errors of the predictions, which are made of each sending as it was sent, and how far these differ.
    Under `held_out`, the errors over the requests of all loads.

    A sending is predicted for a machine as much `slower` than the fit as it was in the measurements of the same round:
    queues and preemptions do not follow its speed in a straight line. `at its speed` are the errors of predictions for
    a machine whose steps take as long on the whole as those seen in the sendings: without what it drifted meanwhile.
    """
    errors, spread = {}, {}
    clusters = [slowed(cluster, factor) for factor in slower]
    everything: list[tuple[pl.DataFrame, pl.DataFrame]] = []
    for load, them in zip(LOADS, sendings, strict=True):
        name, tables = f"load {load:g}", [it.table for it in them]
        counts = [it.preempted for it in them]
        known = None if None in counts else sum(count or 0 for count in counts)
        steps = _steps_off([it.run for it in them], clusters)
        pairs = [(table, simulated_requests(table, of)) for table, of in zip(tables, clusters, strict=True)]
        errors[name] = msgspec.structs.replace(errors_over_runs(pairs, known), steps=steps)
        if steps is not None:
            then = [slowed(of, 1 / (1 + steps)) for of in clusters]
            again = [(table, simulated_requests(table, of)) for table, of in zip(tables, then, strict=True)]
            errors[f"{name} at its speed"] = msgspec.structs.replace(errors_over_runs(again, known), steps=0.0)
        spread[name] = spread_of(tables, counts)
        everything += pairs
    recorded, predicted = zip(*everything, strict=True)
    errors["held_out"] = errors_between(pl.concat(recorded), pl.concat(predicted), None)
    return errors, spread


callable_room(__name__)
