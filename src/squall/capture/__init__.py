"""A recording proxy in front of an OpenAI-compatible server: live traffic becomes a Trace and a Run, without content.

What BurstGPT's authors built into one service (times, token counts, model, failures, and never text) for any service.
"""

import asyncio
import os
import signal
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from squall.capture.asked import Hasher
from squall.capture.imported import import_log
from squall.capture.record import Header, Recorder, finish, write_header
from squall.capture.relay import Relay, Settings, make_client
from squall.errors import InputError, SquallError
from squall.progress import note
from squall.replay.pacer import rare_collections
from squall.run import Run
from squall.trace import Trace
from squall.trace.table import SERVICES
from squall.units import Duration, seconds
from squall.verb import callable_room

__all__ = ["capture", "finish", "import_log"]

SWITCH = 0.0005
"""Seconds after which a thread gives the interpreter to one that waits for it."""
MOST_OBJECTS = 2_000_000
"""More than all connections can have: there are no circles among them, so nothing is left to collect before."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Ready(msgspec.Struct):
    """What is printed when the proxy listens."""

    url: str
    upstream: str
    out: str


def capture(
    upstream: str,
    *,
    out: str | Path,
    port: int = 8080,
    host: str = "127.0.0.1",
    rotate: Duration = "1h",
    rotate_size: int = 64 << 20,
    timeout: Duration = "10m",
    drain_timeout: Duration = "30s",
    ask_usage: bool = True,
    prefix: bool = True,
    service: str | None = None,
    salt: str | Path | None = None,
    max_body: int = 64 << 20,
    max_connections: int = 10_000,
    rate_limit: float | None = None,
    insecure: bool = False,
    ready: Callable[[Ready], None] | None = None,
) -> tuple[Trace, Run] | None:
    """Relay to `upstream` on `host`:`port` (0: any free port) until SIGINT or SIGTERM, recording into the folder `out`.

    A segment is closed after `rotate` or `rotate_size` bytes of records. `timeout` is how long the upstream may be
    silent within an answer. With `ask_usage` streams are asked for their usage, which is hidden from clients that did
    not ask. `prefix` keeps salted hashes of prompt blocks. The salt is random and forgotten at the end, unless `salt`
    names a file that holds it (made if missing), so that hashes of two captures can be compared. `ready` is called
    once the proxy listens. Returns everything captured in `out` (None: nothing was), which is also written there as
    trace.parquet and run.parquet. Raises InputError for a wrong option, SquallError if the port is taken.
    """
    settings = Settings(
        upstream=_checked(upstream),
        ask_usage=ask_usage,
        prefix=prefix,
        service=service,
        timeout=seconds(timeout, "--timeout"),
        max_body=max_body,
        max_connections=max_connections,
        rate_limit=rate_limit,
    )
    if service is not None and service not in SERVICES:
        raise InputError(f"--service {service}: it is one of {', '.join(SERVICES)}.")
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port}: a port is 0 to 65535.")
    if rate_limit is not None and not rate_limit > 0:
        raise InputError(f"--rate-limit {rate_limit}: it is a positive number of requests/s; leave it out for none.")
    if min(max_body, max_connections, rotate_size) < 1:
        raise InputError("--max-body, --max-connections and --rotate-size are at least 1.")
    if host not in LOOPBACK:
        note(f"capture: listening on {host}: everyone who reaches it can use the server behind it.")
    every, drain = seconds(rotate, "--rotate"), seconds(drain_timeout, "--drain-timeout")
    folder = Path(out)
    header = _begin(folder, settings.upstream)
    hasher = Hasher(_salt(salt))
    zero = time.monotonic_ns()
    recorder = Recorder(folder, header, rotate_seconds=every, rotate_bytes=rotate_size)
    relay = Relay(settings, recorder, hasher, zero, _tls(settings.upstream, insecure))
    try:
        _serve(relay, host, port, drain, lambda url: _tell(ready, Ready(url, settings.upstream, str(folder))))
    finally:
        recorder.close()
    if recorder.dropped:
        note(f"capture: {recorder.dropped:,} records could not be written and are lost.")
    if list(folder.glob("live-?????.jsonl")):
        note(f"capture: a segment could not be closed; `squall capture --finish {folder}` does so when there is room.")
        return None
    if not list(folder.glob("trace-?????.parquet")):
        why = "" if recorder.dropped else ": no request for generated text came by"
        note(f"capture: nothing was captured{why}.")
        return None
    return finish(folder)


def _tell(ready: "Callable[[Ready], None] | None", what: Ready) -> None:
    if ready is not None:
        ready(what)


def _checked(upstream: str) -> str:
    parts = urlsplit(upstream)
    try:
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        fine = False
    if not fine:
        raise InputError(f"--upstream {upstream}: it is a URL such as http://127.0.0.1:8000.")
    if parts.username or parts.password or parts.query:
        raise InputError("--upstream: leave credentials and query out; each client sends its own key.")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


def _begin(folder: Path, upstream: str) -> Header:
    """Make the folder, close what an earlier capture that was killed left in it, and write the new header."""
    from squall.capture.record import HEADER, close_segment

    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: this is a file; give a folder for the capture.")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / HEADER).is_file():
        old = msgspec.json.decode((folder / HEADER).read_bytes(), type=Header)
        for live in sorted(folder.glob("live-?????.jsonl")):
            close_segment(live, old)
    elif any(folder.iterdir()):
        raise InputError(f"{folder}: the folder holds other files; give an empty or a new one.")
    now = time.time_ns()
    local = time.localtime(now // 1_000_000_000)
    midnight = local.tm_hour * 3600 + local.tm_min * 60 + local.tm_sec + now % 1_000_000_000 / 1e9
    header = Header(upstream=upstream, epoch=now, midnight=midnight, weekday=local.tm_wday)
    write_header(folder, header)
    return header


def _salt(path: "str | Path | None") -> bytes:
    if path is None:
        return os.urandom(32)
    path = Path(path)
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(os.urandom(32))
    salt = path.read_bytes()
    if not 16 <= len(salt) <= 64:
        raise InputError(f"--salt {path}: it holds {len(salt)} bytes; a salt is 16 to 64 random bytes.")
    return salt


def _tls(upstream: str, insecure: bool) -> ssl.SSLContext | None:
    if not upstream.startswith("https://"):
        if insecure:
            raise InputError("--insecure has no effect on an http:// upstream; leave it out.")
        return None
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _serve(relay: Relay, host: str, port: int, drain: float, listening: Callable[[str], None]) -> None:
    import uvloop

    async def run() -> None:
        loop = asyncio.get_running_loop()
        stopped = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopped.set)
        try:
            server = await loop.create_server(make_client(relay), host, port, backlog=4096)
        except OSError as error:
            raise SquallError(f"--port {port}: cannot listen on {host}:{port} ({error.strerror or error}).") from error
        name = f"[{host}]" if ":" in host else host
        listening(f"http://{name}:{server.sockets[0].getsockname()[1]}")
        while not stopped.is_set():
            relay.sweep()
            await _wait(stopped, 1.0)
        # Drain: no new connections, answers under way may end.
        relay.draining = True
        server.close()
        end = loop.time() + drain
        stopped.clear()
        while relay.gauges.in_flight and loop.time() < end and not stopped.is_set():
            relay.sweep()
            await _wait(stopped, 0.1)
        relay.close()
        await asyncio.sleep(0)

    # The recorder's thread may not keep the loop waiting for the interpreter's lock.
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        with rare_collections(MOST_OBJECTS), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run())
    finally:
        sys.setswitchinterval(before)


async def _wait(event: asyncio.Event, limit: float) -> None:
    try:
        async with asyncio.timeout(limit):
            await event.wait()
    except TimeoutError:
        return


callable_room(__name__)
