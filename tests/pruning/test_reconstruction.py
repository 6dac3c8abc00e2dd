"""The rebuilt layer against least squares, on data whose answer is known."""

import numpy as np
import pytest
import torch

from hf_opentrans.pruning import reconstruction
from hf_opentrans.pruning.reconstruction import RIDGES, delta_ridge
from hf_opentrans.pruning.statistics import CovarianceStatistics

INPUTS, OUTPUTS = 8, 4
KEPT = torch.tensor([0, 1, 3, 4, 6])
GONE = [2, 5, 7]


def statistics_of(rows):
    statistics = CovarianceStatistics(rows.shape[1])
    statistics.update(rows)
    return statistics


def make_layer(seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(OUTPUTS, OUTPUTS, generator=generator)
    weight, bias = torch.randn(OUTPUTS, INPUTS, generator=generator), torch.randn(OUTPUTS, generator=generator)
    return weight, bias, (root @ root.T).double()


def make_rows(count, seed=0, noise=0.3, mean=1.5):
    """Return rows whose removed inputs are linear in the kept ones, but for noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(len(KEPT), len(GONE), generator=torch.Generator().manual_seed(99))
    rows = torch.randn(count, INPUTS, generator=generator)
    rows[:, GONE] = rows[:, KEPT] @ mixing + noise * rows[:, GONE]
    return rows + mean


def rebuild(fit, held_out, seed=0, kept=KEPT):
    weight, bias, metric = make_layer(seed)
    return delta_ridge(weight, bias, kept, statistics_of(fit), statistics_of(held_out), metric)


def outputs(rebuilt, rows, kept=KEPT):
    return rows[:, kept].double() @ rebuilt.weight.T + rebuilt.bias


def dense_outputs(rows):
    weight, bias, _ = make_layer()
    return rows.double() @ weight.double().T + bias.double()


def numpy_error(fit, held_out, ridge):
    """Return the held-out error of one ridge from the definition: fit on centred rows, then look at real outputs."""
    weight, _, metric = (x.double().numpy() for x in make_layer())
    fit, held_out, kept = fit.double().numpy(), held_out.double().numpy(), KEPT.numpy()
    centred, shifted = fit - fit.mean(0), held_out - fit.mean(0)
    map_ = np.zeros((len(GONE), len(kept)))
    if ridge is not None:
        inner = centred[:, kept].T @ centred[:, kept] / len(fit)
        cross = centred[:, GONE].T @ centred[:, kept] / len(fit)
        map_ = cross @ np.linalg.inv(inner + ridge * np.diag(inner).mean() * np.eye(len(kept)))
    difference = (shifted[:, GONE] - shifted[:, kept] @ map_.T) @ weight[:, GONE].T
    return float(np.einsum("ni,ij,nj->n", difference, metric, difference).mean())


def test_inputs_that_are_linear_in_the_others_are_replaced_exactly():
    fit, held_out = make_rows(200, noise=0.0), make_rows(50, seed=1, noise=0.0)
    rebuilt = rebuild(fit, held_out)
    torch.testing.assert_close(outputs(rebuilt, held_out), dense_outputs(held_out), rtol=0, atol=1e-4)
    assert rebuilt.error < 1e-6 * rebuilt.error_uncompensated  # products of float32 rows


def test_without_a_ridge_it_is_least_squares_with_an_intercept(monkeypatch):
    monkeypatch.setattr(reconstruction, "RIDGES", (0.0,))
    fit, held_out = make_rows(200), make_rows(50, seed=1)
    rebuilt = rebuild(fit, held_out)
    assert rebuilt.ridge == 0.0
    rows = torch.cat([fit, held_out]).double()
    design = np.hstack([rows[:, KEPT].numpy(), np.ones((len(rows), 1))])
    expected, *_ = np.linalg.lstsq(design, dense_outputs(rows).numpy(), rcond=None)
    np.testing.assert_allclose(rebuilt.weight.numpy(), expected[:-1].T, atol=1e-5)
    np.testing.assert_allclose(rebuilt.bias.numpy(), expected[-1], atol=1e-5)


@pytest.mark.parametrize(("count", "noise"), [(7, 2.0), (12, 1.0), (400, 0.1)])
@pytest.mark.parametrize("seed", range(3))
def test_ridge_is_the_best_of_the_grid_on_held_out_rows(count, noise, seed):
    fit, held_out = make_rows(count, seed=2 * seed, noise=noise), make_rows(60, seed=2 * seed + 1, noise=noise)
    rebuilt = rebuild(fit, held_out)
    errors = {ridge: numpy_error(fit, held_out, ridge) for ridge in (None, *RIDGES)}
    assert rebuilt.error == pytest.approx(min(errors.values()), rel=1e-3)
    assert errors[rebuilt.ridge] == pytest.approx(min(errors.values()), rel=1e-3)
    assert rebuilt.error <= errors[None] * (1 + 1e-4)


def test_fit_rows_that_mislead_leave_the_mean_shift_alone():
    fit, held_out = make_rows(200), make_rows(60, seed=1)
    held_out[:, GONE] = 3.0 - held_out[:, GONE]  # same mean, opposite relation to the kept inputs
    rebuilt = rebuild(fit, held_out)
    weight, bias, _ = make_layer()
    assert rebuilt.ridge is None
    torch.testing.assert_close(rebuilt.weight, weight[:, KEPT].double())
    mean = torch.cat([fit, held_out]).double().mean(0)[GONE]
    torch.testing.assert_close(rebuilt.bias, bias.double() + weight[:, GONE].double() @ mean, rtol=1e-5, atol=1e-5)


def test_uncorrelated_inputs_move_the_bias_alone():
    signs = torch.tensor([[1.0]])
    for _ in range(4):  # columns of a Hadamard matrix have a covariance of exactly zero
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    rows = signs[:, 1 : INPUTS + 1] + 2.0
    rebuilt = rebuild(rows, rows)
    weight, bias, _ = make_layer()
    torch.testing.assert_close(rebuilt.weight, weight[:, KEPT].double())
    torch.testing.assert_close(rebuilt.bias, bias.double() + 2.0 * weight[:, GONE].double().sum(1))


@pytest.mark.parametrize("noise", [0.0, 0.5, 5.0])
def test_rebuilt_bias_removes_the_mean_error(noise):
    fit, held_out = make_rows(100, noise=noise), make_rows(30, seed=1, noise=noise)
    rows = torch.cat([fit, held_out])
    difference = outputs(rebuild(fit, held_out), rows) - dense_outputs(rows)
    torch.testing.assert_close(difference.mean(0), torch.zeros(OUTPUTS, dtype=torch.float64), rtol=0, atol=1e-5)


def test_fewer_rows_than_inputs_work_through_a_ridge():
    fit, held_out = make_rows(4, noise=0.1), make_rows(40, seed=1, noise=0.1)
    rebuilt = rebuild(fit, held_out)
    assert torch.isfinite(rebuilt.weight).all()
    assert rebuilt.error <= numpy_error(fit, held_out, None) * (1 + 1e-4)


def test_twin_and_constant_inputs_work():
    fit, held_out = make_rows(100), make_rows(30, seed=1)
    for rows in (fit, held_out):
        rows[:, 1], rows[:, 3] = rows[:, 0], 7.0
        rows[:, GONE] = rows[:, KEPT] @ torch.arange(-7.0, 8.0).view(5, 3) + 0.01 * rows[:, GONE]
    rebuilt = rebuild(fit, held_out)
    assert rebuilt.ridge not in (None, 0.0)
    assert rebuilt.weight.abs().max() < 100
    assert rebuilt.error < 1e-3 * rebuilt.error_uncompensated


def test_a_ridge_that_only_the_fit_rows_allow_is_passed_over(monkeypatch):
    calls = []
    original = reconstruction._moved

    def fails_once_on_all_rows(plain, covariance, kept, gone, ridge):
        calls.append(ridge)
        is_final = len(calls) == 2 + len(RIDGES)
        return None if is_final else original(plain, covariance, kept, gone, ridge)

    monkeypatch.setattr(reconstruction, "_moved", fails_once_on_all_rows)
    rebuilt = rebuild(make_rows(200, noise=0.1), make_rows(60, seed=1, noise=0.1))
    assert rebuilt.ridge == calls[-1] != calls[-2]
    assert torch.isfinite(rebuilt.weight).all()


def test_nothing_kept_leaves_the_mean_output():
    fit, held_out = make_rows(100), make_rows(30, seed=1)
    rebuilt = rebuild(fit, held_out, kept=torch.tensor([], dtype=torch.long))
    assert rebuilt.weight.shape == (OUTPUTS, 0)
    expected = dense_outputs(torch.cat([fit, held_out])).mean(0)
    torch.testing.assert_close(rebuilt.bias, expected, rtol=1e-5, atol=1e-5)


def test_uncompensated_error_is_the_mean_square_of_what_is_dropped():
    fit, held_out = make_rows(100), make_rows(30, seed=1)
    weight, _, metric = make_layer()
    dropped = held_out[:, GONE].double() @ weight[:, GONE].double().T
    expected = torch.einsum("ni,ij,nj->n", dropped, metric, dropped).mean()
    assert rebuild(fit, held_out).error_uncompensated == pytest.approx(float(expected), rel=1e-5)
