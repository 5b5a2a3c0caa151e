"""BurstGPT's CSV files: both published schemas (6 and 8 columns) and cuts of them."""

import polars as pl

from squall.trace.formats.rows import (
    Finding,
    Parsed,
    blank_to_null,
    finding_at,
    float_column,
    numbered_sessions,
    quote,
    read_csv,
    read_typed,
    token_column,
)
from squall.trace.table import SERVICES, TraceMeta

BURSTGPT_ATTRIBUTION = (
    "Derived from BurstGPT (Wang et al., KDD 2025, doi 10.1145/3711896.3737413), "
    "https://github.com/HPMLL/BurstGPT, CC BY 4.0."
)

# Day 0 of BurstGPT's clock is taken for Wednesday, 1 November 2023: the weekday pattern, the labels of the authors'
# heat map and the month ends of all three parts fit no other day. The authors have not said so.
BURSTGPT_DAY0_WEEKDAY = 2

_SERVICE_OF_LOG_TYPE = {"Conversation log": "conversation", "API log": "api"}
_LOG_TYPE_OF_SERVICE = {service: log_type for log_type, service in _SERVICE_OF_LOG_TYPE.items()}

REQUIRED_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")

_TYPES = {
    "Timestamp": pl.Float64,
    "Session ID": pl.String,
    "Session prefix": pl.String,
    "Elapsed time": pl.Float64,
    "Model": pl.String,
    "Request tokens": pl.Int32,
    "Response tokens": pl.Int32,
    "Total tokens": pl.Int32,
    "Log Type": pl.Enum(list(_SERVICE_OF_LOG_TYPE)),
}


def parse_burstgpt(data: bytes) -> Parsed:
    """Both published schemas (6 and 8 columns) and cuts of them, by column name: positions differ between the parts."""
    findings: list[Finding] = []
    frame = read_typed(data, _TYPES, REQUIRED_COLUMNS)
    if frame is None:
        frame, findings = read_csv(data, set(_TYPES) - set(REQUIRED_COLUMNS))
    have, sessions = set(frame.columns), None
    columns = {
        "arrival": float_column(frame, "Timestamp", findings),
        "request_tokens": token_column(frame, "Request tokens", findings),
        "response_tokens": token_column(frame, "Response tokens", findings),
    }
    if "Log Type" in have:
        columns["service"] = _services(frame["Log Type"], findings)
    if "Model" in have:
        columns["model"] = blank_to_null(frame["Model"])
    for name in ("Session ID", "Session prefix"):
        if name in have:
            columns["session"], sessions = numbered_sessions(blank_to_null(frame[name]))
    if "Elapsed time" in have:
        columns["elapsed"] = float_column(frame, "Elapsed time", findings)
    total = token_column(frame, "Total tokens", findings) if "Total tokens" in have else None
    first = columns["arrival"].min()
    clock = float(first) if first is not None else 0.0  # type: ignore[arg-type]
    meta = {
        "licence": "CC BY 4.0",
        "attribution": BURSTGPT_ATTRIBUTION,
        "clock": clock,
        "midnight": clock % 86400,
        "weekday": (BURSTGPT_DAY0_WEEKDAY + int(clock // 86400)) % 7,
    }
    if (columns["arrival"].floor() == columns["arrival"]).all():
        meta["tick"] = 1.0
    return Parsed(pl.DataFrame(columns), findings, meta, total, sessions)


def _services(text: pl.Series, findings: list[Finding]) -> pl.Series:
    """Log types as services; anything else is a finding and null."""
    if text.dtype != pl.Enum:
        unknown = text.is_not_null() & (text != "") & ~text.is_in(list(_SERVICE_OF_LOG_TYPE))
        if unknown.any():
            known = " and ".join(map(repr, _SERVICE_OF_LOG_TYPE))
            message = f"'Log Type' is {quote(text, unknown)}; known are {known}"
            findings.append(finding_at("error", "unknown-log-type", message, unknown))
        return text.replace_strict(_SERVICE_OF_LOG_TYPE, default=None, return_dtype=pl.Enum(SERVICES))
    services = pl.Series(list(_SERVICE_OF_LOG_TYPE.values()), dtype=pl.Enum(SERVICES))
    return services.gather(text.to_physical().cast(pl.UInt32))


def burstgpt_lines(table: pl.DataFrame, meta: TraceMeta, wide: bool) -> pl.DataFrame:
    """8 columns if sessions or elapsed times are known (`wide`), else 6; blank where squall does not know."""
    columns = [
        _shortest(pl.col("arrival") + meta.clock).alias("Timestamp"),
        *([pl.col("session").alias("Session ID"), _shortest(pl.col("elapsed")).alias("Elapsed time")] if wide else []),
        pl.col("model").alias("Model"),
        pl.col("request_tokens").alias("Request tokens"),
        pl.col("response_tokens").alias("Response tokens"),
        (pl.col("request_tokens").cast(pl.Int64) + pl.col("response_tokens")).alias("Total tokens"),
        pl.col("service").cast(pl.String).replace(_LOG_TYPE_OF_SERVICE).alias("Log Type"),
    ]
    return table.select(columns)


def _shortest(seconds: pl.Expr) -> pl.Expr:
    """Whole seconds as `5`, others to the microsecond."""
    rounded = seconds.round(6)
    return (
        pl.when(rounded == rounded.round())
        .then(rounded.cast(pl.Int64).cast(pl.String))
        .otherwise(rounded.cast(pl.String))
    )
