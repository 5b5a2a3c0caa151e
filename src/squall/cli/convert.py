"""`squall convert`."""

from typing import Annotated

from cyclopts import Parameter

from squall.cli.common import Output, Select, TraceArgument, as_options, print_json
from squall.trace.select import TraceOptions


def convert(
    trace: TraceArgument,
    out: Annotated[str, Parameter(allow_leading_hyphen=True)],
    *,
    to: str | None = None,
    select: Select = TraceOptions(),
    output: Output = Output(),
) -> int:
    """Convert a trace between formats; filter and scale it on the way.

    Parameters
    ----------
    trace
        A trace file, - for standard input, or a built-in profile such as burstgpt://chatgpt-api.
    out
        The file to write: .parquet (squall, keeps everything), .csv (BurstGPT, or Azure if it was read as such),
        .jsonl (Mooncake), - for CSV on standard output.
    to
        Format to write (burstgpt, azure, mooncake, ragpulse, squall), if the suffix should not say it.
    """
    import msgspec

    from squall.progress import note
    from squall.trace import convert_file

    written = convert_file(trace, out, to=to, **as_options(select))
    if output.json and out != "-":
        numbers = {"requests": written.requests, "span": written.span, "rate": written.rate}
        print_json({"out": out, **numbers, **msgspec.to_builtins(written.meta)})
    note(f"{out}: {written.requests:,} requests over {written.span:,.0f} s.")
    return 0
