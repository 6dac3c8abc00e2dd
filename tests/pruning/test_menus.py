"""Menus: every size's error against least squares on samples, and which sizes there are."""

import itertools

import numpy as np
import pytest
import torch

from hf_opentrans.pruning.importance import SELECTION_RIDGE
from hf_opentrans.pruning.menus import (
    AttentionStatistics,
    attention_menu,
    diagonal_blocks,
    fewest_neurons,
    neuron_menu,
)
from hf_opentrans.pruning.plan import PruningConfig
from hf_opentrans.pruning.sizes import Size
from hf_opentrans.pruning.surgery import to_sparse, unit_columns
from hf_opentrans.pruning.tower import Tower

HEADS, WIDTH, HIDDEN, ROWS = 4, 8, 32, 200
CONFIG = PruningConfig()


@pytest.fixture
def tower(tiny_clip):
    return Tower.of(to_sparse(tiny_clip).requires_grad_(False))


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(seed, *batch, width):
    factor = draw(seed, *batch, width, width)
    return factor @ factor.mT / width


def make_rows(seed, width):
    """Return centred rows whose columns are correlated and of different size."""
    rows = draw(seed, ROWS, width) @ (draw(seed + 1, width, width) * torch.linspace(0.2, 1.5, width).double())
    return rows - rows.mean(0)


def make_statistics(tower, layer, seed=0):
    rows = make_rows(seed, HEADS * WIDTH)
    statistics = AttentionStatistics(
        tower.consumers[layer, "heads"].weight.double(),
        rows.T @ rows / ROWS,
        positive(seed + 2, width=HIDDEN),
        positive(seed + 3, HEADS, width=WIDTH),
        positive(seed + 4, HEADS, width=WIDTH),
    )
    return statistics, rows


def with_ridge(rows):
    """Add rows that put the selection's ridge on the covariance."""
    rows = rows.numpy()
    ridge = SELECTION_RIDGE * np.square(rows).mean()
    return np.vstack([rows, np.sqrt(ROWS * ridge) * np.eye(rows.shape[1])])


def residual(design, target):
    """Return what least squares leaves of `target`; the rows are centred, so there is no intercept."""
    return target - design @ np.linalg.lstsq(design, target, rcond=None)[0] if design.shape[1] else target


def metric_error(difference, metric):
    return float(np.einsum("ni,ij,nj->", difference, metric.numpy(), difference) / ROWS)


def brute_force_attention(statistics, rows, kept, v_width):
    """Return the least-squares error of a number of dimensions in each of the kept heads; all from samples."""
    rows = with_ridge(rows)
    target = rows @ statistics.weight.numpy().T
    heads = {head: rows[:, unit_columns([head], WIDTH).numpy()] for head in kept}
    joint = np.hstack(list(heads.values()))
    compensated = np.linalg.lstsq(joint, target, rcond=None)[0].T
    factor = np.linalg.cholesky(statistics.metric.numpy())
    narrow = []
    for position, (head, own) in enumerate(heads.items()):
        others = [part for other, part in heads.items() if other != head]
        alone = residual(np.hstack(others), own) if others else own
        values, vectors = np.linalg.eigh(alone.T @ alone / ROWS)
        root, inverse = vectors * np.sqrt(values) @ vectors.T, vectors / np.sqrt(values) @ vectors.T
        outgoing = factor.T @ compensated[:, position * WIDTH : (position + 1) * WIDTH]
        _, _, directions = np.linalg.svd(outgoing @ root)
        narrow.append(own @ inverse @ directions[:v_width].T)
    return metric_error(residual(np.hstack(narrow), target), statistics.metric)


def query_tail(statistics, kept, qk_width):
    total = 0.0
    for head in kept:
        product = statistics.query_moment[head].numpy() @ statistics.query_metric[head].numpy()
        total += np.sort(np.linalg.eigvals(product).real)[::-1][qk_width:].sum()
    return total


@pytest.mark.parametrize("seed", [0, 20])
def test_every_error_of_attention_is_that_of_least_squares(tower, seed):
    statistics, rows = make_statistics(tower, 1, seed)
    menu = attention_menu(tower, 1, statistics, CONFIG)
    widths = (8, 6, 4, 2)
    assert [(s.units, s.qk_head_dim, s.v_head_dim) for s in menu.sizes] == list(
        itertools.product((4, 3, 2, 1), widths, widths)
    )
    assert menu.sizes[0] == Size(0.0, 4, 8, 8)
    for size in menu.sizes[1:]:
        kept = menu.kept(size)
        expected = brute_force_attention(statistics, rows, kept, size.v_head_dim)
        expected += query_tail(statistics, kept, size.qk_head_dim)
        assert size.error == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_head_order_is_that_of_the_cheapest_removals(tower):
    statistics, rows = make_statistics(tower, 0)
    menu = attention_menu(tower, 0, statistics, CONFIG)
    left = set(range(HEADS))
    for gone in menu.order[:-1]:
        costs = {head: brute_force_attention(statistics, rows, sorted(left - {head}), WIDTH) for head in left}
        assert min(costs, key=costs.__getitem__) == gone
        left.remove(gone)


@pytest.mark.parametrize("seed", range(4))
def test_errors_never_fall_when_anything_shrinks(tower, seed):
    menu = attention_menu(tower, 0, make_statistics(tower, 0, 10 * seed)[0], CONFIG)
    errors = {(s.units, s.qk_head_dim, s.v_head_dim): s.error for s in menu.sizes}
    for (units, qk, v), error in errors.items():
        for smaller in ((units, qk - 2, v), (units, qk, v - 2)):
            if smaller in errors:
                assert errors[smaller] > error
    whole = [errors[units, 8, 8] for units in (4, 3, 2, 1)]
    assert whole == sorted(whole)


def test_protected_last_layer_has_one_size(tower):
    statistics, _ = make_statistics(tower, 2)
    assert attention_menu(tower, 2, statistics, CONFIG).sizes == (Size(0.0, 4, 8, 8),)
    assert len(attention_menu(tower, 2, statistics, PruningConfig(protect_last_attention=False)).sizes) == 64


@pytest.mark.parametrize(
    ("structures", "units", "inner"),
    [
        (("mlp",), {4}, {8}),
        (("heads",), {4, 3, 2, 1}, {8}),
        (("ranks",), {4}, {8, 6, 4, 2}),
        (("mlp", "heads", "ranks"), {4, 3, 2, 1}, {8, 6, 4, 2}),
    ],
)
def test_structures_switch_sizes_off(tower, structures, units, inner):
    statistics, _ = make_statistics(tower, 0)
    menu = attention_menu(tower, 0, statistics, PruningConfig(structures=structures))
    assert {s.units for s in menu.sizes} == units
    assert {s.qk_head_dim for s in menu.sizes} == {s.v_head_dim for s in menu.sizes} == inner
    assert sorted(menu.order) == list(range(HEADS))
    everything = attention_menu(tower, 0, statistics, CONFIG)
    known = {(s.units, s.qk_head_dim, s.v_head_dim): s.error for s in everything.sizes}
    for size in menu.sizes:
        assert size.error == pytest.approx(known[size.units, size.qk_head_dim, size.v_head_dim], abs=1e-12)
    covariance, metric = positive(0, width=64), positive(1, width=HIDDEN)
    neurons = neuron_menu(tower, 0, covariance, metric, PruningConfig(structures=structures))
    assert (len(neurons.sizes) > 1) == ("mlp" in structures)
    assert neurons.sizes[0] == Size(0.0, 64)


def test_all_heads_can_go_where_the_floor_allows_it(tower):
    statistics, rows = make_statistics(tower, 1)
    menu = attention_menu(tower, 1, statistics, PruningConfig(min_heads=0))
    (last,) = (size for size in menu.sizes if size.units == 0)
    whole = with_ridge(rows) @ statistics.weight.numpy().T
    assert last.error == pytest.approx(metric_error(whole, statistics.metric), rel=1e-6)
    assert menu.kept(last) == ()
    few = attention_menu(tower, 1, statistics, PruningConfig(min_heads=3))
    assert {size.units for size in few.sizes} == {4, 3}
    many = attention_menu(tower, 1, statistics, PruningConfig(min_heads=9))
    assert {size.units for size in many.sizes} == {4}


@pytest.mark.parametrize(("step", "widths"), [(None, {8, 6, 4, 2}), (4, {8, 4}), (3, {8, 6, 3}), (16, {8})])
def test_head_widths_are_rounded(tower, step, widths):
    statistics, _ = make_statistics(tower, 1)
    menu = attention_menu(tower, 1, statistics, PruningConfig(round_head_dim=step, structures=("ranks",)))
    assert {s.qk_head_dim for s in menu.sizes} == {s.v_head_dim for s in menu.sizes} == widths


def test_diagonal_blocks_are_those_of_the_heads():
    matrix = torch.arange(36.0).view(6, 6)
    expected = torch.stack([matrix[0:2, 0:2], matrix[2:4, 2:4], matrix[4:6, 4:6]])
    assert torch.equal(diagonal_blocks(matrix, 3), expected)


def test_every_error_of_neurons_is_that_of_least_squares(tower):
    rows, metric = make_rows(5, 64), positive(6, width=HIDDEN)
    menu = neuron_menu(tower, 1, rows.T @ rows / ROWS, metric, PruningConfig(min_neurons=0.0))
    assert [size.units for size in menu.sizes] == list(range(64, -1, -4))
    design = with_ridge(rows)
    target = design @ tower.consumers[1, "neurons"].weight.double().numpy().T
    for size in menu.sizes:
        kept = list(menu.kept(size))
        assert len(kept) == size.units
        expected = metric_error(residual(design[:, kept], target), metric)
        assert size.error == pytest.approx(expected, rel=1e-6, abs=1e-9)
    errors = [size.error for size in menu.sizes]
    assert all(a < b for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({}, list(range(64, 7, -4))),
        ({"min_neurons": 0.5}, list(range(64, 31, -4))),
        ({"min_neurons": 0.51}, list(range(64, 35, -4))),
        ({"round_neurons": 16}, [64, 48, 32, 16]),
        ({"round_neurons": 24, "min_neurons": 0.0}, [64, 48, 24, 0]),
        ({"round_neurons": 100}, [64]),
        ({"min_neurons": 1.0}, [64]),
    ],
)
def test_neuron_widths_are_rounded_and_the_floor_holds(tower, options, widths):
    config = PruningConfig(**options)
    menu = neuron_menu(tower, 0, positive(0, width=64), positive(1, width=HIDDEN), config)
    assert [size.units for size in menu.sizes] == widths
    assert fewest_neurons(64, config) == widths[-1] >= 64 * config.min_neurons
