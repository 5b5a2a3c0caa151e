"""Charts, and the self-contained HTML page made from traces and runs; tables for the terminal."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from squall.errors import InputError
from squall.run import Run, RunSource, holds_run, metrics, read_run
from squall.trace import Trace, TraceSource, open_trace
from squall.verb import callable_room

if TYPE_CHECKING:
    from squall.characterize import Characterization

__all__ = ["report"]


def report(
    *sources: TraceSource | RunSource,
    out: str | Path,
    title: str | None = None,
    slo: str | None = None,
    lead: Sequence[str] = (),
) -> Path:
    """Write one HTML page on the traces and runs in `sources` to `out`, and return its path.

    The page holds its own scripts and works offline. Sources are tables in memory or paths; a path is a run if its file
    has a column `sent`, and a trace otherwise. `slo` (like `ttft=1s,tpot=100ms`) adds goodput to the comparison; `lead`
    are sentences for the top of the page. Raises InputError if there is no source, or one that cannot be read.
    """
    from squall.report.page import write_page
    from squall.report.sections import MeasuredRun, MeasuredTrace

    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise InputError(f"{path}: a report is an HTML file; give a name that ends in .html.")
    if not sources:
        raise InputError("report: there is nothing to report on; give at least one trace or run.")
    traces: dict[str, MeasuredTrace] = {}
    runs: dict[str, MeasuredRun] = {}
    for source in sources:
        if isinstance(source, Run) or (not isinstance(source, Trace) and holds_run(source)):
            run = read_run(source)
            name = run.meta.title or ("run" if isinstance(source, Run) else Path(source).stem)
            runs[_unused(name, runs)] = MeasuredRun.of(run, metrics(run, slo=slo))
        else:
            trace = open_trace(source)
            traces[_unused(_name(trace), traces)] = MeasuredTrace(trace, _content(trace))
    write_page(path, title or _title([*traces, *runs]), traces, runs, lead)
    return path


def _content(trace: Trace) -> "Characterization":
    """In windows of 20 minutes, as in the BurstGPT paper, or in shorter ones where the trace has few of those."""
    from squall.characterize import characterize
    from squall.characterize.summary import bin_width

    return characterize(trace, window=min(1200.0, bin_width(trace.span, 60)))


def _name(trace: Trace) -> str:
    source = trace.meta.source
    return source if "://" in source else Path(source).name or "trace"


def _unused(name: str, taken: Iterable[str]) -> str:
    """`name`, with a number behind it if another source already has it."""
    taken, result, count = set(taken), name, 1
    while result in taken:
        count += 1
        result = f"{name} ({count})"
    return result


def _title(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"


callable_room(__name__)
