"""GKC on a CLIP that trains: class logits, both distillations, what is trained, and its way through disk."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from hf_opentrans import (
    AutoModelForOpenVocabularySegmentation,
    FCCLIPForSegmentation,
    GKCConfig,
    GKCForSegmentation,
    OpenVocabularyProcessor,
    SparseCLIPConfig,
    SparseCLIPModel,
    Vocabulary,
    post_process_instance_segmentation,
    post_process_panoptic_segmentation,
    segment,
)
from hf_opentrans.evaluation import evaluate_segmentation
from hf_opentrans.models.modeling_gkc import region_prior, vanilla_loss, vision_loss
from hf_opentrans.models.modeling_mask_queries import LOWEST_LOGIT, TextClasses, semantic_logits

SMALL: dict[str, Any] = {
    "hidden_dim": 32,
    "num_queries": 6,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward_dim": 48,
    "num_attention_heads": 4,
    "train_num_points": 64,
}
IGNORED, DIM = 255, 16
OUTPUTS = 3  # of the decoder: before the first of two layers, and of each


def unit(*shape):
    return normalize(torch.randn(*shape), dim=-1)


def random_labels(batch, height, width, classes=3):
    """Return labels with a band of ignored pixels."""
    labels = torch.randint(0, classes, (batch, height, width))
    labels[:, : height // 4] = IGNORED
    return labels


def regions_of(labels):
    """Return an embedding for every class that an image holds."""
    return [unit(len(image[image != IGNORED].unique()), DIM) for image in labels]


@pytest.fixture
def clip(tiny_clip) -> Any:
    """Return the sparse class with the weights of a stock CLIP."""
    values = tiny_clip.config.to_dict()
    values.pop("model_type")
    model = SparseCLIPModel(SparseCLIPConfig(**values)).eval()
    model.load_state_dict(tiny_clip.state_dict())
    return model


@pytest.fixture
def make_model(clip) -> Any:
    """Return a function that makes a segmenter in evaluation mode whose head has no zeros: they would hide errors."""

    def make(**options):
        made = GKCForSegmentation.from_clip(clip, **{**SMALL, **options})
        with torch.no_grad():
            for name, parameter in made.head.named_parameters():
                if (parameter.ndim == 1 or not parameter.any()) and name != "relation_scale":
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return made.eval()

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def uneven_clip(tiny_clip) -> Any:
    """Return a CLIP with random weights whose layers differ, as pruning leaves them."""
    values = tiny_clip.config.to_dict()
    values.pop("model_type")
    layers = {0: {"num_attention_heads": 2, "intermediate_size": 20}, 1: {"v_head_dim": 5}, 2: {"skip": ["mlp"]}}
    tower = {**values.pop("vision_config"), "model_type": "sparse_clip_vision_model", "per_layer_config": layers}
    return SparseCLIPModel(SparseCLIPConfig(**values, vision_config=tower)).eval()


# Distillation

# Two regions in the first image, one in the second, in the plane: v and c are a right angle, 0 and 60 degrees apart.
HALF, ROOT = 0.5, math.sqrt(3) / 2
V = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
C = torch.tensor([[0.0, 1.0], [0.0, 1.0], [HALF, ROOT]])
T = torch.tensor([[1.0, 0.0], [HALF, ROOT], [0.0, 1.0]])


def test_the_vanilla_loss_by_hand():
    # ||v - c||^2 = 2 - 2 v.c = 2, 0 and 1, of three regions; lengths do not matter.
    assert float(vanilla_loss(V, C)) == pytest.approx(1)
    assert float(vanilla_loss(3 * V, 0.1 * C)) == pytest.approx(1)


def test_the_vision_loss_by_hand():
    scale = 2.0
    # First image: t.t = [[1, 1/2], [1/2, 1]], v.c = [[0, 0], [1, 1]]; second: t.t = 1, v.c = 1/2.
    relations = (4 - 0) ** 2 + (2 - 0) ** 2 + (2 - 1) ** 2 + (4 - 1) ** 2 + (4 - 0.5) ** 2
    expected = (relations + 2 + 0 + 1) / ((2**2 + 1**2) + 3)
    assert float(vision_loss(V, C, T, [2, 1], scale)) == pytest.approx(expected)
    # An image without regions adds nothing. Three regions of one image have six relations more.
    assert float(vision_loss(V, C, T, [2, 0, 1], scale)) == pytest.approx(expected)
    assert float(vision_loss(V, C, T, [3], scale)) != pytest.approx(expected, rel=0.01)
    with pytest.raises(ValueError, match="counts add up to 2 and there are 3 regions"):
        vision_loss(V, C, T, [1, 1], scale)


def test_without_regions_the_losses_are_zero_and_have_a_gradient():
    empty = torch.zeros(0, DIM, requires_grad=True)
    scale = torch.ones((), requires_grad=True)
    for loss in (vanilla_loss(empty, empty), vision_loss(empty, empty, empty, [0, 0], scale)):
        assert float(loss.detach()) == 0
        loss.backward()
    assert scale.grad == 0


def distillation_of(model, pixels, text, labels, regions):
    with torch.no_grad():
        plain = model(pixels, text_embeddings=text, labels=labels).loss
        return model(pixels, text_embeddings=text, labels=labels, region_embeddings=regions).loss - plain


@pytest.mark.parametrize("distillation", ["vanilla", "vision"])
def test_all_outputs_are_distilled_by_their_own_matching(make_model, distillation):
    """One query and one class: the pair is known, and so is the loss of each output."""
    model = make_model(distillation=distillation, num_queries=1, distillation_weight=3.0)
    pixels, text, labels = torch.randn(2, 3, 32, 32), unit(2, DIM), torch.zeros(2, 8, 8, dtype=torch.long)
    labels[1] = 1
    regions, expected = [unit(1, DIM), unit(1, DIM)], 0.0
    with torch.no_grad():
        found = model.head.decoder(model.encode(pixels))
    for layer in range(OUTPUTS):
        projection = model.head.classifier.projections[layer]
        weight, bias = projection.weight.detach(), projection.bias.detach()
        distances, relations = 0.0, 0.0
        for image in range(2):
            v = weight @ found.queries[layer][image, 0] + bias
            cosine = float((v / v.norm()) @ regions[image][0])
            distances += 2 - 2 * cosine
            relations += (1 - cosine) ** 2
        expected += distances / 2 if distillation == "vanilla" else (relations + distances) / (2 + 2)
    assert float(distillation_of(model, pixels, text, labels, regions)) == pytest.approx(3 * expected, rel=1e-4)


def test_the_matching_is_done_once_for_each_output(model, monkeypatch):
    from hf_opentrans.models import modeling_mask_queries

    calls, usual = [], modeling_mask_queries.CountedPixelMatcher.forward
    monkeypatch.setattr(
        modeling_mask_queries.CountedPixelMatcher, "forward", lambda *args: calls.append(1) or usual(*args)
    )
    labels = random_labels(2, 8, 8)
    model(torch.randn(2, 3, 32, 32), text_embeddings=unit(3, DIM), labels=labels, region_embeddings=regions_of(labels))
    assert len(calls) == OUTPUTS


@pytest.mark.parametrize("distillation", ["vanilla", "vision"])
def test_pairs_meet_the_region_and_the_name_of_their_mask(make_model, distillation):
    head = make_model(distillation=distillation).head
    embeds, regions, texts = unit(2, 6, DIM), [unit(3, DIM), unit(1, DIM)], [unit(3, DIM), unit(1, DIM)]
    regions[0][1] = 0  # was not embedded
    pairs = [(torch.tensor([5, 0, 2]), torch.tensor([2, 0, 1])), (torch.tensor([4]), torch.tensor([0]))]
    v = torch.stack([embeds[0, 5], embeds[0, 0], embeds[1, 4]])
    c = torch.stack([regions[0][2], regions[0][0], regions[1][0]])
    t = torch.stack([texts[0][2], texts[0][0], texts[1][0]])
    expected = vanilla_loss(v, c) if distillation == "vanilla" else vision_loss(v, c, t, [2, 1], 1.0)
    with torch.no_grad():
        torch.testing.assert_close(head.distill(embeds, pairs, regions, texts), expected)


def test_the_text_of_a_region_is_the_mean_of_its_names(model):
    text = TextClasses(unit(3, DIM), torch.tensor([0, 1, 1]), 2)
    first, second, third = text.embeddings
    both = (second + third) / 2
    torch.testing.assert_close(text.mean_alias(), torch.stack([first, both / both.norm()]))


@pytest.mark.parametrize("distillation", ["vanilla", "vision"])
def test_regions_that_were_not_embedded_add_nothing(make_model, distillation):
    model = make_model(distillation=distillation)
    pixels, text, labels = torch.randn(2, 3, 32, 32), unit(3, DIM), random_labels(2, 8, 8)
    nothing = [torch.zeros_like(part) for part in regions_of(labels)]
    assert float(distillation_of(model, pixels, text, labels, nothing)) == 0
    labels[:] = IGNORED
    outputs = model.train()(pixels, text_embeddings=text, labels=labels, region_embeddings=[torch.zeros(0, DIM)] * 2)
    assert float(outputs.loss.detach()) == 0
    outputs.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.head.parameters() if p.grad is not None)
    if distillation == "vision":
        assert model.head.relation_scale.grad == 0


def test_no_more_regions_are_distilled_than_allowed(make_model):
    model = make_model(max_regions=2)
    labels = torch.arange(4).repeat_interleave(16).view(1, 8, 8).expand(2, 8, 8)
    targets = model._targets(TextClasses(unit(4, DIM), torch.arange(4), 4), labels, None, None, 2)
    given = [unit(4, DIM), unit(4, DIM)]
    given[0][0] = 0
    seen = set()
    for _ in range(40):
        rows = torch.cat(list(model._regions(given, targets)))
        kept = rows.any(-1).nonzero()[:, 0].tolist()
        assert len(kept) == 2
        assert torch.equal(rows[kept], torch.cat(given)[kept])
        seen |= set(kept)
    assert seen == {1, 2, 3, 4, 5, 6, 7}  # any, but not the one without an embedding
    model.config.max_regions = 7
    assert torch.equal(torch.cat(list(model._regions(given, targets))), torch.cat(given))


def test_without_regions_the_loss_is_that_of_the_masks(make_model):
    model, other = make_model(), make_model(distillation="none")
    other.load_state_dict({name: x for name, x in model.state_dict().items() if "relation_scale" not in name})
    assert other.head.relation_scale is None
    pixels, text, labels = torch.randn(2, 3, 32, 32), unit(3, DIM), random_labels(2, 8, 8)
    with torch.no_grad():
        losses = [float(each(pixels, text_embeddings=text, labels=labels).loss) for each in (model, other)]
    assert losses[0] == losses[1]
    assert float(distillation_of(model, pixels, text, labels, regions_of(labels))) > 0.1


# Classification


def test_class_logits_by_hand(model):
    classifier, text = model.head.classifier, TextClasses(unit(3, DIM), torch.tensor([0, 1, 1]), 2)
    queries = torch.randn(1, 2, 32)
    state = dict(classifier.named_parameters())
    with torch.no_grad():
        for layer in (0, 2):
            found = classifier.compare(classifier(queries, layer), text)
            for query in range(2):
                v = state[f"projections.{layer}.weight"] @ queries[0, query] + state[f"projections.{layer}.bias"]
                assert bool((v < 0).any())  # and stays so: there is no ReLU
                v = v / v.norm()
                cosines = [float(v @ row) for row in text.embeddings]
                void = float(v @ state["void_embed"] / state["void_embed"].norm())
                scale = float(state["logit_scale"].exp())
                expected = torch.tensor([scale * cosines[0], scale * max(cosines[1:]), scale * void])
                torch.testing.assert_close(found[0, query], expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(classifier(queries, -1), classifier(queries, OUTPUTS - 1))


def test_a_new_head_starts_as_published(clip):
    head: Any = GKCForSegmentation.from_clip(clip, **SMALL).head
    assert float(head.classifier.logit_scale.detach().exp()) == pytest.approx(1 / 0.07)
    assert float(head.relation_scale.detach()) == 1
    assert head.relation_scale.requires_grad
    bound = 32**-0.5  # torch's own for linear layers
    assert len(head.classifier.projections) == OUTPUTS
    for layer in head.classifier.projections:
        assert 0.8 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert 0.5 * bound < float(layer.bias.detach().abs().max()) <= bound
    assert 0.4 < float(head.classifier.void_embed.detach().std()) < 2


def test_the_scale_is_bounded(model):
    text, found = TextClasses(unit(3, DIM), torch.arange(3), 3), []
    with torch.no_grad():
        for scale in (100.0, 1000.0):
            model.head.classifier.logit_scale.fill_(math.log(scale))
            found.append(model.head.classifier.compare(unit(1, 2, DIM), text).abs().max())
    assert max(found) <= 100


@pytest.mark.parametrize("mode", [False, True])
def test_outputs_are_of_the_last_layer_alone(model, mode):
    """There is no ensemble: CLIP's image embedding is not read, in neither mode."""
    pixels, text = torch.randn(2, 3, 32, 32), unit(3, DIM)
    with torch.no_grad():
        found = model.head.decoder(model.encode(pixels))
        classes = TextClasses(text, torch.arange(3), 3)
        expected = model.head.classifier.compare(model.head.classifier(found.queries[-1], 2), classes)
        for parameter in (*model.visual_projection.parameters(), *model.vision_model.post_layernorm.parameters()):
            parameter.fill_(float("nan"))
        outputs = model.train(mode)(pixels, text_embeddings=text)
    torch.testing.assert_close(outputs.class_queries_logits, expected)
    assert torch.equal(outputs.masks_queries_logits, found.masks[-1])
    torch.testing.assert_close(outputs.logits, semantic_logits(expected, found.masks[-1]))
    assert outputs.dense_embeds is outputs.loss is None


# Shapes and vocabularies


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (8, 56)])
def test_masks_are_four_times_as_fine_as_the_patches(model, size):
    labels = random_labels(2, *size)
    outputs = model(
        torch.randn(2, 3, *size), text_embeddings=unit(5, DIM), labels=labels, region_embeddings=regions_of(labels)
    )
    grid = (size[0] // 2, size[1] // 2)
    assert outputs.logits.shape == (2, 5, *grid)
    assert outputs.masks_queries_logits.shape == (2, 6, *grid)
    assert outputs.class_queries_logits.shape == (2, 6, 6)
    assert torch.isfinite(outputs.loss)


@pytest.mark.parametrize("classes", [1, 200])
def test_any_number_of_classes(model, classes):
    labels = random_labels(1, 16, 16, classes)  # more than there are queries: some stay without a pair
    outputs = model(
        torch.randn(1, 3, 32, 32),
        text_embeddings=unit(classes, DIM),
        labels=labels,
        region_embeddings=regions_of(labels),
    )
    assert outputs.logits.shape == (1, classes, 16, 16)
    assert all(torch.isfinite(x).all() for x in (outputs.loss, outputs.logits))


def test_aliases_count_as_one_class_and_results_are_made_of_it(model, tiny_tokenizer, tiny_image_processor):
    pixels = torch.randn(1, 3, 32, 32)
    vocabulary = model.encode_vocabulary(Vocabulary(["cat", "sofa; couch", "dog"]), tiny_tokenizer)
    with torch.no_grad():
        outputs = model(
            pixels, vocabulary=vocabulary, labels=torch.full((1, 8, 8), 2), region_embeddings=[unit(1, DIM)]
        )
    assert outputs.class_queries_logits.shape == (1, 6, 4)
    assert outputs.logits.shape == (1, 4, 16, 16)
    assert bool((outputs.logits[:, 2] == LOWEST_LOGIT).all())
    processor = OpenVocabularyProcessor(tiny_image_processor, tiny_tokenizer)
    (result,) = processor.post_process_semantic_segmentation(outputs, [(20, 30)])
    assert result.segmentation.shape == (20, 30)
    assert result.labels == ("cat", "sofa", "dog")
    (instances,) = post_process_instance_segmentation(outputs, [(20, 30)], threshold=0.0)
    (panoptic,) = post_process_panoptic_segmentation(outputs, [(20, 30)])
    for found in (instances, panoptic):
        assert found["segmentation"].shape == (20, 30)
        assert {entry["label"] for entry in found["segments_info"]} <= {"cat", "sofa", "dog"}
    with pytest.raises(ValueError, match=r"Labels reach from 3 to 3. They must lie in \[0, 2\]"):
        model(pixels, vocabulary=vocabulary, labels=torch.full((1, 8, 8), 3))


def test_it_is_used_like_any_other_segmenter(model, tiny_tokenizer, tiny_image_processor, tiny_images):
    processor, names = OpenVocabularyProcessor(tiny_image_processor, tiny_tokenizer), ["cat", "sofa; couch", "wall"]
    results = segment(model, processor, tiny_images[:2], names)
    assert [result.segmentation.shape for result in results] == [(40, 48)] * 2
    samples = [(image, result.segmentation) for image, result in zip(tiny_images, results, strict=False)]
    assert evaluate_segmentation(model, processor, samples, names).pixel_accuracy == 1


def test_instance_masks_as_labels(model):
    pixels, text, labels = torch.randn(2, 3, 32, 32), unit(3, DIM), torch.randint(0, 3, (2, 8, 8))
    present, regions = [image.unique() for image in labels], regions_of(labels)
    masks = [(image[None] == found[:, None, None]).float() for image, found in zip(labels, present, strict=True)]
    with torch.no_grad():
        first = model(pixels, text_embeddings=text, labels=labels, region_embeddings=regions).loss
        second = model(
            pixels, text_embeddings=text, mask_labels=masks, class_labels=present, region_embeddings=regions
        ).loss
    assert torch.equal(first, second)


def test_wrong_calls_are_refused(model, make_model):
    pixels, text, labels = torch.randn(1, 3, 32, 32), unit(3, DIM), torch.zeros(1, 8, 8, dtype=torch.long)
    call: dict[str, Any] = {"text_embeddings": text, "labels": labels}
    with pytest.raises(
        ValueError, match=r"region_embeddings have the shapes \[\(2, 16\)\]. They must be one row of 16"
    ):
        model(pixels, **call, region_embeddings=[unit(2, DIM)])
    with pytest.raises(ValueError, match=r"for each of the \[1\] regions"):
        model(pixels, **call, region_embeddings=[])
    with pytest.raises(ValueError, match="There are no labels, and there are region_embeddings"):
        model(pixels, text_embeddings=text, region_embeddings=[unit(1, DIM)])
    with pytest.raises(ValueError, match="distillation is 'none', and there are region_embeddings"):
        make_model(distillation="none")(pixels, **call, region_embeddings=[unit(1, DIM)])
    with pytest.raises(ValueError, match="There are labels and no text"):
        model(pixels, labels=labels)
    with pytest.raises(ValueError, match=r"There are labels and class_labels. It must be labels alone"):
        model(pixels, **call, class_labels=[labels[0, 0]])
    with pytest.raises(ValueError, match="There are no pixel_values and no features"):
        model(text_embeddings=text)
    with pytest.raises(ValueError, match=r"There are 2 features. They must be the 4 maps of the tower, as encode"):
        model(features=model.encode(pixels)[:2])
    with pytest.raises(ValueError, match=r"text_embeddings have the shape \(3, 8\). They must be \(queries, 16\)"):
        model(pixels, text_embeddings=unit(3, 8))
    with pytest.raises(ValueError, match=r"The image is 30 x 32 pixels"):
        model(torch.randn(1, 3, 30, 32))


# The tower


@pytest.mark.parametrize(("layers", "expected"), [(None, (1, 2, 2, 3)), ([3, 1, 2, 2], (3, 1, 2, 2)), ([2], (2,))])
def test_features_are_hidden_states_of_the_clip(clip, layers, expected):
    model = GKCForSegmentation.from_clip(clip, **SMALL, feature_layers=layers, segmentation_mode="naclip")
    pixels = torch.randn(2, 3, 24, 40)
    maps = model.encode(pixels)
    with torch.no_grad():
        tower = clip.vision_model(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    assert len(maps) == len(expected)
    for found, layer in zip(maps, expected, strict=True):
        tokens = tower.hidden_states[layer][:, 1:]
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=1e-5)


def test_kept_features_stand_for_the_images(model):
    pixels, text, labels = torch.randn(2, 3, 24, 40), unit(3, DIM), random_labels(2, 8, 8)
    regions, calls = regions_of(labels), []
    features = model.encode(pixels)
    assert not any(part.requires_grad for part in features)
    model.vision_model.embeddings.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = model(features=features, text_embeddings=text, labels=labels, region_embeddings=regions)
        assert calls == []
        expected = model(pixels, text_embeddings=text, labels=labels, region_embeddings=regions)
    assert calls == [1]
    for name in ("loss", "logits", "class_queries_logits", "masks_queries_logits"):
        assert torch.equal(found[name], expected[name])
    model(features=features, text_embeddings=text, labels=labels).loss.backward()
    assert all(p.grad is None for p in model.vision_model.parameters())


@pytest.mark.parametrize("layers", [None, [2]])
def test_gradients_reach_the_head_and_the_tower_and_not_the_text(make_model, layers):
    model = make_model(feature_layers=layers).train()
    labels = random_labels(2, 32, 32)
    outputs = model(
        torch.randn(2, 3, 32, 32), text_embeddings=unit(3, DIM), labels=labels, region_embeddings=regions_of(labels)
    )
    assert not outputs.logits.requires_grad
    outputs.loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    # Softmax does not see what is added to all keys alike, so their biases have a gradient of rounding errors.
    keys = {name for name in trained if name.endswith("k_proj.bias")}
    assert reached | keys == trained
    tower = {name for name in trained if name.startswith("vision_model.")}
    assert trained - tower == {name for name, _ in model.named_parameters() if name.startswith("head.")}
    unread = {name for name, _ in model.vision_model.named_parameters(prefix="vision_model") if name not in tower}
    assert {name for name in unread if "post_layernorm" not in name} == {
        name
        for name, _ in model.vision_model.named_parameters(prefix="vision_model")
        if layers and ".layers.2." in name
    }


def test_a_few_steps_lower_the_loss(clip):
    model: Any = GKCForSegmentation.from_clip(clip, **SMALL).train()
    pixels, text = torch.randn(2, 3, 32, 32), unit(3, DIM)
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    labels[0, :, 4:], labels[1, 4:], labels[1, :2] = 1, 2, IGNORED
    regions = regions_of(labels)
    before = model.vision_model.encoder.layers[0].mlp.fc1.weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(pixels, text_embeddings=text, labels=labels, region_embeddings=regions).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert not torch.equal(model.vision_model.encoder.layers[0].mlp.fc1.weight, before)


# With CLIP's own embedding below


@pytest.fixture
def untrained(clip):
    return GKCForSegmentation.from_clip(clip, **SMALL, clip_residual=True).eval()


def test_untrained_queries_have_the_mean_embedding_of_their_masks(untrained):
    """Class logits are the head's scale times the cosine of the pooled dense embedding."""
    model = untrained
    pixels, text = torch.randn(2, 3, 32, 32), unit(5, 16)
    with torch.no_grad():
        outputs = model(pixels, text_embeddings=text)
        dense = model.get_dense_features(pixels)
    assert torch.equal(outputs.dense_embeds, dense)
    masks = torch.nn.functional.interpolate(outputs.masks_queries_logits, dense.shape[-2:], mode="bilinear") > 0
    for image in range(2):
        for query in range(masks.shape[1]):
            inside = masks[image, query]
            chosen = dense[image][:, inside] if bool(inside.any()) else dense[image].flatten(1)
            cosines = torch.nn.functional.normalize(chosen.mean(1), dim=0) @ text.T
            found = outputs.class_queries_logits[image, query, :-1]
            torch.testing.assert_close(found, cosines / 0.07, rtol=1e-4, atol=1e-4)


def test_empty_masks_have_the_embedding_of_the_image_and_a_bounded_gradient():
    dense = torch.nn.functional.normalize(torch.randn(1, 8, 4, 4), dim=1).requires_grad_()
    masks = torch.full((1, 2, 8, 8), -1.0)
    masks[0, 1, :2, :2] = 1
    found = region_prior(dense, masks)
    whole = torch.nn.functional.normalize(dense.flatten(2).mean(2), dim=-1)
    torch.testing.assert_close(found[:, 0], whole)
    torch.testing.assert_close(found[0, 1], dense[0, :, 0, 0])
    found.sum().backward()
    gradient = dense.grad
    assert gradient is not None
    assert float(gradient.norm()) < 10


def test_the_residual_is_trained_from_zero(untrained):
    model = untrained.train()
    pixels, text, labels = torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 32, 32)
    model(pixels, text_embeddings=text, labels=labels).loss.backward()
    for projection in model.head.classifier.projections:
        assert not bool(projection.weight.any())
        assert bool(projection.weight.grad.any())
    assert model.visual_projection.weight.grad is None
    assert not model.vision_model.post_layernorm.weight.requires_grad


def test_kept_features_hold_the_dense_embeddings_too(make_model):
    model = make_model(clip_residual=True)
    pixels, text = torch.randn(1, 3, 32, 32), unit(3, 16)
    with torch.no_grad():
        features = model.encode(pixels)
        assert torch.equal(
            model(features=features, text_embeddings=text).logits, model(pixels, text_embeddings=text).logits
        )
    with pytest.raises(ValueError, match=r"the 4 maps of the tower and the dense embeddings"):
        model(features=features[:-1], text_embeddings=text)


def test_the_residual_survives_disk(tmp_path, make_model):
    model = make_model(clip_residual=True)
    model.save_pretrained(tmp_path)
    loaded = GKCForSegmentation.from_pretrained(tmp_path)
    assert loaded.config.clip_residual
    pixels, text = torch.randn(1, 3, 32, 32), unit(3, 16)
    with torch.no_grad():
        assert torch.equal(loaded(pixels, text_embeddings=text).logits, model(pixels, text_embeddings=text).logits)


def test_half_precision(model):
    pixels, text, labels = torch.randn(1, 3, 32, 32), unit(3, DIM), random_labels(1, 8, 8)
    regions = regions_of(labels)
    with torch.no_grad():
        expected = model(pixels, text_embeddings=text, labels=labels, region_embeddings=regions).loss
        half = model.to(torch.bfloat16)
        found = half(pixels.bfloat16(), text_embeddings=text, labels=labels, region_embeddings=regions)
    assert found.loss.dtype == found.logits.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected, atol=0, rtol=0.2)


# From a CLIP, and through disk


def test_from_clip_copies_the_weights(clip):
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    model = GKCForSegmentation.from_clip(clip, **SMALL)
    state = model.state_dict()
    assert {name for name in state if not name.startswith("head.")} == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    with torch.no_grad():  # a copy: no storage is shared
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(clip.state_dict()[name], value) for name, value in before.items())
    assert all(p.requires_grad for p in clip.parameters())
    other = FCCLIPForSegmentation.from_clip(model, hidden_dim=64)  # fields of one head do not leak into another
    assert (other.config.num_queries, other.config.hidden_dim) == (250, 64)
    assert not hasattr(other.config, "distillation")


def outputs_of(model, pixels, text, labels, regions):
    # A copy in memory: memory-mapped weights are aligned otherwise and round otherwise.
    copied = GKCForSegmentation(model.config).eval()
    copied.load_state_dict(model.state_dict())
    with torch.no_grad():
        return copied(pixels, text_embeddings=text, labels=labels, region_embeddings=regions)


@pytest.mark.parametrize("kind", ["clip", "uneven_clip"])
def test_saved_models_load_as_they_were(tmp_path, request, kind):
    options = {**SMALL, "feature_layers": [1, 1, 2, 2], "max_regions": 3, "distillation_weight": 0.5}
    model = GKCForSegmentation.from_clip(request.getfixturevalue(kind), **options).eval()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is GKCForSegmentation
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config == model.config
    assert all(getattr(loaded.config, name) == value for name, value in options.items())
    trained = [{name for name, p in each.named_parameters() if p.requires_grad} for each in (model, loaded)]
    assert trained[0] == trained[1]
    assert {name.split(".")[0] for name in trained[1]} == {"head", "vision_model"}
    labels = random_labels(1, 8, 8)
    batch = (torch.randn(1, 3, 24, 40), unit(3, DIM), labels, regions_of(labels))
    expected, found = outputs_of(model, *batch), outputs_of(loaded, *batch)
    for name in ("loss", "logits", "class_queries_logits", "masks_queries_logits"):
        assert torch.equal(found[name], expected[name])


def test_default_configs_survive_disk(tmp_path):
    config = GKCConfig()
    config.save_pretrained(tmp_path)
    assert GKCConfig.from_pretrained(tmp_path) == config
    assert (config.num_queries, config.distillation, config.tapped_layers) == (100, "vision", (3, 6, 9, 12))
    assert config != GKCConfig(max_regions=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 48}, "hidden_dim is 48. It must be a multiple of 32"),
        ({"feature_layers": [0]}, r"feature_layers is \[0\]. It must hold"),
        ({"mask_weight": -1.0}, "mask_weight is -1.0. It must not be negative"),
        ({"distillation": "text"}, "distillation is 'text'. It must be one of none, vanilla, vision"),
        ({"distillation_weight": -2}, "distillation_weight is -2. It must not be negative"),
        ({"max_regions": 0}, "max_regions is 0. It must be positive"),
    ],
)
def test_impossible_options_are_refused(clip, options, message):
    with pytest.raises(Exception, match=message) as caught:
        GKCForSegmentation.from_clip(clip, **{**SMALL, **options})
    causes = (caught.value, caught.value.__cause__)  # huggingface_hub wraps what its validation raises
    assert any(isinstance(cause, ValueError) for cause in causes)
