"""ServeGen pools: the real one as published, and one sentence for what is wrong with another."""

import json
import math

import numpy as np
import pytest

from squall.errors import InputError
from squall.trace import read_servegen, read_trace

WINDOWS = "0,0,0,,0,0\n600,0.5,2.0,Gamma,0.25,99\n1200,1.5,3.0,Weibull,0.4,1\n"
BLOCK = {"input_tokens": "{45: 0.25, 7: 0.75}", "output_tokens": "{1: 1.0}", "reason_ratio": "{0.5: 1}"}
IDLE = {"input_tokens": "{}", "output_tokens": "{}", "reason_ratio": "{}"}


@pytest.fixture
def pool(tmp_path):
    """A pool of one client with three windows."""
    (tmp_path / "chunk-3-trace.csv").write_text(WINDOWS)
    (tmp_path / "chunk-3-dataset.json").write_text(json.dumps({"21600": IDLE, "0": BLOCK}))
    (tmp_path / "README.md").write_text("not a chunk")
    return tmp_path


def test_a_pool_is_read(pool):
    read = read_servegen(pool)
    (client,) = read.clients
    assert (client.number, read.window, read.span) == (3, 600, 1800)
    assert read.rate.tolist() == [0, 0.5, 1.5]
    assert client.pattern == ("idle", "gamma", "weibull")
    assert client.shape[1:].tolist() == [0.25, 0.4]
    assert math.isnan(client.shape[0])
    block = client.block_at(1200)
    assert (block.input_tokens.values.tolist(), block.input_tokens.mean) == ([7, 45], 16.5)
    assert [block.start for block in client.blocks] == [0, 21600]
    assert not client.blocks[1].output_tokens.values.size
    assert client.block_at(-1) is None
    assert read.notes == ()


def test_load_without_lengths_and_silent_clients_are_noted(pool):
    (pool / "chunk-3-dataset.json").write_text(json.dumps({"0": IDLE}))
    (pool / "chunk-4-trace.csv").write_text("0,0,0,,0,0\r\n600,0,0,,0,0\r\n")
    (pool / "chunk-4-dataset.json").write_text(json.dumps({"0": IDLE}))
    assert read_servegen(pool).notes == (
        "2 active windows lie in blocks without lengths",
        "1 of 2 clients never send a request",
    )


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("1800,1,1,Gamma,1", "row 4: 5 fields"),
        ("1800,x,1,Gamma,1,1", "row 4: rate is 'x'"),
        ("1800,-1,1,Gamma,1,1", "row 4: rate is '-1'"),
        ("1800,nan,1,Gamma,1,1", "row 4: rate is 'nan'"),
        ("1800,1,1,Pareto,1,1", "row 4: the pattern is 'Pareto'"),
        ("1800,1,1,,1,1", "row 4: a rate of 1 with the pattern ''"),
        ("1800,0,1,Gamma,1,1", "row 4: a rate of 0"),
        ("1800,1,1,Gamma,0,1", "row 4: the shape is 0"),
        ("1200,1,1,Gamma,1,1", "row 4: its window does not come after"),
        ("2400,1,1,Gamma,1,1", "different lengths"),
    ],
)
def test_a_bad_window_is_named(pool, line, sentence):
    (pool / "chunk-3-trace.csv").write_text(WINDOWS + line + "\n")
    with pytest.raises(InputError, match=sentence):
        read_servegen(pool)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "it is not JSON"),
        ("[]", "not an object of blocks"),
        ('{"noon": {}}', "the key 'noon'"),
        ('{"0": {"input_tokens": "{}"}}', "output_tokens is missing"),
        (json.dumps({"0": BLOCK | {"input_tokens": "{1: 0.5}"}}), "block 0: input_tokens: .* sum to 0.5"),
        (json.dumps({"0": BLOCK | {"input_tokens": "{1: -1, 2: 2}"}}), "negative"),
        (json.dumps({"0": BLOCK | {"input_tokens": "__import__('os')"}}), "input_tokens is not a mapping"),
        (json.dumps({"0": BLOCK | {"input_tokens": "{1, 2: 1}"}}), "input_tokens is not a mapping"),
        (json.dumps({"0": BLOCK | {"input_tokens": [1]}}), "input_tokens is not a mapping"),
    ],
)
def test_a_bad_distribution_is_named(pool, content, sentence):
    (pool / "chunk-3-dataset.json").write_text(content)
    with pytest.raises(InputError, match=sentence):
        read_servegen(pool)


def test_missing_halves_and_folders(pool, tmp_path):
    (pool / "chunk-3-dataset.json").unlink()
    with pytest.raises(InputError, match=r"chunk-3-dataset\.json: the file is missing"):
        read_servegen(pool)
    with pytest.raises(InputError, match="is a directory of"):
        read_servegen(tmp_path / "absent")
    with pytest.raises(InputError, match="fits and not requests"):
        read_trace(pool)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no chunk-N-trace"):
        read_servegen(tmp_path / "empty")


def test_the_pool_of_deepseek_r1_is_as_published(traces):
    pool = read_servegen(traces / "servegen" / "deepseek-r1")
    assert len(pool.clients) == 73
    assert pool.span == 86400
    assert [round(float(x), 1) for x in (pool.rate.mean(), pool.rate.min(), pool.rate.max())] == [16.0, 4.3, 42.5]
    active = [client.rate > 0 for client in pool.clients]
    assert sum(int(a.sum()) for a in active) == 3111
    assert sum(client.pattern.count("gamma") for client in pool.clients) == 2589
    load = np.array([client.rate.sum() for client in pool.clients])
    assert load.max() / load.sum() == pytest.approx(0.286, abs=5e-4)
    gamma = np.concatenate(
        [client.shape[np.array(client.pattern) == "gamma"] for client in pool.clients],
    )
    assert np.quantile(gamma, [0.1, 0.5, 0.9]) == pytest.approx([0.16, 0.99, 1.64], abs=0.006)
    weights, means = [], []
    for client in pool.clients:
        for time, rate in zip(client.start, client.rate, strict=True):
            if rate > 0:
                block = client.block_at(time)
                weights.append(rate)
                means.append([block.input_tokens.mean, block.output_tokens.mean, block.reason_ratio.mean])
    assert np.average(means, axis=0, weights=weights) == pytest.approx([1268, 1527, 0.70], rel=0.003)
