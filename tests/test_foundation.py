"""What all rooms share: durations, seeds, verbs as functions, and text from strangers."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import squall
from squall.errors import InputError
from squall.files import replace_file
from squall.progress import printable
from squall.seeds import stream
from squall.units import in_words, seconds


@given(st.floats(0, 1e6), st.sampled_from([("ms", 1e-3), ("s", 1), ("", 1), ("m", 60), ("h", 3600), ("d", 86400)]))
def test_durations_are_read_as_written(value, unit):
    name, size = unit
    assert seconds(f"{value:f}{name}") == pytest.approx(float(f"{value:f}") * size)


@pytest.mark.parametrize("text", ["", "s", "-5", "5 weeks", "1h30", "nan", "٥ days", -1, float("nan")])
def test_what_is_no_duration_is_refused_by_its_flag(text):
    with pytest.raises(InputError, match="--window"):
        seconds(text, "--window")


def test_bare_numbers_are_refused_where_peers_mean_milliseconds():
    with pytest.raises(InputError, match="lacks a unit"):
        seconds("200", "--slo", unit_required=True)


def test_durations_in_words_read_back():
    for value in (0.0123, 5.0, 300.0, 9000.0, 61 * 86400.0):
        text = in_words(value)
        number, unit = text.split()
        assert seconds(number + unit.replace("min", "m")) == pytest.approx(value, rel=0.01)


def test_streams_are_reproducible_and_independent():
    draws = {
        key: stream(*key).random(20_000)
        for key in [(0, "arrivals"), (1, "arrivals"), (0, "lengths"), (0, "arrivals", 1)]
    }
    assert np.array_equal(draws[0, "arrivals"], stream(0, "arrivals").random(20_000))
    # For independent uniform samples the correlation has a standard deviation of 1/sqrt(n).
    table = np.corrcoef(list(draws.values())) - np.eye(len(draws))
    assert np.abs(table).max() < 4.5 / np.sqrt(20_000)


def test_every_verb_is_a_function():
    from squall.cli.app import VERBS

    for verb in VERBS:
        assert callable(getattr(squall, verb)), verb
    assert set(VERBS) <= set(squall.__all__)
    with pytest.raises(AttributeError):
        squall.no_such_verb  # noqa: B018


@given(st.text())
def test_text_from_strangers_cannot_steer_a_terminal(text):
    shown = printable(text)
    assert all(c.isprintable() or c in "\n\t" for c in shown)
    if text.isprintable():
        assert shown == text


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    replace_file(path, b"first")

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        replace_file(path, fail)
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.txt"]
    replace_file(path, lambda temporary: temporary.write_text("second"))
    assert path.read_bytes() == b"second"
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    with pytest.raises(InputError, match="does not exist"):
        replace_file(tmp_path / "absent" / "out.txt", b"")
