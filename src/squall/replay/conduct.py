"""The verb: from a trace and a URL to a Run, through the questions before, one or more senders, and the journal."""

import asyncio
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace as changed
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec
import polars as pl
import uvloop

from squall import __version__
from squall.errors import InputError, SquallError
from squall.progress import line, note
from squall.replay.prompt import Salt
from squall.replay.schedule import PROMPT_LIMIT, Schedule, rows_of, schedule_of
from squall.replay.scrape import Endpoint, find_metrics
from squall.replay.sender import Counts, Plan, Sender
from squall.replay.target import OURS, Found, Preflight, Target, find_target
from squall.replay.watch import Watch
from squall.run.files import check_run_path, write_run
from squall.run.journal import SCHEDULE, read_journal, write_header
from squall.run.server import ServerMetrics
from squall.run.table import Run, RunMeta
from squall.seeds import DEFAULT_SEED
from squall.trace import TraceSource, open_trace
from squall.units import Duration, seconds

LEAD = 300_000_000
"""Nanoseconds from the decision to start to the run's time 0."""
CONNECT_TIMEOUT = 10.0


def replay(
    trace: TraceSource,
    *,
    url: str,
    out: str | Path | None = None,
    model: str | None = None,
    api: Literal["chat", "completions"] = "chat",
    api_key_env: str = "OPENAI_API_KEY",
    timeout: Duration | None = None,
    connect_timeout: Duration = CONNECT_TIMEOUT,
    retries: int = 0,
    workers: int = 1,
    max_concurrency: int | None = None,
    duration: Duration | None = None,
    drain_timeout: Duration = 60.0,
    warmup: int = 0,
    salt: Salt = "run",
    ignore_eos: bool = True,
    title: str | None = None,
    extra_body: dict[str, Any] | str | None = None,
    header: dict[str, str] | list[str] | None = None,
    metrics: bool = True,
    metrics_url: str | None = None,
    metrics_interval: Duration | None = None,
    view: bool = True,
    progress_callback: Callable[[Counts], None] | None = None,
    **options: Any,
) -> Run:
    """Send `trace` to the OpenAI-compatible server at `url` at the times written in it, and record every outcome.

    `out` names the Run file; until it is written, everything is in the journal `<out>.journal/` beside it. `options`
    are trace options (`head=100`, `rate=2.0`, `seed=1`, …). Times are counted from the trace's first arrival.
    `duration` and the timeouts are seconds or texts such as `90s`; `timeout` is for a whole attempt. `retries` resends
    after 429, 503, refused and reset, each as an attempt of its own. `max_concurrency` makes a closed loop of it, and
    the Run says so.
    `extra_body` (a dict or JSON) and `header` (a dict or a list of `Name=value`) are added to every request.
    The server's own `/metrics` are read beside the API, or at `metrics_url`, every `metrics_interval` (1 s) into the
    Run's time series, unless `metrics` is False. `view` draws a live view where notes are on and standard error is a
    terminal. `progress_callback` gets the counts twice a second.

    Failures are rows, never exceptions. Raises InputError if the trace or a setting is wrong or the server cannot be
    reached before the run. After SIGINT or SIGTERM the Run is returned with the state `interrupted`.
    """
    limits = {"retries": (retries, 0), "workers": (workers, 1), "warmup": (warmup, 0)}
    for name, (value, least) in limits.items():
        if value < least:
            raise InputError(f"--{name} {value}: give at least {least}.")
    if max_concurrency is not None and max_concurrency < workers:
        raise InputError(f"--max-concurrency {max_concurrency}: give at least 1 per worker ({workers}).")
    total = None if timeout is None else seconds(timeout, "--timeout")
    if total == 0:
        raise InputError("--timeout 0: no request can be answered in no time; leave it out for none.")
    connect = seconds(connect_timeout, "--connect-timeout")
    drain, span = (
        seconds(drain_timeout, "--drain-timeout"),
        None if duration is None else seconds(duration, "--duration"),
    )
    extra, headers = _extra_body(extra_body), _headers(header)
    journal = _journal_path(out)
    opened = open_trace(trace, **options)
    rows = rows_of(opened, span)
    if rows.is_empty():
        raise InputError(f"{opened.meta.source}: no request is scheduled before --duration {duration}.")
    seed = int(options.get("seed", DEFAULT_SEED))
    key = os.environ.get(api_key_env)
    target = find_target(url, api_key=key, headers=headers, connect_timeout=connect)
    endpoint, server = _metrics_page(target, metrics, metrics_url, metrics_interval)
    lengths = rows.select("asked_request_tokens", "asked_response_tokens").head(warmup).rows()

    async def ask() -> Found:
        return await Preflight(target, connect, total).find(
            model=model,
            api=api,
            extra=extra,
            ignore_eos=ignore_eos,
            typical=round(rows["asked_request_tokens"].median() or 1),  # type: ignore[arg-type]
            warmup=[(prompt, max(1, response)) for prompt, response in lengths if 0 < prompt <= PROMPT_LIMIT],
        )

    watch = Watch(view=view, endpoint=endpoint)
    try:
        found = _run(ask)
    except BaseException:
        watch.close(0.0)
        raise
    for text in found.notes:
        note(f"replay: {text}")
    notes = list(found.notes)
    if len(rows) < len(opened):
        notes.append(f"{len(opened) - len(rows):,} requests lie after --duration and are left out.")
    if journal is None:
        journal = Path(tempfile.mkdtemp(prefix="squall-", suffix=".journal"))
    else:
        journal.mkdir(parents=True)
    plan = Plan(
        target=target,
        dialect=found.dialect,
        salt=salt,
        seed=seed,
        fresh=os.urandom(8),
        journal=journal,
        timeout=total,
        connect_timeout=connect,
        retries=retries,
        max_concurrency=max_concurrency,
        drain_timeout=drain,
        stop_after=span,
    )
    meta = RunMeta(
        kind="replay",
        title=title or f"{found.dialect.model or 'server'} at {target.host}",
        trace=opened.meta,
        target=_describe(plan, found, api_key_env if key else None, headers, workers),
        offered=len(rows),
        seed=seed,
        version=__version__,
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        state="running",
        open_loop=max_concurrency is None,
        notes=notes,
    )
    try:
        rows.write_parquet(journal / SCHEDULE)
        write_header(journal, meta)
        with watch:
            watch.begin(meta.title, journal, server, target.secrets)
            meta = _conduct(plan, schedule_of(rows), workers, meta, watch, progress_callback)
        write_header(journal, meta)
    except OSError as error:
        raise SquallError(
            f"{journal}: cannot be written ({error.strerror}); what was recorded before is in it."
        ) from error
    run = read_journal(journal)
    run = Run(
        run.table,
        msgspec.structs.replace(run.meta, target=run.meta.target | {"lengths": _asked_and_measured(run)}),
        run.series,
    )
    if out is not None:
        write_run(run, out)
    shutil.rmtree(journal)
    return run


def _conduct(
    plan: Plan,
    schedule: Schedule,
    workers: int,
    meta: RunMeta,
    watch: Watch,
    callback: Callable[[Counts], None] | None,
) -> RunMeta:
    """Send the schedule; returns the metadata with the start's wall-clock time and the state at the end."""
    _raise_file_limit()
    began = 0

    def started(start: int) -> None:
        nonlocal meta, began
        began = start
        moment = datetime.now(UTC) + timedelta(microseconds=(start - time.monotonic_ns()) / 1e3)
        meta = msgspec.structs.replace(meta, started=moment.isoformat())
        write_header(plan.journal, meta)
        watch.start(start)

    last_shown = 0.0

    def show(counts: Counts) -> None:
        nonlocal last_shown
        if (now := time.monotonic()) - last_shown >= 0.5:
            last_shown = now
            watch.tell(counts)
            if not watch.view:
                line(_progress(counts, (time.monotonic_ns() - began) / 1e9))
            if callback:
                callback(counts)

    with _stop_requests() as stops:
        if workers == 1:
            state = _here(plan, schedule, started, show, stops)
        else:
            state = _in_processes(plan, schedule, workers, started, show, stops)
    line("")
    return msgspec.structs.replace(meta, state=state)


def _here(
    plan: Plan, schedule: Schedule, started: Callable[[int], None], show: Callable[[Counts], None], stops: list[int]
) -> str:
    async def send() -> None:
        def watch(counts: Counts) -> int:
            show(counts)
            return stops[0]

        start = time.monotonic_ns() + LEAD
        started(start)
        await Sender(plan, schedule, start, watch=watch).run()

    _run(send)
    return "interrupted" if stops[0] else "complete"


_COUNTS = len(vars(Counts()))


def _in_processes(
    plan: Plan,
    schedule: Schedule,
    workers: int,
    started: Callable[[int], None],
    show: Callable[[Counts], None],
    stops: list[int],
) -> str:
    """Spawn the workers, start their clocks together, and wait. They share a few numbers and nothing else."""
    spawn = multiprocessing.get_context("spawn")
    shared = spawn.RawArray("q", 2 + workers * (_COUNTS + 1))  # start, stops, then per worker: ready, counts
    processes = []
    for worker in range(workers):
        limit = plan.max_concurrency
        share = None if limit is None else (limit + workers - 1 - worker) // workers
        arguments = (changed(plan, max_concurrency=share), schedule.part(worker, workers), worker, os.getpid(), shared)
        processes.append(spawn.Process(target=_work, args=arguments, name=f"squall replay {worker}"))
    for process in processes:
        process.start()
    try:
        while not all(shared[2 + worker * (_COUNTS + 1)] for worker in range(workers)):
            if any(process.exitcode is not None for process in processes):
                break  # its rows will be the client's fault; the others go on
            time.sleep(0.01)
        shared[0] = time.monotonic_ns() + LEAD
        started(shared[0])
        while any(process.is_alive() for process in processes):
            shared[1] = stops[0]
            counts = [shared[3 + worker * (_COUNTS + 1) :][:_COUNTS] for worker in range(workers)]
            show(Counts(*(sum(column) for column in zip(*counts, strict=True))))
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()
    if any(process.exitcode for process in processes):
        return "failed"
    return "interrupted" if stops[0] else "complete"


def _work(plan: Plan, schedule: Schedule, worker: int, parent: int, shared: Any) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to everyone; the parent says when to stop
    own = 2 + worker * (_COUNTS + 1)

    def watch(counts: Counts) -> int:
        shared[own + 1 : own + 1 + _COUNTS] = list(vars(counts).values())
        return shared[1] if os.getppid() == parent else 2

    async def send() -> None:
        shared[own] = 1
        while not shared[0] and os.getppid() == parent:
            await asyncio.sleep(0.005)
        await Sender(plan, schedule, shared[0], worker=worker, watch=watch).run()

    _raise_file_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(send())


def _metrics_page(
    target: Target, metrics: bool, url: str | None, interval: Duration | None
) -> tuple[Endpoint | None, ServerMetrics | None]:
    """Where the server's own numbers are, and the summary that readings of them will fill; None if nowhere."""
    if not metrics:
        for flag, value in (("--metrics-url", url), ("--metrics-interval", interval)):
            if value is not None:
                raise InputError(f"{flag} changes nothing with --no-metrics; leave one of them out.")
        return None, None
    pause = 1.0 if interval is None else seconds(interval, "--metrics-interval")
    if not 0.1 <= pause <= 3600:
        raise InputError(f"--metrics-interval {interval}: give 0.1 s to 1 h.")
    endpoint, name = find_metrics(target, url)
    if endpoint is None or name is None:
        if interval is not None:
            raise InputError(
                f"--metrics-interval changes nothing: {target.url} has no metrics page of a server that is known; "
                "give its address with --metrics-url, or leave the interval out."
            )
        return None, None
    return endpoint, ServerMetrics(name=name, url=endpoint.url, interval=pause)


def _run(main: Callable[[], Any]) -> Any:
    """Run a coroutine on a loop of its own; in a thread of its own where one runs already, as in a notebook."""

    def run() -> Any:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main())

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run()
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Count SIGINT and SIGTERM instead of dying of them; the one entry of the list says how many came."""
    stops = [0]

    def count(number: int, frame: Any) -> None:
        stops[0] += 1
        if stops[0] == 1:
            note("replay: stopping: requests in flight get 3 s; interrupt again to end now.")

    if threading.current_thread() is not threading.main_thread():
        yield stops
        return
    before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _journal_path(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    out = check_run_path(out)
    journal = out.with_name(out.name + ".journal")
    if journal.exists():
        raise InputError(
            f"{journal}: an earlier replay was killed and left its journal; read it with `squall metrics {journal}`, "
            "then remove it, or give another name."
        )
    return journal


def _extra_body(given: dict[str, Any] | str | None) -> dict[str, Any] | None:
    if given is None:
        return None
    try:
        fields = msgspec.json.decode(given, type=dict[str, Any]) if isinstance(given, str) else given
    except msgspec.DecodeError as error:
        raise InputError(f"--extra-body: this is not a JSON object ({error}).") from error
    taken = [name for name in OURS if name in fields]
    if taken:
        raise InputError(f"--extra-body: {taken[0]} comes from the trace and the other flags; leave it out.")
    return fields


def _headers(given: dict[str, str] | list[str] | None) -> dict[str, str]:
    if given is None or isinstance(given, dict):
        return given or {}
    fields = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"--header {name}: write it as Name=value.")
        fields[name.strip()] = value.strip()
    return fields


def _describe(plan: Plan, found: Found, key_env: str | None, headers: dict[str, str], workers: int) -> dict[str, Any]:
    dialect = plan.dialect
    return {
        "url": plan.target.url,
        "api": dialect.api,
        "model": dialect.model,
        "context": found.context,
        "prompts": found.calibration,
        "salt": plan.salt,
        "fields": sorted(dialect.fields),
        "extra_body": sorted(dialect.extra or {}),
        "headers": sorted(headers),
        "api_key_env": key_env,
        "timeout": plan.timeout,
        "connect_timeout": plan.connect_timeout,
        "drain_timeout": plan.drain_timeout,
        "retries": plan.retries,
        "max_concurrency": plan.max_concurrency,
        "workers": workers,
    }


def _asked_and_measured(run: Run) -> dict[str, Any]:
    """Mean lengths asked for and measured by the server, and the largest difference, over the answered requests."""
    result: dict[str, Any] = {}
    answered = run.table.filter(pl.col("status") == "ok")
    for name in ("request_tokens", "response_tokens"):
        both = answered.select(asked=f"asked_{name}", measured=name).drop_nulls()
        if len(both):
            worst = (both["measured"] - both["asked"]).abs().max()
            result[name] = {
                "n": len(both),
                "asked": both["asked"].mean(),
                "measured": both["measured"].mean(),
                "worst": worst,
            }
    return result


def _progress(counts: Counts, elapsed: float) -> str:
    return (
        f"replay: {counts.released:,}/{counts.total:,} sent, {counts.in_flight:,} in flight, {counts.ok:,} ok, "
        f"{counts.failed:,} failed, {max(elapsed, 0):.0f} s"
    )
