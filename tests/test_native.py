"""Machine code in files: kept, found again, made anew when the source changes."""

import os
import sys

import pytest

from squall import native


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


def test_what_needs_the_run_time_of_numba_is_refused(module):
    with pytest.raises(TypeError, match="add may raise or allocate"):
        native.load(module("def add(a, b):\n    if a > b:\n        raise ValueError\n    return a\n"), "add", 2)
