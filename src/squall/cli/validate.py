"""`squall validate`."""

from typing import Annotated

from cyclopts import Parameter

from squall.cli.common import Output, Seed, TraceArgument, print_json


def validate(
    trace: TraceArgument,
    *,
    format: Annotated[str | None, Parameter(name="--format")] = None,
    columns: str | None = None,
    seed: Seed = Seed(),
    output: Output = Output(),
) -> int:
    """Everything that is wrong or odd with a trace file, with row numbers. Exit code 2 if a row is wrong.

    Parameters
    ----------
    trace
        A trace file, or - for standard input.
    format
        burstgpt, azure, mooncake, ragpulse, conversations, vllm, litellm, opentelemetry or squall; detected if not
        given. Beside --columns: the log_format of nginx's access log.
    columns
        Columns of any CSV file, or fields of JSON lines or a log: arrival=NAME,request_tokens=NAME,...
    """
    from squall.trace import validate as run

    result = run(trace, format=format, columns=columns)
    if output.json:
        print_json(result)
        return 0 if result.ok else 2
    from squall.report.terminal import console, row, table
    from squall.trace.files import where

    listing = table("", "severity", "where", "what")
    for column in listing.columns:
        column.justify, column.no_wrap = "left", False
    for finding in result.findings:
        row(listing, finding.severity, where(finding), finding.message)
    if result.findings:
        console().print(listing)
    verdict = "Every verb takes this file." if result.ok else "Rows are wrong: mend or cut them, then validate again."
    console().print(
        f"{result.source}: {result.rows:,} rows of {result.format}, {len(result.findings)} findings. {verdict}",
        markup=False,
    )
    return 0 if result.ok else 2
