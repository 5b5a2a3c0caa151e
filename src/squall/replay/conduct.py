"""The verb: from a trace and a URL to a Run, through the questions before, one or more senders, and the journal."""

import asyncio
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import uvloop

from squall import __version__
from squall.errors import InputError, SquallError
from squall.progress import line, note
from squall.replay.loopback import check_machine, raise_file_limit
from squall.replay.prompt import Api, Salt
from squall.replay.resume import resumption
from squall.replay.schedule import (
    PROMPT_LIMIT,
    History,
    RecordedFailures,
    Schedule,
    rows_of,
    schedule_of,
)
from squall.replay.scrape import Endpoint, find_metrics
from squall.replay.sender import LEAD, RETRY_KINDS, RETRY_ON, Counts, Plan, Retries, Sender, prepare
from squall.replay.sockets import compiled
from squall.replay.target import OURS, OWN_HEADERS, Found, Preflight, Target, Trust, find_target
from squall.replay.text import load_tokenizer, read_texts
from squall.replay.watch import Watch
from squall.replay.workers import in_processes
from squall.run.files import check_run_path, write_run
from squall.run.journal import SCHEDULE, read_journal, write_header
from squall.run.server import ServerMetrics
from squall.run.table import Run, RunMeta
from squall.run.verdict import sent_against_asked
from squall.seeds import DEFAULT_SEED
from squall.trace import TraceSource, open_trace
from squall.units import Duration, seconds

CONNECT_TIMEOUT = 10.0
API_KEY = "OPENAI_API_KEY"
"""Environment variable of the key, where no other is named."""
ERRORS_AFTER = 20
"""Requests that must be decided before a share of failures ends a run."""


def replay(
    trace: TraceSource,
    *,
    url: str,
    out: str | Path | None = None,
    model: str | None = None,
    api: Api = "chat",
    api_key_env: str = API_KEY,
    cacert: str | Path | None = None,
    cert: str | Path | None = None,
    key: str | Path | None = None,
    insecure: bool = False,
    history: History = "recorded",
    recorded_failures: RecordedFailures = "short",
    timeout: Duration | None = None,
    connect_timeout: Duration = CONNECT_TIMEOUT,
    first_token_timeout: Duration | None = None,
    idle_timeout: Duration | None = None,
    cancel_rate: float = 0.0,
    cancel_after: Duration | None = None,
    retries: int = 0,
    retry_backoff: Duration | None = None,
    retry_jitter: bool = True,
    retry_budget: float | None = None,
    retry_on: str | None = None,
    max_errors: int | None = None,
    max_error_rate: float | None = None,
    workers: int = 1,
    max_concurrency: int | None = None,
    duration: Duration | None = None,
    drain_timeout: Duration = 60.0,
    warmup: int = 0,
    salt: Salt = "run",
    prompts: str | Path | None = None,
    tokenizer: str | Path | None = None,
    ignore_eos: bool = True,
    title: str | None = None,
    extra_body: dict[str, Any] | str | None = None,
    header: dict[str, str] | list[str] | None = None,
    metrics: bool = True,
    metrics_url: str | None = None,
    metrics_interval: Duration | None = None,
    view: bool = True,
    self_check: bool = True,
    resume: bool = False,
    progress_callback: Callable[[Counts], None] | None = None,
    **options: Any,
) -> Run:
    """Send `trace` to the OpenAI-compatible server at `url` at the times written in it, and record every outcome.

    `out` names the Run file; until it is written, everything is in the journal `<out>.journal/` beside it, from which
    `resume` goes on after a kill. `options` are trace options (`head=100`, `rate=2.0`, `seed=1`, …). Times are counted
    from the trace's first arrival. `duration` and the timeouts are seconds or texts such as `90s`.

    Later turns of a session wait for the answer before them and the think time; `history` says what they carry. A share
    `cancel_rate` of the requests is hung up on `cancel_after` (1 s) after sending. `retries` sends again what failed
    with one of `retry_on`, after `retry_backoff` (0.5 s, doubled each time), each as an attempt of its own.
    `max_concurrency` makes a closed loop of it, and the Run says so. `prompts` is a file of text to cut prompts from,
    `tokenizer` a `tokenizer.json` to count them with. `extra_body` (a dict or JSON) and `header` (a dict or a list of
    `Name=value`) are added to every request. The server's own
    `/metrics` are read beside the API, or at `metrics_url`, every `metrics_interval` (1 s) into the Run's time series,
    unless `metrics` is False. `view` draws a live view where notes are on and standard error is a terminal.
    `progress_callback` gets the counts twice a second.

    Failures are rows, never exceptions. Raises InputError if the trace or a setting is wrong or the server cannot be
    reached before the run. After SIGINT or SIGTERM the Run is returned with the state `interrupted`.
    """
    limits = {"retries": (retries, 0), "workers": (workers, 1), "warmup": (warmup, 0)}
    for name, (value, least) in limits.items():
        if value < least:
            raise InputError(f"--{name} {value}: give at least {least}.")
    if max_concurrency is not None and max_concurrency < workers:
        raise InputError(f"--max-concurrency {max_concurrency}: give at least 1 per worker ({workers}).")
    stop_rule = _StopRule.of(max_errors, max_error_rate)
    again = _retries(retries, retry_backoff, retry_jitter, retry_budget, retry_on)
    hang_up = _hang_up(cancel_rate, cancel_after, recorded_failures)
    connect = _positive(connect_timeout, "--connect-timeout") or CONNECT_TIMEOUT
    drain = seconds(drain_timeout, "--drain-timeout")
    span = None if duration is None else seconds(duration, "--duration")
    waits = {"timeout": timeout, "first_token_timeout": first_token_timeout, "idle_timeout": idle_timeout}
    waited = {name: _positive(value, f"--{name.replace('_', '-')}") for name, value in waits.items()}
    extra, headers = _extra_body(extra_body), _headers(header)
    secret = os.environ.get(api_key_env)
    if secret is None and api_key_env != API_KEY:
        raise InputError(f"--api-key-env {api_key_env}: there is no such environment variable; set it, with the key.")
    if model is not None and not model.strip():
        raise InputError("--model: the name is empty; leave it out for the first model that the server lists.")
    if resume and out is None:
        raise InputError("--resume goes on from the journal beside the run: name the run with --out.")
    journal = _journal_path(out, resume)
    opened = open_trace(trace, **options)
    rows = rows_of(opened, span)
    if rows.is_empty():
        raise InputError(f"{opened.meta.source}: no request is scheduled before --duration {duration}.")
    _check_use(rows, workers, history, recorded_failures, sessions=opened.table["session"].is_not_null().any())
    seed = int(options.get("seed", DEFAULT_SEED))
    schedule = schedule_of(
        rows,
        opened,
        history=history,
        failures=recorded_failures,
        cancel_rate=cancel_rate,
        cancel_after=hang_up,
        seed=seed,
    )
    before = resumption(journal, rows, schedule) if resume and journal is not None else None
    if before is not None and history == "live":
        raise InputError("--resume cannot go on with --history live: the replies of the killed run are not kept.")
    trust = Trust.of(cacert=cacert, cert=cert, key=key, insecure=insecure)
    target = find_target(url, api_key=secret, headers=headers, connect_timeout=connect, trust=trust)
    endpoint, server = _metrics_page(target, metrics, metrics_url, metrics_interval)
    lengths = rows.select("asked_request_tokens", "asked_response_tokens").head(warmup).rows()
    own = None if prompts is None else read_texts(prompts)
    counter = None if tokenizer is None else load_tokenizer(tokenizer)
    limit = check_machine(schedule, workers, self_check)

    async def ask() -> Found:
        return await Preflight(target, connect, waited["timeout"], seed).find(
            model=model,
            api=api,
            words_only=history == "live",
            extra=extra,
            ignore_eos=ignore_eos,
            typical=round(rows["asked_request_tokens"].median() or 1),  # type: ignore[arg-type]
            warmup=[(prompt, max(1, response)) for prompt, response in lengths if 0 < prompt <= PROMPT_LIMIT],
            own=own,
            tokenizer=counter,
        )

    watch = Watch(view=view, endpoint=endpoint)
    try:
        found = _run(ask)
    except BaseException:  # an interrupt too: the watching process must not outlive this one
        watch.close(0.0)
        raise
    notes = [*limit.notes, *found.notes, *_notes_on(schedule, history)]
    for text in notes:
        note(f"replay: {text}")
    if len(rows) < len(opened):
        notes.append(f"{len(opened) - len(rows):,} requests lie after --duration and are left out.")
    plan = Plan(
        target=target,
        dialect=found.dialect,
        salt=salt,
        seed=seed,
        fresh=os.urandom(8),
        journal=journal or Path(tempfile.mkdtemp(prefix="squall-", suffix=".journal")),
        connect_timeout=connect,
        retries=again,
        live=history == "live",
        own_text=found.text,
        block_size=opened.meta.block_size or 0,
        max_concurrency=max_concurrency,
        drain_timeout=drain,
        stop_after=span,
        part="" if before is None else f".{before.number}",
        **waited,
    )
    meta = RunMeta(
        kind="replay",
        title=title or f"{found.dialect.model or 'server'} at {target.host}",
        trace=opened.meta,
        target=_describe(plan, found, api_key_env if secret else None, headers, workers)
        | {
            "history": history if schedule.conversation is not None else None,
            "recorded_failures": recorded_failures,
            "cancel_rate": cancel_rate,
            "cancel_after": hang_up if cancel_rate else None,
            "machine": limit.facts,
        },
        offered=len(rows),
        seed=seed,
        version=__version__,
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        state="running",
        open_loop=max_concurrency is None,
        notes=notes,
    )
    try:
        if before is None:
            plan.journal.mkdir(parents=True, exist_ok=True)
            rows.write_parquet(plan.journal / SCHEDULE)
            write_header(plan.journal, meta)
        else:
            schedule, meta = before.take_up(plan, schedule, meta)
        with watch:
            watch.begin(meta.title, plan.journal, server, target.secrets)
            since = before.since if before else 0
            meta = _conduct(plan, schedule, workers, meta, watch, progress_callback, stop_rule, since)
        write_header(plan.journal, meta)
    except OSError as error:
        raise SquallError(
            f"{plan.journal}: cannot be written ({error.strerror}); what was recorded before is in it."
        ) from error
    run = read_journal(plan.journal)
    facts = {
        "lengths": _asked_and_measured(run),
        "sent_against_asked": sent_against_asked(run),
        "prefix_cache": _prefix_cache(run, schedule, 0 if salt == "request" else plan.block_size),
    }
    run = Run(run.table, msgspec.structs.replace(run.meta, target=run.meta.target | facts), run.series)
    if out is not None:
        write_run(run, out)
    shutil.rmtree(plan.journal)
    return run


def _check_use(
    rows: pl.DataFrame, workers: int, history: History, failures: RecordedFailures, *, sessions: bool
) -> None:
    """Refuse settings that nothing in the trace answers to."""
    if workers > len(rows):
        raise InputError(f"--workers {workers}: there are only {len(rows)} requests to send.")
    if history != "recorded" and not sessions:
        raise InputError(f"--history {history} does nothing: the trace has no sessions; leave it out.")
    if failures != "short" and not rows["failed"].any():
        raise InputError(
            f"--recorded-failures {failures} does nothing: no request failed when the trace was recorded (or "
            "--drop-failed left them out)."
        )


def _positive(value: Duration | None, flag: str) -> float | None:
    found = None if value is None else seconds(value, flag)
    if found == 0:
        raise InputError(f"{flag} 0: no request can be answered in no time; leave it out for none.")
    return found


def _hang_up(rate: float, after: Duration | None, failures: RecordedFailures) -> float:
    """Seconds after which requests are hung up on."""
    if not 0 <= rate <= 1:
        raise InputError(f"--cancel-rate {rate:g}: give a share from 0 to 1.")
    if after is not None and rate == 0 and failures != "cancel":
        raise InputError("--cancel-after does nothing without --cancel-rate or --recorded-failures cancel.")
    return 1.0 if after is None else seconds(after, "--cancel-after")


def _retries(most: int, backoff: Duration | None, jitter: bool, budget: float | None, on: str | None) -> Retries:
    if most == 0 and (backoff is not None or not jitter or budget is not None or on is not None):
        raise InputError(
            "--retry-backoff, --no-retry-jitter, --retry-budget and --retry-on do nothing without --retries."
        )
    kinds = RETRY_ON if on is None else tuple(part.strip() for part in on.split(","))
    for kind in kinds:
        if kind not in RETRY_KINDS and not (kind.isdigit() and 400 <= int(kind) < 600):
            raise InputError(f"--retry-on {kind}: name HTTP statuses or {', '.join(RETRY_KINDS[2:])}.")
    if budget is not None and budget <= 0:
        raise InputError(f"--retry-budget {budget:g}: give a share of the requests above 0.")
    pause = 0.5 if backoff is None else seconds(backoff, "--retry-backoff")
    return Retries(most=most, backoff=pause, jitter=jitter, budget=budget, on=kinds)


@dataclass
class _StopRule:
    """When failures end a run early."""

    errors: int | None
    share: float | None
    fired: str | None = None

    @classmethod
    def of(cls, errors: int | None, share: float | None) -> "_StopRule":
        if errors is not None and errors < 0:
            raise InputError(f"--max-errors {errors}: give at least 0.")
        if share is not None and not 0 <= share < 1:
            raise InputError(f"--max-error-rate {share:g}: give a share from 0 to below 1.")
        return cls(errors, share)

    def look(self, counts: Counts) -> bool:
        """Whether too many requests have failed; what was passed is in `fired`."""
        decided = counts.ok + counts.failed
        if self.errors is not None and counts.failed > self.errors:
            self.fired = f"{counts.failed} requests failed, more than --max-errors {self.errors}: the run was ended."
        elif self.share is not None and decided >= ERRORS_AFTER and counts.failed > self.share * decided:
            self.fired = (
                f"{counts.failed} of {decided} requests failed, more than --max-error-rate {self.share:g}: "
                "the run was ended."
            )
        return self.fired is not None


def _notes_on(schedule: Schedule, history: History) -> list[str]:
    """What must be known of the conversations in the schedule."""
    opens, _ = schedule.turns()
    if opens is None or schedule.root is None or schedule.think is None:
        return []
    later = len(schedule) - len(opens)
    carried = int((schedule.root != schedule.request).sum())
    guessed = int(np.isnan(schedule.think).sum()) - len(opens)
    notes = [
        f"{later:,} later turns wait for the answer before them; {carried:,} carry the history ({history}), the others "
        "are too short to hold it."
    ]
    if guessed > 0:
        notes.append(
            f"{guessed:,} later turns have no recorded think time: they keep their recorded distance, or follow the "
            "answer if that comes later."
        )
    return notes


def _conduct(
    plan: Plan,
    schedule: Schedule,
    workers: int,
    meta: RunMeta,
    watch: Watch,
    callback: Callable[[Counts], None] | None,
    rule: _StopRule,
    since: int,
) -> RunMeta:
    """Send the schedule; returns the metadata with the start's wall-clock time and the state at the end.

    `since` are the nanoseconds of the run's clock at which it goes on, where it was resumed.
    """
    raise_file_limit()
    began = 0

    def started(start: int) -> None:
        nonlocal meta, began
        began = start
        if meta.started is not None:
            return
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

        def follow(counts: Counts) -> int:
            show(counts)
            if stops[0] == 0 and rule.look(counts):
                stops[0] = 1
            return stops[0]

        if workers == 1:
            state = _here(plan, schedule, started, follow, stops, since)
        else:
            compiled()  # here, where one process does it for all
            state = in_processes(plan, schedule, workers, started, follow, stops, since)
    line("")
    if rule.fired is not None:
        note(f"replay: {rule.fired}")
        meta = msgspec.structs.replace(
            meta, notes=[*meta.notes, rule.fired], target=meta.target | {"ended_by": rule.fired}
        )
    return msgspec.structs.replace(meta, state=state)


def _here(
    plan: Plan,
    schedule: Schedule,
    started: Callable[[int], None],
    watch: Callable[[Counts], int],
    stops: list[int],
    since: int,
) -> str:
    async def send() -> None:
        prepare(plan)
        start = time.monotonic_ns() + LEAD - since
        started(start)
        await Sender(plan, schedule, start, watch=watch).run()

    _run(send)
    return "interrupted" if stops[0] else "complete"


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


def _journal_path(out: str | Path | None, resume: bool) -> Path | None:
    if out is None:
        return None
    out = check_run_path(out)
    journal = out.with_name(out.name + ".journal")
    if journal.exists() and not resume:
        raise InputError(
            f"{journal}: an earlier replay was killed and left its journal; go on with --resume, or read it with "
            f"`squall metrics {journal}` and then remove it, or give another name."
        )
    if resume and not journal.exists():
        raise InputError(f"--resume: there is no {journal} to go on from; leave the flag out to start anew.")
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
    fields: dict[str, str] = {}
    for text in given.items() if isinstance(given, dict) else given or ():
        name, equals, value = text.partition("=") if isinstance(text, str) else (text[0], "=", text[1])
        name = name.strip()
        if not equals or not name:
            raise InputError(f"--header {name}: write it as Name=value.")
        if name.lower() in OWN_HEADERS:
            raise InputError(f"--header {name}: squall sets it itself, as HTTP/1.1 needs it; leave it out.")
        if name.lower() in map(str.lower, fields):
            raise InputError(f"--header {name}: it is given twice.")
        fields[name] = value.strip()
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
        "engine": found.engine,
        "timeout": plan.timeout,
        "connect_timeout": plan.connect_timeout,
        "first_token_timeout": plan.first_token_timeout,
        "idle_timeout": plan.idle_timeout,
        "drain_timeout": plan.drain_timeout,
        "retries": plan.retries.most,
        "retry_policy": msgspec.to_builtins(plan.retries) if plan.retries.most else None,
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


def _prefix_cache(run: Run, schedule: Schedule, block_size: int) -> dict[str, Any] | None:
    """Shares of the prompt tokens: what the prompts of different requests share, and what the server's cache knew.

    Turns of a conversation that carry the ones before share more than that. None where nothing is known of either.
    """
    told = run.table.filter(pl.col("status") == "ok").select("cached_tokens", "request_tokens").drop_nulls()
    shared = schedule.shared_share(block_size) if block_size else None
    if shared is None and told.is_empty():
        return None
    prompts = int(told["request_tokens"].sum())
    return {"shared": shared, "cached": told["cached_tokens"].sum() / prompts if prompts else None, "n": len(told)}


def _progress(counts: Counts, elapsed: float) -> str:
    retried = f", {counts.retried:,} retries" if counts.retried else ""
    return (
        f"replay: {counts.released:,}/{counts.total:,} sent, {counts.in_flight:,} in flight, {counts.ok:,} ok, "
        f"{counts.failed:,} failed{retried}, {max(elapsed, 0):.0f} s"
    )
