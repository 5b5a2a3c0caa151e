"""What was answered: the Run table, its files, its metrics and its verdict."""

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
