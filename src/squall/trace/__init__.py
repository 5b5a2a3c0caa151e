"""What was asked: the Trace table, its file formats, filters and scaling."""

from squall.trace.blocks import convert_file
from squall.trace.fetch import fetch
from squall.trace.files import convert, open_trace, read_trace, write_trace
from squall.trace.formats import Finding
from squall.trace.select import TraceOptions
from squall.trace.servegen import ServeGenPool, read_servegen
from squall.trace.table import SCHEMA, Trace, TraceMeta, TraceSource
from squall.trace.validate import Validation, validate

__all__ = [
    "SCHEMA",
    "Finding",
    "ServeGenPool",
    "Trace",
    "TraceMeta",
    "TraceOptions",
    "TraceSource",
    "Validation",
    "convert",
    "convert_file",
    "fetch",
    "open_trace",
    "read_servegen",
    "read_trace",
    "validate",
    "write_trace",
]
