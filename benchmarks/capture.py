"""What the recording proxy costs: the same load directly, through a bare relay, `squall capture`, and LiteLLM.

    python benchmarks/capture.py                          # 200 requests/s for 20 s, 32 chunks each
    python benchmarks/capture.py --litellm PYTHON         # PYTHON: an interpreter that has `litellm[proxy]`
    python benchmarks/capture.py --streams 2000           # so many at once: 20 chunks each, a second apart

The bare relay copies bytes between two sockets on uvloop and reads nothing: the least that any relay in Python costs.
Prints CPU per request of the relaying process and the first-token latency that it adds. The load comes from
`squall replay`; a line whose run is CLIENT-LIMITED says so, because sender, relay and mock share this machine's cores.
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import uvloop

import squall
from squall.trace import Trace, TraceMeta

MOCK = Path(__file__).parents[1] / "tests" / "replay" / "mock.py"
TICK = os.sysconf("SC_CLK_TCK")


class Pipe(asyncio.Protocol):
    """One direction of the bare relay."""

    def __init__(self, port: int | None, other: "Pipe | None" = None) -> None:
        self.port, self.other, self.waiting = port, other, []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        if self.other is not None:
            self.other.other = self
            for data in self.other.waiting:
                transport.write(data)
        elif self.port is not None:
            loop = asyncio.get_running_loop()
            self.task = loop.create_task(loop.create_connection(lambda: Pipe(None, self), "127.0.0.1", self.port))

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.waiting.append(data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.transport.close()


def bare_relay(port: int) -> None:
    """Serve until killed."""

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: Pipe(port), "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.Event().wait()

    uvloop.run(run())


@contextlib.contextmanager
def program(*command: str, **more: object) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([*command], stdout=subprocess.PIPE, text=True, **more)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


@contextlib.contextmanager
def relay(kind: str, port: int, given: argparse.Namespace, folder: Path) -> Iterator[tuple[int | None, int]]:
    """The relay `kind` in front of `port`: its process and its own port."""
    if kind == "direct":
        yield None, port
    elif kind == "bare relay":
        with program(sys.executable, __file__, "--bare", str(port)) as process:
            yield process.pid, int(process.stdout.readline())
    elif kind == "squall capture":
        flags = ("--upstream", f"http://127.0.0.1:{port}", "--port", "0", "-o", str(folder / "capture"))
        with program(sys.executable, "-m", "squall", "capture", *flags) as process:
            yield process.pid, int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])
    else:
        file = folder / "litellm.yaml"
        file.write_text(
            f"model_list: [{{model_name: mock, litellm_params: {{model: openai/mock, api_key: none, "
            f"api_base: 'http://127.0.0.1:{port}/v1'}}}}]\n"
        )
        own = given.port
        command = (str(Path(given.litellm).parent / "litellm"), "--config", str(file), "--port", str(own))
        quiet = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", **os.environ}
        quiet["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"  # loopback, no database
        with program(*command, "--host", "127.0.0.1", env=quiet, stderr=subprocess.DEVNULL) as process:
            end = time.monotonic() + 90
            while time.monotonic() < end:
                with contextlib.suppress(OSError):
                    urlopen(f"http://127.0.0.1:{own}/health/liveliness", timeout=2).read()
                    break
                time.sleep(0.5)
            yield process.pid, own


def cpu_of(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def in_ms(value: float | None) -> str:
    """Seconds as milliseconds; `-` where the sample is too small."""
    return "-" if value is None else f"{1e3 * value:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--litellm", help="a Python that has litellm[proxy]")
    parser.add_argument("--litellm-rate", type=float, help="[default: --rate]")
    parser.add_argument("--litellm-seconds", type=float, help="[default: --seconds]")
    parser.add_argument("--port", type=int, default=4517)
    parser.add_argument("--streams", type=int)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if given.bare:
        bare_relay(given.bare)
        return
    kinds = ["direct", "bare relay", "squall capture", *(["LiteLLM"] if given.litellm else [])]
    print(f"{'through':<16} {'rate':>5} {'ok':>6} {'CPU/request':>12} {'TTFT p50':>9} {'p99':>9}  verdict")
    pace = ("--gap", "1000") if given.streams else ()
    with tempfile.TemporaryDirectory() as scratch, program(sys.executable, str(MOCK), *pace) as mock:
        upstream = int(mock.stdout.readline())
        for kind in kinds:
            rate, seconds = given.rate, given.seconds
            if kind == "LiteLLM":
                rate, seconds = given.litellm_rate or rate, given.litellm_seconds or seconds
            count = round(rate * seconds)
            tokens = 32
            if given.streams:
                count, rate, tokens = given.streams, given.streams / 10, 20
            arrival = np.cumsum(np.random.default_rng(1).exponential(1 / rate, count))
            columns = {"arrival": arrival, "request_tokens": np.full(count, 200)}
            columns["response_tokens"] = np.full(count, tokens)
            trace = Trace.of(columns, TraceMeta(source="benchmark", format="generated"))
            with relay(kind, upstream, given, Path(scratch)) as (pid, port):
                before = cpu_of(pid) if pid else 0.0
                run = squall.replay(
                    trace, url=f"http://127.0.0.1:{port}", out=Path(scratch) / f"{len(kind)}.parquet", model="mock"
                )
                used = cpu_of(pid) - before if pid else 0.0
            got = squall.metrics(run)
            ttft = got.from_send["ttft"] if isinstance(got.from_send, dict) else got.from_send.ttft
            cost = f"{1e3 * used / count:.2f} ms" if pid else "-"
            print(
                f"{kind:<16} {rate:>5.0f} {got.succeeded:>6} {cost:>12} "
                f"{in_ms(ttft.p50):>9} {in_ms(ttft.p99):>9}  {got.verdict} "
                f"{'; '.join(got.verdict_reasons)} {got.errors or ''}",
                flush=True,
            )


if __name__ == "__main__":
    main()
