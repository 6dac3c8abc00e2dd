"""Greedy removal against brute force, and the output metric against an independent derivation."""

import itertools
import math
from typing import Any

import pytest
import torch

from hf_opentrans.pruning import importance
from hf_opentrans.pruning.importance import greedy_removal, output_metrics, regular, square_root
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


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_square_root_of_any_rank_gives_the_metric_back(rank):
    factor = torch.randn(6, rank, dtype=torch.float64)
    root = square_root(factor @ factor.T)
    torch.testing.assert_close(root.T @ root, factor @ factor.T)


def test_regular_adds_a_thousandth_of_the_mean_variance():
    covariance = torch.diag(torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(regular(covariance).diagonal() - covariance.diagonal(), torch.full((3,), 2e-3).double())
    assert float(torch.linalg.cholesky(regular(torch.zeros(3, 3).double())).diagonal().min()) > 0


def derived_metrics(tower, batches, probes, seed):
    """Return E[g g^T] where g is the derivative by a shift that is added to the output: no shared code."""
    modules: dict[tuple[int, str], Any] = dict(tower.consumers)
    modules |= {(index, "queries"): layer.self_attn.q_proj for index, layer in enumerate(tower.layers)}
    sums = {key: torch.zeros(32, 32, dtype=torch.float64) for key in modules}
    images = 0
    for number, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(hash((seed, number)) % 2**63)
        shifts = {key: torch.zeros(len(batch), 17, 32, requires_grad=True) for key in modules}
        handles = [
            module.register_forward_hook(lambda _m, _i, output, shift=shifts[key]: output + shift)
            for key, module in modules.items()
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
    found = {key: total / (images * probes) for key, total in sums.items()}
    for index in range(len(tower.layers)):  # queries: the head's own block of the joint matrix
        joint = found[index, "queries"]
        found[index, "queries"] = torch.stack([joint[i : i + 8, i : i + 8] for i in range(0, 32, 8)])
    return found


def dense_tower(tiny_clip):
    return Tower.of(to_sparse(tiny_clip).requires_grad_(False))


def test_output_metrics_equal_an_independent_derivation(tiny_clip):
    tower = dense_tower(tiny_clip)
    batches = torch.randn(5, 3, 32, 32).split(2)
    calls = []
    found = output_metrics(tower, batches, probes=2, seed=3, on_batch=lambda: calls.append(1))
    expected = derived_metrics(tower, batches, probes=2, seed=3)
    assert found.keys() == expected.keys()
    assert len(calls) == 3
    for key, metric in found.items():
        assert metric.shape == ((4, 8, 8) if key[1] == "queries" else (32, 32))
        assert metric.dtype == torch.float64
        torch.testing.assert_close(metric, expected[key], rtol=1e-3, atol=1e-5 * float(expected[key].abs().max()))


def test_probes_depend_on_the_seed_and_the_batch_but_not_on_the_process(tiny_clip, monkeypatch):
    tower = dense_tower(tiny_clip)
    batches = torch.randn(7, 3, 32, 32).split(2)
    whole, again, other = (output_metrics(tower, batches, probes=1, seed=seed) for seed in (0, 0, 1))
    for key, metric in whole.items():
        assert torch.equal(metric, again[key])
        assert not torch.allclose(metric, other[key], rtol=1e-3)
    shares = []
    for rank in range(2):  # what two processes find, each alone
        monkeypatch.setattr(importance, "own_share", lambda items, rank=rank: items[rank::2])
        shares.append(output_metrics(tower, batches, probes=1, seed=0))
    for key, metric in whole.items():
        torch.testing.assert_close((4 * shares[0][key] + 3 * shares[1][key]) / 7, metric)
    assert not any(module._forward_hooks for module in tower.vision.modules())


def test_equal_images_in_two_batches_get_different_probes(tiny_clip):
    tower = dense_tower(tiny_clip)
    image = torch.randn(1, 3, 32, 32)
    once = output_metrics(tower, [image], probes=1, seed=0)[0, "neurons"]
    twice = output_metrics(tower, [image, image], probes=1, seed=0)[0, "neurons"]
    assert not torch.allclose(once, twice, rtol=1e-2)


def test_gradients_that_are_not_finite_raise(tiny_clip):
    tower = dense_tower(tiny_clip)
    with torch.no_grad():
        tower.layers[2].mlp.fc2.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="gradients behind the queries of layer 0 are not finite"):
        output_metrics(tower, [torch.randn(2, 3, 32, 32)], probes=1, seed=0)


@pytest.mark.parametrize("key", [(0, "heads"), (1, "neurons"), (2, "heads"), (2, "neurons"), (1, "queries")])
def test_metric_predicts_how_far_the_final_tokens_move(tiny_clip, key):
    tower = dense_tower(tiny_clip)
    pixels = torch.randn(32, 3, 32, 32)
    metric = output_metrics(tower, pixels.split(16), probes=16, seed=0)[key]
    metric = torch.block_diag(*metric) if key[1] == "queries" else metric
    mixing = 1e-2 * torch.randn(32, 32)
    if key[1] == "queries":  # heads change independently of each other
        mixing = torch.block_diag(*(mixing[i : i + 8, i : i + 8] for i in range(0, 32, 8)))
    with torch.no_grad():
        before = tower.tokens(pixels)
        module: Any = tower.layers[key[0]].self_attn.q_proj if key[1] == "queries" else tower.consumers[key]
        hook = module.register_forward_hook(lambda _m, _i, y: y + torch.randn(y.shape) @ mixing)
        moved = (tower.tokens(pixels) - before).square().sum(-1).mean(0)
        hook.remove()
    measured = float(moved[0] + moved[1:].mean())
    predicted = float(torch.trace(metric @ (mixing.T @ mixing).double()))
    assert measured / 1.35 < predicted < measured * 1.35
