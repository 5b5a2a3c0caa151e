"""The GPUs and models that can be simulated by name, and how to read others from JSON.

GPU peaks are dense rates: H100, H200, A100, L40S and B200 as in the system files of ai-dynamo/aiconfigurator
(Apache-2.0), the others from their data sheets. Model shapes are those of the published Hugging Face `config.json`
files.

    KV bytes per token and GPU = 2 * layers * max(kv_heads / tp, 1) * head_dim * bytes     (keys and values; heads are
                                 replicated once tp exceeds their number)
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from squall.errors import InputError

BYTES = 2  # per weight and per KV element: bf16 or fp16


class GPU(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One accelerator; the units are those of the JSON file of `--gpu`."""

    name: str
    memory_gb: float
    """GiB, as in the name of the product (an H100 has 80)."""
    bandwidth_tb_s: float
    """Peak memory bandwidth, 1e12 bytes/s."""
    bf16_tflops: float
    """Peak of dense bf16 matrix products, 1e12 FLOP/s."""
    fp8_tflops: float | None = None
    link_gb_s: float = 32.0
    """To the other GPUs of its server, 1e9 bytes/s one way: NVLink where there is one, otherwise PCIe."""
    family: str = ""
    """Whose kernel efficiencies are taken while nothing is calibrated: `hopper`, `a100`, `l40s` or "" (others)."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a decoder-only transformer with gated MLPs, dense or mixture of experts."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    """Width of the dense (or shared) MLP; 0 if every MLP token goes to experts only."""
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    """max_position_embeddings: the default of max_model_len."""
    tied: bool = False
    """The LM head is the embedding: one matrix in memory."""
    experts: int = 0
    experts_used: int = 0
    expert_intermediate: int = 0

    @property
    def attention_parameters(self) -> int:
        """Of the q, k, v and o projections of all layers."""
        return self.layers * 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def dense_parameters(self) -> int:
        """Matrix parameters that every token passes through, without embedding and LM head."""
        router = self.layers * self.hidden * self.experts
        return self.attention_parameters + router + 3 * self.layers * self.hidden * self.intermediate

    @property
    def expert_parameters(self) -> int:
        """Matrix parameters of all experts together."""
        return 3 * self.layers * self.hidden * self.expert_intermediate * self.experts

    @property
    def active_parameters(self) -> float:
        """Matrix parameters that one token passes through, without embedding and LM head."""
        return self.dense_parameters + (
            self.expert_parameters * self.experts_used / self.experts if self.experts else 0
        )

    @property
    def parameters(self) -> int:
        """All that lie in memory: matrices, embedding, and the LM head unless it is tied (norms are below 0.01 %)."""
        return self.dense_parameters + self.expert_parameters + self.vocab * self.hidden * (1 if self.tied else 2)

    def kv_bytes(self, tp: int = 1) -> int:
        """KV-cache bytes per token on one of `tp` GPUs."""
        return 2 * self.layers * max(self.kv_heads // tp, 1) * self.head_dim * BYTES


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("h100", 80, 3.35, 989, 1978, 450, "hopper"),
        GPU("h200", 141, 4.8, 989, 1978, 450, "hopper"),
        GPU("b200", 180, 7.7, 2250, 4500, 900),
        GPU("a100", 80, 2.039, 312, None, 300, "a100"),
        GPU("a800", 80, 2.039, 312, None, 200, "a100"),
        GPU("l40s", 45, 0.864, 362, 733, 32, "l40s"),
        GPU("rtx4090", 24, 1.008, 165, 330, 32),
        GPU("a6000", 48, 0.768, 155, None, 56),
    )
}
_OTHER_GPU_NAMES = {
    "a10080": "a100",
    "a10080gb": "a100",
    "a80080": "a800",
    "rtxa6000": "a6000",
    "4090": "rtx4090",
    "h100sxm": "h100",
    "h200sxm": "h200",
    "a100sxm": "a100",
}


def _dense(
    name: str,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    context: int,
    *,
    head_dim: int = 128,
    tied: bool = False,
) -> Model:
    return Model(
        name=name,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        context=context,
        tied=tied,
    )


MODELS = {
    model.name: model
    for model in (
        _dense("llama-3.2-1b", 16, 2048, 8192, 32, 8, 128256, 131072, head_dim=64, tied=True),
        _dense("llama-3.2-3b", 28, 3072, 8192, 24, 8, 128256, 131072, tied=True),
        _dense("llama-3-8b", 32, 4096, 14336, 32, 8, 128256, 8192),
        _dense("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128256, 131072),
        _dense("llama-3.1-70b", 80, 8192, 28672, 64, 8, 128256, 131072),
        _dense("llama-3.3-70b", 80, 8192, 28672, 64, 8, 128256, 131072),
        _dense("llama-3.1-405b", 126, 16384, 53248, 128, 8, 128256, 131072),
        _dense("llama-2-7b", 32, 4096, 11008, 32, 32, 32000, 4096),
        _dense("llama-2-13b", 40, 5120, 13824, 40, 40, 32000, 4096),
        _dense("llama-2-70b", 80, 8192, 28672, 64, 8, 32000, 4096),
        _dense("mistral-7b", 32, 4096, 14336, 32, 8, 32768, 32768),
        _dense("qwen2.5-7b", 28, 3584, 18944, 28, 4, 152064, 32768),
        _dense("qwen2.5-14b", 48, 5120, 13824, 40, 8, 152064, 32768),
        _dense("qwen2.5-32b", 64, 5120, 27648, 40, 8, 152064, 32768),
        _dense("qwen2.5-72b", 80, 8192, 29568, 64, 8, 152064, 32768),
        _dense("qwen3-8b", 36, 4096, 12288, 32, 8, 151936, 40960),
        _dense("qwen3-14b", 40, 5120, 17408, 40, 8, 151936, 40960),
        _dense("qwen3-32b", 64, 5120, 25600, 64, 8, 151936, 40960),
        _dense("phi-4", 40, 5120, 17920, 40, 10, 100352, 16384),
        Model(
            name="mixtral-8x7b",
            layers=32,
            hidden=4096,
            intermediate=0,
            heads=32,
            kv_heads=8,
            head_dim=128,
            vocab=32000,
            context=32768,
            experts=8,
            experts_used=2,
            expert_intermediate=14336,
        ),
        Model(
            name="qwen3-30b-a3b",
            layers=48,
            hidden=2048,
            intermediate=0,
            heads=32,
            kv_heads=4,
            head_dim=128,
            vocab=151936,
            context=40960,
            experts=128,
            experts_used=8,
            expert_intermediate=768,
        ),
    )
}


def find_gpu(named: str | GPU) -> GPU:
    """The GPU called `named`, or the one in the JSON file at that path. Raises InputError."""
    if isinstance(named, GPU):
        return named
    key = named.lower().replace("-", "").replace("_", "").replace(" ", "")
    key = _OTHER_GPU_NAMES.get(key, key)
    if key in GPUS:
        return GPUS[key]
    record = _json_file(named, "--gpu", GPUS)
    try:
        gpu = msgspec.convert(record, GPU)
    except msgspec.ValidationError as error:
        raise InputError(
            f"--gpu {named}: {error}; it should look like"
            ' {"name": "mine", "memory_gb": 96, "bandwidth_tb_s": 1.6, "bf16_tflops": 500}.'
        ) from None
    for field in ("memory_gb", "bandwidth_tb_s", "bf16_tflops", "link_gb_s"):
        if not 0 < getattr(gpu, field) < 1e9:
            raise InputError(f"--gpu {named}: {field} is {getattr(gpu, field)}; it must be greater than 0.")
    return gpu


def find_model(named: str | Model) -> Model:
    """The model called `named`, or that of the Hugging Face `config.json` at (or in) that path. Raises InputError."""
    if isinstance(named, Model):
        return named
    key = named.lower().rpartition("/")[2].replace("_", "-")
    key = key.replace("meta-llama", "llama").removesuffix("-instruct")
    if key in MODELS:
        return MODELS[key]
    path = Path(named)
    if path.is_dir():
        path /= "config.json"
    return _from_hugging_face(_json_file(str(path), "--model", MODELS), str(path))


def _json_file(path: str, flag: str, known: dict[str, Any]) -> dict[str, Any]:
    try:
        record = json.loads(Path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{flag} {path}: neither a built-in name nor a file; built in are {', '.join(known)}."
        ) from None
    except OSError as error:
        raise InputError(f"{flag} {path}: it cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{flag} {path}: it is not valid JSON ({error}).") from None
    if not isinstance(record, dict):
        raise InputError(f"{flag} {path}: a JSON object is needed, this is a {type(record).__name__}.")
    return record


_NOT_MODELLED = {
    "kv_lora_rank": "multi-head latent attention",
    "first_k_dense_replace": "dense layers before the experts",
    "quantization_config": "quantised weights",
}


def _from_hugging_face(config: dict[str, Any], path: str) -> Model:
    inner = config.get("text_config")
    if isinstance(inner, dict):
        config = config | inner
    for key, what in _NOT_MODELLED.items():
        if config.get(key):
            raise InputError(
                f"--model {path}: it has {what} ({key}), which the simulator does not model; use a plain bf16"
                " model's config.json."
            )

    def size(*keys: str, default: int | None = None) -> int:
        found = next((config[key] for key in keys if config.get(key) is not None), default)
        if found is None:
            raise InputError(
                f"--model {path}: {keys[0]} is missing; a Hugging Face config.json of a decoder-only transformer"
                " is needed."
            )
        if not isinstance(found, int) or isinstance(found, bool) or found < 0:
            raise InputError(f"--model {path}: {keys[0]} is {found!r}; a whole number is needed.")
        return found

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    experts = size("num_local_experts", "num_experts", "n_routed_experts", default=0)
    dense = size("intermediate_size")
    shared = size("shared_expert_intermediate_size", default=0)
    wide = size("moe_intermediate_size", default=dense) if experts else 0
    shared = shared or size("n_shared_experts", default=0) * wide
    model = Model(
        name=str(config.get("_name_or_path") or "").rpartition("/")[2] or _name_of(path),
        layers=size("num_hidden_layers"),
        hidden=hidden,
        intermediate=shared if experts else dense,
        heads=heads,
        kv_heads=size("num_key_value_heads", default=heads),
        head_dim=size("head_dim", default=hidden // heads if heads else 0),
        vocab=size("vocab_size"),
        context=size("max_position_embeddings", default=32768),
        tied=bool(config.get("tie_word_embeddings", False)),
        experts=experts,
        experts_used=size("num_experts_per_tok") if experts else 0,
        expert_intermediate=wide,
    )
    for key in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "context"):
        if not getattr(model, key):
            raise InputError(
                f"--model {path}: {key} is 0; a Hugging Face config.json of a decoder-only transformer is needed."
            )
    return model


def _name_of(path: str) -> str:
    file = Path(path)
    return file.resolve().parent.name if file.name == "config.json" else file.stem
