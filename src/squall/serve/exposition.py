"""The service's `/metrics`, under the names that vLLM gives them, so that dashboards and autoscalers find them.

Times are those of the clients' clock: with `--speed 5` they are a fifth of the modelled ones.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from squall.serve.tokens import EDGES, Outlets
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
        self.ttft, self.e2e = _Histogram(TTFT), _Histogram(E2E)
        self.prompt_tokens = self.finished = self.aborted = 0
        self.refusals: Counter[int] = Counter()

    def first(self, seconds: float, prompt: int) -> None:
        """A first token, so many seconds after the request came."""
        self.ttft.add(seconds)
        self.prompt_tokens += prompt

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


def page(
    tally: Tally,
    outlets: Outlets,
    loads: Sequence[Load],
    model: str,
    cluster: Cluster,
    started: float,
    behind: Sequence[float],
) -> bytes:
    """The page in Prometheus' text format; `behind`: P99 and the largest of the last second's timing errors."""
    name = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    lines: list[str] = []

    def family(metric: str, kind: str, text: str, values: Sequence[tuple[str, float]]) -> None:
        lines.extend((f"# HELP {metric} {text}", f"# TYPE {metric} {kind}"))
        lines.extend(f'{metric}{{model_name="{name}"{labels}}} {value}' for labels, value in values)

    def histogram(metric: str, text: str, edges: Sequence[float], counts: Sequence[int], total: float) -> None:
        reach, below = 0, []
        for edge, count in zip([*map(str, edges), "+Inf"], counts, strict=True):
            reach += count
            below.append(f'{metric}_bucket{{model_name="{name}",le="{edge}"}} {float(reach)}')
        lines.extend((f"# HELP {metric} {text}", f"# TYPE {metric} histogram", *below))
        lines.append(f'{metric}_count{{model_name="{name}"}} {float(reach)}')
        lines.append(f'{metric}_sum{{model_name="{name}"}} {total!r}')

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
    *gaps, gaps_sum = outlets.gaps.tolist()
    generated = sum(tally.ttft.counts) + sum(gaps)
    family(f"{whole}prompt_tokens_total", "counter", "Prompt tokens computed.", [("", float(tally.prompt_tokens))])
    family(f"{whole}generation_tokens_total", "counter", "Tokens generated.", [("", float(generated))])
    done = [(',finished_reason="length"', float(tally.finished)), (',finished_reason="abort"', float(tally.aborted))]
    family(f"{whole}request_success_total", "counter", "Requests that are over.", done)
    ttft, e2e = tally.ttft, tally.e2e
    text = "From the request's last byte to its first token."
    histogram(f"{whole}time_to_first_token_seconds", text, TTFT, ttft.counts, ttft.total)
    histogram(f"{whole}inter_token_latency_seconds", "Between two tokens.", ITL, gaps, gaps_sum / 1e9)
    text = "From the request's last byte to its last token."
    histogram(f"{whole}e2e_request_latency_seconds", text, E2E, e2e.counts, e2e.total)
    config = f',block_size="{cluster.block_size}",num_gpu_blocks="{cluster.kv_blocks}",'
    config += f'enable_prefix_caching="{cluster.choices.prefix_caching}"'
    family(f"{whole}cache_config_info", "gauge", "The cache's settings.", [(config, 1.0)])
    refusals = [(f',code="{status}"', float(count)) for status, count in sorted(tally.refusals.items())]
    family("squall:refused_total", "counter", "Answers that are errors, by HTTP status.", refusals)
    *errors, errors_sum = outlets.errors.tolist()
    text = "How far from its moment a token was written."
    histogram("squall:token_timing_error_seconds", text, EDGES, errors, errors_sum / 1e9)
    family("squall:behind_seconds", "gauge", "P99 of these errors in the last second.", [("", behind[0])])
    family("squall:behind_worst_seconds", "gauge", "The largest of them.", [("", behind[1])])
    lines.extend(("# TYPE process_start_time_seconds gauge", f"process_start_time_seconds {started!r}"))
    return ("\n".join(lines) + "\n").encode()
