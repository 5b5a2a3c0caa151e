"""Fitting the step time to a recorded run: which coefficients make the simulated latencies those that were measured?

    minimise  sum over requests of rho(TTFT_sim/TTFT - 1) + rho(E2E_sim/E2E - 1),   rho = soft L1 (robust)

over e_bw, e_fl and the host times, within physical bounds (without them a fit hides kernel time in host time). The
recorded requests are simulated as they were sent, with the engine's own limits. Fitting on the first N requests uses
only their latencies; the requests sent while these were being served are simulated too, because they share the
engine, but nothing of their recorded latency is used, so that they can serve to test the fit.
"""

from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from squall import __version__
from squall.errors import InputError
from squall.progress import note, progress
from squall.run.table import Run, RunSource
from squall.seeds import DEFAULT_SEED, stream
from squall.simulate.cluster import DEFAULT_ENGINE, Cluster, resolve
from squall.simulate.engine import Outcome, run_requests
from squall.simulate.hardware import GPU, Model
from squall.simulate.kernel import TICKS
from squall.simulate.step_time import BOUNDS, StepTime
from squall.trace.table import Trace

BUILT_IN = Path(__file__).parent / "calibrations"
"""Fitted by benchmarks/derive_calibrations.py, which names their sources."""

LEAST = 20
"""Fewer requests than this are not a basis for a fit."""

POPULATION, GENERATIONS = 8, 25
"""Of the search: population per coefficient, and how often it is renewed (a simulation per member each time)."""

RESAMPLES = 500
"""Of the block bootstrap."""

SOFT = 0.1
"""Relative errors beyond this count linearly: a few odd requests must not decide."""


class Errors(msgspec.Struct, frozen=True):
    """Simulated / recorded - 1 of the statistics over the same requests, and the mean absolute error per request."""

    requests: int
    mean: dict[str, float]
    p50: dict[str, float]
    p99: dict[str, float]
    mean_absolute: dict[str, float]


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
    step_time: StepTime
    fitted: dict[str, tuple[float, float]]
    """The coefficients that were fitted, each with its 95 % interval (block bootstrap over requests)."""
    correlations: dict[str, float]
    """Between the fitted coefficients, `e_bw~e_fl`: near 1 or -1 only a combination of the two is known."""
    errors: dict[str, Errors]
    """On `fit` (the requests used), `held_out` (those sent later; absent if there are none) and `all`."""
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


def calibrate(
    *,
    run: RunSource,
    out: str | Path | None = None,
    first: int | None = None,
    model: str | Model,
    gpu: str | GPU,
    kv_blocks: int,
    tp: int = 1,
    block_size: int = 16,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    max_model_len: int | None = None,
    engine: str = DEFAULT_ENGINE,
    seed: int = DEFAULT_SEED,
) -> Calibration:
    """Fit the simulator's step time to a recorded run.

    Parameters
    ----------
    run
        A Run or a table with at least `sent`, `first_token`, `last_token` (seconds), `request_tokens`,
        `response_tokens`. It must hold all requests that the engine served.
    out
        Where to write the calibration (JSON), if anywhere.
    first
        Fit on the first so many requests (by `sent`) only; the others then test the fit.
    model, gpu, tp, kv_blocks, block_size, max_num_seqs, max_num_batched_tokens, max_model_len, engine
        What was measured, as for `simulate`; kv_blocks is the server's `num_gpu_blocks`.
    seed
        Of the coarse search and the bootstrap.

    Raises
    ------
    InputError
        If the run or a value cannot be used.
    """
    from squall.run.files import read_run

    cluster = resolve(
        model=model,
        gpu=gpu,
        tp=tp,
        kv_blocks=kv_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        engine=engine,
    )
    name = "the run in memory" if isinstance(run, Run) else str(run)
    table, said = _requests(read_run(run), name)
    n = len(table) if first is None else first
    if not LEAST <= n <= len(table):
        raise InputError(
            f"--first {n}: {name} has {len(table)} answered requests; a fit needs at least {LEAST} and at most"
            " all of them."
        )
    problem, at = _fit(cluster, table, n, seed)
    fitted, correlations, warnings = problem.uncertainty(at, seed)
    step_time = problem.step_time(at)
    everything = run_requests(*_columns(table), msgspec.structs.replace(cluster, step_time=step_time))
    part = np.arange(len(table)) < n
    errors = {"fit": _errors(table, everything, part)}
    if n < len(table):
        errors["held_out"] = _errors(table, everything, ~part)
    errors["all"] = _errors(table, everything, np.ones(len(table), bool))
    result = Calibration(
        source=name,
        sha256=sha256(np.ascontiguousarray(table.to_numpy()).tobytes()).hexdigest(),
        date=datetime.now(UTC).date().isoformat(),
        squall=__version__,
        model=cluster.model,
        gpu=cluster.gpu,
        tp=cluster.tp,
        engine=cluster.engine,
        kv_blocks=cluster.kv_blocks,
        block_size=cluster.block_size,
        max_num_seqs=cluster.max_num_seqs,
        max_num_batched_tokens=cluster.max_num_batched_tokens,
        max_model_len=cluster.max_model_len,
        step_time=step_time,
        fitted=fitted,
        correlations=correlations,
        errors=errors,
        valid={
            "request_tokens": _extremes(table["request_tokens"][:n]),
            "response_tokens": _extremes(table["response_tokens"][:n]),
            "running": (1.0, float(_most_at_once(table[:n]))),
        },
        notes=[*said, *warnings],
    )
    for line in result.notes:
        note(f"note: {line}")
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    return result


def read_calibration(source: str | Path | Calibration) -> Calibration:
    """The calibration called `source`, or in the file there that `calibrate` wrote, or itself. Raises InputError."""
    if isinstance(source, Calibration):
        return source
    path = BUILT_IN / f"{source}.json"
    try:
        return msgspec.json.decode((path if path.is_file() else Path(source)).read_bytes(), type=Calibration)
    except FileNotFoundError:
        names = ", ".join(sorted(path.stem for path in BUILT_IN.glob("*.json")))
        raise InputError(
            f"--calibration {source}: there is no such file; `squall calibrate` makes one, and built in is {names}."
        ) from None
    except OSError as error:
        raise InputError(f"--calibration {source}: it cannot be read: {error.strerror}.") from error
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise InputError(f"--calibration {source}: not a file that `squall calibrate` made: {error}.") from None


def calibrated(calibration: Calibration, words: dict[str, Any]) -> Cluster:
    """The cluster that `words` (keywords of `resolve`) describe with the calibration's step time.

    What is not given is as calibrated. Raises InputError if the model, the GPU or tp contradict the calibration.
    """
    held = {name: getattr(calibration, name) for name in ("model", "gpu", "tp", "engine", "kv_blocks", "block_size")}
    held |= {name: getattr(calibration, name) for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len")}
    given = {name: value for name, value in words.items() if value is not None}
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


class _Problem:
    """The least-squares problem, with the coefficients scaled to the unit cube of their bounds."""

    def __init__(self, cluster: Cluster, table: pl.DataFrame, n: int, names: tuple[str, ...]) -> None:
        self.cluster, self.n, self.names = cluster, n, names
        self.low = np.array([BOUNDS[name].low for name in names])
        self.range = np.array([BOUNDS[name].high for name in names]) - self.low
        self.default = (np.array([getattr(cluster.step_time, name) for name in names]) - self.low) / self.range
        # Only requests sent before the last of the first n was answered can have had any influence on these.
        self.load = _columns(table.filter(pl.col("sent") <= table["last_token"][:n].max()))
        self.ttft = (table["first_token"] - table["sent"]).to_numpy()[:n]
        self.e2e = (table["last_token"] - table["sent"]).to_numpy()[:n]
        self.tried: list[np.ndarray] = []
        self.errors: list[np.ndarray] = []
        self.pulls: list[float] = []

    def step_time(self, at: np.ndarray) -> StepTime:
        values = self.low + at * self.range
        return msgspec.structs.replace(self.cluster.step_time, **dict(zip(self.names, map(float, values), strict=True)))

    def residuals(self, at: np.ndarray) -> np.ndarray:
        """(2, n) relative errors of TTFT and E2E."""
        outcome = run_requests(*self.load, msgspec.structs.replace(self.cluster, step_time=self.step_time(at)))
        ttft, e2e = _latencies(outcome, len(self.load[0]), self.cluster)
        # A short TTFT is a few steps of waiting, give or take one: below half the median, errors count absolutely.
        floor = np.maximum(self.ttft, 0.5 * np.median(self.ttft))
        return np.stack([(ttft[: self.n] - self.ttft) / floor, (e2e[: self.n] - self.e2e) / self.e2e])

    def misfit(self, at: np.ndarray) -> float:
        """The sum that is minimised, with a weak pull to the defaults for what the data leave open."""
        error = self.residuals(at)
        self.tried.append(at.copy())
        self.errors.append(_soft(error).sum(axis=0))
        self.pulls.append(0.02 * float(np.sum((at - self.default) ** 2)))
        return float(self.errors[-1].sum()) + self.pulls[-1]

    def solve(self, seed: int) -> tuple[np.ndarray, float]:
        """The best coefficients found, in the unit cube, and their misfit.

        Who is preempted when changes in jumps with the coefficients, so the misfit has many small minima: a population
        finds its way where a descent gets stuck.
        """
        from scipy.optimize import differential_evolution

        with progress(f"Fitting {', '.join(self.names)}", GENERATIONS) as step_done:
            done = iter(range(1, GENERATIONS + 1))
            fit = differential_evolution(
                self.misfit,
                [(0.0, 1.0)] * len(self.names),
                popsize=POPULATION,
                maxiter=GENERATIONS,
                init="sobol",
                polish=False,
                rng=stream(seed, "calibration"),
                callback=lambda *_, **__: step_done(next(done)),
            )
        return fit.x, float(fit.fun)

    def uncertainty(
        self, at: np.ndarray, seed: int
    ) -> tuple[dict[str, tuple[float, float]], dict[str, float], list[str]]:
        """95 % intervals (around `at`) and correlations, and sentences on coefficients that cannot be told apart.

        Errors of requests that queue together go together, so blocks of consecutive requests are resampled, in a
        circle so that each counts alike. The best fit to a resample is the best of all points that the search tried.
        """
        tried, errors = np.array(self.tried), np.array(self.errors)
        block = max(1, self.n // 10)
        begins = stream(seed, "bootstrap").integers(0, self.n, size=(RESAMPLES, -(-self.n // block)))
        before = np.cumsum(np.concatenate([np.zeros((len(errors), 1)), errors, errors[:, :block]], axis=1), axis=1)
        sums = np.stack([(before[:, begin + block] - before[:, begin]).sum(axis=1) for begin in begins])
        sample = tried[np.argmin(sums + np.array(self.pulls), axis=1)]
        low = self.low + np.minimum(np.quantile(sample, 0.025, axis=0), at) * self.range
        high = self.low + np.maximum(np.quantile(sample, 0.975, axis=0), at) * self.range
        fitted = {name: (float(low[i]), float(high[i])) for i, name in enumerate(self.names)}
        correlations, warnings = {}, []
        for j, other in enumerate(self.names):
            for i, one in enumerate(self.names[:j]):
                if sample[:, i].std() > 0 and sample[:, j].std() > 0:
                    r = float(np.corrcoef(sample[:, i], sample[:, j])[0, 1])
                    correlations[f"{one}~{other}"] = r
                    if abs(r) > 0.9:
                        warnings.append(
                            f"{one} and {other} cannot be told apart in this run (correlation {r:+.2f}):"
                            " trust them together, not singly."
                        )
        return fitted, correlations, warnings


def _soft(error: np.ndarray) -> np.ndarray:
    """Soft L1: quadratic below SOFT, linear above."""
    return np.sqrt(1 + (error / SOFT) ** 2) - 1


def _fit(cluster: Cluster, table: pl.DataFrame, n: int, seed: int) -> tuple[_Problem, np.ndarray]:
    """The solved problem with the coefficients that the data call for.

    Asynchronous scheduling hides host time behind the GPU; o0 shows only where the host is the slower one. It is fitted
    if that improves the misfit by a fifth, and keeps its default otherwise.
    """
    asynchronous = cluster.profile.async_scheduling
    problem = _Problem(cluster, table, n, ("e_bw", "e_fl", "o_gap" if asynchronous else "o0"))
    at, misfit = problem.solve(seed)
    if asynchronous:
        larger = _Problem(cluster, table, n, ("e_bw", "e_fl", "o_gap", "o0"))
        also, smaller = larger.solve(seed)
        if smaller < 0.8 * misfit:
            return larger, also
    return problem, at


def _requests(run: Run, name: str) -> tuple[pl.DataFrame, list[str]]:
    """The answered requests in the order of their sending, and what was left out. Raises InputError."""
    columns = ["sent", "first_token", "last_token", "request_tokens", "response_tokens"]
    table = run.table.select(*columns, "status").sort("sent", maintain_order=True)
    answered = table.filter(
        pl.all_horizontal(pl.col(columns).is_not_null())
        & (pl.col("request_tokens") > 0)
        & (pl.col("response_tokens") > 0)
        & (pl.col("status") == "ok")
    ).select(pl.col(columns).cast(pl.Float64))
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
    return answered, said


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


def _latencies(outcome: Outcome, n: int, cluster: Cluster) -> tuple[np.ndarray, np.ndarray]:
    """(n,) simulated TTFT and E2E in seconds at the client; a request that cannot run counts as nan."""
    ttft, e2e = np.full(n, np.nan), np.full(n, np.nan)
    it = outcome.attempts
    if (it["last"] < 0).any():
        raise InputError(
            f"--kv-blocks {cluster.kv_blocks}: requests of the recorded run do not fit into so many blocks or"
            " into --max-model-len; check both against the server."
        )
    ttft[it["request"]] = (it["first"] - it["sent"]) / TICKS + cluster.step_time.a2
    e2e[it["request"]] = (it["last"] - it["sent"]) / TICKS + cluster.step_time.a2
    return ttft, e2e


def _errors(table: pl.DataFrame, outcome: Outcome, rows: np.ndarray) -> Errors:
    it = outcome.attempts[np.argsort(outcome.attempts["request"])]
    tokens = table["response_tokens"].to_numpy()
    real_first, real_last = (
        (table["first_token"] - table["sent"]).to_numpy(),
        (table["last_token"] - table["sent"]).to_numpy(),
    )
    first, last = (it["first"] - it["sent"]) / TICKS, (it["last"] - it["sent"]) / TICKS
    several = rows & (tokens > 1)
    pairs = {"ttft": (first[rows], real_first[rows]), "e2e": (last[rows], real_last[rows])}
    if several.any():
        gaps = tokens[several] - 1
        pairs["tpot"] = ((last - first)[several] / gaps, (real_last - real_first)[several] / gaps)
    return Errors(
        requests=int(rows.sum()),
        mean={name: float(sim.mean() / real.mean() - 1) for name, (sim, real) in pairs.items()},
        p50={name: float(np.median(sim) / np.median(real) - 1) for name, (sim, real) in pairs.items()},
        p99={name: float(np.quantile(sim, 0.99) / np.quantile(real, 0.99) - 1) for name, (sim, real) in pairs.items()},
        mean_absolute={
            name: float(np.mean(np.abs(sim[real > 0] / real[real > 0] - 1))) for name, (sim, real) in pairs.items()
        },
    )


def _most_at_once(table: pl.DataFrame) -> int:
    """The most requests between their first and last token at one moment."""
    times = np.concatenate([table["first_token"].to_numpy(), table["last_token"].to_numpy()])
    change = np.concatenate([np.ones(len(table)), -np.ones(len(table))])
    return int(np.cumsum(change[np.argsort(times, kind="stable")]).max())
