"""The DeepLabV3+ head on a CLIP: shapes, loss, gradients, options, and its way through disk."""

import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, interpolate, normalize
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from hf_opentrans import (
    DeepLabV3PlusConfig,
    DeepLabV3PlusForSegmentation,
    DenseCLIPForSegmentation,
    PruningConfig,
    SparseCLIPConfig,
    SparseCLIPModel,
    Vocabulary,
    prune_model,
)

SMALL: dict[str, Any] = {"decoder_channels": 24, "skip_channels": 8, "atrous_rates": [1, 2]}
IGNORED = 255


def unit(*shape):
    return normalize(torch.randn(*shape), dim=-1)


def random_labels(batch, height, width, classes=3):
    """Return labels with a band of ignored pixels."""
    labels = torch.randint(0, classes, (batch, height, width))
    labels[:, : height // 4] = IGNORED
    return labels


def dense_clip(tiny_clip) -> Any:
    """Return the sparse class with the weights of a stock CLIP."""
    values = tiny_clip.config.to_dict()
    values.pop("model_type")
    model = SparseCLIPModel(SparseCLIPConfig(**values)).eval()
    model.load_state_dict(tiny_clip.state_dict())
    return model


def pruned_clip(tiny_clip, images) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Only 8 of the 40 calibration images differ")
        return prune_model(tiny_clip, images * 5, PruningConfig(keep=0.6)).model


@pytest.fixture
def clip(tiny_clip):
    return dense_clip(tiny_clip)


@pytest.fixture
def model(clip):
    """Return a segmenter in training mode whose head has no zeros: they would hide errors."""
    made = DeepLabV3PlusForSegmentation.from_clip(clip, **SMALL)
    with torch.no_grad():
        for name, parameter in made.head.named_parameters():
            if parameter.ndim == 1 or name == "project.weight":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made.train()


def by_hand(full_logits, labels):
    """Return the mean of -log softmax at the label over the counted pixels, one pixel at a time."""
    total, count = 0.0, 0
    rows = full_logits.permute(0, 2, 3, 1).flatten(0, 2)
    for logits, label in zip(rows, labels.flatten(), strict=True):
        if label != IGNORED:
            total, count = total + float(logits.exp().sum().log() - logits[label]), count + 1
    return total / count


# Shapes and embeddings


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24), (8, 56)])
def test_logits_are_twice_as_fine_as_the_patches(model, size):
    outputs = model(torch.randn(2, 3, *size), text_embeddings=unit(5, 16))
    grid = (2 * size[0] // 8, 2 * size[1] // 8)
    assert outputs.logits.shape == (2, 5, *grid)
    assert outputs.dense_embeds.shape == (2, 16, *grid)
    assert outputs.loss is None


def test_embeddings_have_unit_length_and_logits_are_scaled_cosines(model):
    text = unit(4, 16)
    with torch.no_grad():
        model.head.logit_scale.fill_(7.0).log_()
        outputs = model(torch.randn(2, 3, 24, 40), text_embeddings=text)
    torch.testing.assert_close(outputs.dense_embeds.norm(dim=1), torch.ones(2, 6, 10))
    expected = torch.stack([7 * (outputs.dense_embeds * row[None, :, None, None]).sum(1) for row in text], 1)
    torch.testing.assert_close(outputs.logits, expected)


def test_without_text_there_are_only_embeddings(model):
    outputs = model(torch.randn(1, 3, 32, 32))
    assert outputs.logits is None
    assert outputs.loss is None
    assert outputs.dense_embeds.shape == (1, 16, 8, 8)


def test_rows_of_the_grid_are_rows_of_the_image(model):
    """A change in the lower right corner of a wide image changes the features there."""
    pixels = torch.randn(1, 3, 24, 40)
    changed = pixels.clone()
    changed[..., 16:, 32:] += 3
    with torch.no_grad():
        moved = [model.encode(image)[1] for image in (pixels, changed)]
    distance = (moved[0] - moved[1]).norm(dim=1)[0]
    assert distance.shape == (3, 5)
    assert int(distance.argmax()) == 14  # row 2, column 4


def test_an_encoded_vocabulary_stands_for_its_embeddings(model, tiny_tokenizer):
    pixels = torch.randn(1, 3, 32, 32)
    vocabulary = model.eval().encode_vocabulary(Vocabulary(["cat", "sofa; couch"]), tiny_tokenizer)
    with torch.no_grad():
        outputs = model(pixels, vocabulary=vocabulary)
        expected = model(pixels, text_embeddings=vocabulary.text_embeddings)
    assert outputs.logits.shape == (1, 3, 8, 8)
    assert torch.equal(outputs.logits, expected.logits)
    assert outputs.vocabulary is vocabulary


def test_half_precision(model):
    pixels, text, labels = torch.randn(1, 3, 32, 32), unit(3, 16), random_labels(1, 32, 32)
    with torch.no_grad():
        expected = model(pixels, text_embeddings=text, labels=labels)
        model.to(torch.bfloat16)
        found = model(pixels.bfloat16(), text_embeddings=text, labels=labels)
    assert found.logits.dtype == torch.bfloat16
    assert found.loss.dtype == torch.float32  # summed in single precision
    torch.testing.assert_close(found.loss, expected.loss, atol=0.1, rtol=0)


# The loss


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (20, 52), (5, 3)])
def test_the_loss_is_the_cross_entropy_of_enlarged_logits(model, size):
    pixels, text, labels = torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, *size)
    with torch.no_grad():
        outputs = model(pixels, text_embeddings=text, labels=labels)
    full = interpolate(outputs.logits, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(outputs.loss, cross_entropy(full, labels, ignore_index=IGNORED))
    assert float(outputs.loss) == pytest.approx(by_hand(full, labels), rel=1e-5)


def test_ignored_pixels_do_not_count(model):
    pixels, text = torch.randn(2, 3, 32, 32), unit(3, 16)
    labels = random_labels(2, 8, 8)
    labels[1] = IGNORED
    with torch.no_grad():
        both = model(pixels, text_embeddings=text, labels=labels).loss
        first = model(pixels[:1], text_embeddings=text, labels=labels[:1]).loss
    torch.testing.assert_close(both, first)


def test_the_ignore_index_is_that_of_the_config(clip):
    model = DeepLabV3PlusForSegmentation.from_clip(clip, **SMALL, semantic_loss_ignore_index=-100)
    pixels, text, labels = torch.randn(1, 3, 32, 32), unit(3, 16), torch.randint(0, 3, (1, 8, 8))
    labels[:, 3:] = -100
    with torch.no_grad():
        outputs = model(pixels, text_embeddings=text, labels=labels)
    torch.testing.assert_close(outputs.loss, cross_entropy(outputs.logits[:, :, :3], labels[:, :3]))
    with pytest.raises(ValueError, match="Labels reach from 0 to 255"):
        model(pixels, text_embeddings=text, labels=255 * torch.eye(8).long()[None])


def test_a_batch_of_ignored_pixels_has_no_loss(model):
    outputs = model(torch.randn(2, 3, 32, 32), text_embeddings=unit(3, 16), labels=torch.full((2, 32, 32), IGNORED))
    assert float(outputs.loss.detach()) == 0
    outputs.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and bool((gradient == 0).all()) for gradient in gradients)


def test_a_silent_decoder_has_a_bounded_gradient(clip):
    """A zero vector has no direction: the gradient was 1e12 there, and clipping then lost the whole step."""
    made: Any = DeepLabV3PlusForSegmentation.from_clip(clip, **SMALL).train()
    with torch.no_grad():
        made.head.decoder[1][1].bias.fill_(-100.0)  # no channel of any position is above zero
    outputs = made(torch.randn(2, 3, 32, 32), text_embeddings=unit(3, 16), labels=random_labels(2, 8, 8))
    outputs.loss.backward()
    assert 0 < float(made.head.project.bias.grad.norm()) < 100


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_other_integer_types(model, dtype):
    pixels, text, labels = torch.randn(1, 3, 32, 32), unit(3, 16), random_labels(1, 16, 16)
    with torch.no_grad():
        expected = model(pixels, text_embeddings=text, labels=labels).loss
        assert torch.equal(model(pixels, text_embeddings=text, labels=labels.to(dtype)).loss, expected)


# Gradients


def backward(model, pixels, text, labels):
    loss = model(pixels, text_embeddings=text, labels=labels).loss
    loss.backward()
    return loss.detach()


def test_gradients_reach_head_and_tower_and_nothing_else(model):
    backward(model, torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 32, 32))
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    every = {name for name, _ in model.named_parameters() if name.startswith(("head.", "vision_model."))}
    # Softmax does not see what is added to all keys alike, so their biases have a gradient of rounding errors.
    keys = {name for name in every if name.endswith("k_proj.bias")}
    assert reached | keys == every
    others = [name for name, p in model.named_parameters() if name not in every and (p.requires_grad or p.grad)]
    assert others == []
    assert any(name.startswith("text_model.") for name, _ in model.named_parameters())


def test_a_frozen_tower_keeps_no_graph(model):
    seen = []
    model.vision_model.requires_grad_(False)
    model.head.register_forward_pre_hook(lambda _, maps: seen.extend(part.requires_grad for part in maps))
    backward(model, torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 32, 32))
    assert seen == [False, False, False]
    assert all(p.grad is None for p in model.vision_model.parameters())
    assert all(p.grad is not None for p in model.head.parameters())


def test_low_level_features_need_no_graph_below_the_trained_layers(model):
    """With layer 3 alone trained, the map of layer 1 is still free of a graph and those of layer 3 are not."""
    seen = []
    model.vision_model.requires_grad_(False)
    model.vision_model.encoder.layers[2].requires_grad_(True)
    model.head.register_forward_pre_hook(lambda _, maps: seen.extend(part.requires_grad for part in maps))
    backward(model, torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 32, 32))
    assert seen == [True, False, True]


def test_activation_checkpointing_changes_no_gradient(model):
    batch = (torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 32, 32))
    passes = []
    model.vision_model.encoder.layers[1].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    loss = backward(model, *batch)
    assert len(passes) == 1
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.activation_checkpointing_enable()
    torch.testing.assert_close(backward(model, *batch), loss, atol=1e-6, rtol=0)
    assert len(passes) == 3  # once more, and again on the way back
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)


# From a CLIP


@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_from_clip_copies_the_weights(tiny_clip, tiny_images, kind):
    clip = dense_clip(tiny_clip) if kind == "dense" else pruned_clip(tiny_clip, tiny_images)
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    trained = {name: p.requires_grad for name, p in clip.named_parameters()}
    config = clip.config.to_dict()
    model = DeepLabV3PlusForSegmentation.from_clip(clip, **SMALL)
    state = model.state_dict()
    assert {name for name in state if not name.startswith("head.")} == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    if kind == "pruned":
        assert clip.vision_model.num_parameters() < tiny_clip.vision_model.num_parameters()
    with torch.no_grad():  # a copy: no storage is shared
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(clip.state_dict()[name], value) for name, value in before.items())
    assert {name: p.requires_grad for name, p in clip.named_parameters()} == trained
    assert clip.config.to_dict() == config


@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_the_high_level_map_is_the_last_hidden_state_of_the_clip(tiny_clip, tiny_images, kind):
    clip = dense_clip(tiny_clip) if kind == "dense" else pruned_clip(tiny_clip, tiny_images)
    pixels, layer = torch.randn(2, 3, 24, 40), 2
    model = DeepLabV3PlusForSegmentation.from_clip(clip, **SMALL, low_level_layer=layer).eval()
    with torch.no_grad():
        features, low, _ = model.encode(pixels)
        tower = clip.vision_model(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
        high = clip.vision_model.post_layernorm(tower.last_hidden_state)
    for found, tokens in ((features, high), (low, tower.hidden_states[layer])):
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens[:, 1:], atol=1e-5, rtol=1e-5)


def test_from_a_segmenter_and_back_the_head_is_new(model, clip, tiny_clip_folder):
    dense = DenseCLIPForSegmentation.from_pretrained(tiny_clip_folder)
    torch.manual_seed(5)
    first = DeepLabV3PlusForSegmentation.from_clip(dense, **SMALL).state_dict()
    again = DeepLabV3PlusForSegmentation.from_clip(model, **SMALL).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first if not name.startswith("head."))
    name = "head.decoder.0.0.weight"
    assert not torch.equal(again[name], model.state_dict()[name])
    assert clip.state_dict().keys() <= first.keys()


def test_features_stand_for_their_images(model):
    pixels, text, labels = torch.randn(2, 3, 24, 40), unit(3, 16), random_labels(2, 24, 40)
    with torch.no_grad():
        expected = model(pixels, text_embeddings=text, labels=labels)
        features = model.encode(pixels)
        found = model(features=features, text_embeddings=text, labels=labels)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    for wrong in ({}, {"pixel_values": pixels, "features": features}):
        with pytest.raises(ValueError, match=r"The head reads one of them. Pass pixel_values, or features"):
            model(text_embeddings=text, **wrong)


def test_heads_train_on_kept_features(model):
    with torch.no_grad():
        features = model.encode(torch.randn(2, 3, 32, 32))
    model(features=features, text_embeddings=unit(3, 16), labels=random_labels(2, 32, 32)).loss.backward()
    assert all(p.grad is None for p in model.vision_model.parameters())
    assert any(p.grad is not None for p in model.head.parameters())


def test_the_precision_of_the_clip_is_kept(clip):
    model = DeepLabV3PlusForSegmentation.from_clip(clip.to(torch.bfloat16), **SMALL)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_head_is_drawn_from_the_seed(clip):
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(DeepLabV3PlusForSegmentation.from_clip(clip, **SMALL).state_dict()["head.decoder.0.0.weight"])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


# CLIP's own embeddings as the start


@pytest.mark.parametrize("mode", ["vanilla", "maskclip", "sclip", "clearclip", "naclip"])
def test_the_untrained_head_gives_the_dense_embeddings_of_the_clip(tiny_clip_folder, mode):
    dense = DenseCLIPForSegmentation.from_pretrained(tiny_clip_folder).eval()
    options = {**SMALL, "segmentation_mode": mode, "segmentation_logit_scale": 7.0}
    model = DeepLabV3PlusForSegmentation.from_clip(dense, **options).eval()
    pixels, text = torch.randn(2, 3, 24, 40), unit(5, 16)
    with torch.no_grad():
        tokens = dense.get_dense_features(pixels, mode)
        found = model(pixels, text_embeddings=text)
    twice = normalize(interpolate(tokens, scale_factor=2, mode="bilinear", align_corners=False), dim=1)
    torch.testing.assert_close(found.dense_embeds, twice, atol=1e-5, rtol=1e-5)
    cosines = torch.einsum("bdhw,qd->bqhw", found.dense_embeds, text)
    torch.testing.assert_close(found.logits, 7.0 * cosines, atol=1e-4, rtol=1e-4)


def test_one_step_moves_the_embeddings_away_from_those_of_the_clip(clip):
    model = DeepLabV3PlusForSegmentation.from_clip(clip, **SMALL).train()
    batch = (torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 32, 32))
    before = backward(model, *batch)
    moved = [name for name, p in model.head.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert {"project.weight", "project.bias", "logit_scale"} == set(moved)  # the rest waits for the first step
    torch.optim.SGD(model.head.parameters(), lr=1e-3).step()
    model.zero_grad()
    assert backward(model, *batch) < before
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.head.parameters())


def test_without_it_the_head_learns_the_embedding_from_scratch(clip):
    model = DeepLabV3PlusForSegmentation.from_clip(clip, **SMALL, clip_residual=False).eval()
    assert len(model.encode(torch.randn(1, 3, 32, 32))) == 2  # no dense embeddings
    assert float(model.head.logit_scale.detach().exp()) == pytest.approx(10)
    state = model.state_dict()
    assert bool(state["head.project.weight"].any())
    assert bool(state["head.project.bias"].any())


# Options


def test_options_shape_the_head(clip):
    options: dict[str, Any] = {
        "decoder_channels": 40,
        "skip_channels": 6,
        "atrous_rates": [2, 5, 7],
        "classifier_scale": 20.0,
    }
    model = DeepLabV3PlusForSegmentation.from_clip(clip, **options)
    head: Any = model.head
    assert [branch[0].kernel_size for branch in head.pyramid.branches] == [(1, 1), (3, 3), (3, 3), (3, 3)]
    assert [branch[0].dilation[0] for branch in head.pyramid.branches[1:]] == [2, 5, 7]
    assert head.pyramid.project[0].weight.shape == (40, 5 * 40, 1, 1)
    assert head.decoder[0][0].weight.shape == (40, 40 + 6, 3, 3)
    assert float(head.logit_scale.detach().exp()) == pytest.approx(20)
    assert model(torch.randn(1, 3, 32, 32)).dense_embeds.shape == (1, 16, 8, 8)


@pytest.mark.parametrize(("layer", "expected"), [(None, 1), (1, 1), (2, 2), (3, 3)])
def test_the_low_level_layer_is_counted_from_one(clip, layer, expected):
    model = DeepLabV3PlusForSegmentation.from_clip(clip, **SMALL, low_level_layer=layer).eval()
    kept = []
    model.vision_model.encoder.layers[expected - 1].register_forward_hook(lambda *args: kept.append(args[-1]))
    with torch.no_grad():
        _, low, _ = model.encode(torch.randn(1, 3, 32, 32))
    assert torch.equal(low.flatten(2).transpose(1, 2), kept[0][:, 1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_channels": 0}, "decoder_channels is 0. It must be positive"),
        ({"skip_channels": -1}, "skip_channels is -1. It must be positive"),
        ({"classifier_scale": 0.0}, "classifier_scale is 0.0. It must be positive"),
        ({"atrous_rates": []}, r"atrous_rates is \[\]. It must hold positive integers"),
        ({"atrous_rates": [3, 0]}, r"atrous_rates is \[3, 0\]. It must hold positive integers"),
        ({"low_level_layer": 0}, r"low_level_layer is 0. It must lie in \[1, 3\]"),
        ({"low_level_layer": 4}, r"low_level_layer is 4. It must lie in \[1, 3\]"),
    ],
)
def test_impossible_options_are_refused(clip, options, message):
    with pytest.raises(Exception, match=message) as caught:
        DeepLabV3PlusForSegmentation.from_clip(clip, **{**SMALL, **options})
    causes = (caught.value, caught.value.__cause__)  # huggingface_hub wraps what its validation raises
    assert any(isinstance(cause, ValueError) for cause in causes)


@pytest.mark.parametrize("channels", [8, 16])
def test_narrow_decoders_take_a_single_image(clip, channels):
    model = DeepLabV3PlusForSegmentation.from_clip(clip, decoder_channels=channels)
    assert model(torch.randn(1, 3, 32, 32)).dense_embeds.shape == (1, 16, 8, 8)


@pytest.mark.parametrize(
    "channels",
    [
        16,
        32,
    ],
)
def test_the_pooled_branch_sees_the_image(clip, channels):
    head = DeepLabV3PlusForSegmentation.from_clip(clip, decoder_channels=channels).head
    pooled = []
    head.pyramid.pooled.register_forward_hook(lambda *args: pooled.append(args[-1]))
    with torch.no_grad():
        head.pyramid(torch.randn(2, 32, 4, 4))
    assert not torch.allclose(pooled[0][0], pooled[0][1], atol=1e-3)


# Errors of the forward pass


def test_wrong_labels_are_refused(model):
    pixels, text = torch.randn(2, 3, 32, 32), unit(3, 16)
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    with pytest.raises(ValueError, match=r"Labels reach from 0 to 3. They must lie in \[0, 2\]"):
        model(pixels, text_embeddings=text, labels=labels + 3 * torch.eye(8).long())
    with pytest.raises(ValueError, match="Labels reach from -1 to 0"):
        model(pixels, text_embeddings=text, labels=labels - torch.eye(8).long())
    for wrong in (labels[:1], labels[0], labels[:, None]):
        with pytest.raises(ValueError, match=r"They must be \(batch_size, height, width\) with batch_size 2"):
            model(pixels, text_embeddings=text, labels=wrong)
    with pytest.raises(ValueError, match="There are labels and no text"):
        model(pixels, labels=labels)


def test_wrong_images_and_texts_are_refused(model):
    with pytest.raises(ValueError, match=r"The image is 30 x 32 pixels. Both sides must be multiples of the patch"):
        model(torch.randn(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"The vocabulary has no text embeddings. It must be encoded"):
        model(torch.randn(1, 3, 32, 32), vocabulary=Vocabulary(["cat"]))


# Disk


def outputs_of(model, pixels, text, labels):
    # A copy in memory: memory-mapped weights are aligned otherwise and round otherwise.
    copied = DeepLabV3PlusForSegmentation(model.config).eval()
    copied.load_state_dict(model.state_dict())
    with torch.no_grad():
        return copied(pixels, text_embeddings=text, labels=labels)


@pytest.mark.parametrize("kind", ["dense", "pruned"])
@pytest.mark.parametrize("auto", [False, True])
def test_saved_models_load_as_they_were(tmp_path, tiny_clip, tiny_images, kind, auto):
    clip = dense_clip(tiny_clip) if kind == "dense" else pruned_clip(tiny_clip, tiny_images)
    options = {**SMALL, "low_level_layer": 2, "classifier_scale": 3.0, "semantic_loss_ignore_index": 9}
    model = DeepLabV3PlusForSegmentation.from_clip(clip, **options)
    with torch.no_grad():
        model.head.logit_scale.add_(1)
    model.save_pretrained(tmp_path)
    kind_of = AutoModelForSemanticSegmentation if auto else DeepLabV3PlusForSegmentation
    loaded = kind_of.from_pretrained(tmp_path)
    assert type(loaded) is DeepLabV3PlusForSegmentation
    assert all(getattr(loaded.config, name) == value for name, value in options.items())
    batch = (torch.randn(2, 3, 24, 40), unit(3, 16), torch.randint(0, 3, (2, 24, 40)))
    expected, found = outputs_of(model, *batch), outputs_of(loaded, *batch)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logits, expected.logits)


def test_saved_configs_equal_those_that_were_built(tmp_path, model):
    model.config.save_pretrained(tmp_path)
    assert DeepLabV3PlusConfig.from_pretrained(tmp_path) == model.config


def test_loaded_models_train_the_same_parameters(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = DeepLabV3PlusForSegmentation.from_pretrained(tmp_path)
    trained = [{name for name, p in each.named_parameters() if p.requires_grad} for each in (model, loaded)]
    assert trained[0] == trained[1]
    assert {name.split(".")[0] for name in trained[1]} == {"head", "vision_model"}


def test_the_config_is_found_by_its_type(tmp_path, model):
    model.config.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DeepLabV3PlusConfig


def test_a_plain_clip_has_no_head_to_load(tmp_path, tiny_clip_folder, model):
    with pytest.raises(
        ValueError, match=r"holds a model of type 'clip'. DeepLabV3PlusConfig reads sparse_clip_deeplab"
    ):
        DeepLabV3PlusForSegmentation.from_pretrained(tiny_clip_folder)
    with pytest.raises(
        ValueError, match=r"lacks \d+ of the weights that DeepLabV3PlusForSegmentation needs, .*head\."
    ):
        DeepLabV3PlusForSegmentation.from_pretrained(tiny_clip_folder, config=model.config)


def test_a_missing_head_weight_is_refused(tmp_path, model):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights = {name: value.clone() for name, value in weights.items() if name != "head.project.bias"}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the weights .* among them head.project.bias"):
        DeepLabV3PlusForSegmentation.from_pretrained(tmp_path)
