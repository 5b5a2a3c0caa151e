"""The highest load at which a server, or a modelled cluster, still meets an SLO on a trace.

The trace is scaled to a rate by a named method, and one step at that rate is a whole experiment: replayed on the
server, or simulated. It passes if the share of the requests *offered* that met the SLO reaches the goal (99 %). The
search doubles or halves the rate until it stands between a pass and a fail, and bisects.

A share is a sample, and its errors hang together in time, so each step has an interval from a block bootstrap
(run/resampling.py). Where the interval holds the goal the step is a close call: it is repeated (on a server, where a
second run differs; in a simulation with other seeds, where the method draws), and judged by the mean of its repeats.
Nothing says that a server that passes at one rate passes at all lower ones: rates below the answer are tried too, and
the answer is the highest rate below which nothing failed.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from squall.errors import InputError
from squall.files import check_place, replace_file
from squall.progress import note, progress
from squall.run.metrics import latencies, per_request, requests_that_met, statistic
from squall.run.resampling import FEWEST_BLOCKS, cells_of, deviations, ratio
from squall.run.slo import SLO, parse_slo
from squall.run.table import Run
from squall.seeds import DEFAULT_SEED
from squall.trace import Trace, TraceSource, open_trace
from squall.units import Duration, in_words, seconds
from squall.verb import callable_room

GOAL = 0.99
PRECISION = 0.02
BUDGET = 600.0
STEP = 60.0
REPEATS = 3
"""Runs of a close call, at most."""
LOWEST = 1 / 128
"""The search gives up below this share of the rate that it began with."""
HIGHEST = 1024
"""Nor does it go above this multiple of that rate."""
BELOW = (0.9, 0.75)
"""Shares of the answer that are tried too, since a server may fail at a rate below one that it passes."""
_RANDOM_METHODS = ("thin", "superpose", "model")

Verdict = Literal["pass", "fail", "client-limited"]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One run at one rate."""

    rate: float
    """Asked for, requests/s: the mean of the whole scaled trace."""
    offered_rate: float | None
    """Of the part that was run."""
    requests: int
    met_share: float
    """Of the requests offered: answered, and within all limits."""
    low: float | None
    """Of its 95 % interval; null where the run is too short for one."""
    high: float | None
    verdict: Verdict
    close: bool
    """The interval holds the goal: another run might have come out otherwise."""
    ttft_p99: float | None
    tpot_p99: float | None
    e2e_p99: float | None
    failed_share: float
    seconds: float
    """That this step took."""
    reasons: list[str] = []
    """Why it is CLIENT-LIMITED."""


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `capacity`."""

    state: str
    """`found`; `budget` or `interrupted` (the bounds are what is known so far); `client-limited` (the sender could not
    go higher); `highest passes` (no rate tried fails); `lowest misses` (even the lowest rate tried fails)."""
    capacity: float | None
    """Highest rate (requests/s) that met the SLO, nothing tried below it having failed. Null: none."""
    pass_rate: float | None
    """Same as capacity."""
    fail_rate: float | None
    """Lowest rate above it that failed; null: none did, and the capacity is a lower bound."""
    sure_low: float | None
    """Highest rate that passed clearly, its interval lying above the goal, and nothing below it failed or was close."""
    sure_high: float | None
    """Lowest rate that failed clearly."""
    summary: str
    slo: dict[str, float]
    goal: float
    source: str
    scale_method: str
    target: dict[str, Any]
    step_time: str | None
    seed: int
    budget: float
    spent: float
    steps: list[Step]
    notes: list[str]


def capacity(
    trace: TraceSource,
    *,
    slo: str,
    min_goodput: float = GOAL,
    url: str | None = None,
    gpu: str | None = None,
    budget: Duration = BUDGET,
    step: Duration = STEP,
    start: float | None = None,
    precision: float = PRECISION,
    out: str | Path | None = None,
    target: dict[str, Any] | None = None,
    progress_callback: Callable[[Step], None] | None = None,
    **options: Any,
) -> Capacity:
    """Find the highest mean rate of `trace` at which `min_goodput` of the requests offered meet `slo`.

    Parameters
    ----------
    trace
        A Trace, a file or a profile; `options` are the trace options. `scale_method` among them says how a rate is
        reached; `rate` and `speed` are the search's own.
    slo
        Limits like `ttft=1s,tpot=100ms,e2e=30s`.
    min_goodput
        Share of the requests offered that must meet the SLO.
    url
        A server: every step is replayed for `step` seconds. Without it the steps are simulated on `gpu`, whole.
    budget
        Seconds for the whole search; no step is begun that would not end in time.
    start
        First rate. Not given: the trace's own on a server, half of what the modelled cluster sustains in a simulation.
    precision
        The search ends when pass and fail are closer than this share.
    out
        JSON file of the result, written anew after every step.
    target
        Further keywords of `replay` or `simulate`.

    Raises InputError for a trace or a word that cannot be used. An interrupt returns what is known so far.
    """
    limits = parse_slo(slo)
    place = None if out is None else check_place(out, reads=trace)
    for name in ("rate", "speed"):
        if options.get(name) is not None:
            raise InputError(f"--{name}: capacity sets the load itself; leave it out (--start is its first rate).")
    if not 0 < min_goodput < 1:
        raise InputError(f"--min-goodput {min_goodput:g}: it is a share below 1, such as 0.99.")
    if not 0 < precision < 1:
        raise InputError(f"--precision {precision:g}: it is a share such as 0.02.")
    if start is not None and not 0 < start < float("inf"):
        raise InputError(f"--start {start:g}: a rate above 0 is needed.")
    words = dict(target or {})
    if url is not None and gpu is not None:
        raise InputError("--url and --gpu: a server or a modelled cluster, not both.")
    method = options.pop("scale_method", None) or "compress"
    seed = int(options.get("seed", DEFAULT_SEED))
    asked, notes = _servable(open_trace(trace, **options))
    if not asked.span > 0 or len(asked) < 10:
        raise InputError(
            f"{asked.meta.source}: {len(asked)} requests in {asked.span:g} s have no rate to scale; at least 10 at"
            " different times are needed."
        )
    if url is not None:
        experiment: _Experiment = _Server(asked, method, url, seconds(step, "--step"), words)
        first = start or asked.rate
    else:
        from squall.simulate import saturation_rate

        cluster = words | ({"gpu": gpu} if gpu is not None else {})
        experiment = _Simulation(asked, method, cluster)
        first = start or saturation_rate(asked, **cluster) / 2
    search = _Search(
        experiment,
        limits,
        goal=min_goodput,
        precision=precision,
        budget=seconds(budget, "--budget"),
        seed=seed,
        out=place,
        callback=progress_callback,
        repeatable=url is not None or method in _RANDOM_METHODS,
        method=method,
        notes=notes,
    )
    return search.run(min(first, search.most))


def _servable(trace: Trace) -> tuple[Trace, list[str]]:
    """Without the requests that have no prompt or no recorded answer: no server could meet an SLO on them."""
    kept = trace.table.filter((trace.table["request_tokens"] > 0) & (trace.table["response_tokens"] > 0))
    left_out = len(trace) - len(kept)
    if not left_out:
        return trace, []
    if kept.is_empty():
        raise InputError(f"{trace.meta.source}: no request in it has both a prompt and a response.")
    text = f"{left_out:,} of {len(trace):,} requests have no prompt or no recorded response, and are left out"
    return trace.replace(kept, text), [f"{text}."]


# --------------------------------------------------------------------------------------------------------- experiments


class _Experiment(ABC):
    """Runs the trace at a rate."""

    def __init__(self, trace: Trace, method: str) -> None:
        self.trace, self.method = trace, method

    def scaled(self, rate: float, seed: int) -> Trace:
        return open_trace(self.trace, rate=rate, scale_method=self.method, seed=seed)

    @abstractmethod
    def run(self, rate: float, seed: int) -> Run:
        """The trace at `rate` requests/s, on the target."""

    def expected(self, rate: float) -> float:
        """Seconds that a step is expected to take at least."""
        return 0.0


class _Simulation(_Experiment):
    def __init__(self, trace: Trace, method: str, cluster: dict[str, Any]) -> None:
        super().__init__(trace, method)
        self.cluster = cluster

    def run(self, rate: float, seed: int) -> Run:
        from squall.simulate import simulate

        return simulate(self.scaled(rate, seed), seed=seed, **self.cluster)


class _Server(_Experiment):
    def __init__(self, trace: Trace, method: str, url: str, length: float, words: dict[str, Any]) -> None:
        super().__init__(trace, method)
        self.url, self.length, self.words = url, length, words
        if length <= 0:
            raise InputError("--step 0: a step needs some time, such as 60s.")

    def run(self, rate: float, seed: int) -> Run:
        from squall.replay import replay

        return replay(self.scaled(rate, seed), url=self.url, duration=self.length, seed=seed, **self.words)

    def expected(self, rate: float) -> float:
        return min(self.length, self.trace.span * self.trace.rate / rate)


# -------------------------------------------------------------------------------------------------------------- search


class _Stop(Exception):
    """The search ends before it is done; the argument is the state."""


class _Search:
    def __init__(
        self,
        experiment: _Experiment,
        limits: SLO,
        *,
        goal: float,
        precision: float,
        budget: float,
        seed: int,
        out: Path | None,
        callback: Callable[[Step], None] | None,
        repeatable: bool,
        method: str,
        notes: list[str],
    ) -> None:
        self.experiment, self.limits, self.goal, self.precision = experiment, limits, goal, precision
        self.budget, self.seed, self.out, self.callback = budget, seed, out, callback
        self.repeatable, self.method = repeatable, method
        self.began = time.monotonic()
        self.steps: list[Step] = []
        self.target: dict[str, Any] = {}
        self.step_time: str | None = None
        self.notes = notes
        self.most = experiment.trace.rate if method == "thin" else float("inf")

    def run(self, first: float) -> Capacity:
        state = "found"
        with progress("Searching") as _:
            try:
                self._bracket(first)
                self._bisect()
                self._below()
            except _Stop as stop:
                state = str(stop)
            except KeyboardInterrupt:
                state = "interrupted"
        return self._result(state)

    def _bracket(self, first: float) -> None:
        """Double while the rate passes, halve while it fails, until one of each is known."""
        rate = first
        self._try(rate)
        while self._pass() is None:
            rate /= 2
            if rate < first * LOWEST:
                raise _Stop("lowest misses")
            self._try(rate)
        while self._fail() is None:
            highest = max(self._rates("pass"))
            if highest >= min(self.most, first * HIGHEST):
                raise _Stop("highest passes")
            self._try(min(2 * highest, self.most))

    def _bisect(self) -> None:
        while (low := self._pass()) and (high := self._fail()) and high > low * (1 + self.precision):
            self._try(float(np.sqrt(low * high)))

    def _below(self) -> None:
        """Try rates below the answer; where one fails, search again below it."""
        for _ in range(3):
            answer = self._pass()
            if answer is None:
                raise _Stop("lowest misses")
            for share in BELOW:
                if not any(abs(rate / (answer * share) - 1) < 0.07 for rate in self._rates("pass")):
                    self._try(answer * share)
            if self._pass() == answer:
                return
            self.notes.append(
                f"{answer:.4g}/s passed although a lower rate failed: the answer lies below the lowest failure."
            )
            self._bisect()

    def _try(self, rate: float) -> None:
        """Run a step at `rate`, again while it is a close call and a repeat may tell."""
        for repeat in range(REPEATS if self.repeatable else 1):
            step = self._one(rate, self.seed + repeat)
            if step.verdict == "client-limited":
                step = self._one(rate, self.seed + repeat + REPEATS)  # once more: it may have been a hiccup
                if step.verdict == "client-limited":
                    raise _Stop("client-limited")
            if not step.close:
                return

    def _one(self, rate: float, seed: int) -> Step:
        spent = time.monotonic() - self.began
        longest = max((step.seconds for step in self.steps[-3:]), default=0.0)
        expected = max(self.experiment.expected(rate), longest if self.steps else 0.0)
        if self.steps and spent + expected > self.budget:
            raise _Stop("budget")
        began = time.monotonic()
        run = self.experiment.run(rate, seed)
        if run.meta.state == "interrupted":
            raise _Stop("interrupted")
        self.target, self.step_time = run.meta.target, run.meta.step_time
        step = self._judged(run, rate, time.monotonic() - began)
        self.steps.append(step)
        note(
            f"{rate:.4g}/s: {step.verdict}{' (close)' if step.close else ''}, {100 * step.met_share:.4g} % of "
            f"{step.requests:,} requests met the SLO, {in_words(step.seconds)}."
        )
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.out, msgspec.json.format(msgspec.json.encode(self._result("running")), indent=1) + b"\n")
        if self.callback:
            self.callback(step)
        return step

    def _judged(self, run: Run, rate: float, took: float) -> Step:
        requests = per_request(run.table)
        latency = latencies(requests)
        met, ok = requests_that_met(latency, self.limits), latency["ok"]
        scheduled = latency["scheduled"]
        span = float(np.ptp(scheduled)) if scheduled.size else 0.0
        offered = max(run.meta.offered, met.size)
        share = float(met.sum() / offered)
        low, high = _interval(met, scheduled, self.seed)
        limited = run.meta.verdict == "CLIENT-LIMITED"
        return Step(
            rate=rate,
            offered_rate=(scheduled.size - 1) / span if span > 0 else None,
            requests=offered,
            met_share=share,
            low=low,
            high=high,
            verdict="client-limited" if limited else "pass" if share >= self.goal else "fail",
            close=not limited and (low is None or high is None or low <= self.goal <= high),
            ttft_p99=statistic(latency["ttft"][ok]).p99,
            tpot_p99=statistic(latency["tpot"][ok]).p99,
            e2e_p99=statistic(latency["e2e"][ok]).p99,
            failed_share=1 - float(ok.sum()) / offered,
            seconds=took,
            reasons=run.meta.verdict_reasons if limited else [],
        )

    def _rates(self, verdict: Verdict) -> list[float]:
        """Rates with this verdict over all their repeats, ascending."""
        by_rate: dict[float, list[float]] = {}
        for step in self.steps:
            if step.verdict != "client-limited":
                by_rate.setdefault(step.rate, []).append(step.met_share)
        passed = {rate: bool(np.mean(shares) >= self.goal) for rate, shares in by_rate.items()}
        return sorted(rate for rate, ok in passed.items() if ok == (verdict == "pass"))

    def _fail(self) -> float | None:
        return min(self._rates("fail"), default=None)

    def _pass(self) -> float | None:
        """Highest rate that passed with nothing at or below it having failed."""
        lowest = self._fail()
        return max((rate for rate in self._rates("pass") if lowest is None or rate < lowest), default=None)

    def _result(self, state: str) -> Capacity:
        passed, failed = self._pass(), self._fail()
        sure_high = min((s.rate for s in self.steps if s.verdict == "fail" and not s.close), default=None)
        doubtful = min((s.rate for s in self.steps if s.verdict == "fail" or s.close), default=None)
        sure_low = max(
            (
                s.rate
                for s in self.steps
                if s.verdict == "pass" and not s.close and (doubtful is None or s.rate < doubtful)
            ),
            default=None,
        )
        return Capacity(
            state=state,
            capacity=passed,
            pass_rate=passed,
            fail_rate=failed,
            sure_low=sure_low,
            sure_high=sure_high,
            summary=self._summary(state, passed, failed, sure_low, sure_high),
            slo=self.limits.limits,
            goal=self.goal,
            source=self.experiment.trace.meta.source,
            scale_method=self.method,
            target=self.target,
            step_time=self.step_time,
            seed=self.seed,
            budget=self.budget,
            spent=time.monotonic() - self.began,
            steps=list(self.steps),
            notes=list(self.notes),
        )

    def _summary(
        self, state: str, passed: float | None, failed: float | None, low: float | None, high: float | None
    ) -> str:
        asked = f"{100 * self.goal:g} % of the requests within {self.limits}"
        if passed is None:
            least = "" if failed is None else f" Even {failed:.3g} requests/s misses it."
            return {
                "lowest misses": f"No load tried gives {asked}.{least}",
                "client-limited": f"The sender was the limit before the server: nothing is known.{least}",
            }.get(state, f"No load has been found yet that gives {asked}.{least}")
        text = f"Up to {passed:.3g} requests/s give {asked}"
        text += f"; {failed:.3g}/s does not." if failed is not None else "; no load tried fails."
        if low is not None and high is not None:
            text += f" Clear of chance are a pass at {low:.3g} and a fail at {high:.3g} requests/s."
        elif low is not None:
            text += f" Clear of chance is a pass at {low:.3g} requests/s, and no fail."
        elif high is not None:
            text += f" Clear of chance is a fail at {high:.3g} requests/s, and no pass."
        ends = {
            "highest passes": " Higher ones were not tried.",
            "budget": " The time budget ended the search.",
            "interrupted": " The search was interrupted.",
            "client-limited": " The sender could not go higher: this is a lower bound, not the server's limit.",
        }
        return text + ends.get(state, "")


def _interval(met: np.ndarray, scheduled: np.ndarray, seed: int) -> tuple[float | None, float | None]:
    """95 % interval of the share of `met`, resampled in blocks of neighbours by schedule; unknown for few blocks.

    Where all or none met it, the other side is bounded by the rule of three: 3 / n.
    """
    n = met.size
    if n < 2 * FEWEST_BLOCKS:
        return None, None
    share = float(met.mean())
    if share in (0.0, 1.0):
        return max(0.0, share - 3 / n), min(1.0, share + 3 / n)
    ordered = met[np.argsort(scheduled, kind="stable")]
    cell = cells_of(n)
    found = deviations(ratio(np.bincount(cell, ordered), np.bincount(cell)), seed)
    if found.blocks < FEWEST_BLOCKS:
        return None, None
    down, up = found.interval(0.05, studentised=False)
    return max(0.0, share + down), min(1.0, share + up)


callable_room(__name__)
