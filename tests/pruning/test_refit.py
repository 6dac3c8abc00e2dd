"""Rebuilding of a tiny pruned tower against regressions of its recorded activations."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm
from transformers import CLIPVisionModel

from hf_opentrans.pruning.calibration import Calibration
from hf_opentrans.pruning.matching import hash_tensors
from hf_opentrans.pruning.plan import PruningPlan
from hf_opentrans.pruning.reconstruction import RIDGES, oas_ridge
from hf_opentrans.pruning.refit import CORP, LOCAL, MEAN_SHIFT_ONLY, SWEEP, Recipe, rebuild
from hf_opentrans.pruning.summary import realised_error
from hf_opentrans.pruning.surgery import slice_model, to_sparse
from hf_opentrans.pruning.tower import Tower

BATCH = 8
MLP_OF_LAYER_1 = {1: (range(4), range(3, 43))}
MUCH = {0: ((0, 2), range(0, 64, 3)), 1: ((1, 3), range(20)), 2: (range(4), range(30, 60))}


def make_calibration(images=48, held_out=16, seed=0):
    """Return smooth random images: their tokens differ, and are related."""
    source = torch.Generator().manual_seed(seed)
    coarse = 2 * torch.randn(images, 3, 4, 4, generator=source)
    pixels = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    pixels += 0.3 * torch.randn(pixels.shape, generator=source)
    return Calibration(pixels[held_out:].split(BATCH), pixels[:held_out].split(BATCH), "", images)


def make_plan(changes):
    plan = PruningPlan.keep_all([4] * 3, [64] * 3)
    layers = list(plan.layers)
    for index, (heads, neurons) in changes.items():
        layers[index] = replace(layers[index], heads=tuple(heads), neurons=tuple(neurons))
    return PruningPlan(tuple(layers))


@pytest.fixture
def dense(tiny_clip):
    return to_sparse(tiny_clip).requires_grad_(False)


@pytest.fixture
def calibration():
    return make_calibration()


def slice_tower(dense, changes):
    return Tower.of(slice_model(dense, make_plan(changes)).requires_grad_(False))


def reference_weights(rows):
    """Weigh the tokens of one batch, from the definition."""
    rows = rows.double().numpy()
    weights = np.ones(rows.shape[:2])
    weights[:, 0] = (rows.shape[1] - 1) / 9
    distances = np.linalg.norm(rows - rows.mean((0, 1)), axis=-1)
    return (weights * np.minimum(1, np.quantile(distances, 0.999) / distances) ** 2).ravel()


def record(tower, batches, *modules):
    """Return inputs and output of every module for each batch of an ordinary forward pass."""
    seen = [[] for _ in modules]
    hooks = [
        m.register_forward_hook(lambda _m, inputs, output, kept=kept: kept.append((inputs[0], output)))
        for m, kept in zip(modules, seen, strict=True)
    ]
    for batch in batches:
        tower.tokens(batch)
    for hook in hooks:
        hook.remove()
    return seen


def flat(batches):
    return np.concatenate([rows.double().numpy().reshape(-1, rows.shape[-1]) for rows in batches])


def delta_ridge(rows, weight, ridge):
    """Return weight and bias of a weighted ridge regression that shrinks towards `weight`, from its definition."""
    inputs, target, shares = rows
    shares = shares / shares.sum()
    residual = target - inputs @ weight.T
    mean, offset = shares @ inputs, shares @ residual
    centred = (inputs - mean) * shares[:, None]
    inner = centred.T @ (inputs - mean)
    change = np.zeros_like(weight)
    if ridge is not None:
        penalty = ridge * np.trace(inner) / len(inner) * np.eye(len(inner))
        change = np.linalg.solve(inner + penalty, centred.T @ (residual - offset)).T
    return weight + change, offset - change @ mean


def weighted_error(rows, weight, bias, metric):
    inputs, target, shares = rows
    difference = target - inputs @ weight.T - bias
    return float(np.einsum("n,ni,ij,nj->", shares / shares.sum(), difference, metric, difference))


@pytest.mark.parametrize("has_metric", [False, True])
def test_local_refit_of_an_mlp_is_a_ridge_regression_of_its_activations(dense, calibration, has_metric):
    tower, small = Tower.of(dense), slice_tower(dense, MLP_OF_LAYER_1)
    kept = list(MLP_OF_LAYER_1[1][1])
    consumer = tower.consumer(1, "neurons")
    weight, bias = consumer.weight[:, kept].double().numpy(), consumer.bias.double().numpy()
    root = torch.randn(32, 32, dtype=torch.float64)
    metrics = {(1, "neurons"): root @ root.T} if has_metric else {}
    rebuilt = rebuild(tower, small, calibration, metrics, LOCAL)
    assert set(rebuilt) == {(1, "neurons")}
    done = rebuilt[1, "neurons"]
    parts: list[Any] = []
    for batches in (calibration.fit, calibration.held_out):
        (pairs,) = record(tower, batches, consumer)
        inputs = [rows[..., kept] for rows, _ in pairs]
        shares = np.concatenate([reference_weights(rows) for rows in inputs])
        parts.append((flat(inputs), flat([output for _, output in pairs]), shares))
    metric = (root @ root.T).numpy() if has_metric else np.eye(32)
    errors = {
        ridge: weighted_error(parts[1], *delta_ridge(parts[0], weight, ridge), metric) for ridge in (None, *RIDGES)
    }
    assert done.error == pytest.approx(min(errors.values()), rel=1e-3)
    assert done.error == pytest.approx(errors[done.ridge], rel=1e-3)
    assert done.error_before == pytest.approx(weighted_error(parts[1], weight, bias, metric), rel=1e-3)
    expected = delta_ridge([np.concatenate(pair) for pair in zip(*parts, strict=True)], weight, done.ridge)
    np.testing.assert_allclose(small.consumer(1, "neurons").weight.numpy(), expected[0], atol=1e-4)
    np.testing.assert_allclose(small.consumer(1, "neurons").bias.numpy(), expected[1], atol=1e-4)


def test_local_refit_changes_nothing_but_the_consumers_of_what_went(dense, calibration):
    small, plain = (slice_tower(dense, MUCH) for _ in range(2))
    rebuilt = rebuild(Tower.of(dense), small, calibration, {}, LOCAL)
    assert set(rebuilt) == {(0, "heads"), (0, "neurons"), (1, "heads"), (1, "neurons"), (2, "neurons")}
    before, after = plain.named_tensors(), small.named_tensors()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    names = {"heads": "self_attn.out_proj", "neurons": "mlp.fc2"}
    consumers = [f"encoder.layers.{layer}.{names[kind]}" for layer, kind in rebuilt]
    assert changed == {f"{name}.{part}" for name in consumers for part in ("weight", "bias")}


@pytest.mark.parametrize("recipe", [MEAN_SHIFT_ONLY, LOCAL, SWEEP, CORP])
@pytest.mark.parametrize("changes", [MLP_OF_LAYER_1, MUCH])
def test_rebuilding_lowers_the_error_and_leaves_the_dense_tower_alone(dense, calibration, recipe, changes):
    tower, small = Tower.of(dense), slice_tower(dense, changes)
    before, pixels = hash_tensors(dense), [batch.clone() for batch in calibration.fit]
    unseen = make_calibration(seed=1)
    errors = [realised_error(tower, small, images) for images in (calibration, unseen)]
    rebuild(tower, small, calibration, {}, recipe)
    after = [realised_error(tower, small, images) for images in (calibration, unseen)]
    share = 1.0 if recipe is MEAN_SHIFT_ONLY else 0.9
    assert all(new < share * old for new, old in zip(after, errors, strict=True)), (errors, after)
    assert hash_tensors(dense) == before
    assert all(torch.equal(a, b) for a, b in zip(pixels, calibration.fit, strict=True))
    for each in (tower, small):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in each.vision.modules())


def test_sweep_beats_the_local_refit_and_the_mean_shift(dense, calibration):
    tower, unseen = Tower.of(dense), make_calibration(seed=1)
    errors = []
    for recipe in (SWEEP, LOCAL, MEAN_SHIFT_ONLY):
        small = slice_tower(dense, MUCH)
        rebuild(tower, small, calibration, {}, recipe)
        errors.append(realised_error(tower, small, unseen))
    assert errors == sorted(errors)


@pytest.mark.parametrize("recipe", [SWEEP, LOCAL, MEAN_SHIFT_ONLY])
def test_a_tower_that_lost_nothing_stays_as_it_is(dense, calibration, recipe):
    tower, small = Tower.of(dense), Tower.of(to_sparse(dense).requires_grad_(False))
    rebuilt = rebuild(tower, small, calibration, {}, recipe)
    assert len(rebuilt) == (6 if recipe.propagates else 0)
    assert realised_error(tower, small, calibration) < 1e-8
    before, after = tower.named_tensors(), small.named_tensors()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-3)


def test_mean_shift_moves_biases_alone(dense, calibration):
    changes = {0: ((0, 3), range(64)), 2: (range(4), range(24))}
    tower, small, plain = Tower.of(dense), slice_tower(dense, changes), slice_tower(dense, changes)
    rebuilt = rebuild(tower, small, calibration, {}, MEAN_SHIFT_ONLY)
    assert all(done.ridge is None and not done.is_kept and not done.is_singular for done in rebuilt.values())
    before, after = plain.named_tensors(), small.named_tensors()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"encoder.layers.0.self_attn.out_proj.bias", "encoder.layers.2.mlp.fc2.bias"}
    kept, gone = list(range(24)), list(range(24, 64))
    consumer = tower.consumer(2, "neurons")
    (pairs,) = record(tower, [*calibration.fit, *calibration.held_out], consumer)
    shares = np.concatenate([reference_weights(rows[..., kept]) for rows, _ in pairs])
    means = np.average(flat([rows[..., gone] for rows, _ in pairs]), axis=0, weights=shares)
    expected = consumer.bias.double().numpy() + consumer.weight[:, gone].double().numpy() @ means
    np.testing.assert_allclose(small.consumer(2, "neurons").bias.numpy(), expected, atol=1e-5)


def test_sweep_aims_at_the_dense_stream(dense, calibration):
    tower, small = Tower.of(dense), slice_tower(dense, MUCH)
    recipe = Recipe(ridges=(), gap_factors=(1.0,), refits_head=False)
    rebuilt = rebuild(tower, small, calibration, {}, recipe)
    assert not rebuilt[2, "neurons"].is_kept
    batches = [*calibration.fit, *calibration.held_out]
    (wanted,) = record(tower, batches, tower.vision.post_layernorm)
    found, inner = record(small, batches, small.vision.post_layernorm, small.consumer(2, "neurons"))
    shares = np.concatenate([reference_weights(rows) for rows, _ in inner])
    gap = flat([rows for rows, _ in wanted]) - flat([rows for rows, _ in found])
    np.testing.assert_allclose(np.average(gap, axis=0, weights=shares), 0.0, atol=1e-5)
    assert np.abs(gap).max() > 0.1  # it is the mean that agrees


def test_corp_takes_its_one_ridge_from_the_covariance(dense, calibration):
    tower, small = Tower.of(dense), slice_tower(dense, MLP_OF_LAYER_1)
    done = rebuild(tower, small, calibration, {}, CORP)[1, "neurons"]
    (pairs,) = record(tower, [*calibration.fit, *calibration.held_out], tower.consumer(1, "neurons"))
    inputs = [rows[..., list(MLP_OF_LAYER_1[1][1])] for rows, _ in pairs]
    shares = np.concatenate([reference_weights(rows) for rows in inputs])
    covariance = torch.tensor(np.cov(flat(inputs).T, bias=True, aweights=shares))
    assert done.ridge == pytest.approx(max(1e-3, oas_ridge(covariance, 48 * 17)), rel=1e-3)


@pytest.mark.parametrize("recipe", [SWEEP, LOCAL])
@pytest.mark.parametrize("changes", [{1: ((), range(64))}, {1: (range(4), ())}])
def test_an_empty_sublayer_becomes_the_mean_of_what_it_added(dense, calibration, recipe, changes):
    tower, small = Tower.of(dense), slice_tower(dense, changes)
    kind = "heads" if not changes[1][0] else "neurons"
    before = realised_error(tower, small, calibration)
    rebuild(tower, small, calibration, {}, recipe)
    assert realised_error(tower, small, calibration) < 0.9 * before
    (pairs,) = record(tower, [*calibration.fit, *calibration.held_out], tower.consumer(1, kind))
    # Layer 0 lost nothing: the streams are the same, and so is the target.
    target = [output for _, output in pairs]
    if not recipe.propagates:
        shares = np.concatenate([reference_weights(rows) for rows in target])
        expected = np.average(flat(target), axis=0, weights=shares)
        np.testing.assert_allclose(small.consumer(1, kind).bias.numpy(), expected, atol=1e-5)


HEAD_ONLY = Recipe(ridges=(), gap_factors=(1.0,))


def test_head_refit_repairs_a_damaged_head(dense, calibration):
    tower, small = Tower.of(dense), Tower.of(to_sparse(dense).requires_grad_(False))
    assert small.projection is not None
    small.vision.post_layernorm.weight.mul_(1.5 + 0.2 * torch.rand(32))
    small.vision.post_layernorm.bias.add_(0.5)
    small.projection.weight.add_(0.05 * torch.randn(16, 32))
    before = realised_error(tower, small, calibration)
    rebuild(tower, small, calibration, {}, HEAD_ONLY)
    assert before > 1e-2
    assert realised_error(tower, small, calibration) < 1e-6
    torch.testing.assert_close(
        small.vision.post_layernorm.weight, tower.vision.post_layernorm.weight, rtol=0, atol=1e-3
    )
    torch.testing.assert_close(small.vision.post_layernorm.bias, tower.vision.post_layernorm.bias, rtol=0, atol=1e-3)


def test_head_refit_keeps_the_channels_that_held_out_images_speak_against(dense):
    images = make_calibration()
    # Held out are images of another kind: what the fit finds is wrong for some channels.
    odd = Calibration(images.fit, tuple(3 + 0.2 * batch for batch in images.held_out), "", images.num_images)
    tower, small = Tower.of(dense), slice_tower(dense, MUCH)
    old = small.vision.post_layernorm.weight.clone(), small.vision.post_layernorm.bias.clone()
    rebuild(tower, small, odd, {}, HEAD_ONLY)
    norm, small_norm = tower.vision.post_layernorm, small.vision.post_layernorm
    parts: list[Any] = []
    for batches in (odd.fit, odd.held_out):
        (wanted,), (found,) = record(tower, batches, norm), record(small, batches, small_norm)
        inputs = [layer_norm(rows, (32,), eps=norm.eps) for rows, _ in found]
        targets = [output for _, output in wanted]
        both = [torch.cat(pair, -1) for pair in zip(inputs, targets, strict=True)]
        shares = np.concatenate([reference_weights(rows) for rows in both])
        parts.append((flat(inputs), flat(targets), shares / shares.sum()))
    kept = 0
    for channel in range(32):
        x, y, shares = (part[:, channel] if part.ndim == 2 else part for part in parts[0])
        slope, intercept = np.polyfit(x, y, 1, w=np.sqrt(shares))
        x, y, shares = (part[:, channel] if part.ndim == 2 else part for part in parts[1])
        before = shares @ (y - float(old[0][channel]) * x - float(old[1][channel])) ** 2
        is_better = shares @ (y - slope * x - intercept) ** 2 < before
        expected = (slope, intercept) if is_better else (float(old[0][channel]), float(old[1][channel]))
        assert float(small_norm.weight[channel]) == pytest.approx(expected[0], abs=1e-4)
        assert float(small_norm.bias[channel]) == pytest.approx(expected[1], abs=1e-4)
        kept += not is_better
    assert 0 < kept < 32


def test_projection_stays_where_held_out_images_speak_against_it(dense):
    tower, small = Tower.of(dense), slice_tower(dense, MLP_OF_LAYER_1)
    assert small.projection is not None
    images = make_calibration()
    before = small.projection.weight.clone()
    # Two fit images for 32 columns and no ridge that helps: least squares learns their noise.
    few = Calibration((images.fit[0][:1] * 0.01,), (5 * images.held_out[0], *images.held_out[1:]), "", 17)
    rebuild(tower, small, few, {}, replace(MEAN_SHIFT_ONLY, refits_head=True))
    kept = torch.equal(small.projection.weight, before)
    rebuild(tower, small, images, {}, replace(MEAN_SHIFT_ONLY, refits_head=True))
    assert kept
    assert not torch.equal(small.projection.weight, before)


def test_towers_without_a_projection_are_rebuilt_too(make_tiny_clip, calibration):
    model = CLIPVisionModel(make_tiny_clip().config.vision_config).eval()
    dense = to_sparse(model).requires_grad_(False)
    tower, small = Tower.of(dense), slice_tower(dense, MUCH)
    before = realised_error(tower, small, calibration)
    rebuild(tower, small, calibration, {}, SWEEP)
    assert small.projection is None
    assert realised_error(tower, small, calibration) < 0.9 * before


def test_progress_is_reported_once_a_batch_and_stage(dense, calibration):
    calls: list[int] = []
    rebuild(Tower.of(dense), slice_tower(dense, MUCH), calibration, {}, SWEEP, on_batch=lambda: calls.append(1))
    assert len(calls) == 3 * 2 * 2 * 6  # layers, kinds, gathering and stepping, batches
