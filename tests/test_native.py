"""Machine code in files: kept, found again, made anew when the source changes."""

import math
import os
import sys
from typing import NamedTuple

import numpy as np
import pytest

from squall import native
from squall.jit import njit


class Inner(NamedTuple):
    seen: np.ndarray
    factor: int


class Outer(NamedTuple):
    cells: np.ndarray  # of two dimensions, of records
    inner: Inner
    missing: None
    power: float


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of one function; call it with a source to change that."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(source: str) -> str:
        (tmp_path / "counted.py").write_text(source)
        sys.modules.pop("counted", None)
        return "counted"

    yield write
    sys.modules.pop("counted", None)


def test_kept_code_is_loaded_without_compiling(module, tmp_path):
    name = module("def add(a, b):\n    return a + b\n")
    assert native.load(name, "add", 2)(2, -5) == -3
    assert len(list((tmp_path / "__pycache__").glob("counted.add-*.o"))) == 1
    sys.modules.pop(name)
    assert native.load(name, "add", 2)(2**62, 5) == 2**62 + 5
    assert name not in sys.modules  # nobody needed to compile it


def test_a_broken_file_is_as_good_as_none(module, tmp_path):
    name = module("def add(a, b):\n    return a + b\n")
    native.load(name, "add", 2)
    (kept,) = (tmp_path / "__pycache__").glob("counted.add-*.o")
    whole = kept.read_bytes()
    for broken in (b"", b"\x7fELF", whole[:100], whole[: len(whole) // 3], bytes(len(whole))):
        kept.write_bytes(broken)
        assert native.load(name, "add", 2)(20, 3) == 23
        assert len(kept.read_bytes()) > len(whole) / 2


def test_constants_and_jumps_are_found(module):
    """Code that refers to a table of its own: what the linker has to mend."""
    cases = "".join(f"    if a == {i}:\n        return {i * i + 7 * (i % 3)}\n" for i in range(12))
    f = native.load(module(f"def pick(a):\n{cases}    return -1\n"), "pick", 1)
    assert [f(i) for i in range(13)] == [i * i + 7 * (i % 3) for i in range(12)] + [-1]


@pytest.mark.parametrize("here", [True, False])
def test_functions_of_the_c_library_are_found(module, monkeypatch, here):
    monkeypatch.setattr(native, "_LINKED_HERE", here and native._LINKED_HERE)
    body = "    return int(1e6 * exp(a / 10) + 1e6 * (a / 7) ** (b / 3))\n"
    f = native.load(module(f"from math import exp\ndef mix(a, b):\n{body}"), "mix", 2)
    for a, b in ((1, 2), (20, 5), (7, 31)):
        assert f(a, b) == int(1e6 * math.exp(a / 10) + 1e6 * (a / 7) ** (b / 3))


PARTS = """
from squall.native import inlined, lean

@inlined
def _scaled(inner, x):
    return x * inner.factor

@lean
def _kept(missing, x):
    return x if missing is None else missing[0] * x

def total(outer, limit):
    inner, sum = outer.inner, 0
    for i in range(outer.cells.shape[0]):
        for j in range(outer.cells.shape[1]):
            if outer.cells[i, j].count < limit:
                sum += _kept(outer.missing, _scaled(inner, outer.cells[i, j].count))
                inner.seen[i] += 1
                outer.cells[i, j].weight **= outer.power
    return sum
"""


def test_bundles_lead_to_the_arrays(module):
    cells = np.zeros((3, 4), np.dtype([("count", np.int32), ("weight", np.float64)], align=True))
    cells["count"], cells["weight"] = np.arange(12).reshape(3, 4), 3.0
    outer = Outer(cells, Inner(np.zeros(3, np.int64), -5), None, 0.5)
    bundle, name = native.Bundle(outer), module(PARTS)
    f = native.load(name, "total", 1, bundles=(bundle.form,))
    assert f(bundle.address, 9) == -5 * sum(range(9))
    assert outer.inner.seen.tolist() == [4, 4, 1]
    assert np.array_equal(cells["weight"], np.where(cells["count"] < 9, 3.0**0.5, 3.0))
    assert sys.modules[name]._kept([2], 4) == 8  # to Python the parts are what is written there
    with pytest.raises(TypeError, match="C-contiguous"):
        native.Bundle(outer._replace(cells=cells.T))


def test_forms_are_kept_side_by_side(module, tmp_path):
    """What is compiled for other arrays takes nothing away; what is compiled from another source takes its place."""

    class One(NamedTuple):
        x: np.ndarray

    source = "def twice(one):\n    return 2 * one.x[0]\n"
    for times, text in ((2, source), (22, source.replace("2", "22"))):
        name = module(text)
        for kind in (np.int64, np.int16):
            bundle = native.Bundle(One(np.array([-3], kind)))
            assert native.load(name, "twice", bundles=(bundle.form,))(bundle.address) == -3 * times
        assert len(list((tmp_path / "__pycache__").glob("counted.twice-*.o"))) == 2


def test_another_source_is_compiled_anew(module, tmp_path):
    assert native.load(module("def add(a, b):\n    return a + b\n"), "add", 2)(2, 3) == 5
    assert native.load(module("def add(a, b):\n    return a + 2 * b\n"), "add", 2)(2, 3) == 8
    assert len(list((tmp_path / "__pycache__").glob("counted.add-*.o"))) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_place_that_cannot_be_written(module, tmp_path):
    name = module("def add(a, b):\n    return a + b\n")
    tmp_path.chmod(0o500)
    try:
        assert native.load(name, "add", 2)(2, 3) == 5
    finally:
        tmp_path.chmod(0o700)


def test_an_index_from_the_end_is_refused(module):
    class One(NamedTuple):
        x: np.ndarray

    form = native.Bundle(One(np.zeros(3, np.int64))).form
    with pytest.raises(TypeError, match="count from the begin"):
        native.load(module("def last(one):\n    return one.x[-1]\n"), "last", bundles=(form,))
    assert njit(lambda x: x[-1])(np.arange(3)) == 2  # elsewhere it is as ever


def test_what_needs_the_run_time_of_numba_is_refused(module):
    with pytest.raises(TypeError, match="add may raise or allocate"):
        native.load(module("def add(a, b):\n    if a > b:\n        raise ValueError\n    return a\n"), "add", 2)
