"""`squall replay`: a trace to a live endpoint, open loop; whether the run can be believed stands above its results."""

from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from squall.cli.common import Output, Select, TraceArgument, as_options, print_json
from squall.progress import printable
from squall.trace.select import TraceOptions

if TYPE_CHECKING:
    from squall.run.metrics import Metrics
    from squall.run.table import Run

CLIENT_LIMITED, FAILED, INTERRUPTED = 3, 1, 130

SERVER = Group("Server", sort_key=10)
REQUESTS = Group("Requests", sort_key=20)
SENDING = Group("Sending", sort_key=30)
WATCHING = Group("Watching", sort_key=40)


def replay(
    trace: TraceArgument,
    *,
    out: Annotated[str, Parameter(name=["--out", "-o"])],
    url: Annotated[str, Parameter(group=SERVER)],
    model: Annotated[str | None, Parameter(group=SERVER)] = None,
    api: Annotated[Literal["chat", "completions"], Parameter(group=SERVER)] = "chat",
    api_key_env: Annotated[str, Parameter(group=SERVER)] = "OPENAI_API_KEY",
    header: Annotated[list[str] | None, Parameter(group=SERVER, negative="")] = None,
    extra_body: Annotated[str | None, Parameter(group=REQUESTS)] = None,
    ignore_eos: Annotated[bool, Parameter(group=REQUESTS, negative="--no-ignore-eos")] = True,
    salt: Annotated[Literal["run", "request", "none"], Parameter(group=REQUESTS)] = "run",
    timeout: Annotated[str | None, Parameter(group=SENDING)] = None,
    connect_timeout: Annotated[str, Parameter(group=SENDING)] = "10s",
    retries: Annotated[int, Parameter(group=SENDING)] = 0,
    workers: Annotated[int, Parameter(group=SENDING)] = 1,
    max_concurrency: Annotated[int | None, Parameter(group=SENDING)] = None,
    duration: Annotated[str | None, Parameter(group=SENDING)] = None,
    drain_timeout: Annotated[str, Parameter(group=SENDING)] = "60s",
    warmup: Annotated[int, Parameter(group=SENDING)] = 0,
    metrics: Annotated[bool, Parameter(group=WATCHING, negative="--no-metrics")] = True,
    metrics_url: Annotated[str | None, Parameter(group=WATCHING)] = None,
    metrics_interval: Annotated[str | None, Parameter(group=WATCHING)] = None,
    view: Annotated[bool, Parameter(group=WATCHING, negative="--no-view")] = True,
    title: str | None = None,
    select: Select = TraceOptions(),
    output: Output = Output(),
) -> int:
    """Send a trace to an OpenAI-compatible server at the times written in it, whatever the server does.

    Every request of the trace gets one outcome in RUN; failures are rows, not errors. Until RUN is written, everything
    is in RUN.journal/ beside it, which `squall metrics` reads even after kill -9. Exit code 3 if the sender was the
    limit (CLIENT-LIMITED), 130 after an interrupt.

    Parameters
    ----------
    trace
        A trace file, `-`, or a built-in profile such as burstgpt://all.
    out
        Where to write the run: .parquet, .csv or .jsonl.
    url
        The server's base, with or without /v1: http://127.0.0.1:8000.
    model
        The served model. [default: the first that the server lists]
    api
        chat sends words, completions token ids where the server takes them.
    api_key_env
        Environment variable with the API key. The key is in no output.
    header
        A header for every request, as Name=value; may be given more than once.
    extra_body
        JSON object with more fields for every request, such as {"temperature": 0}.
    ignore_eos
        Ask for answers of exactly the trace's length (ignore_eos and min_tokens); left out where a server refuses.
    salt
        Makes prompts that no prefix cache knows: run and request anew in every run; none sends the same ones again.
    timeout
        Give a request up after this time. [default: never]
    connect_timeout
        Give up opening a connection after this time.
    retries
        How often a request is sent again after 429, 503, refused or reset, with growing, jittered pauses.
    workers
        Sending processes; more than one where the verdict names the processor.
    max_concurrency
        At most so many requests at once. The run is then a closed loop, and says so.
    duration
        Leave out what is scheduled later than this.
    drain_timeout
        How long to wait for answers after the last request was sent.
    warmup
        Send the trace's first N requests before the run; they are not in it.
    metrics
        Read the server's own running, waiting, KV use and preemptions into the run's series, where it has /metrics.
    metrics_url
        Where that page is. [default: /metrics beside the API, if a known server wrote it]
    metrics_interval
        Time between readings. [default: 1s]
    view
        A live view on the terminal; never with --json or --quiet, or where standard error is no terminal.
    title
        A short name for reports.
    """
    from squall.replay import replay as send
    from squall.run import metrics as measure

    run = send(
        trace,
        url=url,
        out=out,
        model=model,
        api=api,
        api_key_env=api_key_env,
        timeout=timeout,
        connect_timeout=connect_timeout,
        retries=retries,
        workers=workers,
        max_concurrency=max_concurrency,
        duration=duration,
        drain_timeout=drain_timeout,
        warmup=warmup,
        metrics=metrics,
        metrics_url=metrics_url,
        metrics_interval=metrics_interval,
        view=view and not output.json,
        salt=salt,
        ignore_eos=ignore_eos,
        title=title,
        extra_body=extra_body,
        header=header,
        **as_options(select),
    )
    result = measure(run)
    if output.json:
        import msgspec

        print_json(
            {**msgspec.to_builtins(result), "target": run.meta.target, "open_loop": run.meta.open_loop, "run": out}
        )
    else:
        _show(run, result, out)
    if run.meta.state == "interrupted":
        return INTERRUPTED
    if run.meta.state == "failed":
        return FAILED
    return CLIENT_LIMITED if run.meta.verdict == "CLIENT-LIMITED" else 0


def _show(run: "Run", result: "Metrics", out: str) -> None:
    from squall.report.terminal import agreement, console, number, row, table

    screen = console()
    target = run.meta.target
    screen.print(result.verdict, style="bold green" if result.verdict == "VALID" else "bold red", markup=False)
    if result.state != "complete":
        screen.print(f"The replay was {result.state}: this is a part of the trace.", style="bold", markup=False)
    for reason in result.verdict_reasons:
        screen.print(f"  {printable(reason)}", markup=False)
    loop = (
        "open loop" if run.meta.open_loop else f"closed loop, {target['max_concurrency']} at once: not the trace's load"
    )
    screen.print(
        f"{result.requests:,} requests to {printable(str(target['model']))} at {printable(target['url'])} ({loop})",
        markup=False,
    )
    shown = table("Latency, seconds from schedule", "", "n", "mean", "p50", "p90", "p95", "p99", "max")
    for name in ("ttft", "tpot", "itl", "e2e"):
        it = getattr(result, name)
        if it.n:
            row(
                shown,
                name.upper(),
                it.n,
                *(number(value) for value in (it.mean, it.p50, it.p90, it.p95, it.p99, it.max)),
            )
    if result.ttft.n:
        screen.print(shown)
    lengths = target["lengths"]
    said = [
        f"{kind} {number(of['measured'])} of {number(of['asked'])} asked (largest difference {number(of['worst'])})"
        for kind, of in (("prompt", lengths.get("request_tokens")), ("response", lengths.get("response_tokens")))
        if of
    ]
    failures = ", ".join(f"{count:,} {kind}" for kind, count in result.errors.items()) or "none"
    late = result.lateness
    lines = {
        "outcomes": f"{result.succeeded:,} ok, {result.failed:,} failed",
        "failures": failures,
        "sent late": f"p50 {_in_ms(late.p50)}, p99 {_in_ms(late.p99)}, at most {_in_ms(late.max)}",
        "throughput": f"{number(result.throughput)} requests/s, "
        f"{number(result.output_token_throughput)} response tokens/s; offered {number(result.offered_rate)} requests/s",
        "mean tokens": "; ".join(said) or "not reported by the server",
        "written": out,
    }
    for name, text in lines.items():
        screen.print(f"{name:<12} {printable(text)}", markup=False)
    server = run.meta.server
    if server is not None:
        for found in result.agreement:
            screen.print(printable(agreement(found, server.name)), markup=False)
    for failure in result.failures[:5]:
        kind = "/".join(str(part) for part in (failure.status, failure.reason, failure.http_status) if part is not None)
        text = f"{failure.requests:,} x {kind}, first request {failure.example}: {failure.message or '-'}"
        screen.print(f"  {printable(text)}", markup=False)


def _in_ms(value: float | None) -> str:
    return "-" if value is None else f"{1e3 * value:.3g} ms"
