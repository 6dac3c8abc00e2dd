"""Greedy removal against brute force, the output metric against an independent derivation, and the baselines."""

import itertools
import math
from typing import Any

import pytest
import torch

from hf_opentrans.pruning import importance
from hf_opentrans.pruning.importance import greedy_removal, norm_order, output_metrics, random_order
from hf_opentrans.pruning.surgery import to_sparse, unit_columns
from hf_opentrans.pruning.tower import Tower


def make_problem(inputs=12, outputs=5, seed=0):
    """Return a weight, a well-conditioned covariance of correlated inputs, and a metric of full rank."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing, root = normal(3 * inputs, inputs) * (0.3 + torch.rand(inputs, generator=generator)), normal(outputs, 8)
    return normal(outputs, inputs), mixing.T @ mixing / len(mixing), root @ root.T


def brute_force(weight, covariance, metric, units, group_size=1):
    """Return tr(M W_P [(C^-1)_PP]^-1 W_P^T), with the selection's ridge on C."""
    if not units:
        return 0.0
    ridge = importance.SELECTION_RIDGE * covariance.diagonal().mean()
    inverse = torch.linalg.inv(covariance + ridge * torch.eye(len(covariance), dtype=torch.float64))
    columns = unit_columns(sorted(units), group_size)
    part = weight[:, columns]
    return float(torch.trace(metric @ part @ torch.linalg.inv(inverse[columns][:, columns]) @ part.T))


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_running_error_is_the_exact_error_of_the_removed_set(group_size, seed):
    problem = make_problem(seed=seed)
    order, errors = greedy_removal(*problem, group_size=group_size, fewest=1)
    units = 12 // group_size
    assert sorted(order) == list(range(units))
    assert len(errors) == units
    for removed, error in enumerate(errors):
        assert error == pytest.approx(brute_force(*problem, order[:removed], group_size), rel=1e-8)


@pytest.mark.parametrize("group_size", [1, 3])
def test_every_removal_is_the_best_next_one(group_size):
    problem = make_problem(seed=4)
    order, _ = greedy_removal(*problem, group_size=group_size, fewest=1)
    for step in range(len(order) - 1):
        errors = {unit: brute_force(*problem, [*order[:step], unit], group_size) for unit in order[step:]}
        assert min(errors, key=errors.__getitem__) == order[step]


def test_steps_of_several_neurons_keep_the_error_exact_at_their_ends(monkeypatch):
    monkeypatch.setattr(importance, "STEPS_PER_LAYER", 6)
    problem = make_problem(inputs=30, outputs=8)
    order, errors = greedy_removal(*problem, group_size=1, fewest=3)
    assert sorted(order) == list(range(30))
    assert len(errors) == 28
    for removed in (5, 10, 15, 20, 25, 27):
        assert errors[removed] == pytest.approx(brute_force(*problem, order[:removed]), rel=1e-8)
    assert all(a <= b for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_errors_start_at_zero_and_never_fall(group_size, seed):
    _, errors = greedy_removal(*make_problem(seed=seed), group_size=group_size, fewest=0)
    assert errors[0] == 0.0
    assert all(a <= b for a, b in itertools.pairwise(errors))


def test_all_units_can_go_and_the_error_is_then_that_of_the_whole_output():
    weight, covariance, metric = make_problem()
    _, errors = greedy_removal(weight, covariance, metric, group_size=1, fewest=0)
    ridge = importance.SELECTION_RIDGE * covariance.diagonal().mean()
    whole = weight @ (covariance + ridge * torch.eye(12, dtype=torch.float64)) @ weight.T
    assert errors[-1] == pytest.approx(float(torch.trace(metric @ whole)), rel=1e-8)


@pytest.mark.parametrize("group_size", [1, 3])
def test_constant_units_go_first(group_size):
    weight, covariance, metric = make_problem()
    dead = unit_columns([2], group_size) if group_size > 1 else torch.tensor([2, 7, 8])
    covariance[dead] = 0.0
    covariance[:, dead] = 0.0
    order, errors = greedy_removal(weight, covariance, metric, group_size=group_size, fewest=1)
    expected = {2} if group_size > 1 else {2, 7, 8}
    assert set(order[: len(expected)]) == expected
    assert errors[len(expected)] < 0.05 * errors[len(expected) + 1]


def test_inputs_that_never_change_cost_nothing():
    weight, covariance, metric = make_problem()
    order, errors = greedy_removal(weight, torch.zeros_like(covariance), metric, group_size=1, fewest=1)
    assert sorted(order) == list(range(12))
    assert max(errors) == pytest.approx(0.0, abs=1e-100)


@pytest.mark.parametrize("group_size", [1, 3])
def test_permuting_the_units_permutes_the_order(group_size):
    weight, covariance, metric = make_problem(seed=5)
    permutation = torch.randperm(12 // group_size, generator=torch.Generator().manual_seed(1)).tolist()
    columns = unit_columns(permutation, group_size)
    order, errors = greedy_removal(weight, covariance, metric, group_size=group_size, fewest=1)
    mixed = (weight[:, columns], covariance[columns][:, columns], metric)
    permuted, permuted_errors = greedy_removal(*mixed, group_size=group_size, fewest=1)
    assert [permutation[unit] for unit in permuted] == list(order)
    assert permuted_errors == pytest.approx(errors)


def test_the_floor_is_never_removed():
    order, errors = greedy_removal(*make_problem(), group_size=1, fewest=12)
    assert (sorted(order), errors) == (list(range(12)), (0.0,))
    order, errors = greedy_removal(*make_problem(), group_size=1, fewest=9)
    assert (len(order), len(errors)) == (12, 4)


def test_curve_keeps_the_units_behind_the_removed_ones():
    curve = importance.ErrorCurve(0, "neurons", (3, 0, 2, 1), (0.0, 1.0, 2.0))
    assert curve.kept(0) == (0, 1, 2, 3)
    assert curve.kept(2) == (1, 2)


def derived_metrics(tower, batches, probes, seed):
    """Return E[g g^T] where g is the derivative by a shift that is added to the output: no shared code."""
    generator = torch.Generator().manual_seed(seed)
    sums = {key: torch.zeros(32, 32, dtype=torch.float64) for key in tower.consumers}
    images = 0
    for batch in batches:
        shifts = {key: torch.zeros(len(batch), 17, 32, requires_grad=True) for key in tower.consumers}
        handles = [
            module.register_forward_hook(lambda _m, _i, output, shift=shifts[key]: output + shift)
            for key, module in tower.consumers.items()
        ]
        tokens = tower.tokens(batch)
        for handle in handles:
            handle.remove()
        for _ in range(probes):
            probe = torch.randn(tokens.shape, generator=generator)
            value = (probe[:, 0] * tokens[:, 0]).sum() + (probe[:, 1:] * tokens[:, 1:]).sum() / math.sqrt(16)
            gradients = torch.autograd.grad(value, list(shifts.values()), retain_graph=True)
            for key, gradient in zip(shifts, gradients, strict=True):
                for row in gradient.reshape(-1, 32).double():
                    sums[key] += torch.outer(row, row)
        images += len(batch)
    return {key: total / (images * probes) for key, total in sums.items()}


def test_output_metrics_equal_an_independent_derivation(tiny_clip):
    tower = Tower.of(to_sparse(tiny_clip).requires_grad_(False))
    batches = torch.randn(5, 3, 32, 32).split(2)
    found = output_metrics(tower, batches, probes=2, seed=3)
    expected = derived_metrics(tower, batches, probes=2, seed=3)
    assert found.keys() == expected.keys() == tower.consumers.keys()
    for key, metric in found.items():
        torch.testing.assert_close(metric, expected[key], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("key", [(0, "heads"), (1, "neurons"), (2, "heads"), (2, "neurons")])
def test_metric_predicts_how_far_the_final_tokens_move(tiny_clip, key):
    tower = Tower.of(to_sparse(tiny_clip).requires_grad_(False))
    pixels = torch.randn(32, 3, 32, 32)
    metric = output_metrics(tower, pixels.split(16), probes=16, seed=0)[key]
    mixing = 1e-2 * torch.randn(32, 32)
    with torch.no_grad():
        before = tower.tokens(pixels)
        module: Any = tower.consumers[key]
        hook = module.register_forward_hook(lambda _m, _i, y: y + torch.randn(y.shape) @ mixing)
        moved = (tower.tokens(pixels) - before).square().sum(-1).mean(0)
        hook.remove()
    measured = float(moved[0] + moved[1:].mean())
    predicted = float(torch.trace(metric @ (mixing.T @ mixing).double()))
    assert measured / 1.35 < predicted < measured * 1.35


@torch.no_grad()
def test_magnitude_order_equals_a_computation_by_hand(tiny_clip):
    tower = Tower.of(to_sparse(tiny_clip))
    block = tiny_clip.vision_model.encoder.layers[1]
    neurons = [
        float(block.mlp.fc1.weight[i].square().sum() + block.mlp.fc2.weight[:, i].square().sum()) for i in range(64)
    ]
    assert norm_order(tower, 1, "neurons") == tuple(sorted(range(64), key=neurons.__getitem__))
    attention = block.self_attn
    heads = []
    for head in range(4):
        rows = slice(8 * head, 8 * head + 8)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        total = sum(float(p.weight[rows].square().sum()) for p in projections)
        heads.append(total + float(attention.out_proj.weight[:, rows].square().sum()))
    assert norm_order(tower, 1, "heads") == tuple(sorted(range(4), key=heads.__getitem__))


def test_random_order_depends_on_the_seed_alone(tiny_clip):
    tower = Tower.of(to_sparse(tiny_clip))
    first, again, other = (random_order(tower, 0, "neurons", torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == list(range(64))
    assert sorted(random_order(tower, 0, "heads", torch.Generator())) == list(range(4))
