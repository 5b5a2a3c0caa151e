"""The modelled cluster: everything that a simulation needs to know, resolved from what the user said, with its origin.

    KV blocks = (memory * utilisation - weights / tp - activations - other) / (KV bytes per token * block size)

is only an estimate: the real count depends on what the engine measured at start-up. Give the server's own number
(`num_gpu_blocks`) whenever it is known; it is the most important input of a simulation.
"""

from typing import Any

import msgspec
import numpy as np

from squall.errors import InputError
from squall.simulate import records, replica
from squall.simulate.hardware import GPU, Model, find_gpu, find_model
from squall.simulate.policies import AUTOSCALERS, ROLES, ROUTERS, SCALE_EVERY, STEP_ORDERS, Choices
from squall.simulate.records import NEVER, TICKS, Limits, StepCost
from squall.simulate.step_time import StepTime, check_parallel, default_step_time, step_cost
from squall.units import Duration, seconds

GIB = 2**30

SWAP_BANDWIDTH, KV_BANDWIDTH, KV_LATENCY = 25.0, 64.0, 1e-3
"""GB/s to the host's memory and between prefill and decode replicas, and seconds that a transfer takes to set up."""
PROVISIONING, SCALE_DOWN_AFTER = 100.0, 300.0
"""Seconds until a new replica is ready, and that fewer must have sufficed before one is stopped."""

MOST_PLACES = 20_000_000
"""Places in the batches of all replicas together: 2 GB of memory."""
MOST_KEPT = 100_000_000
"""Blocks in the host caches of all replicas together: 3 GB."""

ROLE_INTERVAL, ROLE_GAIN = 5.0, 1.2
"""Seconds between two looks at the roles of replicas, and by what factor a change must lower the load of the fuller
side."""

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


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Replicas of another kind than the first ones of a cluster."""

    gpu: GPU
    replicas: int
    kv_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    step_time: StepTime


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """A resolved cluster; its replicas are the same but for those of `others`."""

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
    choices: Choices = Choices()
    others: list[Machine] = []
    """On other GPUs; `replicas` counts them too."""

    @property
    def profile(self) -> Engine:
        """The engine's flags."""
        return ENGINES[self.engine]

    @property
    def usable_blocks(self) -> int:
        """KV blocks of one replica that hold tokens."""
        return self.kv_blocks - 1

    @property
    def block_bytes(self) -> float:
        """Of one KV block on one GPU."""
        return self.model.kv_bytes(self.tp) * self.block_size

    @property
    def capacity(self) -> int:
        """Replicas that there can be at once."""
        return self.choices.max_replicas or self.replicas

    def limits(self) -> Limits:
        """The kernel's view: times in ticks, what is absent as something never reached."""
        step, chosen = self.step_time, self.choices
        scaling = chosen.autoscaling()
        changing = chosen.roles in ROLES
        swapping = self.block_bytes / ((chosen.swap_bandwidth or SWAP_BANDWIDTH) * 1e9)
        sending = self.model.kv_bytes(self.tp) * self.tp / ((chosen.kv_bandwidth or KV_BANDWIDTH) * 1e9)
        return Limits(
            replicas=self.capacity,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            asynchronous=int(self.profile.async_scheduling),
            full_gate=int(self.profile.full_prompt_gate),
            order=STEP_ORDERS[chosen.step_order],
            chunk=chosen.chunk_size or 0,
            swap=max(1, ticks(swapping)) if chosen.preemption == "swap" else 0,
            router=ROUTERS[self.router],
            scrape=ticks(chosen.time("scrape_interval", 0.0)),
            queue_limit=int(NEVER) if self.queue_limit is None else self.queue_limit,
            timeout=int(NEVER) if self.timeout is None else ticks(self.timeout),
            retries=self.retries,
            backoff=ticks(BACKOFF),
            backoff_cap=ticks(BACKOFF_CAP),
            ingest=ticks(step.a0),
            ingest_per_token=ticks(step.a1),
            front_in=ticks(chosen.time("api_request_time", step.s_in)),
            front_out=ticks(chosen.time("api_result_time", step.s_out)),
            delivery=ticks(step.a2 + step.a3),
            transfer=ticks(chosen.time("kv_latency", KV_LATENCY)),
            transfer_per_token=ticks(sending),
            per_prompt_token=self._prompt_token_seconds() * TICKS if changing else 0.0,
            scale_by=ROLES[chosen.roles] if changing else AUTOSCALERS[scaling[0]] if scaling else 0,
            scale_target=ROLE_GAIN if changing else scaling[1] if scaling else 1.0,
            scale_every=ticks(chosen.time("role_interval", ROLE_INTERVAL) if changing else SCALE_EVERY),
            scale_down_after=ticks(chosen.time("scale_down_after", SCALE_DOWN_AFTER)),
            provisioning=ticks(
                chosen.time("role_change_time", 0.0) if changing else chosen.time("provisioning", PROVISIONING)
            ),
            least_replicas=self.replicas,
            windows=1,
            debug=0,
        )

    def _prompt_token_seconds(self) -> float:
        """Of a replica that computes nothing but prompts, in full steps of one prompt each."""
        cost, budget = step_cost(self.step_time, self.model, self.gpu, self.tp), float(self.max_num_batched_tokens)
        gpu = replica.gpu_seconds(cost, budget, 1.0, 0.0, budget**2 / 2)
        host = cost.host + cost.host_per_sequence + cost.host_prompts
        took = max(gpu, host) + cost.gap if self.profile.async_scheduling else gpu + host
        return float(took / budget)

    def machines(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The replicas as they begin, and what their steps cost, for the kernel."""
        share = self.profile.watermark if self.choices.watermark is None else self.choices.watermark
        first = Machine(
            gpu=self.gpu,
            replicas=self.capacity - sum(machine.replicas for machine in self.others),
            kv_blocks=self.kv_blocks,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            step_time=self.step_time,
        )
        replicas, costs = [], []
        for machine in (first, *self.others):
            replicas.append(
                kernel_replicas(
                    machine.replicas,
                    blocks=machine.kv_blocks - 1,
                    max_seqs=machine.max_num_seqs,
                    budget=machine.max_num_batched_tokens,
                    watermark=int(share * machine.kv_blocks),
                    host_free=int((self.choices.swap_space or 0.0) * 2**30 // self.block_bytes),
                )
            )
            costs += [step_cost(machine.step_time, self.model, machine.gpu, self.tp)] * machine.replicas
        them = np.concatenate(replicas)
        them["up"][self.replicas :] = records.OFF
        if self.choices.disaggregated:
            them["role"] = records.DECODE
            them["role"][: self.choices.prefill_replicas] = records.PREFILL
        return them, *kernel_costs(costs)

    def described(self) -> dict[str, Any]:
        """All of it in builtins, for the run's metadata."""
        return {
            "model": self.model.name,
            "gpu": self.gpu.name,
            "tp": self.tp,
            "replicas": self.replicas,
            "router": self.router,
            "scheduler": self.choices.scheduler,
            "preemption": self.choices.preemption,
            "unlike_vllm": self.choices.unlike_vllm,
            "choices": {
                name: value
                for name, value in msgspec.to_builtins(self.choices).items()
                if value != getattr(Choices(), name)
            },
            "others": msgspec.to_builtins(self.others),
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


def kernel_replicas(count: int, **fields: int) -> np.ndarray:
    """(count,) REPLICA, idle and ready, with these fields."""
    replicas = np.zeros(count, records.REPLICA)
    replicas["head"] = replicas["tail"] = -1
    replicas["up"] = records.READY
    for name, value in fields.items():
        replicas[name] = value
    replicas["free"] = replicas["blocks"]
    return replicas


def kernel_costs(costs: list[StepCost]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) COST and (n, k, 2) step tables."""
    points = np.zeros((len(costs), max(len(cost.points) for cost in costs), 2))
    rows = np.zeros(len(costs), records.COST)
    for i, cost in enumerate(costs):
        rows[i] = (*cost[:-1], len(cost.points))
        points[i, : len(cost.points)] = cost.points
    return rows, points


def ticks(value: float) -> int:
    """Seconds as ticks of the kernel's clock."""
    return round(value * TICKS)


def resolve(
    *,
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
    step_time: StepTime | None = None,
    step_time_name: str = "uncalibrated roofline",
    **choices: Any,
) -> Cluster:
    """The cluster that these words describe, with the fields of `Choices`; None takes the default.

    Raises InputError for what cannot be.
    """
    chosen = Choices(**{name: value for name, value in choices.items() if value is not None})
    kinds: list[tuple[str, int]] = []
    if fleet is not None:
        if gpu is not None or replicas != 1 or chosen.disaggregated or chosen.autoscale is not None:
            raise InputError(
                "--fleet says which GPUs and how many replicas there are; leave out --gpu, --replicas, --autoscale and"
                " --prefill-replicas."
            )
        kinds = _read_fleet(fleet)
        gpu, replicas = kinds[0][0], sum(count for _, count in kinds)
    if chosen.disaggregated:
        if replicas != 1:
            raise InputError("--replicas contradicts --prefill-replicas and --decode-replicas; leave it out.")
        replicas = (chosen.prefill_replicas or 0) + (chosen.decode_replicas or 0)
    engine = DEFAULT_ENGINE if engine is None else engine
    _one_of("--engine", engine, ENGINES)
    shape, device = find_model(DEFAULT_MODEL if model is None else model), find_gpu(DEFAULT_GPU if gpu is None else gpu)
    tp = 1 if tp is None else tp
    block_size = 16 if block_size is None else block_size
    check_parallel(shape, tp)
    given = {
        "--replicas": (replicas, 10_000),
        "--max-replicas": (chosen.max_replicas, 10_000),
        "--kv-blocks": (kv_blocks, 10**8),
        "--block-size": (block_size, 100_000),
        "--max-num-seqs": (max_num_seqs, 10**6),
        "--max-num-batched-tokens": (max_num_batched_tokens, 10**9),
        "--max-model-len": (max_model_len, 10**9),
        "--queue-limit": (queue_limit, 10**9),
    }
    for flag, (value, most) in given.items():
        least = 2 if flag == "--kv-blocks" else 1
        if value is not None and not least <= value <= most:
            raise InputError(
                f"{flag} {value}: it must be at least"
                f" {least}{' (one block is the null block)' if least == 2 else ''} and at most {most:,}."
            )
    chosen.check(replicas)
    if chosen.max_replicas is not None and chosen.max_replicas <= replicas:
        raise InputError(f"--max-replicas {chosen.max_replicas}: it must be above --replicas {replicas}, the least.")
    if not 0 <= retries <= 1000:
        raise InputError(f"--retries {retries}: it must be 0 to 1000.")
    limit = None if timeout is None else seconds(timeout, "--timeout")
    if limit is not None and not 1e-3 <= limit <= 1e7:
        raise InputError(f"--timeout {timeout}: it must be at least 1 ms and at most 1e7 s.")
    if retries and queue_limit is None and limit is None and chosen.fail is None and chosen.mtbf is None:
        raise InputError(
            f"--retries {retries} changes nothing: without --queue-limit, --timeout or failures of replicas no request"
            " fails that could be retried."
        )

    def sized(device: GPU) -> tuple[int, str, int, int]:
        weights = shape.memory_bytes / tp / GIB
        if weights >= device.memory_gb:
            raise InputError(
                f"{shape.name} does not fit on {tp} x {device.name}: its weights take {weights:.1f} of"
                f" {device.memory_gb:g} GiB per GPU; use a larger --tp or another --gpu."
            )
        large = device.memory_gb >= 70 and device.family != "a100"
        budget = max_num_batched_tokens or (8192 if large else 2048)
        seqs = max_num_seqs or min(1024 if large else 256, budget)
        if seqs > budget:
            raise InputError(
                f"--max-num-batched-tokens {budget} is less than --max-num-seqs {seqs}: a step could not serve all it"
                " admits (vLLM refuses this too)."
            )
        if kv_blocks:
            return kv_blocks, "given", seqs, budget
        return *estimate_kv_blocks(shape, device, tp, block_size, budget, seqs, ENGINES[engine]), seqs, budget

    blocks, origin, seqs, budget = sized(device)
    others = []
    for name, count in kinds[1:]:
        other = find_gpu(name)
        its_blocks, _, its_seqs, its_budget = sized(other)
        others.append(
            Machine(
                gpu=other,
                replicas=count,
                kv_blocks=its_blocks,
                max_num_seqs=its_seqs,
                max_num_batched_tokens=its_budget,
                step_time=default_step_time(other, tp),
            )
        )
    if others and step_time is not None:
        raise InputError("--fleet with several GPUs contradicts --calibration, which is of one.")
    if max(replicas, chosen.max_replicas or 0) * seqs > MOST_PLACES:
        raise InputError(
            f"{max(replicas, chosen.max_replicas or 0):,} replicas of {seqs:,} sequences are more than the"
            f" {MOST_PLACES:,} that can be simulated; use a smaller --max-num-seqs."
        )
    roomiest = max(blocks, *(machine.kv_blocks for machine in others)) if others else blocks
    cluster = Cluster(
        model=shape,
        gpu=device,
        tp=tp,
        replicas=replicas,
        router=chosen.router,
        engine=engine,
        kv_blocks=blocks,
        kv_blocks_from=origin,
        block_size=block_size,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len or min(shape.context, (roomiest - 1) * block_size),
        queue_limit=queue_limit,
        timeout=limit,
        retries=retries,
        step_time=step_time or default_step_time(device, tp),
        step_time_name=step_time_name,
        choices=chosen,
        others=others,
    )
    _check_sizes(cluster)
    return cluster


def _check_sizes(cluster: Cluster) -> None:
    """Raise InputError for what is too small or too large to change anything."""
    chosen = cluster.choices
    machines: list[Cluster | Machine] = [cluster, *cluster.others]
    budget = max(machine.max_num_batched_tokens for machine in machines)
    if chosen.chunk_size is not None and chosen.chunk_size >= budget:
        raise InputError(
            f"--chunk-size {chosen.chunk_size} changes nothing: a step has no more than {budget} tokens"
            " (--max-num-batched-tokens)."
        )
    blocks = max(machine.kv_blocks for machine in machines)
    if chosen.watermark and chosen.watermark * blocks < 1:
        raise InputError(f"--watermark {chosen.watermark} changes nothing: it is less than one of {blocks} blocks.")
    if chosen.shared_prefix is not None and chosen.shared_prefix < cluster.block_size:
        raise InputError(
            f"--shared-prefix {chosen.shared_prefix} changes nothing: only whole blocks of {cluster.block_size} tokens"
            " (--block-size) are shared."
        )
    for flag, gib in (("--swap-space", chosen.swap_space), ("--host-cache", chosen.host_cache)):
        if gib is not None and gib * GIB < cluster.block_bytes:
            raise InputError(f"{flag} {gib}: not one block of {cluster.block_bytes / 2**20:.1f} MiB fits.")
    kept = (chosen.host_cache or 0.0) * GIB / cluster.block_bytes * cluster.capacity
    if kept > MOST_KEPT:
        raise InputError(
            f"--host-cache {chosen.host_cache}: {kept:,.0f} blocks of all replicas together are more than the"
            f" {MOST_KEPT:,} that can be simulated; give less."
        )


def _read_fleet(text: str) -> list[tuple[str, int]]:
    """GPUs and how many replicas are on each."""
    kinds = []
    for part in text.split(","):
        name, _, count = part.strip().partition("=")
        if not name or not count.isdecimal() or not 1 <= int(count) <= 10_000:
            raise InputError(f"--fleet {text}: it is GPU=REPLICAS,GPU=REPLICAS, such as h100=2,a100=4.")
        kinds.append((name, int(count)))
    return kinds


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
