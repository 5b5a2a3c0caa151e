"""The file formats of public LLM traces: how each one is recognised, parsed, checked row by row, and written."""

from squall.trace.formats.azure import parse_azure, write_azure
from squall.trace.formats.burstgpt import parse_burstgpt, write_burstgpt
from squall.trace.formats.columns import columns_format
from squall.trace.formats.conversations import parse_conversations
from squall.trace.formats.jsonlines import parse_mooncake, parse_ragpulse, write_mooncake, write_ragpulse
from squall.trace.formats.parquet import parse_squall, write_squall
from squall.trace.formats.rows import Finding, Format, Parsed, Severity, finding_at
from squall.trace.table import REQUIRED

__all__ = ["FORMATS", "Finding", "Format", "Parsed", "Severity", "columns_format", "finding_at"]

FORMATS = {
    form.name: form
    for form in (
        Format(
            "burstgpt",
            "BurstGPT CSV",
            "csv",
            ("Timestamp", "Request tokens", "Response tokens"),
            parse_burstgpt,
            write_burstgpt,
        ),
        Format(
            "azure",
            "Azure LLM inference CSV",
            "csv",
            ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
            parse_azure,
            write_azure,
        ),
        Format(
            "mooncake",
            "Mooncake JSON lines",
            "json",
            ("timestamp", "input_length", "output_length"),
            parse_mooncake,
            write_mooncake,
        ),
        Format(
            "ragpulse",
            "RAGPulse JSON lines",
            "json",
            ("timestamp", "input_length", "output_length", "session_id"),
            parse_ragpulse,
            write_ragpulse,
        ),
        Format("conversations", "ShareGPT-like JSON", "json", ("conversations",), parse_conversations, None),
        Format("squall", "squall Parquet", "parquet", REQUIRED, parse_squall, write_squall),
    )
}
