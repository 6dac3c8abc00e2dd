"""FC-CLIP on a frozen CLIP: both classifiers, their ensemble, what is trained, and its way through disk."""

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from hf_opentrans import OpenVocabularyProcessor, SparseCLIPConfig, SparseCLIPModel, Vocabulary
from hf_opentrans.models.configuration_fcclip import FCCLIPConfig
from hf_opentrans.models.modeling_fcclip import FCCLIPForSegmentation, geometric_ensemble
from hf_opentrans.models.modeling_mask_queries import LOWEST_LOGIT, TextClasses, hard_mask_pool, semantic_logits

SMALL: dict[str, Any] = {
    "hidden_dim": 32,
    "num_queries": 6,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward_dim": 48,
    "num_attention_heads": 4,
    "train_num_points": 64,
}
IGNORED = 255
FROZEN = ("vision_model.", "text_model.", "visual_projection.", "text_projection.", "logit_scale")


def unit(*shape):
    return normalize(torch.randn(*shape), dim=-1)


def random_labels(batch, height, width, classes=3):
    """Return labels with a band of ignored pixels."""
    labels = torch.randint(0, classes, (batch, height, width))
    labels[:, : height // 4] = IGNORED
    return labels


@pytest.fixture
def clip(tiny_clip) -> Any:
    """Return the sparse class with the weights of a stock CLIP."""
    values = tiny_clip.config.to_dict()
    values.pop("model_type")
    model = SparseCLIPModel(SparseCLIPConfig(**values)).eval()
    model.load_state_dict(tiny_clip.state_dict())
    return model


@pytest.fixture
def model(clip):
    """Return a segmenter in evaluation mode whose head has no zeros: they would hide errors."""
    made = FCCLIPForSegmentation.from_clip(clip, **SMALL)
    with torch.no_grad():
        for parameter in made.head.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def uneven_clip(tiny_clip, **options) -> Any:
    """Return a CLIP with random weights whose layers differ, as pruning leaves them."""
    values = tiny_clip.config.to_dict()
    values.pop("model_type")
    layers = {0: {"num_attention_heads": 2, "intermediate_size": 20}, 1: {"v_head_dim": 5}, 2: {"skip": ["mlp"]}}
    tower = {**values.pop("vision_config"), "model_type": "sparse_clip_vision_model", "per_layer_config": layers}
    return SparseCLIPModel(SparseCLIPConfig(**values, vision_config=tower, **options)).eval()


def clip_weights(model, vocabulary, count) -> Any:
    text = TextClasses(torch.zeros(count, 16), torch.arange(count), count)
    return model._clip_weights(vocabulary, text)


# The ensemble


def test_the_ensemble_by_hand():
    """One seen class, one unseen class, and "no object"."""
    first, second = (1.2, -0.3, 0.5), (0.4, 2.0)
    found = geometric_ensemble(
        torch.tensor([[first]]), torch.tensor([[second]]), torch.tensor([0.4, 0.8]), torch.tensor([[True]])
    )
    raised = [math.exp(x) for x in first]
    void = raised[2] / sum(raised)
    p_in = [x / sum(raised[:2]) for x in raised[:2]]
    p_out = [math.exp(x) / sum(math.exp(y) for y in second) for x in second]
    seen = math.log(p_in[0] ** 0.6 * p_out[0] ** 0.4)
    unseen = math.log(p_in[1] ** (1 - 0.8) * p_out[1] ** 0.8)
    share = math.exp(seen) / (math.exp(seen) + math.exp(unseen))
    expected = [math.log(share * (1 - void)), math.log((1 - share) * (1 - void)), math.log(void)]
    torch.testing.assert_close(found.flatten(), torch.tensor(expected))
    assert float(found.exp().sum()) == pytest.approx(1)


def test_masks_that_clip_does_not_see_are_classified_once():
    inside, outside, weights = torch.randn(1, 2, 4), 50 * torch.randn(1, 2, 3), torch.tensor([0.4, 0.8, 1.0])
    found = geometric_ensemble(inside, outside, weights, torch.tensor([[False, True]]))
    torch.testing.assert_close(found[:, 0], inside[:, 0].log_softmax(-1))
    assert not torch.allclose(found[:, 1], inside[:, 1].log_softmax(-1), atol=0.1)


def test_sure_classifiers_give_finite_logarithms():
    inside, outside = torch.tensor([[[900.0, -900.0, -900.0]]]), torch.tensor([[[-900.0, 900.0]]])
    found = geometric_ensemble(inside, outside, torch.tensor([0.4, 0.8]), torch.tensor([[True]]))
    assert torch.isfinite(found).all()


def test_a_class_is_seen_by_any_of_its_names(clip):
    model = FCCLIPForSegmentation.from_clip(clip, **SMALL, seen_classes=["sofa; settee", "Traffic  light"])
    vocabulary = Vocabulary(["cat", "couch; settee", "traffic light", "sofabed"])
    torch.testing.assert_close(clip_weights(model, vocabulary, 4), torch.tensor([0.8, 0.4, 0.4, 0.8]))
    # Embeddings without names are those of the training.
    torch.testing.assert_close(clip_weights(model, None, 2), torch.tensor([0.4, 0.4]))
    model.config.seen_classes = []
    torch.testing.assert_close(clip_weights(model, vocabulary, 4), torch.full((4,), 0.8))


# Both classifiers


def test_the_in_vocabulary_logits_by_hand(model):
    head = model.head.classifier
    features, masks, queries = torch.randn(1, 32, 4, 4), torch.randn(1, 2, 4, 4), torch.randn(1, 2, 32)
    text = TextClasses(unit(3, 16), torch.tensor([0, 1, 1]), 2)
    state = dict(head.named_parameters())
    with torch.no_grad():
        found = head(features, masks, queries, text)
        for query in range(2):
            inside = masks[0, query] > 0
            pooled = features[0][:, inside].mean(1)
            pooled = (pooled - pooled.mean()) / (pooled.var(correction=0) + 1e-5).sqrt()
            pooled = pooled * state["pool_norm.weight"] + state["pool_norm.bias"]
            x = state["pool_proj.weight"] @ pooled + state["pool_proj.bias"] + queries[0, query]
            for layer in range(3):
                x = state[f"class_embed.{layer}.0.weight"] @ x + state[f"class_embed.{layer}.0.bias"]
                x = x.clamp(min=0) if layer < 2 else x
            x = x / x.norm()
            cosines = [float(x @ row) for row in text.embeddings]
            void = float(x @ state["void_embed"] / state["void_embed"].norm())
            scale = float(state["logit_scale"].exp())
            expected = torch.tensor([scale * cosines[0], scale * max(cosines[1:]), scale * void])
            torch.testing.assert_close(found[0, query], expected, atol=1e-4, rtol=1e-4)


def test_the_scale_starts_as_clip_does_and_is_bounded(model):
    head = model.head.classifier
    new: Any = FCCLIPForSegmentation.from_clip(model, **SMALL)
    assert float(new.head.classifier.logit_scale.detach().exp()) == pytest.approx(1 / 0.07)
    inputs = (torch.randn(1, 32, 4, 4), torch.randn(1, 2, 4, 4), torch.randn(1, 2, 32))
    text = TextClasses(unit(3, 16), torch.arange(3), 3)
    with torch.no_grad():
        found = []
        for scale in (100.0, 1000.0):
            head.logit_scale.fill_(math.log(scale))
            found.append(head(*inputs, text))
    torch.testing.assert_close(found[0], found[1])


def test_evaluation_mixes_both_classifiers(model):
    pixels, text = torch.randn(2, 3, 32, 32), unit(3, 16)
    with torch.no_grad():
        outputs = model(pixels, text_embeddings=text)
        *maps, dense = model.encode(pixels)
        torch.testing.assert_close(dense, model.get_dense_features(pixels))
        queries = model.head.decoder(maps)
        classes = TextClasses(text, torch.arange(3), 3)
        inside = model.head.classifier(queries.mask_features, queries.masks[-1], queries.queries[-1], classes)
        pooled, valid = hard_mask_pool(dense, queries.masks[-1])
        outside = model.logit_scale.exp() * normalize(pooled, dim=-1) @ text.T
        expected = geometric_ensemble(inside, outside, torch.full((3,), 0.4), valid)
        assert torch.equal(outputs.masks_queries_logits, queries.masks[-1])
        torch.testing.assert_close(outputs.class_queries_logits, expected)
        torch.testing.assert_close(outputs.logits, semantic_logits(expected, queries.masks[-1]))
        model.train()
        torch.testing.assert_close(model(pixels, text_embeddings=text).class_queries_logits, inside)


def test_the_loss_is_that_of_the_in_vocabulary_classifier(model):
    pixels, text, labels = torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 8, 8)
    losses = []
    with torch.no_grad():
        for mode in (True, False):
            for scale in (0.0, 5.0):
                model.train(mode).logit_scale.fill_(scale)
                losses.append(float(model(pixels, text_embeddings=text, labels=labels).loss))
    assert losses == [losses[0]] * 4  # 64 pixels and 64 points: nothing is drawn


def test_empty_masks_have_no_nan(model):
    with torch.no_grad():
        embedder = model.head.decoder.transformer_module.decoder.mask_predictor.mask_embedder
        for parameter in embedder.parameters():
            parameter.zero_()
        outputs = model(torch.randn(2, 3, 32, 32), text_embeddings=unit(3, 16), labels=random_labels(2, 32, 32))
    assert not outputs.masks_queries_logits.any()
    assert all(torch.isfinite(x).all() for x in (outputs.loss, outputs.logits, outputs.class_queries_logits))


# Shapes and vocabularies


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24), (8, 56)])
@pytest.mark.parametrize("mode", [False, True])
def test_masks_are_four_times_as_fine_as_the_patches(model, size, mode):
    labels = random_labels(2, *size)
    outputs = model.train(mode)(torch.randn(2, 3, *size), text_embeddings=unit(5, 16), labels=labels)
    grid = (size[0] // 2, size[1] // 2)
    assert outputs.logits.shape == (2, 5, *grid)
    assert outputs.masks_queries_logits.shape == (2, 6, *grid)
    assert outputs.class_queries_logits.shape == (2, 6, 6)
    assert outputs.dense_embeds.shape == (2, 16, size[0] // 8, size[1] // 8)
    assert torch.isfinite(outputs.loss)


@pytest.mark.parametrize("classes", [1, 200])
def test_any_number_of_classes(model, classes):
    labels = random_labels(1, 16, 16, classes)
    outputs = model(torch.randn(1, 3, 32, 32), text_embeddings=unit(classes, 16), labels=labels)
    assert outputs.logits.shape == (1, classes, 16, 16)
    assert all(torch.isfinite(x).all() for x in (outputs.loss, outputs.logits))
    assert bool((outputs.logits.exp().sum(1) >= 0).all())


def test_aliases_count_as_one_class(model, tiny_tokenizer, tiny_image_processor):
    pixels = torch.randn(1, 3, 32, 32)
    vocabulary = model.encode_vocabulary(Vocabulary(["cat", "sofa; couch", "dog"]), tiny_tokenizer)
    with torch.no_grad():
        outputs = model(pixels, vocabulary=vocabulary, labels=torch.full((1, 8, 8), 2))
    assert outputs.class_queries_logits.shape == (1, 6, 4)
    assert outputs.logits.shape == (1, 4, 16, 16)
    assert bool((outputs.logits[:, 2] == LOWEST_LOGIT).all())
    assert outputs.vocabulary is vocabulary
    share = semantic_logits(outputs.class_queries_logits, outputs.masks_queries_logits).exp()[0]
    processor = OpenVocabularyProcessor(tiny_image_processor, tiny_tokenizer)
    (result,) = processor.post_process_semantic_segmentation(outputs)
    best, ids = (share / share.sum(0)).max(0)
    torch.testing.assert_close(result.scores, best)
    assert torch.equal(result.segmentation, ids)
    with pytest.raises(ValueError, match=r"Labels reach from 3 to 3. They must lie in \[0, 2\]"):
        model(pixels, vocabulary=vocabulary, labels=torch.full((1, 8, 8), 3))  # a query, but no class


def test_without_text_there_are_only_masks(model):
    outputs = model(torch.randn(1, 3, 32, 32))
    assert outputs.masks_queries_logits.shape == (1, 6, 16, 16)
    assert outputs.logits is outputs.class_queries_logits is outputs.loss is None


def test_instance_masks_as_labels(model):
    pixels, text = torch.randn(2, 3, 32, 32), unit(3, 16)
    masks, ids = [torch.eye(4)[None], torch.zeros(0, 4, 4)], [torch.tensor([1]), torch.zeros(0, dtype=torch.long)]
    assert torch.isfinite(model(pixels, text_embeddings=text, mask_labels=masks, class_labels=ids).loss)
    # A label map of one class per pixel is the same as its masks.
    labels = torch.randint(0, 3, (2, 8, 8))
    present = [image.unique() for image in labels]
    masks = [(image[None] == found[:, None, None]).float() for image, found in zip(labels, present, strict=True)]
    with torch.no_grad():
        first = model(pixels, text_embeddings=text, labels=labels).loss
        assert torch.equal(model(pixels, text_embeddings=text, mask_labels=masks, class_labels=present).loss, first)


def test_an_image_without_labels_does_not_count(model):
    pixels, text, labels = torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 8, 8)
    labels[1] = IGNORED
    with torch.no_grad():
        both = model(pixels, text_embeddings=text, labels=labels).loss
        first = model(pixels[:1], text_embeddings=text, labels=labels[:1]).loss
    torch.testing.assert_close(both, first)


def test_the_ignore_index_is_that_of_the_config(clip):
    model = FCCLIPForSegmentation.from_clip(clip, **SMALL, semantic_loss_ignore_index=-100).eval()
    pixels, text = torch.randn(1, 3, 32, 32), unit(3, 16)
    assert float(model(pixels, text_embeddings=text, labels=torch.full((1, 8, 8), -100)).loss.detach()) == 0
    with pytest.raises(ValueError, match="Labels reach from 255 to 255"):
        model(pixels, text_embeddings=text, labels=torch.full((1, 8, 8), 255))


def test_wrong_calls_are_refused(model):
    pixels, text, labels = torch.randn(1, 3, 32, 32), unit(3, 16), torch.zeros(1, 8, 8, dtype=torch.long)
    with pytest.raises(ValueError, match=r"Labels reach from 3 to 3. They must lie in \[0, 2\]"):
        model(pixels, text_embeddings=text, labels=labels + 3)
    with pytest.raises(ValueError, match="There are labels and no text"):
        model(pixels, labels=labels)
    with pytest.raises(ValueError, match=r"There are labels and class_labels. It must be labels alone"):
        model(pixels, text_embeddings=text, labels=labels, class_labels=[labels[0, 0]])
    with pytest.raises(ValueError, match=r"There are mask_labels. It must be labels alone, or mask_labels with"):
        model(pixels, text_embeddings=text, mask_labels=[labels])
    with pytest.raises(ValueError, match="There are no pixel_values and no features"):
        model(text_embeddings=text)
    with pytest.raises(ValueError, match="There are both pixel_values and features"):
        model(pixels, features=model.encode(pixels))
    with pytest.raises(ValueError, match=r"There are 2 features. They must be the 4 maps"):
        model(features=model.encode(pixels)[:2])
    with pytest.raises(ValueError, match=r"The image is 30 x 32 pixels. Both sides must be multiples of the patch"):
        model(torch.randn(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"The vocabulary has no text embeddings. It must be encoded"):
        model(pixels, vocabulary=Vocabulary(["cat"]))


# Features of the frozen tower


@pytest.mark.parametrize("mode", ["vanilla", "naclip"])
@pytest.mark.parametrize(("layers", "expected"), [(None, (1, 2, 2, 3)), ([3, 1, 2, 2], (3, 1, 2, 2)), ([2], (2,))])
def test_features_are_hidden_states_of_the_clip(clip, mode, layers, expected):
    model = FCCLIPForSegmentation.from_clip(clip, **SMALL, segmentation_mode=mode, feature_layers=layers)
    pixels = torch.randn(2, 3, 24, 40)
    *maps, dense = model.encode(pixels)
    with torch.no_grad():
        tower = clip.vision_model(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
        torch.testing.assert_close(dense, model.get_dense_features(pixels))
        assert model(pixels).masks_queries_logits.shape == (2, 6, 12, 20)
    assert len(maps) == len(expected)
    for found, layer in zip(maps, expected, strict=True):
        tokens = tower.hidden_states[layer][:, 1:]
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=1e-5)


def test_kept_features_stand_for_the_images(model):
    pixels, text, labels = torch.randn(2, 3, 24, 40), unit(3, 16), random_labels(2, 8, 8)
    calls = []
    features = model.encode(pixels)
    assert not any(part.requires_grad for part in features)
    model.vision_model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.vision_model.embeddings.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = model(features=features, text_embeddings=text, labels=labels)
        assert calls == []
        expected = model(pixels, text_embeddings=text, labels=labels)
    for name in ("loss", "logits", "class_queries_logits", "masks_queries_logits", "dense_embeds"):
        assert torch.equal(found[name], expected[name])
    one = model(features=[part[1:].half() for part in features], text_embeddings=text)
    torch.testing.assert_close(one.masks_queries_logits, expected.masks_queries_logits[1:], atol=0.1, rtol=0.1)


# Training


def test_gradients_reach_the_head_and_nothing_of_the_clip(model):
    model.train()
    outputs = model(torch.randn(2, 3, 32, 32), text_embeddings=unit(3, 16), labels=random_labels(2, 32, 32))
    assert not outputs.logits.requires_grad
    outputs.loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    every = {name for name, _ in model.named_parameters() if name.startswith("head.")}
    # Softmax does not see what is added to all keys alike, so their biases have a gradient of rounding errors.
    keys = {name for name in every if name.endswith("k_proj.bias")}
    assert reached | keys == every
    others = [name for name, p in model.named_parameters() if name not in every]
    assert all(name.startswith(FROZEN) for name in others)
    state = dict(model.named_parameters())
    assert not any(state[name].requires_grad or state[name].grad is not None for name in others)


def test_the_tower_keeps_no_graph_even_if_it_is_unfrozen(model):
    model.train().vision_model.requires_grad_(True)
    seen = []
    model.head.decoder.register_forward_pre_hook(lambda _, inputs: seen.extend(x.requires_grad for x in inputs[0]))
    outputs = model(torch.randn(1, 3, 32, 32), text_embeddings=unit(3, 16))
    assert seen == [False] * 4
    assert not outputs.dense_embeds.requires_grad
    assert outputs.logits.requires_grad  # without a loss, the map has a gradient


def test_the_tower_stays_in_evaluation_mode(clip):
    model = FCCLIPForSegmentation.from_clip(clip, **SMALL)
    for _ in range(2):
        frozen = [part for name, part in model.named_modules() if f"{name}.".startswith(FROZEN)]
        assert len(frozen) > 20
        assert not any(part.training for part in frozen)
        assert model.train() is model
        assert model.training
        assert all(part.training for part in model.head.modules())
    assert not any(part.training for part in model.eval().modules())


def test_a_few_steps_lower_the_loss(clip):
    model = FCCLIPForSegmentation.from_clip(clip, **SMALL).train()
    pixels, text = torch.randn(2, 3, 32, 32), unit(3, 16)
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    labels[0, :, 4:], labels[1, 4:], labels[1, :2] = 1, 2, IGNORED
    features = model.encode(pixels)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model(features=features, text_embeddings=text, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    with torch.no_grad():
        found = model(pixels, text_embeddings=text).logits[:, :, ::2, ::2].argmax(1)
    counted = labels != IGNORED
    assert float((found == labels)[counted].float().mean()) > 0.8


def test_half_precision(model):
    pixels, text, labels = torch.randn(1, 3, 32, 32), unit(3, 16), random_labels(1, 8, 8)
    with torch.no_grad():
        expected = model(pixels, text_embeddings=text, labels=labels).loss
        found = model.to(torch.bfloat16)(pixels.bfloat16(), text_embeddings=text, labels=labels)
    assert found.loss.dtype == found.logits.dtype == torch.float32
    assert found.masks_queries_logits.dtype == torch.bfloat16
    torch.testing.assert_close(found.loss, expected, atol=0, rtol=0.2)


# From a CLIP, and through disk


def test_from_clip_copies_the_weights(clip):
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    model = FCCLIPForSegmentation.from_clip(clip, **SMALL)
    state = model.state_dict()
    assert {name for name in state if not name.startswith("head.")} == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    with torch.no_grad():  # a copy: no storage is shared
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(clip.state_dict()[name], value) for name, value in before.items())
    assert all(p.requires_grad for p in clip.parameters())
    again = FCCLIPForSegmentation.from_clip(model, **SMALL)  # the tower of a segmenter, with a new head
    assert torch.equal(again.state_dict()["visual_projection.weight"], state["visual_projection.weight"])
    name = "head.decoder.pixel_decoder.mask_projection.weight"
    assert not torch.equal(again.state_dict()[name], model.state_dict()[name])


def outputs_of(model, pixels, text, labels):
    # A copy in memory: memory-mapped weights are aligned otherwise and round otherwise.
    copied = FCCLIPForSegmentation(model.config).eval()
    copied.load_state_dict(model.state_dict())
    with torch.no_grad():
        return copied(pixels, text_embeddings=text, labels=labels)


@pytest.mark.parametrize("kind", ["dense", "uneven"])
def test_saved_models_load_as_they_were(tmp_path, tiny_clip, clip, kind):
    source = clip if kind == "dense" else uneven_clip(tiny_clip, segmentation_cut=True)
    options = {**SMALL, "feature_layers": [1, 1, 2, 3], "seen_classes": ["cat"], "ensemble_alpha": 0.3}
    model = FCCLIPForSegmentation.from_clip(source, **options).eval()
    model.save_pretrained(tmp_path)
    loaded, info = FCCLIPForSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config == model.config
    assert all(getattr(loaded.config, name) == value for name, value in options.items())
    trained = [{name for name, p in each.named_parameters() if p.requires_grad} for each in (model, loaded)]
    assert trained[0] == trained[1]
    assert {name.split(".")[0] for name in trained[1]} == {"head"}
    assert not loaded.train().vision_model.training
    batch = (torch.randn(2, 3, 24, 40), unit(3, 16), random_labels(2, 8, 8))
    expected, found = outputs_of(model, *batch), outputs_of(loaded, *batch)
    for name in ("loss", "logits", "class_queries_logits", "masks_queries_logits"):
        assert torch.equal(found[name], expected[name])


def test_default_configs_survive_disk(tmp_path):
    config = FCCLIPConfig()
    config.save_pretrained(tmp_path)
    assert FCCLIPConfig.from_pretrained(tmp_path) == config
    assert config.tapped_layers == (3, 6, 9, 12)


def test_a_missing_head_weight_is_refused(tmp_path, model):
    model.save_pretrained(tmp_path)
    path, lost = tmp_path / "model.safetensors", "head.classifier.void_embed"
    save_file({name: x for name, x in load_file(path).items() if name != lost}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 of the weights .* among them {lost}"):
        FCCLIPForSegmentation.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 0}, "hidden_dim is 0. It must be positive"),
        ({"num_queries": -1}, "num_queries is -1. It must be positive"),
        ({"train_num_points": 0}, "train_num_points is 0. It must be positive"),
        ({"hidden_dim": 48}, "hidden_dim is 48. It must be a multiple of 32"),
        ({"num_attention_heads": 5}, "hidden_dim is 32, with num_attention_heads=5. The heads must divide"),
        ({"feature_layers": [1, 2, 3, 4]}, r"feature_layers is \[1, 2, 3, 4\]. It must hold 4 integers, or one, in"),
        ({"feature_layers": [0]}, r"feature_layers is \[0\]. It must hold"),
        ({"feature_layers": [1, 2]}, r"feature_layers is \[1, 2\]. It must hold"),
        ({"ensemble_alpha": 1.1}, r"ensemble_alpha is 1.1. It must lie in \[0, 1\]"),
        ({"ensemble_beta": -0.1}, r"ensemble_beta is -0.1. It must lie in \[0, 1\]"),
        ({"no_object_weight": -1.0}, "no_object_weight is -1.0. It must not be negative"),
        ({"class_weight": 0, "mask_weight": 0, "dice_weight": 0}, "class_weight, mask_weight and dice_weight are all"),
    ],
)
def test_impossible_options_are_refused(clip, options, message):
    with pytest.raises(Exception, match=message) as caught:
        FCCLIPForSegmentation.from_clip(clip, **{**SMALL, **options})
    causes = (caught.value, caught.value.__cause__)  # huggingface_hub wraps what its validation raises
    assert any(isinstance(cause, ValueError) for cause in causes)
