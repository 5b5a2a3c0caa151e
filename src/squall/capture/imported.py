"""A log that somebody else kept, as the Trace and the Run that a capture would have made of the same traffic."""

from pathlib import Path

import polars as pl

from squall.errors import InputError
from squall.run import Run, RunMeta, write_run
from squall.trace import Trace, write_trace
from squall.trace.files import read_answered

CLIENT_LEFT = 499
"""nginx's status of a request whose client hung up."""


def import_log(
    source: str | Path, *, out: str | Path, format: str | None = None, columns: str | None = None
) -> tuple[Trace, Run]:
    """Read a log of requests and write trace.parquet and run.parquet into the folder `out`.

    `format` and `columns` as for every trace (docs/traces.md). The log must say how long its requests took. Times of
    the first token are there where the log has them (LiteLLM, spans, vLLM's deltas). Raises InputError.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: give a new or an empty folder for what is imported.")
    trace, answers = read_answered(source, format, columns)
    if trace.table["elapsed"].null_count() == len(trace):
        raise InputError(
            f"{source}: it does not say when its answers ended, so there is no run in it; every verb that takes a "
            "trace reads it as it is."
        )
    run = _run(trace, answers, Path(str(source)).stem)
    folder.mkdir(parents=True, exist_ok=True)
    write_trace(trace, folder / "trace.parquet")
    write_run(run, folder / "run.parquet")
    return trace, run


def _run(trace: Trace, answers: pl.DataFrame, title: str) -> Run:
    table = trace.table.hstack(answers)
    failed, code = pl.col("failed"), pl.col("http_status")
    left = (code == CLIENT_LEFT).fill_null(False)
    ended, first = pl.col("arrival") + pl.col("elapsed"), pl.col("arrival") + pl.col("first_token")
    answered = table.select(
        pl.int_range(pl.len(), dtype=pl.Int64).alias("request"),
        pl.lit(1, pl.Int32).alias("attempt"),
        scheduled="arrival",
        sent="arrival",
        first_byte=first,
        first_token=first,
        last_token=pl.when(~failed).then(ended),
        done=pl.when(~failed).then(ended),
        ended=ended,
        status=pl.when(~failed).then(pl.lit("ok")).when(left).then(pl.lit("cancelled")).otherwise(pl.lit("http_error")),
        reason=pl.when(failed & left).then(pl.lit("client")).when(failed & code.is_null()).then(pl.lit("recorded")),
        http_status=code,
        request_tokens="request_tokens",
        response_tokens="response_tokens",
        token_source=pl.lit("server"),
        cached_tokens="cached_tokens",
        service="service",
        model="model",
        failed="failed",
    )
    meta = RunMeta(
        kind="recorded",
        title=title,
        trace=trace.meta,
        offered=len(trace),
        open_loop=False,
        verdict="UNCHECKED",
        verdict_reasons=["imported from a log: the load was the clients', and latency is as the log has it"],
    )
    return Run.of(answered, meta)
