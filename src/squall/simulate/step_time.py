"""How long one engine step takes: a roofline with efficiencies, in one auditable struct.

    per step:  T = new tokens    n = scheduled sequences    D = sum over decodes of (computed + 1)
               R = sum over prefill chunks of y             (y = tokens already in the KV cache before the chunk)
               Q = sum over prefill chunks of x*(y + x/2)   (x = tokens of the chunk)

    t_gemm = ((W / (e_bw*BW))^p + ((2*P*T + 2*V*d*n) / (e_fl*F))^p)^(1/p)     all tokens of a step share one pass
    t_attn = kvb*(D + R) / (e_kv*BW) + 2*L*aw*Q / (e_at*F)        aw: multiply-adds per pair, 2*H*hd (but see MLA)
             + t_row*L*H*n                               what attention takes for a sequence however short it is
    t_tp   = 2*L*(alpha_ar + 2*d*T / bw_ar)              two all-reduces a layer; 0 for one GPU
    t_gpu  = t_gemm + t_attn + t_tp
    t_host = o0 + o1*n  (+ o2 if the step computes some of a prompt)
    step   = t_gpu + t_host                              synchronous scheduling
           = max(t_gpu, t_host) + o_gap                  asynchronous: host work hides behind the GPU

W are the weight bytes read (of experts, the share 1 - (1 - k/E)^(r_ex*T) that some token of the step is routed to, as
if a part r_ex of the tokens chose theirs at random and the others went where these go), P the matrix parameters one
token passes through, V*d the LM head, kvb the KV bytes per token, all per GPU; F is the fp8 peak
where the weights are fp8. The default efficiencies are fits of this formula to measured kernel tables: of
ai-dynamo/aiconfigurator@095f58a (Apache-2.0), and for the RTX 4090 to the operator profile of
casys-kaist/LLMServingSim@5daddb2 (MIT). The host times are placeholders, because they depend on the serving stack:
without a calibration, expect errors of 25 % and more.

Around the engine: a request reaches the API server a0 + a1*prompt after its sending. That does one thing after another:
s_in for a request, s_out for each sequence of a step's results. What has passed it reaches the client a2 later, and the
end of a response a3 after its last token.

Where a server was measured step by step (a CPU, an unknown accelerator), a table stands in for the roofline:

    t_gpu  = base(T) + per_sequence*n + per_kv_token*(D + R) + per_attention_pair*Q

with `base` linear between measured points and beyond the last. It is linear in D, as attention is (so that exact
fast-forward holds), and it knows nothing beyond the range that was measured.
"""

import math
from typing import Any, NamedTuple

import msgspec
import numpy as np

from squall.errors import InputError
from squall.simulate.hardware import BYTES, GPU, Model
from squall.simulate.records import StepCost


class StepTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured step times; see the formula above."""

    points: list[tuple[float, float]]
    """(T, seconds) of `base`, at least two, both ascending."""
    per_sequence: float = 0.0
    per_kv_token: float = 0.0
    per_attention_pair: float = 0.0

    def __post_init__(self) -> None:
        numbers = np.array(self.points or [(0.0, 0.0)], dtype=float)
        rates = (self.per_sequence, self.per_kv_token, self.per_attention_pair)
        if len(numbers) < 2 or numbers.shape[1] != 2 or not np.isfinite([*numbers.ravel(), *rates]).all():
            raise ValueError("a step table needs at least two points of finite numbers")
        tokens, seconds = numbers.T
        if (np.diff(tokens) <= 0).any() or (np.diff(seconds) < 0).any() or seconds[0] < 0 or min(rates) < 0:
            raise ValueError("a step table must rise with the tokens, and no time in it may be negative")


class StepTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The coefficients of the formula above that are not sizes: shares of a peak, and times in seconds.

    The defaults of the shares are the means over the GPU families that were measured.
    """

    e_bw: float = 0.78
    """Share of the peak bandwidth at which weights are read."""
    e_kv: float = 0.86
    """Share of the peak bandwidth at which the KV cache is read."""
    e_fl: float = 0.80
    """Share of the peak FLOP/s that matrix products reach."""
    e_at: float = 0.65
    """Share of the peak FLOP/s that prefill attention reaches."""
    t_row: float = 0.0
    """Of attention for a sequence however short, per layer and query head."""
    r_ex: float = 1.0
    """Of a mixture of experts: how evenly tokens are routed; 1 is at random."""
    p: float = 2.0
    """Sharpness of the knee between memory-bound and compute-bound."""
    alpha_ar: float = 5e-6
    """Latency of one all-reduce."""
    bw_ar: float = 15e9
    """Effective bandwidth of an all-reduce, bytes/s."""
    o0: float = 1e-3
    """Host time per step."""
    o1: float = 0.0
    """Host time per scheduled sequence."""
    o2: float = 0.0
    """Host time of a step that computes some of a prompt, beyond that: no CUDA graph of the whole model fits it."""
    o_gap: float = 1e-4
    """Bubble between two steps of asynchronous scheduling."""
    a0: float = 1e-3
    """From a request's sending to the engine's queue."""
    a1: float = 0.0
    """The same, per prompt token."""
    a2: float = 5e-5
    """From a token's step end to the client."""
    a3: float = 8e-4
    """From the last token to the end of the response."""
    s_in: float = 0.0
    """Of the API server, which does one thing after another: its time for a request on the way in."""
    s_out: float = 0.0
    """The same, for each sequence of a step's results on their way out."""
    table: StepTable | None = None
    """Measured step times, in place of the roofline."""

    def check(self) -> None:
        """Raise ValueError for what is beyond anything physical: shares of a peak over 1, times over a minute."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name == "table":
                continue
            share = (0.01, 1.0)
            ranges = {"e": share, "r": share, "p": (1.0, 10.0), "bw": (1e6, 1e15)}
            low, high = ranges.get(name.partition("_")[0], (0.0, 60.0))
            if not low <= value <= high:
                raise ValueError(f"step_time.{name} is {value:g}, which is not from {low:g} to {high:g}")


# e_bw, e_kv, e_fl, e_at, p by GPU family.
_KERNELS = {
    "hopper": (0.75, 0.92, 0.80, 0.65, 3.0),
    "a100": (0.70, 0.82, 0.83, 0.80, 2.0),
    "l40s": (0.79, 0.78, 0.65, 0.45, 2.0),
    "ada": (0.875, 0.92, 0.93, 0.69, 2.0),  # an RTX 4090: 15.83 ms and 91.1 us a token of GEMM, 141 ns a KV token
}
_ROW = 7e-9  # t_row: 5e-9 to 8e-9 at any tp, seen as the rise of decode steps with the batch
_LINK_SHARE = {1: 1.0, 2: 0.49, 4: 0.42, 8: 0.37}  # all-reduce bandwidth / link, seen on NVLink Hopper


class Bound(NamedTuple):
    """What a coefficient can physically be (a fit never leaves it), and how far it lies from its default usually."""

    low: float
    high: float
    spread: float
    """Standard deviation of the real value around the default, over the GPUs and stacks whose values are known."""


BOUNDS = {
    "e_bw": Bound(0.3, 1.0, 0.08),
    "e_kv": Bound(0.3, 1.0, 0.06),
    "e_fl": Bound(0.3, 1.0, 0.12),
    "e_at": Bound(0.2, 1.0, 0.15),
    "t_row": Bound(0.0, 40e-9, 4e-9),
    "r_ex": Bound(0.2, 1.0, 0.3),
    "p": Bound(1.2, 5.0, 0.5),
    "o0": Bound(0.0, 20e-3, 3e-3),
    "o1": Bound(0.0, 50e-6, 20e-6),
    "o2": Bound(0.0, 10e-3, 1e-3),
    "o_gap": Bound(0.0, 2e-3, 0.5e-3),
    "a0": Bound(0.0, 20e-3, 5e-3),
    "a1": Bound(0.0, 10e-6, 2e-6),
    "s_in": Bound(0.0, 20e-3, 1e-3),
    "s_out": Bound(0.0, 5e-3, 0.8e-3),
}
"""Of the coefficients that are fitted. Shares of a peak end at 1; host times at what the slowest stacks were seen to
take (5 ms a step, 50 us a sequence), with room above."""


def default_step_time(gpu: GPU, tp: int = 1) -> StepTime:
    """The uncalibrated coefficients for `tp` of these GPUs."""
    known: dict[str, Any] = {}
    if gpu.family in _KERNELS:
        known = dict(zip(("e_bw", "e_kv", "e_fl", "e_at", "p"), _KERNELS[gpu.family], strict=True))
    share = _LINK_SHARE[min(size for size in _LINK_SHARE if size >= tp)]
    return StepTime(**known, t_row=_ROW, bw_ar=gpu.link_gb_s * 1e9 * share)


def check_parallel(model: Model, tp: int) -> None:
    """Raise InputError unless `model` can be split over `tp` GPUs of one server."""
    if tp not in _LINK_SHARE or model.heads % tp:
        raise InputError(
            f"--tp {tp}: {model.name} with {model.heads} heads can be split over"
            f" {', '.join(str(s) for s in _LINK_SHARE if not model.heads % s)} GPUs."
        )


def step_cost(step: StepTime, model: Model, gpu: GPU, tp: int = 1) -> StepCost:
    """The formula's constants in seconds, for the kernel."""
    bandwidth, flops = gpu.bandwidth_tb_s * 1e12, gpu.bf16_tflops * 1e12
    matrix_flops = gpu.fp8_tflops * 1e12 if model.weight_bytes == 1 and gpu.fp8_tflops else flops
    head = model.vocab * model.hidden
    roofline = StepCost(
        weights=(model.weight_bytes * model.dense_parameters + BYTES * head) / tp / (step.e_bw * bandwidth),
        experts=model.weight_bytes * model.expert_parameters / tp / (step.e_bw * bandwidth),
        log_unrouted=step.r_ex * math.log1p(-model.experts_used / model.experts)
        if model.experts > model.experts_used
        else 0.0,
        per_token=2 * model.active_parameters / tp / (step.e_fl * matrix_flops),
        per_sequence=2 * head / tp / (step.e_fl * flops),
        knee=float(step.p),
        per_kv_token=model.kv_bytes(tp) / (step.e_kv * bandwidth),
        per_attention_pair=2 * model.layers * model.attention_width / tp / (step.e_at * flops),
        reduce=2 * model.layers * step.alpha_ar if tp > 1 else 0.0,
        reduce_per_token=2 * model.layers * BYTES * model.hidden / step.bw_ar if tp > 1 else 0.0,
        per_row=step.t_row * model.layers * model.heads / tp,
        host=float(step.o0),
        host_per_sequence=float(step.o1),
        host_prompts=float(step.o2),
        gap=float(step.o_gap),
        points=np.empty((0, 2)),
    )
    if step.table is None:
        return roofline
    return roofline._replace(
        points=np.array(step.table.points, dtype=float),
        per_sequence=float(step.table.per_sequence),
        per_kv_token=float(step.table.per_kv_token),
        per_attention_pair=float(step.table.per_attention_pair),
    )


def gpu_times(
    cost: StepCost, tokens: np.ndarray, sequences: np.ndarray, kv_tokens: np.ndarray, attention_pairs: np.ndarray
) -> np.ndarray:
    """t_gpu of many steps, (n,) seconds: T, n, D + R and Q of each, (n,). `gpu_seconds` of the kernel, for many."""
    if len(cost.points):
        at, known = cost.points.T
        gemm = np.interp(tokens, at, known)
        for end, inner, outside in ((0, 1, tokens < at[0]), (-1, -2, tokens > at[-1])):
            rise = (known[end] - known[inner]) / (at[end] - at[inner])
            gemm = np.where(outside, np.maximum(0.0, known[end] + rise * (tokens - at[end])), gemm)
        gemm = gemm + cost.per_sequence * sequences
    else:
        memory = cost.weights + cost.experts * (1.0 - np.exp(tokens * cost.log_unrouted))
        compute = cost.per_token * tokens + cost.per_sequence * sequences
        low, high = np.minimum(memory, compute), np.maximum(memory, compute)
        gemm = high * (1.0 + (low / high) ** cost.knee) ** (1.0 / cost.knee)
        gemm = gemm + cost.reduce + cost.reduce_per_token * tokens + cost.per_row * sequences
    return gemm + cost.per_kv_token * kv_tokens + cost.per_attention_pair * attention_pairs
