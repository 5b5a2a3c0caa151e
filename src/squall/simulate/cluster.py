"""The modelled cluster: everything that a simulation needs to know, resolved from what the user said, with its origin.

    KV blocks = (memory * utilisation - weights / tp - activations - other) / (KV bytes per token * block size)

is only an estimate: the real count depends on what the engine measured at start-up. Give the server's own number
(`num_gpu_blocks`) whenever it is known; it is the most important input of a simulation.
"""

from typing import Any

import msgspec

from squall.errors import InputError
from squall.simulate.hardware import GPU, Model, find_gpu, find_model
from squall.simulate.kernel import LEAST_OUTSTANDING, NEVER, RANDOM, ROUND_ROBIN, TICKS, Limits
from squall.simulate.step_time import StepTime, check_parallel, default_step_time
from squall.units import Duration, seconds

GIB = 2**30

SCHEDULERS = ("fcfs",)
PREEMPTIONS = ("recompute",)
ROUTERS = {"round-robin": ROUND_ROBIN, "random": RANDOM, "least-outstanding": LEAST_OUTSTANDING}

BACKOFF, BACKOFF_CAP = 0.5, 8.0
"""Seconds: a retry waits uniformly in [0, min(8, 0.5 * 2**(attempt - 1))] (exponential backoff, full jitter)."""


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """What distinguishes the versions of the engine."""

    async_scheduling: bool = True
    """The next step is composed while one runs. On by default since vLLM 0.14."""
    full_prompt_gate: bool = True
    """A request is admitted only if its whole prompt fits into the free blocks (scheduler_reserve_full_isl)."""
    watermark: float = 0.0
    """Share of the blocks that an admission must leave free while others run. vLLM 0.24 can set it; by default 0."""
    memory_utilization: float = 0.9


ENGINES = {
    "vllm-0.11": Engine(async_scheduling=False, full_prompt_gate=False),
    "vllm-0.14": Engine(full_prompt_gate=False),
    "vllm-0.19": Engine(),
    "vllm-0.24": Engine(memory_utilization=0.92),
    # What vLLM resolves to on a CPU, with pipeline parallelism and with some speculative decoding.
    "vllm-0.24-sync": Engine(async_scheduling=False, memory_utilization=0.92),
}
DEFAULT_MODEL, DEFAULT_GPU, DEFAULT_ENGINE = "llama-3.1-8b", "h100", "vllm-0.24"


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """A resolved cluster; every replica is the same."""

    model: Model
    gpu: GPU
    tp: int
    replicas: int
    router: str
    engine: str
    kv_blocks: int
    """num_gpu_blocks of one replica, as vLLM logs it; one of them is the null block, which holds no tokens."""
    kv_blocks_from: str
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    queue_limit: int | None
    timeout: float | None
    retries: int
    step_time: StepTime
    step_time_name: str

    @property
    def profile(self) -> Engine:
        """The engine's flags."""
        return ENGINES[self.engine]

    @property
    def usable_blocks(self) -> int:
        """KV blocks of one replica that hold tokens."""
        return self.kv_blocks - 1

    def limits(self) -> Limits:
        """The kernel's view: times in ticks, what is absent as something never reached."""
        step = self.step_time
        return Limits(
            replicas=self.replicas,
            blocks=self.usable_blocks,
            block_size=self.block_size,
            max_seqs=self.max_num_seqs,
            budget=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            asynchronous=int(self.profile.async_scheduling),
            full_gate=int(self.profile.full_prompt_gate),
            watermark=int(self.profile.watermark * self.kv_blocks),
            router=ROUTERS[self.router],
            queue_limit=int(NEVER) if self.queue_limit is None else self.queue_limit,
            timeout=int(NEVER) if self.timeout is None else ticks(self.timeout),
            retries=self.retries,
            backoff=ticks(BACKOFF),
            backoff_cap=ticks(BACKOFF_CAP),
            ingest=ticks(step.a0),
            ingest_per_token=ticks(step.a1),
            delivery=ticks(step.a2 + step.a3),
        )

    def described(self) -> dict[str, Any]:
        """All of it in builtins, for the run's metadata."""
        return {
            "model": self.model.name,
            "gpu": self.gpu.name,
            "tp": self.tp,
            "replicas": self.replicas,
            "router": self.router,
            "scheduler": "fcfs",
            "preemption": "recompute",
            "engine": self.engine,
            "engine_flags": msgspec.to_builtins(self.profile),
            "kv_blocks": self.kv_blocks,
            "kv_blocks_from": self.kv_blocks_from,
            "usable_kv_blocks": self.usable_blocks,
            "block_size": self.block_size,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_model_len": self.max_model_len,
            "queue_limit": self.queue_limit,
            "timeout": self.timeout,
            "retries": self.retries,
            "step_time": self.step_time_name,
            "step_time_coefficients": msgspec.to_builtins(self.step_time),
            "model_shape": msgspec.to_builtins(self.model),
            "gpu_peaks": msgspec.to_builtins(self.gpu),
        }


def ticks(value: float) -> int:
    """Seconds as ticks of the kernel's clock."""
    return round(value * TICKS)


def resolve(
    *,
    model: str | Model | None = None,
    gpu: str | GPU | None = None,
    tp: int | None = None,
    replicas: int = 1,
    scheduler: str = "fcfs",
    preemption: str = "recompute",
    router: str = "round-robin",
    kv_blocks: int | None = None,
    block_size: int | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    max_model_len: int | None = None,
    queue_limit: int | None = None,
    timeout: Duration | None = None,
    retries: int = 0,
    engine: str | None = None,
    step_time: StepTime | None = None,
    step_time_name: str = "uncalibrated roofline",
) -> Cluster:
    """The cluster that these words describe; None takes the default. Raises InputError for what cannot be."""
    _one_of("--scheduler", scheduler, SCHEDULERS)
    _one_of("--preemption", preemption, PREEMPTIONS)
    _one_of("--router", router, ROUTERS)
    engine = DEFAULT_ENGINE if engine is None else engine
    _one_of("--engine", engine, ENGINES)
    shape, device = find_model(model or DEFAULT_MODEL), find_gpu(gpu or DEFAULT_GPU)
    tp = 1 if tp is None else tp
    block_size = 16 if block_size is None else block_size
    check_parallel(shape, tp)
    least = {
        "--replicas": replicas,
        "--kv-blocks": kv_blocks,
        "--block-size": block_size,
        "--max-num-seqs": max_num_seqs,
    }
    least |= {
        "--max-num-batched-tokens": max_num_batched_tokens,
        "--max-model-len": max_model_len,
        "--queue-limit": queue_limit,
    }
    for flag, value in least.items():
        smallest = 2 if flag == "--kv-blocks" else 1
        if value is not None and not smallest <= value <= 10**9:
            raise InputError(
                f"{flag} {value}: it must be at least"
                f" {smallest}{' (one block is the null block)' if smallest == 2 else ''} and at most 1e9."
            )
    if not 0 <= retries <= 1000:
        raise InputError(f"--retries {retries}: it must be 0 to 1000.")
    limit = None if timeout is None else seconds(timeout, "--timeout")
    if limit is not None and not 1e-3 <= limit <= 1e7:
        raise InputError(f"--timeout {timeout}: it must be at least 1 ms and at most 1e7 s.")
    if retries and queue_limit is None and limit is None:
        raise InputError(
            f"--retries {retries} changes nothing: without --queue-limit or --timeout no request fails that could"
            " be retried."
        )

    large = device.memory_gb >= 70 and device.family != "a100"
    budget = max_num_batched_tokens or (8192 if large else 2048)
    seqs = max_num_seqs or min(1024 if large else 256, budget)
    if seqs > budget:
        raise InputError(
            f"--max-num-batched-tokens {budget} is less than --max-num-seqs {seqs}: a step could not serve all it"
            " admits (vLLM refuses this too)."
        )
    blocks, origin = (
        (kv_blocks, "given")
        if kv_blocks
        else estimate_kv_blocks(shape, device, tp, block_size, budget, seqs, ENGINES[engine])
    )
    return Cluster(
        model=shape,
        gpu=device,
        tp=tp,
        replicas=replicas,
        router=router,
        engine=engine,
        kv_blocks=blocks,
        kv_blocks_from=origin,
        block_size=block_size,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len or min(shape.context, (blocks - 1) * block_size),
        queue_limit=queue_limit,
        timeout=limit,
        retries=retries,
        step_time=step_time or default_step_time(device, tp),
        step_time_name=step_time_name,
    )


def estimate_kv_blocks(
    model: Model, gpu: GPU, tp: int, block_size: int, budget: int, seqs: int, engine: Engine
) -> tuple[int, str]:
    """How many KV blocks the engine may find room for, and how that was computed. Raises InputError if there is no
    room.

    Activations are the widest layer's for a full batch and three float copies of the sampled logits; "other" (context,
    CUDA graphs, workspaces, and for tp > 1 the communicator) is set so that the one server whose count is known here is
    met: 2588 blocks for Llama-3.1-8B on an RTX 4090 under vLLM 0.19.
    """
    widest = 2 * max(model.intermediate, model.expert_intermediate * model.experts_used) + 4 * model.hidden
    activations = 2 * budget * widest / tp + 12 * seqs * model.vocab / tp
    other = (1.05 if tp == 1 else 1.5) * GIB
    room = gpu.memory_gb * GIB * engine.memory_utilization - model.memory_bytes / tp - activations - other
    blocks = int(room // (model.kv_bytes(tp) * block_size))
    if blocks < 2:
        raise InputError(
            f"{model.name} does not fit on {tp} x {gpu.name}: its weights take"
            f" {model.memory_bytes / tp / GIB:.1f} of {gpu.memory_gb:g} GiB"
            " per GPU and leave no room for a KV cache; use a larger --tp or another --gpu, or give --kv-blocks."
        )
    return blocks, "estimated from the GPU's memory"


def _one_of(flag: str, value: str, known: Any) -> None:
    if value not in known:
        raise InputError(
            f"{flag} {value}: there is no such one; there {'is' if len(known) == 1 else 'are'} {', '.join(known)}."
        )
