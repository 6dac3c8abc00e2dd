"""The refitted layer against least squares of numpy, on data whose answer is known."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_opentrans.pruning import reconstruction
from hf_opentrans.pruning.reconstruction import RIDGES, oas_ridge, regress, regress_without_bias
from hf_opentrans.pruning.statistics import CovarianceStatistics

INPUTS, OUTPUTS = 6, 4
seeds = st.integers(0, 10**6)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def make_layer(seed=0):
    """Return the incoming weight and bias, and an output metric."""
    source = generator(seed)
    root = torch.randn(OUTPUTS, OUTPUTS, generator=source)
    weight, bias = torch.randn(OUTPUTS, INPUTS, generator=source), torch.randn(OUTPUTS, generator=source)
    return weight, bias, (root @ root.T).double()


def make_rows(count, seed=0, noise=0.3, mean=1.5, truth=99):
    """Return inputs and a target that is affine in them, but for noise."""
    source, fixed = generator(seed), generator(truth)
    mixing, weight = torch.randn(INPUTS, INPUTS, generator=fixed), torch.randn(INPUTS, OUTPUTS, generator=fixed)
    inputs = torch.randn(count, INPUTS, generator=source) @ mixing + mean
    return inputs, inputs @ weight + 0.7 + noise * torch.randn(count, OUTPUTS, generator=source)


def statistics_of(*parts):
    rows = torch.cat(parts, 1)
    statistics = CovarianceStatistics(rows.shape[1])
    for batch in rows.split(64):
        statistics.update(batch)
    return statistics


def run(fit, held_out, layer=None, **options):
    weight, bias, metric = layer or make_layer()
    return regress(weight, bias, statistics_of(*fit), statistics_of(*held_out), metric, **options)


def joined(fit, held_out):
    return torch.cat([fit[0], held_out[0]]), torch.cat([fit[1], held_out[1]])


def ridge_solution(inputs, target, weight, ridge):
    """Return the weight and bias that shrink towards `weight`: least squares with extra rows."""
    inputs, target, weight = (x.double().numpy() for x in (inputs, target, weight))
    residual = target - inputs @ weight.T
    change = np.zeros_like(weight)
    if ridge is not None:
        centred = inputs - inputs.mean(0)
        extra = np.sqrt(ridge * np.square(centred).sum() / inputs.shape[1]) * np.eye(inputs.shape[1])
        left = np.vstack([centred, extra])
        right = np.vstack([residual - residual.mean(0), np.zeros((len(extra), residual.shape[1]))])
        change = np.linalg.lstsq(left, right, rcond=None)[0].T
    return weight + change, residual.mean(0) - change @ inputs.mean(0)


def mean_error(inputs, target, weight, bias, metric):
    inputs, target, weight, bias, metric = (np.asarray(x, dtype=float) for x in (inputs, target, weight, bias, metric))
    difference = target - inputs @ weight.T - bias
    return float(np.einsum("ni,ij,nj->n", difference, metric, difference).mean())


def test_without_a_ridge_it_is_least_squares_with_an_intercept():
    fit, held_out = make_rows(200), make_rows(50, seed=1)
    found = run(fit, held_out, ridges=(0.0,))
    inputs, target = (x.double().numpy() for x in joined(fit, held_out))
    expected, *_ = np.linalg.lstsq(np.hstack([inputs, np.ones((250, 1))]), target, rcond=None)
    assert (found.ridge, found.is_kept, found.is_singular) == (0.0, False, False)
    np.testing.assert_allclose(found.weight.numpy(), expected[:-1].T, atol=1e-4)
    np.testing.assert_allclose(found.bias.numpy(), expected[-1], atol=1e-4)


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0, 30.0])
def test_a_ridge_shrinks_the_change_and_not_the_weights(ridge):
    fit, held_out = make_rows(200), make_rows(50, seed=1)
    found = run(fit, held_out, ridges=(ridge,))
    weight, bias = ridge_solution(*joined(fit, held_out), make_layer()[0], ridge)
    assert found.ridge == ridge
    np.testing.assert_allclose(found.weight.numpy(), weight, atol=1e-4)
    np.testing.assert_allclose(found.bias.numpy(), bias, atol=1e-4)


def test_a_huge_ridge_keeps_the_weights_and_centres_the_bias():
    fit, held_out = make_rows(200), make_rows(50, seed=1)
    found, shifted = run(fit, held_out, ridges=(1e9,)), run(fit, held_out, ridges=())
    weight, _, _ = make_layer()
    torch.testing.assert_close(found.weight, weight.double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.bias, shifted.bias, rtol=0, atol=1e-6)


def test_without_ridges_only_the_bias_moves():
    fit, held_out = make_rows(200), make_rows(50, seed=1)
    found = run(fit, held_out, ridges=())
    weight, bias, metric = make_layer()
    inputs, target = joined(fit, held_out)
    assert torch.equal(found.weight, weight.double())
    expected = (target.double() - inputs.double() @ weight.double().T).mean(0)
    torch.testing.assert_close(found.bias, expected, rtol=1e-5, atol=1e-4)
    assert (found.ridge, found.is_kept, found.is_singular) == (None, False, False)
    assert found.error_before == pytest.approx(mean_error(*held_out, weight, bias, metric), rel=1e-5)
    shift = (fit[1].double() - fit[0].double() @ weight.double().T).mean(0)
    assert found.error == pytest.approx(mean_error(*held_out, weight, shift, metric), rel=1e-5)


@pytest.mark.parametrize(("count", "noise"), [(7, 2.0), (12, 3.0), (400, 0.1)])
@pytest.mark.parametrize("seed", range(3))
def test_ridge_is_the_best_of_the_grid_on_held_out_rows(count, noise, seed):
    fit = make_rows(count, seed=2 * seed, noise=noise)
    held_out = make_rows(60, seed=2 * seed + 1, noise=noise)
    weight, bias, metric = layer = make_layer(seed)
    errors = {ridge: mean_error(*held_out, *ridge_solution(*fit, weight, ridge), metric) for ridge in (None, *RIDGES)}
    found = run(fit, held_out, layer)
    assert found.error == pytest.approx(min(errors.values()), rel=5e-3)
    assert errors[found.ridge] == pytest.approx(min(errors.values()), rel=5e-3)
    assert found.error_before == pytest.approx(mean_error(*held_out, weight, bias, metric), rel=1e-4)


def test_the_metric_chooses_but_does_not_enter_the_solution():
    fit, held_out = make_rows(60), make_rows(50, seed=1)
    weight, bias, metric = make_layer()
    first, second = (run(fit, held_out, (weight, bias, m), ridges=(0.1,)) for m in (metric, torch.eye(OUTPUTS)))
    torch.testing.assert_close(first.weight, second.weight)
    assert first.error != pytest.approx(second.error, rel=0.05)


@settings(max_examples=30, deadline=None)
@given(
    seed=seeds,
    count=st.integers(3, 60),
    held=st.integers(2, 40),
    noise=st.sampled_from([0.0, 1.0, 10.0]),
    quality=st.sampled_from([0.0, 0.5, 1.0]),
)
@example(seed=6, count=3, held=6, noise=1.0, quality=1.0)  # held-out rows that nearly depend on each other
def test_held_out_error_never_rises(seed, count, held, noise, quality):
    fit, held_out = make_rows(count, seed, noise, truth=seed), make_rows(held, seed + 1, noise, truth=seed)
    weight, bias, metric = make_layer(seed)
    good = torch.linalg.lstsq(held_out[0], held_out[1]).solution.T  # weights that come in may already be good
    weight, bias = quality * good + (1 - quality) * weight, (1 - quality) * bias
    before = mean_error(*held_out, weight, bias, metric)
    # Products of rows are formed in fp32 and multiplied by the weights: large ones where rows nearly depend on others.
    largest = max(float(part.abs().max()) for part in (*fit, *held_out)) * max(1.0, float(weight.abs().max()))
    slack = 1e-3 * before + 1e-5 * float(metric.trace()) * largest**2
    found = run(fit, held_out, (weight, bias, metric))
    assert found.error_before == pytest.approx(before, abs=slack)
    assert found.error <= found.error_before
    assert found.is_kept == (found.error == found.error_before)
    if count < 4 * INPUTS:
        return
    # Plain least squares of all rows is at least as good on the held-out ones as that of the others.
    found = run(fit, held_out, (weight, bias, metric), ridges=(0.0,))
    assert mean_error(*held_out, found.weight, found.bias, metric) <= found.error + slack


def test_a_layer_stays_where_every_change_hurts():
    fit, held_out = make_rows(200), make_rows(50, seed=1)
    weight, bias, metric = make_layer()
    target = held_out[0] @ weight.T + bias  # what the layer does already
    found = run(fit, (held_out[0], target), (weight, bias, metric))
    assert found.is_kept
    assert not found.is_singular
    assert torch.equal(found.weight, weight.double())
    assert torch.equal(found.bias, bias.double())
    assert found.error == found.error_before == pytest.approx(0.0, abs=1e-3)


def test_constant_inputs_move_the_bias_alone():
    weight, bias, metric = make_layer()
    for value in (0.0, 7.0, 0.1, 1 / 3):
        fit, held_out = make_rows(200), make_rows(50, seed=1)
        fit[0][:], held_out[0][:] = value, value
        found = run(fit, held_out, (weight, bias, metric))
        assert (found.is_singular, found.is_kept, found.ridge) == (True, False, None)
        assert torch.equal(found.weight, weight.double())
        mean = torch.cat([fit[1], held_out[1]]).double().mean(0)
        torch.testing.assert_close(found.bias + value * found.weight.sum(1), mean, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 123.4])
def test_constant_and_twin_columns_give_weights_of_ordinary_size(value):
    fit, held_out = make_rows(200), make_rows(50, seed=1)
    for inputs, _ in (fit, held_out):
        inputs[:, 3], inputs[:, 1] = value, inputs[:, 0]
    weight, _, metric = make_layer()
    found = run(fit, held_out)
    assert bool(torch.isfinite(found.weight).all())
    assert float(found.weight.abs().max()) < 100
    others = [0, 2, 4, 5]
    best = ridge_solution(fit[0][:, others], fit[1], weight[:, others], 0.0)
    assert found.error < 1.1 * mean_error(held_out[0][:, others], held_out[1], *best, metric)
    outputs = held_out[0] @ found.weight.float().T + found.bias.float()  # as the model computes it
    difference = (held_out[1] - outputs).double()
    actual = float(torch.einsum("ni,ij,nj->n", difference, metric, difference).mean())
    assert actual == pytest.approx(found.error, rel=0.1)


def test_no_inputs_at_all_leave_the_mean_of_the_target():
    fit, held_out = make_rows(100), make_rows(30, seed=1)
    _, bias, metric = make_layer()
    nothing = torch.zeros(OUTPUTS, 0)
    found = run((fit[0][:, :0], fit[1]), (held_out[0][:, :0], held_out[1]), (nothing, bias, metric))
    assert found.weight.shape == (OUTPUTS, 0)
    assert not found.is_singular
    torch.testing.assert_close(found.bias, torch.cat([fit[1], held_out[1]]).double().mean(0), rtol=1e-5, atol=1e-4)


def make_gap(inputs, seed, scale):
    mixing = torch.randn(INPUTS, OUTPUTS, generator=generator(5))
    return scale * (inputs @ mixing + 2.0 + 0.1 * torch.randn(len(inputs), OUTPUTS, generator=generator(seed)))


@pytest.mark.parametrize(("share", "factor"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_gap_factor_aims_at_the_target_without_a_share_of_the_gap(share, factor):
    fit, held_out = make_rows(300, noise=0.01), make_rows(100, seed=1, noise=0.01)
    # Of the gap that the fit rows show, the held-out rows carry `share`.
    gap, held_gap = make_gap(fit[0], 3, 1.0), make_gap(held_out[0], 4, 1.0)
    seen = (fit[0], fit[1] + gap, gap)
    unseen = (held_out[0], held_out[1] + share * held_gap, held_gap)
    found = run(seen, unseen, ridges=(0.0,), gap_factors=(1.0, 0.5, 0.0))
    assert (found.gap_factor, found.ridge) == (factor, 0.0)
    inputs, target, gaps = (torch.cat(pair) for pair in zip(seen, unseen, strict=True))
    weight, bias = ridge_solution(inputs, target - (1 - factor) * gaps, make_layer()[0], 0.0)
    np.testing.assert_allclose(found.weight.numpy(), weight, atol=1e-4)
    np.testing.assert_allclose(found.bias.numpy(), bias, atol=1e-4)
    solved = ridge_solution(seen[0], seen[1] - (1 - factor) * gap, make_layer()[0], 0.0)
    assert found.error == pytest.approx(mean_error(*unseen[:2], *solved, make_layer()[2]), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(("margin", "factor"), [(0.0, 0.5), (0.9, 1.0)])
def test_a_small_gain_does_not_give_up_the_full_gap(monkeypatch, margin, factor):
    monkeypatch.setattr(reconstruction, "GAP_MARGIN", margin)
    fit, held_out = make_rows(300, noise=0.3), make_rows(100, seed=1, noise=0.3)
    gap, held_gap = make_gap(fit[0], 3, 0.1), make_gap(held_out[0], 4, 0.1)
    seen, unseen = (fit[0], fit[1] + gap, gap), (held_out[0], held_out[1] + 0.4 * held_gap, held_gap)
    found = run(seen, unseen, ridges=(0.0,), gap_factors=(1.0, 0.5))
    assert found.gap_factor == factor
    full = run(seen, unseen, ridges=(0.0,), gap_factors=(1.0,))
    assert 0.1 * full.error < found.error <= full.error


def test_only_listed_gap_factors_are_tried():
    fit, held_out = make_rows(300, noise=0.01), make_rows(100, seed=1, noise=0.01)
    gap, held_gap = make_gap(fit[0], 3, 1.0), make_gap(held_out[0], 4, 1.0)
    found = run((fit[0], fit[1] + gap, gap), (*held_out, held_gap), gap_factors=(1.0, 0.5))
    assert found.gap_factor == 0.5


def test_a_solution_that_only_the_fit_rows_allow_is_passed_over(monkeypatch):
    refused = []
    original = reconstruction._Residual.solve

    def refuses_the_first_on_all_rows(self, ridge, factor):
        if ridge is not None and len(refused) < 1 and self.is_total:
            refused.append(ridge)
            return None
        return original(self, ridge, factor)

    def marked(self, weight, rows):
        self.is_total = rows.rows == 260
        initialise(self, weight, rows)

    initialise = reconstruction._Residual.__init__
    monkeypatch.setattr(reconstruction._Residual, "__init__", marked)
    monkeypatch.setattr(reconstruction._Residual, "solve", refuses_the_first_on_all_rows)
    fit, held_out = make_rows(200), make_rows(60, seed=1)
    found = run(fit, held_out)
    assert len(refused) == 1
    assert found.ridge is not None
    assert found.ridge != refused[0]
    np.testing.assert_allclose(
        found.weight.numpy(), ridge_solution(*joined(fit, held_out), make_layer()[0], found.ridge)[0], atol=1e-4
    )


@pytest.mark.parametrize("rows", [10, 100, 10_000])
def test_oas_equals_its_formula(rows):
    samples = torch.randn(rows, 5, generator=generator(0)).double() * torch.arange(1, 6)
    covariance = torch.cov(samples.T, correction=0)
    values = np.linalg.eigvalsh(covariance.numpy())
    squared, trace = (values**2).sum(), values.sum()
    expected = ((1 - 2 / 5) * squared + trace**2) / ((rows + 1 - 2 / 5) * (squared - trace**2 / 5))
    assert oas_ridge(covariance, rows) == pytest.approx(min(expected, 1.0), rel=1e-9)


def test_oas_limits():
    spread = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    assert oas_ridge(torch.eye(3).double(), 1000) == 1.0  # nothing but the mean variance to know
    assert oas_ridge(spread, 1) == 1.0
    assert oas_ridge(spread, 10**9) == pytest.approx(0.0, abs=1e-8)
    falling = [oas_ridge(spread, rows) for rows in (5, 10, 100, 1000)]
    assert falling == sorted(falling, reverse=True)
    assert oas_ridge(1e6 * spread, 50) == pytest.approx(oas_ridge(spread, 50))


def test_without_bias_it_is_least_squares_without_an_intercept():
    fit, held_out = make_rows(200), make_rows(50, seed=1)
    weight, ridge = regress_without_bias(make_layer()[0], statistics_of(*fit), statistics_of(*held_out), (0.0,))
    inputs, target = (x.double().numpy() for x in joined(fit, held_out))
    assert ridge == 0.0
    np.testing.assert_allclose(weight.numpy(), np.linalg.lstsq(inputs, target, rcond=None)[0].T, atol=1e-4)


def test_without_bias_a_ridge_shrinks_the_change():
    fit, held_out = make_rows(200), make_rows(50, seed=1)
    prior = make_layer()[0]
    inputs, target = (x.double().numpy() for x in joined(fit, held_out))
    for ridge in (1e-3, 1.0):
        weight, chosen = regress_without_bias(prior, statistics_of(*fit), statistics_of(*held_out), (ridge,))
        penalty = ridge * np.square(inputs).sum(0).mean()
        inner = inputs.T @ inputs + penalty * np.eye(INPUTS)
        change = np.linalg.solve(inner, inputs.T @ (target - inputs @ prior.double().numpy().T)).T
        assert chosen == ridge
        np.testing.assert_allclose(weight.numpy(), prior.double().numpy() + change, atol=1e-4)


def test_without_bias_the_weight_stays_where_every_change_hurts():
    fit, held_out = make_rows(200), make_rows(50, seed=1)
    prior = make_layer()[0]
    unseen = statistics_of(held_out[0], held_out[0] @ prior.T)
    weight, ridge = regress_without_bias(prior, statistics_of(*fit), unseen)
    assert ridge is None
    assert torch.equal(weight, prior.double())


def test_without_bias_dead_and_twin_columns_work():
    fit, held_out = make_rows(200), make_rows(50, seed=1)
    for inputs, _ in (fit, held_out):
        inputs[:, 2], inputs[:, 4] = 0.0, inputs[:, 0]
    weight, ridge = regress_without_bias(make_layer()[0], statistics_of(*fit), statistics_of(*held_out))
    assert ridge not in (None, 0.0)
    assert float(weight.abs().max()) < 100
    torch.testing.assert_close(weight[:, 2], make_layer()[0][:, 2].double())
