"""What this machine can send: limits of the system, and the processor time of a request and of a chunk, measured.

Before a run a cheap server in a process of its own streams paced answers to the engine for half a second; what that
costs is kept for later runs on the same machine. A plan that needs more than the processors have is refused, one that
needs most of them is warned of: its verdict would be CLIENT-LIMITED. The server is also that of `benchmarks/replay.py`:
it costs less than any client.
"""

import argparse
import asyncio
import heapq
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from time import monotonic_ns
from typing import Any

import msgspec
import numpy as np
import uvloop

from squall import __version__
from squall.errors import InputError
from squall.replay.exchange import Exchange
from squall.replay.pacer import Alarm
from squall.replay.schedule import Schedule
from squall.replay.sockets import pool_for

WARN, REFUSE = 0.7, 1.0
STREAMS, ROUNDS = 24, 3
CHUNKS, GAP = 32, 0.003
WINDOW = 10.0
"""Seconds over which a schedule's load is averaged: answers take time, so its bursts are smeared over it."""
SLOW_ANSWER = 60.0
SERVE = "from squall.replay.loopback import main; main()"
"""The server as a program: `python -c SERVE --first MS --gap MS` prints its port."""


class Cost(msgspec.Struct, frozen=True):
    """Processor seconds of the sender on this machine."""

    request: float
    chunk: float


@dataclass(frozen=True)
class Machine:
    """What was found out; `notes` are for the user, `facts` for the run's metadata."""

    facts: dict[str, Any]
    notes: list[str]


def check_machine(schedule: Schedule, workers: int, measure: bool) -> Machine:
    """Whether this machine can send `schedule`, as far as that can be known before. Raises InputError if it cannot."""
    files = raise_file_limit()
    ports = _ports()
    facts: dict[str, Any] = {"files": files, "ports": ports, "cpus": os.cpu_count()}
    notes = []
    most = min(files * workers, ports)
    crowd = _most_in(schedule.at, SLOW_ANSWER)
    if crowd > most:
        notes.append(
            f"{crowd:,} requests are scheduled within {SLOW_ANSWER:g} s; if the server keeps them all that long, this "
            f"machine's {files:,} files and {ports:,} ports for one address do not suffice (ulimit -n)."
        )
    if not measure:
        return Machine(facts, notes)
    cost = known_cost()
    need = _need(schedule, cost) / min(workers, os.cpu_count() or 1)
    facts |= {"cost": msgspec.to_builtins(cost), "need": round(need, 4)}
    share = f"needs {need:.0%} of {workers} worker{'s' * (workers > 1)} on this machine in its busiest {WINDOW:g} s"
    if need > REFUSE:
        raise InputError(
            f"The schedule {share}: what was measured would be the sender. Use more --workers, a lower --rate, another "
            "machine, or --no-self-check."
        )
    if need > WARN:
        notes.append(f"The schedule {share}; more --workers would be safer.")
    return Machine(facts, notes)


def raise_file_limit() -> int:
    """Raise the limit of open files as far as it goes (to 65,536); returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return 65536 if soft == resource.RLIM_INFINITY else soft


def _ports() -> int:
    """Ports that connections to one address can have."""
    try:
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        return int(high) - int(low) + 1
    except (OSError, ValueError):
        return 16384


def _most_in(at: np.ndarray, seconds: float) -> int:
    """The most requests within a window of so many seconds."""
    if not len(at):
        return 0
    return int((np.searchsorted(at, at + round(seconds * 1e9), side="left") - np.arange(len(at))).max())


def _need(schedule: Schedule, cost: Cost) -> float:
    """Processor share in the busiest window."""
    if not len(schedule):
        return 0.0
    seconds = cost.request + cost.chunk * schedule.response_tokens.astype(float)
    window = (schedule.at / 1e9 // WINDOW).astype(np.int64)
    span = min(WINDOW, max(float(schedule.at[-1] - schedule.at[0]) / 1e9, 1.0))
    return float(np.bincount(window - window[0], seconds).max() / span)


# --- the measurement -------------------------------------------------------------------------------------------------


def known_cost() -> Cost:
    """The cost on this machine, measured now or by an earlier run of the same version."""
    file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "squall" / "loopback.json"
    key = f"{__version__} {platform.node()} {platform.machine()} {platform.python_version()} {os.cpu_count()}"
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Cost])[key]
    except (OSError, KeyError, msgspec.DecodeError):
        pass
    cost = measure_cost()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(msgspec.json.encode({key: cost}))
        temporary.replace(file)
    except OSError:
        pass  # an unwritable home only costs the measurement again
    return cost


def measure_cost() -> Cost:
    """Stream paced answers of one and of many chunks from a process of its own to the engine's connections."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, "--first", "3", "--gap", str(GAP * 1e3)],
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
    )
    try:
        port = int((server.stdout.readline() if server.stdout else "") or 0)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_stream(port, 1, 1))  # warm
            one = runner.run(_stream(port, 1, ROUNDS * 4))
            many = runner.run(_stream(port, CHUNKS, ROUNDS))
    finally:
        server.terminate()
        server.wait()
    chunk = max((many - one) / (CHUNKS - 1), 1e-6)
    return Cost(request=max(one - chunk, 1e-6), chunk=chunk)


def _environment() -> dict[str, str]:
    room = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (room, os.environ.get("PYTHONPATH", ""))))}


async def _stream(port: int, chunks: int, rounds: int) -> float:
    """Processor seconds per request of so many chunks."""
    loop = asyncio.get_running_loop()
    pool = pool_for(loop, ("127.0.0.1", port))
    body = b'{"messages":[{"role":"user","content":"%b"}],"max_tokens":%d}' % (b" word" * 200, chunks)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    waiting: list[asyncio.Future[Exchange]] = []

    def send() -> None:
        if waiting:
            pool.send(Exchange(0, 1, head + body, 0, waiting.pop().set_result))
            alarm.set(monotonic_ns() + round(GAP / STREAMS * 1e9))

    alarm = Alarm(pool.loop, send)
    used = 0.0
    for _ in range(rounds):
        over = [loop.create_future() for _ in range(STREAMS)]
        began = time.process_time()
        waiting.extend(over)
        send()
        for exchange in await asyncio.gather(*over):
            exchange.outcome()
        used += time.process_time() - began
    alarm.close()
    pool.close()
    return used / (rounds * STREAMS)


# --- the server ------------------------------------------------------------------------------------------------------

_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n"
    b"Connection: keep-alive\r\n\r\n"
)
_LIMIT = re.compile(rb'"max_(?:completion_|output_)?tokens"\s*:\s*(\d+)')
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)


def _chunk(**fields: Any) -> bytes:
    base = {"id": "chatcmpl-6f1c2a", "object": "chat.completion.chunk", "created": 1764000000, "model": "loopback"}
    event = b"data: " + json.dumps(base | fields).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


def _choice(said: dict[str, Any], finish: str | None = None) -> bytes:
    return _chunk(choices=[{"index": 0, **said, "finish_reason": finish}])


_ROLE = _choice({"delta": {"role": "assistant", "content": ""}})
_TOKEN, _TEXT = _choice({"delta": {"content": " word"}}), _choice({"text": " word"})


class Server:
    """Streams `max_tokens` chunks per request, the first after `first` and the others every `gap` seconds."""

    def __init__(self, first: float, gap: float) -> None:
        self.first, self.gap = first, gap
        self.arrivals: list[float] = []
        self._due: list[tuple[float, int, _Stream]] = []  # a heap
        self._number = 0
        self._loop = asyncio.get_running_loop()
        self._awake = False

    def add(self, at: float, stream: "_Stream") -> None:
        """Call `stream.step` at `at`."""
        self._number += 1
        heapq.heappush(self._due, (at, self._number, stream))
        if not self._awake:
            self._awake = True
            self._loop.call_later(0.001, self._tick)

    def _tick(self) -> None:
        """Write everything that is due: one timer for all streams."""
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            at, _, stream = heapq.heappop(self._due)
            if stream.step():
                self._number += 1
                heapq.heappush(self._due, (at + self.gap, self._number, stream))
        self._awake = bool(self._due)
        if self._awake:
            self._loop.call_later(max(0.0005, self._due[0][0] - time.monotonic()), self._tick)


class _Stream:
    """One answer."""

    __slots__ = ("last", "left", "token", "transport", "write")

    def __init__(self, transport: Any, tokens: int, token: bytes, last: bytes) -> None:
        self.transport, self.write = transport, transport.write
        self.left, self.token, self.last = tokens, token, last

    def step(self) -> bool:
        """Write what is due now; whether more is to come."""
        if self.transport.is_closing():
            return False
        if self.left == 0:
            self.write(self.last)
            return False
        self.left -= 1
        if self.left == 0:
            self.write(self.token + self.last)
            return False
        self.write(self.token)
        return True


class _Serve(asyncio.Protocol):
    def __init__(self, server: Server) -> None:
        self.server, self.held = server, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.held = held = self.held + data if self.held else data
        end = held.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        found = _LENGTH.search(held, 0, end)
        whole = end + (int(found[1]) if found else 0)
        if len(held) >= whole:
            self.held = held[whole:]
            self.answer(held[:end], held[end:whole])

    def answer(self, head: bytes, body: bytes) -> None:
        at = time.monotonic()
        if head.startswith(b"POST") and b"tokens" in body:
            asked = _LIMIT.search(body)
            tokens = int(asked[1]) if asked else 16
            stream = b'"stream":true' in body or b'"stream": true' in body or b'"stream"' not in body
            prompt = body.count(b" ") if b'"messages"' in body else body.count(b",")
            usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
            if not stream:
                message = {"role": "assistant", "content": " word" * tokens}
                choice = {"index": 0, "message": message, "text": " word" * tokens, "finish_reason": "length"}
                self.document({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage})
                return
            if tokens > 1:
                self.server.arrivals.append(at)
            chat = b"/chat/" in head.partition(b"\r\n")[0]
            last = _choice({"delta": {}} if chat else {"text": ""}, "length") + _chunk(choices=[], usage=usage)
            self.transport.write(_HEAD + _ROLE if chat else _HEAD)
            token, end = _TOKEN if chat else _TEXT, b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
            done = _Stream(self.transport, tokens, token, last + end)
            self.server.add(at + self.server.first, done)
        elif b"/arrivals" in head:
            self.document(self.server.arrivals)
            self.server.arrivals = []
        else:
            self.document({"object": "list", "data": [{"id": "loopback", "object": "model", "owned_by": "squall"}]})

    def document(self, value: Any) -> None:
        body = json.dumps(value).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)


async def _serve(port: int, first: float, gap: float) -> None:
    server = Server(first, gap)
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: _Serve(server), "127.0.0.1", port, backlog=8192)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Serve until killed; prints the port."""
    parser = argparse.ArgumentParser(description="A streaming server that costs next to nothing, on the loopback.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--first", type=float, default=20, help="ms to the first chunk")
    parser.add_argument("--gap", type=float, default=5, help="ms between chunks")
    given = parser.parse_args()
    raise_file_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(given.port, given.first / 1e3, given.gap / 1e3))


if __name__ == "__main__":
    main()
