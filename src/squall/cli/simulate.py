"""`squall simulate`: a trace through a modelled cluster, and the headline of what its users would have felt."""

from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from squall.cli.common import Output, Select, TraceArgument, as_options, print_json
from squall.progress import note, printable
from squall.trace.select import TraceOptions

if TYPE_CHECKING:
    from squall.run.metrics import Metrics
    from squall.run.table import Run

CLUSTER = Group("Cluster", sort_key=10)
LIMITS = Group("Engine limits", sort_key=20)
CLIENT = Group("Clients", sort_key=30)
INSIDE = Group("What happened inside", sort_key=40)


def simulate(
    trace: TraceArgument,
    *,
    out: Annotated[str, Parameter(name=["--out", "-o"])],
    model: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    gpu: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    tp: Annotated[int | None, Parameter(group=CLUSTER)] = None,
    replicas: Annotated[int, Parameter(group=CLUSTER)] = 1,
    router: Annotated[str, Parameter(group=CLUSTER)] = "round-robin",
    scheduler: Annotated[str, Parameter(group=CLUSTER)] = "fcfs",
    preemption: Annotated[str, Parameter(group=CLUSTER)] = "recompute",
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
    router
        Who gets a request: round-robin, random or least-outstanding.
    scheduler
        fcfs.
    preemption
        recompute.
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
    """
    from squall.simulate import simulate as run_simulation

    run = run_simulation(
        trace,
        out=out,
        model=model,
        gpu=gpu,
        tp=tp,
        replicas=replicas,
        scheduler=scheduler,
        preemption=preemption,
        router=router,
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
        **as_options(select),
    )
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
        _show(run, result, out)
    return 0


def _show(run: "Run", result: "Metrics", out: str) -> None:
    from squall.report.terminal import console, number, percent, row, table

    screen = console()
    target = run.meta.target
    gpus = f"{target['tp']} x {target['gpu']}" if target["tp"] > 1 else target["gpu"]
    screen.print(
        f"{result.requests:,} requests on {target['replicas']} x {target['model']} ({gpus}, {target['engine']}),"
        f" {target['kv_blocks']:,} KV blocks ({target['kv_blocks_from']}); step time: {run.meta.step_time}",
        markup=False,
    )
    shown = table("Latency, seconds from schedule", "", "n", "mean", "p50", "p90", "p95", "p99", "max")
    for name in ("ttft", "tpot", "itl", "e2e"):
        it = getattr(result, name)
        if it.n:
            row(shown, name.upper(), it.n, it.mean, it.p50, it.p90, it.p95, it.p99, it.max)
    screen.print(shown)
    if target.get("slowest"):
        shown = table("The slowest requests, seconds", "row", "sent", "TTFT", "E2E", "queued", "preempted", "reason")
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
        "written": out,
    }
    for name, text in lines.items():
        screen.print(f"{name:<12} {printable(text)}", markup=False)
