"""The service's `/metrics`, under the names that vLLM gives them, so that dashboards and autoscalers find them.

Times are those of the clients' clock: with `--speed 5` they are a fifth of the modelled ones.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from squall.simulate.cluster import Cluster
from squall.simulate.live import Load

# Edges of vLLM's own buckets, seconds.
TTFT: tuple[float, ...] = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
TTFT += (160.0, 640.0, 2560.0)
ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
E2E: tuple[float, ...] = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
)
E2E += (1920.0, 7680.0)


class _Histogram:
    __slots__ = ("counts", "edges", "total")

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges, self.counts, self.total = edges, [0] * (len(edges) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.total += value


class Tally:
    """What has been answered so far."""

    def __init__(self) -> None:
        self.ttft, self.itl, self.e2e = _Histogram(TTFT), _Histogram(ITL), _Histogram(E2E)
        self.prompt_tokens = self.generated_tokens = self.finished = self.aborted = 0
        self.refusals: Counter[int] = Counter()

    def first(self, seconds: float, prompt: int) -> None:
        """A first token, so many seconds after the request came."""
        self.ttft.add(seconds)
        self.prompt_tokens += prompt
        self.generated_tokens += 1

    def gaps(self, nanoseconds: list[int]) -> None:
        """Further tokens, each so long after the one before it."""
        for gap in nanoseconds:
            self.itl.add(gap / 1e9)
        self.generated_tokens += len(nanoseconds)

    def finish(self, seconds: float) -> None:
        """The last token, so many seconds after the request came."""
        self.e2e.add(seconds)
        self.finished += 1

    def cancelled(self) -> None:
        """A client went away."""
        self.aborted += 1

    def refused(self, status: int) -> None:
        """An answer that is an error."""
        self.refusals[status] += 1


def page(tally: Tally, loads: Sequence[Load], model: str, cluster: Cluster, started: float, behind: float) -> bytes:
    """The page in Prometheus' text format."""
    name = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    lines: list[str] = []

    def family(metric: str, kind: str, text: str, values: Sequence[tuple[str, float]]) -> None:
        lines.extend((f"# HELP {metric} {text}", f"# TYPE {metric} {kind}"))
        lines.extend(f'{metric}{{model_name="{name}"{labels}}} {value}' for labels, value in values)

    def per_engine(field: str) -> list[tuple[str, float]]:
        return [(f',engine="{r}"', float(getattr(load, field))) for r, load in enumerate(loads)]

    family("vllm:num_requests_running", "gauge", "Requests in the batches.", per_engine("running"))
    family("vllm:num_requests_waiting", "gauge", "Requests in the queues.", per_engine("waiting"))
    family("vllm:kv_cache_usage_perc", "gauge", "Share of the KV blocks in use.", per_engine("kv_used"))
    family("vllm:num_preemptions_total", "counter", "Preemptions.", per_engine("preemptions"))
    whole = "vllm:"
    if cluster.choices.prefix_caching:
        asked, found = per_engine("prefix_asked"), per_engine("prefix_found")
        family(f"{whole}prefix_cache_queries_total", "counter", "Prompt tokens looked for in the cache.", asked)
        family(f"{whole}prefix_cache_hits_total", "counter", "Prompt tokens found in the cache.", found)
    family(f"{whole}prompt_tokens_total", "counter", "Prompt tokens computed.", [("", float(tally.prompt_tokens))])
    family(f"{whole}generation_tokens_total", "counter", "Tokens generated.", [("", float(tally.generated_tokens))])
    done = [(',finished_reason="length"', float(tally.finished)), (',finished_reason="abort"', float(tally.aborted))]
    family(f"{whole}request_success_total", "counter", "Requests that are over.", done)
    for metric, text, histogram in (
        ("time_to_first_token_seconds", "From the request's last byte to its first token.", tally.ttft),
        ("inter_token_latency_seconds", "Between two tokens.", tally.itl),
        ("e2e_request_latency_seconds", "From the request's last byte to its last token.", tally.e2e),
    ):
        metric = whole + metric
        reach, below = 0, []
        for edge, count in zip([*map(str, histogram.edges), "+Inf"], histogram.counts, strict=True):
            reach += count
            below.append(f'{metric}_bucket{{model_name="{name}",le="{edge}"}} {float(reach)}')
        lines.extend((f"# HELP {metric} {text}", f"# TYPE {metric} histogram", *below))
        lines.append(f'{metric}_count{{model_name="{name}"}} {float(reach)}')
        lines.append(f'{metric}_sum{{model_name="{name}"}} {histogram.total!r}')
    config = f',block_size="{cluster.block_size}",num_gpu_blocks="{cluster.kv_blocks}",'
    config += f'enable_prefix_caching="{cluster.choices.prefix_caching}"'
    family(f"{whole}cache_config_info", "gauge", "The cache's settings.", [(config, 1.0)])
    errors = [(f',code="{status}"', float(count)) for status, count in sorted(tally.refusals.items())]
    family("squall:refused_total", "counter", "Answers that are errors, by HTTP status.", errors)
    family("squall:behind_seconds", "gauge", "P99 of how late tokens left in the last second.", [("", behind)])
    lines.extend(("# TYPE process_start_time_seconds gauge", f"process_start_time_seconds {started!r}"))
    return ("\n".join(lines) + "\n").encode()
