"""What the sender costs and how true its times are, as the server sees them.

    python benchmarks/replay.py                       # a mock in a process of its own: 20 ms, then 32 chunks every 5 ms
    python benchmarks/replay.py --rate 300 --seconds 30 --shape 0.3 --workers 2
    python benchmarks/replay.py --url http://127.0.0.1:8000 --rate 2 --request 100 --response 24   # a real server

Prints: sent and answered, lateness, the CV of the gaps at the server against the schedule's, CPU per request. The
arrivals at the server are known for the mock only.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import numpy as np

import squall
from squall.progress import notes
from squall.trace import Trace, TraceMeta

MOCK = Path(__file__).parents[1] / "tests" / "replay" / "mock.py"


def cpu() -> float:
    """CPU seconds of this process and of its ended children but for the mock, which still runs."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def gap_cv(times: np.ndarray) -> float:
    """Standard deviation over mean of the gaps."""
    gaps = np.diff(np.sort(times))
    return float(gaps.std() / gaps.mean())


def in_ms(value: float | None) -> str:
    """Seconds as milliseconds; `-` where the sample is too small for the statistic."""
    return "-" if value is None else f"{1e3 * value:.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a real server instead of the mock")
    parser.add_argument("--api", default="chat", choices=["chat", "completions"])
    parser.add_argument("--rate", type=float, default=300)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--shape", type=float, default=0.3, help="of the gamma gaps; 1 is Poisson, below is burstier")
    parser.add_argument("--request", type=int, default=200)
    parser.add_argument("--response", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    notes.shown = True

    count = round(given.rate * given.seconds)
    random = np.random.default_rng(given.seed)
    arrival = np.cumsum(random.gamma(given.shape, 1 / (given.shape * given.rate), count))
    lengths = {"request_tokens": np.full(count, given.request), "response_tokens": np.full(count, given.response)}
    trace = Trace.of({"arrival": arrival, **lengths}, TraceMeta(source="benchmark", format="generated"))

    mock, arrived, url = None, None, given.url
    if url is None:
        mock = subprocess.Popen([sys.executable, MOCK], stdout=subprocess.PIPE, text=True)
        url = f"http://127.0.0.1:{int(mock.stdout.readline())}"
    try:
        before = cpu()
        run = squall.replay(trace, url=url, api=given.api, workers=given.workers)
        used = cpu() - before
        if mock:
            arrived = np.array(json.load(urlopen(url + "/arrivals")))  # noqa: S310 - the mock above
    finally:
        if mock:
            mock.terminate()
            mock.wait()

    result = squall.metrics(run)
    late = (run.table["sent"] - run.table["scheduled"]).drop_nulls().to_numpy() * 1e3
    p50, p99, p999 = np.quantile(late, [0.5, 0.99, 0.999])
    print(f"verdict        {result.verdict} {'; '.join(result.verdict_reasons)}")
    print(f"outcomes       {result.succeeded} ok of {result.requests}; failures {result.errors or 'none'}")
    print(f"prompts        {run.meta.target['prompts']}")
    print(f"lengths        {run.meta.target['lengths']}")
    print(f"lateness       p50 {p50:.3f} ms, p99 {p99:.3f} ms, p99.9 {p999:.3f} ms")
    print(
        f"gap CV         schedule {gap_cv(arrival):.3f}, sent {gap_cv(run.table['sent'].drop_nulls().to_numpy()):.3f}"
    )
    if arrived is not None:
        rate = (len(arrived) - 1) / np.ptp(arrived)
        print(f"at the server  {len(arrived)} arrivals, {rate:.2f} of {trace.rate:.2f}/s, gap CV {gap_cv(arrived):.3f}")
    print(f"CPU            {1e3 * used / count:.3f} ms per request, start-up included")
    ttft = result.from_send.ttft
    print(f"TTFT from send mean {in_ms(ttft.mean)}, p50 {in_ms(ttft.p50)}, p99 {in_ms(ttft.p99)}")
    print(f"E2E from send  mean {in_ms(result.from_send.e2e.mean)}; ITL p50 {in_ms(result.itl.p50)}")


if __name__ == "__main__":
    main()
