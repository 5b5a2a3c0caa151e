"""What was answered: the Run table, its files, its metrics and its verdict."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from squall.run.files import check_run_path, holds_run, read_run, write_run
    from squall.run.metrics import Metrics, metrics
    from squall.run.slo import SLO, parse_slo
    from squall.run.table import SCHEMA, SERIES, Run, RunMeta, RunSource

__all__ = [
    "SCHEMA",
    "SERIES",
    "SLO",
    "Metrics",
    "Run",
    "RunMeta",
    "RunSource",
    "check_run_path",
    "holds_run",
    "metrics",
    "parse_slo",
    "read_run",
    "write_run",
]

_FILES = {
    "files": ("check_run_path", "holds_run", "read_run", "write_run"),
    "metrics": ("Metrics", "metrics"),
    "slo": ("SLO", "parse_slo"),
    "table": ("SCHEMA", "SERIES", "Run", "RunMeta", "RunSource"),
}


def __getattr__(name: str) -> Any:
    """Imported when asked for: a process that only writes attempts (`attempt.py`) needs no tables."""
    for file, names in _FILES.items():
        if name in names:
            return getattr(import_module(f"squall.run.{file}"), name)
    raise AttributeError(f"module 'squall.run' has no attribute {name!r}")
