"""What this machine can send: limits of the system, and the processor time of a request and of a chunk, measured.

Before a run a cheap server in a process of its own streams paced answers to the engine for half a second; what that
costs is kept for later runs on the same machine. A plan that needs more than the processors have is refused, one that
needs most of them is warned of: its verdict would be CLIENT-LIMITED.
"""

import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from squall import __version__
from squall.errors import InputError
from squall.replay.connection import Exchange, Pool
from squall.replay.loop import Loop
from squall.replay.pacer import Alarm, Pacer
from squall.replay.schedule import Schedule

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
        _stream(port, 1, 1)  # warm
        one = _stream(port, 1, ROUNDS * 4)
        many = _stream(port, CHUNKS, ROUNDS)
    finally:
        server.terminate()
        server.wait()
    chunk = max((many - one) / (CHUNKS - 1), 1e-6)
    return Cost(request=max(one - chunk, 1e-6), chunk=chunk)


def _environment() -> dict[str, str]:
    room = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (room, os.environ.get("PYTHONPATH", ""))))}


def _stream(port: int, chunks: int, rounds: int) -> float:
    """Processor seconds per request of so many chunks."""
    loop = Loop()
    pool = Pool(loop, ("127.0.0.1", port))
    body = b'{"messages":[{"role":"user","content":"%b"}],"max_tokens":%d}' % (b" word" * 200, chunks)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    used = sum(_round(loop, pool, head + body) for _ in range(rounds))
    pool.close()
    loop.close()
    return used / (rounds * STREAMS)


def _round(loop: Loop, pool: Pool, request: bytes) -> float:
    """Processor seconds of one request on each stream, the streams evenly apart."""
    over: list[Exchange] = []
    pacer = Pacer(np.arange(STREAMS) * round(GAP / STREAMS * 1e9), time.monotonic_ns())

    def end(exchange: Exchange) -> None:
        over.append(exchange)
        if len(over) == STREAMS:
            loop.stop()

    def ring() -> None:
        for _ in pacer.due(time.monotonic_ns()):
            pool.send(Exchange(0, 1, request, 0, end))
        deadline = pacer.deadline()
        if deadline is not None:
            alarm.set(deadline)

    alarm = Alarm(loop, ring)
    began = time.process_time()
    ring()
    loop.run(within=SLOW_ANSWER)
    for exchange in over:
        exchange.outcome()
    used = time.process_time() - began
    alarm.close()
    return used
