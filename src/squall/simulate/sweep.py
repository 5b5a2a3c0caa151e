"""Many simulations of one trace: every combination of the settings, side by side, and whether their order is robust.

A recommendation is only as good as the step time behind it. So every combination is simulated again with each
coefficient of the step time 20 % lower and 20 % higher, the same for all, and the verdict says in how many of these
worlds the best setting stays the best.
"""

import inspect
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from squall.errors import InputError
from squall.files import check_place, replace_file
from squall.progress import note, progress
from squall.seeds import DEFAULT_SEED
from squall.simulate.calibrate import Calibration, calibrated, read_calibration
from squall.simulate.cluster import Cluster, resolve
from squall.simulate.engine import run_trace
from squall.simulate.policies import Choices
from squall.simulate.step_time import StepTable, StepTime
from squall.trace.table import Trace, TraceSource

MOVE = 0.2
"""By how much a coefficient is moved, both ways."""

_TIMES = ("o0", "o1", "o2", "o_gap", "a0", "s_in", "s_out")
"""Coefficients that are times."""

TRACE_SETTINGS = ("rate", "speed", "head", "sample")
"""Trace options that can be swept, beside everything that describes the cluster."""

MOST = 10_000
"""Combinations of one sweep."""

_LATENCIES, _PARTS = ("ttft", "tpot", "itl", "e2e"), ("mean", "p50", "p99")
COLUMNS = (
    *("requests", "succeeded"),
    *(f"{name}_{part}" for name in _LATENCIES for part in _PARTS),
    *("throughput", "output_token_throughput", "goodput_share", "preemptions", "kv_peak"),
)
"""Of the table, beside the settings."""

BEST_IS_HIGH = ("throughput", "output_token_throughput", "goodput", "goodput_share", "succeeded")


class Stability(msgspec.Struct, frozen=True):
    """Whether the order of the combinations outlives an error of the step time."""

    by: str
    """The column that decides."""
    best: dict[str, Any]
    """The best combination."""
    worlds: int
    """Simulated variants of the step time, the nominal one included; 1 if none was asked for."""
    stays_best: int
    """In how many of them it is the best (or equal to the best)."""
    lost_to: list[str]
    """Where it is not: the variant, and the combination that is better there."""
    least_rank_correlation: float | None
    """The lowest Kendall tau between the order in a variant and the nominal order; null for one combination."""


class Sweep(msgspec.Struct, frozen=True):
    """The result: one row per combination, and the verdict."""

    table: pl.DataFrame
    settings: list[str]
    stability: Stability
    step_time: str


def sweep(
    trace: TraceSource,
    *,
    sweep: Mapping[str, Sequence[Any]] | Sequence[str],
    by: str = "ttft_p99",
    slo: str | None = None,
    stability: bool = True,
    jobs: int | None = None,
    out: str | Path | None = None,
    calibration: "str | Path | Calibration | None" = None,
    seed: int = DEFAULT_SEED,
    **words: Any,
) -> Sweep:
    """Simulate `trace` under every combination of settings.

    Parameters
    ----------
    trace
        A Trace, a file, or a built-in profile.
    sweep
        Setting -> values, or texts such as `scheduler=fcfs,sjf`: keywords of `simulate` that describe the cluster, or
        `rate`, `speed`, `head`, `sample` of the trace.
    by
        The column that decides which combination is best: `ttft_p99`, `e2e_mean`, `goodput_share`, …
    slo
        As for `metrics`; adds `goodput_share`.
    stability
        Simulate each combination again with every step-time coefficient moved by 20 % (13 simulations or so).
    jobs
        Processes; not given, as many as there are cores, or one for a small sweep.
    out
        Where to write the table: .parquet, .csv or .jsonl (also .json).
    calibration, words
        As for `simulate`; what all combinations have in common, and trace options.

    Raises
    ------
    InputError
        For a setting, value, trace or column that cannot be used.
    """
    settings = _settings(sweep)
    if by not in COLUMNS:
        raise InputError(f"--by {by}: there is no such column; there are {', '.join(COLUMNS)}.")
    if by == "goodput_share" and slo is None:
        raise InputError("--by goodput_share needs --slo, such as ttft=1s,tpot=100ms: it says which requests are good.")
    for name in settings:
        if words.get(name) is not None:
            flag = name.replace("_", "-")
            raise InputError(f"--sweep {flag}: it is also given as --{flag}; leave one of them out.")
    path = None if out is None else _checked_path(out, trace)
    combinations = [dict(zip(settings, values, strict=True)) for values in product(*settings.values())]
    if len(combinations) > MOST:
        raise InputError(f"--sweep: {len(combinations):,} combinations are more than {MOST:,}; leave values out.")
    fitted = None if calibration is None else read_calibration(calibration)
    traces, tasks = _tasks(trace, combinations, words, fitted, seed)
    variants = ["nominal", *(_moved(tasks[0][0].step_time) if stability else [])]
    work = [  # what nothing is moved in comes first: it is the table
        (index, name, _in_world(cluster, name), which)
        for name in variants
        for index, (cluster, which) in enumerate(tasks)
    ]
    rows: dict[tuple[int, str], dict[str, Any]] = {}

    def table_of(done: Iterable[int]) -> pl.DataFrame:
        return pl.DataFrame([combinations[index] | rows[index, "nominal"] for index in done], infer_schema_length=None)

    try:
        _all(work, traces, slo, seed, jobs, rows)
    except KeyboardInterrupt:
        done = [index for index in range(len(tasks)) if (index, "nominal") in rows]
        if path is not None and done:
            _write(table_of(done), path)
            note(f"Interrupted: {path} has {len(done):,} of {len(tasks):,} combinations.")
        raise
    table = table_of(range(len(tasks)))
    verdict = _stability(combinations, rows, variants, by)
    if path is not None:
        _write(table, path)
    name = tasks[0][0].step_time_name if fitted is None else fitted.name
    return Sweep(table, list(settings), verdict, name)


def _settings(given: Mapping[str, Sequence[Any]] | Sequence[str]) -> dict[str, list[Any]]:
    """Setting -> its values, checked and in the types that `resolve` wants."""
    known = _known()
    if not isinstance(given, Mapping):
        pairs = [text.partition("=") for text in ([given] if isinstance(given, str) else given)]
        wrong = next((name for name, equals, values in pairs if not equals or not values), None)
        if wrong is not None:
            raise InputError(f"--sweep {wrong}: write it as setting=value,value, such as kv-blocks=1000,2000.")
        given = {name: values.split(",") for name, _, values in pairs}
    settings: dict[str, list[Any]] = {}
    for name, values in given.items():
        word = name.strip().replace("-", "_")
        if word not in known and word not in TRACE_SETTINGS:
            names = [each.replace("_", "-") for each in (*known, *TRACE_SETTINGS)]
            raise InputError(f"--sweep {name}: there is no such setting; there are {', '.join(names)}.")
        if word in settings or not values:
            raise InputError(f"--sweep {name}: give each setting once, with at least one value.")
        settings[word] = [_typed(word, value, known) for value in values]
        if any(value in settings[word][:at] for at, value in enumerate(settings[word])):
            raise InputError(f"--sweep {name}: a value stands there twice.")
    if not settings:
        raise InputError("--sweep is missing: give at least one setting=value,value.")
    return settings


def _known() -> dict[str, str]:
    """What describes a cluster: keyword of `resolve` or choice -> its type, as text."""
    fixed = ("step_time", "step_time_name", "choices")
    words = {
        name: str(each.annotation) for name, each in inspect.signature(resolve).parameters.items() if name not in fixed
    }
    return words | {field.name: str(field.type) for field in msgspec.structs.fields(Choices)}


def _typed(word: str, value: Any, known: Mapping[str, str]) -> Any:
    if not isinstance(value, str):
        return value
    text = value.strip()
    kind = known.get(word, "int" if word == "head" else "float")
    if "bool" in kind:
        if text.lower() not in ("true", "false"):
            raise InputError(f"--sweep {word.replace('_', '-')}={value}: true or false is needed.")
        return text.lower() == "true"
    for convert in (int, float):
        if convert.__name__ in kind and not ("str" in kind or "Duration" in kind):
            try:
                return convert(text)
            except ValueError:
                continue
    if ("int" in kind or "float" in kind) and "str" not in kind and "Duration" not in kind:
        raise InputError(f"--sweep {word.replace('_', '-')}={value}: a number is needed.")
    return text


def _tasks(
    trace: TraceSource,
    combinations: list[dict[str, Any]],
    words: dict[str, Any],
    fitted: Calibration | None,
    seed: int,
) -> tuple[list[Trace], list[tuple[Cluster, int]]]:
    """The traces that are needed, and for each combination its cluster and which trace."""
    from squall.trace.files import open_trace

    known = _known()
    traces: list[Trace] = []
    opened: dict[tuple, int] = {}
    tasks = []
    for combination in combinations:
        given = words | combination
        options = {name: value for name, value in given.items() if name not in known and value is not None}
        key = tuple(sorted((name, str(value)) for name, value in options.items()))
        if key not in opened:
            opened[key] = len(traces)
            traces.append(open_trace(trace, **options, seed=seed))
        mine = {name: value for name, value in given.items() if name in known and value is not None}
        tasks.append((resolve(**mine) if fitted is None else calibrated(fitted, mine), opened[key]))
    return traces, tasks


def _moved(step: StepTime) -> list[str]:
    return [f"{name} {sign}{MOVE:.0%}" for name in _coefficients(step) for sign in "-+"]


def _coefficients(step: StepTime) -> list[str]:
    """Those that are not 0."""
    if step.table is not None:
        rates = [name for name in ("per_sequence", "per_kv_token", "per_attention_pair") if getattr(step.table, name)]
        return ["points", *rates, *(name for name in _TIMES if getattr(step, name))]
    return [name for name in ("e_bw", "e_kv", "e_fl", "e_at", *_TIMES) if getattr(step, name)]


def _variant(step: StepTime, variant: str) -> StepTime:
    """`step` with the coefficient that the variant names moved; a share of a peak not beyond 1."""
    if variant == "nominal":
        return step
    name, _, sign = variant.partition(" ")
    factor = 1 + MOVE if sign.startswith("+") else 1 - MOVE
    if step.table is not None and name in StepTable.__struct_fields__:
        value = getattr(step.table, name)
        moved = [(at, factor * took) for at, took in value] if name == "points" else factor * value
        return msgspec.structs.replace(step, table=msgspec.structs.replace(step.table, **{name: moved}))
    value = factor * getattr(step, name)
    return msgspec.structs.replace(step, **{name: min(value, 1.0) if name.startswith("e_") else value})


def _in_world(cluster: Cluster, variant: str) -> Cluster:
    """`cluster` with the step times of all its kinds of replicas moved."""
    return msgspec.structs.replace(
        cluster,
        step_time=_variant(cluster.step_time, variant),
        others=[msgspec.structs.replace(it, step_time=_variant(it.step_time, variant)) for it in cluster.others],
    )


_shared: dict[str, Any] = {}
"""In a worker process: the traces, the SLO and the seed."""


def _start(traces: list[Trace], slo: str | None, seed: int) -> None:
    _shared.update(traces=traces, slo=slo, seed=seed)


def _start_process(traces: list[Trace], slo: str | None, seed: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to everyone; the parent says when to stop
    _start(traces, slo, seed)


def _one(work: tuple[int, str, Cluster, int]) -> tuple[tuple[int, str], dict[str, Any]]:
    """The row of one simulation."""
    from squall.run.metrics import metrics

    index, variant, cluster, which = work
    run = run_trace(_shared["traces"][which], cluster, seed=_shared["seed"])
    result = metrics(run, slo=_shared["slo"]) if _shared["slo"] else metrics(run)
    row: dict[str, Any] = {}
    for name in COLUMNS:
        latency, _, part = name.partition("_")
        if latency in _LATENCIES:
            it = getattr(result, latency)
            row[name] = getattr(it, part) if it.n else None
        else:
            row[name] = result.kv_cache.peak if name == "kv_peak" else getattr(result, name)
    return (index, variant), row


def _all(
    work: list[tuple[int, str, Cluster, int]],
    traces: list[Trace],
    slo: str | None,
    seed: int,
    jobs: int | None,
    rows: dict[tuple[int, str], dict[str, Any]],
) -> None:
    """Add all rows to `rows`, in as many processes as pay."""
    if jobs is not None and jobs < 1:
        raise InputError(f"--jobs {jobs}: give at least 1.")
    requests = sum(len(traces[which]) for *_, which in work)
    wanted = jobs or (1 if requests < 300_000 else os.cpu_count() or 1)
    with progress(f"Simulating {len(work):,} times", len(work)) as done:
        if wanted == 1:
            _start(traces, slo, seed)
            for count, item in enumerate(work, 1):
                key, row = _one(item)
                rows[key] = row
                done(count)
            return
        pool = ProcessPoolExecutor(
            min(wanted, len(work)),
            mp_context=get_context("spawn"),
            initializer=_start_process,
            initargs=(traces, slo, seed),
        )
        try:
            for count, (key, row) in enumerate(pool.map(_one, work, chunksize=1), 1):
                rows[key] = row
                done(count)
        finally:
            pool.shutdown(cancel_futures=True)


def _stability(
    combinations: list[dict[str, Any]], rows: dict[tuple[int, str], dict[str, Any]], variants: list[str], by: str
) -> Stability:
    from scipy.stats import kendalltau

    sign = -1 if by in BEST_IS_HIGH else 1
    # Nothing answered is worse than anything.
    score = {
        name: np.array(
            [
                np.inf if (value := rows[index, name][by]) is None else sign * float(value)
                for index in range(len(combinations))
            ]
        )
        for name in variants
    }
    best = int(np.argmin(score["nominal"]))
    lost, correlations = [], []
    for name, values in score.items():
        if values[best] > values.min() * (1 + 1e-9 * np.sign(values.min())):
            winner = combinations[int(np.argmin(values))]
            lost.append(f"{name}: {' '.join(f'{key}={value}' for key, value in winner.items())}")
        if len(combinations) > 1 and name != "nominal":
            tau = kendalltau(score["nominal"], values).statistic
            correlations.append(1.0 if np.isnan(tau) else float(tau))
    return Stability(
        by=by,
        best=combinations[best],
        worlds=len(variants),
        stays_best=len(variants) - len(lost),
        lost_to=lost,
        least_rank_correlation=min(correlations, default=None),
    )


def _checked_path(out: str | Path, reads: object) -> Path:
    path = Path(out)
    if path.suffix not in (".parquet", ".csv", ".jsonl", ".json"):
        raise InputError(f"{path}: a sweep is written as .parquet, .csv, .jsonl or .json; give such a name.")
    return check_place(path, reads)


def _write(table: pl.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write: dict[str, Callable[[Path], object]] = {
        ".parquet": table.write_parquet,
        ".csv": table.write_csv,
        ".jsonl": table.write_ndjson,
        ".json": table.write_json,
    }
    replace_file(path, write[path.suffix])
