"""Pruning from end to end on tiny models: budget, purity, quality against the controls, disk."""

import hashlib
import warnings
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
from hf_opentrans.pruning.calibration import load_calibration
from hf_opentrans.pruning.surgery import to_sparse
from hf_opentrans.pruning.tower import Tower

KINDS = ["clip", "vision", "projection", "sparse_clip", "sparse_vision", "sparse_projection", "segmenter"]
FREE: dict[str, Any] = {"protect_last_attention": False}


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


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("method", ["obs", "magnitude", "random"])
@pytest.mark.parametrize("keep", [0.9, 0.6, 0.4])
def test_realised_share_lies_in_the_tolerance(tiny_clip, images, keep, method, unit):
    config = PruningConfig(keep=keep, method=method, unit=unit, **FREE)
    result = prune_model(tiny_clip, images, config)
    report = result.report
    assert keep - 0.02 <= report.realised_keep <= keep
    assert report.realised_keep == getattr(report, unit) / getattr(report, f"dense_{unit}")
    tower = Tower.of(result.model)
    parameters = [*tower.vision.parameters(), *cast("torch.nn.Linear", tower.projection).parameters()]
    assert report.params == sum(p.numel() for p in parameters)
    for layer, built in zip(report.layers, tower.layers, strict=True):
        assert (layer.heads, layer.neurons) == (built.self_attn.num_heads, built.mlp.fc1.out_features)
        assert layer.heads >= 1
        assert layer.neurons >= 7  # a tenth of 64, rounded up


def test_last_attention_is_protected_by_default(tiny_clip, images):
    report = prune_model(tiny_clip, images, PruningConfig(keep=0.5)).report
    assert report.layers[-1].heads == 4
    assert "protected" in report.notes[-1]
    assert report.layers[-1].heads_error is None


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("keep", [0.99, 0.51, 0.48])
def test_budgets_near_their_ends_are_met_although_a_head_is_coarse(tiny_clip, images, keep, unit):
    report = prune_model(tiny_clip, images, PruningConfig(keep=keep, unit=unit)).report
    assert keep - 0.02 <= report.realised_keep <= keep


def test_budget_below_the_floors_raises(tiny_clip, images):
    with pytest.raises(ValueError, match=r"keep=0\.3 .*min_heads=1 and min_neurons=0\.1.*leave 0\.3282 .*0\.329"):
        prune_model(tiny_clip, images, PruningConfig(keep=0.3, **FREE))


@pytest.mark.parametrize("method", ["obs", "magnitude"])
@pytest.mark.parametrize("is_training", [True, False])
def test_input_is_never_changed(tiny_clip, images, method, is_training):
    tiny_clip.train(is_training)
    tiny_clip.visual_projection.requires_grad_(False)
    before, flags = fingerprint(tiny_clip), [p.requires_grad for p in tiny_clip.parameters()]
    config = tiny_clip.config.to_dict()
    prune_model(tiny_clip, images, PruningConfig(method=method, **FREE))
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


@pytest.mark.parametrize("kind", ["clip", "vision", "segmenter"])
@pytest.mark.parametrize("method", ["obs", "random"])
def test_keep_one_is_bit_identical(make_model, images, kind, method):
    model = make_model(kind)
    result = prune_model(model, images, PruningConfig(keep=1.0, method=method))
    assert result.report.realised_keep == 1.0
    state = result.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in to_sparse(model).state_dict().items())
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(tokens(result.model, pixels), tokens(model, pixels))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["vision", "clip"])
def test_attention_implementation_stays(make_model, images, kind, implementation):
    model = make_model(kind)
    model.set_attn_implementation(implementation)
    result = prune_model(model, images, PruningConfig(keep=0.8))
    assert Tower.of(result.model).vision.config._attn_implementation == implementation


@pytest.mark.parametrize("keep", [0.8, 0.6])
def test_obs_stays_clearly_closer_than_the_controls(tiny_clip, images, held_out_pixels, keep):
    errors = {}
    for method in ("obs", "magnitude", "random"):
        result = prune_model(tiny_clip, images, PruningConfig(keep=keep, method=method, **FREE))
        errors[method] = token_error(result.model, tiny_clip, held_out_pixels)
    assert errors["obs"] < 0.6 * min(errors["magnitude"], errors["random"])


def test_compensated_model_is_closer_than_the_same_plan_sliced(tiny_clip, images):
    config = PruningConfig(keep=0.6, **FREE)
    result = prune_model(tiny_clip, images, config)
    calibration = load_calibration(images, config, Tower.of(to_sparse(tiny_clip)))
    pixels = torch.cat([*calibration.fit, *calibration.held_out])
    sliced = slice_model(tiny_clip, result.subnetwork.plan)
    assert token_error(result.model, tiny_clip, pixels) < 0.5 * token_error(sliced, tiny_clip, pixels)


def test_controls_are_plain_slices_of_the_model(tiny_clip, images):
    result = prune_model(tiny_clip, images, PruningConfig(keep=0.6, method="magnitude", **FREE))
    assert fingerprint(result.model) == fingerprint(slice_model(tiny_clip, result.subnetwork.plan))


def test_rebuilt_layers_are_no_worse_on_held_out_images(tiny_clip, images):
    report = prune_model(tiny_clip, images, PruningConfig(keep=0.6, **FREE)).report
    for layer in report.layers:
        if layer.heads_error is not None:
            assert layer.heads_error < (layer.heads_error_uncompensated or 0.0)
        if layer.neurons_error is not None:
            assert layer.neurons_error < (layer.neurons_error_uncompensated or 0.0)
        assert (layer.neurons_error is None) == (layer.neurons == layer.dense_neurons)


@pytest.mark.parametrize("method", ["obs", "random"])
def test_result_depends_on_the_seed_alone(tiny_clip, images, method):
    runs = [prune_model(tiny_clip, images, PruningConfig(method=method, seed=seed, **FREE)) for seed in (0, 0, 1)]
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


@pytest.mark.parametrize("layer", [0, 2])
def test_activations_that_overflow_raise_a_clear_error(tiny_clip, images, layer):
    with torch.no_grad():
        tiny_clip.vision_model.encoder.layers[layer].mlp.fc1.weight.fill_(3e38)
    with pytest.raises(ValueError, match="not finite"):
        prune_model(tiny_clip, images)


def test_models_without_a_vision_tower_raise(tiny_clip, images):
    text = CLIPTextModel(tiny_clip.config.text_config)
    with pytest.raises(TypeError, match=r"CLIPTextModel\. Pruning needs a CLIP vision tower"):
        prune_model(text, images)  # pyright: ignore[reportArgumentType]


def test_folder_as_a_string_equals_the_list(tmp_path, tiny_clip, images):
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index:02}.png")
    config = PruningConfig(keep=0.7)
    from_folder, from_list = (prune_model(tiny_clip, source, config) for source in (str(tmp_path), images))
    assert fingerprint(from_folder.model) == fingerprint(from_list.model)


def test_half_precision_stays_half_precision(tmp_path, tiny_clip, images):
    result = prune_model(tiny_clip.half(), images, PruningConfig(keep=0.6, **FREE))
    assert {p.dtype for p in result.model.parameters()} == {torch.float16}
    assert {tensor.dtype for tensor in result.subnetwork.tensors.values()} == {torch.float16}
    result.save_pretrained(tmp_path / "half")
    assert SparseCLIPModel.from_pretrained(tmp_path / "half").dtype == torch.float16


def test_pruning_works_without_gradients_and_in_inference_mode(tiny_clip, images):
    config = PruningConfig(keep=0.7)
    expected = fingerprint(prune_model(tiny_clip, images, config).model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = prune_model(tiny_clip, images, config)
        assert fingerprint(result.model) == expected
        assert not any(parameter.is_inference() for parameter in result.model.parameters())


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
