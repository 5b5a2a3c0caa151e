"""What-if edits: each changes what it names by what it says, and leaves the rest."""

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from squall import fit, generate
from squall.errors import InputError
from squall.trace import Trace, TraceMeta

SPAN = 20_000.0


@pytest.fixture(scope="module")
def model():
    """Poisson arrivals of two services at 1 request/s, with dependent lengths and no sessions."""
    rng = np.random.default_rng(0)
    size = 20_000
    x, y = rng.standard_normal((2, size))
    frame = pl.DataFrame(
        {
            "arrival": np.sort(rng.uniform(0, SPAN, size)),
            "request_tokens": np.rint(np.exp(5 + x)).astype(int) + 1,
            "response_tokens": np.rint(np.exp(4 + 0.7 * x + 0.7 * y)).astype(int) + 1,
            "service": rng.choice(["api", "conversation"], size, p=[0.6, 0.4]),
        }
    )
    return fit(Trace.of(frame, TraceMeta(source="t", format="squall")), kind="renewal", window="1h")


def cv(arrival):
    gaps = np.diff(arrival)
    return gaps.std() / gaps.mean()


def test_lengths_grow_and_keep_their_ranks(model):
    plain = generate(model, seed=1).table
    longer = generate(model, seed=1, edit=["longer-prompts=1.5", "longer-responses=0.5"])
    assert longer.meta.steps == ["--edit longer-prompts=1.5", "--edit longer-responses=0.5"]
    table = longer.table
    assert table["arrival"].equals(plain["arrival"])
    assert table["request_tokens"].to_numpy() == pytest.approx(1.5 * plain["request_tokens"].to_numpy(), abs=0.51)
    assert table["response_tokens"].mean() == pytest.approx(0.5 * plain["response_tokens"].mean(), rel=0.02)
    rank = [spearmanr(t["request_tokens"], t["response_tokens"]).statistic for t in (plain, table)]
    assert rank[1] == pytest.approx(rank[0], abs=0.01)


def test_the_share_of_the_api_moves_and_the_rate_stays(model):
    table = generate(model, seed=2, edit=["api-share=0.9"]).table
    assert (table["service"] == "api").mean() == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / 20_000))
    assert len(table) == pytest.approx(20_000, abs=4 * np.sqrt(20_000))


@pytest.mark.parametrize("factor", [0.5, 2.0, 4.0])
def test_gaps_become_burstier_or_smoother(model, factor):
    api = model.only(classes=model.classes[:1])
    drawn = generate(api, duration=200_000, seed=3, edit=[f"burstier={factor}"]).table["arrival"].to_numpy()
    assert cv(drawn) == pytest.approx(factor, rel=0.08)
    assert drawn.size == pytest.approx(api.mean_rate * 200_000, abs=5 * factor * np.sqrt(120_000))


def test_load_grows_by_the_month(model):
    year = generate(model, duration="360d", rate=0.01, seed=4, edit=["growth=10%"]).table["arrival"].to_numpy()
    month = np.bincount((year // (30 * 86400)).astype(int), minlength=12)
    wanted = 0.01 * 30 * 86400 * 1.1 ** (np.arange(12) + 0.5)
    assert np.abs(month - wanted).max() < 5 * np.sqrt(wanted.max()) + 0.01 * wanted.max()


def test_a_flood_and_an_outage_are_where_they_were_put(model):
    table = generate(model, seed=5, edit=["flood=1h:20m:5", "outage=2h:10m"]).table
    minutes = np.bincount((table["arrival"].to_numpy() // 60).astype(int), minlength=333)
    assert minutes[60:80].mean() == pytest.approx(300, abs=4 * np.sqrt(300 / 20))
    assert np.delete(minutes[:300], range(60, 80)).mean() == pytest.approx(60, abs=4 * np.sqrt(60 / 280))
    out = table["arrival"].is_between(7_200, 7_800, closed="left")
    assert table.filter(out)["failed"].all()
    assert table.filter(out)["response_tokens"].max() == 0
    assert not table.filter(~out)["failed"].any()


def test_growth_keeps_sessions_whole_and_portions_do_not_matter():
    drawn = generate("burstgpt://chatgpt-conversation", duration="4d", seed=6, edit=["growth=100%"]).table
    plain = generate("burstgpt://chatgpt-conversation", duration="4d", seed=6).table
    turns = [table.group_by("session").len()["len"].mean() for table in (drawn, plain)]
    assert turns[0] == pytest.approx(turns[1], rel=0.1)
    assert len(generate("burstgpt://all", requests=1_000, edit=["growth=-50%"])) == 1_000


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        ("larger=2", "the names are api-share"),
        ("longer-prompts", "NAME=VALUE"),
        ("longer-prompts=-1", "above 0"),
        ("burstier=much", "a number above 0"),
        ("api-share=1.5", "above 0 and below 1"),
        ("growth=-100%", "cannot shrink by all"),
        ("flood=2h:30m", "flood=START:LENGTH:FACTOR"),
        ("flood=soon:30m:2", "not a duration"),
        ("outage=2h", "outage=START:LENGTH"),
        ("outage=2h:0", "length must be above 0"),
        ("clients=9", "not of clients"),
        ("clients=1.5", "whole number"),
    ],
)
def test_an_edit_that_cannot_be_is_named(model, edit, sentence):
    with pytest.raises(InputError, match=sentence):
        generate(model, duration=10, edit=[edit])


def test_edits_that_a_model_cannot_take_are_refused(model, tmp_path):
    with pytest.raises(InputError, match="only API requests"):
        generate("burstgpt://chatgpt-api", duration=600, edit=["api-share=0.5"])
    rng = np.random.default_rng(1)
    frame = pl.DataFrame({"arrival": np.sort(rng.uniform(0, 600, 900)), "request_tokens": 5, "response_tokens": 5})
    course = fit(Trace.of(frame, TraceMeta(source="t", format="squall")), kind="episodes")
    with pytest.raises(InputError, match="fit one with --kind renewal"):
        generate(course, edit=["burstier=2"])
