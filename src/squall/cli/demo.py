"""`squall demo`."""

from typing import Annotated

from cyclopts import Parameter

from squall.cli.common import Output, Select, TraceArgument, as_options, print_json
from squall.trace.select import TraceOptions


def demo(
    trace: TraceArgument | None = None,
    *,
    out: str = "squall-demo",
    local: Annotated[bool, Parameter(negative="--no-local")] = True,
    select: Select = TraceOptions(),
    output: Output = Output(),
) -> int:
    """The main job end to end, on embedded defaults or on a TRACE of yours; without a network.

    Characterises the trace, fits a model, replays a slice against a real llama.cpp server (squall[local]), simulates
    the same requests under their own and under smooth arrivals, and writes a page with everything.

    Parameters
    ----------
    trace
        A trace file, - for standard input, or a profile; by default an afternoon of burstgpt://all is drawn.
    out
        Directory for report.html and the trace, model and runs that it is made from.
    local
        Whether to load the real server too.
    """
    from squall.study.demo import demo as run
    from squall.study.demo import first_token

    result = run(trace, out=out, local=local, **as_options(select))
    if output.json:
        print_json(result)
        return 0
    from squall.report.terminal import console, number, percent, row, table
    from squall.units import in_words

    tail = result.percentile.upper()
    listing = table(
        "The same requests at the same mean rate; only the arrivals differ (simulated)",
        *("arrivals", f"{tail} TTFT", "over seeds", f"{tail} E2E", "peak KV", "preemptions", "failed", "goodput"),
    )
    for arm in result.arms:
        spread = " – ".join(first_token(arm, end) for end in arm.ttft_tail_range) if arm.runs > 1 else ""
        slowest = "-" if arm.e2e_tail is None else in_words(arm.e2e_tail)
        row(
            *(listing, arm.arrivals, first_token(arm, arm.ttft_tail), spread, slowest, percent(arm.peak_kv)),
            *(number(arm.preemptions), number(arm.failed), percent(arm.goodput_share)),
        )
    page = console()
    page.print()
    for finding in result.findings:
        page.print(f"• {finding}", markup=False)
    page.print()
    page.print(listing)
    page.print(f"Report: {result.report}   ({result.took:.0f} s)", markup=False)
    return 0
