"""`squall characterize`."""

from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from squall.cli.common import Output, Select, TraceArgument, as_options, print_json
from squall.trace.select import TraceOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from squall.characterize import Characterization, Stream
    from squall.characterize.lengths import Lengths

MOST_CLASSES = 12
"""More classes than this are counted, not listed."""
WIDE = 100
"""From this many columns on, the tables show everything."""


def characterize(
    trace: TraceArgument,
    *,
    window: str = "20m",
    fit: Literal["moments", "mle"] = "moments",
    out: Annotated[str | None, Parameter(name=["--out", "-o"])] = None,
    html: Annotated[str | None, Parameter(name="--html")] = None,
    select: Select = TraceOptions(),
    output: Output = Output(),
) -> int:
    """What is in a trace: concurrency, conversations, lengths, failures, per service and model.

    Parameters
    ----------
    trace
        A trace file, - for standard input, or a built-in profile such as burstgpt://chatgpt-api.
    window
        Time over which the gaps between arrivals are fitted by a Gamma distribution.
    fit
        Estimator of that fit: moments, or mle (maximum likelihood over the positive gaps).
    out
        Also write characterization.json and the whole series (windows, hours, bursts, working day) as Parquet to this
        directory.
    html
        Also write the report of the trace to this file.
    """
    from squall.characterize import characterize as run
    from squall.progress import note
    from squall.trace import open_trace

    opened = open_trace(trace, **as_options(select))
    result = run(opened, window=window, fit=fit, out=out, seed=select.seed)
    if html is not None:
        from squall.report import report

        note(f"{report(opened, out=html)}: the report of the trace.")
    if output.json:
        print_json(result)
    else:
        _print(result)
    return 0


def _print(result: "Characterization") -> None:
    from rich.table import Table
    from rich.text import Text

    from squall.progress import printable
    from squall.report.terminal import console, number, percent
    from squall.units import in_words

    out = console()
    meta = result.meta
    out.print(printable(meta.source), markup=False, style="bold")
    rate = "all at once" if result.rate is None else f"{number(result.rate)}/s"
    count = f"{result.requests:,} request{'s' if result.requests > 1 else ''}"
    out.print(f"{count} over {in_words(result.span)}, {rate}, {percent(result.failed_share)} failed ({meta.format})")
    for step in (*meta.steps, *meta.notes):
        out.print(printable(step), markup=False, style="dim")
    out.print()
    shown = {stream.name: stream for stream in result.classes[:MOST_CLASSES]}
    if len(result.classes) > 1 or "unnamed" in shown:
        shown = {**(shown if len(result.classes) > 1 else {}), "all": result.total}
    out.print(_arrivals(shown, out.width))
    out.print(_lengths(shown, out.width))
    if len(result.classes) > MOST_CLASSES:
        out.print(f"{len(result.classes) - MOST_CLASSES} smaller classes are not listed; --json has them all.\n")
    _plots(out, shown)
    findings = Table.grid(padding=(0, 1))
    for sentence in result.findings:
        findings.add_row("•", Text(sentence))
    out.print(findings)


def _arrivals(streams: "dict[str, Stream]", width: int) -> "Table":
    from squall.report.terminal import number, percent, row, table
    from squall.units import in_words

    scales = sorted({point.scale for stream in streams.values() for point in stream.dispersion})
    wide = width >= WIDE
    scales = scales[-6:] if wide else scales[-2:]
    title = "Arrivals, and the dispersion of their counts by scale (Poisson is 1)"
    shares = ("share",) if wide else ()
    shown = table(title, "class", *shares, "failed", "req/s", "gap CV", "alpha", *(in_words(scale) for scale in scales))
    for name, stream in streams.items():
        curve = {point.scale: point.spread_index or point.index for point in stream.dispersion}
        row(
            shown,
            name,
            *((percent(stream.share),) if wide else ()),
            percent(stream.failed_share),
            number(stream.rate),
            number(stream.gaps.spread_cv or stream.gaps.cv),
            number(stream.gamma_windows.alpha.p50),
            *(number(curve.get(scale)) for scale in scales),
        )
    return shown


def _lengths(streams: "dict[str, Stream]", width: int) -> "Table":
    from squall.report.terminal import number, row, table

    wide = width >= WIDE
    fields = ("mean", "p50", "p90", "p99", "max") if wide else ("p50", "p90", "p99", "max")
    shown = table("Lengths in tokens", "class", "", *fields, *(("nearest family", "KS") if wide else ()), "correlation")
    for name, stream in streams.items():
        rank = number(stream.correlation.spearman, 2)
        for label, side, tail in (
            (name, stream.request_tokens, ("request", "")),
            ("", stream.response_tokens, ("response", rank)),
        ):
            fit = side.best_fit
            nearest = () if not wide else (fit.family, f"{fit.ks:.3f}") if fit else ("-", "-")
            row(shown, label, tail[0], *(number(getattr(side, field)) for field in fields), *nearest, tail[1])
    return shown


def _plots(out: "Console", streams: "dict[str, Stream]") -> None:
    """Sparklines: a section for each question, in it a line for each class, all on one axis."""
    from squall.progress import printable
    from squall.report.terminal import number, sparkline
    from squall.units import in_words

    label = min(max(len(printable(name)) for name in streams), 24)
    room = out.width - label - 24

    def section(title: str) -> None:
        out.print(title, style="bold", markup=False)

    def line(name: str, values: "Sequence[float]", caption: str) -> None:
        wide = [value for value in values for _ in range(max(1, room // len(values)))]
        text = f"{printable(name)[:label]:{label}} │{sparkline(wide, room)}│ {caption}"
        out.print(text, markup=False, no_wrap=True, overflow="ellipsis")

    series = {name: stream.rate_series for name, stream in streams.items()}
    bins, width = next((len(one.counts), one.width) for one in series.values())
    if bins > 1:
        section(f"Arrivals over time ({in_words(bins * width)})")
        for name, one in series.items():
            line(name, one.counts, f"peak {max(one.counts):,} in {in_words(width)}")
    if any(stream.hour_of_day for stream in streams.values()):
        section("Requests per hour of the day (0 h to 23 h)")
        for name, stream in streams.items():
            times = f", {number(stream.peak_to_trough)}x low" if stream.peak_to_trough else ""
            line(name, stream.hour_of_day, f"peak {stream.hour_of_day.index(max(stream.hour_of_day))} h{times}")
    for title, side in (("Request", "request_tokens"), ("Response", "response_tokens")):
        lengths: dict[str, Lengths] = {name: getattr(stream, side) for name, stream in streams.items()}
        counts = {
            name: dict(zip(one.histogram.edges, one.histogram.counts, strict=False))
            for name, one in lengths.items()
            if one.histogram
        }
        if not counts:
            continue
        edges = sorted(set().union(*counts.values()))
        low, high = min(lengths[name].min or 0 for name in counts), max(lengths[name].max or 0 for name in counts)
        section(f"{title} tokens (log scale from {low:,} to {high:,})")
        for name, count in counts.items():
            line(name, [count.get(edge, 0) for edge in edges], f"median {number(lengths[name].p50)}")
    out.print()
