"""One subnetwork in every host: equal where nothing is cut, smaller where it is, refused where it does not fit."""

import copy
import json
import pickle
import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    GitConfig,
    GitForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Owlv2Config,
    Owlv2ForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    SiglipVisionConfig,
    SiglipVisionModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from hf_opentrans import (
    DenseCLIPForSegmentation,
    PruningConfig,
    SparseCLIPModel,
    Subnetwork,
    load_transferred,
    prune_model,
    save_transferred,
)
from hf_opentrans.models.configuration_sparse_clip import SparseCLIPVisionConfig
from hf_opentrans.models.image_loading import center_crop
from hf_opentrans.pruning.hosts import HostTower
from hf_opentrans.pruning.surgery import slice_model
from hf_opentrans.pruning.unused import drop_unused

TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 16,
    "eos_token_id": 49,
    "bos_token_id": 48,
    "pad_token_id": 1,
}
LANGUAGE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IMAGE_TOKEN = 59
IDS = torch.tensor([[48, 3, 4, 49], [48, 7, 9, 49]])


def vision_of(clip, **changes) -> dict[str, Any]:
    values = clip.config.vision_config.to_dict()
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    )
    return {name: values[name] for name in (*names, "projection_dim")} | changes


def clipseg(vision):
    options: dict[str, Any] = {
        "projection_dim": 16,
        "reduce_dim": 8,
        "extract_layers": [0, 1],
        "decoder_num_attention_heads": 2,
    }
    return CLIPSegForImageSegmentation(
        CLIPSegConfig(text_config=TEXT, vision_config=vision, decoder_intermediate_size=16, **options)
    )


def owlvit(vision):
    return OwlViTForObjectDetection(OwlViTConfig(text_config=TEXT, vision_config=vision, projection_dim=32))


def owlv2(vision):
    return Owlv2ForObjectDetection(Owlv2Config(text_config=TEXT, vision_config=vision, projection_dim=32))


def llava(vision):
    text = LlamaConfig(**LANGUAGE, num_key_value_heads=2)
    vision = {**vision, "model_type": "clip_vision_model"}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=16)
    return LlavaForConditionalGeneration(config)


def git(vision):
    return GitForCausalLM(GitConfig(vision_config=vision, **LANGUAGE, max_position_embeddings=64))


def dual(vision):
    text = BertConfig(**LANGUAGE, max_position_embeddings=32)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(CLIPVisionConfig(**vision), text, projection_dim=8)
    return VisionTextDualEncoderModel(config)


def classifier(vision):
    values: dict[str, Any] = {"projection_dim": 16, "num_labels": 5}
    return CLIPForImageClassification(CLIPConfig(text_config=TEXT, vision_config=vision, **values))


FOREIGN: dict[str, Any] = {
    "clipseg": clipseg,
    "owlvit": owlvit,
    "owlv2": owlv2,
    "llava": llava,
    "git": git,
    "dual": dual,
    "classifier": classifier,
}
STOCK: dict[str, Any] = {"clip": CLIPModel, "tower": CLIPVisionModel, "projection": CLIPVisionModelWithProjection}
NAMES = [*FOREIGN, *STOCK]


def build(name, clip):
    """Return a host with the weights of `clip` planted."""
    torch.manual_seed(3)
    if name == "clip":
        return copy.deepcopy(clip)
    if name in STOCK:
        model = STOCK[name](clip.config.vision_config)
        model.load_state_dict(
            {
                key if name == "projection" else key.removeprefix("vision_model."): value
                for key, value in clip.state_dict().items()
                if key.startswith("vision_model." if name == "tower" else ("vision_model.", "visual_projection."))
            }
        )
        return model.eval()
    model = FOREIGN[name](vision_of(clip)).eval()
    host = HostTower.of(model)
    planted = {
        host.name_of(key.removeprefix("vision_model.")): value
        for key, value in clip.state_dict().items()
        if key.startswith("vision_model.")
    }
    if host.projection is not None:
        planted[host.name_of("visual_projection.weight")] = clip.visual_projection.weight.detach()
    assert not model.load_state_dict(planted, strict=False).unexpected_keys
    return model


@torch.no_grad()
def answer(name, model, pixels=None):
    """Return what a host answers to two images, random ones by default."""
    if pixels is None:
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    if name == "clipseg":
        return model(input_ids=IDS, pixel_values=pixels).logits
    if name in ("owlvit", "owlv2"):
        found = model(input_ids=IDS, pixel_values=pixels)
        return torch.cat([found.logits.flatten(), found.pred_boxes.flatten()])
    if name == "llava":
        ids = torch.tensor([[1, *[IMAGE_TOKEN] * 16, 5, 6]] * 2)
        return model(input_ids=ids, pixel_values=pixels).logits
    if name == "git":
        return model(input_ids=IDS % 50, pixel_values=pixels).logits
    if name == "dual":
        return model(input_ids=IDS, pixel_values=pixels).logits_per_image
    if name == "clip":
        return model.get_image_features(pixel_values=pixels).pooler_output
    field = {"tower": "last_hidden_state", "projection": "image_embeds", "classifier": "logits"}[name]
    return getattr(model(pixel_values=pixels), field)


@pytest.fixture(scope="module")
def subnetwork_of(make_tiny_clip, make_tiny_images):
    """Return a function (keep, structures) that gives `tiny_clip`'s subnetwork; every one is pruned once."""
    made: dict[Any, Any] = {}

    def give(keep=0.65, structures=None):
        if (keep, structures) not in made:
            options = {} if structures is None else {"structures": structures}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Only 8 of the 40 calibration images differ")
                result = prune_model(make_tiny_clip(), make_tiny_images() * 5, PruningConfig(keep=keep, **options))
            made[keep, structures] = result.subnetwork
        return copy.deepcopy(made[keep, structures])

    return give


@pytest.fixture
def subnetwork(subnetwork_of):
    return subnetwork_of()


def moved(model, by=0.3):
    """Train a host a little: its tower is no longer that of the CLIP."""
    with torch.no_grad():
        for parameter in HostTower.of(model).tower.parameters():
            parameter.add_(by * parameter.std().nan_to_num() * torch.randn_like(parameter))
    return model


# Equal weights: the compensated tower


@pytest.mark.parametrize("name", NAMES)
def test_nothing_changes_at_keep_one(tiny_clip, subnetwork_of, name):
    target = build(name, tiny_clip)
    before = answer(name, target)
    result = subnetwork_of(keep=1.0).apply_to(target)
    assert torch.equal(answer(name, result.model), before)
    assert result.report.weights == "compensated weights"
    assert result.report.matches["equal"] == len(HostTower.of(target).tensors())


@pytest.mark.parametrize("name", NAMES)
def test_the_tower_is_the_compensated_one_and_really_smaller(tiny_clip, subnetwork, name):
    target = build(name, tiny_clip)
    state = {key: value.clone() for key, value in target.state_dict().items()}
    before = answer(name, target)
    result = subnetwork.apply_to(target, drop_unused=False)
    found = HostTower.of(result.model).tensors()
    expected = dict(subnetwork.tensors)
    if "visual_projection.weight" not in found:
        expected.pop("visual_projection.weight")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    kept = sum(value.numel() for value in expected.values())
    dense = sum(value.numel() for value in HostTower.of(target).tensors().values())
    assert (result.report.params, result.report.dense_params) == (kept, dense)
    assert kept < 0.75 * dense
    assert (
        sum(p.numel() for p in target.parameters()) - sum(p.numel() for p in result.model.parameters()) == dense - kept
    )
    assert result.report.macs < 0.67 * result.report.dense_macs
    after = answer(name, result.model)
    assert after.shape == before.shape
    assert not torch.equal(after, before)
    assert all(torch.equal(value, state[key]) for key, value in target.state_dict().items())  # not touched


def test_the_pruned_clip_and_the_transferred_one_are_the_same(tiny_clip, tiny_images):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Only 8 of the 40 calibration images differ")
        pruned = prune_model(tiny_clip, tiny_images * 5, PruningConfig(keep=0.6))
    transferred = pruned.subnetwork.apply_to(tiny_clip).model
    assert type(transferred) is SparseCLIPModel
    state = pruned.model.state_dict()
    assert state.keys() == transferred.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in transferred.state_dict().items())


def test_half_precision_is_close_and_takes_the_compensated_weights(tiny_clip, subnetwork):
    target = build("clipseg", tiny_clip).to(torch.float16)
    report = subnetwork.apply_to(target).report
    assert report.weights == "compensated weights"
    assert report.matches["close"] > 0
    assert report.matches["different"] == 0
    assert max(tensor.difference or 0 for tensor in report.tensors) < 1e-3


def test_an_older_subnetwork_without_samples_calls_rounded_weights_different(tiny_clip, subnetwork, tmp_path):
    subnetwork.save_pretrained(tmp_path / "sub")
    path = tmp_path / "sub/subnetwork.json"
    values = json.loads(path.read_text())
    del values["source_samples"]
    path.write_text(json.dumps(values))
    report = Subnetwork.from_pretrained(tmp_path / "sub").apply_to(build("clipseg", tiny_clip).half()).report
    assert report.matches["different"] > 0
    assert report.weights == "plan alone"


def test_what_the_target_has_no_place_for_is_listed(tiny_clip, subnetwork):
    report = subnetwork.apply_to(build("owlvit", tiny_clip)).report
    assert [(tensor.name, tensor.action) for tensor in report.skipped] == [("visual_projection.weight", "skipped")]
    assert "does not use CLIP's projection" in report.skipped[0].reason
    assert subnetwork.apply_to(build("clipseg", tiny_clip)).report.skipped == ()


def test_tensors_are_named_as_in_the_target(tiny_clip, subnetwork):
    target = build("owlvit", tiny_clip)
    report = subnetwork.apply_to(target).report
    names = {tensor.name for tensor in report.tensors if tensor.action != "skipped"}
    assert names < set(target.state_dict())
    assert "owlvit.vision_model.pre_layernorm.weight" in names


# Other weights: the plan, and a refit


@pytest.mark.parametrize("name", ["clipseg", "owlvit", "git", "llava", "clip"])
def test_other_weights_get_the_plan_and_a_refit_brings_them_closer(tiny_clip, tiny_images, subnetwork, name):
    target = moved(build(name, tiny_clip))
    pixels = torch.stack([center_crop(image, CLIPImageProcessorPil(), 32) for image in tiny_images[:2]])
    before = answer(name, target, pixels)
    plain = subnetwork.apply_to(target, drop_unused=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Only 8 of the 40 calibration images differ")
        refitted = subnetwork.apply_to(target, tiny_images * 5, drop_unused=False)
    assert (plain.report.weights, refitted.report.weights) == ("plan alone", "plan, refitted")
    assert "no images were given" in plain.report.notes[0]
    assert refitted.report.images == 40
    shapes = [{k: v.shape for k, v in HostTower.of(each.model).tensors().items()} for each in (plain, refitted)]
    assert shapes[0] == shapes[1]
    assert shapes[0] == {k: subnetwork.tensors[k].shape for k in shapes[0]}
    errors = [float((answer(name, each.model, pixels) - before).square().mean()) for each in (plain, refitted)]
    assert errors[1] < errors[0]


def test_without_refit_the_images_are_not_looked_at(tiny_clip, subnetwork):
    target = moved(build("clipseg", tiny_clip))
    assert subnetwork.apply_to(target, "no such folder", refit=False).report.weights == "plan alone"


def test_the_plan_alone_equals_slicing_where_no_head_is_narrowed(tiny_clip, subnetwork_of):
    other = moved(build("tower", tiny_clip))
    subnetwork = subnetwork_of(structures=("heads", "mlp"))
    found = subnetwork.apply_to(other).model.state_dict()
    expected = slice_model(other, subnetwork.plan).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# Attentions


def attentions(name, model):
    """Return the tower's attentions as the host returns them."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if name in ("tower", "projection", "classifier"):
            return model(pixel_values=pixels, output_attentions=True).attentions
        if name in ("git", "llava"):  # the whole host returns those of its language model alone
            tower = model.git.image_encoder if name == "git" else model.model.vision_tower
            return tower(pixel_values=pixels, output_attentions=True).attentions
        return model(input_ids=IDS, pixel_values=pixels, output_attentions=True).vision_model_output.attentions


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_attentions_are_those_of_the_stock_host(tiny_clip, subnetwork_of, name, asked_before):
    target = build(name, tiny_clip)
    target.set_attn_implementation("eager")
    fresh = copy.deepcopy(target)
    expected = attentions(name, target)
    assert [tuple(each.shape) for each in expected] == [(2, 4, 17, 17)] * 3
    dense = subnetwork_of(keep=1.0)
    model = dense.apply_to(target if asked_before else fresh, drop_unused=False).model
    twice = dense.apply_to(model, drop_unused=False).model
    for each in (model, copy.deepcopy(model), twice):
        found = attentions(name, each)
        assert len(found) == 3
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_attentions_have_the_heads_that_are_left(tiny_clip, subnetwork_of, tmp_path, name):
    model = subnetwork_of(keep=0.5).apply_to(build(name, tiny_clip), drop_unused=False).model
    save_transferred(model, tmp_path / "out")
    for each in (model, load_transferred(tmp_path / "out")):
        each.set_attn_implementation("eager")
        heads = [layer.self_attn.num_heads for layer in HostTower.of(each).layers]
        assert min(heads) < 4
        found = attentions(name, each)
        assert [tuple(one.shape) for one in found] == [(2, count, 17, 17) for count in heads]
        for one in found:
            torch.testing.assert_close(one.sum(-1), torch.ones(one.shape[:-1]))


@pytest.mark.parametrize("name", ["clipseg", "owlvit", "git", "llava"])
def test_a_layer_without_heads_has_empty_attentions(tiny_clip, name):
    model = build(name, tiny_clip)
    host = HostTower.of(model)
    values = host.sparse_config().to_dict()
    del values["model_type"]
    host.install(SparseCLIPVisionConfig(**{**values, "per_layer_config": {1: {"num_attention_heads": 0}}}))
    model.set_attn_implementation("eager")
    assert [one.shape[1] for one in attentions(name, model)] == [4, 0, 4]


def test_narrowed_hosts_can_be_pickled(tiny_clip, subnetwork):
    model = subnetwork.apply_to(build("clipseg", tiny_clip), drop_unused=False).model
    again = pickle.loads(pickle.dumps(model))
    assert type(HostTower.of(again).layers[0].self_attn) is type(HostTower.of(model).layers[0].self_attn)
    assert torch.equal(answer("clipseg", again), answer("clipseg", model))


# Blocks that nothing reads


@pytest.mark.parametrize(("name", "gone"), [("clipseg", 1), ("llava", 1), ("owlvit", 0), ("git", 0), ("dual", 0)])
def test_unused_blocks_are_dropped_bit_for_bit(tiny_clip, subnetwork, name, gone):
    target = build(name, tiny_clip)
    whole, cut = (subnetwork.apply_to(target, drop_unused=drop) for drop in (False, True))
    assert torch.equal(answer(name, cut.model), answer(name, whole.model))
    assert len(HostTower.of(cut.model).layers) == 3 - gone
    assert whole.report.cuts == ()
    assert sum(each.blocks for each in cut.report.cuts) == gone
    numbers = [sum(p.numel() for p in each.model.parameters()) for each in (whole, cut)]
    assert numbers[0] - numbers[1] == sum(each.params for each in cut.report.cuts)
    assert (cut.report.macs < whole.report.macs) == bool(gone)


@pytest.mark.parametrize("mode", ["maskclip", "clearclip", "naclip"])
def test_reduced_segmenters_lose_the_last_mlp_bit_for_bit(tiny_clip_folder, tmp_path, mode):
    model = DenseCLIPForSegmentation.from_pretrained(tiny_clip_folder, segmentation_mode=mode)
    pixels = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        before = model(pixels).dense_embeds
    params = model.num_parameters()
    (cut,) = drop_unused(model)
    assert params - model.num_parameters() == cut.params == 32 * 64 * 2 + 64 + 32 + 64
    model.save_pretrained(tmp_path / "cut")
    loaded = DenseCLIPForSegmentation.from_pretrained(tmp_path / "cut")
    with torch.no_grad():
        assert torch.equal(model(pixels).dense_embeds, before)
        torch.testing.assert_close(loaded(pixels).dense_embeds, before)
    assert drop_unused(model) == ()
    for each in (model, loaded):
        with pytest.raises(ValueError, match=r"mode is 'sclip' with the last block's MLP, which was dropped"):
            each(pixels, mode="sclip")


def test_modes_that_read_the_last_mlp_keep_it(tiny_clip_folder):
    model = DenseCLIPForSegmentation.from_pretrained(tiny_clip_folder, segmentation_mode="vanilla")
    assert drop_unused(model) == ()


def test_a_deeper_reading_drops_nothing(tiny_clip, subnetwork):
    target = clipseg(vision_of(tiny_clip))
    target.config.extract_layers = [0, 2]
    assert subnetwork.apply_to(target).report.cuts == ()


def test_what_would_read_dropped_blocks_is_refused(tiny_clip, subnetwork, tmp_path):
    model = subnetwork.apply_to(build("clipseg", tiny_clip)).model
    pixels = torch.randn(1, 3, 32, 32)
    save_transferred(model, tmp_path / "out")
    for each in (model, load_transferred(tmp_path / "out")):
        with pytest.raises(
            ValueError, match=r"conditional_pixel_values is given to a CLIPSegForImageSegmentation whose"
        ):
            each(pixel_values=pixels, conditional_pixel_values=pixels)
    whole = subnetwork.apply_to(build("clipseg", tiny_clip), drop_unused=False).model
    assert bool(whole(pixel_values=pixels, conditional_pixel_values=pixels).logits.isfinite().all())
    llava_model = subnetwork.apply_to(build("llava", tiny_clip)).model
    with pytest.raises(ValueError, match=r"vision_feature_layer is given to a LlavaForConditionalGeneration"):
        llava_model(input_ids=torch.tensor([[IMAGE_TOKEN] * 16]), pixel_values=pixels, vision_feature_layer=-1)


# Disk


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_saved_hosts_load_as_they_were(tiny_clip, subnetwork, tmp_path, name, drop):
    result = subnetwork.apply_to(build(name, tiny_clip), drop_unused=drop)
    save_transferred(result.model, tmp_path / "out", report=result.report)
    loaded = load_transferred(tmp_path / "out")
    assert type(loaded) is type(result.model)
    state = result.model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    torch.testing.assert_close(answer(name, loaded), answer(name, result.model), atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "out/transfer_report.json").read_text())["weights"] == "compensated weights"


def test_llava_loads_by_plain_from_pretrained(tiny_clip, subnetwork, tmp_path):
    result = subnetwork.apply_to(build("llava", tiny_clip))
    result.model.save_pretrained(tmp_path / "out")
    stock: Any = LlavaForConditionalGeneration
    loaded, info = stock.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(answer("llava", loaded.eval()), answer("llava", result.model), atol=1e-5, rtol=1e-5)


def test_plain_from_pretrained_never_loads_a_narrowed_host_by_halves(tiny_clip, subnetwork, tmp_path):
    save_transferred(subnetwork.apply_to(build("clipseg", tiny_clip)).model, tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"mismatch"):
        CLIPSegForImageSegmentation.from_pretrained(tmp_path / "out")


def test_missing_and_foreign_weights_are_refused(tiny_clip, subnetwork, tmp_path):
    save_transferred(subnetwork.apply_to(build("git", tiny_clip)).model, tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    key = "git.image_encoder.vision_model.encoder.layers.0.mlp.fc1.weight"
    save_file({k: v for k, v in tensors.items() if k != key}, path)
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights and holds 0"):
        load_transferred(tmp_path / "out")
    save_file({**tensors, "other": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"lacks 0 of the model's weights and holds 1 that it does not know.*other"):
        load_transferred(tmp_path / "out")
    save_file({**tensors, key: tensors[key][:-1].clone()}, path)
    with pytest.raises(ValueError, match=r"do not have the shapes that its config.json states"):
        load_transferred(tmp_path / "out")


def test_a_trained_host_is_saved_with_what_it_learned(tiny_clip, subnetwork, tmp_path):
    model = subnetwork.apply_to(build("owlvit", tiny_clip)).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=IDS, pixel_values=torch.randn(2, 3, 32, 32)).logits.sum().backward()
    optimizer.step()
    save_transferred(model.eval(), tmp_path / "out")
    torch.testing.assert_close(answer("owlvit", load_transferred(tmp_path / "out")), answer("owlvit", model))


# What does not fit


def test_a_tower_of_another_size_is_refused_with_both(make_tiny_clip, subnetwork):
    other = make_tiny_clip(hidden_size=48)
    with pytest.raises(ValueError, match=r"has hidden_size 48, .* made from one with hidden_size 32, intermediate"):
        subnetwork.apply_to(other)
    with pytest.raises(ValueError, match=r"patch_size 16.* made from one with .*patch_size 8"):
        subnetwork.apply_to(clipseg(vision_of(other, hidden_size=32, patch_size=16)))


def test_a_pruned_target_is_refused(tiny_clip, subnetwork):
    for name in ("clip", "clipseg", "llava"):
        model = subnetwork.apply_to(build(name, tiny_clip)).model
        with pytest.raises(ValueError, match=r"is pruned already"):
            subnetwork.apply_to(model)


def test_unknown_classes_need_a_prefix(tiny_clip, subnetwork):
    class Wrapped(CLIPSegForImageSegmentation.__mro__[1]):  # some PreTrainedModel
        def __init__(self, config):
            super().__init__(config)
            self.eyes = build("tower", tiny_clip)

        def forward(self, pixel_values):
            return self.eyes(pixel_values).last_hidden_state

    model = Wrapped(clipseg(vision_of(tiny_clip)).config).eval()
    with pytest.raises(TypeError, match=r"The model is a Wrapped. Known hosts of a CLIP tower are CLIPModel,"):
        subnetwork.apply_to(model)
    with pytest.raises(TypeError, match=r"has no module 'ears'. .* Modules at its top are eyes"):
        subnetwork.apply_to(model, prefix="ears")
    found = subnetwork.apply_to(model, prefix="eyes").model
    tower = subnetwork.apply_to(build("tower", tiny_clip)).model
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found(pixels), tower(pixels).last_hidden_state)


def test_fused_projections_and_other_transformers_are_refused(subnetwork):
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    blip = BlipVisionModel(BlipVisionConfig(**sizes, image_size=32, patch_size=8))
    with pytest.raises(TypeError, match=r"it has one fused layer 'self_attn.qkv'"):
        subnetwork.apply_to(blip, prefix="")
    siglip = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8))
    with pytest.raises(TypeError, match=r"is not CLIP's: it has no class_embedding"):
        subnetwork.apply_to(siglip, prefix="" if hasattr(siglip, "encoder") else "vision_model")
    with pytest.raises(TypeError, match=r"it has no encoder.layers"):
        subnetwork.apply_to(blip, prefix="post_layernorm")


def test_broken_weights_are_refused(tiny_clip, subnetwork):
    target = build("clipseg", tiny_clip)
    with torch.no_grad():
        HostTower.of(target).layers[0].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"finite"):
        subnetwork.apply_to(target)


def test_inplace_changes_the_target_itself(tiny_clip, subnetwork):
    target = build("git", tiny_clip)
    assert subnetwork.apply_to(target, inplace=True).model is target
    assert HostTower.of(target).layers[0].mlp.fc1.out_features < 64
