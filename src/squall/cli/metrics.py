"""`squall metrics`."""

from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from squall.cli.common import Output, Seed, print_json

if TYPE_CHECKING:
    from squall.run.metrics import Metrics, Statistic

CLIENT_LIMITED, NOT_MET = 3, 4
MOST_ROWS = 24
"""More windows than this are shown as lines, not as a table."""


def metrics(
    run: str,
    *,
    slo: str | None = None,
    min_goodput: Annotated[float | None, Parameter(name="--min-goodput")] = None,
    window: str | None = None,
    between: str | None = None,
    export: Annotated[Literal["vllm", "aiperf", "br02", "csv", "parquet"] | None, Parameter(name="--export")] = None,
    out: Annotated[str | None, Parameter(name=["--out", "-o"])] = None,
    seed: Seed = Seed(),
    output: Output = Output(),
) -> int:
    """Efficiency, stability and reliability of a run; its goodput under an SLO.

    Exit code 3 if the run is CLIENT-LIMITED, 4 if --min-goodput was not reached.

    Parameters
    ----------
    run
        A run: .parquet, .csv or .jsonl, written by squall or with at least the columns sent, first_token, last_token,
        request_tokens and response_tokens; or the .journal of a replay that did not end well.
    slo
        Limits that a request must meet all of, like ttft=1s,tpot=100ms,e2e=30s (units are required).
    min_goodput
        Exit with 4 if less than this share (0 to 1) of the requests offered met the SLO; needs --slo.
    window
        Length of the windows of the per-window series. [default: 60s, or more minutes for a run of many days]
    between
        Count only the requests scheduled in this time of the run, as START:END: 60s: leaves a warm-up out.
    export
        Also write the run in another tool's format: vllm (bench serve JSON), aiperf (a directory), br02 (llm-d's
        benchmark report 0.2), csv or parquet (a row per attempt with its latencies); needs --out.
    out
        Where to: a file, or for aiperf a directory.
    """
    from squall.errors import InputError
    from squall.run import metrics as measure

    if (export is None) != (out is None):
        raise InputError("--export and --out belong together: the format, and the file (for aiperf the directory).")

    if export is not None and between is not None:
        raise InputError("--export writes the whole run; leave --between out.")
    if min_goodput is not None and slo is None:
        raise InputError("--min-goodput: it is a share of requests that meet an SLO; give one with --slo ttft=1s,….")
    if min_goodput is not None and not 0 <= min_goodput <= 1:
        raise InputError(f"--min-goodput: {min_goodput:g} is not a share; give a number from 0 to 1, such as 0.99.")
    result = measure(run, slo=slo, window=window, between=between)
    if export is not None and out is not None:
        from squall.progress import note
        from squall.run.exports import export as write

        note(f"Wrote {', '.join(map(str, write(run, export, out, slo=slo)))}.")
    if output.json:
        print_json(result)
    else:
        _print(result)
    if result.verdict == "CLIENT-LIMITED":
        return CLIENT_LIMITED
    if min_goodput is not None and (result.goodput_share is None or result.goodput_share < min_goodput):
        return NOT_MET
    return 0


def _print(result: "Metrics") -> None:
    from squall.progress import printable
    from squall.report.terminal import agreement, console, duration, number, percent
    from squall.units import in_words

    out = console()

    def say(text: str) -> None:
        out.print(printable(text), markup=False)

    reasons = f" ({'; '.join(result.verdict_reasons)})" if result.verdict_reasons else ""
    say(f"{result.title or 'Run'}: {result.kind}, {result.state}, {result.verdict}{reasons}")
    if result.step_time:
        say(f"Step time: {result.step_time}")
    say(
        f"{result.requests:,} requests over {duration(result.duration)}, offered at {number(result.offered_rate)}/s: "
        f"{result.succeeded:,} succeeded, {result.failed:,} failed ({percent(_share(result.failed, result.requests))})"
        + (f", {result.empty:,} without a token" if result.empty else "")
        + (f", {result.attempts - result.requests:,} further attempts" if result.attempts > result.requests else "")
    )
    say(
        f"Throughput {number(result.throughput)} requests/s, {number(result.input_token_throughput)} tokens/s in, "
        f"{number(result.output_token_throughput)} tokens/s out"
    )
    if result.slo is not None:
        limits = ", ".join(f"{name.upper()} ≤ {in_words(limit)}" for name, limit in result.slo.items())
        say(
            f"Goodput {number(result.goodput)} requests/s: {percent(result.goodput_share)} of the requests offered met "
            f"{limits} ({percent(result.from_send.goodput_share)} from send)"
        )
    if result.kv_cache.peak is not None or result.preemptions is not None:
        preemptions = "-" if result.preemptions is None else f"{result.preemptions:,}"
        mean, peak = percent(result.kv_cache.mean), percent(result.kv_cache.peak)
        say(f"KV cache {mean} mean, {peak} peak; {preemptions} preemptions")
    for found in result.agreement:
        say(agreement(found, "the server"))
    for text in result.notes:
        say(text)
    out.print()
    out.print(_latencies(result))
    if result.failures:
        out.print(_failures(result))
    if result.windows:
        out.print(_windows(result))


def _latencies(result: "Metrics"):  # type: ignore[no-untyped-def]
    from squall.report.terminal import duration, row, table

    title = "Latency of requests that succeeded" + (
        " (of all offered: ≥ is where requests were given up, - not answered)" if result.failed else ""
    )
    shown = table(title, "", "n", "mean", "std", "p50", "p90", "p95", "p99", "max")

    def add(name: str, values: "Statistic") -> None:
        moments = (values.mean, values.std, values.p50, values.p90, values.p95, values.p99, values.max)
        row(shown, name, f"{values.n:,}", *(duration(moment) for moment in moments))

    add("TTFT", result.ttft)
    add("TPOT", result.tpot)
    if result.itl.n:
        add("ITL", result.itl)
    add("E2E", result.e2e)
    if result.failed:
        for name, offered in (("TTFT", result.of_offered.ttft), ("E2E", result.of_offered.e2e)):
            levels = (
                f"≥ {duration(least)}"
                if (least := offered.at_least.get(f"p{p}")) is not None
                else duration(getattr(offered, f"p{p}"))
                for p in (50, 90, 95, 99)
            )
            row(shown, f"{name} of all offered", f"{offered.n:,}", "", "", *levels, "")
    for name, offered in (("TTFT", result.of_offered.ttft), ("E2E", result.of_offered.e2e)):
        if any(bound is not None for bound in offered.bounds.values()):
            bounds = (duration(offered.bounds.get(f"p{level}")) for level in (90, 95, 99))
            row(shown, f"{name} at most (99 %)", f"{offered.n:,}", "", "", "", *bounds, "")
    if result.lateness.n and result.kind != "simulation":
        add("TTFT from send", result.from_send.ttft)
        add("E2E from send", result.from_send.e2e)
        add("lateness", result.lateness)
    if result.jitter.n:
        add("jitter", result.jitter)
    return shown


def _failures(result: "Metrics"):  # type: ignore[no-untyped-def]
    from squall.report.terminal import percent, row, table

    shown = table("Failures", "status", "reason", "HTTP", "requests", "share", "example", "message")
    for kind in result.failures:
        status = kind.http_status if kind.http_status is not None else "-"
        message = (kind.message or "-").replace("\n", " ")[:40]
        row(
            shown,
            kind.status,
            kind.reason or "-",
            status,
            f"{kind.requests:,}",
            percent(kind.share),
            kind.example,
            message,
        )
    return shown


def _windows(result: "Metrics"):  # type: ignore[no-untyped-def]
    from squall.report.terminal import duration, number, row, sparkline, table
    from squall.units import in_words

    windows = result.windows
    title = f"Windows of {in_words(result.window)}, by schedule"
    if len(windows) <= MOST_ROWS:
        shown = table(
            title, "from", "offered/s", "tokens/s out", "failed", "TTFT p50", "TTFT p99", "E2E p50", "E2E p99"
        )
        for w in windows:
            latencies = (duration(value) for value in (w.ttft_p50, w.ttft_p99, w.e2e_p50, w.e2e_p99))
            row(shown, duration(w.start), number(w.rate), number(w.output_token_throughput), w.failed, *latencies)
        return shown
    shown = table(title, "", "over time, from 0", "highest")
    shown.columns[1].justify = "left"
    for name, values, top in (
        ("offered/s", [w.rate for w in windows], number),
        ("tokens/s out", [w.output_token_throughput for w in windows], number),
        ("failed", [w.failed for w in windows], number),
        ("TTFT p50", [w.ttft_p50 for w in windows], duration),
        ("E2E p50", [w.e2e_p50 for w in windows], duration),
    ):
        known = [float("nan") if value is None else float(value) for value in values]
        highest = max((value for value in known if value == value), default=None)
        row(shown, name, sparkline(known), top(highest))
    return shown


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
