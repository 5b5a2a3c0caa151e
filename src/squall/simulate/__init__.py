"""A trace through a modelled cluster of vLLM-like engines: what would the requests have felt?

The scheduler and the KV cache are modelled request by request (replica.py, kernel.py), a step's duration by a roofline
(step_time.py) that can be fitted to a real server (calibrate.py). Results of an uncalibrated simulation say so.
"""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from squall.errors import InputError
from squall.progress import progress
from squall.run.table import Run
from squall.seeds import DEFAULT_SEED
from squall.simulate.calibrate import Calibration, calibrated, read_calibration
from squall.simulate.cluster import Cluster, resolve
from squall.simulate.engine import Outcome, run_requests, run_trace
from squall.simulate.hardware import GPU, GPUS, MODELS, Model
from squall.simulate.policies import Choices
from squall.simulate.records import TICKS
from squall.simulate.step_time import StepTime
from squall.simulate.timeline import Slow, check_timeline_path, write_timeline
from squall.simulate.timeline import explain as explain_slowest
from squall.trace.table import Trace, TraceSource
from squall.units import Duration
from squall.verb import callable_room

__all__ = [
    "GPU",
    "GPUS",
    "MODELS",
    "Calibration",
    "Choices",
    "Cluster",
    "Model",
    "StepTime",
    "saturation_rate",
    "simulate",
]


def simulate(
    trace: TraceSource,
    *,
    out: str | Path | None = None,
    model: str | Model | None = None,
    gpu: str | GPU | None = None,
    tp: int | None = None,
    replicas: int = 1,
    fleet: str | None = None,
    kv_blocks: int | None = None,
    block_size: int | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    max_model_len: int | None = None,
    queue_limit: int | None = None,
    timeout: Duration | None = None,
    retries: int = 0,
    engine: str | None = None,
    calibration: "str | Path | Calibration | None" = None,
    title: str | None = None,
    token_times: bool | None = None,
    timeline: str | Path | None = None,
    explain: int = 0,
    **options: Any,
) -> Run:
    """Run a trace through one or more replicas of a modelled vLLM v1 engine.

    Every request generates as many tokens as the trace recorded. What cannot be run is kept as a row of its own:
    requests without a prompt (`cancelled`, `no_prompt`) or without a recorded response (`cancelled`,
    `recorded_failure`), and those that can never fit (`http_error` 400, `unservable`). An interrupt from the keyboard
    ends it early: the run then has the state `interrupted` and what had happened until then, without a timeline.

    Parameters
    ----------
    trace
        A Trace, a file, or a built-in profile; `options` are the trace options (`head`, `rate`, `seed`, …).
    out
        Where to write the run, if anywhere: .parquet, .csv or .jsonl.
    model, gpu, tp
        A built-in name, a Hugging Face config.json or GPU JSON file, or an object; GPUs per replica. Not given:
        those of the calibration, or llama-3.1-8b on one h100.
    replicas, fleet
        How many engines on `gpu`, or engines on several GPUs as `h100=2,a100=4`.
    kv_blocks, block_size, max_num_seqs, max_num_batched_tokens, max_model_len
        The engine's limits (of one replica), as the server reports them; kv_blocks is num_gpu_blocks. Not given: the
        calibration's, or else an estimate of the blocks, 16, and vLLM's defaults for the GPU.
    queue_limit, timeout, retries
        Waiting requests per replica beyond which a request gets 429; time from sending to the last token; how often a
        client tries again after a 429 or timeout (exponential backoff with full jitter; every attempt is a row).
    engine
        `vllm-0.11`, `vllm-0.14`, `vllm-0.19` or `vllm-0.24` (default).
    calibration
        What `calibrate` made. Without it the run says "uncalibrated roofline".
    title
        A short name for reports.
    token_times
        Keep the time of every token (for ITL). Not given: up to a million response tokens.
    options
        The trace options, and the fields of `policies.Choices`: scheduler, preemption, router, prefix_caching, ….
    timeline
        Where to write what happened, request by request and step by step, as Chrome trace JSON for Perfetto.
    explain
        How many of the slowest requests to explain, in `meta.target["slowest"]`.

    Raises
    ------
    InputError
        For a trace, name, file or value that cannot be used.
    """
    from squall.run.files import check_run_path, write_run
    from squall.trace.files import open_trace

    if out is not None:
        check_run_path(out, reads=trace)
    if timeline is not None:
        check_timeline_path(timeline, reads=trace)
    if not 0 <= explain <= 1000:
        raise InputError(f"--explain {explain}: it must be 0 to 1000.")
    words: dict[str, Any] = {
        "model": model,
        "gpu": gpu,
        "tp": tp,
        "replicas": replicas,
        "fleet": fleet,
        "kv_blocks": kv_blocks,
        "block_size": block_size,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
        "queue_limit": queue_limit,
        "timeout": timeout,
        "retries": retries,
        "engine": engine,
    }
    chosen = {name: options.pop(name) for name in Choices.__struct_fields__ if name in options}
    words |= chosen
    fitted = None if calibration is None else read_calibration(calibration)
    cluster = resolve(**words) if fitted is None else calibrated(fitted, words)
    asked = open_trace(trace, **options)
    title_of_bar = (
        f"Simulating {len(asked):,} requests on {cluster.replicas} x {cluster.model.name}, {cluster.gpu.name}"
    )
    with progress(title_of_bar, len(asked)) as done:
        remarks = [] if fitted is None else fitted.remarks(asked, cluster)
        slowest: list[Slow] = []

        def observe(outcome: Outcome, rows: np.ndarray) -> None:
            slowest.extend(explain_slowest(outcome, rows, cluster, explain))
            if timeline is not None:
                write_timeline(outcome, rows, timeline)

        run = run_trace(
            asked,
            cluster,
            seed=options.get("seed", DEFAULT_SEED),
            title=title,
            token_times=token_times,
            remarks=remarks,
            observe=observe if timeline is not None or explain else None,
            watch=lambda come, left: done(come - left),
            partial=True,
        )
    if slowest:
        told = run.meta.target | {"slowest": msgspec.to_builtins(slowest)}
        run = Run(run.table, msgspec.structs.replace(run.meta, target=told), run.series)
    if out is not None:
        write_run(run, out)
    return run


def saturation_rate(trace: Trace, *, calibration: "str | Path | Calibration | None" = None, **cluster: Any) -> float:
    """The highest rate (requests/s) that a cluster sustains for the length mix of `trace`: its throughput with a full
    queue.

    `cluster` are the keywords of `simulate` that describe it. One replica is given all requests at once (the trace's
    rows in order, repeated or evenly thinned to enough for several full batches); the rate is taken between 20 % and
    80 % of the completions, where the batch is in its steady state, times the number of replicas. Above it, queues
    grow without bound; latencies usually become unacceptable well below it. Raises InputError if nothing in the trace
    can run.
    """
    resolved = resolve(**cluster) if calibration is None else calibrated(read_calibration(calibration), cluster)
    one = msgspec.structs.replace(
        resolved,
        replicas=1,
        queue_limit=None,
        timeout=None,
        retries=0,
        choices=Choices(own_blocks=resolved.choices.own_blocks),
        others=[],
    )
    prompt = trace.table["request_tokens"].to_numpy().astype(np.int64)
    output = trace.table["response_tokens"].to_numpy().astype(np.int64)
    longest = min(one.max_model_len, one.usable_blocks * one.block_size)
    rows = np.flatnonzero((prompt > 0) & (output > 0) & (prompt + output <= longest))
    if not rows.size:
        raise InputError(
            f"{trace.meta.source}: no request in it can run on this cluster, so it has no saturation rate."
        )
    fit_at_once = one.usable_blocks * one.block_size / float(np.mean(prompt[rows] + output[rows] / 2))
    wanted = int(np.clip(10 * min(one.max_num_seqs, fit_at_once), 500, 20_000))
    chosen = (
        rows[np.arange(wanted) % rows.size]
        if rows.size < wanted
        else rows[np.linspace(0, rows.size - 1, wanted).astype(int)]
    )
    outcome = run_requests(np.zeros(wanted), prompt[chosen], output[chosen], one)
    ends = np.sort(outcome.attempts["last"]) / TICKS
    low, high = wanted // 5, wanted * 4 // 5
    return float((high - low) / (ends[high] - ends[low]) * resolved.replicas)


callable_room(__name__)
