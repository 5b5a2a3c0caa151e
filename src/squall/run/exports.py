"""A run in the files of other tools, so that what reads theirs reads ours: each format's own names and units.

    vllm      one flat JSON object, as `vllm bench serve --save-result --save-detailed` writes
    aiperf    a directory: profile_export_aiperf.json and profile_export.jsonl (AIPerf's schema 1.5)
    br02      llm-d's benchmark report, version 0.2, as JSON (which is YAML too)
    csv, parquet   the table of attempts with each request's latencies

These tools measure from the moment of sending, and so do the fields that carry their names. What squall knows beyond
(latency from schedule, verdict, lateness, failures by kind) stands under one key, `squall`. Rate and burstiness are
those of the schedule that was run, not settings. Nothing is made up: what squall did not record is null, or left out
where a format knows no null.
"""

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from squall import __version__
from squall.errors import InputError
from squall.files import replace_file
from squall.run.files import read_run
from squall.run.metrics import Metrics, latencies, metrics, per_request
from squall.run.table import Run, RunSource

__all__ = ["FORMATS", "export"]

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
_NAN = float("nan")


def export(run: RunSource, format: str, out: str | Path, *, slo: str | None = None) -> list[Path]:
    """Write `run` to `out` (a file; for aiperf a directory) in one of `FORMATS`; returns the files written.

    `slo` (like `ttft=1s,tpot=100ms`) adds goodput. Raises InputError for an unknown format or a run that cannot be
    read.
    """
    if format not in FORMATS:
        raise InputError(f"--export {format}: there is no such format; there are {', '.join(FORMATS)}.")
    opened = read_run(run)
    path = Path(out)
    if format != "aiperf" and path.is_dir():
        raise InputError(f"{path}: this is a directory; give the name of a file.")
    if format == "aiperf" and path.is_file():
        raise InputError(f"{path}: this is a file; AIPerf's export is a directory of two files.")
    (path if format == "aiperf" else path.parent).mkdir(parents=True, exist_ok=True)
    return FORMATS[format](_View(opened, metrics(opened, slo=slo)), path)


class _View:
    """A run as the formats need it: columns by request, in the order of their schedule."""

    def __init__(self, run: Run, found: Metrics) -> None:
        self.run, self.metrics = run, found
        self.table = per_request(run.table).sort("first_scheduled", "request", maintain_order=True)
        self.latency = latencies(self.table)
        self.ok = self.latency["ok"]

    def column(self, name: str) -> np.ndarray:
        return self.table[name].cast(pl.Float64).fill_null(_NAN).to_numpy()

    @property
    def gaps_shape(self) -> float | None:
        """Gamma shape of the schedule's gaps, 1 / CV^2: 1 is Poisson, less is bursty; None for too few or even ones."""
        gaps = np.diff(np.sort(self.latency["scheduled"]))
        mean, spread = (gaps.mean(), gaps.std()) if gaps.size > 1 else (0.0, 0.0)
        return float((mean / spread) ** 2) if mean > 0 and spread > 0 else None

    def facts(self) -> dict[str, Any]:
        """squall's own: everything that `squall metrics --json` says but the windows, and where the run comes from."""
        told = msgspec.to_builtins(self.metrics)
        told.pop("windows")
        return {
            "version": __version__,
            "latency_is": "from schedule here, from send in the fields around",
            **told,
            "trace": msgspec.to_builtins(self.run.meta.trace),
            "target": self.run.meta.target,
            "open_loop": self.run.meta.open_loop,
            "seed": self.run.meta.seed,
        }

    def token_gaps(self) -> list[list[float]]:
        """Seconds between the reads of each answer; empty where none were recorded."""
        return [[] if reads is None else np.diff(reads).tolist() for reads in self.table["chunks"].to_list()]

    def most_at_once(self) -> int | None:
        """Highest number of requests between send and end."""
        begun, over = self.column("sent"), np.fmax(self.latency["ended"], self.latency["end"])
        known = np.isfinite(begun) & np.isfinite(over)
        if not known.any():
            return None
        steps = np.concatenate([np.ones(known.sum()), -np.ones(known.sum())])
        order = np.lexsort((steps, np.concatenate([begun[known], over[known]])))  # an end before a begin at one time
        return int(np.cumsum(steps[order]).max())

    def wall(self, at: float) -> datetime:
        """The wall-clock time of a moment of the run; counted from 1970 where the run has none."""
        started = self.run.meta.started
        zero = datetime.fromisoformat(started) if started else datetime.fromtimestamp(0, UTC)
        return zero + timedelta(seconds=at)

    def begin_and_end(self) -> tuple[datetime, datetime]:
        times = self.latency["scheduled"]
        first = float(np.nanmin(times)) if np.isfinite(times).any() else 0.0
        return self.wall(first), self.wall(first + (self.metrics.duration or 0.0))


def _total(values: np.ndarray) -> int:
    return int(np.nansum(values))


def _seconds(values: np.ndarray) -> list[float]:
    """As vLLM writes them: 0 where there is no value."""
    return np.nan_to_num(values).tolist()


def _statistics(values: np.ndarray, factor: float = 1.0) -> dict[str, float | None]:
    """mean, std, min, max and percentiles of the finite values; a percentile needs a value expected above it."""
    values = values[np.isfinite(values)] * factor
    if not values.size:
        return {}
    found: dict[str, float | None] = {
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if values.size > 1 else None,
        "min": float(values.min()),
        "max": float(values.max()),
    }
    for level in PERCENTILES:
        supported = values.size * min(level, 100 - level) >= 100 or level == 50
        found[f"p{level}"] = float(np.percentile(values, level)) if supported else None
    return found


def _json(path: Path, value: Any) -> Path:
    replace_file(path, msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=1) + b"\n")
    return path


# ---------------------------------------------------------------------------------------------------------------- vLLM


def _vllm(view: _View, path: Path) -> list[Path]:
    found, latency, ok = view.metrics, view.latency, view.ok
    prompts, answers = latency["input_tokens"], latency["tokens"]
    target = view.run.meta.target
    inputs, outputs = _total(prompts[ok]), _total(answers[ok])

    def rate(count: float) -> float | None:
        return count / found.duration if found.duration else None

    begin, _ = view.begin_and_end()
    gaps = view.token_gaps()
    itl = np.array([gap for one, good in zip(gaps, ok, strict=True) if good for gap in one])
    result: dict[str, Any] = {
        "date": begin.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": f"openai-{target['api']}" if "api" in target else view.run.meta.kind,
        "backend": f"openai-{target['api']}" if "api" in target else view.run.meta.kind,
        "label": view.run.meta.title or None,
        "model_id": target.get("model"),
        "tokenizer_id": target.get("model"),
        "num_prompts": found.requests,
        "request_rate": "inf" if found.offered_rate is None else found.offered_rate,
        "burstiness": view.gaps_shape,
        "max_concurrency": target.get("max_concurrency"),
        "duration": found.duration,
        "completed": found.succeeded,
        "failed": found.failed,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": rate(found.succeeded),
        "request_goodput": found.from_send.goodput,
        "output_throughput": rate(outputs),
        "total_token_throughput": rate(inputs + outputs),
        "max_output_tokens_per_s": _peak_tokens(view),
        "max_concurrent_requests": view.most_at_once(),
        "rtfx": None,
    }
    for name, values in (
        ("ttft", latency["sent_ttft"]),
        ("tpot", latency["tpot"]),
        ("itl", itl),
        ("e2el", latency["sent_e2e"]),
    ):
        of = _statistics(values if name == "itl" else values[ok], 1e3)
        result |= {
            f"mean_{name}_ms": of.get("mean"),
            f"median_{name}_ms": of.get("p50"),
            f"std_{name}_ms": of.get("std"),
        }
        result |= {f"p{level}_{name}_ms": of.get(f"p{level}") for level in (50, 90, 95, 99)}
    sent = view.column("sent")
    messages = view.table.select(
        pl.when(pl.col("status") == "ok")
        .then(pl.lit(""))
        .otherwise(pl.coalesce("message", "reason", pl.col("status").cast(pl.String)))
    ).to_series()
    result |= {
        "input_lens": np.nan_to_num(prompts).astype(int).tolist(),
        "output_lens": np.where(ok, np.nan_to_num(answers), 0).astype(int).tolist(),
        "ttfts": _seconds(np.where(ok, latency["sent_ttft"], _NAN)),
        "itls": gaps,
        "latencies": _seconds(np.where(ok, latency["sent_e2e"], _NAN)),
        "start_times": [None if np.isnan(at) else at for at in sent.tolist()],
        "queue_times": _seconds(sent - view.column("scheduled")),
        "generated_texts": [""] * len(view.table),
        "errors": messages.to_list(),
        "squall": view.facts(),
    }
    return [_json(path, result)]


def _peak_tokens(view: _View) -> float | None:
    """Most output tokens in a second of the run, each answer's spread evenly over its reads; None without reads."""
    read = view.table.filter((pl.col("status") == "ok") & (pl.col("chunks").list.len() > 0))
    if read.is_empty():
        return None
    counts = read["chunks"].list.len().to_numpy()
    at = np.repeat(read["first_token"].to_numpy(), counts) + read["chunks"].explode().to_numpy()
    each = np.repeat(read["response_tokens"].fill_null(0).to_numpy() / counts, counts)
    return float(np.bincount((at - at.min()).astype(int), each).max())


# -------------------------------------------------------------------------------------------------------------- AIPerf


def _aiperf(view: _View, folder: Path) -> list[Path]:
    found, latency, ok, meta = view.metrics, view.latency, view.ok, view.run.meta
    begin, end = view.begin_and_end()
    name = _identity(view)

    def block(unit: str, values: np.ndarray, factor: float = 1.0) -> dict[str, Any]:
        values = values[np.isfinite(values)]
        of = _statistics(values, factor)
        of["avg"] = of.pop("mean", None)
        return {"unit": unit, **of, "count": values.size, "sum": float(values.sum() * factor)}

    def derived(unit: str, value: float | None) -> dict[str, Any]:
        return {"unit": unit, "avg": value}

    blocks: dict[str, Any] = {
        "time_to_first_token": block("ms", latency["sent_ttft"][ok], 1e3),
        "inter_token_latency": block("ms", latency["tpot"][ok], 1e3),
        "request_latency": block("ms", latency["sent_e2e"][ok], 1e3),
        "input_sequence_length": block("tokens", latency["input_tokens"][ok]),
        "output_sequence_length": block("tokens", latency["tokens"][ok]),
    }
    blocks = {key: value for key, value in blocks.items() if value["count"]}  # absent means: not applicable
    blocks |= {
        "request_throughput": derived("requests/sec", found.throughput),
        "output_token_throughput": derived("tokens/sec", found.output_token_throughput),
        "request_count": derived("requests", found.succeeded),
        "error_request_count": derived("requests", found.failed),
        "benchmark_duration": derived("sec", found.duration),
    }
    if found.slo is not None:
        blocks["goodput"] = derived("requests/sec", found.from_send.goodput)
    summary = {
        "schema_version": "1.5",
        "aiperf_version": None,
        "benchmark_id": name,
        "start_time": begin.isoformat(),
        "end_time": end.isoformat(),
        "was_cancelled": meta.state != "complete",
        "input_config": {"endpoint": meta.target, "input": msgspec.to_builtins(meta.trace)},
        "run_info": {
            "benchmark_id": name,
            "sweep_id": None,
            "random_seed": meta.seed,
            "trial": None,
            "run_label": meta.title or None,
            "cli_command": None,
        },
        "telemetry_data": None,
        "error_summary": [
            {
                "error_details": {"code": one.http_status, "type": one.reason or one.status, "message": one.message},
                "count": one.requests,
            }
            for one in found.failures
        ],
        **blocks,
        "squall": view.facts(),
    }
    lines = [msgspec.json.encode(line) for line in _aiperf_lines(view)]
    records = folder / "profile_export.jsonl"
    replace_file(records, b"\n".join([*lines, b""]))
    return [_json(folder / "profile_export_aiperf.json", summary), records]


def _aiperf_lines(view: _View) -> list[dict[str, Any]]:
    zero = round(view.wall(0.0).timestamp() * 1e6) * 1000
    latency = view.latency
    over = np.fmax(latency["ended"], latency["end"])
    fields = (
        ("time_to_first_token", "ms", latency["sent_ttft"] * 1e3),
        ("inter_token_latency", "ms", latency["tpot"] * 1e3),
        ("request_latency", "ms", latency["sent_e2e"] * 1e3),
        ("input_sequence_length", "tokens", latency["input_tokens"]),
        ("output_sequence_length", "tokens", latency["tokens"]),
    )
    moments = {
        "request_start_ns": view.column("sent"),
        "request_ack_ns": view.column("first_byte"),
        "request_end_ns": over,
    }
    names = ("request", "status", "reason", "http_status", "message")
    lines = []
    for k, row in enumerate(view.table.select(*names).iter_rows(named=True)):
        good = bool(view.ok[k])
        measured = {
            key: {"value": float(of[k]), "unit": unit} for key, unit, of in fields if good and np.isfinite(of[k])
        }
        error = {"code": row["http_status"], "type": row["reason"] or row["status"], "message": row["message"]}
        lines.append(
            {
                "metadata": {
                    "session_num": row["request"],
                    "x_request_id": str(row["request"]),
                    "conversation_id": None,
                    "turn_index": 0,
                    **{
                        key: None if np.isnan(of[k]) else zero + round(float(of[k]) * 1e9)
                        for key, of in moments.items()
                    },
                    "worker_id": None,
                    "benchmark_phase": "profiling",
                    "was_cancelled": row["status"] == "cancelled",
                },
                "metrics": measured,
                "error": None if good else error,
            }
        )
    return lines


# --------------------------------------------------------------------------------------------------------------- llm-d


def _report(view: _View, path: Path) -> list[Path]:
    found, latency, ok, meta = view.metrics, view.latency, view.ok, view.run.meta
    begin, end = view.begin_and_end()
    asked = latency["input_tokens"][np.isfinite(latency["input_tokens"])]
    answered = latency["tokens"][ok & np.isfinite(latency["tokens"])]
    name = _identity(view)

    def rate(units: str, value: float | None) -> dict[str, Any] | None:
        return None if value is None else {"units": units, "mean": value}

    both = (found.input_token_throughput or 0) + (found.output_token_throughput or 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        per_token = np.where(latency["tokens"] > 0, latency["sent_e2e"] / latency["tokens"], _NAN)
    unrecorded = found.errors.get("unrecorded", 0) + found.errors.get("cancelled", 0)
    report: dict[str, Any] = {
        "version": "0.2",
        "run": {
            "uid": name,
            "time": {"start": begin.isoformat(), "end": end.isoformat(), "duration": f"PT{found.duration or 0.0:.6f}S"},
            "description": meta.title or None,
        },
        "scenario": {
            "load": {
                "metadata": {"cfg_id": meta.trace.sha256 if meta.trace else None},
                "standardized": {
                    "tool": "squall",
                    "tool_version": __version__,
                    "parallelism": meta.target.get("workers") or 1,
                    "source": "sampled" if meta.trace else "unknown",
                    "input_seq_len": _lengths(asked) or {"distribution": "other", "value": 0},
                    "output_seq_len": _lengths(answered),
                    "rate_qps": found.offered_rate,
                },
                "native": {"config": {"trace": msgspec.to_builtins(meta.trace), "target": meta.target}},
            }
        },
        "results": {
            "request_performance": {
                "aggregate": {
                    "requests": {
                        "total": found.requests,
                        "failures": found.failed,
                        "incomplete": unrecorded,
                        "input_length": _br("count", asked),
                        "output_length": _br("count", answered),
                    },
                    "latency": {
                        "time_to_first_token": _br("s", latency["sent_ttft"][ok]),
                        "normalized_time_per_output_token": _br("s/token", per_token[ok]),
                        "time_per_output_token": _br("s/token", latency["tpot"][ok]),
                        "request_latency": _br("s", latency["sent_e2e"][ok]),
                    },
                    "throughput": {
                        "input_token_rate": rate("tokens/s", found.input_token_throughput),
                        "output_token_rate": rate("tokens/s", found.output_token_throughput),
                        "total_token_rate": rate("tokens/s", both if found.duration else None),
                        "request_rate": rate("queries/s", found.throughput),
                    },
                }
            },
            "profiling": {"squall": view.facts()},
        },
    }
    return [_json(path, _without_nulls(report))]


def _br(units: str, values: np.ndarray) -> dict[str, Any] | None:
    of = _statistics(values)
    if not of:
        return None
    of["stddev"] = of.pop("std")
    return {"units": units, **of}


def _lengths(values: np.ndarray) -> dict[str, Any] | None:
    if not values.size:
        return None
    fixed = values.min() == values.max()
    return {
        "distribution": "fixed" if fixed else "other",
        "value": float(values.mean()),
        "std_dev": float(values.std()),
        "min": int(values.min()),
        "max": max(1, int(values.max())),
    }


def _without_nulls(value: Any) -> Any:
    """The report's schema takes a field that is left out, and often no null."""
    if not isinstance(value, dict):
        return value
    return {
        key: entry if key == "squall" else _without_nulls(entry) for key, entry in value.items() if entry is not None
    }


def _identity(view: _View) -> str:
    """A UUID that the same run always gets."""
    meta = view.run.meta
    of = (meta.kind, meta.title, meta.started, meta.trace.sha256 if meta.trace else None, len(view.table), meta.seed)
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"squall run {of} {view.metrics.duration} {view.metrics.ttft.mean}"))


# -------------------------------------------------------------------------------------------------------------- tables


def _flat(view: _View) -> pl.DataFrame:
    """One row per attempt, with its request's latencies at the request's last attempt; reads as their count."""
    columns = ("ttft", "tpot", "e2e", "sent_ttft", "sent_e2e", "lateness")
    names = {"sent_ttft": "ttft_from_send", "sent_e2e": "e2e_from_send"}
    found = view.table.select("request", "attempt").with_columns(
        pl.Series(names.get(name, name), np.where(view.ok | (name == "lateness"), view.latency[name], _NAN)).fill_nan(
            None
        )
        for name in columns
    )
    table = view.run.table.with_columns(reads=pl.col("chunks").list.len()).drop("chunks")
    return table.join(found, on=["request", "attempt"], how="left", maintain_order="left")


def _csv(view: _View, path: Path) -> list[Path]:
    replace_file(path, lambda temporary: _flat(view).write_csv(temporary))
    return [path]


def _parquet(view: _View, path: Path) -> list[Path]:
    facts = msgspec.json.encode(view.facts(), enc_hook=str).decode()
    replace_file(path, lambda temporary: _flat(view).write_parquet(temporary, metadata={"squall": facts}))
    return [path]


FORMATS: dict[str, Callable[[_View, Path], list[Path]]] = {
    "vllm": _vllm,
    "aiperf": _aiperf,
    "br02": _report,
    "csv": _csv,
    "parquet": _parquet,
}
