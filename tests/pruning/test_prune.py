"""Pruning from end to end on tiny models: budget, purity, quality against the controls, report, disk."""

import hashlib
import json
import math
import warnings
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextModel, CLIPVisionModel, CLIPVisionModelWithProjection

from hf_opentrans import (
    DenseCLIPForSegmentation,
    PruningConfig,
    SparseCLIPModel,
    SparseCLIPVisionModel,
    SparseCLIPVisionModelWithProjection,
    prune_model,
    slice_model,
)
from hf_opentrans.loading import load_clip, load_segmenter
from hf_opentrans.pruning import selection
from hf_opentrans.pruning.calibration import load_calibration
from hf_opentrans.pruning.latency import LatencyGrid, LatencyTable
from hf_opentrans.pruning.latency_timing import device_of, shape_of
from hf_opentrans.pruning.macs import TowerCost
from hf_opentrans.pruning.plan import METHODS, WITHOUT_STATISTICS
from hf_opentrans.pruning.report import PruningReport
from hf_opentrans.pruning.surgery import to_sparse
from hf_opentrans.pruning.tower import Tower

KINDS = ["clip", "vision", "projection", "sparse_clip", "sparse_vision", "sparse_projection", "segmenter"]
FREE: dict[str, Any] = {"protect_last_attention": False}
WITH_STATISTICS = tuple(method for method in METHODS if method not in WITHOUT_STATISTICS)
DONE: dict[PruningConfig, Any] = {}


def make_images(count=40, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, size=(count, 5, 6, 3), dtype=np.uint8)
    return [Image.fromarray(picture).resize((48, 40), Image.Resampling.BICUBIC) for picture in coarse]


@pytest.fixture(scope="session")
def images():
    return make_images()


@pytest.fixture(scope="session")
def held_out_pixels():
    """Return pixel values of images like those of the calibration, but others."""
    arrays = np.stack([np.asarray(image.resize((32, 32))) for image in make_images(24, seed=1)])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 64 - 2


@pytest.fixture
def make_model(tiny_clip):
    """Return a function that makes each kind of model from the same weights."""

    def make(kind):
        if kind in ("vision", "projection"):
            config = tiny_clip.config.vision_config
            model = (CLIPVisionModel if kind == "vision" else CLIPVisionModelWithProjection)(config)
            vision: Any = model if kind == "vision" else model.vision_model
            vision.load_state_dict(tiny_clip.vision_model.state_dict())
            if kind == "projection":
                cast("Any", model).visual_projection.load_state_dict(tiny_clip.visual_projection.state_dict())
            return model.eval()
        if kind.startswith("sparse"):
            return to_sparse(make(kind.removeprefix("sparse_")))
        if kind == "segmenter":
            sparse: Any = to_sparse(tiny_clip)
            model = DenseCLIPForSegmentation(sparse.config)
            model.load_state_dict(sparse.state_dict())
            return model.eval()
        return tiny_clip

    return make


@pytest.fixture
def pruned(tiny_clip, images):
    """Return a function that prunes `tiny_clip` by `images`; the same options are pruned once in all tests."""

    def get(**options):
        config = PruningConfig(**options)
        if config.method == "torch-pruning":
            pytest.importorskip("torch_pruning")
        if config not in DONE:
            DONE[config] = prune_model(tiny_clip, images, config)
        return DONE[config]

    return get


def widths(report):
    """Return heads, query-key width, value width and neurons of every layer."""
    return [(layer.heads, layer.qk_head_dim, layer.v_head_dim, layer.neurons) for layer in report.layers]


def fingerprint(model):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def tokens(model, pixels):
    return Tower.of(to_sparse(model).float()).tokens(pixels)


def token_error(model, dense, pixels):
    """Return the squared change of the class token plus the mean squared change of the patches."""
    moved = (tokens(model, pixels) - tokens(dense, pixels)).square().sum(-1).mean(0)
    return float(moved[0] + moved[1:].mean())


def assert_meets(result, keep, unit):
    """Check the realised share against the figures and against the model itself."""
    report = result.report
    assert keep - 0.02 <= report.realised_keep <= keep + 1e-9
    assert report.realised_keep == pytest.approx(getattr(report, unit) / getattr(report, f"dense_{unit}"), rel=1e-12)
    tower = Tower.of(result.model)
    parameters = [*tower.vision.parameters(), *cast("torch.nn.Linear", tower.projection).parameters()]
    assert report.params == sum(p.numel() for p in parameters)
    for layer, built in zip(report.layers, tower.layers, strict=True):
        attention = built.self_attn
        assert (layer.heads, layer.neurons) == (attention.num_heads, built.mlp.fc1.out_features)
        assert (layer.qk_head_dim, layer.v_head_dim) == (attention.qk_head_dim, attention.v_head_dim)
        assert (layer.dense_heads, layer.dense_neurons) == (4, 64)
        assert (layer.dense_qk_head_dim, layer.dense_v_head_dim) == (8, 8)
        assert layer.heads >= 1
        assert layer.neurons >= 7  # a tenth of 64, rounded up


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_meets_its_budget_and_its_model_comes_back(tmp_path, pruned, held_out_pixels, method, unit):
    result = pruned(keep=0.7, method=method, unit=unit)
    if method == "imp":
        assert result.report.realised_keep == 1.0
    else:
        assert_meets(result, 0.7, unit)
    result.save_pretrained(tmp_path / "pruned")
    loaded = SparseCLIPModel.from_pretrained(tmp_path / "pruned")
    expected = tokens(result.model, held_out_pixels)
    assert torch.isfinite(expected).all()
    assert torch.equal(tokens(loaded, held_out_pixels), expected)
    assert type(result.subnetwork).from_pretrained(tmp_path / "pruned" / "subnetwork").plan == result.subnetwork.plan
    assert PruningReport.load(tmp_path / "pruned").config["method"] == method
    noted = loaded.config.vision_config.pruning_config
    assert (noted["method"], noted["unit"]) == (method, unit)
    assert noted["realised_keep"] == pytest.approx(result.report.realised_keep, abs=1e-6)


@pytest.mark.parametrize(
    ("keep", "method", "unit"),
    [
        (0.9, "obs", "macs"),
        (0.4, "obs", "macs"),
        (0.4, "obs", "params"),
        (0.4, "flap", "macs"),
        (0.9, "random", "params"),
    ],
)
def test_other_budgets_are_met_without_protection(pruned, keep, method, unit):
    assert_meets(pruned(keep=keep, method=method, unit=unit, **FREE), keep, unit)


@pytest.mark.parametrize(("keep", "unit"), [(0.99, "macs"), (0.44, "params")])
def test_budgets_near_their_ends_are_met_although_a_head_is_coarse(pruned, keep, unit):
    assert_meets(pruned(keep=keep, unit=unit), keep, unit)


def test_last_attention_is_protected_by_default(tiny_clip, pruned):
    result = pruned(keep=0.5)
    assert widths(result.report)[-1][:3] == (4, 8, 8)
    assert any("attention of the last block is protected" in note for note in result.report.notes)
    ours, dense = result.model.vision_model.encoder.layers[-1], tiny_clip.vision_model.encoder.layers[-1]
    for name in ("q_proj", "k_proj", "v_proj"):  # dense heads read these
        assert torch.equal(getattr(ours.self_attn, name).weight, getattr(dense.self_attn, name).weight)
        assert torch.equal(getattr(ours.self_attn, name).bias, getattr(dense.self_attn, name).bias)
    free = pruned(keep=0.4, **FREE).report
    assert widths(free)[-1][:3] != (4, 8, 8)
    assert not any("protected" in note for note in free.notes)


@pytest.mark.parametrize(
    ("method", "unit"),
    [
        ("obs", "macs"),
        ("obs", "params"),
        ("vbp", "macs"),
        ("corp", "params"),
        ("imp", "macs"),
        ("torch-pruning", "macs"),
    ],
)
def test_budget_below_the_floors_raises_and_names_one_that_works(tiny_clip, images, method, unit):
    if method == "torch-pruning":
        pytest.importorskip("torch_pruning")
    with pytest.raises(ValueError, match=r"keep=0\.05 of the .*is below what .*Raise keep to 0\.\d+ or more") as error:
        prune_model(tiny_clip, images, PruningConfig(keep=0.05, method=method, unit=unit))
    lowest = float(str(error.value).split("Raise keep to ")[1].split()[0])
    result = prune_model(tiny_clip, images, PruningConfig(keep=lowest, method=method, unit=unit))
    assert result.report.realised_keep <= lowest or method == "imp"


def test_floors_are_named(tiny_clip, images):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"structures": ("heads",)}, "structures=heads"),
        ({"min_neurons": 0.5, "min_heads": 3}, "min_heads=3 and min_neurons=0.5 per layer"),
        ({}, "protect_last_attention"),
    ]
    for options, floor in cases:
        with pytest.raises(ValueError, match=floor):
            prune_model(tiny_clip, images, PruningConfig(keep=0.2, **options))


@pytest.mark.parametrize(
    ("structures", "keep", "dense"),
    [
        (("mlp",), 0.75, ("heads", "qk_head_dim", "v_head_dim")),
        (("heads",), 0.85, ("qk_head_dim", "v_head_dim", "neurons")),
        (("ranks",), 0.85, ("heads", "neurons")),
        (("mlp", "heads"), 0.6, ("qk_head_dim", "v_head_dim")),
        (("mlp", "ranks"), 0.6, ("heads",)),
    ],
)
def test_only_the_structures_that_were_asked_for_get_smaller(pruned, held_out_pixels, structures, keep, dense):
    result = pruned(keep=keep, structures=structures)
    assert_meets(result, keep, "macs")
    for name in ("heads", "qk_head_dim", "v_head_dim", "neurons"):
        kept = all(getattr(layer, name) == getattr(layer, f"dense_{name}") for layer in result.report.layers)
        assert kept or name not in dense
    narrowed = any(layer.qk_head_dim < 8 or layer.v_head_dim < 8 for layer in result.report.layers)
    assert narrowed == ("ranks" in structures)
    assert torch.isfinite(tokens(result.model, held_out_pixels)).all()


def test_refit_in_depth_order_changes_more_than_what_was_cut(tiny_clip, pruned, held_out_pixels):
    swept, local = pruned(keep=0.7), pruned(keep=0.7, refit=False)
    assert swept.subnetwork.plan == local.subnetwork.plan
    dense = to_sparse(tiny_clip)
    for name in ("visual_projection.weight", "vision_model.post_layernorm.weight"):
        assert torch.equal(local.model.state_dict()[name], dense.state_dict()[name])
        assert not torch.equal(swept.model.state_dict()[name], dense.state_dict()[name])
    for index, layer in enumerate(local.report.layers):
        assert layer.heads_gap_factor in (None, 1.0)
        assert layer.neurons_gap_factor in (None, 1.0)
        for kind, names in (("heads", ("heads", "qk_head_dim", "v_head_dim")), ("neurons", ("neurons",))):
            is_dense = all(getattr(layer, name) == getattr(layer, f"dense_{name}") for name in names)
            assert (getattr(layer, f"{kind}_error") is None) == is_dense
            consumer = Tower.of(local.model).consumer(index, kind)
            if is_dense:
                assert torch.equal(consumer.weight, Tower.of(dense).consumer(index, kind).weight)
    assert local.report.layers[-1].heads_error is None
    assert all(x.heads_error is not None and x.neurons_error is not None for x in swept.report.layers)
    errors = [token_error(x.model, tiny_clip, held_out_pixels) for x in (swept, local)]
    assert errors[0] < errors[1]


def test_the_exact_solver_is_best_by_its_own_measure(pruned):
    found = {solver: pruned(keep=0.7, solver=solver).report for solver in ("dp", "lagrangian", "uniform")}
    for report in found.values():
        assert 0.68 <= report.realised_keep <= 0.7
    assert found["dp"].predicted_error <= found["lagrangian"].predicted_error
    assert found["dp"].predicted_error < 0.9 * found["uniform"].predicted_error
    neurons = [layer.neurons for layer in found["uniform"].layers]
    assert max(neurons) - min(neurons) <= 4  # one step


def test_the_identity_metric_predicts_nothing_about_the_tokens(pruned):
    plain, probed = pruned(keep=0.7, metric="identity"), pruned(keep=0.7)
    assert_meets(plain, 0.7, "macs")
    assert plain.report.predicted_error is None
    assert all(layer.predicted_error is None for layer in plain.report.layers)
    assert len(plain.report.curves) == 6
    assert plain.subnetwork.plan != probed.subnetwork.plan
    assert plain.report.realised_error > probed.report.realised_error


def test_evolution_keeps_what_scores_better(tiny_clip, images, pruned, monkeypatch):
    seen = {}

    def watch(menus, sizes, budget, score, **options):
        seen["whole"] = score([menu.sizes[0] for menu in menus])
        best, scores = evolve(menus, sizes, budget, score, **options)
        seen.update(start=list(sizes), best=best, scores=scores, after=score(best), share=budget.share(menus, best))
        return best, scores

    evolve = selection.evolve
    monkeypatch.setattr(selection, "evolve", watch)
    config = PruningConfig(keep=0.6, search="evolution", search_steps=12)
    result = prune_model(tiny_clip, images, config)
    assert seen["whole"] == pytest.approx(2.0, abs=1e-5)  # the cosine of the class token plus that of the patches
    assert len(seen["scores"]) == 13
    assert seen["scores"] == sorted(seen["scores"])
    assert seen["scores"][0] < seen["scores"][-1] < 2
    assert seen["scores"][-1] == pytest.approx(seen["after"], abs=1e-9)
    assert seen["best"] != seen["start"]
    assert_meets(result, 0.6, "macs")
    assert result.report.realised_keep == pytest.approx(seen["share"])
    built = [(x.heads, x.qk_head_dim, x.v_head_dim, x.neurons) for x in result.report.layers]
    heads, neurons = seen["best"][::2], seen["best"][1::2]
    chosen = [(h.units, h.qk_head_dim, h.v_head_dim, n.units) for h, n in zip(heads, neurons, strict=True)]
    assert built == chosen != widths(pruned(keep=0.6).report)
    monkeypatch.undo()
    assert fingerprint(prune_model(tiny_clip, images, config).model) == fingerprint(result.model)


@pytest.mark.parametrize("unit", ["macs", "params"])
def test_imp_sets_weights_to_zero_and_says_so(tiny_clip, pruned, unit):
    result = pruned(keep=0.7, method="imp", unit=unit)
    report = result.report
    dense, ours = to_sparse(tiny_clip).state_dict(), result.model.state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in dense.items()}
    matrices = [n for n in ours if ".encoder.layers." in n and n.startswith("vision_model") and ours[n].ndim == 2]
    zeros = sum(int((ours[name] == 0).sum()) for name in matrices)
    moved = [name for name in ours if not torch.equal(ours[name], dense[name])]
    assert zeros > 0
    assert set(moved) <= set(matrices)
    largest_gone = max(float(dense[n][ours[n] == 0].abs().max()) for n in matrices if (ours[n] == 0).any())
    smallest_kept = min(float(ours[n][ours[n] != 0].abs().min()) for n in matrices)
    assert largest_gone < smallest_kept  # one threshold for all
    assert all(torch.equal(ours[n][ours[n] != 0], dense[n][ours[n] != 0]) for n in matrices)
    assert report.nominal_macs == report.dense_macs - zeros * 17
    assert (report.macs, report.params) == (report.dense_macs, report.dense_params)
    share = report.nominal_macs / report.dense_macs if unit == "macs" else 1 - zeros / report.dense_params
    assert 0.68 <= share <= 0.7
    assert any("nothing is smaller or faster" in note and "nominal" in note for note in report.notes)
    assert all(pruned(keep=0.7, method=m).report.nominal_macs is None for m in ("obs", "random"))


def test_the_report_predicts_and_measures(tiny_clip, images, pruned):
    result = pruned(keep=0.7)
    report = result.report
    assert report.predicted_error == pytest.approx(sum(layer.predicted_error for layer in report.layers))
    assert [(curve.layer, curve.kind) for curve in report.curves] == [
        (layer, kind) for layer in range(3) for kind in ("heads", "neurons")
    ]
    cost = TowerCost.of(tiny_clip.config.vision_config)
    chosen = 0.0
    for curve in report.curves:
        assert len(curve.costs) == len(curve.errors)
        assert list(curve.costs) == sorted(set(curve.costs))
        assert list(curve.errors) == sorted(set(curve.errors), reverse=True)
        assert (curve.costs[-1], curve.errors[-1]) == (1.0, 0.0)  # the dense sublayer
        layer, at = report.layers[curve.layer], cast("int", curve.chosen)
        chosen += curve.errors[at]
        if curve.kind == "neurons":
            assert curve.costs[at] == pytest.approx(layer.neurons / 64)
        else:
            head = cost.head("macs", layer.qk_head_dim, layer.v_head_dim)
            assert curve.costs[at] == pytest.approx(layer.heads * head / (4 * cost.head("macs", 8, 8)))
    assert report.predicted_error == pytest.approx(chosen)
    assert [len(curve.costs) for curve in report.curves][4] == 1  # the protected attention
    calibration = load_calibration(images, PruningConfig(keep=0.7), Tower.of(to_sparse(tiny_clip)))
    measured = token_error(result.model, tiny_clip, torch.cat(calibration.held_out))
    assert report.realised_error == pytest.approx(measured, rel=1e-4)
    assert 0.1 < report.predicted_error / report.realised_error < 10
    assert {"selection", "rebuild", "total"} <= set(report.seconds)
    assert json.loads(json.dumps(report.to_dict()))["realised_error"] == report.realised_error


@pytest.mark.parametrize("method", [method for method in METHODS if method != "obs"])
def test_reports_of_baselines_predict_nothing(tiny_clip, images, pruned, method):
    result = pruned(keep=0.7, method=method)
    report = result.report
    assert report.predicted_error is None
    assert report.curves == ()
    assert all(layer.predicted_error is None for layer in report.layers)
    is_rebuilt = any(layer.heads_error is not None or layer.neurons_error is not None for layer in report.layers)
    assert is_rebuilt == (method in WITH_STATISTICS)
    calibration = load_calibration(images, PruningConfig(keep=0.7), Tower.of(to_sparse(tiny_clip)))
    measured = token_error(result.model, tiny_clip, torch.cat(calibration.held_out))
    assert report.realised_error == pytest.approx(measured, rel=1e-4)
    assert not report.notes or "protected" in report.notes[0]


def test_sublayers_that_were_kept_as_sliced_are_noted(pruned):
    # So little goes that refitting the layers behind it can only fit noise.
    result = pruned(keep=0.99)
    kept = [
        f"{kind} of layer {index}"
        for index, layer in enumerate(result.report.layers)
        for kind in ("heads", "neurons")
        if getattr(layer, f"{kind}_error") == getattr(layer, f"{kind}_error_uncompensated")
    ]
    assert kept
    (note,) = [note for note in result.report.notes if "Kept as sliced" in note]
    assert note.endswith(f"held-out error: {', '.join(kept)}.")
    assert not any("Kept as sliced" in note for note in pruned(keep=0.7, refit=False).report.notes)


@pytest.mark.parametrize(
    ("method", "is_training"),
    [("obs", True), ("obs", False), ("corp-refit", True), ("imp", False), ("torch-pruning", True)],
)
def test_input_is_never_changed(tiny_clip, images, method, is_training):
    if method == "torch-pruning":
        pytest.importorskip("torch_pruning")
    tiny_clip.train(is_training)
    tiny_clip.visual_projection.requires_grad_(False)
    before, flags = fingerprint(tiny_clip), [p.requires_grad for p in tiny_clip.parameters()]
    config = tiny_clip.config.to_dict()
    prune_model(tiny_clip, images, PruningConfig(keep=0.7, method=method))
    assert fingerprint(tiny_clip) == before
    assert [p.requires_grad for p in tiny_clip.parameters()] == flags
    assert all(p.grad is None for p in tiny_clip.parameters())
    assert tiny_clip.training == is_training
    assert tiny_clip.config.to_dict() == config
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_clip.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_pruned_to_its_sparse_class(make_model, images, kind):
    expected = {
        "clip": SparseCLIPModel,
        "vision": SparseCLIPVisionModel,
        "projection": SparseCLIPVisionModelWithProjection,
        "segmenter": DenseCLIPForSegmentation,
    }
    model = make_model(kind)
    result = prune_model(model, images, PruningConfig(keep=0.6, **FREE))
    assert type(result.model) is expected[kind.removeprefix("sparse_")]
    assert 0.58 <= result.report.realised_keep <= 0.6
    assert 0 < token_error(result.model, model, torch.randn(4, 3, 32, 32)) < 4


@pytest.mark.parametrize(
    ("kind", "method", "unit"),
    [*(("clip", method, "macs") for method in METHODS), ("vision", "obs", "params"), ("segmenter", "obs", "macs")],
)
def test_keep_one_is_bit_identical(make_model, images, kind, method, unit):
    model = make_model(kind)
    result = prune_model(model, images, PruningConfig(keep=1.0, method=method, unit=unit))
    assert result.report.realised_keep == 1.0
    assert result.report.realised_error == 0.0
    state = result.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in to_sparse(model).state_dict().items())
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(tokens(result.model, pixels), tokens(model, pixels))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["vision", "clip"])
def test_attention_implementation_stays(make_model, images, kind, implementation):
    model = make_model(kind)
    model.set_attn_implementation(implementation)
    result = prune_model(model, images, PruningConfig(keep=0.8, method="magnitude-compensated"))  # runs the probes too
    assert Tower.of(result.model).vision.config._attn_implementation == implementation


@pytest.mark.parametrize("keep", [0.7, 0.4])
def test_obs_stays_clearly_closer_than_the_controls(tiny_clip, pruned, held_out_pixels, keep):
    options = {} if keep == 0.7 else FREE
    errors = {
        method: token_error(pruned(keep=keep, method=method, **options).model, tiny_clip, held_out_pixels)
        for method in ("obs", "flap", "random")
    }
    assert errors["obs"] < 0.5 * min(errors["flap"], errors["random"])


def test_compensated_model_is_closer_than_the_same_plan_sliced(tiny_clip, images, pruned, held_out_pixels):
    result = pruned(keep=0.6, structures=("mlp", "heads"))
    sliced = slice_model(tiny_clip, result.subnetwork.plan)
    calibration = load_calibration(images, PruningConfig(keep=0.6), Tower.of(to_sparse(tiny_clip)))
    for pixels in (torch.cat([*calibration.fit, *calibration.held_out]), held_out_pixels):
        assert token_error(result.model, tiny_clip, pixels) < 0.5 * token_error(sliced, tiny_clip, pixels)


@pytest.mark.parametrize("method", ["magnitude", "random", "torch-pruning"])
def test_controls_are_plain_slices_of_the_model(tiny_clip, pruned, method):
    result = pruned(keep=0.7, method=method)
    assert fingerprint(result.model) == fingerprint(slice_model(tiny_clip, result.subnetwork.plan))


@pytest.mark.parametrize("options", [{"method": "obs"}, {"method": "corp-refit"}, {"refit": False}])
def test_rebuilt_layers_are_no_worse_on_held_out_images(pruned, options):
    report = pruned(keep=0.7, **options).report
    pairs = [
        (getattr(layer, f"{kind}_error"), getattr(layer, f"{kind}_error_uncompensated"))
        for layer in report.layers
        for kind in ("heads", "neurons")
        if getattr(layer, f"{kind}_error") is not None
    ]
    assert len(pairs) == (5 if "refit" in options else 6)
    assert all(after <= before for after, before in pairs)
    assert sum(after for after, _ in pairs) < 0.7 * sum(before for _, before in pairs)


@pytest.mark.parametrize("method", ["obs", "corp-refit", "random"])
def test_result_depends_on_the_seed_alone(tiny_clip, images, pruned, method):
    again = prune_model(tiny_clip, images, PruningConfig(keep=0.7, method=method))
    runs = [pruned(keep=0.7, method=method), again, pruned(keep=0.7, method=method, seed=1)]
    first, again, other = (fingerprint(run.model) for run in runs)
    assert first == again != other
    assert runs[0].subnetwork.calibration == runs[1].subnetwork.calibration != runs[2].subnetwork.calibration


@pytest.mark.parametrize("kind", ["clip", "vision"])
def test_subnetwork_builds_the_same_tower(make_model, images, kind, held_out_pixels):
    result = prune_model(make_model(kind), images, PruningConfig(keep=0.6, **FREE))
    built = result.subnetwork.to_model()
    assert torch.equal(tokens(built, held_out_pixels), tokens(result.model, held_out_pixels))


def test_source_hashes_are_those_of_the_dense_tensors(tiny_clip, images):
    expected = {
        name.removeprefix("vision_model."): hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in tiny_clip.state_dict().items()
        if name.startswith(("vision_model.", "visual_projection."))
    }
    assert prune_model(tiny_clip, images, PruningConfig(method="random")).subnetwork.source_hashes == expected


def test_saved_folder_loads_everywhere_with_equal_outputs(
    tmp_path, tiny_clip, tiny_tokenizer, tiny_image_processor, images, held_out_pixels
):
    result = prune_model(tiny_clip, images, PruningConfig(keep=0.6, **FREE), image_processor=tiny_image_processor)
    folder = tmp_path / "pruned"
    result.save_pretrained(folder, tiny_tokenizer)
    tiny_image_processor.save_pretrained(folder)
    expected = tokens(result.model, held_out_pixels)
    for loaded in (SparseCLIPModel.from_pretrained(folder), load_clip(folder).model, load_segmenter(folder)[0]):
        assert torch.equal(tokens(loaded, held_out_pixels), expected)
    assert (folder / "pruning_report.json").is_file()
    assert type(result.subnetwork).from_pretrained(folder / "subnetwork").plan == result.subnetwork.plan


def test_pruned_model_can_be_pruned_again(tiny_clip, images, held_out_pixels):
    first = prune_model(tiny_clip, images, PruningConfig(keep=0.8, **FREE))
    second = prune_model(first.model, images, PruningConfig(keep=0.7, **FREE))
    assert second.report.dense_macs == first.report.macs
    assert 0.68 <= second.report.realised_keep <= 0.7
    assert torch.isfinite(tokens(second.model, held_out_pixels)).all()


@pytest.mark.parametrize("method", ["obs", "magnitude"])
def test_all_heads_and_neurons_may_go_without_floors(tiny_clip, images, method, held_out_pixels):
    config = PruningConfig(keep=0.19, method=method, min_heads=0, min_neurons=0.0, **FREE)
    result = prune_model(tiny_clip, images, config)
    assert 0.17 <= result.report.realised_keep <= 0.19
    assert min(layer.heads for layer in result.report.layers) == 0
    assert torch.isfinite(tokens(result.model, held_out_pixels)).all()
    again = prune_model(result.model, images, PruningConfig(keep=0.98, min_heads=0, min_neurons=0.0, **FREE))
    assert torch.isfinite(tokens(again.model, held_out_pixels)).all()


def test_weights_that_are_not_finite_raise(tiny_clip, images):
    with torch.no_grad():
        tiny_clip.vision_model.encoder.layers[1].mlp.fc1.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.fc1\.weight' has values that are NaN"):
        prune_model(tiny_clip, images)


def explode(model, layer):
    """Make activations overflow although every weight is finite."""
    with torch.no_grad():
        model.vision_model.encoder.layers[layer].mlp.fc1.weight.fill_(3e38)
    return model


@pytest.mark.parametrize("method", WITH_STATISTICS)
@pytest.mark.parametrize("layer", [0, 2])
def test_activations_that_overflow_raise_a_clear_error(tiny_clip, images, method, layer):
    with pytest.raises(
        ValueError, match=r"of layer \d are not finite\. Pruning needs finite numbers\. Check the weights"
    ):
        prune_model(explode(tiny_clip, layer), images, PruningConfig(keep=0.7, method=method))


@pytest.mark.parametrize(
    "options", [*({"keep": 0.7, "method": method} for method in WITHOUT_STATISTICS), {"keep": 1.0}]
)
def test_activations_that_overflow_are_never_passed_over(tiny_clip, images, options):
    if options.get("method") == "torch-pruning":
        pytest.importorskip("torch_pruning")
    try:
        report: Any = prune_model(explode(tiny_clip, 0), images, PruningConfig(**options)).report
    except ValueError as error:
        assert "not finite" in str(error)  # noqa: PT017 - an error and a note are both right
    else:
        assert any("not finite" in note for note in report.notes)
        assert math.isfinite(report.realised_error)


@pytest.mark.parametrize("method", ["obs", "corp-refit", "corp", "flap", "imp", "torch-pruning"])
def test_constant_images_give_finite_models(tiny_clip, held_out_pixels, method):
    if method == "torch-pruning":
        pytest.importorskip("torch_pruning")
    constant = [Image.new("RGB", (40, 40), (128, 30, 20))] * 40
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Only 1 of the 40 calibration images differ")
        result = prune_model(tiny_clip, constant, PruningConfig(keep=0.7, method=method))
    assert all(torch.isfinite(tensor).all() for tensor in result.model.state_dict().values())
    assert torch.isfinite(tokens(result.model, held_out_pixels)).all()
    assert math.isfinite(cast("float", result.report.realised_error))
    assert all(math.isfinite(layer.neurons_error or 0.0) for layer in result.report.layers)


def test_calibration_by_copies_of_one_picture_is_noted(tiny_clip, held_out_pixels):
    constant = [Image.new("RGB", (40, 40), (128, 30, 20))] * 40
    with pytest.warns(UserWarning, match="Only 1 of the 40 calibration images differ"):
        result = prune_model(tiny_clip, constant, PruningConfig(keep=0.7, **FREE))
    # On its own picture the model looks perfect; on others it is not.
    assert (
        cast("float", result.report.realised_error)
        < 1e-9
        < 1e-4
        < token_error(result.model, tiny_clip, held_out_pixels)
    )
    assert any("images differ" in note for note in result.report.notes)


def assert_meets_time(result, table, keep):
    spent = table.fixed() + sum(
        table.attention(x.heads, x.qk_head_dim, x.v_head_dim) + table.mlp(x.neurons) for x in result.report.layers
    )
    assert keep - 0.02 <= spent / table.dense_ms <= keep + 1e-9
    assert result.report.realised_keep == pytest.approx(spent / table.dense_ms)


@pytest.fixture
def make_table(tiny_clip):
    """Return a function that assembles a table for `tiny_clip` on this machine, without a clock."""

    def make(price=lambda heads, qk, v: heads * (qk + v)):
        grid = LatencyGrid((0, 1, 2, 3, 4), (2, 4, 6, 8), (2, 4, 6, 8), tuple(range(0, 65, 4)))
        times = {point: 2.0 + (price(*point[1:]) if point[0] == "attention" else point[1]) for point in grid.points}
        vision = tiny_clip.vision_model
        where = {"device": device_of(vision), "shape": shape_of(vision), "resolution": 32, "batch_size": 1}
        return LatencyTable.from_measured(times, grid=grid, fixed_ms=1.0, dense_ms=20.0, **where)

    return make


@pytest.mark.parametrize("method", ["obs", "corp-refit", "flap", "random", "torch-pruning"])
def test_time_is_kept_as_asked(tiny_clip, images, make_table, method):
    if method == "torch-pruning":
        pytest.importorskip("torch_pruning")
    config = PruningConfig(keep=0.75, unit="latency", method=method)
    assert_meets_time(prune_model(tiny_clip, images, config, latency_table=make_table()), make_table(), 0.75)


def test_the_table_decides_what_goes(tiny_clip, images, make_table):
    config = PruningConfig(keep=0.8, unit="latency", **FREE)
    dear = make_table(lambda heads, qk, v: 20 * heads + qk / 100 + v / 100)  # only whole heads save time
    cheap = make_table(lambda heads, qk, v: (heads > 0) * (5 * qk + 5 * v))  # only narrower ones do
    heads, narrow = (prune_model(tiny_clip, images, config, latency_table=table) for table in (dear, cheap))
    assert_meets_time(heads, dear, 0.8)
    assert_meets_time(narrow, cheap, 0.8)
    assert sum(layer.heads for layer in heads.report.layers) < sum(layer.heads for layer in narrow.report.layers)
    inner = [sum(x.qk_head_dim + x.v_head_dim for x in result.report.layers) for result in (heads, narrow)]
    assert inner[1] < inner[0]


def test_time_needs_a_table_of_this_machine(tiny_clip, images, make_table):
    config = PruningConfig(keep=0.75, unit="latency")
    with pytest.raises(ValueError, match=r"there is no latency table.*latency-table MODEL"):
        prune_model(tiny_clip, images, config)
    table = make_table()
    elsewhere = replace(table, device=table.device | {"processor": "Z80"})
    with pytest.raises(ValueError, match=r"another processor \('Z80'"):
        prune_model(tiny_clip, images, config, latency_table=elsewhere)
    with pytest.raises(ValueError, match=r"another layers \(12, here 3\)"):
        prune_model(tiny_clip, images, config, latency_table=replace(table, shape=table.shape | {"layers": 12}))
    with pytest.raises(ValueError, match=r"another resolution \(32, here 48\)"):
        prune_model(tiny_clip, images, replace(config, resolution=48), latency_table=table)
    with pytest.raises(ValueError, match=r"keep=0\.05 of the latency is below what the floors allow"):
        prune_model(tiny_clip, images, replace(config, keep=0.05), latency_table=table)
    with pytest.raises(ValueError, match="saves no latency"):
        prune_model(tiny_clip, images, replace(config, method="imp"), latency_table=table)


def test_the_subnetwork_states_the_dense_cost_in_its_unit(tiny_clip, images, make_table):
    config = PruningConfig(keep=0.75, unit="latency", method="random")
    budget = prune_model(tiny_clip, images, config, latency_table=make_table()).subnetwork.budget
    assert (budget["unit"], budget["dense"]) == ("latency", pytest.approx(20.0))


def test_models_without_a_vision_tower_raise(tiny_clip, images):
    text = CLIPTextModel(tiny_clip.config.text_config)
    with pytest.raises(TypeError, match=r"CLIPTextModel\. Pruning needs a CLIP vision tower"):
        prune_model(text, images)  # pyright: ignore[reportArgumentType]


def test_folder_as_a_string_equals_the_list(tmp_path, tiny_clip, images, pruned):
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index:02}.png")
    from_folder = prune_model(tiny_clip, str(tmp_path), PruningConfig(keep=0.7))
    assert fingerprint(from_folder.model) == fingerprint(pruned(keep=0.7).model)


def test_half_precision_stays_half_precision(tmp_path, tiny_clip, images):
    result = prune_model(tiny_clip.half(), images, PruningConfig(keep=0.6, **FREE))
    assert {p.dtype for p in result.model.parameters()} == {torch.float16}
    assert {tensor.dtype for tensor in result.subnetwork.tensors.values()} == {torch.float16}
    result.save_pretrained(tmp_path / "half")
    assert SparseCLIPModel.from_pretrained(tmp_path / "half").dtype == torch.float16


def test_pruning_works_without_gradients_and_in_inference_mode(tiny_clip, images, pruned):
    config = PruningConfig(keep=0.7)
    expected = fingerprint(pruned(keep=0.7).model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = prune_model(tiny_clip, images, config)
        assert fingerprint(result.model) == expected
        assert not any(parameter.is_inference() for parameter in result.model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_too_few_images_raise_where_they_are_read(tiny_clip, images, method):
    if method == "torch-pruning":
        pytest.importorskip("torch_pruning")
    config = PruningConfig(keep=0.7, method=method)
    if method in WITH_STATISTICS:
        with pytest.raises(ValueError, match=r"3 calibration images give 51 tokens\. .*Give 4 images or more"):
            prune_model(tiny_clip, images[:3], config)
    else:
        report: Any = prune_model(tiny_clip, images[:1], config).report
        assert (report.calibration_images, report.calibration_tokens) == (1, 17)
        assert report.realised_error > 0
    with pytest.raises(ValueError, match="There are 0 calibration images"):
        prune_model(tiny_clip, [], config)


def test_few_images_warn_and_the_report_says_so(tiny_clip):
    with pytest.warns(UserWarning, match="8 calibration images give 136 tokens"):
        report = prune_model(tiny_clip, make_images(8), PruningConfig(keep=0.8)).report
    assert report.calibration_images == 8
    assert report.calibration_tokens == 136
    assert "136 tokens" in report.notes[0]


def test_progress_bar_ends_where_it_said(tiny_clip, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        prune_model(tiny_clip, make_images(16), PruningConfig(keep=0.8, batch_size=4), progress=True)
    assert "Pruning" in capsys.readouterr().err
