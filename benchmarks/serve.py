"""What `squall serve` is worth: its agreement with `simulate`, its streams, and its HTTP server beside uvicorn.

    python benchmarks/serve.py agree                      # ten bursty minutes at --speed 5, with a queue and without
    python benchmarks/serve.py streams                    # 3,000 streams at once, at rising token rates
    python benchmarks/serve.py http --uvicorn PYTHON      # PYTHON: an interpreter that has uvicorn, httptools, uvloop

`agree` prints the served latencies (from send, times the speed) over the simulated ones. `streams` prints how far from
their moments the tokens leave, by the server's own clock (`squall:token_timing_error_seconds`), and whether it says so.
`http` has both servers stream 32 timed chunks per request and prints their CPU and how late the chunks reach the
client. Sender and server share this machine's cores.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

TICK = os.sysconf("SC_CLK_TCK")
CHUNKS, FIRST, GAP = 32, 0.02, 0.005
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"tok "},"finish_reason":null}]}\n\n'
REGIMES = {
    "queueing": {"gpu": "a100", "kv_blocks": 2000, "max_num_seqs": 40, "max_num_batched_tokens": 1024},
    "calm": {"gpu": "a100", "kv_blocks": 4000, "max_num_seqs": 128, "max_num_batched_tokens": 2048},
}
STREAMS = ("streams", "speed", "tokens/s", "CPU", "error p50", "p99", "within 5 ms", "worst")
ERROR = "squall:token_timing_error_seconds"
SLOW = ("--gpu", "a100", "--model", "llama-3.1-70b", "--tp", "4", "--kv-blocks", "20000", "--max-num-seqs", "128")


# --- a sender that costs little ---------------------------------------------------------------------------------------


class Stream(asyncio.Protocol):
    """One request on a connection of its own, and when its pieces came."""

    def __init__(self, request: bytes, over: "asyncio.Event", left: list[int]) -> None:
        self.request, self.over, self.left = request, over, left
        self.times: list[float] = []
        self.events: list[int] = []
        """How many had come by then."""
        self.seen = 0
        self.sent = 0.0
        self.complete = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.sent = time.monotonic()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.times.append(time.monotonic())
        self.seen += data.count(b"data:")
        self.events.append(self.seen)
        if data.endswith(b"0\r\n\r\n"):
            self.complete = True
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.left[0] -= 1
        if not self.left[0]:
            self.over.set()


async def send(port: int, body: bytes, at: list[float]) -> list[Stream]:
    """A stream for each moment of `at` (s from now); returns when all are over."""
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    request = head % len(body) + body
    loop, over, left = asyncio.get_running_loop(), asyncio.Event(), [len(at)]
    start, made, tasks = loop.time(), [], []
    for moment in at:
        await asyncio.sleep(max(0.0, start + moment - loop.time()))
        stream = Stream(request, over, left)
        made.append(stream)
        tasks.append(loop.create_task(loop.create_connection(lambda it=stream: it, "127.0.0.1", port)))
    await asyncio.wait_for(over.wait(), 240)
    return made


# --- http: the same answer from two servers ---------------------------------------------------------------------------


def ours(first: float, gap: float) -> None:
    """squall's server with an application that does nothing but write on time."""
    import uvloop

    from squall.serve.http import listen

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def handle(request: Any) -> None:
            frame, due = request.frame(EVENT), loop.time() + first

            def step(k: int) -> None:
                if request.over:
                    return
                request.events(frame, last=k == CHUNKS - 1)
                if k < CHUNKS - 1:
                    loop.call_at(due + (k + 1) * gap, step, k + 1)

            loop.call_at(due, step, 0)

        _, _, port = await listen(handle, "127.0.0.1", 0, body_limit=1 << 20, connection_limit=20_000)
        print(port, flush=True)
        await asyncio.Event().wait()

    uvloop.run(run())


def kept(first: float, gap: float) -> None:
    """uvicorn (httptools, uvloop, no access log) with the smallest ASGI application that does the same."""
    import socket

    import uvicorn

    async def application(scope: Any, receive: Any, tell: Any) -> None:
        loop = asyncio.get_running_loop()
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        due = loop.time() + first
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await asyncio.sleep(due - loop.time())
        await tell({"type": "http.response.start", "status": 200, "headers": headers})
        for k in range(CHUNKS):
            await tell({"type": "http.response.body", "body": EVENT, "more_body": k < CHUNKS - 1})
            if k < CHUNKS - 1:
                await asyncio.sleep(max(0.0, due + (k + 1) * gap - loop.time()))

    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(
        application, http="httptools", loop="uvloop", log_level="error", access_log=False, lifespan="off"
    )
    uvicorn.Server(config).run(sockets=[listener])


def compare_http(given: argparse.Namespace) -> None:
    import numpy as np
    import uvloop

    cases = [("200 requests/s, 5 ms apart", GAP, np.cumsum(np.random.default_rng(1).exponential(1 / 200, 3000)))]
    cases.append(("1,000 streams, 250 ms apart", 0.25, np.linspace(0, 2, 1000)))
    print(f"{'server':<9} {'load':<28} {'ok':>6} {'CPU/request':>12} {'chunk late p50':>15} {'p99':>9}")
    for load, gap, at in cases:
        for name, python in (("squall", sys.executable), ("uvicorn", given.uvicorn)):
            if not python:
                continue
            command = [python, __file__, "--serve-as", name, "--gap", str(gap)]
            with program(*command) as process:
                port = int(process.stdout.readline())
                before = cpu_of(process.pid)
                streams = uvloop.run(send(port, b'{"stream":true}', at.tolist()))
                used = cpu_of(process.pid) - before
            done = [stream for stream in streams if stream.complete]
            late = np.concatenate([lateness(stream, gap) for stream in done])
            p50, p99 = (1e3 * np.quantile(late, q) for q in (0.5, 0.99))
            print(
                f"{name:<9} {load:<28} {len(done):>6} {1e3 * used / len(streams):>9.3f} ms {p50:>12.2f} ms "
                f"{p99:>6.2f} ms",
                flush=True,
            )


def lateness(stream: Stream, gap: float) -> Any:
    """Seconds by which the last chunk of each read came after its moment, counted from the sending of the request."""
    import numpy as np

    events = np.array(stream.events)
    return (np.array(stream.times) - (stream.sent + FIRST + gap * (events - 1)))[events > 0]


# --- serve itself -----------------------------------------------------------------------------------------------------


def bursty() -> Any:
    """Ten minutes of gamma gaps of shape 0.3 under a rate that switches between 3 and 11 a second each minute."""
    import numpy as np

    from squall.trace import Trace, TraceMeta

    draw = np.random.default_rng(5)
    arrival: list[float] = []
    for minute in range(10):
        rate = 11 if minute % 2 else 3
        at = minute * 60 + draw.gamma(0.3, 1 / (0.3 * rate), 4 * 60 * rate).cumsum()
        arrival += at[at < (minute + 1) * 60].tolist()
    n = len(arrival)
    lengths = {"request_tokens": draw.integers(20, 1500, n), "response_tokens": draw.integers(10, 120, n)}
    return Trace.of({"arrival": np.array(arrival), **lengths}, TraceMeta(source="bursty", format="generated"))


def agree(given: argparse.Namespace) -> None:
    import squall

    trace, speed = bursty(), given.speed
    print(f"{len(trace)} requests in {trace.span:.0f} s, at --speed {speed:g}; served / simulated")
    for name in given.regime or REGIMES:
        words = {"model": "llama-3.1-8b", **REGIMES[name]}
        offline = squall.metrics(squall.simulate(trace, **words))
        flags = [text for key, value in words.items() for text in (f"--{key.replace('_', '-')}", str(value))]
        with program(sys.executable, "-m", "squall", "serve", "--port", "0", "--speed", str(speed), *flags) as process:
            url = json.loads(process.stdout.readline())["url"]
            run = squall.replay(trace, url=url, api="completions", speed=speed)
        online = squall.metrics(run)
        ratios = []
        for metric in ("ttft", "e2e"):
            ours_, theirs = getattr(online.from_send, metric), getattr(offline, metric)
            for q in ("mean", "p50", "p99"):
                ratio = speed * getattr(ours_, q) / getattr(theirs, q) - 1
                ratios.append(f"{metric.upper()} {q} {100 * ratio:+.1f} % of {1e3 * getattr(theirs, q):.0f} ms")
        print(f"{name}: {online.succeeded} ok, {online.verdict} {'; '.join(online.verdict_reasons)}", flush=True)
        print(f"    {', '.join(ratios)}", flush=True)


def streams(given: argparse.Namespace) -> None:
    """As many streams as asked for at once: each that ends is followed by another, of other lengths."""
    import uvloop

    print("{:>8} {:>6} {:>9} {:>6} {:>9} {:>9} {:>13} {:>9}".format(*STREAMS))
    for speed in given.speeds:
        command = [sys.executable, "-m", "squall", "serve", "--port", "0", "--speed", str(speed), *SLOW]
        command[-1] = str(max(128, given.batch))
        command += ["--max-num-batched-tokens", str(max(8192, 2 * given.batch))]
        replicas = str(-(-given.streams // given.batch))
        with tempfile.TemporaryFile() as said, program(*command, "--replicas", replicas, stderr=said) as process:
            port = int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])
            before, after, worst = uvloop.run(keep_open(process.pid, port, given, speed))
            said.seek(0)
            complaint = b"cannot keep up" in said.read()
        took = after["at"] - before["at"]
        rate, used = ((after[name] - before[name]) / took for name in ("vllm:generation_tokens_total", "cpu"))
        p50, p99 = (1e3 * errors_of(before, after, q) for q in (0.5, 0.99))
        within = share_within(before, after, 0.005)
        print(
            f"{given.streams:>8} {speed:>6g} {rate:>9,.0f} {100 * used:>4.0f} % {p50:>6.2f} ms {p99:>6.2f} ms "
            f"{100 * within:>11.2f} % {1e3 * worst:>6.1f} ms  {'says that it cannot keep up' if complaint else ''}",
            flush=True,
        )


def share_within(before: dict[str, float], after: dict[str, float], limit: float) -> float:
    """The share of the tokens between two looks whose timing error was at most `limit` s, an edge of the buckets."""
    bucket, everything = f"{ERROR}_bucket{{{limit}}}", f"{ERROR}_count"
    return (after[bucket] - before[bucket]) / (after[everything] - before[everything])


def errors_of(before: dict[str, float], after: dict[str, float], q: float) -> float:
    """The quantile `q` of the timing errors (s) between two looks, interpolated in its bucket."""
    edges = [float(name.partition("{")[2][:-1]) for name in after if name.startswith(f"{ERROR}_bucket")]
    low, below = 0.0, 0.0
    for edge in sorted(edges):
        reach = share_within(before, after, edge) if edge < float("inf") else 1.0
        if reach >= q:
            return low + (edge - low) * (q - below) / (reach - below) if edge < float("inf") else edge
        low, below = edge, reach
    return float("inf")


async def keep_open(
    pid: int, port: int, given: argparse.Namespace, speed: float
) -> tuple[dict[str, float], dict[str, float], float]:
    """Hold the streams open for a while: the server's metrics before and after, its largest timing error (s)."""
    import numpy as np

    draw, loop, closed = np.random.default_rng(1), asyncio.get_running_loop(), asyncio.Event()
    mean = max(40, round(given.seconds * 12 * speed))  # about so many tokens in that time

    async def one() -> None:
        while not closed.is_set():
            words = {"content": "a " * int(draw.integers(1, 400))}
            length = int(draw.integers(mean // 2, 3 * mean // 2))
            body = json.dumps({"messages": [words], "max_tokens": length, "stream": True}).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            stream = Stream(head + body, asyncio.Event(), [1])
            stream.times = stream.events = _Nothing()
            await loop.create_connection(lambda it=stream: it, "127.0.0.1", port)
            await stream.over.wait()

    tasks = []
    for _ in range(given.streams):
        tasks.append(loop.create_task(one()))
        await asyncio.sleep(float(draw.exponential(5 / given.streams)))
    await asyncio.sleep(5)
    before, worst = await look(pid, port), 0.0
    for _ in range(round(given.seconds)):
        await asyncio.sleep(1.0)
        after = await look(pid, port)
        worst = max(worst, after["squall:behind_worst_seconds"])
    closed.set()
    for task in tasks:
        task.cancel()
    return before, after, worst


class _Nothing(list[Any]):
    def append(self, _: Any) -> None:
        """Keep nothing."""


async def look(pid: int, port: int) -> dict[str, float]:
    """The sums of the server's metrics by name (and edge of a bucket), and the CPU seconds of its process."""
    page = await asyncio.to_thread(page_of, port)
    found: dict[str, float] = {"at": time.monotonic(), "cpu": cpu_of(pid)}
    for name, edge, value in re.findall(r'^([\w:]+)\{.*?(?:le="(.*)")?\} (\S+)$', page, re.MULTILINE):
        name += f"{{{edge}}}" if edge else ""
        found[name] = found.get(name, 0.0) + float(value)
    return found


def page_of(port: int) -> str:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


@contextlib.contextmanager
def program(*command: str, **more: Any) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([*command], stdout=subprocess.PIPE, text=True, **more)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def cpu_of(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["agree", "streams", "http"])
    parser.add_argument("--speed", type=float, default=5)
    parser.add_argument("--regime", action="append", choices=list(REGIMES))
    parser.add_argument("--streams", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=60, help="streams per replica")
    parser.add_argument("--speeds", type=float, nargs="+", default=[0.1, 0.4, 0.6, 0.8, 1.2])
    parser.add_argument("--seconds", type=float, default=15, help="how long they are looked at")
    parser.add_argument("--uvicorn", help="a Python that has uvicorn, httptools and uvloop")
    parser.add_argument("--serve-as", choices=["squall", "uvicorn"], help=argparse.SUPPRESS)
    parser.add_argument("--gap", type=float, default=GAP, help=argparse.SUPPRESS)
    given = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if given.serve_as:
        (ours if given.serve_as == "squall" else kept)(FIRST, given.gap)
        return
    parts = {"agree": agree, "streams": streams, "http": compare_http}
    for name in [given.part] if given.part else parts:
        parts[name](given)


if __name__ == "__main__":
    main()
