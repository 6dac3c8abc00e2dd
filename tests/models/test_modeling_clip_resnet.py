"""CLIP's ResNet: the formulas, the names of three libraries, the published counts, and its way through disk."""

from typing import Any

import pytest
import torch
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, multi_head_attention_forward, relu
from transformers import AutoModel

from hf_opentrans import CLIPResNetVisionConfig, CLIPResNetVisionModel, select_layers
from hf_opentrans.pruning.nominal import nominal_account

SMALL: dict[str, Any] = {"depths": [1, 2, 1, 1], "width": 8, "projection_dim": 12, "num_attention_heads": 4}
# Convolutions that the original method freezes on OpenAI's RN50 weights.
GOLDEN = ["conv1", "conv2", "conv3"]
GOLDEN += [f"layer1.{name}" for name in ("0.conv1", "0.conv2", "1.conv2", "1.conv3", "2.conv2", "2.conv3")]
GOLDEN += [f"layer2.{name}" for name in ("0.conv1", "0.conv2", "0.downsample.0", "1.conv1", "1.conv2", "2.conv2")]
GOLDEN += [f"layer2.{name}" for name in ("2.conv3", "3.conv2", "3.conv3")]
GOLDEN += [f"layer3.{name}" for name in ("0.conv1", "0.conv2", "1.conv2", "2.conv2", "3.conv2", "4.conv2", "5.conv2")]
GOLDEN += [f"layer4.{name}" for name in ("0.conv2", "2.conv2")]
CONVOLUTIONS = r"conv\d|layer\d\..*"


def small(seed=0, **changes) -> Any:
    torch.manual_seed(seed)
    model = CLIPResNetVisionModel(CLIPResNetVisionConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and value.ndim == 1:
                value.add_(0.1 * torch.rand_like(value) if "var" in name else 0.1 * torch.randn_like(value))
    return model


@pytest.fixture(scope="module")
def rn50() -> Any:
    torch.manual_seed(0)
    return CLIPResNetVisionModel(CLIPResNetVisionConfig()).eval()


def reference(weights, pixels, depths, heads):
    """Compute CLIP's ResNet from its weights alone, with functions and no modules."""

    def step(x, conv, norm, stride=1):
        kernel = weights[f"{conv}.weight"]
        x = conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        parts = [weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return batch_norm(x, *parts)

    x = relu(step(pixels, "conv1", "bn1", 2))
    x = relu(step(x, "conv2", "bn2"))
    x = avg_pool2d(relu(step(x, "conv3", "bn3")), 2)
    for stage, depth in enumerate(depths, 1):
        for block in range(depth):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            inner = relu(step(x, f"{name}.conv1", f"{name}.bn1"))
            inner = avg_pool2d(relu(step(inner, f"{name}.conv2", f"{name}.bn2")), stride)
            inner = step(inner, f"{name}.conv3", f"{name}.bn3")
            if f"{name}.downsample.0.weight" in weights:
                x = step(avg_pool2d(x, stride), f"{name}.downsample.0", f"{name}.downsample.1")
            x = relu(inner + x)
    tokens = x.flatten(2).permute(2, 0, 1)
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + weights["attnpool.positional_embedding"][:, None]
    names = [f"attnpool.{part}_proj" for part in "qkvc"]
    biases = torch.cat([weights[f"{name}.bias"] for name in names[:3]])
    pooled, _ = multi_head_attention_forward(
        query=tokens[:1],
        key=tokens,
        value=tokens,
        embed_dim_to_check=tokens.shape[-1],
        num_heads=heads,
        in_proj_weight=None,
        in_proj_bias=biases,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=weights["attnpool.c_proj.weight"],
        out_proj_bias=weights["attnpool.c_proj.bias"],
        use_separate_proj_weight=True,
        training=False,
        need_weights=False,
        q_proj_weight=weights["attnpool.q_proj.weight"],
        k_proj_weight=weights["attnpool.k_proj.weight"],
        v_proj_weight=weights["attnpool.v_proj.weight"],
    )
    return x, pooled[0]


def test_it_computes_what_clips_resnet_does():
    model = small(image_size=64)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = model(pixels, output_hidden_states=True)
        features, pooled = reference(model.state_dict(), pixels, SMALL["depths"], SMALL["num_attention_heads"])
    torch.testing.assert_close(found.last_hidden_state, features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.pooler_output, pooled, atol=1e-5, rtol=1e-5)
    assert [tuple(each.shape[1:]) for each in found.hidden_states] == [
        (32, 16, 16),
        (64, 8, 8),
        (128, 4, 4),
        (256, 2, 2),
    ]


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (96, 64), (100, 70)])
def test_any_size_gets_an_embedding_and_a_dense_map(size):
    model = small(image_size=64)
    with torch.no_grad():
        outputs, dense = model(torch.randn(2, 3, *size)), model.get_dense_features(torch.randn(2, 3, *size))
    assert outputs.pooler_output.shape == (2, 12)
    assert dense.shape == (2, 12, *outputs.last_hidden_state.shape[2:])
    torch.testing.assert_close(dense.norm(dim=1), torch.ones(2, *dense.shape[2:]))


def test_positions_of_the_trained_size_are_taken_as_they_are():
    pool = small(image_size=96).attnpool
    assert pool.positions(3, 3) is pool.positional_embedding
    resized = pool.positions(6, 3)
    assert resized.shape == (19, 256)
    assert torch.equal(resized[0], pool.positional_embedding[0])


def test_a_dense_position_is_the_pool_with_all_attention_on_it():
    model = small(image_size=32)  # a single position: its mean is itself, attention has nowhere else to go
    with torch.no_grad():
        model.attnpool.positional_embedding.zero_()
        outputs = model(torch.randn(1, 3, 32, 32))
        dense = model.attnpool.dense(outputs.last_hidden_state)
    torch.testing.assert_close(dense[..., 0, 0], outputs.pooler_output, atol=1e-5, rtol=1e-5)


# Counts of the publication


def test_the_counts_are_those_of_the_publication(rn50):
    """55 convolutions with 23,474,016 weights; 54 are pruned; layer1 to layer4 take 104.7 GMAC at 1024 pixels."""
    convolutions = {name: m for name, m in rn50.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert len(convolutions) == 55
    assert sum(m.weight.numel() for m in convolutions.values()) == 23_474_016
    account = nominal_account(rn50, (1024, 1024))
    assert (account.candidates, account.conv_weights) == (54, 23_473_152)
    assert account.conv_macs / 1e9 == pytest.approx(104.7, abs=0.05)
    stem = sum(convolutions[name].weight.numel() for name in ("conv2", "conv3")) * 512**2
    everything = nominal_account(rn50, (1024, 1024), mac_modules=".*")
    assert everything.conv_macs == account.conv_macs + stem
    assert account.density == pytest.approx(0.0985, abs=5e-5)
    # 44.1 M -> 22.9 M, and -94.5 G to -94.9 G in the publication's tables, whatever head stands on the trunk.
    assert (account.params - account.nominal_params) / 1e6 == pytest.approx(21.16, abs=0.005)
    assert (account.macs - account.nominal_macs) / 1e9 == pytest.approx(94.5, abs=0.15)
    assert account.params == sum(p.numel() for p in rn50.parameters())  # zeros take as much room as before


def test_the_golden_layers_are_convolutions_of_this_model(rn50):
    names = [name for name, module in rn50.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(GOLDEN) == len(set(GOLDEN)) == 27
    assert set(GOLDEN) < set(names)


def test_alpha_freezes_27_of_its_55_convolutions(rn50):
    selection = select_layers(rn50, "alpha", 0.5, target_modules=CONVOLUTIONS)
    assert (len(selection.names), len(selection.frozen)) == (28, 27)


def test_models_without_convolutions_have_no_nominal_account(tiny_clip):
    with pytest.raises(ValueError, match=r"has 1 convolutions. The reference prunes all but the first"):
        nominal_account(tiny_clip.vision_model, (32, 32))
    with pytest.raises(ValueError, match=r"rate is 1\.0"):
        nominal_account(small(), (32, 32), rate=1.0)


# Names and disk


def as_timm(name):
    """Translate a name to timm's, by the rules of its own importer."""
    parts = name.split(".")
    if parts[0].startswith("layer"):
        stage, block, layer = int(parts[0][-1]) - 1, parts[1], parts[2]
        if layer == "downsample":
            inner = f"shortcut.conv.{'conv' if parts[3] == '0' else 'bn'}"
        else:
            kinds = {"1": "conv1_1x1", "2": "conv2_kxk", "3": "conv3_1x1"}
            inner = f"{kinds[layer[-1]]}.{layer[:-1]}"
        return ".".join(["stages", str(stage), block, inner, parts[-1]])
    if parts[0] == "attnpool":
        renamed = {"positional_embedding": "pos_embed", "c_proj": "proj"}
        middle: str = renamed.get(parts[1]) or parts[1].removesuffix("_proj")
        return ".".join(["head", middle, *parts[2:]])
    return f"stem.conv{parts[0][-1]}.{parts[0][:-1]}.{parts[1]}"


@pytest.mark.parametrize("source", ["openai", "timm", "plain"])
def test_weights_of_other_libraries_load(source):
    model = small(image_size=64, num_attention_heads=4)
    rename = {"openai": lambda name: f"visual.{name}", "timm": as_timm, "plain": lambda name: name}[source]
    state = {rename(name): value for name, value in model.state_dict().items()}
    if source == "openai":
        state |= {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    loaded = CLIPResNetVisionModel.from_state_dict(state, num_attention_heads=4)
    assert loaded.config.depths == SMALL["depths"]
    assert loaded.config.image_size == 64
    assert loaded.config.inner_channels is None
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).pooler_output, model(pixels).pooler_output)


def test_incomplete_or_foreign_weights_are_refused():
    state = small().state_dict()
    with pytest.raises(ValueError, match=r"1 are missing \(\['layer2.1.bn3.bias'\]\) and 0 are foreign"):
        CLIPResNetVisionModel.from_state_dict(
            {name: value for name, value in state.items() if name != "layer2.1.bn3.bias"}, num_attention_heads=4
        )
    with pytest.raises(ValueError, match="They need conv1 to conv3"):
        CLIPResNetVisionModel.from_state_dict({"transformer.weight": torch.ones(2)})


@pytest.mark.parametrize("inner", [None, [[3, 5], [2, 4], [16, 1], [7, 9], [64, 30]]])
def test_saved_models_load_as_they_were(tmp_path, inner):
    model = small(image_size=64, inner_channels=inner)
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is CLIPResNetVisionModel
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).pooler_output, model(pixels).pooler_output)
    again = CLIPResNetVisionModel.from_state_dict(model.state_dict(), num_attention_heads=4)
    assert again.config.bottlenecks == model.config.bottlenecks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": [1, 2, 3]}, "It must hold four positive numbers"),
        ({"num_attention_heads": 7}, "It must divide the 256 channels"),
        ({"inner_channels": [[8, 8]]}, "It must have two numbers for each of the 5 bottlenecks"),
        ({"inner_channels": [[8, 8], [16, 0], [16, 16], [32, 32], [64, 64]]}, r"bottleneck 1 is \[16, 0\]"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        CLIPResNetVisionConfig(**{**SMALL, **changes})


def test_tiny_images_are_refused():
    with pytest.raises(ValueError, match=r"The image is 31 x 64 pixels. Both sides must be at least 32"):
        small()(torch.randn(1, 3, 31, 64))
