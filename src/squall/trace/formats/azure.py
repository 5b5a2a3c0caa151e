"""The Azure LLM inference traces of 2023 and 2024: wall-clock times and two lengths."""

import polars as pl

from squall.trace.formats.rows import Finding, Parsed, read_csv, read_typed, token_column
from squall.trace.formats.times import wall_clock
from squall.trace.table import TraceMeta

AZURE_ATTRIBUTION = (
    "Azure LLM inference trace, Azure Public Dataset (2023: Patel et al., Splitwise; "
    "2024: Stojkovic et al., DynamoLLM), CC BY 4.0."
)


_TYPES = {"TIMESTAMP": pl.String, "ContextTokens": pl.Int32, "GeneratedTokens": pl.Int32}


def parse_azure(data: bytes) -> Parsed:
    """Azure 2023 and 2024: wall-clock times with up to 9 digits of fraction, with or without an offset from UTC."""
    findings: list[Finding] = []
    frame = read_typed(data, _TYPES, tuple(_TYPES))
    if frame is None:
        frame, findings = read_csv(data, set())
    arrival, clocks = wall_clock(frame["TIMESTAMP"], "TIMESTAMP", findings)
    columns = {
        "arrival": arrival,
        "request_tokens": token_column(frame, "ContextTokens", findings),
        "response_tokens": token_column(frame, "GeneratedTokens", findings),
    }
    return Parsed(pl.DataFrame(columns), findings, {"licence": "CC BY 4.0", "attribution": AZURE_ATTRIBUTION} | clocks)


def azure_lines(table: pl.DataFrame, meta: TraceMeta, wide: bool) -> pl.DataFrame:
    """Times as text with 7 digits of fraction, and the lengths."""
    start = meta.epoch if meta.epoch is not None else round(meta.clock * 1e9)
    stamp = (start + (pl.col("arrival") * 1e9).round().cast(pl.Int64)).cast(pl.Datetime("ns"))
    # strftime knows 3, 6 and 9 digits; the format has 7, so the last two of nine are cut.
    columns = [
        stamp.dt.strftime("%Y-%m-%d %H:%M:%S.%9f").str.head(-2).alias("TIMESTAMP"),
        pl.col("request_tokens").alias("ContextTokens"),
        pl.col("response_tokens").alias("GeneratedTokens"),
    ]
    return table.select(columns)
