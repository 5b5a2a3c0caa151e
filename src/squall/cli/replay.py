"""`squall replay`: a trace to a live endpoint, open loop; whether the run can be believed stands above its results."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

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
FAILURES = Group("Failures", sort_key=25)
SENDING = Group("Sending", sort_key=30)
WATCHING = Group("Watching", sort_key=40)


def replay(
    trace: TraceArgument,
    *,
    out: Annotated[str, Parameter(name=["--out", "-o"])],
    url: Annotated[str, Parameter(group=SERVER)],
    model: Annotated[str | None, Parameter(group=SERVER)] = None,
    api: Annotated[Literal["chat", "completions", "responses"], Parameter(group=SERVER)] = "chat",
    api_key_env: Annotated[str, Parameter(group=SERVER)] = "OPENAI_API_KEY",
    header: Annotated[list[str] | None, Parameter(group=SERVER, negative="")] = None,
    cacert: Annotated[str | None, Parameter(group=SERVER)] = None,
    cert: Annotated[str | None, Parameter(group=SERVER)] = None,
    key: Annotated[str | None, Parameter(group=SERVER)] = None,
    insecure: Annotated[bool, Parameter(group=SERVER, negative="")] = False,
    extra_body: Annotated[str | None, Parameter(group=REQUESTS)] = None,
    ignore_eos: Annotated[bool, Parameter(group=REQUESTS, negative="--no-ignore-eos")] = True,
    salt: Annotated[Literal["run", "request", "none"], Parameter(group=REQUESTS)] = "run",
    prompts: Annotated[str | None, Parameter(group=REQUESTS)] = None,
    tokenizer: Annotated[str | None, Parameter(group=REQUESTS)] = None,
    history: Annotated[Literal["recorded", "live", "none"], Parameter(group=REQUESTS)] = "recorded",
    recorded_failures: Annotated[Literal["short", "cancel", "mark"], Parameter(group=REQUESTS)] = "short",
    timeout: Annotated[str | None, Parameter(group=FAILURES)] = None,
    connect_timeout: Annotated[str, Parameter(group=FAILURES)] = "10s",
    first_token_timeout: Annotated[str | None, Parameter(group=FAILURES)] = None,
    idle_timeout: Annotated[str | None, Parameter(group=FAILURES)] = None,
    cancel_rate: Annotated[float, Parameter(group=FAILURES)] = 0.0,
    cancel_after: Annotated[str | None, Parameter(group=FAILURES)] = None,
    retries: Annotated[int, Parameter(group=FAILURES)] = 0,
    retry_backoff: Annotated[str | None, Parameter(group=FAILURES)] = None,
    retry_jitter: Annotated[bool, Parameter(group=FAILURES, negative="--no-retry-jitter")] = True,
    retry_budget: Annotated[float | None, Parameter(group=FAILURES)] = None,
    retry_on: Annotated[str | None, Parameter(group=FAILURES)] = None,
    max_errors: Annotated[int | None, Parameter(group=FAILURES)] = None,
    max_error_rate: Annotated[float | None, Parameter(group=FAILURES)] = None,
    workers: Annotated[int, Parameter(group=SENDING)] = 1,
    max_concurrency: Annotated[int | None, Parameter(group=SENDING)] = None,
    duration: Annotated[str | None, Parameter(group=SENDING)] = None,
    drain_timeout: Annotated[str, Parameter(group=SENDING)] = "60s",
    warmup: Annotated[int, Parameter(group=SENDING)] = 0,
    repeat: Annotated[int, Parameter(group=SENDING)] = 1,
    self_check: Annotated[bool, Parameter(group=SENDING, negative="--no-self-check")] = True,
    resume: Annotated[bool, Parameter(group=SENDING, negative="")] = False,
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
        chat and responses send words, completions token ids where the server takes them.
    api_key_env
        Environment variable with the API key. The key is in no output.
    header
        A header for every request, as Name=value; may be given more than once.
    cacert
        PEM file of the certificates that are believed. [default: the system's]
    cert
        PEM file of the client's own certificate, for servers that ask for one.
    key
        Its unencrypted private key, if that is not in the same file.
    insecure
        Believe every certificate.
    extra_body
        JSON object with more fields for every request, such as {"temperature": 0}.
    ignore_eos
        Ask for answers of exactly the trace's length (ignore_eos and min_tokens); left out where a server refuses.
    salt
        run: prompts that no earlier run has put into a cache, sharing only what the trace shares. request: nothing
        is shared. none: the same prompts in every run.
    prompts
        A file of text to cut prompts from: ShareGPT-like JSON, JSON lines, or any text. [default: common words]
    tokenizer
        A local tokenizer.json that counts their tokens. [default: the server's /tokenize, else fitted to its usage]
    history
        What later turns of a session carry, when the answer before them has come: text of the recorded length, the
        live replies, or (none) nothing: every turn then goes out at its recorded time.
    recorded_failures
        What becomes of requests that the traced system failed: short asks for one token, cancel hangs up after the
        recorded time (else --cancel-after), mark does not send them. See --drop-failed too.
    timeout
        Give a request up after this time. [default: never]
    connect_timeout
        Give up opening a connection after this time.
    first_token_timeout
        Give a request up that has no token by then. [default: never]
    idle_timeout
        Give a request up that has brought nothing for this time. [default: never]
    cancel_rate
        Share of the requests, chosen by the seed, that is hung up on.
    cancel_after
        How long after sending. [default: 1s]
    retries
        How often a request is sent again, each time as an attempt of its own.
    retry_backoff
        Pause before the first retry, doubled for each further one; 0 makes a retry storm. [default: 500ms]
    retry_jitter
        Draw each pause from 0.5 to 1.5 of itself.
    retry_budget
        At most this share of the requests sent may be retries. [default: no limit]
    retry_on
        What is sent again: HTTP statuses, 5xx, refused, reset, timeout, truncated. [default: 429,503,refused,reset]
    max_errors
        End the run when more requests than this have failed.
    max_error_rate
        End the run when more than this share of at least 20 requests has failed.
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
    repeat
        Send it so many times, one run after the other, the k-th as RUN.k with --seed + k - 1, and tell the spread.
    self_check
        Measure what this machine can send (half a second, once), and refuse a schedule that is beyond it.
    resume
        Go on with a run that was killed: repeat its command with this flag.
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
    from functools import partial

    from squall.errors import InputError
    from squall.replay import replay as send
    from squall.run import metrics as measure

    if repeat < 1:
        raise InputError(f"--repeat {repeat}: give at least 1.")
    if repeat > 1 and resume:
        raise InputError("--resume goes on with one run: leave --repeat out, and send the others afterwards.")
    send_as = partial(
        send,
        trace,
        url=url,
        model=model,
        api=api,
        api_key_env=api_key_env,
        cacert=cacert,
        cert=cert,
        key=key,
        insecure=insecure,
        prompts=prompts,
        tokenizer=tokenizer,
        history=history,
        recorded_failures=recorded_failures,
        timeout=timeout,
        connect_timeout=connect_timeout,
        first_token_timeout=first_token_timeout,
        idle_timeout=idle_timeout,
        cancel_rate=cancel_rate,
        cancel_after=cancel_after,
        retries=retries,
        retry_backoff=retry_backoff,
        retry_jitter=retry_jitter,
        retry_budget=retry_budget,
        retry_on=retry_on,
        max_errors=max_errors,
        max_error_rate=max_error_rate,
        self_check=self_check,
        resume=resume,
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
    )
    options = as_options(select)
    runs: list[tuple[Run, Metrics]] = []
    for number in range(repeat):
        name = out if repeat == 1 else _numbered(out, number + 1)
        run = send_as(out=name, **(options | {"seed": select.seed + number}))
        runs.append((run, measure(run)))
        if not output.json:
            _show(*runs[-1], name)
        if run.meta.state != "complete":
            break
    if output.json:
        import msgspec

        documents = [
            {
                **msgspec.to_builtins(result),
                "target": run.meta.target,
                "open_loop": run.meta.open_loop,
                "run": out if repeat == 1 else _numbered(out, number),
            }
            for number, (run, result) in enumerate(runs, 1)
        ]
        print_json(documents[0] if repeat == 1 else {"runs": documents, "spread": _spread(runs)})
    elif repeat > 1:
        _show_spread(runs)
    return next((code for run, _ in runs if (code := _code(run))), 0)


def _code(run: "Run") -> int:
    if "ended_by" in run.meta.target or run.meta.state == "failed":
        return FAILED
    if run.meta.state == "interrupted":
        return INTERRUPTED
    return CLIENT_LIMITED if run.meta.verdict == "CLIENT-LIMITED" else 0


def _numbered(out: str, number: int) -> str:
    """The name of a repeated run: run.2.parquet."""
    from pathlib import Path

    path = Path(out)
    return str(path.with_name(f"{path.stem}.{number}{path.suffix}"))


def _spread(runs: "list[tuple[Run, Metrics]]") -> "dict[str, Any]":
    import msgspec

    from squall.run.spread import spread

    return {name: msgspec.to_builtins(found) for name, found in spread([result for _, result in runs]).items()}


def _show_spread(runs: "list[tuple[Run, Metrics]]") -> None:
    from squall.report.terminal import console, duration, number, row, table

    shown = table(f"{len(runs)} runs", "", "mean", "95 % of the mean", "std between runs", "lowest", "highest")
    for name, found in _spread(runs).items():
        say = number if name.endswith(("throughput", "share")) else duration
        low, high = found["interval"] or (None, None)
        interval = f"{say(low)} to {say(high)}"
        row(shown, name, say(found["mean"]), interval, say(found["std"]), say(found["min"]), say(found["max"]))
    console().print(shown)


def _show(run: "Run", result: "Metrics", out: str) -> None:
    from squall.report.terminal import agreement, console, number, row, table
    from squall.run.attempt import told

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
        "sent / asked": _beside(target.get("sent_against_asked", {})),
        "mean tokens": "; ".join(said) or "not reported by the server",
        "written": out,
    }
    for name, text in lines.items():
        screen.print(f"{name:<12} {printable(text)}", markup=False)
    for text in result.notes[len(run.meta.notes) :]:
        screen.print(printable(text), markup=False)
    server = run.meta.server
    if server is not None:
        for found in result.agreement:
            screen.print(printable(agreement(found, server.name)), markup=False)
    for failure in result.failures[:5]:
        what = told(failure.status, failure.reason, failure.http_status, failure.message)
        text = f"{failure.requests:,} x (first: request {failure.example}) {what}"
        screen.print(f"  {printable(text)}", markup=False)
    if result.requests and not result.succeeded:
        screen.print("No request succeeded: no latency was measured.", style="bold red", markup=False)


def _beside(found: "dict[str, Any]") -> str:
    """What was sent beside what was asked."""
    from squall.report.terminal import number

    if "rate" not in found:
        return "too few requests to compare"
    parts = [
        f"{name} {number(found[key]['sent'])} / {number(found[key]['asked'])}"
        for name, key in (("requests", "requests"), ("requests/s", "rate"), ("gap CV", "gap_cv"))
    ]
    spread = [
        f"{number(of['sent'])} / {number(of['asked'])} ({number(of['window'])} s)"
        for of in found["dispersion"]
        if of["asked"] is not None and of["sent"] is not None
    ]
    return "; ".join([*parts, *(["dispersion " + ", ".join(spread)] if spread else [])])


def _in_ms(value: float | None) -> str:
    return "-" if value is None else f"{1e3 * value:.3g} ms"
