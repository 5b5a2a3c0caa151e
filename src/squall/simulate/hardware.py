"""The GPUs and models that can be simulated by name, and how to read others from JSON.

GPU peaks are dense rates: H100, H200, A100, L40S and B200 as in the system files of ai-dynamo/aiconfigurator
(Apache-2.0), the others from their data sheets (the RTX 5090 and RTX PRO 6000 tell 3352 and 4000 sparse FP4 TOPS, of
which bf16 is a sixteenth and an eighth). Model shapes are those of the published Hugging Face `config.json`
files.

    KV bytes per token and GPU = 2 * layers * max(kv_heads / tp, 1) * head_dim * bytes     (keys and values; heads are
                                 replicated once tp exceeds their number)
                               = layers * (kv_rank + rope_dim) * bytes                     (multi-head latent attention:
                                 one compressed vector for all heads, on every GPU)
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from squall.errors import InputError

BYTES = 2.0  # of a bf16 or fp16 number
_QUANTISED = {"fp8": 1.0, "int8": 1.0, "int4": 0.56}
"""Bytes per weight; 4-bit weights with the scales of their groups."""


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
    """Whose kernel efficiencies hold while nothing is calibrated: `hopper`, `a100`, `l40s`, `ada` or "" (others)."""


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
    dense_layers: int = 0
    """Of a mixture of experts: how many of its layers have a plain MLP instead, of `dense_intermediate`."""
    dense_intermediate: int = 0
    kv_rank: int = 0
    """Width of the compressed keys and values of multi-head latent attention (MLA); 0 for MHA and GQA."""
    q_rank: int = 0
    """MLA: width of the compressed queries; 0 if they are not compressed."""
    rope_dim: int = 0
    """MLA: the part of a key that carries the position, shared by all heads."""
    value_dim: int = 0
    """MLA: width of a head's value; `head_dim` is then that of its query and key without the position."""
    weight_bytes: float = BYTES
    """Per matrix parameter: 2 for bf16, 1 for fp8."""
    kv_element_bytes: float = BYTES
    """Per number in the KV cache: 2 for bf16, 1 for fp8."""

    def check(self) -> None:
        """Raise ValueError for a shape that no transformer has."""
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}")
        if not self.kv_rank and self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} attention heads cannot share {self.kv_heads} key-value heads evenly")
        if self.experts_used > self.experts:
            raise ValueError(f"a token goes to {self.experts_used} of {self.experts} experts")

    @property
    def attention_parameters(self) -> int:
        """Of the projections around the attention of all layers."""
        if not self.kv_rank:
            return self.layers * 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        key = self.head_dim + self.rope_dim
        queries = self.q_rank * (self.hidden + self.heads * key) if self.q_rank else self.hidden * self.heads * key
        compressed = self.hidden * (self.kv_rank + self.rope_dim)
        expanded = self.kv_rank * self.heads * (self.head_dim + self.value_dim)
        return self.layers * (queries + compressed + expanded + self.heads * self.value_dim * self.hidden)

    @property
    def dense_parameters(self) -> int:
        """Matrix parameters that every token passes through, without embedding and LM head."""
        routed = self.layers - self.dense_layers
        mlp = routed * self.intermediate + self.dense_layers * self.dense_intermediate
        return self.attention_parameters + routed * self.hidden * self.experts + 3 * self.hidden * mlp

    @property
    def expert_parameters(self) -> int:
        """Matrix parameters of all experts together."""
        return 3 * (self.layers - self.dense_layers) * self.hidden * self.expert_intermediate * self.experts

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

    @property
    def memory_bytes(self) -> float:
        """Of all weights; the embedding and the LM head stay in 16 bits when the matrices are quantised."""
        matrices = self.dense_parameters + self.expert_parameters
        return self.weight_bytes * matrices + BYTES * (self.parameters - matrices)

    @property
    def attention_width(self) -> int:
        """Multiply-adds of prefill attention per layer and pair of tokens: the query times the key, and the value."""
        if not self.kv_rank:
            return 2 * self.heads * self.head_dim
        return self.heads * (self.head_dim + self.rope_dim + self.value_dim)

    def kv_bytes(self, tp: int = 1) -> int:
        """KV-cache bytes per token on one of `tp` GPUs."""
        if self.kv_rank:
            return int(self.layers * (self.kv_rank + self.rope_dim) * self.kv_element_bytes)
        return int(2 * self.layers * max(self.kv_heads // tp, 1) * self.head_dim * self.kv_element_bytes)


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("h100", 80, 3.35, 989, 1978, 450, "hopper"),
        GPU("h200", 141, 4.8, 989, 1978, 450, "hopper"),
        GPU("h20", 96, 4.0, 148, 296, 450, "hopper"),
        GPU("b200", 180, 7.7, 2250, 4500, 900),
        GPU("a100", 80, 2.039, 312, None, 300, "a100"),
        GPU("a800", 80, 2.039, 312, None, 200, "a100"),
        GPU("l4", 22.5, 0.300, 121, 242, 32),
        GPU("l40s", 45, 0.864, 362, 733, 32, "l40s"),
        GPU("rtx4090", 24, 1.008, 165, 330, 32, "ada"),
        GPU("rtx5090", 32, 1.792, 209, 419, 64),
        GPU("rtxpro6000", 96, 1.792, 500, 1000, 64),
        GPU("a6000", 48, 0.768, 155, None, 56),
    )
}
_OTHER_GPU_NAMES = {
    "a10080": "a100",
    "a10080gb": "a100",
    "a80080": "a800",
    "rtxa6000": "a6000",
    "4090": "rtx4090",
    "5090": "rtx5090",
    "rtxpro6000blackwell": "rtxpro6000",
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
        _dense("qwen2.5-0.5b", 24, 896, 4864, 14, 2, 151936, 32768, head_dim=64, tied=True),
        _dense("qwen2.5-1.5b", 28, 1536, 8960, 12, 2, 151936, 32768, tied=True),
        _dense("qwen2.5-3b", 36, 2048, 11008, 16, 2, 151936, 32768, tied=True),
        _dense("qwen3-0.6b", 28, 1024, 3072, 16, 8, 151936, 40960, tied=True),
        _dense("qwen3-1.7b", 28, 2048, 6144, 16, 8, 151936, 40960, tied=True),
        _dense("qwen3-4b", 36, 2560, 9728, 32, 8, 151936, 40960, tied=True),
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
        Model(
            name="deepseek-v3",
            layers=61,
            hidden=7168,
            intermediate=2048,
            heads=128,
            kv_heads=128,
            head_dim=128,
            vocab=129280,
            context=163840,
            experts=256,
            experts_used=8,
            expert_intermediate=2048,
            dense_layers=3,
            dense_intermediate=18432,
            kv_rank=512,
            q_rank=1536,
            rope_dim=64,
            value_dim=128,
            weight_bytes=1.0,
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
    if not named:
        raise _unknown(named, "--gpu", GPUS)
    record = _json_file(named, "--gpu", GPUS)
    try:
        gpu = msgspec.convert(record, GPU)
    except msgspec.ValidationError as error:
        raise InputError(
            f"--gpu {named}: {error}; it should look like"
            ' {"name": "mine", "memory_gb": 96, "bandwidth_tb_s": 1.6, "bf16_tflops": 500}.'
        ) from None
    for field in ("memory_gb", "bandwidth_tb_s", "bf16_tflops", "fp8_tflops", "link_gb_s"):
        value = getattr(gpu, field)
        if value is not None and not 1e-3 <= value <= 1e6:
            raise InputError(f"--gpu {named}: {field} is {value}; it must be 0.001 to 1e6.")
    return gpu


def find_model(named: str | Model) -> Model:
    """The model called `named`, or that of the Hugging Face `config.json` at (or in) that path. Raises InputError.

    A built-in name may end in `-fp8`, `-int8` or `-int4`: its matrices are then stored in that width.
    """
    if isinstance(named, Model):
        return named
    key = named.lower().rpartition("/")[2].replace("_", "-")
    key = key.replace("meta-llama", "llama").replace("-instruct", "")
    plain, _, dtype = key.rpartition("-")
    if plain in MODELS and dtype in _QUANTISED:
        return msgspec.structs.replace(MODELS[plain], name=key, weight_bytes=_QUANTISED[dtype])
    if key in MODELS:
        return MODELS[key]
    if not named:
        raise _unknown(named, "--model", MODELS)
    path = Path(named)
    if path.is_dir():
        path /= "config.json"
    return _from_hugging_face(_json_file(str(path), "--model", MODELS), str(path))


def _unknown(name: str, flag: str, known: dict[str, Any]) -> InputError:
    return InputError(f"{flag} {name}: neither a built-in name nor a file; built in are {', '.join(known)}.")


def _json_file(path: str, flag: str, known: dict[str, Any]) -> dict[str, Any]:
    try:
        record = json.loads(Path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise _unknown(path, flag, known) from None
    except OSError as error:
        raise InputError(f"{flag} {path}: it cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{flag} {path}: it is not valid JSON ({error}).") from None
    if not isinstance(record, dict):
        raise InputError(f"{flag} {path}: a JSON object is needed, this is a {type(record).__name__}.")
    return record


def _from_hugging_face(config: dict[str, Any], path: str) -> Model:
    inner = config.get("text_config")
    if isinstance(inner, dict):
        config = config | inner

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
    named = config.get("_name_or_path")
    experts = size("num_local_experts", "num_experts", "n_routed_experts", default=0)
    dense = size("intermediate_size")
    shared = size("shared_expert_intermediate_size", default=0)
    wide = size("moe_intermediate_size", default=dense) if experts else 0
    shared = shared or size("n_shared_experts", default=0) * wide
    latent = size("kv_lora_rank", default=0)
    model = Model(
        name=(named.rpartition("/")[2] if isinstance(named, str) else "") or _name_of(path),
        layers=size("num_hidden_layers"),
        hidden=hidden,
        intermediate=shared if experts else dense,
        heads=heads,
        kv_heads=size("num_key_value_heads", default=heads),
        head_dim=size(
            "qk_nope_head_dim" if latent else "head_dim", "head_dim", default=hidden // heads if heads else 0
        ),
        vocab=size("vocab_size"),
        context=size("max_position_embeddings", default=32768),
        tied=bool(config.get("tie_word_embeddings", False)),
        experts=experts,
        experts_used=size("num_experts_per_tok") if experts else 0,
        expert_intermediate=wide,
        dense_layers=size("first_k_dense_replace", default=0) if experts else 0,
        dense_intermediate=dense if experts else 0,
        kv_rank=latent,
        q_rank=size("q_lora_rank", default=0) if latent else 0,
        rope_dim=size("qk_rope_head_dim") if latent else 0,
        value_dim=size("v_head_dim") if latent else 0,
        weight_bytes=_weight_bytes(config.get("quantization_config"), path),
    )
    try:
        model.check()
    except ValueError as error:
        raise InputError(
            f"--model {path}: {error}; a Hugging Face config.json of a decoder-only transformer is needed."
        ) from None
    if model.head_dim * heads != hidden and config.get("head_dim") is None and not latent:
        raise InputError(f"--model {path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
    return model


def _weight_bytes(quantised: Any, path: str) -> float:
    """Bytes per weight of a config's `quantization_config` (None: 16 bits)."""
    if not quantised:
        return BYTES
    quantised = quantised if isinstance(quantised, dict) else {}
    method, text = str(quantised.get("quant_method", "")), json.dumps(quantised)
    if method == "fp8" or '"num_bits": 8' in text or quantised.get("bits") == 8 or quantised.get("load_in_8bit"):
        return 1.0
    if '"num_bits": 4' in text or quantised.get("bits") == 4 or quantised.get("load_in_4bit") or method == "mxfp4":
        return _QUANTISED["int4"]
    raise InputError(
        f"--model {path}: its quantization_config ({method or 'no quant_method'}) says neither 8 nor 4 bits per weight;"
        " remove it from a copy of the file to simulate 16 bits."
    )


def _name_of(path: str) -> str:
    file = Path(path)
    return file.resolve().parent.name if file.name == "config.json" else file.stem
