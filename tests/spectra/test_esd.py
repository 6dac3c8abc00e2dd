"""Eigenvalues against numpy's SVD, metrics by hand, and what noise looks like."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq

from hf_opentrans.spectra import (
    Spectrum,
    compute_partial_spectrum,
    compute_spectrum,
    compute_windowed_spectrum,
    fit_tail,
    spectral_metrics,
)
from hf_opentrans.spectra.esd import as_matrices, marchenko_pastur_median


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(rows, columns, seed=0):
    """Return a matrix with the singular values 1, 1/2, 1/3, ..."""
    left, right = (
        torch.linalg.qr(gaussian(side, side, seed=seed + place)).Q for place, side in enumerate((rows, columns))
    )
    count = min(rows, columns)
    return left[:, :count] / torch.arange(1, count + 1) @ right[:, :count].T


def squared_singular_values(*matrices):
    return np.sort(np.concatenate([np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2 for matrix in matrices]))


def assert_same(spectrum, expected, rtol=1e-9):
    np.testing.assert_allclose(spectrum.eigenvalues.numpy(), expected, rtol=rtol)
    assert spectrum.eigenvalues.dtype == torch.float64
    assert bool((spectrum.eigenvalues.diff() >= 0).all())
    assert spectrum.trace == pytest.approx(expected.sum())
    assert len(spectrum) == len(expected)


@pytest.mark.parametrize("shape", [(12, 12), (20, 7), (7, 20), (1, 5)])
def test_linear_layers_equal_numpy(shape):
    weight = gaussian(*shape)
    spectrum = compute_spectrum(weight)
    assert_same(spectrum, squared_singular_values(weight))
    assert (spectrum.rows, spectrum.columns, spectrum.matrices) == (max(shape), min(shape), 1)
    assert not spectrum.is_partial


@pytest.mark.parametrize("shape", [(6, 4, 3, 2), (4, 6, 3, 2), (8, 5, 1, 1), (6, 4, 3), (6, 4, 2, 2, 2)])
def test_convolutions_are_pooled_over_kernel_positions(shape):
    weight = gaussian(*shape)
    spectrum = compute_spectrum(weight)
    slices = [weight[(..., *place)] for place in np.ndindex(*shape[2:])]
    assert_same(spectrum, squared_singular_values(*slices))
    assert (spectrum.rows, spectrum.columns) == (max(shape[:2]), min(shape[:2]))
    assert spectrum.matrices == math.prod(shape[2:])


def test_fused_projections_are_cut_into_parts():
    weight = gaussian(30, 10)
    spectrum = compute_spectrum(weight, parts=3)
    assert_same(spectrum, squared_singular_values(weight[:10], weight[10:20], weight[20:]))
    assert (spectrum.rows, spectrum.columns, spectrum.matrices) == (10, 10, 3)
    assert len(compute_spectrum(weight)) == 10


def test_parts_of_a_convolution_are_cut_along_its_outputs():
    weight = gaussian(6, 4, 2, 1)
    found = as_matrices(weight, parts=2)
    assert found.shape == (4, 4, 3)
    expected = [weight[top : top + 3, :, place, 0].T for top in (0, 3) for place in (0, 1)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=0)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 12), columns=st.integers(2, 12), seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_order_and_transposition_do_not_matter_and_scale_is_squared(rows, columns, seed, scale):
    weight, order = gaussian(rows, columns, seed=seed), torch.Generator().manual_seed(seed)
    shuffled = weight[torch.randperm(rows, generator=order)][:, torch.randperm(columns, generator=order)]
    expected = compute_spectrum(weight).eigenvalues
    # The smallest may be 1e-9 of the largest, which is what the rounding of the Gram matrix is relative to.
    slack = 1e-13 * float(expected[-1])
    for other in (shuffled, weight.T, -weight):
        torch.testing.assert_close(compute_spectrum(other).eigenvalues, expected, rtol=1e-9, atol=slack)
    scaled = compute_spectrum(scale * weight).eigenvalues / scale**2
    torch.testing.assert_close(scaled, expected, rtol=1e-9, atol=slack)


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(32, 32, 5), (64, 48, 3), (128, 256, 20), (300, 300, 1)])
def test_noise_eigenvalues_of_low_rank_weights_are_left_out(precision, rows, columns, rank):
    weight = (gaussian(rows, rank) @ gaussian(rank, columns, seed=1)).to(precision)
    spectrum = compute_spectrum(weight, precision=precision)
    assert len(spectrum) == rank
    expected = squared_singular_values(weight.double())[-rank:]
    rtol = 1e-9 if precision == torch.float64 else 1e-3
    np.testing.assert_allclose(spectrum.eigenvalues.numpy(), expected, rtol=rtol)


def test_single_precision_is_close_and_returned_as_double():
    weight = gaussian(64, 48)
    expected = squared_singular_values(weight)
    spectrum = compute_spectrum(weight, precision=torch.float32)
    assert_same(spectrum, spectrum.eigenvalues.numpy())
    np.testing.assert_allclose(spectrum.eigenvalues.numpy(), expected, atol=1e-5 * expected[-1])
    assert not np.array_equal(spectrum.eigenvalues.numpy(), compute_spectrum(weight).eigenvalues.numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_precision_of_the_weight_is_analysed_in_double(dtype):
    weight = torch.nn.Parameter(gaussian(12, 9).to(dtype))
    spectrum = compute_spectrum(weight)
    assert_same(spectrum, squared_singular_values(weight.detach().double()))
    assert not spectrum.eigenvalues.requires_grad


def test_compat_halves_convolutions_and_not_linear_layers():
    conv, linear = gaussian(6, 4, 3, 3), gaussian(6, 4)
    assert_same(compute_spectrum(conv, compat=True), compute_spectrum(conv).eigenvalues.numpy() / 2)
    assert_same(compute_spectrum(linear, compat=True), squared_singular_values(linear))


def test_compat_keeps_what_is_larger_than_1e_5():
    weight = torch.diag(torch.tensor([1e-6, 1.1e-5, 0.9e-5, 1.0, 1e-11], dtype=torch.float64).sqrt())
    assert_same(compute_spectrum(weight, compat=True), np.array([1.1e-5, 1.0]))
    assert_same(compute_spectrum(weight), np.array([1e-11, 1e-6, 0.9e-5, 1.1e-5, 1.0]))
    # The halving comes first: 1.1e-5 / 2 is too small.
    assert_same(compute_spectrum(weight[..., None, None], compat=True), np.array([0.5]))
    # Where nothing is larger, all are kept.
    assert_same(compute_spectrum(1e-3 * weight, compat=True), np.array([1e-17, 1e-12, 0.9e-11, 1.1e-11, 1e-6]))


def test_metrics_by_hand():
    # W = diag(3, 2, 1): eigenvalues 1, 4, 9, their sum 14.
    metrics = spectral_metrics(compute_spectrum(torch.diag(torch.tensor([3.0, 2.0, 1.0]))))
    entropy = -sum(share * math.log(share) for share in (1 / 14, 4 / 14, 9 / 14))
    assert metrics.spectral_norm == pytest.approx(3)
    assert metrics.log_norm == pytest.approx(math.log10(14))
    assert metrics.log_spectral_norm == pytest.approx(math.log10(9))
    assert metrics.stable_rank == pytest.approx(14 / 9)
    assert metrics.effective_rank == pytest.approx(math.exp(entropy))
    assert metrics.entropy == pytest.approx(entropy / math.log(3))
    # Noise of variance s^2 and side 3 has the median 3 * 0.65278 s^2, which is 4, and its largest eigenvalue lies
    # around (2 sqrt 3)^2 s^2 with a width of 2 sqrt 3 (2 / sqrt 3)^(1/3) s^2, of which 2.0234 are added.
    edge = 4 / (3 * 0.65278) * (12 + 2.0234 * 2 * math.sqrt(3) * (2 / math.sqrt(3)) ** (1 / 3))
    assert metrics.mp_edge == pytest.approx(edge, rel=1e-3)
    assert (metrics.mp_soft_rank, metrics.num_spikes) == (1.0, 0)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_metrics_of_equal_eigenvalues_are_at_their_largest(size):
    metrics = spectral_metrics(compute_spectrum(3 * torch.eye(size)))
    assert metrics.stable_rank == pytest.approx(size)
    assert metrics.effective_rank == pytest.approx(size)
    assert metrics.entropy == pytest.approx(1 if size > 1 else 0)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_marchenko_pastur_median_equals_numerical_integration(ratio):
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2

    def density(root):  # of x = root^2, which removes the singularity of square matrices at 0
        x = root**2
        return 2 * root * math.sqrt(max(0.0, (high - x) * (x - low))) / (2 * math.pi * ratio * x) if x else 0.0

    def share_below(x):
        return quad(density, math.sqrt(low), math.sqrt(x), limit=200)[0]

    assert share_below(high) == pytest.approx(1, abs=1e-6)
    median = brentq(lambda x: share_below(x) - 0.5, low + 1e-9, high)
    assert marchenko_pastur_median(ratio) == pytest.approx(median, rel=5e-4)


@pytest.mark.parametrize("shape", [(128, 128), (256, 64), (64, 512)])
def test_nothing_stands_out_of_noise(shape):
    # By definition of the edge about 1 % of all noise matrices have a spike; measured: 0.3 to 1.7 % of 300.
    found = [spectral_metrics(compute_spectrum(gaussian(*shape, seed=seed))) for seed in range(40)]
    assert sum(metrics.num_spikes or 0 for metrics in found) <= 2
    assert sum(metrics.mp_soft_rank == 1 for metrics in found) >= 38
    # and the edge is no looser than that (measured: 1.10, 1.09 and 1.07 times the largest eigenvalue).
    ratio = np.mean([(metrics.mp_edge or 0) / 10**metrics.log_spectral_norm for metrics in found])
    assert 1.04 < ratio < 1.12


@pytest.mark.parametrize("planted", [1, 3, 10])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_planted_spikes_are_counted(planted, scale):
    rows, columns = 256, 128
    left, right = torch.linalg.qr(gaussian(rows, planted, seed=1)).Q, torch.linalg.qr(gaussian(columns, planted)).Q
    strength = 2 * (math.sqrt(rows) + math.sqrt(columns))  # twice the largest singular value of the noise
    weight = scale * (gaussian(rows, columns, seed=2) + strength * left @ right.T)
    metrics = spectral_metrics(compute_spectrum(weight))
    assert metrics.num_spikes == planted
    assert metrics.mp_soft_rank == pytest.approx((metrics.mp_edge or 0) / 10**metrics.log_spectral_norm)
    assert 0.1 < (metrics.mp_soft_rank or 0) < 0.5


def test_a_square_is_one_window():
    weight = gaussian(24, 24)
    windowed = compute_windowed_spectrum(weight)
    assert_same(windowed, squared_singular_values(weight))
    assert (windowed.rows, windowed.columns, windowed.matrices) == (24, 24, 1)


@pytest.mark.parametrize("transposed", [False, True])
def test_an_elongated_matrix_is_cut_into_squares(transposed):
    weight = gaussian(32, 8)
    windowed = compute_windowed_spectrum(weight.T if transposed else weight)
    assert_same(windowed, squared_singular_values(*weight.split(8)))
    assert (windowed.rows, windowed.columns, windowed.matrices) == (8, 8, 4)


@pytest.mark.parametrize(
    ("shape", "options", "window", "tops", "lefts"),
    [
        ((40, 16), {}, (16, 16), [0, 12, 24], [0]),  # ceil(40 / 16) windows, as little overlap as they allow
        ((160, 16), {"windows": 4}, (16, 16), [0, 48, 96, 144], [0]),
        ((160, 16), {"windows": 1}, (16, 16), [0], [0]),
        ((64, 16), {"aspect_ratio": 2.0}, (32, 16), [0, 32], [0]),
        ((16, 16), {"aspect_ratio": 2.0}, (16, 8), [0], [0, 8]),
        ((24, 16), {"aspect_ratio": 8.0}, (24, 3), [0], [0, 3, 5, 8, 10, 13]),
        ((16, 16), {"largest": 8}, (8, 8), [0, 8], [0, 8]),
    ],
)
def test_windows_have_one_aspect_ratio_and_cover_the_matrix(shape, options, window, tops, lefts):
    weight = gaussian(*shape)
    windowed = compute_windowed_spectrum(weight, **options)
    cut = [weight[top : top + window[0], left : left + window[1]] for top in tops for left in lefts]
    assert {tuple(part.shape) for part in cut} == {window}
    assert tops[-1] + window[0] == shape[0] or options.get("windows") == 1
    assert lefts[-1] + window[1] == shape[1]
    assert_same(windowed, squared_singular_values(*cut))
    assert (windowed.rows, windowed.columns, windowed.matrices) == (*window, len(cut))


def test_windows_of_convolutions_and_of_fused_projections():
    conv, fused = gaussian(16, 8, 1, 2), gaussian(48, 8)
    slices = [conv[top : top + 8, :, 0, place] for top in (0, 8) for place in (0, 1)]
    assert_same(compute_windowed_spectrum(conv), squared_singular_values(*slices))
    assert compute_windowed_spectrum(fused, parts=3).matrices == 6


def test_windows_remove_the_bias_of_the_aspect_ratio():
    # Measured over 30 matrices: debiased 2.111, 2.107, 2.114 (standard deviations 0.01 to 0.02); raw 2.1, 2.7, 3.4.
    shapes = [(128, 128), (128, 256), (512, 128)]
    raw, debiased = [], []
    for shape in shapes:
        weights = [gaussian(*shape, seed=seed) for seed in range(4)]
        raw.append(np.mean([fit_tail(compute_spectrum(weight)).alpha for weight in weights]))
        debiased.append(np.mean([fit_tail(compute_windowed_spectrum(weight)).alpha for weight in weights]))
    assert np.ptp(debiased) < 0.05
    assert raw[0] + 0.4 < raw[1] < raw[2] - 0.5
    assert debiased[0] == raw[0]


@pytest.mark.parametrize("shape", [(80, 60), (60, 80)])
def test_partial_spectra_hold_the_largest_eigenvalues(shape):
    weight = decaying(*shape)
    whole, partial = compute_spectrum(weight), compute_partial_spectrum(weight, 12)
    assert partial.is_partial
    assert (partial.rows, partial.columns, partial.matrices) == (80, 60, 1)
    assert len(partial) == 12
    assert partial.trace == pytest.approx(whole.trace)
    torch.testing.assert_close(partial.eigenvalues[-6:], whole.eigenvalues[-6:], rtol=1e-6, atol=0)
    torch.testing.assert_close(partial.eigenvalues, whole.eigenvalues[-12:], rtol=1e-2, atol=0)
    assert bool((partial.eigenvalues <= whole.eigenvalues[-12:] * (1 + 1e-12)).all())
    rough = compute_partial_spectrum(weight, 12, passes=0)
    assert rough.eigenvalues.sum() < partial.eigenvalues.sum()


def test_partial_spectra_are_repeatable_and_pool_matrices():
    weight = gaussian(40, 30, 2)
    first, again = compute_partial_spectrum(weight, 5), compute_partial_spectrum(weight, 5)
    assert torch.equal(first.eigenvalues, again.eigenvalues)
    assert not torch.equal(first.eigenvalues, compute_partial_spectrum(weight, 5, seed=1).eigenvalues)
    assert (len(first), first.matrices) == (10, 2)
    assert first.trace == pytest.approx(float(weight.square().sum()))
    assert compute_partial_spectrum(gaussian(60, 20), 4, parts=3).matrices == 3


def test_partial_metrics_are_those_that_need_no_other_eigenvalue():
    weight = decaying(50, 40)
    whole, partial = (spectral_metrics(s) for s in (compute_spectrum(weight), compute_partial_spectrum(weight, 9)))
    for name in ("spectral_norm", "log_norm", "log_spectral_norm", "stable_rank"):
        assert getattr(partial, name) == pytest.approx(getattr(whole, name), rel=1e-6)
    for name in ("effective_rank", "entropy", "mp_edge", "mp_soft_rank", "num_spikes"):
        assert getattr(partial, name) is None
        assert getattr(whole, name) is not None


ANY_SPECTRUM = [
    compute_spectrum,
    compute_windowed_spectrum,
    lambda weight, **options: compute_partial_spectrum(weight, 2, **options),
]


@pytest.mark.parametrize("compute", ANY_SPECTRUM)
@pytest.mark.parametrize(
    ("weight", "parts", "message"),
    [
        (torch.ones(5), 1, r"has the shape \(5,\)\. A spectrum needs a matrix, or a convolution"),
        (torch.ones(0, 5), 1, r"has the shape \(0, 5\)"),
        (torch.ones(4, 4), 3, "parts is 3. It must divide the 4 outputs of the weight"),
        (torch.full((4, 4), float("nan")), 1, "not finite. A spectrum needs finite numbers"),
        (torch.eye(4) * float("inf"), 1, "not finite"),
        (torch.zeros(4, 4), 1, "zero everywhere. It has no spectrum"),
    ],
)
def test_weights_without_a_spectrum_are_refused(compute, weight, parts, message):
    with pytest.raises(ValueError, match=message):
        compute(weight, parts=parts)


@pytest.mark.parametrize("options", [{"aspect_ratio": 0.5}, {"windows": 0}, {"largest": 1}])
def test_windows_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"They must be at least 1, 1 and 2\. Correct them"):
        compute_windowed_spectrum(gaussian(8, 8), **options)


@pytest.mark.parametrize("count", [0, -1, 6, 7])
def test_partial_counts_out_of_range_are_refused(count):
    with pytest.raises(ValueError, match=rf"count is {count}\. It must lie in \[1, 5\], below the smaller side"):
        compute_partial_spectrum(gaussian(9, 6), count)
    assert len(compute_partial_spectrum(gaussian(9, 6), 5)) == 5


def test_zero_slices_of_a_convolution_have_no_eigenvalues():
    weight = gaussian(6, 4, 2)
    weight[..., 1] = 0
    found = compute_spectrum(weight)
    assert_same(found, squared_singular_values(weight[..., 0]))
    assert found.matrices == 2
    assert isinstance(found, Spectrum)
