"""What the sender costs and how true its times are, as the server sees them, beside AIPerf and GuideLLM.

    python benchmarks/replay.py                        # all contestants, some ten minutes, the first time with installs
    python benchmarks/replay.py --only squall          # one of them
    python benchmarks/replay.py --rates 100,300 --seconds 20 --shape 0.3 --workers 1
    python benchmarks/replay.py --streams 10000        # many slow answers at once
    python benchmarks/replay.py --startup              # from the command to the first of 100,000 requests
    python benchmarks/replay.py --million --rates 4000,3000,2000 --workers 2      # a million short answers, at the
                                # first of these rates that 20 s of it show this machine to sustain: verdict, memory
    python benchmarks/replay.py --url http://127.0.0.1:8000 --rates 2 --request 100 --response 24   # a real server

One streaming server on the loopback, pinned to one core: 20 ms to the first of 32 chunks, then one every 5 ms. Every
contestant is run as its users run it, by its command line, in an environment of its own under --peers, where it is
installed from PyPI when it is missing. GuideLLM knows no burstiness and is asked for Poisson arrivals. CPU is user and
system time of the whole process tree, interpreter start included; marginal is what a further request costs: the
difference of two rates over that of their requests. All of them start from
bytecode, as installed programs do. Delivered rate and gap CV are as the server saw the arrivals.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.request import urlopen

import numpy as np

PEERS = {"aiperf": ("aiperf",), "guidellm": ("torch==2.13.0", "guidellm")}
"""What pip is given, one after the other: a torch asked for by its version may be a small build for CPUs."""
CACHE = Path.home() / ".cache" / "squall-peers"
BYTES = "squall/bytes"
"""The tokenizer's name."""
MILLION = 1_000_000
PROBE = 20
"""Seconds of a rate that show whether this machine sustains it."""
# A tokenizer with a token for every byte, made by the peer's own libraries: nothing is downloaded.
TOKENIZER = """
import sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
special = ["<unk>", "<s>", "</s>", "<pad>"]
alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
made = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                        pad_token="<pad>").save_pretrained(sys.argv[1])
"""


@dataclass
class Result:
    """One contestant at one rate."""

    rate: float
    count: int
    arrived: int
    delivered: float
    gap_cv: float
    cpu: float
    memory: float
    seconds: float
    said: str = ""


def gap_cv(times: np.ndarray) -> float:
    """Standard deviation over mean of the gaps."""
    gaps = np.diff(np.sort(times))
    return float(gaps.std() / gaps.mean()) if len(gaps) > 1 else float("nan")


def peer(name: str, cache: Path) -> Path:
    """The environment of a peer, installed if need be."""
    home = cache / name
    if not (home / ".done").exists():
        print(f"installing {name} into {home} …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        for package in PEERS[name]:
            subprocess.run([home / "bin" / "pip", "install", "--quiet", package], check=True, stderr=subprocess.DEVNULL)
        (home / ".done").touch()
    # As if it had been downloaded: AIPerf takes no directory while offline, only a name that lies in the hub's cache.
    model, revision = cache / "hub" / f"models--{BYTES.replace('/', '--')}", "0" * 40
    tokenizer = model / "snapshots" / revision
    if not (tokenizer / "config.json").exists():
        subprocess.run([home / "bin" / "python", "-c", TOKENIZER, tokenizer], check=True, capture_output=True)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text(revision)
        (tokenizer / "config.json").write_text('{"model_type": "gpt2"}')
    return home


def version(name: str, cache: Path) -> str:
    """As pip says it."""
    shown = subprocess.run([cache / name / "bin" / "pip", "show", name], capture_output=True, text=True, check=True)
    return shown.stdout.split("Version: ")[1].split()[0]


def command(name: str, given: argparse.Namespace, url: str, rate: float, count: int, room: Path) -> list[str]:
    """What a user of this contestant would type."""
    if name == "squall":
        trace = room / "trace.parquet"
        arguments = ["replay", trace, "-o", room / "run.parquet", "--url", url, "--workers", given.workers, "--quiet"]
        return [sys.executable, "-m", "squall", *map(str, arguments), "--json", "--api", given.api, "--no-self-check"]
    tools = peer(name, given.peers) / "bin"
    if name == "aiperf":
        return [
            *(str(tools / "aiperf"), "profile", "--url", url, "--model", "loopback", "--tokenizer", BYTES),
            *("--endpoint-type", "chat", "--streaming", "--isl", str(given.request), "--osl", str(given.response)),
            *("--request-rate", str(rate), "--arrival-pattern", "gamma", "--arrival-smoothness", str(given.shape)),
            *("--request-count", str(count), "--num-dataset-entries", "1000", "--ui", "none", "--no-gpu-telemetry"),
            *("--no-server-metrics", "--random-seed", "1", "--artifact-dir", str(room / "aiperf")),
        ]
    lengths = f"prompt_tokens={given.request},output_tokens={given.response}"
    return [  # GuideLLM knows no burstiness: Poisson
        *(str(tools / "guidellm"), "run", "--backend", f"kind=openai_http,target={url},model=loopback"),
        *("--profile", f"kind=poisson,rate={rate}", "--constraint", f"kind=max_requests,count={count}"),
        *("--data", f"kind=synthetic_text,{lengths}", "--tokenizer", f"kind=hf_auto,model={BYTES}"),
        *("--output", f"kind=json,path={room / 'guidellm.json'}", "--disable-console"),
    ]


def used() -> tuple[float, float]:
    """CPU seconds and the largest memory (MB) of the children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime, children.ru_maxrss / 1024


def schedule(given: argparse.Namespace, rate: float, count: int, file: Path) -> np.ndarray:
    """Gamma gaps as a trace file; returns the arrivals."""
    from squall.trace import Trace, TraceMeta, write_trace

    random = np.random.default_rng(given.seed)
    arrival = np.cumsum(random.gamma(given.shape, 1 / (given.shape * rate), count))
    lengths = {"request_tokens": np.full(count, given.request), "response_tokens": np.full(count, given.response)}
    write_trace(Trace.of({"arrival": arrival, **lengths}, TraceMeta(source="benchmark", format="generated")), file)
    return arrival


def run(name: str, given: argparse.Namespace, url: str, rate: float, room: Path, *, known: bool) -> Result:
    """Let a contestant send at `rate`; `known` says that the server tells its arrivals."""
    count = round(rate * given.seconds)
    asked = schedule(given, rate, count, room / "trace.parquet") if name == "squall" else np.zeros(0)
    if known:
        urlopen(url + "/arrivals").read()  # noqa: S310 - forget what came before
    cpu, _ = used()
    began = time.monotonic()
    log = (room / f"{name}.log").open("wb")
    limit = given.seconds * 3 + 90
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    environment = installed() | offline | {"HF_HUB_CACHE": str(given.peers.absolute() / "hub")}
    try:
        done = subprocess.run(
            command(name, given, url, rate, count, room),
            stdout=subprocess.PIPE,
            stderr=log,
            timeout=limit,
            env=environment,
            check=False,
        )
        said = done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired:
        said = f"not done after {limit:.0f} s"
    took = time.monotonic() - began
    after, memory = used()
    arrived = np.array(json.load(urlopen(url + "/arrivals"))) if known else asked  # noqa: S310 - the server above
    arrived = np.sort(arrived)[:count]
    delivered = (len(arrived) - 1) / np.ptp(arrived) if len(arrived) > 1 else 0.0
    text = ""
    if name == "squall" and said.startswith("{"):
        found = json.loads(said)
        late = found["lateness"]
        text = (
            f"{found['verdict']}; {found['succeeded']} ok; lateness p50 {1e3 * late['p50']:.2f} ms, "
            f"p99 {1e3 * late['p99']:.2f} ms; asked {(count - 1) / np.ptp(asked):.2f}/s, gap CV {gap_cv(asked):.3f}; "
            f"TTFT from send p50 {1e3 * found['from_send']['ttft']['p50']:.1f} ms; "
            f"{'; '.join(found['verdict_reasons'])}"
        )
    elif not len(arrived) or said.startswith("not done"):
        text = said[-200:] + (room / f"{name}.log").read_text(errors="replace")[-400:]
    return Result(rate, count, len(arrived), delivered, gap_cv(arrived), after - cpu, memory, took, text)


@cache
def installed() -> dict[str, str]:
    """The environment in which programs use and keep bytecode, and squall's own made as pip makes it."""
    import squall

    subprocess.run([sys.executable, "-m", "compileall", "-q", str(Path(squall.__file__).parent)], check=False)
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def start_up(given: argparse.Namespace, url: str, room: Path) -> None:
    """Seconds from the start of the command to the first request's arrival at the server."""
    count = 100_000
    schedule(given, 300, count, room / "trace.parquet")
    full = command("squall", given, url, 300, count, room)
    for what, arguments in (
        ("first run on a machine: the self-check measures", full[:-1]),
        ("self-check known from an earlier run", full[:-1]),
        ("--no-self-check", full),
    ):
        urlopen(url + "/arrivals").read()  # noqa: S310 - the server above
        environment = installed() | {"XDG_CACHE_HOME": str(room / "cache")}
        began = time.monotonic()
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        time.sleep(6)
        process.send_signal(signal.SIGINT)
        process.wait()
        arrived = json.load(urlopen(url + "/arrivals"))  # noqa: S310
        print(f"start-up to the first of {count:,} requests: {min(arrived) - began:.2f} s ({what})", flush=True)


def million(given: argparse.Namespace, url: str, room: Path) -> None:
    """A million requests at the first rate that a short run shows to be sustained, and what they take."""
    rates = [float(rate) for rate in given.rates.split(",")]
    for rate in rates[:-1]:
        if memory_run(given, url, room, rate, round(rate * PROBE)) == "VALID":
            break
    else:
        rate = rates[-1]
    memory_run(given, url, room, rate, MILLION)


def memory_run(given: argparse.Namespace, url: str, room: Path, rate: float, count: int) -> str:
    """Prints verdict, times, and the memory of every process, while it sends and at the end; returns the verdict."""
    schedule(given, rate, count, room / "trace.parquet")
    before, _ = used()
    process = subprocess.Popen(
        command("squall", given, url, rate, count, room),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=installed(),
    )
    own, workers, sending = 0.0, {}, 0.0
    sends = time.monotonic() + count / rate
    while process.poll() is None:
        own = max(own, memory(process.pid))
        if time.monotonic() < sends:
            sending = own
        for child in children(process.pid):
            workers[child] = max(workers.get(child, 0.0), memory(child))
        time.sleep(0.5)
    found = json.loads(process.stdout.read())
    size = (room / "run.parquet").stat().st_size / 1e6
    cpu, _ = used()
    others = ", ".join(f"{most:.0f}" for most in workers.values() if most > 20) or "none"
    print(
        f"{found['requests']:,} requests at {rate:g}/s, {found['succeeded']:,} ok, {found['verdict']} "
        f"({'; '.join(found['verdict_reasons'])}), lateness p99 {1e3 * found['lateness']['p99']:.2f} ms, "
        f"CPU {1e3 * (cpu - before) / count:.3f} ms/request; MB: the command {sending:.0f} while sending, {own:.0f} at "
        f"the end, its processes {others}; the run's file {size:.0f} MB",
        flush=True,
    )
    return found["verdict"]


def memory(process: int) -> float:
    """MB that the process has taken at most; 0 when it is gone."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    return float(text.split("VmHWM:")[1].split()[0]) / 1024 if "VmHWM:" in text else 0.0


def children(process: int) -> list[int]:
    """The process's children now."""
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a real server instead of the loopback's")
    parser.add_argument("--only", action="append", help="squall, aiperf or guidellm; may be repeated")
    parser.add_argument("--peers", type=Path, default=CACHE, help="where the peers' environments are or will be")
    parser.add_argument("--rates", default="100,300", help="requests/s, two or more for the marginal cost")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--shape", type=float, default=0.3, help="of the gamma gaps; 1 is Poisson, below is burstier")
    parser.add_argument("--api", default="chat", choices=["chat", "completions"])
    parser.add_argument("--request", type=int, default=200)
    parser.add_argument("--response", type=int, default=32)
    parser.add_argument("--first", type=float, default=20, help="ms to the first chunk")
    parser.add_argument("--gap", type=float, default=5, help="ms between chunks")
    parser.add_argument("--streams", type=int, help="so many answers at once instead: 20 s each, a chunk a second")
    parser.add_argument("--startup", action="store_true", help="time to the first of 100,000 requests instead")
    parser.add_argument("--million", action="store_true", help="memory over a million requests of two chunks instead")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    installed()  # before any CPU is counted
    names = given.only or ["squall", *PEERS]
    if given.streams:
        given.rates, given.seconds, given.response, given.gap = f"{given.streams / 10}", 10.0, 20, 1000.0
    if given.million:
        given.response, given.first, given.gap = 2, 1, 1
    if given.streams or given.million or given.startup:
        names = ["squall"]
    rates = [float(rate) for rate in given.rates.split(",")]
    for name in names:
        if name in PEERS:
            peer(name, given.peers)
    server, url = None, given.url
    if url is None:
        server, url = serve(given)
    try:
        with tempfile.TemporaryDirectory() as room:
            if given.startup:
                start_up(given, url, Path(room))
            elif given.million:
                million(given, url, Path(room))
            else:
                contest(names, rates, given, url, known=server is not None)
    finally:
        if server is not None:
            server.terminate()
            server.wait()


def serve(given: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    """The cheap server, on a core of its own, and its URL."""
    from squall.replay.loopback import SERVE

    pin = ["taskset", "-c", "0"] if sys.platform == "linux" and (os.cpu_count() or 1) > 1 else []
    started = [*pin, sys.executable, "-c", SERVE, "--first", str(given.first), "--gap", str(given.gap)]
    server = subprocess.Popen(started, stdout=subprocess.PIPE, text=True)
    return server, f"http://127.0.0.1:{int(server.stdout.readline())}"


def contest(names: list[str], rates: list[float], given: argparse.Namespace, url: str, *, known: bool) -> None:
    """Every contestant at every rate, one after the other, and how they compare."""
    results: dict[str, list[Result]] = {}
    for name in names:
        for rate in rates:
            with tempfile.TemporaryDirectory() as room:
                result = run(name, given, url, rate, Path(room), known=known)
            results.setdefault(name, []).append(result)
            release = version(name, given.peers) if name in PEERS else ""
            print(
                f"{name:9} {release:8} {rate:6g}/s asked, "
                f"{result.delivered:8.2f}/s delivered ({result.arrived} of {result.count}), "
                f"gap CV {result.gap_cv:.3f}, "
                f"CPU {1e3 * result.cpu / max(result.arrived, 1):.3f} ms/request ({result.cpu:.1f} s), "
                f"{result.memory:.0f} MB, {result.seconds:.0f} s  {result.said}",
                flush=True,
            )
    ours = results.get("squall", [])
    for name, found in results.items():
        if name != "squall":
            for mine, theirs in zip(ours, found, strict=False):
                ratio = (theirs.cpu / max(theirs.arrived, 1)) / (mine.cpu / max(mine.arrived, 1))
                print(f"{name:9} {mine.rate:6g}/s: {ratio:.1f} x squall's CPU per request")
        if len(rates) > 1:
            cost = cost_of_one_more(found)
            ratio = f", {cost / cost_of_one_more(ours):.1f} x squall's" if name != "squall" and ours else ""
            print(f"{name:9} marginal CPU {1e3 * cost:.3f} ms/request{ratio}")


def cost_of_one_more(results: list[Result]) -> float:
    """CPU seconds of a further request, between the lowest and the highest rate."""
    low, high = results[0], results[-1]
    return (high.cpu - low.cpu) / max(high.arrived - low.arrived, 1)


if __name__ == "__main__":
    main()
