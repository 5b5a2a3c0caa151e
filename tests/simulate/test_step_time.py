"""Step times against the formula written out, sizes against published numbers, and JSON files good and bad."""

import json
from math import isclose

import msgspec
import numpy as np
import pytest

from squall.errors import InputError
from squall.simulate.cluster import ENGINES, estimate_kv_blocks, resolve
from squall.simulate.hardware import GPUS, MODELS, find_gpu, find_model
from squall.simulate.replica import gpu_seconds
from squall.simulate.step_time import BOUNDS, StepTable, StepTime, default_step_time, gpu_times, step_cost

# Billions of parameters as the publishers state them.
PUBLISHED = {
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.6,
    "llama-3.1-405b": 406,
    "llama-2-7b": 6.74,
    "llama-2-13b": 13.0,
    "llama-2-70b": 69.0,
    "mistral-7b": 7.25,
    "mixtral-8x7b": 46.7,
    "qwen2.5-7b": 7.62,
    "qwen2.5-14b": 14.8,
    "qwen2.5-32b": 32.8,
    "qwen2.5-72b": 72.7,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
    "qwen3-30b-a3b": 30.5,
    "phi-4": 14.7,
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02,
    "deepseek-v3": 671,
}
KV_BYTES = {
    "llama-3.2-1b": 32_768,
    "llama-3.2-3b": 114_688,
    "llama-3.1-8b": 131_072,
    "mistral-7b": 131_072,
    "mixtral-8x7b": 131_072,
    "llama-3.1-70b": 327_680,
    "qwen2.5-72b": 327_680,
    "llama-3.1-405b": 516_096,
    "llama-2-7b": 524_288,
    "llama-2-13b": 819_200,
    "qwen2.5-7b": 57_344,
    "qwen2.5-14b": 196_608,
    "qwen2.5-32b": 262_144,
    "qwen3-32b": 262_144,
    "qwen3-8b": 147_456,
    "qwen3-14b": 163_840,
    "qwen3-30b-a3b": 98_304,
    "phi-4": 204_800,
    "deepseek-v3": 70_272,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_number_of_parameters(name):
    assert MODELS[name].parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.008)


@pytest.mark.parametrize("name", KV_BYTES)
def test_kv_bytes_per_token(name):
    assert MODELS[name].kv_bytes() == KV_BYTES[name]


def test_latent_attention_is_read_from_a_config_and_is_on_every_gpu(tmp_path):
    config = {
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 129280,
        "max_position_embeddings": 163840,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = find_model(str(tmp_path))
    assert msgspec.structs.replace(read, name="deepseek-v3") == MODELS["deepseek-v3"]
    assert read.kv_bytes(8) == read.kv_bytes(1)
    # Published: 37 billion active, embedding included.
    assert (read.active_parameters + read.vocab * read.hidden) / 1e9 == pytest.approx(37, rel=0.015)


def test_quantised_weights_are_read_faster_and_leave_room():
    plain, fp8, int4 = (find_model(f"meta-llama/Llama-3.1-8B-Instruct{end}") for end in ("", "-FP8", "-INT4"))
    assert plain.memory_bytes == 2 * plain.parameters
    assert int4.memory_bytes < fp8.memory_bytes < 0.6 * plain.memory_bytes
    gpu = GPUS["h100"]
    costs = [step_cost(default_step_time(gpu), model, gpu) for model in (plain, fp8, int4)]
    assert costs[2].weights < costs[1].weights < 0.6 * costs[0].weights
    assert costs[1].per_token == pytest.approx(costs[0].per_token / 2)  # fp8 products
    assert costs[2].per_token == costs[0].per_token  # 4-bit weights are multiplied as bf16
    assert resolve(model="llama-3.1-8b-fp8").kv_blocks > resolve(model="llama-3.1-8b").kv_blocks


def test_a_table_stands_in_for_the_roofline():
    table = StepTable(points=[(1, 0.01), (100, 0.02), (200, 0.06)], per_sequence=1e-4, per_kv_token=1e-6)
    cost = step_cost(StepTime(table=table), MODELS["llama-3.1-8b"], GPUS["h100"])
    for tokens, base in ((1, 0.01), (50.5, 0.015), (100, 0.02), (150, 0.04), (300, 0.1)):
        assert gpu_seconds(cost, tokens, 4.0, 1000.0, 9.0) == pytest.approx(base + 4e-4 + 1e-3, rel=1e-12)


@pytest.mark.parametrize(("model", "tp"), [("llama-3.1-8b", 1), ("llama-3.1-70b", 4), ("mixtral-8x7b", 2)])
@pytest.mark.parametrize("table", [None, StepTable(points=[(4, 0.01), (64, 0.02), (512, 0.03)], per_kv_token=1e-7)])
def test_many_steps_take_as_long_as_each(model, tp, table):
    step = StepTime(table=table, o0=0.0)
    cost = step_cost(step, MODELS[model], GPUS["h100"], tp)
    tokens = np.array([1, 2, 4, 30, 64, 500, 512, 2000, 8000])
    steps = (tokens, np.minimum(tokens, 40), tokens * 30.0, tokens**2 / 2)
    each = [gpu_seconds(cost, *map(float, one)) for one in zip(*steps, strict=True)]
    assert gpu_times(cost, *steps) == pytest.approx(each, rel=1e-12)


@pytest.mark.parametrize(
    "words",
    [
        {"points": []},
        {"points": [(1, 0.1)]},
        {"points": [(2, 0.1), (1, 0.2)]},
        {"points": [(1, 0.2), (2, 0.1)]},
        {"points": [(1, 0.1), (2, float("nan"))]},
        {"points": [(1, 0.1), (2, 0.2)], "per_sequence": -1e-3},
    ],
)
def test_impossible_tables(words):
    with pytest.raises(ValueError, match="step table"):
        StepTable(**words)


def test_kv_heads_are_split_and_then_replicated():
    assert MODELS["llama-3.1-8b"].kv_bytes(8) == 131_072 // 8
    assert MODELS["qwen2.5-7b"].kv_bytes(8) == MODELS["qwen2.5-7b"].kv_bytes(4) == 57_344 // 4


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_roofline_written_out(tp):
    gpu, step = GPUS["h100"], default_step_time(GPUS["h100"], tp)
    t, n, kv, q = 300.0, 40.0, 5e4, 3e5
    layers, d, heads, hd, vocab = 80, 8192, 64, 128, 128256
    matrices = layers * (2 * d * d + 2 * d * 8 * hd + 3 * d * 28672)
    weights = 2 * (matrices + vocab * d) / tp
    gemm = (
        (weights / (step.e_bw * 3.35e12)) ** step.p
        + ((2 * matrices / tp * t + 2 * vocab / tp * d * n) / (step.e_fl * 989e12)) ** step.p
    ) ** (1 / step.p)
    attention = 327_680 / tp * kv / (step.e_kv * 3.35e12) + 4 * layers * heads / tp * hd * q / (step.e_at * 989e12)
    attention += step.t_row * layers * heads / tp * n
    reduce = 0 if tp == 1 else 2 * layers * (step.alpha_ar + 2 * d * t / step.bw_ar)
    cost = step_cost(step, MODELS["llama-3.1-70b"], gpu, tp)
    assert gpu_seconds(cost, t, n, kv, q) == pytest.approx(gemm + attention + reduce, rel=1e-12)


@pytest.mark.parametrize(
    ("gpu", "model", "tp", "base_ms", "prefill_us"),
    [
        ("h100", "llama-3.1-8b", 1, 6.04, 18.5),
        ("h200", "llama-3.1-8b", 1, 4.55, 19.1),
        ("a100", "llama-3.1-8b", 1, 10.48, 54.1),
        ("l40s", "llama-3.1-8b", 1, 22.11, 62.9),
        ("h100", "qwen3-32b", 1, 24.08, 83.4),
        ("h100", "llama-3.1-70b", 4, 14.34, 58.0),
    ],
)
def test_default_kernels_are_near_the_measured_tables(gpu, model, tp, base_ms, prefill_us):
    """Fits to the kernel tables of ai-dynamo/aiconfigurator@095f58a: one decode, and a token of a long prefill."""
    cost = step_cost(default_step_time(GPUS[gpu], tp), MODELS[model], GPUS[gpu], tp)
    assert gpu_seconds(cost, 1.0, 1.0, 1.0, 0.0) * 1e3 == pytest.approx(base_ms, rel=0.2)
    more, less = gpu_seconds(cost, 4096.0, 1.0, 0.0, 0.0), gpu_seconds(cost, 2048.0, 1.0, 0.0, 0.0)
    assert (more - less) / 2048 * 1e6 == pytest.approx(prefill_us, rel=0.3)


@pytest.mark.parametrize(
    ("gpu", "model", "tp", "rise_us"),
    [
        ("h100", "llama-3.1-8b", 1, 12.5),
        ("h100", "llama-3.1-8b", 2, 8.3),
        ("h100", "qwen2.5-7b", 1, 9.5),
        ("h100", "qwen3-32b", 1, 41.6),
        ("h100", "qwen3-32b", 2, 27.7),
        ("h100", "llama-3.1-70b", 4, 33.6),
        ("h100", "llama-3.1-70b", 8, 23.7),
        ("h200", "llama-3.1-8b", 1, 14.1),
        ("h200", "qwen3-32b", 1, 45.8),
        ("l40s", "llama-3.1-8b", 1, 27.5),
        ("a100", "llama-3.1-8b", 1, 39.5),
        ("a100", "qwen3-32b", 1, 134.6),
    ],
)
def test_a_sequence_more_costs_what_the_measured_tables_say(gpu, model, tp, rise_us):
    """The same tables: the rise of decode steps of up to 256 sequences with each, however short it is."""
    cost = step_cost(default_step_time(GPUS[gpu], tp), MODELS[model], GPUS[gpu], tp)
    many, one = gpu_seconds(cost, 257.0, 257.0, 0.0, 0.0), gpu_seconds(cost, 1.0, 1.0, 0.0, 0.0)
    assert (many - one) / 256 * 1e6 == pytest.approx(rise_us, rel=0.2)


def test_prefill_in_a_mixed_step_is_cheaper_than_added():
    cost = step_cost(default_step_time(GPUS["h100"]), MODELS["llama-3.1-8b"], GPUS["h100"])
    decode, prefill = gpu_seconds(cost, 64.0, 64.0, 6.4e4, 0.0), gpu_seconds(cost, 256.0, 1.0, 0.0, 256 * 128.0)
    mixed = gpu_seconds(cost, 320.0, 65.0, 6.4e4, 256 * 128.0)
    assert max(decode, prefill) < mixed < 0.7 * (decode + prefill)


def test_experts_are_read_only_as_far_as_tokens_reach_them():
    model, gpu = MODELS["mixtral-8x7b"], GPUS["h200"]
    cost = step_cost(StepTime(p=1.0), model, gpu)
    cheap = cost._replace(per_token=0.0, per_sequence=0.0, per_kv_token=0.0)
    one = gpu_seconds(cheap, 1.0, 1.0, 0.0, 0.0)
    many = gpu_seconds(cheap, 1000.0, 1.0, 0.0, 0.0)
    assert isclose(one - cost.weights, cost.experts * 2 / 8, rel_tol=1e-9)
    assert isclose(many - cost.weights, cost.experts, rel_tol=1e-9)
    uneven = cheap._replace(log_unrouted=step_cost(StepTime(r_ex=0.5), model, gpu).log_unrouted)
    assert isclose(gpu_seconds(uneven, 8.0, 1.0, 0.0, 0.0), gpu_seconds(cheap, 4.0, 1.0, 0.0, 0.0), rel_tol=1e-9)
    assert model.active_parameters < 0.3 * model.parameters


def test_kv_blocks_are_estimated_near_the_one_known_server():
    """Llama-3.1-8B on an RTX 4090 under vLLM 0.19: num_gpu_blocks 2588 (casys-kaist/LLMServingSim@5daddb2)."""
    blocks, origin = estimate_kv_blocks(MODELS["llama-3.1-8b"], GPUS["rtx4090"], 1, 16, 2048, 256, ENGINES["vllm-0.19"])
    assert abs(blocks - 2588) < 50
    assert origin.startswith("estimated")


def test_limits_by_gpu():
    for gpu, seqs, budget in (("h100", 1024, 8192), ("a100", 256, 2048), ("rtx4090", 256, 2048)):
        cluster = resolve(gpu=gpu)
        assert (cluster.max_num_seqs, cluster.max_num_batched_tokens) == (seqs, budget)


def test_profiles_differ_as_the_versions_do():
    flags = {name: (e.async_scheduling, e.full_prompt_gate) for name, e in ENGINES.items()}
    assert flags["vllm-0.11"] == (False, False)
    assert flags["vllm-0.14"] == (True, False)
    assert flags["vllm-0.19"] == flags["vllm-0.24"] == (True, True)


def test_bounds_hold_every_default():
    for gpu in GPUS.values():
        step = default_step_time(gpu)
        assert all(b.low <= getattr(step, name) <= b.high for name, b in BOUNDS.items())
        assert step.o0 > 0  # no engine takes its next step at once
        assert step.o_gap > 0


def test_names_are_found_in_the_usual_spellings():
    assert find_gpu("RTX 4090") == find_gpu("rtx-4090") == GPUS["rtx4090"]
    assert find_gpu("A100-80").name == "a100"
    assert find_model("meta-llama/Llama-3.1-8B-Instruct").name == "llama-3.1-8b"


def test_files_describe_others(tmp_path):
    card = tmp_path / "gpu.json"
    card.write_text('{"name": "mine", "memory_gb": 96, "bandwidth_tb_s": 1.6, "bf16_tflops": 500}')
    assert find_gpu(str(card)).memory_gb == 96
    m = MODELS["llama-3.1-8b"]
    config = {
        "num_hidden_layers": m.layers,
        "hidden_size": m.hidden,
        "intermediate_size": m.intermediate,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv_heads,
        "vocab_size": m.vocab,
        "max_position_embeddings": m.context,
    }
    folder = tmp_path / "My-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    read = find_model(str(folder))
    assert read.name == "My-8B"
    assert read.parameters == m.parameters
    assert resolve(model=str(folder / "config.json"), gpu=str(card)).kv_blocks > 1000
    moe = config | {"num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000}
    (folder / "config.json").write_text(json.dumps(moe))
    assert find_model(str(folder)).parameters == MODELS["mixtral-8x7b"].parameters


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not valid JSON"),
        ("[]", "object"),
        ('{"name": "x"}', "memory_gb"),
        ('{"name": "x", "memory_gb": 0, "bandwidth_tb_s": 1, "bf16_tflops": 1}', "memory_gb"),
        ('{"name": "x", "memory_gb": 9, "bandwidth_tb_s": 1, "bf16_tflops": 1, "colour": 1}', "colour"),
        ('{"name": "x", "memory_gb": 9, "bandwidth_tb_s": 1e-12, "bf16_tflops": 1}', "bandwidth_tb_s"),
        ('{"name": "x", "memory_gb": 9, "bandwidth_tb_s": 1, "bf16_tflops": 1, "fp8_tflops": -5}', "fp8_tflops"),
    ],
)
def test_bad_gpu_files(tmp_path, text, says):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        find_gpu(str(path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": "many"}, "whole number"),
        ({"num_attention_heads": 0}, "0"),
        ({"kv_lora_rank": 512}, "qk_rope_head_dim is missing"),
        ({"quantization_config": {"bits": 3}}, "neither 8 nor 4 bits"),
        ({"quantization_config": "small"}, "neither 8 nor 4 bits"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads evenly"),
        ({"num_key_value_heads": 8}, "4 attention heads cannot share 8"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ({"num_local_experts": 8}, "num_experts_per_tok is missing"),
        ({"num_local_experts": 8, "num_experts_per_tok": 20}, "20 of 8 experts"),
    ],
)
def test_bad_model_files(tmp_path, changes, says):
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "vocab_size": 9,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=says):
        find_model(str(path))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"model": "gpt-9"}, "built in are"),
        ({"gpu": "abacus"}, "built in are"),
        ({"engine": "sglang"}, "vllm-0.24"),
        ({"scheduler": "magic"}, "fcfs"),
        ({"preemption": "magic"}, "recompute"),
        ({"router": "best"}, "least-outstanding"),
        ({"tp": 3}, "--tp 3"),
        ({"model": ""}, "built in are"),
        ({"gpu": ""}, "built in are"),
        ({"fleet": "=2"}, "--fleet =2"),
        ({"prefix_caching": True, "host_cache": 1e9}, "more than the 100,000,000"),
        ({"autoscale": "kv:inf", "max_replicas": 3}, "--autoscale kv:inf"),
        ({"mtbf": "1h", "fail": "0@3s"}, "give one of them"),
        ({"replicas": 0}, "--replicas 0"),
        ({"kv_blocks": 1}, "null block"),
        ({"max_num_seqs": 4096, "max_num_batched_tokens": 512}, "vLLM refuses"),
        ({"retries": 2}, "changes nothing"),
        ({"retries": -1}, "--retries -1"),
        ({"timeout": "soon"}, "--timeout"),
        ({"timeout": 0}, "--timeout"),
        ({"queue_limit": 0}, "--queue-limit 0"),
        ({"model": "llama-3.1-70b"}, "does not fit"),
        ({"model": "llama-3.1-70b", "kv_blocks": 100}, "its weights take"),
        ({"replicas": 10**9, "mtbf": "1h"}, "--replicas 1000000000"),
        ({"replicas": 9_000, "max_num_seqs": 8192}, "20,000,000"),
        ({"block_size": 10**8}, "--block-size 100000000"),
        ({"chunk_size": 8192}, "--chunk-size 8192 changes nothing"),
        ({"watermark": 1e-6}, "less than one of"),
        ({"prefix_caching": True, "shared_prefix": 8}, "whole blocks of 16"),
        ({"preemption": "swap", "swap_space": 1e-4}, "--swap-space 0.0001: not one block"),
        ({"prefix_caching": True, "host_cache": 1e-4}, "--host-cache 0.0001: not one block"),
    ],
)
def test_impossible_clusters(words, says):
    with pytest.raises(InputError, match=says):
        resolve(**words)
