"""The trace options: each filter against its obvious definition, each scaling against what it promises to keep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import squall
from squall.errors import InputError
from squall.trace import Trace, TraceMeta, open_trace


def _trace(arrivals, **columns):
    n = len(arrivals)
    base = {
        "arrival": np.asarray(arrivals, float),
        "request_tokens": np.arange(1, n + 1),
        "response_tokens": np.ones(n, int),
    }
    return Trace.of(
        base | columns,
        TraceMeta(source="test", format="generated", clock=100.0, midnight=80_000.0, weekday=6, epoch=10**18),
    )


def test_a_window_starts_at_its_start_and_moves_every_clock():
    cut = open_trace(_trace([0, 5, 7, 20, 9000]), between="6:2h")
    assert cut.table["arrival"].to_list() == [1, 14]
    assert (cut.meta.clock, cut.meta.midnight, cut.meta.weekday, cut.meta.epoch) == (106, 80_006, 6, 10**18 + 6 * 10**9)
    later = open_trace(_trace([0, 9000]), between="6400:")
    assert (later.meta.midnight, later.meta.weekday) == (0, 0)


def test_without_a_window_the_first_request_left_is_the_start():
    cut = open_trace(_trace([0, 5, 7], service=["api", "conversation", "api"]), service="conversation")
    assert cut.table["arrival"].to_list() == [0]
    assert cut.meta.clock == 105
    assert cut.meta.steps == ["--service conversation (1 of 3 rows)"]


def test_filters_compose_in_their_stated_order():
    trace = _trace(range(6), model=["a", "b"] * 3, response_tokens=[0, 1, 1, 1, 1, 1])
    cut = open_trace(trace, model_name="a", head=2, drop_failed=True)
    assert cut.table["request_tokens"].to_list() == [3]


@pytest.mark.parametrize(("policy", "left"), [("drop", [1, 2]), ("clip", [1, 2, 2, 2]), ("keep", [1, 2, 3, 4])])
def test_long_requests_are_never_changed_silently(policy, left):
    cut = open_trace(_trace(range(4)), max_request_tokens=2, over_limit=policy)
    assert cut.table["request_tokens"].to_list() == left
    assert f"--over-limit {policy}" in cut.meta.steps[0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1e5), min_size=3, max_size=60, unique=True), st.floats(0.01, 50))
def test_compressing_keeps_the_shape(arrivals, factor):
    trace = open_trace(_trace(sorted(arrivals)))
    fast = open_trace(trace, speed=factor)
    assert fast.table["arrival"].to_numpy() * factor == pytest.approx(trace.table["arrival"].to_numpy())
    assert fast.table["request_tokens"].equals(trace.table["request_tokens"])
    assert open_trace(trace, rate=trace.rate * factor).rate == pytest.approx(trace.rate * factor)


@pytest.fixture(scope="module")
def poisson():
    return _trace(np.cumsum(np.random.default_rng(1).exponential(1.0, 20_000)), session=np.arange(20_000))


def test_thinning_reaches_the_rate_and_keeps_the_span(poisson):
    thin = open_trace(poisson, rate=0.25, scale_method="thin")
    assert len(thin) == pytest.approx(5_000, abs=4 * np.sqrt(20_000 * 0.25 * 0.75))
    assert thin.span == pytest.approx(poisson.span, rel=0.01)


def test_superposing_reaches_the_rate_keeps_the_span_and_separates_sessions(poisson):
    more = open_trace(poisson, rate=2.5, scale_method="superpose")
    assert len(more) == pytest.approx(50_000, abs=4 * np.sqrt(60_000 * (5 / 6) * (1 / 6)) + 50)
    assert more.span == pytest.approx(poisson.span, rel=0.01)
    assert more.table["session"].n_unique() == len(more)
    assert more.table["arrival"].is_sorted()


def test_equal_seeds_give_equal_rows(poisson):
    for options in ({"sample": 0.3}, {"rate": 0.4, "scale_method": "thin"}, {"rate": 3.1, "scale_method": "superpose"}):
        once, again, other = (open_trace(poisson, seed=seed, **options).table for seed in (5, 5, 6))
        assert once.equals(again)
        assert not once.equals(other)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"service": "api"}, "does not record services"),
        ({"model_name": "x"}, "it records no models"),
        ({"between": "5"}, "START:END"),
        ({"between": "9:3"}, "not after the start"),
        ({"between": "1h:2h"}, "no request of test is left"),
        ({"between": "soon:later"}, "'soon' is not a duration"),
        ({"head": 0}, "at least one row"),
        ({"sample": 2.0}, "probability"),
        ({"speed": 0.0}, "above 0"),
        ({"rate": -1.0}, "above 0"),
        ({"rate": 1.0, "speed": 2.0}, "both set the load"),
        ({"rate": 1e9, "scale_method": "thin"}, "only lowers"),
        ({"scale_method": "thin"}, "--scale-method thin does nothing without --rate"),
        ({"over_limit": "clip"}, "--over-limit clip does nothing"),
        ({"seed": -1}, "seed"),
        ({"max_request_tokens": 0}, "at least one token"),
        ({"burstiness": 2}, "no such option"),
    ],
)
def test_bad_options_are_named(options, sentence):
    with pytest.raises(InputError, match=sentence):
        open_trace(_trace(range(3)), **options)


def test_a_trace_at_one_instant_cannot_be_rescaled():
    with pytest.raises(InputError, match="no span"):
        open_trace(_trace([4, 4]), rate=1.0)


def test_unknown_sources_are_named():
    with pytest.raises(InputError, match="burstgpt://NAME"):
        squall.convert("http://x/y.csv", "out.csv")
