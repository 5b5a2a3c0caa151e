"""Quantile tables and copulas: what they keep of a sample."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.workload.lengths import (
    GaussianCopula,
    GridCopula,
    Lengths,
    Quantiles,
    fit_lengths,
    ks_distance,
    ranks,
    spearman,
)


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=300))
@settings(deadline=None)
def test_a_table_keeps_both_ends_and_the_quantiles_of_its_sample(sample):
    values = np.array(sample)
    table = Quantiles.of(values)
    assert table.values[0] == values.min()
    assert table.values[-1] == values.max()
    assert table.at(np.array([0.1, 0.5, 0.9])) == pytest.approx(
        np.quantile(values, [0.1, 0.5, 0.9], method="hazen"), abs=1e-5
    )


def test_a_table_keeps_mean_tail_and_atoms_of_a_large_sample():
    rng = np.random.default_rng(1)
    sample = np.minimum(np.rint(rng.lognormal(5, 1.2, 100_000)), 4000).astype(int)  # an atom at the cap
    table = Quantiles.of(sample)
    assert len(table.levels) < 1100
    drawn = np.rint(table.at(rng.random(200_000)))
    assert drawn.mean() == pytest.approx(sample.mean(), rel=0.02)
    assert (drawn == 4000).mean() == pytest.approx((sample == 4000).mean(), abs=0.001)
    assert ks_distance(sample, table) < 0.002
    assert ks_distance(sample + 50, table) > 0.05


@pytest.mark.parametrize("r", [-0.8, 0.0, 0.4, 0.95])
@pytest.mark.parametrize("rows", [300, 20_000])
def test_rank_correlation_is_kept(r, rows):
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, rows))
    request = np.rint(np.exp(5 + x)).astype(int)
    response = np.rint(np.exp(4 + 1.3 * (r * x + np.sqrt(1 - r * r) * y))).astype(int)
    law = fit_lengths(request, response, rng)
    assert isinstance(law.copula, GaussianCopula if rows < 500 else GridCopula)
    drawn = law.draw(40_000, rng)
    # Standard error of the drawn correlation: 1/sqrt(40,000) = 0.005.
    assert spearman(*drawn) == pytest.approx(spearman(request, response), abs=0.02)


def test_a_grid_keeps_dependence_that_is_not_monotone():
    rng = np.random.default_rng(3)
    request = rng.integers(1, 1001, 30_000)
    response = np.rint(np.abs(request - 500) + rng.integers(1, 50, 30_000)).astype(int)
    law = fit_lengths(request, response, rng)
    a, b = law.draw(60_000, rng)
    assert abs(spearman(request, response)) < 0.03
    middle = b[(a > 400) & (a < 600)].mean()
    assert middle == pytest.approx(response[(request > 400) & (request < 600)].mean(), rel=0.1)
    assert b[a < 100].mean() == pytest.approx(response[request < 100].mean(), rel=0.05)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), st.integers(0, 99))
@settings(deadline=None)
def test_ranks_are_the_even_grid_and_follow_the_order(sample, seed):
    values = np.array(sample)
    found = ranks(values, np.random.default_rng(seed))
    assert np.sort(found) == pytest.approx((np.arange(values.size) + 0.5) / values.size)
    assert np.all(np.diff(values[np.argsort(found)]) >= 0)


def test_spearman_agrees_with_scipy():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 20, (2, 500))
    assert spearman(a, b + a) == pytest.approx(spearmanr(a, b + a).statistic)
    assert spearman(a, np.ones(500)) == 0.0


def test_the_compiled_laws_are_those_of_the_tables_and_copulas():
    rng = np.random.default_rng(8)
    u, w = rng.random((2, 5_000))
    table = Quantiles.of(np.rint(rng.lognormal(5, 1, 3_000)))
    grid = GridCopula(rng.dirichlet(np.ones(7), 4).tolist())
    for copula in (grid, GaussianCopula(0.0), GaussianCopula(-0.7)):
        law = Lengths(table, table, copula)
        request, response = law.at(u, w)
        assert np.abs(request - np.rint(table.at(u))).max() == 0
        off = np.abs(response - np.maximum(np.rint(table.at(copula.at(u, w))), 1))
        assert off.max() <= 1
        assert off.mean() < 1e-3  # where half a token is rounded
        # Drawn in one go, or at the ranks of requests: the same law.
        for drawn in (law.draw(40_000, rng), law.draw_at(rng.random(40_000), rng)):
            assert ks_distance(drawn[0], table) < 2.2 / np.sqrt(40_000)
            assert ks_distance(drawn[1], table) < (0.2 if copula is grid else 2.2 / np.sqrt(40_000))
            assert spearman(*drawn) == pytest.approx(spearman(request, response), abs=0.06)
