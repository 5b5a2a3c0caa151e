"""How long one engine step takes: a roofline with efficiencies, in one auditable struct.

    per step:  T = new tokens    n = scheduled sequences    D = sum over decodes of (computed + 1)
               R = sum over prefill chunks of y             (y = tokens already in the KV cache before the chunk)
               Q = sum over prefill chunks of x*(y + x/2)   (x = tokens of the chunk)

    t_gemm = ((W / (e_bw*BW))^p + ((2*P*T + 2*V*d*n) / (e_fl*F))^p)^(1/p)     all tokens of a step share one pass
    t_attn = kvb*(D + R) / (e_kv*BW) + 4*L*H*hd*Q / (e_at*F)
    t_tp   = 2*L*(alpha_ar + 2*d*T / bw_ar)              two all-reduces a layer; 0 for one GPU
    t_gpu  = t_gemm + t_attn + t_tp
    step   = t_gpu + o0 + o1*n                           synchronous scheduling
           = max(t_gpu, o0 + o1*n) + o_gap               asynchronous: host work hides behind the GPU

W are the weight bytes read (of experts, the share 1 - (1 - k/E)^T that some token of the step is routed to), P the
matrix parameters one token passes through, V*d the LM head, kvb the KV bytes per token, all per GPU. The default
efficiencies are fits of this formula to the measured kernel tables of ai-dynamo/aiconfigurator@095f58a (Apache-2.0);
the host times are placeholders, because they depend on the serving stack: without a calibration, expect errors of
25 % and more.
"""

import math
from dataclasses import dataclass
from typing import Any

import msgspec

from squall.errors import InputError
from squall.simulate.hardware import BYTES, GPU, Model
from squall.simulate.kernel import StepCost


class StepTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The coefficients of the formula above that are not sizes: shares of a peak, and times in seconds."""

    e_bw: float = 0.75
    """Share of the peak bandwidth at which weights are read."""
    e_kv: float = 0.85
    """Share of the peak bandwidth at which the KV cache is read."""
    e_fl: float = 0.65
    """Share of the peak FLOP/s that matrix products reach."""
    e_at: float = 0.55
    """Share of the peak FLOP/s that prefill attention reaches."""
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


# e_bw, e_kv, e_fl, e_at, p by GPU family.
_KERNELS = {
    "hopper": (0.75, 0.92, 0.80, 0.65, 3.0),
    "a100": (0.70, 0.82, 0.83, 0.80, 2.0),
    "l40s": (0.79, 0.78, 0.65, 0.45, 2.0),
}
_LINK_SHARE = {1: 1.0, 2: 0.49, 4: 0.42, 8: 0.37}  # all-reduce bandwidth / link, seen on NVLink Hopper


@dataclass(frozen=True)
class Bound:
    """What a coefficient can physically be; a fit never leaves it."""

    low: float
    high: float


BOUNDS = {
    "e_bw": Bound(0.3, 1.0),
    "e_fl": Bound(0.3, 1.0),
    "o0": Bound(0.0, 20e-3),
    "o_gap": Bound(0.0, 2e-3),
}
"""Of the coefficients that are fitted."""


def default_step_time(gpu: GPU, tp: int = 1) -> StepTime:
    """The uncalibrated coefficients for `tp` of these GPUs."""
    known: dict[str, Any] = {}
    if gpu.family in _KERNELS:
        known = dict(zip(("e_bw", "e_kv", "e_fl", "e_at", "p"), _KERNELS[gpu.family], strict=True))
    share = _LINK_SHARE[min(size for size in _LINK_SHARE if size >= tp)]
    return StepTime(**known, bw_ar=gpu.link_gb_s * 1e9 * share)


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
    head = model.vocab * model.hidden
    return StepCost(
        weights=BYTES * (model.dense_parameters + head) / tp / (step.e_bw * bandwidth),
        experts=BYTES * model.expert_parameters / tp / (step.e_bw * bandwidth),
        log_unrouted=math.log1p(-model.experts_used / model.experts) if model.experts > model.experts_used else 0.0,
        per_token=2 * model.active_parameters / tp / (step.e_fl * flops),
        per_sequence=2 * head / tp / (step.e_fl * flops),
        knee=float(step.p),
        per_kv_token=model.kv_bytes(tp) / (step.e_kv * bandwidth),
        per_attention_pair=4 * model.layers * model.heads / tp * model.head_dim / (step.e_at * flops),
        reduce=2 * model.layers * step.alpha_ar if tp > 1 else 0.0,
        reduce_per_token=2 * model.layers * BYTES * model.hidden / step.bw_ar if tp > 1 else 0.0,
        host=float(step.o0),
        host_per_sequence=float(step.o1),
        gap=float(step.o_gap),
    )
