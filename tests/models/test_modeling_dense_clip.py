"""Dense modes against a plain re-derivation with loops over heads and tokens, on random CLIP weights."""

import math
from typing import cast

import pytest
import torch
from torch.nn.functional import layer_norm, linear, normalize
from transformers import CLIPVisionModel

from hf_opentrans import DenseCLIPForSegmentation, SparseCLIPConfig, SparseCLIPModel, Vocabulary, slice_model
from hf_opentrans.models.modeling_open_vocabulary import neighbour_bias
from hf_opentrans.pruning import LayerPlan, PruningPlan

MODES = ["vanilla", "maskclip", "sclip", "clearclip", "naclip"]
# As published: SCLIP keeps the residual connection and the MLP, the later ones drop both.
REDUCED = {"vanilla": False, "maskclip": True, "sclip": False, "clearclip": True, "naclip": True}


@pytest.fixture
def dense(tmp_path, tiny_clip):
    tiny_clip.save_pretrained(tmp_path / "clip")
    return DenseCLIPForSegmentation.from_pretrained(tmp_path / "clip")


def unit(*shape):
    return normalize(torch.randn(*shape), dim=-1)


def last_block_input(clip, pixels):
    vision = CLIPVisionModel(clip.config.vision_config).eval()
    vision.load_state_dict(clip.vision_model.state_dict())
    with torch.no_grad():
        return vision(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-2]


def attention_weights(left, right, scale, bias):
    """Softmax over tokens of scale * left . right + bias, one token at a time."""
    rows = []
    for i in range(len(left)):
        scores = torch.stack([scale * (left[i] * right[j]).sum() + bias[i][j] for j in range(len(right))])
        powers = torch.exp(scores - scores.max())
        rows.append(powers / powers.sum())
    return torch.stack(rows)


def gaussian_bias(grid):
    points = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    bias = [[0.0] * (1 + len(points)) for _ in range(1 + len(points))]
    for i, (a, b) in enumerate(points):
        for j, (c, d) in enumerate(points):
            bias[1 + i][1 + j] = math.exp(-((a - c) ** 2 + (b - d) ** 2) / (2 * 5.0**2))
    return bias


def plain_attention(layer, hidden, grid, mode):
    """Return the attention output of one image, `hidden` of shape (tokens, 32), 4 heads of width 8."""
    attention, norm = layer.self_attn, layer.layer_norm1
    x = layer_norm(hidden, (32,), norm.weight, norm.bias, 1e-5)
    q, k, v = (linear(x, part.weight, part.bias) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    scale, none = 8**-0.5, [[0.0] * len(x) for _ in x]
    heads = []
    for head in range(4):
        columns = slice(8 * head, 8 * head + 8)
        qh, kh, vh = q[:, columns], k[:, columns], v[:, columns]
        if mode == "vanilla":
            weights = attention_weights(qh, kh, scale, none)
        elif mode == "maskclip":
            weights = torch.eye(len(x))
        elif mode == "sclip":
            weights = attention_weights(qh, qh, scale, none) + attention_weights(kh, kh, scale, none)
        elif mode == "clearclip":
            weights = attention_weights(qh, qh, scale, none)
        else:
            weights = attention_weights(kh, kh, scale, gaussian_bias(grid))
        heads.append(weights @ vh)
    return linear(torch.cat(heads, dim=1), attention.out_proj.weight, attention.out_proj.bias)


def plain_tokens(clip, pixels, mode, reduced):
    """Return unit tokens of shape (batch, dim, grid height, grid width)."""
    layer, vision = clip.vision_model.encoder.layers[-1], clip.vision_model
    grid = (pixels.shape[2] // 8, pixels.shape[3] // 8)
    images = []
    with torch.no_grad():
        for hidden in last_block_input(clip, pixels):
            attended = plain_attention(layer, hidden, grid, mode)
            if reduced:
                out = attended
            else:
                out = hidden + attended
                inner = layer_norm(out, (32,), layer.layer_norm2.weight, layer.layer_norm2.bias, 1e-5)
                inner = linear(inner, layer.mlp.fc1.weight, layer.mlp.fc1.bias)
                inner = inner * torch.sigmoid(1.702 * inner)
                out = out + linear(inner, layer.mlp.fc2.weight, layer.mlp.fc2.bias)
            norm = vision.post_layernorm
            out = layer_norm(out[1:], (32,), norm.weight, norm.bias, 1e-5) @ clip.visual_projection.weight.T
            out = out / out.square().sum(1, keepdim=True).sqrt()
            images.append(out.T.reshape(-1, *grid))
    return torch.stack(images)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_modes_equal_the_plain_derivation(tiny_clip, dense, mode, reduced):
    pixels = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        ours = dense.get_dense_features(pixels, mode, reduced)
    torch.testing.assert_close(ours, plain_tokens(tiny_clip, pixels, mode, reduced), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_whole_or_reduced_as_published(dense, mode):
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(
            dense.get_dense_features(pixels, mode), dense.get_dense_features(pixels, mode, REDUCED[mode])
        )


def test_the_modes_differ(dense):
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        found = [dense.get_dense_features(pixels, mode, reduced) for mode in MODES for reduced in (False, True)]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(found) for b in found[:i])


def test_the_config_chooses_mode_and_reduction(dense):
    pixels = torch.randn(1, 3, 32, 32)
    dense.config.segmentation_mode, dense.config.segmentation_reduced = "sclip", True
    with torch.no_grad():
        assert torch.equal(dense(pixels).dense_embeds, dense.get_dense_features(pixels, "sclip", True))
        dense.config.segmentation_reduced = None
        assert torch.equal(dense(pixels).dense_embeds, dense.get_dense_features(pixels, "sclip", False))


def test_vanilla_equals_the_ordinary_forward_pass(tiny_clip, dense):
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        hidden = tiny_clip.vision_model(pixels).last_hidden_state[:, 1:]
        tokens = normalize(tiny_clip.visual_projection(tiny_clip.vision_model.post_layernorm(hidden)), dim=-1)
        ours = dense.get_dense_features(pixels, "vanilla")
    torch.testing.assert_close(ours.flatten(2).transpose(1, 2), tokens)


def test_neighbour_bias_by_hand():
    bias = neighbour_bias((1, 2))
    # Two patches at distance 1: exp(-1 / 50); the class token gets no bias.
    near = math.exp(-1 / 50)
    torch.testing.assert_close(bias, torch.tensor([[0.0, 0, 0], [0, 1, near], [0, near, 1]]))


def test_logits_are_scaled_cosines(dense):
    pixels, text = torch.randn(2, 3, 24, 40), unit(7, 16)
    dense.config.segmentation_logit_scale = 25.0
    with torch.no_grad():
        outputs = dense(pixels, text_embeddings=text)
    expected = torch.stack([25 * (outputs.dense_embeds * row[None, :, None, None]).sum(1) for row in text], dim=1)
    assert outputs.logits.shape == (2, 7, 3, 5)
    torch.testing.assert_close(outputs.logits, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(outputs.dense_embeds.norm(dim=1), torch.ones(2, 3, 5))
    assert dense(pixels).logits is None


def brute_force_slide(dense, pixels, mode, side, step):
    """Average the logits of windows: one window of one image at a time, the last one shifted back."""

    def starts(length):
        found = list(range(0, max(length - side, 0), step))
        return [*found, max(length - side, 0)]

    total = torch.zeros(len(pixels), 16, pixels.shape[2] // 8, pixels.shape[3] // 8)
    count = torch.zeros(total.shape[2:])
    for y in starts(pixels.shape[2]):
        for x in starts(pixels.shape[3]):
            rows, columns = slice(y // 8, (y + side) // 8), slice(x // 8, (x + side) // 8)
            count[rows, columns] += 1
            for index in range(len(pixels)):
                window = pixels[index : index + 1, :, y : y + side, x : x + side]
                total[index, :, rows, columns] += dense.get_dense_features(window, mode)[0]
    return total / count


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [((40, 64), 32, 16), ((40, 56), 16, 8), ((48, 48), None, None), ((24, 40), 32, 16), ((16, 16), 32, 16)],
)
def test_slide_equals_a_loop_over_windows(dense, size, window, stride):
    pixels, text = torch.randn(3, 3, *size), unit(4, 16)
    with torch.no_grad():
        outputs = dense(
            pixels, text_embeddings=text, inference="slide", window_size=window, window_stride=stride, mode="naclip"
        )
        expected = brute_force_slide(dense, pixels, "naclip", window or 32, stride or 16)
    torch.testing.assert_close(outputs.dense_embeds, expected, atol=2e-5, rtol=1e-4)
    logits = 40 * torch.einsum("bdhw,qd->bqhw", expected, text)
    torch.testing.assert_close(outputs.logits, logits, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("queries", [1, 50])
@pytest.mark.parametrize("inference", ["whole", "slide"])
def test_never_one_forward_pass_per_class(dense, queries, inference):
    calls = []
    dense.vision_model.embeddings.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        dense(torch.randn(2, 3, 48, 64), text_embeddings=unit(queries, 16), inference=inference)
    assert len(calls) == 1  # the windows of "slide" form one batch


def test_it_has_the_state_dict_of_sparse_clip(tmp_path, dense):
    dense.save_pretrained(tmp_path / "dense")
    sparse = SparseCLIPModel.from_pretrained(tmp_path / "dense")
    assert sparse.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(value, dense.state_dict()[key]) for key, value in sparse.state_dict().items())
    assert sparse.config == dense.config


def test_a_sliced_model_segments(tiny_clip):
    plan = PruningPlan((LayerPlan((), (1, 2)), LayerPlan((0, 3), ()), LayerPlan((1, 2), tuple(range(9)))))
    small = slice_model(tiny_clip, plan)
    dense = DenseCLIPForSegmentation(cast("SparseCLIPConfig", small.config)).eval()
    dense.load_state_dict(small.state_dict())
    for mode in MODES:
        tokens = dense.get_dense_features(torch.randn(1, 3, 32, 32), mode)
        assert tokens.shape == (1, 16, 4, 4)
        assert bool(torch.isfinite(tokens).all())


def test_a_last_block_without_heads_is_refused(tiny_clip):
    plan = PruningPlan((LayerPlan((0,), (1,)), LayerPlan((0,), (1,)), LayerPlan((), (1,))))
    small = slice_model(tiny_clip, plan)
    dense = DenseCLIPForSegmentation(cast("SparseCLIPConfig", small.config)).eval()
    dense.load_state_dict(small.state_dict())
    assert dense.get_dense_features(torch.randn(1, 3, 32, 32), "vanilla").shape == (1, 16, 4, 4)
    with pytest.raises(ValueError, match=r"The last block has no attention heads. The mode 'naclip' reads them"):
        dense.get_dense_features(torch.randn(1, 3, 32, 32), "naclip")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dense, dtype):
    pixels, text = torch.randn(1, 3, 48, 48), unit(3, 16)
    with torch.no_grad():
        expected = dense(pixels, text_embeddings=text, inference="slide").logits
        found = dense.to(dtype)(pixels.to(dtype), text_embeddings=text, inference="slide").logits
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=2.5, rtol=0.1)  # of at most 40


def test_impossible_choices_are_refused(dense):
    pixels = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"mode is 'magic'. It must be one of vanilla, maskclip"):
        dense(pixels, mode="magic")
    with pytest.raises(ValueError, match=r"inference is 'tiles'. It must be 'whole' or 'slide'"):
        dense(pixels, inference="tiles")
    with pytest.raises(ValueError, match=r"The image is 30 x 32 pixels. Both sides must be multiples of the patch"):
        dense(torch.randn(1, 3, 30, 32))
    with pytest.raises(ValueError, match="The window of 4 pixels with stride None is too small"):
        dense(pixels, inference="slide", window_size=4)
    with pytest.raises(ValueError, match=r"The vocabulary has no text embeddings. It must be encoded"):
        dense(pixels, vocabulary=Vocabulary(["cat"]))


def test_vocabularies_are_encoded_once_by_the_text_tower(tiny_clip, dense, tiny_tokenizer):
    vocabulary = Vocabulary(["cat", "dog; sofa"], templates=["a photo of a {}", "the {}"])
    calls = []
    dense.text_model.register_forward_hook(lambda *_: calls.append(1))
    encoded = dense.encode_vocabulary(vocabulary, tiny_tokenizer)
    assert dense.encode_vocabulary(Vocabulary(*[vocabulary.classes, vocabulary.templates]), tiny_tokenizer) is encoded
    assert len(calls) == 1
    with torch.no_grad():
        for row, name in zip(encoded.text_embeddings, ["cat", "dog", "sofa"], strict=True):
            parts = []
            for text in (f"a photo of a {name}", f"the {name}"):
                ids = tiny_tokenizer([text], return_tensors="pt")
                parts.append(normalize(tiny_clip.get_text_features(**ids).pooler_output, dim=-1))
            expected = normalize((parts[0] + parts[1]) / 2, dim=-1)[0]
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)


def test_the_cache_of_vocabularies_is_bounded(dense, tiny_tokenizer):
    for index in range(12):
        dense.encode_vocabulary(Vocabulary([f"cat{index}"]), tiny_tokenizer)
    assert len(dense._vocabularies) <= 8


def test_changed_text_weights_are_not_hidden_by_the_cache(dense, tiny_tokenizer):
    vocabulary = Vocabulary(["cat"])
    before = dense.encode_vocabulary(vocabulary, tiny_tokenizer).text_embeddings
    dense.train()
    with torch.no_grad():
        dense.text_projection.weight.copy_(torch.randn_like(dense.text_projection.weight))
    assert not torch.allclose(before, dense.encode_vocabulary(vocabulary, tiny_tokenizer).text_embeddings)
