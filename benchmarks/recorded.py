"""Calibration on recorded runs of servers that are not built like what is fitted to them.

    python benchmarks/recorded.py [--only TEXT] [--seed S] [--jobs N]

Each recording is made by the slow scheduler of tests/simulate/oracle.py, with own blocks found again, and step times
that no coefficient of the fit stands for: sums of kernels as measured (c0 + cB*n + cKV*KV for decodes, a GEMM knee,
pT*T + pQ*Q for prompts; from the op tables of ai-dynamo/aiconfigurator@095f58a, Apache-2.0, and for the RTX 4090 from
casys-kaist/LLMServingSim@5daddb2, MIT), CUDA graphs of padded sizes, host times from 0.3 to 5 ms, gaps between steps,
noise on every step that lasts for some, and a first request that pays for the warm-up. Times are taken in the engine
(`sent` is when it took a request over) or at a client. 100 requests are fitted, 200 are predicted. Beside the errors
stands how far a second recording, of the same requests with other noise, lies from the first: no model is closer.
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import polars as pl

sys.path.append(str(Path(__file__).parents[1] / "tests" / "simulate"))
import oracle

from squall.run import Run, RunMeta
from squall.seeds import stream
from squall.simulate.calibrate import Errors, calibrate_run, errors_between
from squall.simulate.cluster import Cluster, resolve
from squall.simulate.records import TICKS

FITTED, ALL = 100, 300
TARGETS = {"mean TTFT": 0.03, "P50 TTFT": 0.03, "mean E2E": 0.03, "P50 E2E": 0.03, "|E2E|": 0.025, "preempted": 0.15}


class Kernels(NamedTuple):
    """Of one model on one GPU, as in the tables: ms, us and ns as named there."""

    model: str
    gpu: str
    tp: int
    a: float
    b: float
    p: float
    c0: float
    cb: float
    ckv: float
    pt: float
    pq: float
    experts: float = 0.0
    """Share of `a` that is of experts, read as far as a step's tokens are routed to them (64 % less evenly)."""

    def seconds(self, tokens: int, sequences: int, kv: float, pairs: float, chunks: int) -> float:
        """Of a step with `chunks` tokens of prompts among its `tokens`."""
        read = self.a
        if self.experts:
            routed = 1 - (1 - 8 / 128) ** (0.64 * tokens)
            read *= 1 - self.experts * (1 - routed)
        gemm = (read**self.p + (self.b * 1e-3 * tokens) ** self.p) ** (1 / self.p)
        growth = ((self.a**self.p + (self.b * 0.128) ** self.p) ** (1 / self.p) - self.a) / 128
        rest = self.c0 - self.a + max(0.0, self.cb * 1e-3 - growth) * sequences
        attention = self.ckv * kv + self.pq * pairs
        return 1e-3 * (gemm + rest + max(0.0, self.pt - self.b) * 1e-3 * chunks + 1e-6 * attention)


KERNELS = {
    "h100-8b": Kernels("llama-3.1-8b", "h100", 1, 5.40, 17.4, 3.0, 6.04, 12.5, 42.1, 18.5, 0.81),
    "h100-7b": Kernels("qwen2.5-7b", "h100", 1, 5.05, 16.9, 3.0, 5.64, 9.5, 18.1, 18.0, 0.61),
    "h100-32b-tp2": Kernels("qwen3-32b", "h100", 2, 12.22, 38.0, 3.0, 13.09, 27.7, 42.2, 47.2, 1.67),
    "h100-70b-tp4": Kernels("llama-3.1-70b", "h100", 4, 12.77, 42.1, 3.0, 14.34, 33.6, 26.9, 58.0, 1.28),
    "h200-32b": Kernels("qwen3-32b", "h200", 1, 18.09, 78.8, 3.0, 18.07, 45.8, 58.8, 84.2, 4.07),
    "l40s-8b": Kernels("llama-3.1-8b", "l40s", 1, 21.06, 59.1, 2.0, 22.11, 27.5, 194.0, 62.9, 2.88),
    "a100-8b": Kernels("llama-3.1-8b", "a100", 1, 9.61, 52.0, 1.5, 10.48, 39.5, 77.8, 54.1, 2.12),
    "a100-32b": Kernels("qwen3-32b", "a100", 1, 41.97, 220.0, 2.0, 42.98, 134.6, 144.8, 222.0, 8.09),
    "4090-8b": Kernels("llama-3.1-8b", "rtx4090", 1, 15.83, 91.1, 2.0, 17.32, 25.0, 141.0, 92.0, 4.6),
    # Not in the tables: halved weights, and a mixture of experts at two thirds of the peaks.
    "h100-8b-fp8": Kernels("llama-3.1-8b-fp8", "h100", 1, 3.0, 10.5, 3.0, 3.6, 12.0, 42.1, 11.6, 0.81),
    "h100-moe": Kernels("qwen3-30b-a3b", "h100", 1, 24.0, 13.0, 2.0, 25.5, 22.0, 33.0, 16.0, 0.9, 0.93),
}


class Load(NamedTuple):
    """Requests: lognormal lengths, Poisson arrivals at so many times what a first guess sustains."""

    prompt: float
    response: float
    share: float
    least: int = 1
    """Of a response: runs of benchmarks often have more than so many tokens each."""
    max_num_seqs: int | None = None
    kv_blocks: int | None = None


LOADS = {
    "light": Load(400, 300, 0.35),
    "moderate": Load(400, 300, 0.75),
    "full": Load(850, 650, 2.5, 512, 256, 3500),
    "long prompts": Load(4000, 200, 0.6),
    "few places": Load(400, 300, 1.3, 1, 24),
    "overload": Load(400, 300, 2.0, 1, 256),
}


class Stack(NamedTuple):
    """The engine and its host."""

    engine: str
    o0: float
    """ms per step."""
    o1: float
    """us per sequence."""
    gap: float
    """ms that asynchronous scheduling does not hide, and a thousandth of it per sequence."""
    noise: float
    client: bool = False
    """Whether times are those of a client: some ms of HTTP and tokenising before, and jitter."""


STACKS = {
    "async": Stack("vllm-0.19", 2.0, 8.0, 0.4, 0.03),
    "async-client": Stack("vllm-0.19", 2.5, 12.0, 0.8, 0.04, client=True),
    "sync": Stack("vllm-0.11", 3.0, 10.0, 0.0, 0.03),
    "slow-host": Stack("vllm-0.14", 5.0, 40.0, 0.6, 0.04, client=True),
    "fast-host": Stack("vllm-0.24", 0.6, 3.0, 0.1, 0.02),
}

CASES = [
    *(("h100-8b", load, "async") for load in LOADS),
    *(("h100-32b-tp2", load, "async") for load in ("light", "moderate", "full")),
    *(("h100-7b", load, "async-client") for load in ("light", "moderate", "overload")),
    *(("h100-70b-tp4", load, "async") for load in ("light", "full")),
    *(("h200-32b", load, "fast-host") for load in ("moderate", "long prompts")),
    *(("l40s-8b", load, "async-client") for load in ("light", "moderate", "full")),
    *(("a100-8b", load, "sync") for load in ("light", "moderate", "full", "few places")),
    *(("a100-32b", load, "async") for load in ("moderate", "full")),
    *(("4090-8b", load, "async") for load in ("light", "moderate", "full", "long prompts")),
    *(("h100-8b-fp8", load, "slow-host") for load in ("light", "moderate", "full")),
    *(("h100-moe", load, "async") for load in ("light", "moderate", "full")),
]


class _Engine(oracle.Engine):
    """With step times of its own, and the moment at which it takes a request over."""

    kernels: Kernels
    stack: Stack
    random: np.random.Generator
    level = 0.0
    taken: dict[int, int]

    def schedule(self, now: int) -> Any:
        for r in self.waiting:
            self.taken.setdefault(id(r), now)
        return super().schedule(now)

    def check(self, parts: Any) -> None:
        """The tests do."""

    def duration(self, step: oracle.Step) -> int:
        n, tokens = len(step.parts), sum(new for _, _, new, _ in step.parts)
        chunks = [(c, x) for r, c, x, _ in step.parts if not (x == 1 and c >= r.prompt)]
        kv = sum(c + 1 for r, c, x, _ in step.parts if x == 1 and c >= r.prompt) + sum(c for c, _ in chunks)
        pairs = sum(x * (c + x / 2) for c, x in chunks)
        padded = -(-tokens // 8) * 8 if not chunks and 8 < tokens <= 512 else tokens
        gpu = self.kernels.seconds(padded, n, kv, pairs, sum(x for _, x in chunks))
        stack = self.stack
        host = (1.0 if not chunks else 1.3) * (1e-3 * stack.o0 + 1e-6 * stack.o1 * n)
        gap = 1e-3 * stack.gap * (1 + n / 1000)
        took = max(gpu, host) + gap if self.limits.asynchronous else gpu + host
        # Most of the noise is of the step, a fifth wanders and is forgotten within some hundred.
        self.level += -0.005 * self.level + 0.02 * self.random.normal() * stack.noise
        took *= np.exp(self.random.normal() * stack.noise + self.level)
        done = len(self.steps)
        took += 0.4 if done == 0 else 6e-3 if done < 10 else 0.0
        return max(1, round(took * TICKS))


def served(cluster: Cluster, kernels: Kernels, stack: Stack, asked: np.ndarray, random: np.random.Generator) -> Run:
    """What a client or the engine records of the requests `asked`: (n, 3) seconds, prompt, response."""
    ingest = 1.5e-3 if stack.client else 0.0
    limits = cluster.limits()._replace(ingest=round(ingest * TICKS), ingest_per_token=0)
    sizes = {"blocks": cluster.usable_blocks, "max_seqs": cluster.max_num_seqs, "prefills": 0, "caching": True}
    sizes |= {"budget": cluster.max_num_batched_tokens, "watermark": 0, "host_free": 0}
    flat = SimpleNamespace(**limits._asdict(), **sizes)
    requests = [
        oracle.Request(round((at + 2e-6 * p * stack.client) * TICKS), int(p), int(o), chain=k + 1)
        for k, (at, p, o) in enumerate(asked)
    ]
    them = oracle.Cluster(sorted(requests, key=lambda r: r.sent), flat, None)
    engine = _Engine(0, flat, None, them)  # type: ignore[arg-type]
    engine.kernels, engine.stack, engine.random, engine.taken = kernels, stack, random, {}
    them.engines = [engine]
    while them.coming or engine.ends is not None:
        coming = them.coming[0].sent + flat.ingest if them.coming else 2**62
        now = min(coming, engine.ends if engine.ends is not None else 2**62)
        if engine.ends == now:
            engine.receive(now)
        while them.coming and them.coming[0].sent + flat.ingest == now:
            them.enter(them.coming.pop(0), now)
        engine.go_on(now)
    late = random.exponential(3e-4, (2, len(requests))) if stack.client else np.zeros((2, len(requests)))
    sent = asked[:, 0] if stack.client else np.array([engine.taken[id(r)] / TICKS for r in requests])
    columns = {
        "request": range(len(requests)),
        "attempt": [1] * len(requests),
        "status": ["ok"] * len(requests),
        "sent": sent,
        "scheduled": sent,
        "first_token": np.array([r.tokens[0] for r in requests]) / TICKS + late[0],
        "last_token": np.array([r.tokens[-1] for r in requests]) / TICKS + late.max(axis=0),
        "request_tokens": asked[:, 1],
        "response_tokens": asked[:, 2],
        "preemptions": [r.preemptions for r in requests],
    }
    return Run.of(pl.DataFrame(columns), RunMeta(kind="recorded"))


def requests_of(load: Load, cluster: Cluster, kernels: Kernels, random: np.random.Generator) -> np.ndarray:
    """(ALL, 3) seconds, prompt, response."""
    prompt, response = (
        np.clip(random.lognormal(np.log(mean) - 0.32, 0.8, ALL), 8, 6 * mean).astype(int)
        for mean in (load.prompt, load.response)
    )
    response = np.maximum(response, load.least + random.integers(0, 100, ALL) * (load.least > 1))
    # A full engine: as many as fit, each step of them with its share of prompts.
    room = cluster.usable_blocks * cluster.block_size / (prompt.mean() + response.mean() / 2)
    n = max(1, min(cluster.max_num_seqs, round(room), 128))
    chunk = n * prompt.mean() / response.mean()
    context = prompt.mean() + response.mean() / 2
    step = kernels.seconds(round(n + chunk), n, n * context, chunk * prompt.mean() / 2, round(chunk)) + 1e-3
    rate = load.share * n / step / response.mean()
    return np.column_stack([np.cumsum(random.exponential(1 / rate, ALL)), prompt, response]).astype(float)


class Result(NamedTuple):
    """Of one case."""

    held_out: Errors
    repeat: Errors
    seconds: float
    notes: list[str]
    values: dict[str, float]


def result_of(case: tuple[str, str, str], seed: int, **more: Any) -> Result:
    """Record, calibrate on the first requests, predict the others, and record again."""
    kernels, load, stack = KERNELS[case[0]], LOADS[case[1]], STACKS[case[2]]
    words: dict[str, Any] = {"model": kernels.model, "gpu": kernels.gpu, "tp": kernels.tp, "engine": stack.engine}
    words |= {"max_num_seqs": load.max_num_seqs, "kv_blocks": load.kv_blocks}
    cluster = resolve(**words)
    words |= {name: getattr(cluster, name) for name in ("kv_blocks", "max_num_seqs", "max_num_batched_tokens")}
    asked = requests_of(load, cluster, kernels, stream(seed, "recorded " + " ".join(case)))
    first, again = (served(cluster, kernels, stack, asked, stream(seed, "noise " + case[0], k)) for k in (0, 1))
    began = time.process_time()
    fitted = calibrate_run(run=first, first=FITTED, **({"own_blocks": True} | words | more))
    took = time.process_time() - began
    tables = [run.table.sort("sent", maintain_order=True)[FITTED:] for run in (first, again)]
    other = pl.DataFrame(
        {
            "ttft": tables[1]["first_token"] - tables[1]["sent"],
            "e2e": tables[1]["last_token"] - tables[1]["sent"],
            "preemptions": tables[1]["preemptions"],
        }
    )
    repeat = errors_between(tables[0], other, int(tables[0]["preemptions"].sum()))
    values = {name: getattr(fitted.step_time, name, 0.0) for name in fitted.fitted}
    return Result(fitted.errors["held_out"], repeat, took, fitted.notes, values)


def figures(errors: Errors) -> dict[str, float]:
    """By the names of TARGETS."""
    found = {
        "mean TTFT": errors.mean["ttft"],
        "P50 TTFT": errors.p50["ttft"],
        "mean E2E": errors.mean["e2e"],
        "P50 E2E": errors.p50["e2e"],
        "|E2E|": errors.mean_absolute["e2e"],
    }
    simulated, recorded = errors.preemptions or (0, 0)
    if recorded and recorded >= 20:
        found["preempted"] = simulated / recorded - 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="print the fitted coefficients too")
    asked = parser.parse_args()
    cases = [case for case in CASES if asked.only in ", ".join(case)]
    print(f"{'':<40}" + "".join(f"{name:>11}" for name in TARGETS) + f"{'CPU s':>7}  (of another recording)")
    missed = 0
    with ProcessPoolExecutor(asked.jobs) as pool:
        for case, result in zip(cases, pool.map(partial(result_of, seed=asked.seed), cases), strict=True):
            found, other = figures(result.held_out), figures(result.repeat)
            beyond = [name for name, value in found.items() if abs(value) > TARGETS[name]]
            missed += bool(beyond)
            cells = "".join(
                f"{100 * found[name]:>+10.1f}{'!' if name in beyond else ' '}" if name in found else f"{'-':>10} "
                for name in TARGETS
            )
            repeat = " ".join(f"{100 * value:+.1f}" for value in other.values())
            print(f"{', '.join(case):<40}{cells}{result.seconds:>7.1f}  ({repeat})", flush=True)
            if asked.verbose:
                print("    " + " ".join(f"{name}={value:.3g}" for name, value in result.values.items()))
                print("    " + " ".join(result.notes))
    print(f"{len(cases) - missed} of {len(cases)} within all targets")


if __name__ == "__main__":
    main()
