"""Length fits against scipy and against the distributions that the lengths were drawn from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from squall.characterize.lengths import (
    harmonic,
    length_statistics,
    length_time,
    request_response,
    response_bands,
)

TOKENS = st.lists(st.integers(0, 3000), min_size=1, max_size=200).map(lambda values: np.array(values, dtype=np.int32))


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@given(TOKENS)
def test_quantiles_are_the_sorted_value_at_floor_pn(tokens: np.ndarray) -> None:
    found = length_statistics(tokens)
    ordered = sorted(tokens.tolist())
    for name, percent in (("p10", 10), ("p50", 50), ("p90", 90), ("p99", 99)):
        assert getattr(found, name) == ordered[percent * len(ordered) // 100]
    assert (found.n, found.min, found.max) == (len(ordered), ordered[0], ordered[-1])
    assert found.mean == pytest.approx(sum(ordered) / len(ordered))


@given(TOKENS)
def test_the_histogram_holds_every_length_once(tokens: np.ndarray) -> None:
    histogram = length_statistics(tokens).histogram
    assert histogram is not None
    expected, _ = np.histogram(tokens, [*histogram.edges[:-1], 2**31])
    assert histogram.counts == expected.tolist()
    assert histogram.edges[0] <= tokens.min()
    assert histogram.edges[-1] > tokens.max()


@given(TOKENS)
def test_any_lengths_get_finite_fits_or_none(tokens: np.ndarray) -> None:
    found = length_statistics(tokens)
    assert (found.best_fit is None) == (np.unique(tokens[tokens > 0]).size < 2)
    for fit in found.fits:
        assert 0 <= fit.ks <= 1
        assert np.isfinite([fit.aic, *fit.parameters.values()]).all()
    shares = [mode.share for mode in found.modes]
    assert not shares or sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("theta", [-1.0, 0.0, 0.7, 1.0, 1.1, 3.0])
def test_harmonic_sums_are_exact_beyond_the_head(theta: float) -> None:
    ends = np.array([0, 1, 999, 1000, 1001, 40_000, 1_000_000])
    exact = np.concatenate(([0.0], np.cumsum(np.arange(1.0, 1_000_001) ** -theta)))[ends]
    assert harmonic(theta, ends) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("theta", [0.5, 1.1, 2.0])
def test_zipf_recovers_theta(theta: float) -> None:
    support = np.arange(1, 1024)
    mass = support**-theta
    tokens = rng().choice(support, 50_000, p=mass / mass.sum())
    found = length_statistics(tokens)
    assert found.zipf is not None
    assert found.best_fit is not None
    assert found.zipf.theta == pytest.approx(theta, abs=0.02)
    assert found.zipf.ks < 0.01
    assert found.best_fit.family == "zipf"


def test_the_published_zipf_has_its_published_moments() -> None:
    # theta = 1.1 over 1..1,023: mean 101.72, P(1) = 0.179.
    support = np.arange(1, 1024)
    whole = harmonic(1.1, np.array([1023]))[0]
    assert 1 / whole == pytest.approx(0.179, abs=5e-4)
    assert (support * support**-1.1).sum() / whole == pytest.approx(101.72, abs=5e-3)


@pytest.mark.parametrize(
    ("family", "model", "parameters"),
    [
        ("lognormal", stats.lognorm(1.2, scale=np.exp(5.5)), {"mu": 5.5, "sigma": 1.2}),
        ("gamma", stats.gamma(1.7, scale=300), {"shape": 1.7, "rate": 1 / 300}),
        ("weibull", stats.weibull_min(0.8, scale=400), {"shape": 0.8, "scale": 400}),
    ],
)
def test_the_family_that_was_drawn_is_found(family: str, model, parameters: dict[str, float]) -> None:  # type: ignore[no-untyped-def]
    tokens = np.maximum(np.round(model.rvs(30_000, random_state=rng())), 1).astype(int)
    found = length_statistics(tokens)
    assert found.best_fit is not None
    assert found.best_fit.family == family
    assert found.best_fit.parameters == pytest.approx(parameters, rel=0.03)
    assert found.best_fit.ks < 0.02


def test_fits_and_likelihoods_agree_with_scipy() -> None:
    tokens = np.maximum(np.round(rng().lognormal(6, 1, 5000)), 1)
    fits = {fit.family: fit for fit in length_statistics(tokens.astype(int)).fits}
    shape, _, scale = stats.weibull_min.fit(tokens, floc=0)
    assert fits["weibull"].parameters == pytest.approx({"shape": shape, "scale": scale}, rel=1e-3)
    shape, _, scale = stats.gamma.fit(tokens, floc=0)
    assert fits["gamma"].parameters == pytest.approx({"shape": shape, "rate": 1 / scale}, rel=1e-3)
    # Far from 0 the mass of an integer is the density at it.
    density = stats.lognorm(fits["lognormal"].parameters["sigma"], scale=np.exp(fits["lognormal"].parameters["mu"]))
    assert fits["lognormal"].aic == pytest.approx(4 - 2 * density.logpdf(tokens).sum(), rel=1e-4)


def test_two_modes_are_told_from_one() -> None:
    short, long = rng().lognormal(4, 0.4, 6000), rng().lognormal(6.5, 0.3, 4000)
    two = length_statistics(np.round(np.concatenate([short, long])).astype(int)).modes
    assert [round(mode.share, 1) for mode in two] == [0.6, 0.4]
    assert two[0].tokens == pytest.approx(np.exp(4), rel=0.1)
    assert two[1].tokens == pytest.approx(np.exp(6.5), rel=0.1)
    # Short lengths are integers far apart on a log scale; that alone makes no modes.
    for mean in (0.5, 2, 4):
        assert len(length_statistics(np.round(rng().lognormal(mean, 0.8, 20_000) + 0.5).astype(int)).modes) == 1


def test_correlations_agree_with_scipy_and_the_slope_with_least_squares() -> None:
    request = np.round(rng().lognormal(6, 1, 3000)).astype(int)
    response = np.round(50 + 0.18 * request + rng().gamma(2, 20, 3000)).astype(int)
    found = request_response(request, response)
    assert found.pearson == pytest.approx(stats.pearsonr(request, response).statistic)
    assert found.spearman == pytest.approx(stats.spearmanr(request, response).statistic)
    assert found.slope == pytest.approx(0.18, abs=0.01)
    constant = request_response(request, np.full(3000, 5))
    assert (constant.pearson, constant.spearman, constant.slope) == (None, None, None)


def test_bands_are_the_quantiles_of_their_bins() -> None:
    request = rng().integers(1, 5000, 20_000)
    response = rng().integers(0, 900, 20_000)
    bands = response_bands(request, response)
    assert sum(band.n for band in bands) > 19_900
    for band in bands:
        inside = np.sort(response[(request >= band.low) & (request < band.high)])
        assert band.n == inside.size
        assert band.mean == pytest.approx(inside.mean())
        assert (band.p5, band.p50, band.p95) == tuple(inside[int(share * inside.size)] for share in (0.05, 0.5, 0.95))


def test_the_cv_of_shuffled_lengths_is_that_of_shuffling_them() -> None:
    arrivals = np.sort(rng().uniform(0, 3000, 2000))
    tokens = np.sort(np.round(rng().lognormal(5, 1, 2000)).astype(int))
    found = length_time(arrivals, tokens, 0.0, 3000.0, (60.0,))[0]
    window = (arrivals // 60).astype(int)

    def cv(lengths: np.ndarray) -> float:
        load = np.bincount(window, lengths, 50)
        return float(load.std() / load.mean())

    shuffled = [cv(rng_) for rng_ in (np.random.default_rng(seed).permutation(tokens) for seed in range(300))]
    assert found.cv == pytest.approx(cv(tokens))
    assert found.shuffled_cv == pytest.approx(np.sqrt(np.mean(np.square(shuffled))), rel=0.01)
    assert found.cv is not None
    assert found.shuffled_cv is not None
    assert found.cv > 2 * found.shuffled_cv


def test_a_mixture_of_two_lognormals_is_found_again_and_ranked_first() -> None:
    short, long = rng().lognormal(3.5, 0.6, 12_000), rng().lognormal(6.5, 0.5, 8_000)
    tokens = np.maximum(np.round(np.concatenate([short, long])), 1).astype(int)
    best = length_statistics(tokens).best_fit
    assert best is not None
    assert best.family == "lognormal-mixture"
    expected = {"weight": 0.6, "mu1": 3.5, "sigma1": 0.6, "mu2": 6.5, "sigma2": 0.5}
    assert best.parameters == pytest.approx(expected, rel=0.03)
    assert best.ks < 0.01
    assert best.bic == pytest.approx(best.aic + 5 * (np.log(20_000) - 2))
    # The likelihood is that of the density, where lengths are long.
    component = stats.lognorm(best.parameters["sigma1"], scale=np.exp(best.parameters["mu1"]))
    other = stats.lognorm(best.parameters["sigma2"], scale=np.exp(best.parameters["mu2"]))
    weight = best.parameters["weight"]
    density = np.log(weight * component.pdf(tokens) + (1 - weight) * other.pdf(tokens)).sum()
    assert best.aic == pytest.approx(10 - 2 * density, rel=1e-3)
