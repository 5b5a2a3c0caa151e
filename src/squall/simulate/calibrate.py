"""Fitting the step time to a recorded run: which coefficients make the simulated latencies those that were measured?

    minimise  sum over requests of rho((TTFT_sim - TTFT)/TTFT) + rho((E2E_sim - E2E)/E2E)
              + sum over coefficients of ((value - default) / spread)^2 / 2

rho is robust (soft L1, in units of the noise that the best fit leaves over). Where the times of all tokens are known,
the steps themselves are seen (seen.py), and there is a sum of rho((step_sim - step)/step) too. The last sum is the
prior: it decides where a run says nothing about a coefficient, and the physical bounds hold everywhere (without them a
fit hides kernel time in host time). The recorded requests are simulated as they were sent, with the limits of their
engine. Fitting on the first N requests uses only their latencies; the requests sent while these were being served are
simulated too, because they share the engine, but nothing of their recorded latency is used, so that they can serve to
test the fit.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import polars as pl

from squall import __version__
from squall.errors import InputError
from squall.files import replace_file
from squall.progress import note, progress
from squall.run.table import Run, RunSource
from squall.seeds import DEFAULT_SEED, stream
from squall.simulate.cluster import DEFAULT_ENGINE, Cluster, resolve
from squall.simulate.engine import Outcome, run_requests
from squall.simulate.hardware import GPU, Model
from squall.simulate.records import TICKS
from squall.simulate.seen import FEWEST, Steps, steps_seen
from squall.simulate.step_time import BOUNDS, Bound, StepTable, StepTime
from squall.trace.table import Trace

BUILT_IN = Path(__file__).parent / "calibrations"
"""Fitted by benchmarks/derive_calibrations.py, which names their sources."""

TIMES = ("sent", "first_token", "last_token", "request_tokens", "response_tokens")
"""The columns of a run that a fit needs."""

_RATES = ("per_sequence", "per_kv_token", "per_attention_pair")
"""Of a step table."""

LEAST = 20
"""Fewer requests than this are not a basis for a fit."""

STEPS, POLISH, ROUGH = 12, 150, 5
"""Of the search: Gauss-Newton steps from a start, random steps at the end, and how often at most a rough search looks
again at what noise there is."""

DISTANCES = (0.1, 0.3, 0.6)
"""In spreads: what a coefficient is moved by to see its influence. Far enough for jumps to average out."""

DECISIVE = 10.0
"""By how much (a log posterior) one kind of engine must explain a run better to be taken for the right one."""

HOST_SLOPE = 15e-6
"""Seconds by which the recorded time per token rises more than the fitted with each request beside, from where on the
host is suspected."""

BLOCK, STEP_BLOCK = 10, 20
"""So many neighbouring requests, which wait for the same steps, count as one observation; and so many steps that were
seen, which share what the machine did meanwhile."""

TAKEN_TOGETHER, SENT_TOGETHER = 0.3, 0.02
"""Of the requests that follow another within two steps, how many an engine takes over at the same moment; and how
likely clients are to send so many at one moment themselves."""

LONG_QUEUE = 200.0
"""So many steps before a first token, one more or less is not looked for."""

TAKEN = Bound(0.0, 5e-3, 0.5e-3)
"""Of a0 where `sent` is when the engine took a request over: what it still does before the step begins."""

JUST_AFTER = 1e-6
"""Seconds: too late for a step, and no time otherwise."""

TTFT, E2E, STEP = range(3)
"""The kinds of errors."""

LEAST_NOISE, HOPED, MOST_NOISE = 0.002, 0.01, 0.2
"""The standard deviation of relative errors that a good model leaves over: the least, what is hoped for, and the most;
errors beyond it count linearly."""

OUTLIER = 6.0
"""So many robust standard deviations off, a step was not what it was taken for, or the machine stood still."""


class Errors(msgspec.Struct, frozen=True):
    """Simulated / recorded - 1 of the statistics over the same requests, and the mean absolute error per request. Of
    several runs of the same a statistic is the median over the runs."""

    requests: int
    mean: dict[str, float]
    p50: dict[str, float]
    p99: dict[str, float]
    mean_absolute: dict[str, float]
    preemptions: tuple[int, int | None] | None = None
    """Simulated and recorded; recorded is null where the run does not say."""
    steps: float | None = None
    """Predicted / seen - 1 of all the time of the steps that were seen: what the machine was slower or faster than when
    the fit was made, and what the step time does not explain."""


class Spread(msgspec.Struct, frozen=True):
    """How far real runs of the same requests differ: half the width of the 95 % interval of the median over the runs
    (between two of them, by the binomial law; of fewer than six between the outermost), relative to it, of each
    statistic. No model can be shown to be closer than that."""

    runs: int
    mean: dict[str, float]
    p50: dict[str, float]
    p99: dict[str, float]
    preemptions: list[int | None]
    """Of each run."""


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """A fitted step time: for which engine it holds, from which data it comes, and how well it does."""

    source: str
    sha256: str
    """Of the recorded times and lengths that were read."""
    date: str
    squall: str
    model: Model
    gpu: GPU
    tp: int
    dtype: str = "bf16"
    engine: str
    kv_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    prefix_caching: bool = False
    """Whether preempted requests found their own blocks again in the simulations that it was fitted with."""
    step_time: StepTime
    fitted: dict[str, tuple[float, float]]
    """The coefficients that were fitted, each with its 95 % interval."""
    informed: dict[str, float] = {}
    """How much of what was unknown about each the data settled: 0 nothing (it stays near its default), 1 all."""
    correlations: dict[str, float]
    """Between the fitted coefficients, `e_bw~e_fl`: near 1 or -1 only a combination of the two is known."""
    errors: dict[str, Errors]
    """On `fit` (the requests used), `held_out` (not used) and `all`. Where all were used for the coefficients,
    `held_out` is what a fit on the first half predicts for the second."""
    slower: list[float] = []
    """How many times as long as the fit has them the steps took, in each round of measurements of a live server. The
    tests of a round were predicted at this speed."""
    spread: dict[str, Spread] = {}
    """By test, where a live server was sent the same several times; `errors` are then of the medians over the runs."""
    valid: dict[str, tuple[float, float]]
    """Ranges that the data covered: request_tokens, response_tokens, running."""
    notes: list[str] = []

    @property
    def name(self) -> str:
        """What a run that uses it says of its step time."""
        kind = "held_out" if "held_out" in self.errors else "fit"
        errors = self.errors[kind]
        return (
            f"calibrated on {Path(self.source).name}, {self.date} ({kind.replace('_', '-')} error over"
            f" {errors.requests} requests:"
            f" mean TTFT {errors.mean['ttft']:+.1%}, mean E2E {errors.mean['e2e']:+.1%})"
        )

    def remarks(self, trace: Trace, cluster: Cluster) -> list[str]:
        """What must be said when `trace` is simulated on `cluster` with this calibration."""
        said = list(self.notes)
        if cluster.engine != self.engine:
            said.append(f"The step time was calibrated under {self.engine}; host times of {cluster.engine} may differ.")
        for column in ("request_tokens", "response_tokens"):
            low, high = self.valid[column]
            outside = int(((trace.table[column] > high) | (trace.table[column] < low)).sum())
            if outside:
                said.append(
                    f"{outside:,} of {len(trace):,} requests have {column} outside the calibrated range of"
                    f" {low:,.0f} to {high:,.0f}."
                )
        return said


class Fit(NamedTuple):
    """The result of `fit_coefficients`."""

    cluster: Cluster
    intervals: dict[str, tuple[float, float]]
    correlations: dict[str, float]
    informed: dict[str, float]
    notes: list[str]
    misfit: float
    """Minus the logarithm of the posterior, up to a constant that fits to the same recordings share."""


class Recording(NamedTuple):
    """Requests that one engine served, in the order of their sending."""

    table: pl.DataFrame
    n: int
    """The latencies of the first n are to be met; the others are load."""
    cold: bool = False
    """Whether the engine had served nothing before: what the first request took beyond its steps is its warm-up."""
    taken: bool = False
    """Whether `sent` is when the engine took a request over, which it does between two steps: the rest of the step that
    a client waits for is not in its TTFT then."""


def calibrate_run(
    *,
    run: RunSource,
    out: str | Path | None = None,
    first: int | None = None,
    seed: int = DEFAULT_SEED,
    **words: Any,
) -> Calibration:
    """Fit the simulator's step time to a recorded run; see `squall.calibrate`. `words` are keywords of `resolve`."""
    from squall.run.files import read_run

    name = "the run in memory" if isinstance(run, Run) else str(run)
    recorded = read_run(run)
    table, said = requests_of(recorded, name)
    clusters = [resolve(**words)]
    if words.get("engine") is None:
        clusters.append(resolve(**words | {"engine": f"{DEFAULT_ENGINE}-sync"}))
    n = len(table) if first is None else first
    if not LEAST <= n <= len(table):
        raise InputError(
            f"--first {n}: {name} has {len(table)} answered requests; a fit needs at least {LEAST} and at most"
            " all of them."
        )
    blocks_known = words.get("kv_blocks") is not None
    steps = _steps_until(recorded, table, n, clusters[0])
    cluster, how, start = _reading(clusters, Recording(table, n, cold=True), steps, blocks_known, said)
    free = _free(cluster, blocks_known=blocks_known)
    fit = fit_coefficients(cluster, [how], free, seed, steps, start)
    everything = simulated_requests(table, fit.cluster, how)
    errors = {"fit": _errors(table[:n], everything[:n])}
    if n < len(table):
        errors["held_out"] = _errors(table[n:], everything[n:])
    elif n >= 2 * LEAST:
        steps = _steps_until(recorded, table, n // 2, cluster)
        half = fit_coefficients(cluster, [how._replace(n=n // 2)], free, seed, steps, start)
        errors["held_out"] = _errors(table[n // 2 :], simulated_requests(table, half.cluster, how)[n // 2 :])
    errors["all"] = _errors(table, everything)
    if "kv_blocks" in free:
        said.append(
            f"The block count was not given and was fitted too: {fit.cluster.kv_blocks:,}; the server's own number"
            " (num_gpu_blocks) is better."
        )
    result = calibration_of(fit, errors, [how], name, said)
    write_calibration(result, out)
    return result


def _steps_until(run: Run, table: pl.DataFrame, n: int, cluster: Cluster) -> Steps | None:
    """The steps that were seen before any but the first `n` requests had a token; None if too few were."""
    before = float(table["first_token"][n:].min()) if n < len(table) else np.inf  # type: ignore[arg-type]
    steps = steps_seen([run], cluster.max_num_batched_tokens, before)
    return steps if len(steps.took) >= FEWEST else None


def calibration_of(
    fit: Fit, errors: dict[str, Errors], recordings: list[Recording], source: str, said: list[str]
) -> Calibration:
    """All that is known about a fit, in one record."""
    cluster = fit.cluster
    used = [it.table[: it.n] for it in recordings]
    digest = sha256()
    for it in recordings:
        digest.update(np.ascontiguousarray(it.table.select(TIMES).to_numpy()).tobytes())
    return Calibration(
        source=source,
        sha256=digest.hexdigest(),
        date=datetime.now(UTC).date().isoformat(),
        squall=__version__,
        model=cluster.model,
        gpu=cluster.gpu,
        tp=cluster.tp,
        dtype={2.0: "bf16", 1.0: "fp8"}.get(cluster.model.weight_bytes, f"{cluster.model.weight_bytes:g} bytes"),
        engine=cluster.engine,
        kv_blocks=cluster.kv_blocks,
        block_size=cluster.block_size,
        max_num_seqs=cluster.max_num_seqs,
        max_num_batched_tokens=cluster.max_num_batched_tokens,
        max_model_len=cluster.max_model_len,
        prefix_caching=cluster.choices.own_blocks,
        step_time=cluster.step_time,
        fitted=fit.intervals,
        informed=fit.informed,
        correlations=fit.correlations,
        errors=errors,
        valid={
            "request_tokens": _extremes(pl.concat([table["request_tokens"] for table in used])),
            "response_tokens": _extremes(pl.concat([table["response_tokens"] for table in used])),
            "running": (1.0, float(max(_most_at_once(table) for table in used))),
        },
        notes=[*said, *fit.notes],
    )


def write_calibration(calibration: Calibration, out: str | Path | None) -> None:
    """Say its notes, and write it as JSON if `out` is given."""
    for line in calibration.notes:
        note(f"note: {line}")
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(out), msgspec.json.format(msgspec.json.encode(calibration), indent=2) + b"\n")


def read_calibration(source: str | Path | Calibration) -> Calibration:
    """The calibration called `source`, or in the file there that `calibrate` wrote, or itself. Raises InputError."""
    if isinstance(source, Calibration):
        return source
    path = BUILT_IN / f"{source}.json"
    try:
        found = msgspec.json.decode((path if path.is_file() else Path(source)).read_bytes(), type=Calibration)
        _check(found)
    except FileNotFoundError:
        names = ", ".join(sorted(path.stem for path in BUILT_IN.glob("*.json")))
        raise InputError(
            f"--calibration {source}: there is no such file; `squall calibrate` makes one, and built in is {names}."
        ) from None
    except OSError as error:
        raise InputError(f"--calibration {source}: it cannot be read: {error.strerror}.") from error
    except (msgspec.DecodeError, msgspec.ValidationError, ValueError) as error:
        raise InputError(f"--calibration {source}: not a file that `squall calibrate` made: {error}.") from None
    return found


def _check(calibration: Calibration) -> None:
    """Raise ValueError for what no fit can have written."""
    calibration.model.check()
    calibration.step_time.check()
    for kind in ("held_out", "fit"):
        errors = calibration.errors.get(kind)
        if errors is not None and not {"ttft", "e2e"} <= errors.mean.keys():
            raise ValueError(f"errors.{kind}.mean has no ttft or no e2e")
    if not {"held_out", "fit"} & calibration.errors.keys():
        raise ValueError("errors has neither held_out nor fit")
    if not {"request_tokens", "response_tokens"} <= calibration.valid.keys():
        raise ValueError("valid has no request_tokens or no response_tokens")


def calibrated(calibration: Calibration, words: dict[str, Any]) -> Cluster:
    """The cluster that `words` (keywords of `resolve`) describe with the calibration's step time.

    What is not given is as calibrated; with `prefix_caching` what it says of resumed requests is included. Raises
    InputError if the model, the GPU or tp contradict the calibration.
    """
    held = {name: getattr(calibration, name) for name in ("model", "gpu", "tp", "engine", "kv_blocks", "block_size")}
    held |= {name: getattr(calibration, name) for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len")}
    given = {name: value for name, value in words.items() if value is not None}
    held["own_blocks"] = calibration.prefix_caching and not given.get("prefix_caching", False)
    cluster = resolve(**(held | given), step_time=calibration.step_time, step_time_name=calibration.name)
    for flag, mine, theirs in (
        ("--model", cluster.model, calibration.model),
        ("--gpu", cluster.gpu, calibration.gpu),
        ("--tp", cluster.tp, calibration.tp),
    ):
        if mine != theirs:
            raise InputError(
                f"{flag} {getattr(mine, 'name', mine)}: the calibration is for {calibration.model.name} on"
                f" {calibration.tp} x {calibration.gpu.name}; leave the flag out or calibrate anew."
            )
    return cluster if "kv_blocks" in given else msgspec.structs.replace(cluster, kv_blocks_from="the calibration")


def fit_coefficients(
    cluster: Cluster,
    recordings: list[Recording],
    free: tuple[str, ...],
    seed: int,
    steps: Steps | None = None,
    start: np.ndarray | None = None,
) -> Fit:
    """The cluster that meets the recordings, and the steps that were seen, best, over the coefficients (or `kv_blocks`)
    in `free`.

    A maximum a posteriori fit: each coefficient has a prior, normal around its default with the spread of BOUNDS, so
    that what the data leave open stays where other servers are. Gauss-Newton steps on the weighted residuals, with
    derivatives over a finite distance, since who is preempted when changes in jumps; from several starts, one of which
    is `start` (as `_reading` has it), if there is one.
    """
    fit = _Problem(cluster, recordings, free, steps).solve(seed, start)
    slope = _host_slope(fit.cluster, recordings, steps) if "o1" in free else 0.0
    if slope < HOST_SLOPE:
        return fit
    # The host is slower than the prior expects: that is another kind of server, tried beside the usual one.
    slope += fit.cluster.step_time.o1
    bound = Bound(0.0, 3 * slope, slope)
    host_bound = _Problem(_with(cluster, {"o1": slope}), recordings, free, steps, {"o1": bound}).solve(seed)
    if host_bound.misfit > fit.misfit - DECISIVE:
        return fit
    said = (
        f"This server is host-bound: a step takes {host_bound.cluster.step_time.o1 * 1e6:.0f} us longer with each"
        " sequence, which its GPU does not explain."
    )
    return host_bound._replace(notes=[said, *host_bound.notes])


def _reading(
    clusters: list[Cluster], recording: Recording, steps: Steps | None, blocks_known: bool, said: list[str]
) -> tuple[Cluster, Recording, np.ndarray]:
    """Which of the clusters (they differ in the engine) served the recording, and whose clock it has, by a rough fit of
    each, and that fit. What was found is added to `said`."""
    found = []
    for cluster in clusters:
        free = _free(cluster, blocks_known=blocks_known)
        for taken in (False, True) if _clock_matters(recording) else (False,):
            how = recording._replace(taken=taken)
            of = _with(cluster, {"a0": TAKEN.spread}) if taken else cluster
            with progress(f"Trying {cluster.engine}, times of the {'engine' if taken else 'client'}"):
                z, misfit = _Problem(of, [how], free, steps).rough()
            found.append((misfit - taken * _taken_together(recording), of, how, z))
    best = min(found, key=lambda it: it[0])
    if best[2].taken:
        lead = min(it[0] for it in found if not it[2].taken) - best[0]
        said.append(
            "The sending times look like those at which the engine took a request over, between two steps (by"
            f" {lead:.1f} in the log posterior): a client waits for the rest of a step longer than the recorded TTFT."
        )
    if len(clusters) > 1:
        lead = min(it[0] for it in found if it[1].engine != best[1].engine) - best[0]
        said.append(
            f"--engine was not given; {best[1].engine} explains the run better than"
            f" {next(it.engine for it in clusters if it.engine != best[1].engine)} (by {lead:.1f} in the log posterior)"
            + (" and was taken." if lead >= DECISIVE else ", which is no proof: give it if you know.")
        )
    return best[1:]


def _step_of(table: pl.DataFrame) -> float:
    """The median time per token after the first, seconds; 0 where there is none."""
    gaps = table["response_tokens"].to_numpy() - 1
    took = (table["last_token"] - table["first_token"]).to_numpy()
    return float(np.median(took[gaps > 0] / gaps[gaps > 0])) if (gaps > 0).any() else 0.0


def _clock_matters(recording: Recording) -> bool:
    """Whether the rest of a step is anything beside the time to a first token."""
    table = recording.table[: recording.n]
    return float((table["first_token"] - table["sent"]).to_numpy().mean()) < LONG_QUEUE * _step_of(table)


def _taken_together(recording: Recording) -> float:
    """The logarithm of how much likelier the gaps between the sending times are if an engine takes requests over
    between steps: many at the same moment, none while a step runs."""
    table = recording.table[: recording.n]
    gaps, step = np.diff(table["sent"].to_numpy()), _step_of(table)
    near, same = int((gaps < 2 * step).sum()), int((gaps < 0.02 * step).sum())
    engine = same * np.log(TAKEN_TOGETHER) + (near - same) * np.log(1 - TAKEN_TOGETHER)
    client = same * np.log(0.01) + (near - same) * np.log(0.99)
    return float(engine - np.logaddexp(np.log(1 - SENT_TOGETHER) + client, np.log(SENT_TOGETHER) + engine))


def disagreement(cluster: Cluster, recordings: list[Recording]) -> float:
    """Minus the logarithm of the likelihood of the recorded latencies on `cluster`, up to a constant."""
    problem = _Problem(cluster, recordings, ())
    nothing = np.empty(0)
    residuals = problem.residuals(nothing)
    problem.set_noise(residuals)
    return problem.misfit(residuals, nothing) + problem.norm()


class _Problem:
    """The least-squares problem. Coefficients are measured in spreads from their prior mean: z = (value - mean)/spread.

    The errors of requests that wait for each other go together, so BLOCK neighbours count as one observation. There are
    three kinds of residuals, in one array: of TTFT, of E2E, and of steps.
    """

    def __init__(
        self,
        cluster: Cluster,
        recordings: list[Recording],
        free: tuple[str, ...],
        steps: Steps | None = None,
        bounds_of: dict[str, Bound] | None = None,
    ) -> None:
        self.cluster, self.free, self.steps = cluster, free, steps
        # Relative to what is expected, not to what was measured: so their mean is met, which latencies are made of.
        self.expected = np.empty(0) if steps is None else steps.seconds(cluster)
        self.mean = np.array([_value(cluster, name) for name in free], dtype=float)
        bounds_of = ({"a0": TAKEN} if any(it.taken for it in recordings) else {}) | (bounds_of or {})
        bounds = [bounds_of.get(name) or _bound(cluster, name) for name in free]
        self.spread = np.array([bound.spread for bound in bounds])
        self.low = (np.array([bound.low for bound in bounds]) - self.mean) / self.spread
        self.high = (np.array([bound.high for bound in bounds]) - self.mean) / self.spread
        self.parts = [_Part.of(recording) for recording in recordings]
        requests = sum(len(part.ttft) for part in self.parts)
        self.kind = np.repeat([TTFT, E2E, STEP], [requests, requests, 0 if steps is None else len(steps.took)])
        self.block = np.array([BLOCK, BLOCK, STEP_BLOCK])[self.kind]
        self.noise = np.full(len(self.kind), LEAST_NOISE)
        self.plain = False
        """Whether own blocks are left out for the moment: near enough for slopes and first guesses, and sooner done."""

    def at(self, z: np.ndarray) -> Cluster:
        """The cluster with these coefficients."""
        return _with(self.cluster, dict(zip(self.free, (self.mean + z * self.spread).tolist(), strict=True)))

    def residuals(self, z: np.ndarray) -> np.ndarray:
        """(n,) relative errors, of the kinds in `kind`."""
        cluster = _plain(self.at(z)) if self.plain else self.at(z)
        each = [part.residuals(cluster) for part in self.parts]
        rows = [np.concatenate(rows) for rows in zip(*each, strict=True)]
        if self.steps is not None:
            rows.append((self.steps.seconds(cluster) - self.steps.took) / self.expected)
        return np.concatenate(rows)

    def weight(self, residuals: np.ndarray) -> np.ndarray:
        """(n,) of the residuals' squares, as they lie on the soft L1."""
        return 1 / (np.sqrt(1 + (residuals / self.noise) ** 2) * self.block * self.noise**2)

    def misfit(self, residuals: np.ndarray, z: np.ndarray) -> float:
        """Minus the logarithm of the posterior, up to a constant."""
        scaled = residuals / self.noise
        return float((2 * (np.sqrt(1 + scaled**2) - 1) / self.block).sum() + z @ z) / 2

    def descend(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """From `z` to a minimum: where, its residuals, its misfit."""
        residuals = self.residuals(z)
        best = self.misfit(residuals, z)
        for _ in range(STEPS):
            slopes, weight = self.slopes(z), self.weight(residuals)
            hessian = (slopes * weight) @ slopes.T + np.eye(len(z))
            step = -np.linalg.solve(hessian, slopes @ (weight * residuals) + z)
            for share in (1.0, 0.5, 0.25, 0.1, 0.03):
                there = np.clip(z + share * step, self.low, self.high)
                new = self.residuals(there)
                misfit = self.misfit(new, there)
                if misfit < best:
                    break
            else:
                break
            done = best - misfit < 5e-3 * best
            z, residuals, best = there, new, misfit
            if done:
                break
        return z, residuals, best

    def slopes(self, z: np.ndarray) -> np.ndarray:
        """(coefficients, n): of the residuals; the least-squares line over DISTANCES to both sides."""
        rows, plain, self.plain = [], self.plain, True
        for k in range(len(z)):
            rise, run = np.zeros(()), 0.0
            for distance in DISTANCES:
                above, below = z.copy(), z.copy()
                above[k], below[k] = min(z[k] + distance, self.high[k]), max(z[k] - distance, self.low[k])
                width = above[k] - below[k]
                rise = rise + width * (self.residuals(above) - self.residuals(below))
                run += width**2
            rows.append(rise / run)
        self.plain = plain
        return np.array(rows)

    def starts(self, seed: int) -> list[np.ndarray]:
        """The prior mean, points drawn from the prior, and where the host is what steps wait for."""
        random = stream(seed, "calibration")
        points = [np.zeros(len(self.free)), *random.normal(size=(3, len(self.free)))]
        if "o0" in self.free and self.cluster.profile.async_scheduling:
            slow = np.zeros(len(self.free))
            at = self.free.index("o0")
            slow[at] = (0.9 * min(part.shortest_step for part in self.parts) - self.mean[at]) / self.spread[at]
            points.append(slow)
            if "o1" in self.free:  # and it slows down with every sequence, by 1.5 spreads
                slower = slow.copy()
                slower[self.free.index("o1")] = 1.5
                points.append(slower)
        return [np.clip(point, self.low, self.high) for point in points]

    def rough(self) -> tuple[np.ndarray, float]:
        """What is found at once, and its misfit, comparable with that of another."""
        self.plain = True
        self.set_noise(self.residuals(np.zeros(len(self.free))))
        starts = self.starts(0)
        found = min((self.descend(start) for start in (starts[0], starts[-1])), key=lambda found: found[2])
        for _ in range(ROUGH):
            before = self.noise.copy()
            self.set_noise(found[1])
            found = self.descend(found[0])
            if (self.noise > 0.9 * before).all():
                break
        return found[0], found[2] + self.norm()

    def settled(self, z: np.ndarray, residuals: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """`descend` with the noise that was found at `z`, and a misfit that can be compared with that of others."""
        self.set_noise(residuals)
        z, residuals, _ = self.descend(z)
        self.set_noise(residuals)
        return z, residuals, self.misfit(residuals, z) + self.norm()

    def norm(self) -> float:
        """The noise's own share of the misfit: its width was fitted too, so only with it can two fits be compared."""
        return float((np.log(self.noise) / self.block).sum())

    def solve(self, seed: int, start: np.ndarray | None = None) -> Fit:
        with progress(f"Fitting {', '.join(self.free)}"):
            self.plain = True
            starts = self.starts(seed)
            if start is not None:
                starts = [start, *starts[1:3]]
            self.set_noise(self.residuals(starts[0]))
            found = [self.descend(each) for each in starts]
            z, residuals, _ = min(found, key=lambda result: result[2])
            # What leaves much over finds much noise, and has no reason to be better then: look from below, too.
            self.noise[:] = HOPED
            low, left, _ = self.descend(z)
            z, residuals, _ = min(self.settled(z, residuals), self.settled(low, left), key=lambda result: result[2])
            self.plain = False
            for _ in range(2):
                self.set_noise(residuals)  # what the best fit leaves over
                z, residuals, misfit = self.descend(z)
                z, residuals, misfit = self.polish(z, residuals, misfit, self.covariance(z, residuals), seed)
            covariance = self.covariance(z, residuals)
        return self.described(z, covariance, misfit + self.norm())

    def covariance(self, z: np.ndarray, residuals: np.ndarray) -> np.ndarray:
        """Of the posterior at `z`, in spreads, as if it were normal."""
        slopes = self.slopes(z)
        return np.linalg.inv((slopes * self.weight(residuals)) @ slopes.T + np.eye(len(z)))

    def set_noise(self, residuals: np.ndarray) -> None:
        """The standard deviation of each kind of residuals: a robust one of latencies; of steps, that without the
        outliers, since a narrower one would make the fit that of the median."""
        for kind in np.unique(self.kind):
            of = np.abs(residuals[self.kind == kind])
            spread = 1.4826 * np.median(of)
            if kind == STEP:
                spread = np.sqrt(np.mean(of[of <= OUTLIER * spread] ** 2))
            self.noise[self.kind == kind] = np.clip(spread, LEAST_NOISE, MOST_NOISE)

    def polish(
        self, z: np.ndarray, residuals: np.ndarray, misfit: float, covariance: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """The best of the neighbourhood: random steps of the posterior's shape, ever shorter while they do not help."""
        random, size, shape = stream(seed, "polish"), 0.5, np.linalg.cholesky(covariance)
        for _ in range(POLISH):
            there = np.clip(z + size * shape @ random.normal(size=len(z)), self.low, self.high)
            new = self.residuals(there)
            value = self.misfit(new, there)
            size *= 1.3 if value < misfit else 0.98
            if value < misfit:
                z, residuals, misfit = there, new, value
        return z, residuals, misfit

    def described(self, z: np.ndarray, covariance: np.ndarray, misfit: float) -> Fit:
        deviation = np.sqrt(np.diag(covariance))
        ends = [np.clip(z + side * 1.96 * deviation, self.low, self.high) for side in (-1, 1)]
        low, high = (self.mean + end * self.spread for end in ends)
        informed = {name: float(np.clip(1 - deviation[k] ** 2, 0, 1)) for k, name in enumerate(self.free)}
        correlations, notes = {}, []
        for j, other in enumerate(self.free):
            for i, one in enumerate(self.free[:j]):
                r = float(covariance[i, j] / (deviation[i] * deviation[j]))
                correlations[f"{one}~{other}"] = r
                if abs(r) > 0.9:
                    notes.append(
                        f"{one} and {other} cannot be told apart in this run (correlation {r:+.2f}):"
                        " trust them together, not singly."
                    )
        silent = [name for name, share in informed.items() if share < 0.5]
        if silent:
            notes.append(f"The data say little about {', '.join(silent)}: near the default, with its usual spread.")
        for k, name in enumerate(self.free):
            if informed[name] >= 0.5 and (z[k] - self.low[k] < 1e-3 or self.high[k] - z[k] < 1e-3):
                notes.append(
                    f"{name} lies at its physical bound ({self.mean[k] + z[k] * self.spread[k]:.3g}): the data hold"
                    " time that the model has no place for, or the GPU or model are not those named."
                )
        intervals = {name: (float(low[k]), float(high[k])) for k, name in enumerate(self.free)}
        return Fit(self.at(z), intervals, correlations, informed, notes, misfit)


def _host_slope(cluster: Cluster, recordings: list[Recording], steps: Steps | None) -> float:
    """Seconds by which a step, or else the recorded time per token, rises with each request that runs beside, beyond
    what `cluster` makes of the same."""
    decodes = None if steps is None else steps.tokens == steps.sequences
    if steps is not None and decodes is not None and np.unique(steps.sequences[decodes]).size > 1:
        beyond = steps.took - steps.seconds(cluster)
        return float(np.polyfit(steps.sequences[decodes], beyond[decodes], 1)[0])
    slopes = []
    for it in recordings:
        table, n = it.table, it.n
        simulated = simulated_requests(table, cluster, it)
        begin = table["sent"].to_numpy()
        of = [
            (table["first_token"].to_numpy(), table["last_token"].to_numpy()),
            (begin + simulated["ttft"].to_numpy(), begin + simulated["e2e"].to_numpy()),
        ]
        gaps = table["response_tokens"].to_numpy() - 1
        for first, last in of:
            middle = (first + last) / 2
            beside = np.searchsorted(np.sort(first), middle) - np.searchsorted(np.sort(last), middle)
            several = (gaps > 0) & (np.arange(len(gaps)) < n)
            if several.sum() < LEAST or np.ptp(beside[several]) == 0:
                return 0.0
            per_token, weight = (last - first)[several] / gaps[several], np.sqrt(gaps[several])
            slopes.append(np.polyfit(beside[several], per_token, 1, w=weight)[0])
    recorded, expected = np.array(slopes).reshape(-1, 2).mean(axis=0)
    return float(recorded - expected)


class _Part(NamedTuple):
    """One recording, ready to be simulated."""

    load: tuple[np.ndarray, np.ndarray, np.ndarray]
    ttft: np.ndarray
    e2e: np.ndarray
    shortest_step: float
    recording: Recording

    @classmethod
    def of(cls, recording: Recording) -> "_Part":
        table, n = recording.table, recording.n
        # Only requests sent before the last of the first n was answered can have had any influence on these.
        load = _columns(table.filter(pl.col("sent") <= table["last_token"][:n].max()))
        ttft, e2e = ((table[column] - table["sent"]).to_numpy()[:n] for column in ("first_token", "last_token"))
        gaps = table["response_tokens"].to_numpy()[:n] - 1
        steps = (e2e - ttft)[gaps > 0] / gaps[gaps > 0]
        return cls(load, ttft, e2e, float(steps.min()) if steps.size else float(ttft.min()), recording)

    def residuals(self, cluster: Cluster) -> np.ndarray:
        """(2, n) relative errors of TTFT and E2E."""
        ttft, e2e, _ = _served(self.load, cluster, self.recording, self.ttft[0])
        n = len(self.ttft)
        # A short TTFT is a few steps of waiting, give or take one: below half the median, errors count absolutely.
        floor = np.maximum(self.ttft, 0.5 * np.median(self.ttft))
        return np.stack([(ttft[:n] - self.ttft) / floor, (e2e[:n] - self.e2e) / self.e2e])


def table_names(step: StepTime) -> tuple[str, ...]:
    """The names under which the numbers of a step table are fitted: the rise of its base from point to point, so that
    it never falls, and the rates."""
    return tuple(_table_values(step))


def _table_values(step: StepTime) -> dict[str, float]:
    if step.table is None:
        return {}
    tokens, seconds = np.array(step.table.points).T
    rises = zip(tokens, np.diff(seconds, prepend=0.0), strict=True)
    return {f"rise@{at:g}": float(rise) for at, rise in rises} | {name: getattr(step.table, name) for name in _RATES}


def slowed(cluster: Cluster, factor: float) -> Cluster:
    """`cluster` with steps that take so many times as long."""
    step, table = cluster.step_time, cluster.step_time.table
    if table is not None:
        rates = {name: factor * getattr(table, name) for name in _RATES}
        table = StepTable(points=[(at, factor * seconds) for at, seconds in table.points], **rates)
    longer = {name: factor * getattr(step, name) for name in ("o0", "o1", "o2", "o_gap", "t_row", "alpha_ar")}
    longer |= {name: getattr(step, name) / factor for name in ("e_bw", "e_kv", "e_fl", "e_at", "bw_ar")}
    return msgspec.structs.replace(cluster, step_time=msgspec.structs.replace(step, table=table, **longer))


def _value(cluster: Cluster, name: str) -> float:
    if name == "kv_blocks":
        return cluster.kv_blocks
    known = _table_values(cluster.step_time)
    return known[name] if name in known else getattr(cluster.step_time, name)


def _bound(cluster: Cluster, name: str) -> Bound:
    if name == "kv_blocks":
        return Bound(0.5 * cluster.kv_blocks, 2.0 * cluster.kv_blocks, 0.15 * cluster.kv_blocks)
    known = _table_values(cluster.step_time)
    if name in known:  # first guessed from medians; what is small beside a whole step may be all wrong
        step = sum(value for other, value in known.items() if other.startswith("rise@"))
        least = {"per_sequence": step / 300, "per_kv_token": step / 1e5, "per_attention_pair": step / 1e7}
        return Bound(0.0, np.inf, 0.3 * known[name] + 0.1 * least.get(name, step / 10))
    bound = BOUNDS[name]
    if cluster.model.experts and name in ("e_bw", "e_fl"):  # the kernels of experts are further from the peak
        return Bound(bound.low / 3, bound.high, 2 * bound.spread)
    return bound


def _with(cluster: Cluster, values: dict[str, float]) -> Cluster:
    """`cluster` with these coefficients, one of which may be `kv_blocks`."""
    step, table = cluster.step_time, cluster.step_time.table
    blocks = round(values.pop("kv_blocks", cluster.kv_blocks))
    if table is not None:
        at = [point for point, _ in table.points]
        known = _table_values(step) | {name: max(0.0, value) for name, value in values.items()}
        seconds = np.cumsum([known[f"rise@{point:g}"] for point in at])
        rates = {name: known[name] for name in _RATES}
        points = list(zip(at, seconds.tolist(), strict=True))
        step = msgspec.structs.replace(step, table=StepTable(points=points, **rates))
    rest = {name: value for name, value in values.items() if name in BOUNDS}
    return msgspec.structs.replace(cluster, step_time=msgspec.structs.replace(step, **rest), kv_blocks=blocks)


def _plain(cluster: Cluster) -> Cluster:
    """`cluster` without looking for own blocks."""
    return msgspec.structs.replace(cluster, choices=msgspec.structs.replace(cluster.choices, own_blocks=False))


def roofline_names(cluster: Cluster) -> tuple[str, ...]:
    """The coefficients of its steps, of those that can be told from measurements. Asynchronous scheduling hides host
    time; what shows of it is the gap, and o0 to o2 where the host is the slower one."""
    names: tuple[str, ...] = ("e_bw", "e_fl", "e_kv", "e_at", "t_row", "p", "o0", "o1", "o2")
    names += ("r_ex",) if cluster.model.experts > cluster.model.experts_used else ()
    return (*names, "o_gap") if cluster.profile.async_scheduling else names


def _free(cluster: Cluster, *, blocks_known: bool) -> tuple[str, ...]:
    """What a recorded run is asked for."""
    names = (*roofline_names(cluster), "a0")
    return names if blocks_known else (*names, "kv_blocks")


def requests_of(run: Run, name: str) -> tuple[pl.DataFrame, list[str]]:
    """The answered requests in the order of their sending, and what was left out. Raises InputError."""
    columns = list(TIMES)
    table = run.table.select("request", *columns, "status", "preemptions", "cached_tokens")
    table = table.sort("sent", maintain_order=True)
    answered = table.filter(
        pl.all_horizontal(pl.col(columns).is_not_null())
        & (pl.col("request_tokens") > 0)
        & (pl.col("response_tokens") > 0)
        & (pl.col("status") == "ok")
    ).select("request", pl.col(columns).cast(pl.Float64), "preemptions", pl.col("cached_tokens").fill_null(0))
    if answered.is_empty():
        raise InputError(
            f"{name}: no request in it was answered; calibration needs sent, first_token, last_token and both"
            " token counts."
        )
    wrong = answered.filter((pl.col("first_token") <= pl.col("sent")) | (pl.col("last_token") < pl.col("first_token")))
    if len(wrong):
        raise InputError(
            f"{name}: {len(wrong)} rows have a first token before their sending or a last before their first; the"
            " times must be of one clock."
        )
    lost = len(table) - len(answered)
    said = (
        [f"{lost:,} of {len(table):,} rows were not answered in full and are missing from the calibration's load."]
        if lost
        else []
    )
    asked, cached = (float(answered[name].sum() or 0) for name in ("request_tokens", "cached_tokens"))
    if cached:
        computed = (pl.col("request_tokens") - pl.col("cached_tokens")).clip(lower_bound=1)
        answered = answered.with_columns(request_tokens=computed)
        said.append(
            f"{cached / asked:.0%} of the prompt tokens were found in the prefix cache (cached_tokens); the load"
            " is made of the others, as if what was found were the same for all and took no blocks."
        )
    return answered.drop("cached_tokens"), said


def _extremes(values: pl.Series) -> tuple[float, float]:
    numbers = values.to_numpy()
    return float(numbers.min()), float(numbers.max())


def _columns(table: pl.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sent = table["sent"].to_numpy()
    return (
        sent - sent[0],
        table["request_tokens"].to_numpy().astype(np.int32),
        table["response_tokens"].to_numpy().astype(np.int32),
    )


def _served(
    load: tuple[np.ndarray, np.ndarray, np.ndarray], cluster: Cluster, recording: Recording, first_ttft: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) simulated TTFT, E2E (seconds from `sent`) and preemptions of the requests of a recording.

    A cold engine keeps those who come first waiting until it has answered one: for as long as that one's recorded TTFT,
    `first_ttft`, exceeds the simulated.
    """
    sent, prompt, output = load
    arrival = sent
    if recording.cold:
        ttft, _, _ = _latencies(run_requests(*load, _plain(cluster)), sent, cluster)
        begin = max(0.0, first_ttft - ttft[0])
        arrival = np.append(begin, np.maximum(arrival[1:], begin + JUST_AFTER))
    outcome = run_requests(arrival, prompt, output, cluster, steps=recording.taken)
    ttft, e2e, preemptions = _latencies(outcome, sent, cluster)
    if recording.taken:
        waited = _until_taken(outcome.steps, arrival + cluster.step_time.a0)
        ttft, e2e = ttft - waited, e2e - waited
    return ttft, e2e, preemptions


def _until_taken(steps: np.ndarray, arrival: np.ndarray) -> np.ndarray:
    """(n,) seconds from each of `arrival` until the step that runs then has ended; 0 where none does, and where it is
    the arrival that starts one."""
    starts = steps["start"] / TICKS
    ends = starts + steps["ticks"] / TICKS
    before = np.searchsorted(starts, arrival - 1e-9) - 1
    return np.where(before >= 0, np.maximum(ends[before] - arrival, 0.0), 0.0)


def _latencies(outcome: Outcome, sent: np.ndarray, cluster: Cluster) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) simulated TTFT and E2E in seconds from `sent` at the client, and preemptions."""
    n, it = len(sent), outcome.attempts
    if (it["last"] < 0).any():
        raise InputError(
            f"--kv-blocks {cluster.kv_blocks}: requests of the recorded run do not fit into so many blocks or"
            " into --max-model-len; check both against the server."
        )
    first, last, preemptions = np.empty(n), np.empty(n), np.empty(n, np.int64)
    first[it["request"]], last[it["request"]] = it["first"] / TICKS, it["last"] / TICKS
    preemptions[it["request"]] = it["preemptions"]
    return first - sent + cluster.step_time.a2, last - sent + cluster.step_time.a2, preemptions


def simulated_requests(table: pl.DataFrame, cluster: Cluster, how: Recording | None = None) -> pl.DataFrame:
    """`ttft`, `e2e` (seconds) and `preemptions` of the requests of `table` on `cluster`, in the table's order; how they
    were recorded is said by `how` (without: by a client of a warm engine)."""
    how = how or Recording(table, 0)
    first_ttft = float(table["first_token"][0] - table["sent"][0]) if how.cold else 0.0
    ttft, e2e, preemptions = _served(_columns(table), cluster, how, first_ttft)
    return pl.DataFrame({"ttft": ttft, "e2e": e2e, "preemptions": preemptions})


def _errors(table: pl.DataFrame, simulated: pl.DataFrame) -> Errors:
    recorded = table["preemptions"]
    return errors_between(table, simulated, None if recorded.null_count() else int(recorded.sum()))


def errors_between(table: pl.DataFrame, other: pl.DataFrame, recorded_preemptions: int | None) -> Errors:
    """Of `other` (`ttft`, `e2e`, and perhaps `preemptions`) against `table`, whose rows are the same requests."""
    return errors_over_runs([(table, other)], recorded_preemptions)


def errors_over_runs(pairs: list[tuple[pl.DataFrame, pl.DataFrame]], recorded_preemptions: int | None) -> Errors:
    """Of several runs of the same, each with what was predicted of it, as for `errors_between`: a statistic is the
    median over the runs of what it is in each, so that a machine that was held up in one of them does not decide."""
    runs = [_compared(table, other) for table, other in pairs]

    def off(statistic: Callable[[np.ndarray], float]) -> dict[str, float]:
        of = {name: np.median([[statistic(x) for x in run[name]] for run in runs], axis=0) for name in runs[0]}
        return {name: float(sim / real - 1) for name, (sim, real) in of.items()}

    single = {name: np.concatenate([run[name][0] / run[name][1] for run in runs]) for name in runs[0]}
    counted = all("preemptions" in other.columns for _, other in pairs)
    preemptions = sum(int(other["preemptions"].sum()) for _, other in pairs) if counted else None
    return Errors(
        requests=sum(len(table) for table, _ in pairs),
        mean=off(np.mean),
        p50=off(np.median),
        p99=off(lambda of: float(np.quantile(of, 0.99))),
        mean_absolute={name: float(np.mean(np.abs(of - 1))) for name, of in single.items()},
        preemptions=None if preemptions is None else (preemptions, recorded_preemptions),
    )


def _compared(table: pl.DataFrame, other: pl.DataFrame) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Simulated and recorded seconds, (n,) each: TTFT, E2E, and TPOT of those that have one."""
    first, last = ((table[end] - table["sent"]).to_numpy() for end in ("first_token", "last_token"))
    pairs = {"ttft": (other["ttft"].to_numpy(), first), "e2e": (other["e2e"].to_numpy(), last)}
    gaps = table["response_tokens"].to_numpy() - 1
    several = (gaps > 0) & (last > first)
    if several.any():
        tpot = [((pairs["e2e"][k] - pairs["ttft"][k])[several] / gaps[several]) for k in range(2)]
        pairs["tpot"] = (tpot[0], tpot[1])
    return pairs


def spread_of(tables: list[pl.DataFrame], preemptions: list[int | None]) -> Spread:
    """Of two or more real runs of the same requests."""
    from scipy.stats import binom

    rows: dict[str, list[list[float]]] = {"ttft": [], "e2e": []}
    for table in tables:
        for name, end in (("ttft", "first_token"), ("e2e", "last_token")):
            took = (table[end] - table["sent"]).to_numpy()
            rows[name].append([took.mean(), np.median(took), np.quantile(took, 0.99)])
    n = len(tables)
    beyond = max(0, int(binom.ppf(0.025, n, 0.5)) - 1)
    half = {}
    for name, values in rows.items():
        ordered = np.sort(values, axis=0)
        half[name] = (ordered[n - 1 - beyond] - ordered[beyond]) / 2 / np.median(ordered, axis=0)
    mean, p50, p99 = ({name: float(values[k]) for name, values in half.items()} for k in range(3))
    return Spread(n, mean, p50, p99, preemptions)


def _most_at_once(table: pl.DataFrame) -> int:
    """The most requests between their first and last token at one moment."""
    times = np.concatenate([table["first_token"].to_numpy(), table["last_token"].to_numpy()])
    change = np.concatenate([np.ones(len(table)), -np.ones(len(table))])
    return int(np.cumsum(change[np.argsort(times, kind="stable")]).max())
