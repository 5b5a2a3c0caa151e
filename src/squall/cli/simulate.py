"""`squall simulate`: a trace through a modelled cluster, and the headline of what its users would have felt."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from squall.cli.common import Output, Select, TraceArgument, as_options, print_json
from squall.progress import note, printable
from squall.trace.select import TraceOptions

if TYPE_CHECKING:
    from squall.run.metrics import Metrics
    from squall.run.table import Run

INTERRUPTED = 130

CLUSTER = Group("Cluster", sort_key=10)
LIMITS = Group("Engine limits", sort_key=20)
CLIENT = Group("Clients", sort_key=30)
INSIDE = Group("What happened inside", sort_key=40)


SCHEDULING = Group("Scheduling", sort_key=22)
CACHE = Group("KV cache", sort_key=24)
ROUTING = Group("Routing, failures, scaling", sort_key=26)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """The fields of squall.simulate.Choices, here so that --help does not have to import the simulator."""

    scheduler: Annotated[str, Parameter(group=SCHEDULING)] = "fcfs"
    """Who is admitted next: fcfs, priority, sjf, srf, lrf, vtc, edf, or your own as FILE.py:FUNCTION."""
    prediction_error: Annotated[float | None, Parameter(group=SCHEDULING)] = None
    """Standard deviation of the log of the lengths that sjf predicts. [default: 0, it knows them]"""
    aging: Annotated[float | None, Parameter(group=SCHEDULING)] = None
    """How much a second of waiting is worth: tokens for sjf, srf and lrf, classes for priority. [default: 0]"""
    priorities: Annotated[str | None, Parameter(group=SCHEDULING)] = None
    """For priority: numbers of services or models, lower first (conversation=0,api=1)."""
    deadlines: Annotated[str | None, Parameter(group=SCHEDULING)] = None
    """For edf: time from arrival, by service or model (conversation=1s,api=30s)."""
    clients: Annotated[str | None, Parameter(group=SCHEDULING)] = None
    """For vtc: what tells clients apart: session, service or model. [default: the first that the trace has]"""
    step_order: Annotated[str, Parameter(group=SCHEDULING)] = "mixed"
    """Whether a step mixes prefill and decode: mixed (vLLM v1), prefill-first or decode-first."""
    chunk_size: Annotated[int | None, Parameter(group=SCHEDULING)] = None
    """Most tokens of one prompt in a step. [default: the step's]"""
    preemption: Annotated[str, Parameter(group=SCHEDULING)] = "recompute"
    """What becomes of a preempted request's KV cache: recompute, or swap to the host."""
    swap_space: Annotated[float | None, Parameter(group=SCHEDULING)] = None
    """For swap: GiB of host memory per GPU."""
    swap_bandwidth: Annotated[float | None, Parameter(group=SCHEDULING)] = None
    """For swap: GB/s per GPU. [default: 25]"""
    watermark: Annotated[float | None, Parameter(group=CACHE)] = None
    """Share of the blocks that an admission must leave free. [default: the engine's, 0]"""
    prefix_caching: Annotated[bool, Parameter(negative="", group=CACHE)] = False
    """Blocks are shared by prompts that begin alike, by the trace's prefix hashes or its sessions."""
    own_blocks: Annotated[bool | None, Parameter(group=CACHE)] = None
    """Without that: a preempted request still finds its own blocks again, as in vLLM, which caches prefixes unless told
    not to. [default: as calibrated, or no]"""
    eviction: Annotated[str | None, Parameter(group=CACHE)] = None
    """Which cached block goes first: lru or fifo. [default: lru]"""
    shared_prefix: Annotated[int | None, Parameter(group=CACHE)] = None
    """Tokens that all prompts begin with (a system prompt)."""
    host_cache: Annotated[float | None, Parameter(group=CACHE)] = None
    """GiB of host memory per GPU that keep what is evicted."""
    host_bandwidth: Annotated[float | None, Parameter(group=CACHE)] = None
    """GB/s per GPU from there. [default: 25]"""
    router: Annotated[str, Parameter(group=ROUTING)] = "round-robin"
    """Who gets a request: round-robin, random, least-outstanding, least-kv, power-of-two, prefix-affinity or
    session-affinity."""
    scrape_interval: Annotated[str | None, Parameter(group=ROUTING)] = None
    """How old the router's picture of the replicas can get. [default: it always knows]"""
    fail: Annotated[str | None, Parameter(group=ROUTING)] = None
    """Replicas that fail, and when: 0@90s,2@5m."""
    mtbf: Annotated[str | None, Parameter(group=ROUTING)] = None
    """Mean time between failures of a replica, drawn."""
    restart_time: Annotated[str | None, Parameter(group=ROUTING)] = None
    """How long a failed replica is away. [default: 60s]"""
    autoscale: Annotated[str | None, Parameter(group=ROUTING)] = None
    """METRIC:TARGET per replica: queue (waiting requests), kv (share of blocks used) or rate (requests/s)."""
    max_replicas: Annotated[int | None, Parameter(group=ROUTING)] = None
    """For autoscale; the least are --replicas."""
    provisioning: Annotated[str | None, Parameter(group=ROUTING)] = None
    """Until a new replica is ready, its cache cold. [default: 100s]"""
    scale_down_after: Annotated[str | None, Parameter(group=ROUTING)] = None
    """Fewer replicas must have sufficed for so long. [default: 5m]"""
    prefill_replicas: Annotated[int | None, Parameter(group=ROUTING)] = None
    """Engines that only compute prompts."""
    decode_replicas: Annotated[int | None, Parameter(group=ROUTING)] = None
    """Engines that only generate."""
    roles: Annotated[str, Parameter(group=ROUTING)] = "fixed"
    """Whether these two change over to each other, when drained, as the load asks: fixed, backlog or forecast."""
    role_interval: Annotated[str | None, Parameter(group=ROUTING)] = None
    """How often that is considered. [default: 5s]"""
    role_change_time: Annotated[str | None, Parameter(group=ROUTING)] = None
    """From being drained to being ready in the other role. [default: 0s]"""
    kv_bandwidth: Annotated[float | None, Parameter(group=ROUTING)] = None
    """GB/s from a prefill engine to decode engines. [default: 64]"""
    kv_latency: Annotated[str | None, Parameter(group=ROUTING)] = None
    """To set up a transfer. [default: 1ms]"""
    api_request_time: Annotated[str | None, Parameter(group=ROUTING)] = None
    """Of a replica's API server for a request, one after another. [default: the calibration's, or 0s]"""
    api_result_time: Annotated[str | None, Parameter(group=ROUTING)] = None
    """The same, for each sequence of a step's results. [default: the calibration's, or 0s]"""
    price: Annotated[float | None, Parameter(group=ROUTING)] = None
    """Of a replica for an hour; the result then has the cost."""


def simulate(
    trace: TraceArgument,
    *,
    out: Annotated[str, Parameter(name=["--out", "-o"])],
    model: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    gpu: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    tp: Annotated[int | None, Parameter(group=CLUSTER)] = None,
    replicas: Annotated[int, Parameter(group=CLUSTER)] = 1,
    fleet: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    engine: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    calibration: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    kv_blocks: Annotated[int | None, Parameter(group=LIMITS)] = None,
    block_size: Annotated[int | None, Parameter(group=LIMITS)] = None,
    max_num_seqs: Annotated[int | None, Parameter(group=LIMITS)] = None,
    max_num_batched_tokens: Annotated[int | None, Parameter(group=LIMITS)] = None,
    max_model_len: Annotated[int | None, Parameter(group=LIMITS)] = None,
    queue_limit: Annotated[int | None, Parameter(group=CLIENT)] = None,
    timeout: Annotated[str | None, Parameter(group=CLIENT)] = None,
    retries: Annotated[int, Parameter(group=CLIENT)] = 0,
    title: str | None = None,
    timeline: Annotated[str | None, Parameter(group=INSIDE)] = None,
    explain: Annotated[int, Parameter(group=INSIDE)] = 0,
    token_times: Annotated[bool, Parameter(negative="", group=INSIDE)] = False,
    policies: PolicyOptions = PolicyOptions(),
    select: Select = TraceOptions(),
    output: Output = Output(),
) -> int:
    """Run a trace through a modelled cluster of vLLM-like engines.

    Without --calibration, step times are estimates from the GPU's peak rates (25 % off and more), and the result says
    so.

    Parameters
    ----------
    trace
        A trace file, `-`, or a built-in profile such as burstgpt://all.
    out
        Where to write the run: .parquet, .csv or .jsonl.
    model
        A built-in model or a Hugging Face config.json. [default: the calibration's, or llama-3.1-8b]
    gpu
        A built-in GPU or a JSON file. [default: the calibration's, or h100]
    tp
        GPUs per replica (tensor parallel). [default: the calibration's, or 1]
    replicas
        How many engines.
    fleet
        Engines on several GPUs in place of --gpu and --replicas: h100=2,a100=4.
    engine
        vllm-0.11, vllm-0.14, vllm-0.19 or vllm-0.24. [default: the calibration's, or vllm-0.24]
    calibration
        What `squall calibrate` wrote for this model and GPU, or the built-in rtx4090-llama-3.1-8b-vllm-0.19.
    kv_blocks
        KV-cache blocks per replica (num_gpu_blocks of the server). [default: estimated]
    block_size
        Tokens per block. [default: 16]
    max_num_seqs
        Most requests in a batch. [default: vLLM's for the GPU]
    max_num_batched_tokens
        Most tokens in a step. [default: vLLM's for the GPU]
    max_model_len
        Most tokens of a prompt and its response. [default: the model's context, as far as it fits]
    queue_limit
        Waiting requests per replica beyond which a request gets 429. [default: no limit]
    timeout
        Give a request up after this time. [default: never]
    retries
        How often a client tries again after a 429 or a timeout.
    title
        A short name for reports.
    timeline
        Write what happened, request by request and step by step, for https://ui.perfetto.dev (.json).
    explain
        Explain the N slowest requests: queued behind what, preempted when.
    token_times
        Keep the time of every token, for ITL. [default: up to a million response tokens]
    """
    from squall.run.files import check_run_path, write_run
    from squall.simulate import simulate as run_simulation

    check_run_path(out, reads=trace)
    run = run_simulation(
        trace,
        model=model,
        gpu=gpu,
        tp=tp,
        replicas=replicas,
        fleet=fleet,
        kv_blocks=kv_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        queue_limit=queue_limit,
        timeout=timeout,
        retries=retries,
        engine=engine,
        calibration=calibration,
        title=title,
        timeline=timeline,
        explain=explain,
        token_times=True if token_times else None,
        **vars(policies),
        **as_options(select),
    )
    try:
        _tell(run, output)
    finally:  # after what came of it is told, as the disk may be full, and even if nobody listens any more
        write_run(run, out)
    if not output.json:
        print(f"{'written':<12} {printable(out)}")
    return INTERRUPTED if run.meta.state == "interrupted" else 0


def _tell(run: "Run", output: Output) -> None:
    from squall.run import metrics

    for line in run.meta.notes:
        note(line)
    result = metrics(run)
    if output.json:
        import msgspec

        print_json(
            {
                **msgspec.to_builtins(result),
                "step_time": run.meta.step_time,
                "target": run.meta.target,
                "notes": run.meta.notes,
            }
        )
    else:
        _show(run, result)


def _show(run: "Run", result: "Metrics") -> None:
    from squall.report.terminal import console, number, percent, row, table

    screen = console()
    target = run.meta.target
    gpus = f"{target['tp']} x {target['gpu']}" if target["tp"] > 1 else target["gpu"]
    counted = f"{result.requests:,} request{'s' * (result.requests != 1)}"
    text = (
        f"{counted} on {target['replicas']} x {target['model']} ({gpus}, {target['engine']}),"
        f" {target['kv_blocks']:,} KV blocks ({target['kv_blocks_from']}); step time: {run.meta.step_time}"
    )
    screen.print(printable(text), markup=False)
    shown = table("Latency, seconds from schedule", "", "n", "mean", "p50", "p90", "p95", "p99", "max")
    for name in ("ttft", "tpot", "itl", "e2e"):
        it = getattr(result, name)
        if it.n:
            row(shown, name.upper(), it.n, it.mean, it.p50, it.p90, it.p95, it.p99, it.max)
    if shown.row_count:
        screen.print(shown)
    if target.get("slowest"):
        columns = ("row", "sent", "TTFT", "E2E", "queued", "preempted", "reason")
        shown = table("The slowest requests, seconds", *columns, text=6)
        for it in target["slowest"]:
            ttft = "-" if it["ttft"] is None else number(it["ttft"])
            cells = (number(it["sent"]), ttft, number(it["e2e"]), number(it["queued"]), len(it["preempted_at"]))
            row(shown, it["request"], *cells, it["reason"])
        screen.print(shown)
    failures = ", ".join(f"{count:,} {kind}" for kind, count in result.errors.items()) or "none"
    tokens = number(result.output_token_throughput)
    lines = {
        "throughput": f"{number(result.throughput)} requests/s, {tokens} response tokens/s",
        "offered": f"{number(result.offered_rate)} requests/s over {number(result.duration)} s",
        "peak KV use": percent(result.kv_cache.peak),
        "preemptions": f"{result.preemptions or 0:,}",
        "failures": failures,
    }
    if target["unlike_vllm"]:
        lines["not vLLM v1"] = ", ".join(target["unlike_vllm"])
    if target["starved"]:
        longest = number(target["longest_overtaken"])
        lines["starved"] = f"{target['starved']:,} requests, overtaken for up to {longest} s"
    if target.get("role_changes") is not None and "roles" in target["choices"]:
        changes, mean = target["role_changes"], number(target["mean_prefill_replicas"])
        lines["roles"] = f"{changes:,} change{'s' * (changes != 1)}; {mean} replicas for prefill in the mean"
    if "prefix_cache" in target:
        rate = target["prefix_cache"]["hit_rate"]
        lines["prefix hits"] = "none asked" if rate is None else percent(rate)
    if "cost" in target:
        lines["cost"] = f"{number(target['cost'])} for {number(target['replica_seconds'] / 3600)} replica-hours"
    for name, text in lines.items():
        screen.print(f"{name:<12} {printable(text)}", markup=False)
