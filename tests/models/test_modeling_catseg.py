"""CAT-Seg on a CLIP: its attentions by hand, equivariance, loss, what trains, options, and its way through disk."""

import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, normalize, one_hot

from hf_opentrans import (
    DeepLabV3PlusForSegmentation,
    DenseCLIPForSegmentation,
    OpenVocabularyProcessor,
    PruningConfig,
    SparseCLIPConfig,
    SparseCLIPModel,
    Vocabulary,
    freeze_unselected,
    prune_model,
    select_layers,
)
from hf_opentrans.models import modeling_catseg as catseg
from hf_opentrans.models.configuration_catseg import CATSegConfig
from hf_opentrans.models.modeling_catseg import CATSegFeatures, CATSegForSegmentation

SMALL: dict[str, Any] = {
    "cost_channels": 16,
    "aggregation_blocks": 1,
    "window_size": 3,
    "aggregation_heads": 2,
    "decoder_channels": [8, 4],
    "guidance_channels": 6,
    "text_guidance_channels": 5,
}
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


def shaken(model) -> Any:
    """Give the head random offsets, norms and last convolution: their zeros and ones would hide errors."""
    with torch.no_grad():
        for name, parameter in model.head.named_parameters():
            if parameter.ndim == 1 or name == "decoder.output.weight":
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def clip(tiny_clip):
    return dense_clip(tiny_clip)


@pytest.fixture
def model(clip):
    """Return a segmenter in training mode whose head has no zeros."""
    return shaken(CATSegForSegmentation.from_clip(clip, **SMALL)).train()


def with_prefilter(model, k):
    """Return the same weights with another prefilter."""
    other = CATSegForSegmentation.from_clip(model, **SMALL, vocab_prefilter=k).eval()
    other.load_state_dict(model.state_dict())
    return other


# The cost


def test_the_cost_is_the_cosine_of_every_token_with_every_name(clip):
    """Tokens (1, 0) and (0.6, 0.8), names (1, 0) and (0, 1): cosines 1, 0.6 and 0, 0.8.

    The untrained logits are the residual alone: 10 times the cosines, enlarged from 1 x 2 to 4 x 8.
    """
    tokens = torch.zeros(1, 16, 1, 2)
    tokens[0, :2, 0] = torch.tensor([[1.0, 0.6], [0.0, 0.8]])
    names = torch.eye(16)[:2]
    made: Any = CATSegForSegmentation.from_clip(clip, **SMALL, classifier_scale=10.0)
    seen = []
    made.head.embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features = (tokens, torch.randn(1, 32, 1, 2), torch.randn(1, 32, 1, 2))
    with torch.no_grad():
        logits = made(features=features, text_embeddings=names).logits
    torch.testing.assert_close(seen[0], torch.tensor([[[[1.0, 0.6]]], [[[0.0, 0.8]]]]))
    # Centres of the fine positions lie at -3/8, -1/8, 1/8, ... of the coarse ones, held at the border.
    weights = torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1])
    expected = torch.stack([10 * (1.0 - 0.4 * weights), 10 * 0.8 * weights])
    torch.testing.assert_close(logits[0], expected[:, None].expand(-1, 4, -1))


@pytest.mark.parametrize("mode", ["vanilla", "maskclip", "sclip", "clearclip", "naclip"])
@pytest.mark.parametrize("reduced", [None, False])
def test_the_untrained_model_decides_as_the_dense_clip(tiny_clip_folder, mode, reduced):
    dense = DenseCLIPForSegmentation.from_pretrained(tiny_clip_folder).eval()
    options = {**SMALL, "segmentation_mode": mode, "segmentation_reduced": reduced, "segmentation_logit_scale": 7.0}
    model = CATSegForSegmentation.from_clip(dense, **options).eval()
    pixels, text = torch.randn(2, 3, 24, 40), unit(5, 16)
    with torch.no_grad():
        expected = dense(pixels, text_embeddings=text, mode=mode, reduced=reduced)
        found = model(pixels, text_embeddings=text)
    cosines = interpolate(expected.logits / 40, scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found.dense_embeds, expected.dense_embeds)
    torch.testing.assert_close(found.logits, 7 * cosines, atol=1e-5, rtol=1e-4)
    assert torch.equal(found.logits.argmax(1), cosines.argmax(1))


def test_the_initial_offset_changes_no_decision(clip):
    pixels, text = torch.randn(1, 3, 32, 32), unit(3, 16)
    with torch.no_grad():
        plain = CATSegForSegmentation.from_clip(clip, **SMALL)(pixels, text_embeddings=text).logits
        lower = CATSegForSegmentation.from_clip(clip, **SMALL, classifier_bias=-5.0)(pixels, text_embeddings=text)
    torch.testing.assert_close(lower.logits, plain - 5)


def test_without_the_residual_the_decoder_learns_from_scratch(clip):
    made: Any = CATSegForSegmentation.from_clip(clip, **SMALL, cost_residual=False)
    assert made.head.logit_scale is None
    assert bool(made.head.decoder.output.weight.any())
    logits = made(torch.randn(1, 3, 32, 32), text_embeddings=unit(3, 16)).logits
    assert float(logits.detach().std()) > 0


# Windows


def in_words(parts, window, is_shifted):
    """Attend one position at a time, over the positions of its window and no others."""
    queries, keys, values = parts
    _, height, width, _, channels = queries.shape
    starts = []
    for size in (height, width):
        side = min(window, size)
        offset = side // 2 if is_shifted and side < size else 0
        # Where the window of each position begins: at the offset and every side from there.
        starts.append([(place - offset) // side * side + offset for place in range(size)])
    output = torch.zeros_like(values)
    for y in range(height):
        for x in range(width):
            rows = [r for r in range(height) if starts[0][r] == starts[0][y]]
            columns = [c for c in range(width) if starts[1][c] == starts[1][x]]
            k = keys[:, rows][:, :, columns].flatten(1, 2)
            v = values[:, rows][:, :, columns].flatten(1, 2)
            scores = torch.einsum("nhd,nphd->nhp", queries[:, y, x], k) / channels**0.5
            output[:, y, x] = torch.einsum("nhp,nphd->nhd", scores.softmax(-1), v)
    return output


@pytest.mark.parametrize("is_shifted", [False, True])
@pytest.mark.parametrize(
    ("size", "window"), [((6, 6), 3), ((7, 5), 3), ((5, 8), 4), ((1, 9), 4), ((3, 7), 5), ((13, 4), 12), ((4, 6), 1)]
)
def test_windows_are_those_of_the_definition(size, window, is_shifted):
    parts = [torch.randn(2, *size, 3, 4) for _ in range(3)]
    found = catseg.window_attention(parts[0], parts[1], parts[2], window, is_shifted)
    torch.testing.assert_close(found, in_words(parts, window, is_shifted), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_shifted", [False, True])
@pytest.mark.parametrize("window", [6, 12])
def test_a_window_over_the_whole_map_is_full_attention(window, is_shifted):
    q, k, v = (torch.randn(2, 5, 6, 3, 4) for _ in range(3))
    found = catseg.window_attention(q, k, v, window, is_shifted)
    q, k, v = (part.flatten(1, 2).transpose(1, 2) for part in (q, k, v))
    expected = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    torch.testing.assert_close(found.flatten(1, 2).transpose(1, 2), expected)


@pytest.mark.parametrize("is_shifted", [False, True])
def test_nothing_attends_to_the_filling(monkeypatch, is_shifted):
    parts = [torch.randn(2, 7, 5, 3, 4, requires_grad=True) for _ in range(3)]
    expected = catseg.window_attention(parts[0], parts[1], parts[2], 3, is_shifted)
    filled = []

    def pad(values, widths):
        filled.append(widths)
        return torch.nn.functional.pad(values, widths, value=50.0)

    monkeypatch.setattr(catseg, "pad", pad)
    found = catseg.window_attention(parts[0], parts[1], parts[2], 3, is_shifted)
    assert filled == 3 * [(0, 0, 0, 0, 0, 1, 0, 2)]
    assert torch.equal(found, expected)
    found.sum().backward()
    assert all(bool(part.grad.isfinite().all()) for part in parts if part.grad is not None)


def test_shifted_windows_carry_a_change_across_the_border_of_plain_ones(model):
    block = model.head.blocks[0]
    maps, guidance = torch.randn(1, 1, 6, 6, 16), torch.randn(1, 1, 6, 6, 6)
    changed = maps.clone()
    changed[:, :, 0, 0] = torch.randn(16)
    with torch.no_grad():
        plain = block.plain(changed, guidance) - block.plain(maps, guidance)
        shifted = block.shifted(changed, guidance) - block.shifted(maps, guidance)
    reached = [sorted(map(tuple, part[0, 0].abs().amax(-1).nonzero().tolist())) for part in (plain, shifted)]
    assert reached[0] == [(y, x) for y in range(3) for x in range(3)]
    assert reached[1] == [(0, 0)]  # half of 3 is 1: the first window is one position small


# Attention over classes


@pytest.mark.parametrize("items", [1, 2, 30])
def test_linear_attention_is_its_quadratic_formula(items):
    q, k, v = (torch.randn(2, 3, items, 4) for _ in range(3))
    phi_q, phi_k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    weights = phi_q @ phi_k.transpose(-1, -2)
    expected = (weights / weights.sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(catseg.linear_attention(q, k, v), expected, atol=1e-5, rtol=1e-4)


def test_linear_attention_of_a_hand_computed_case():
    """phi(1) = 2, phi(0) = 1, phi(-ln 2) = 1/2: weights 2 (1, 1/2) of the values 3, 9: (3 + 4.5) / 1.5 = 5."""
    q, k, v = torch.tensor([[1.0]]), torch.tensor([[0.0], [-(torch.tensor(2.0).log().item())]]), torch.tensor([3.0, 9])
    torch.testing.assert_close(catseg.linear_attention(q, k, v[:, None]), torch.tensor([[5.0]]))


@pytest.mark.parametrize("kind", ["plain", "classes"])
def test_queries_and_keys_see_the_guidance_beside_the_map(model, kind):
    """Two projections and a sum are one projection of both side by side; values see the map alone."""
    attention = getattr(model.head.blocks[0], kind).attention
    maps = torch.randn(1, 4, 3, 3, 16)
    shape = (1, 1, 3, 3, 6) if kind == "plain" else (1, 4, 1, 1, 5)
    guidance = torch.randn(*shape)
    side = torch.cat([maps, guidance.expand(*maps.shape[:-1], -1)], -1)
    q, k = (
        side @ torch.cat([getattr(attention, n).weight, getattr(attention, f"{n}_guidance").weight], 1).T
        + getattr(attention, n).bias
        for n in ("query", "key")
    )
    q, k, v = (part.unflatten(-1, (2, 8)) for part in (q, k, attention.value(maps)))
    if kind == "plain":
        # One window of 3 x 3.
        q, k, v = (part.flatten(2, 3).transpose(2, 3) for part in (q, k, v))
        attended = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
        attended = attended.transpose(2, 3).unflatten(2, (3, 3))
    else:
        q, k, v = (part.permute(0, 2, 3, 4, 1, 5) for part in (q, k, v))
        attended = catseg.linear_attention(q, k, v).permute(0, 4, 1, 2, 3, 5)
    torch.testing.assert_close(attention(maps, guidance), attention.output(attended.flatten(-2)))


# Classes


def test_classes_may_be_permuted(model):
    pixels, text, order = torch.randn(2, 3, 24, 40), unit(7, 16), torch.randperm(7)
    with torch.no_grad():
        first = model(pixels, text_embeddings=text).logits
        second = model(pixels, text_embeddings=text[order]).logits
    torch.testing.assert_close(second, first[:, order], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(second, first, atol=1e-2)


def test_a_class_sees_the_others(model):
    pixels, text = torch.randn(1, 3, 32, 32), unit(4, 16)
    with torch.no_grad():
        four = model(pixels, text_embeddings=text).logits[:, :3]
        three = model(pixels, text_embeddings=text[:3]).logits
    assert float((four - three).abs().max()) > 1e-3


@pytest.mark.parametrize("classes", [1, 200])
def test_any_number_of_classes(model, classes):
    labels = random_labels(1, 16, 16, classes)
    outputs = model(torch.randn(1, 3, 32, 32), text_embeddings=unit(classes, 16), labels=labels)
    assert outputs.logits.shape == (1, classes, 16, 16)
    outputs.loss.backward()
    assert bool(outputs.loss.isfinite())


@pytest.mark.parametrize("values", [1, 3000, 10000])
def test_classes_in_parts_through_the_decoder(monkeypatch, model, values):
    pixels, text = torch.randn(2, 3, 24, 40), unit(7, 16)
    passes = []
    model.head.decoder.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        expected = model(pixels, text_embeddings=text).logits
        assert len(passes) == 1
        monkeypatch.setattr(catseg, "_DECODER_VALUES", values)
        found = model(pixels, text_embeddings=text).logits
    # 2 images x 15 patches x 16 (4 + 2) channels = 2880 values a class; the coarse block has 4 (8 + 4) only.
    assert len(passes) == 1 + {1: 7, 3000: 7, 10000: 3}[values]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("k", [5, 6])
def test_a_prefilter_of_all_classes_changes_nothing(model, k):
    pixels, text = torch.randn(2, 3, 32, 32), unit(5, 16)
    with torch.no_grad():
        expected = model.eval()(pixels, text_embeddings=text).logits
        assert torch.equal(with_prefilter(model, k)(pixels, text_embeddings=text).logits, expected)


def test_the_prefilter_keeps_the_best_classes_of_every_image(model):
    pixels, text = torch.randn(3, 3, 32, 32), unit(9, 16)
    model.eval()
    filtered = with_prefilter(model, 4)
    with torch.no_grad():
        outputs = filtered(pixels, text_embeddings=text)
        tokens = model.get_dense_features(pixels)
        chosen = set()
        for image in range(3):
            best = [float((tokens[image] * name[:, None, None]).sum(0).max()) for name in text]
            kept = sorted(sorted(range(9), key=lambda i: best[i], reverse=True)[:4])
            chosen.add(tuple(kept))
            alone = model(pixels[image : image + 1], text_embeddings=text[kept]).logits
            torch.testing.assert_close(outputs.logits[image, kept], alone[0], atol=1e-5, rtol=1e-5)
            dropped = [i for i in range(9) if i not in kept]
            assert bool((outputs.logits[image, dropped] == catseg.DROPPED_LOGIT).all())
    assert len(chosen) > 1  # the images differ in what they keep
    assert outputs.logits.shape == (3, 9, 16, 16)
    assert bool(outputs.logits.softmax(1).isfinite().all())


def test_dropped_classes_do_not_count_in_the_loss(model):
    """With one class kept, every pixel is asked whether it is that class."""
    filtered = with_prefilter(model, 1).train()
    pixels, text, labels = torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 16, 16)
    outputs = filtered(pixels, text_embeddings=text, labels=labels)
    kept = outputs.logits.amax((2, 3)).argmax(1)
    logits = torch.stack([maps[index] for maps, index in zip(outputs.logits, kept, strict=True)])
    targets, counted = (labels == kept[:, None, None]).float(), labels != IGNORED
    expected = binary_cross_entropy_with_logits(logits[counted], targets[counted])
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in filtered.parameters() if p.grad is not None)


def test_every_alias_has_a_channel(model, tiny_tokenizer, tiny_image_processor):
    pixels = torch.randn(1, 3, 32, 32)
    vocabulary = model.eval().encode_vocabulary(Vocabulary(["cat", "sofa; couch"]), tiny_tokenizer)
    with torch.no_grad():
        outputs = model(pixels, vocabulary=vocabulary)
        expected = model(pixels, text_embeddings=vocabulary.text_embeddings)
    assert outputs.logits.shape == (1, 3, 16, 16)
    assert torch.equal(outputs.logits, expected.logits)
    assert outputs.vocabulary is vocabulary
    processor = OpenVocabularyProcessor(tiny_image_processor, tiny_tokenizer)
    result = processor.post_process_semantic_segmentation(outputs, [(16, 16)])[0]
    assert torch.equal(result.segmentation, torch.tensor([0, 1, 1])[outputs.logits[0].argmax(0)])


# Shapes


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24), (8, 56)])
def test_logits_are_four_times_as_fine_as_the_patches(model, size):
    grid = (size[0] // 8, size[1] // 8)
    outputs = model(torch.randn(2, 3, *size), text_embeddings=unit(5, 16))
    assert outputs.logits.shape == (2, 5, 4 * grid[0], 4 * grid[1])
    assert outputs.dense_embeds.shape == (2, 16, *grid)
    assert outputs.loss is None


def test_images_of_a_batch_do_not_meet(model):
    pixels, text = torch.randn(2, 3, 40, 24), unit(4, 16)
    with torch.no_grad():
        both = model(pixels, text_embeddings=text).logits
        apart = torch.cat([model(image[None], text_embeddings=text).logits for image in pixels])
    torch.testing.assert_close(both, apart, atol=1e-5, rtol=1e-5)


def test_rows_of_the_grid_are_rows_of_the_image(model):
    pixels = torch.randn(1, 3, 24, 40)
    changed = pixels.clone()
    changed[..., 16:, 32:] += 3
    with torch.no_grad():
        before, after = model.encode(pixels), model.encode(changed)
    for first, second in zip(before, after, strict=True):
        distance = (first - second).norm(dim=1)[0]
        assert distance.shape == (3, 5)
        assert int(distance.argmax()) == 14  # row 2, column 4


def test_half_precision(model):
    pixels, text, labels = torch.randn(1, 3, 32, 32), unit(3, 16), random_labels(1, 32, 32)
    with torch.no_grad():
        expected = model(pixels, text_embeddings=text, labels=labels)
        model.to(torch.bfloat16)
        found = model(pixels.bfloat16(), text_embeddings=text, labels=labels)
    assert found.logits.dtype == torch.bfloat16
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected.loss, atol=0.3, rtol=0.05)


def test_an_exported_graph_takes_any_number_of_images_and_names(model):
    class LogitsOnly(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model.eval()

        def forward(self, pixels, text):
            return self.model(pixels, text_embeddings=text).logits

    images, names = torch.export.Dim("images", min=1, max=16), torch.export.Dim("names", min=2, max=1000)
    example = (torch.randn(2, 3, 24, 40), unit(4, 16))
    graph = torch.export.export(LogitsOnly(), example, dynamic_shapes=({0: images}, {0: names})).module()
    pixels, text = torch.randn(3, 3, 24, 40), unit(9, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            graph(pixels, text), model(pixels, text_embeddings=text).logits, atol=1e-5, rtol=1e-5
        )


# Features


def test_features_stand_for_their_images(model):
    pixels, text, labels = torch.randn(2, 3, 24, 40), unit(3, 16), random_labels(2, 24, 40)
    with torch.no_grad():
        expected = model(pixels, text_embeddings=text, labels=labels)
        features = model.encode(pixels)
        for kept in (features, tuple(features), [part.clone() for part in features]):
            found = model(features=kept, text_embeddings=text, labels=labels)
            assert torch.equal(found.logits, expected.logits)
            assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize(("layers", "expected"), [(None, (1, 2)), ([2, 1], (2, 1)), ([1, 1], (1, 1))])
def test_guidance_layers_are_counted_from_one(clip, layers, expected):
    model = CATSegForSegmentation.from_clip(clip, **SMALL, guidance_layers=layers).eval()
    pixels = torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        features = model.encode(pixels)
        tower = clip.vision_model(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    assert isinstance(features, CATSegFeatures)
    for found, layer in zip((features.fine, features.coarse), expected, strict=True):
        tokens = tower.hidden_states[layer][:, 1:]
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("layers", "expected"), [(2, (1, 1)), (12, (4, 8)), (24, (8, 16))])
def test_guidance_comes_from_a_third_and_two_thirds_of_the_tower(tiny_clip_config, layers, expected):
    values = tiny_clip_config(num_hidden_layers=layers).to_dict()
    values.pop("model_type")
    assert CATSegConfig(**values).tapped_layers == expected


def test_heads_train_on_kept_features(model):
    text, labels = unit(3, 16), random_labels(2, 32, 32)
    with torch.no_grad():
        features = model.encode(torch.randn(2, 3, 32, 32))
    model(features=features, text_embeddings=text, labels=labels).loss.backward()
    assert all(p.grad is None for p in model.vision_model.parameters())
    assert all(p.grad is not None for p in model.head.parameters())


# The loss


def test_the_loss_of_a_hand_computed_case(model):
    """Logits 0 and ln 3, labels 0, 1 and one ignored pixel.

    Pixel 0: -ln sigmoid(0) - ln(1 - sigmoid(ln 3)) = ln 2 + ln 4; pixel 1: ln 2 - ln(3/4). Mean of the four terms:
    (ln 2 + ln 4 + ln 2 + ln 4 - ln 3) / 4 = (6 ln 2 - ln 3) / 4.
    """
    logits = torch.tensor([0.0, 3.0]).log().nan_to_num(neginf=0.0)[None, :, None, None].expand(1, 2, 1, 3)
    labels = torch.tensor([[[0, 1, IGNORED]]])
    found = catseg._sigmoid_loss(logits, labels, IGNORED, None)
    two, three = torch.tensor([2.0, 3.0]).log()
    torch.testing.assert_close(found, (6 * two - three) / 4)


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (20, 52), (5, 3)])
def test_the_loss_is_that_of_enlarged_logits(model, size):
    pixels, text, labels = torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, *size)
    with torch.no_grad():
        outputs = model(pixels, text_embeddings=text, labels=labels)
    full = interpolate(outputs.logits, size=size, mode="bilinear", align_corners=False).movedim(1, -1)
    counted = labels != IGNORED
    targets = one_hot(labels[counted], 3).float()
    torch.testing.assert_close(outputs.loss, binary_cross_entropy_with_logits(full[counted], targets))


def test_ignored_pixels_do_not_count(clip):
    model = shaken(CATSegForSegmentation.from_clip(clip, **SMALL, semantic_loss_ignore_index=-100))
    pixels, text, labels = torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 8, 8)
    labels[labels == IGNORED] = -100
    labels[1] = -100
    with torch.no_grad():
        both = model(pixels, text_embeddings=text, labels=labels).loss
        first = model(pixels[:1], text_embeddings=text, labels=labels[:1]).loss
    torch.testing.assert_close(both, first)


def test_a_batch_of_ignored_pixels_has_no_loss(model):
    outputs = model(torch.randn(2, 3, 32, 32), text_embeddings=unit(3, 16), labels=torch.full((2, 32, 32), IGNORED))
    assert float(outputs.loss.detach()) == 0
    outputs.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and bool((gradient == 0).all()) for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_other_integer_types(model, dtype):
    pixels, text, labels = torch.randn(1, 3, 32, 32), unit(3, 16), random_labels(1, 16, 16)
    with torch.no_grad():
        expected = model(pixels, text_embeddings=text, labels=labels).loss
        assert torch.equal(model(pixels, text_embeddings=text, labels=labels.to(dtype)).loss, expected)


# What trains


def backward(model, pixels, text, labels):
    loss = model(pixels, text_embeddings=text, labels=labels).loss
    loss.backward()
    return loss.detach()


def queries_and_values(layers, unread=()):
    prefix = "vision_model.encoder.layers."
    names = {f"{prefix}{i}.self_attn.{n}_proj.{p}" for i in layers for n in "qv" for p in ("weight", "bias")}
    return names - {f"{prefix}{i}.self_attn.q_proj.{p}" for i in unread for p in ("weight", "bias")}


@pytest.mark.parametrize(
    ("mode", "unread"), [("vanilla", ()), ("sclip", ()), ("clearclip", ()), ("naclip", (2,)), ("maskclip", (2,))]
)
def test_gradients_reach_head_queries_and_values_alone(clip, mode, unread):
    """The queries of the last layer train where the mode reads them."""
    model = shaken(CATSegForSegmentation.from_clip(clip, **SMALL, segmentation_mode=mode)).train()
    backward(model, torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 32, 32))
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    head = {name for name, _ in model.named_parameters() if name.startswith("head.")}
    assert reached == head | queries_and_values(range(3), unread)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == reached


def test_layers_without_heads_are_left_out(make_tiny_clip):
    values = make_tiny_clip().config.to_dict()
    values.pop("model_type")
    values["vision_config"]["per_layer_config"] = {"0": {"num_attention_heads": 0}, "1": {"skip": ["attention"]}}
    model = CATSegForSegmentation.from_clip(SparseCLIPModel(SparseCLIPConfig(**values)), **SMALL)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head.")}
    assert trained == queries_and_values([2], [2])


def test_another_choice_of_layers(model):
    selection = select_layers(model, "depth", 0.5, target_modules=["q_proj", "k_proj", "v_proj", "fc1"])
    freeze_unselected(model, selection, ["head"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {f"{name}.{part}" for name in selection.names for part in ("weight", "bias")}
    assert trained == expected | {name for name, _ in model.named_parameters() if name.startswith("head.")}
    chosen = [name for name in selection.names if name.startswith("vision_model.")]
    assert any(name.endswith("fc1") for name in chosen)
    backward(model, torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 32, 32))
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= trained


def test_a_frozen_tower_keeps_no_graph(model):
    seen = []
    model.vision_model.requires_grad_(False)
    model.head.register_forward_pre_hook(lambda _, inputs: seen.extend(part.requires_grad for part in inputs[0]))
    backward(model, torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 32, 32))
    assert seen == [False, False, False]


def test_guidance_needs_no_graph_below_the_trained_layers(model):
    """With layer 2 alone trained, the map of layer 1 is still free of a graph."""
    seen = []
    model.vision_model.requires_grad_(False)
    model.vision_model.encoder.layers[1].self_attn.v_proj.requires_grad_(True)
    model.head.register_forward_pre_hook(lambda _, inputs: seen.extend(part.requires_grad for part in inputs[0]))
    backward(model, torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 32, 32))
    assert seen == [True, False, True]


def test_activation_checkpointing_changes_no_gradient(model):
    batch = (torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 32, 32))
    passes = {"tower": 0, "block": 0, "decoder": 0}

    def count(name):
        return lambda *_: passes.update({name: passes[name] + 1})

    model.vision_model.encoder.layers[1].mlp.register_forward_pre_hook(count("tower"))
    model.head.blocks[0].classes.register_forward_pre_hook(count("block"))
    model.head.decoder.fine.register_forward_pre_hook(count("decoder"))
    loss = backward(model, *batch)
    assert set(passes.values()) == {1}
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.activation_checkpointing_enable()
    torch.testing.assert_close(backward(model, *batch), loss, atol=1e-6, rtol=0)
    assert set(passes.values()) == {3}  # once more, and again on the way back
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)


def test_the_untrained_head_learns_from_the_second_step(clip):
    model = CATSegForSegmentation.from_clip(clip, **SMALL).train()
    batch = (torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 32, 32))
    before = backward(model, *batch)
    moved = {name for name, p in model.head.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == {"decoder.output.weight", "decoder.output.bias", "logit_scale"}
    torch.optim.SGD(model.head.parameters(), lr=1e-3).step()
    model.zero_grad()
    assert backward(model, *batch) < before
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.head.parameters())


@pytest.mark.parametrize("cost_residual", [True, False])
def test_a_few_steps_lower_the_loss(clip, cost_residual):
    model = CATSegForSegmentation.from_clip(clip, **SMALL, cost_residual=cost_residual).train()
    batch = (torch.randn(2, 3, 32, 32), unit(3, 16), random_labels(2, 32, 32))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(float(backward(model, *batch)))
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


# From a CLIP


@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_from_clip_copies_the_weights(tiny_clip, tiny_images, kind):
    clip = dense_clip(tiny_clip) if kind == "dense" else pruned_clip(tiny_clip, tiny_images)
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    trained = {name: p.requires_grad for name, p in clip.named_parameters()}
    config = clip.config.to_dict()
    model = CATSegForSegmentation.from_clip(clip, **SMALL)
    state = model.state_dict()
    assert {name for name in state if not name.startswith("head.")} == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    with torch.no_grad():  # a copy: no storage is shared
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(clip.state_dict()[name], value) for name, value in before.items())
    assert {name: p.requires_grad for name, p in clip.named_parameters()} == trained
    assert clip.config.to_dict() == config
    assert bool(model(torch.randn(1, 3, 32, 32), text_embeddings=unit(2, 16)).logits.isfinite().all())


def test_from_other_segmenters_the_head_is_new(model, clip):
    other = DeepLabV3PlusForSegmentation.from_clip(clip, classifier_scale=3.0, decoder_channels=24)
    torch.manual_seed(5)
    first = CATSegForSegmentation.from_clip(other, **SMALL)
    again = CATSegForSegmentation.from_clip(model, aggregation_blocks=2)
    assert (first.config.classifier_scale, first.config.initial_scale) == (None, 40.0)
    assert not hasattr(first.config, "atrous_rates")
    assert (again.config.cost_channels, again.config.aggregation_blocks) == (16, 2)
    states = [each.state_dict() for each in (first, again, clip)]
    assert all(torch.equal(states[0][name], value) for name, value in states[2].items())
    assert all(torch.equal(states[1][name], value) for name, value in states[2].items())
    name = "head.embed.weight"
    assert not torch.equal(states[1][name], model.state_dict()[name])


def test_the_precision_of_the_clip_is_kept(clip):
    model = CATSegForSegmentation.from_clip(clip.to(torch.bfloat16), **SMALL)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_head_is_drawn_from_the_seed(clip):
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(CATSegForSegmentation.from_clip(clip, **SMALL).state_dict()["head.embed.weight"])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


# Options and errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost_channels": 0}, "cost_channels is 0. It must be positive"),
        ({"aggregation_blocks": 0}, "aggregation_blocks is 0. It must be positive"),
        ({"window_size": -1}, "window_size is -1. It must be positive"),
        ({"aggregation_heads": 0}, "aggregation_heads is 0. It must be positive"),
        ({"aggregation_heads": 3}, "cost_channels is 16, with aggregation_heads=3. The heads must divide"),
        ({"guidance_channels": 0}, "guidance_channels is 0. It must be positive"),
        ({"text_guidance_channels": 0}, "text_guidance_channels is 0. It must be positive"),
        ({"vocab_prefilter": 0}, "vocab_prefilter is 0. It must be positive"),
        ({"classifier_scale": 0.0}, "classifier_scale is 0.0. It must be positive"),
        ({"decoder_channels": [8]}, r"decoder_channels is \[8\]. It must hold two positive integers"),
        ({"decoder_channels": [8, 0]}, r"decoder_channels is \[8, 0\]. It must hold two positive integers"),
        ({"guidance_layers": [1]}, r"guidance_layers is \[1\]. It must hold two integers in \[1, 2\]"),
        ({"guidance_layers": [0, 1]}, r"guidance_layers is \[0, 1\]. It must hold two integers in \[1, 2\]"),
        ({"guidance_layers": [1, 3]}, r"guidance_layers is \[1, 3\]. It must hold two integers in \[1, 2\]"),
    ],
)
def test_impossible_options_are_refused(clip, options, message):
    with pytest.raises(Exception, match=message) as caught:
        CATSegForSegmentation.from_clip(clip, **{**SMALL, **options})
    causes = (caught.value, caught.value.__cause__)  # huggingface_hub wraps what its validation raises
    assert any(isinstance(cause, ValueError) for cause in causes)


def test_a_tower_of_one_layer_is_refused(make_tiny_clip):
    clip = dense_clip(make_tiny_clip(num_hidden_layers=1))
    with pytest.raises(Exception, match=r"The vision tower has 1 layer. The decoder is guided by a layer before"):
        CATSegForSegmentation.from_clip(clip, **SMALL)


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
    pixels = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"The image is 30 x 32 pixels. Both sides must be multiples of the patch"):
        model(torch.randn(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"The vocabulary has no text embeddings. It must be encoded"):
        model(pixels, vocabulary=Vocabulary(["cat"]))
    with pytest.raises(ValueError, match="There are neither pixel_values nor features"):
        model(text_embeddings=unit(2, 16))
    with pytest.raises(ValueError, match="There are both pixel_values and features"):
        model(pixels, features=model.encode(pixels))
    assert model(pixels).logits is None


# Disk


def outputs_of(model, pixels, text, labels):
    # A copy in memory: memory-mapped weights are aligned otherwise and round otherwise.
    copied = CATSegForSegmentation(model.config).eval()
    copied.load_state_dict(model.state_dict())
    with torch.no_grad():
        return copied(pixels, text_embeddings=text, labels=labels)


@pytest.mark.parametrize("kind", ["dense", "pruned"])
@pytest.mark.parametrize("cost_residual", [True, False])
def test_saved_models_load_as_they_were(tmp_path, tiny_clip, tiny_images, kind, cost_residual):
    clip = dense_clip(tiny_clip) if kind == "dense" else pruned_clip(tiny_clip, tiny_images)
    options = {
        **SMALL,
        "guidance_layers": [2, 1],
        "vocab_prefilter": 2,
        "cost_residual": cost_residual,
        "classifier_scale": 3.0,
        "classifier_bias": -1.0,
        "semantic_loss_ignore_index": 9,
    }
    model = shaken(CATSegForSegmentation.from_clip(clip, **options))
    model.save_pretrained(tmp_path)
    loaded = CATSegForSegmentation.from_pretrained(tmp_path)
    assert all(getattr(loaded.config, name) == value for name, value in options.items())
    assert CATSegConfig.from_pretrained(tmp_path) == model.config
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())
    trained = [{name for name, p in each.named_parameters() if p.requires_grad} for each in (model, loaded)]
    assert trained[0] == trained[1]
    batch = (torch.randn(2, 3, 24, 40), unit(3, 16), torch.randint(0, 3, (2, 24, 40)))
    expected, found = outputs_of(model, *batch), outputs_of(loaded, *batch)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logits, expected.logits)


def test_a_plain_clip_has_no_head_to_load(tiny_clip_folder, model):
    with pytest.raises(ValueError, match=r"holds a model of type 'clip'. CATSegConfig reads sparse_clip_catseg"):
        CATSegForSegmentation.from_pretrained(tiny_clip_folder)
    with pytest.raises(ValueError, match=r"lacks \d+ of the weights that CATSegForSegmentation needs, .*head\."):
        CATSegForSegmentation.from_pretrained(tiny_clip_folder, config=model.config)


def test_a_missing_head_weight_is_refused(tmp_path, model):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items() if name != "head.logit_scale"}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the weights .* among them head.logit_scale"):
        CATSegForSegmentation.from_pretrained(tmp_path)
