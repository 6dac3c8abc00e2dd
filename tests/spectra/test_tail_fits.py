"""Power-law fits against samples of known exponent, double loops in numpy, and WeightWatcher."""

import importlib
import importlib.util
import math
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_opentrans.spectra import (
    Spectrum,
    TailFit,
    compute_partial_spectrum,
    compute_spectrum,
    confidence_interval,
    fit_tail,
    tail_fits,
)
from hf_opentrans.spectra.tail_fits import FIT_METHODS


def spectrum_of(values, **options):
    values = torch.as_tensor(np.sort(values), dtype=torch.float64)
    return Spectrum(values, len(values), len(values), trace=float(values.sum()), **options)


def pareto(alpha, count, seed=0, smallest=1.0):
    share = np.random.default_rng(seed).random(count)
    return smallest * (1 - share) ** (-1 / (alpha - 1))


def lognormal(count, seed=0, scale=1.0):
    return scale * np.exp(np.random.default_rng(seed).normal(size=count))


def fit_at(values, start):
    """Return alpha and D of the tail that starts at a position."""
    tail = values[start:]
    alpha = 1 + len(tail) / sum(math.log(value / tail[0]) for value in tail)
    gaps = [abs(1 - (value / tail[0]) ** (1 - alpha) - rank / len(tail)) for rank, value in enumerate(tail)]
    return alpha, max(gaps)


def scan(values, is_start):
    """Return start, alpha and D of the tail of smallest D, by a double loop."""
    best = None
    for start in range(len(values) - 1):
        if is_start(start, values[start]):
            alpha, distance = fit_at(values, start)
            if best is None or distance < best[2]:
                best = (start, alpha, distance)
    assert best is not None
    return best


def peak_of(values):
    """Return the left edge of the fullest of 100 logarithmic bins."""
    logs = [math.log10(value) for value in values]
    width = (logs[-1] - logs[0]) / 100
    heights = [0] * 100
    for log in logs:
        heights[min(int((log - logs[0]) / width), 99)] += 1
    return 10 ** (logs[0] + heights.index(max(heights)) * width)


def assert_fit(fit, values, expected):
    start, alpha, distance = expected
    assert fit.alpha == pytest.approx(alpha, rel=1e-9)
    assert fit.xmin == pytest.approx(values[start], rel=1e-14)
    assert fit.ks_distance == pytest.approx(distance, abs=1e-9)
    assert fit.tail_count == len(values) - start
    assert fit.standard_error == pytest.approx((alpha - 1) / math.sqrt(len(values) - start))
    assert fit.reliable


@pytest.mark.parametrize("method", FIT_METHODS)
@pytest.mark.parametrize("alpha", [1.5, 2.5, 4.0, 6.0])
@pytest.mark.parametrize("count", [100, 1000])
def test_exponents_of_pareto_samples_are_recovered(method, alpha, count):
    errors = []
    for seed in range(5):
        fit = fit_tail(spectrum_of(pareto(alpha, count, seed, smallest=0.03)), method)
        errors.append((fit.alpha - alpha) / fit.standard_error)
        assert fit.method == method
        assert fit.ks_distance < 0.15
        assert fit.hill_index == fit.alpha - 1
    assert max(map(abs, errors)) < 3


@pytest.mark.parametrize("count", [10, 64, 65, 130, 401])
@pytest.mark.parametrize("draw", [lognormal, lambda count: pareto(2.2, count)])
def test_ks_equals_a_double_loop(count, draw):
    # 64 is one block of the scan; 130 are three.
    values = np.sort(draw(count))
    assert_fit(fit_tail(spectrum_of(values), "ks"), values, scan(values, lambda start, value: True))


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_peak_equals_a_double_loop(compat, scale):
    values = np.sort(lognormal(300, scale=scale))
    peak = peak_of(values)
    low = math.log10(0.95 * peak) if compat else 0.95 * peak
    expected = scan(values, lambda start, value: low <= value <= 1.5 * peak)
    assert_fit(fit_tail(spectrum_of(values), "peak", compat=compat), values, expected)


@pytest.mark.parametrize(("count", "fewest"), [(100, 20), (1000, 50), (15, 15)])
def test_adaptive_tries_log_spaced_tails(count, fewest):
    values = np.sort(lognormal(count, seed=3))
    lengths = set(np.round(np.logspace(np.log10(fewest), np.log10(count), 200)).astype(int))
    fit = fit_tail(spectrum_of(values), "adaptive")
    assert_fit(fit, values, scan(values, lambda start, value: count - start in lengths))
    assert fit.tail_count >= fewest
    assert fit.ks_distance >= fit_tail(spectrum_of(values), "ks").ks_distance


@pytest.mark.parametrize(("count", "fewest"), [(100, 20), (1000, 50)])
def test_adaptive_tails_are_neither_shorter_than_20_nor_than_a_twentieth(count, fewest):
    # The law holds for a shorter tail alone, at quantiles, which fit it well; below is a narrow bulk.
    tail = (1 - np.arange(fewest - 6) / (fewest - 6)) ** -1.0
    values = [*np.linspace(0.9, 0.99, count - len(tail)), *tail]
    assert fit_tail(spectrum_of(values), "ks").tail_count < fewest
    assert fit_tail(spectrum_of(values), "adaptive").tail_count == fewest


def test_among_equally_good_tails_adaptive_takes_the_longest(monkeypatch):
    def nearly_equal(logs, alphas, starts):
        return torch.linspace(0.1 + 1e-12, 0.1, len(starts), dtype=torch.float64)  # the last, shortest is the best

    monkeypatch.setattr(tail_fits, "_distances", nearly_equal)
    spectrum = spectrum_of(lognormal(60))
    assert fit_tail(spectrum, "adaptive").tail_count == 60
    assert fit_tail(spectrum, "ks").tail_count == 2


def test_hill_by_hand():
    # Ten eigenvalues: k = 5, so xmin is the sixth largest, 1. The logarithms of the five above it are 1 1 2 2 4:
    # alpha = 1 + 5 / 10 = 3/2. In the distribution function xmin counts, n = 6: the gaps are
    # |1 - e^(-ln(l) / 2) - rank / 6|, largest at the first e: 1 - e^(-1/2) - 1/6.
    values = [0.1, 0.2, 0.3, 0.4, 1.0, *np.exp([1, 1, 2, 2, 4])]
    fit = fit_tail(spectrum_of(values))
    assert fit.alpha == pytest.approx(1.5)
    assert fit.hill_index == pytest.approx(0.5)
    assert fit.xmin == pytest.approx(1.0)
    assert fit.tail_count == 5
    assert fit.standard_error == pytest.approx(0.5 / math.sqrt(5))
    assert fit.ks_distance == pytest.approx(1 - math.exp(-0.5) - 1 / 6)
    assert (fit.method, fit.reliable, fit.note, fit.interval) == ("hill", True, "", None)
    # compat: the tail starts at position 10 // 2, xmin = e, which counts as the first of n = 5 members. The logarithms
    # relative to it are 0 0 1 1 3: alpha = 1 + 5 / 5 = 2. Gaps |1 - l/xmin^-1 - rank / 5|: the second e, -1/5, is
    # beaten by the first e^2, 1 - 1/e - 2/5 = 0.232.
    fit = fit_tail(spectrum_of(values), compat=True)
    assert fit.alpha == pytest.approx(2.0)
    assert fit.xmin == pytest.approx(math.e)
    assert fit.tail_count == 5
    assert fit.ks_distance == pytest.approx(1 - math.exp(-1) - 2 / 5)


@pytest.mark.parametrize("count", [11, 101, 999])
def test_compat_hill_counts_the_cut_point(count):
    # With 2 k + 1 eigenvalues both cut at position k, and the same k logarithms above xmin add up to S. Textbook:
    # alpha - 1 = k / S. The reference counts xmin too, n = k + 1 members: alpha - 1 = n / S = n / (n - 1) * k / S.
    spectrum = spectrum_of(lognormal(count))
    textbook, compat = fit_tail(spectrum), fit_tail(spectrum, compat=True)
    assert textbook.xmin == compat.xmin
    members = compat.tail_count
    assert members == textbook.tail_count + 1 == (count + 1) / 2
    assert compat.hill_index == pytest.approx(members / (members - 1) * textbook.hill_index)
    assert_fit(compat, np.sort(lognormal(count)), (count // 2, *fit_at(np.sort(lognormal(count)), count // 2)))


def test_the_slipped_window_of_the_reference_differs_below_a_peak_of_one():
    # A power law from 0.001 with a finger of 30 equal eigenvalues at 0.05, which is the peak. The logarithm of it is
    # negative: compat starts at the beginning of the law, below the window.
    values = np.sort(np.concatenate([pareto(2.0, 400, smallest=1e-3), np.full(30, 0.05)]))
    right, slipped = (fit_tail(spectrum_of(values), "peak", compat=compat) for compat in (False, True))
    assert 0.95 * peak_of(values) <= right.xmin <= 1.5 * peak_of(values)
    assert slipped.xmin < 0.01
    assert right.alpha != pytest.approx(slipped.alpha, rel=0.05)
    assert slipped.ks_distance < right.ks_distance


@pytest.mark.parametrize("smallest", [0.01, 1.0, 50.0])
def test_the_slipped_window_is_the_right_one_where_its_lower_end_excludes_nothing(smallest):
    # The smallest eigenvalue is the peak: no eigenvalue lies between log10(0.95 p) and 0.95 p.
    values = smallest * (1 + 3 * np.linspace(0, 1, 80) ** 3)
    assert peak_of(values) == pytest.approx(smallest)
    right, slipped = (fit_tail(spectrum_of(values), "peak", compat=compat) for compat in (False, True))
    assert right == slipped


@pytest.mark.parametrize("compat", [False, True])
def test_an_empty_window_is_flagged_and_has_no_alpha(compat):
    # The fullest bin is the last, from p = 10^19.8 to 10^20, and all that it holds lies at its end, above 1.5 p. All
    # others lie below log10(0.95 p) = 19.8, the reference's lower end too.
    values = [*np.linspace(1, 10, 20), *[1e20] * 30]
    fit = fit_tail(spectrum_of(values), "peak", compat=compat)
    assert math.isnan(fit.alpha)
    assert math.isnan(fit.xmin)
    assert math.isnan(fit.standard_error)
    assert (fit.reliable, fit.tail_count, fit.ks_distance) == (False, 0, 1.0)
    assert fit.note == "no eigenvalue lies in the window around the peak"


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("method", FIT_METHODS)
def test_equal_eigenvalues_are_flagged(method, compat):
    fit = fit_tail(spectrum_of([9.0] * 30), method, compat=compat)
    assert math.isnan(fit.alpha)
    assert not fit.reliable
    assert fit.note == "all eigenvalues of the tail are equal"
    assert (fit.method, fit.tail_count) == (method, 0)


@pytest.mark.parametrize("compat", [False, True])
def test_hill_flags_an_upper_half_of_equal_eigenvalues(compat):
    values = [*np.linspace(0.1, 1, 9), *[2.0] * 11]
    fit = fit_tail(spectrum_of(values), compat=compat)
    assert not fit.reliable
    assert math.isnan(fit.alpha)
    assert fit_tail(spectrum_of(values), "ks").reliable  # longer tails are there


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(12, 40), st.integers(12, 40)),
    scale=st.floats(1e-4, 1e4),
    method=st.sampled_from(FIT_METHODS),
    seed=st.integers(0, 10**6),
)
def test_alpha_does_not_depend_on_the_scale(shape, scale, method, seed):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fit, scaled = (fit_tail(compute_spectrum(w), method) for w in (weight, scale * weight))
    assert scaled.alpha == pytest.approx(fit.alpha, rel=1e-6)
    assert scaled.xmin == pytest.approx(scale**2 * fit.xmin, rel=1e-6)
    assert scaled.ks_distance == pytest.approx(fit.ks_distance, abs=1e-6)
    assert scaled.tail_count == fit.tail_count


@settings(max_examples=15, deadline=None)
@given(shape=st.tuples(st.integers(12, 30), st.integers(12, 30)), method=st.sampled_from(FIT_METHODS))
def test_alpha_does_not_depend_on_the_order_of_rows_and_columns(shape, method):
    weight = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))
    fit = fit_tail(compute_spectrum(weight), method)
    for other in (weight.T, weight.flip(0), weight.roll(5, 1)):
        assert fit_tail(compute_spectrum(other), method).alpha == pytest.approx(fit.alpha, rel=1e-6)


@pytest.fixture
def weightwatcher_fit():
    if importlib.util.find_spec("weightwatcher") is None:
        pytest.skip("WeightWatcher is not installed")
    loaded = {name for name in sys.modules if name.split(".")[0] == "weightwatcher"}
    if not loaded:
        # The module alone: the package imports for 12 seconds, prints and warns.
        spec = importlib.util.find_spec("weightwatcher")
        package = types.ModuleType("weightwatcher")
        package.__path__ = list(spec.submodule_search_locations or []) if spec else []
        sys.modules["weightwatcher"] = package
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield importlib.import_module("weightwatcher.WW_powerlaw").WWFit
    for name in [name for name in sys.modules if name.split(".")[0] == "weightwatcher" and name not in loaded]:
        del sys.modules[name]


@pytest.mark.parametrize("shape", [(21, 21), (64, 64), (200, 70)])
@pytest.mark.parametrize("is_heavy", [False, True])
def test_ks_equals_weightwatcher(weightwatcher_fit, shape, is_heavy):
    weight = np.random.default_rng(1).normal(size=shape)
    if is_heavy:
        weight = weight * pareto(3.0, shape[1])
    expected = weightwatcher_fit(np.linalg.svd(weight, compute_uv=False) ** 2)
    fit = fit_tail(compute_spectrum(torch.from_numpy(weight)), "ks")
    assert fit.alpha == pytest.approx(expected.alpha, rel=1e-10)
    assert fit.xmin == pytest.approx(expected.xmin, rel=1e-10)
    assert fit.ks_distance == pytest.approx(expected.D, abs=1e-10)
    assert fit.standard_error == pytest.approx(expected.sigma, rel=1e-10)


@pytest.mark.parametrize("method", FIT_METHODS)
def test_intervals_hold_the_exponent_of_pareto_samples(method):
    held = 0
    for seed in range(8):
        low, high = confidence_interval(spectrum_of(pareto(2.5, 300, seed)), method, samples=40)
        held += low < 2.5 < high
        assert 1 < low < high
    assert held >= 6  # 95 % of 8 are 7.6


def test_intervals_shrink_with_the_number_of_eigenvalues_and_the_level():
    widths = []
    for count in (50, 500, 5000):
        low, high = confidence_interval(spectrum_of(pareto(2.5, count)), samples=60)
        widths.append(high - low)
    # 10 times as many make it sqrt(10) = 3.2 times as narrow.
    assert 1.8 < widths[0] / widths[1] < 5.5
    assert 1.8 < widths[1] / widths[2] < 5.5
    sample = spectrum_of(pareto(2.5, 100))
    wide, narrow = (confidence_interval(sample, level=level, samples=60) for level in (0.95, 0.5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    standard = fit_tail(sample).standard_error
    assert wide[1] - wide[0] == pytest.approx(2 * 1.96 * standard, rel=0.4)


def test_intervals_are_repeatable_and_leave_the_global_generator_alone():
    sample, state = spectrum_of(lognormal(60)), torch.get_rng_state()
    first = confidence_interval(sample, samples=20)
    assert first == confidence_interval(sample, samples=20)
    assert first != confidence_interval(sample, samples=20, seed=1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("level", "ends"), [(0.9, (0.05, 0.95)), (0.5, (0.25, 0.75))])
def test_intervals_are_quantiles_of_the_samples(monkeypatch, level, ends):
    alphas = iter([50.0, *np.arange(2.0, 43.0), float("nan")])  # of the spectrum, of 41 samples, none

    def next_alpha(values, logs):
        return TailFit(next(alphas), 1.0, 10, 0.1, 0.1, "hill")

    monkeypatch.setattr(tail_fits, "_textbook_hill", next_alpha)
    interval = confidence_interval(spectrum_of(lognormal(50)), level=level, samples=42)
    assert interval == pytest.approx([2 + 40 * end for end in ends])


def test_an_interval_of_equal_eigenvalues_is_nan():
    assert all(map(math.isnan, confidence_interval(spectrum_of([2.0] * 20), samples=10)))


@pytest.mark.parametrize("options", [{"level": 0.0}, {"level": 1.0}, {"samples": 9}])
def test_intervals_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"They must lie in \(0, 1\) and be at least 10\. Correct them"):
        confidence_interval(spectrum_of(lognormal(20)), **options)


@pytest.mark.parametrize("function", [fit_tail, confidence_interval])
def test_what_cannot_be_fitted_is_refused(function):
    with pytest.raises(
        ValueError, match=r"The fit is 'best'\. It must be one of hill, peak, ks, adaptive\. Correct it"
    ):
        function(spectrum_of(lognormal(20)), "best")
    with pytest.raises(ValueError, match=r"has 9 eigenvalues\. A tail fit needs at least 10\. Leave this layer out"):
        function(spectrum_of(lognormal(9)))
    for method in ("hill", "peak"):
        with pytest.raises(ValueError, match=f"method is '{method}' and the spectrum is partial"):
            function(spectrum_of(lognormal(20), is_partial=True), method)


def test_ten_eigenvalues_are_enough():
    assert all(fit_tail(spectrum_of(lognormal(10)), method).reliable for method in ("hill", "ks", "adaptive"))


@pytest.mark.parametrize("method", ["ks", "adaptive"])
def test_scans_fit_partial_spectra(method):
    # A heavy tail whose largest 60 eigenvalues are enough.
    weight = torch.diag(torch.from_numpy(np.sort(pareto(3.0, 200)) ** 0.5))
    partial = compute_partial_spectrum(weight, 60)
    whole = spectrum_of(compute_spectrum(weight).eigenvalues[-60:])
    assert fit_tail(partial, method).alpha == pytest.approx(fit_tail(whole, method).alpha, rel=0.02)
