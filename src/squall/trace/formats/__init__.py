"""The file formats of public LLM traces: how each one is recognised, parsed, checked row by row, and written."""

from squall.trace.formats.azure import azure_lines, parse_azure
from squall.trace.formats.burstgpt import burstgpt_lines, parse_burstgpt
from squall.trace.formats.columns import columns_format, lines_format
from squall.trace.formats.conversations import parse_conversations
from squall.trace.formats.jsonlines import mooncake_lines, parse_mooncake, parse_ragpulse, ragpulse_lines
from squall.trace.formats.litellm import parse_litellm
from squall.trace.formats.logged import ANSWER
from squall.trace.formats.opentelemetry import parse_spans
from squall.trace.formats.parquet import parse_squall, write_squall
from squall.trace.formats.rows import Finding, Format, Parsed, Severity, finding_at, text_writer
from squall.trace.formats.vllm import LINE as VLLM_LINE
from squall.trace.formats.vllm import parse_vllm
from squall.trace.table import REQUIRED

__all__ = [
    "ANSWER",
    "FORMATS",
    "VLLM_LINE",
    "Finding",
    "Format",
    "Parsed",
    "Severity",
    "columns_format",
    "finding_at",
    "lines_format",
]

FORMATS = {
    form.name: form
    for form in (
        Format(
            "burstgpt",
            "BurstGPT CSV",
            "csv",
            ("Timestamp", "Request tokens", "Response tokens"),
            parse_burstgpt,
            text_writer(burstgpt_lines, "csv"),
        ),
        Format(
            "azure",
            "Azure LLM inference CSV",
            "csv",
            ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
            parse_azure,
            text_writer(azure_lines, "csv"),
        ),
        Format(
            "mooncake",
            "Mooncake JSON lines",
            "json",
            ("timestamp", "input_length", "output_length"),
            parse_mooncake,
            text_writer(mooncake_lines, "json"),
        ),
        Format(
            "ragpulse",
            "RAGPulse JSON lines",
            "json",
            ("timestamp", "input_length", "output_length", "session_id"),
            parse_ragpulse,
            text_writer(ragpulse_lines, "json"),
        ),
        Format(
            "conversations", "ShareGPT-like JSON", "json", ("conversations",), parse_conversations, None, whole=True
        ),
        Format("vllm", "vLLM log", "log", (), parse_vllm, None, whole=True),
        Format("litellm", "LiteLLM log", "json", ("startTime", "call_type"), parse_litellm, None),
        Format("opentelemetry", "OpenTelemetry spans", "json", ("resourceSpans",), parse_spans, None, whole=True),
        Format("squall", "squall Parquet", "parquet", REQUIRED, parse_squall, write_squall),
    )
}
