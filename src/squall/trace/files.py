"""Reading and writing trace files: which format a file has, and the one way into squall for every verb."""

from pathlib import Path
from typing import Any

from squall.trace.table import Trace, TraceSource


def open_trace(source: TraceSource, **options: Any) -> Trace:
    """The trace that `source` names, with the fields of TraceOptions given as `options` applied."""
    raise NotImplementedError


def read_trace(source: str | Path, format: str | None = None) -> Trace:
    """The whole trace in a file, unfiltered."""
    raise NotImplementedError


def write_trace(trace: Trace, path: str | Path, format: str | None = None) -> None:
    """Write `trace`; the suffix says how."""
    raise NotImplementedError


def convert(source: TraceSource, out: str | Path, **options: Any) -> Trace:
    """Read, select, write; returns what was written."""
    raise NotImplementedError
