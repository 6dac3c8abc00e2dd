"""Which layers are found, what they are called, and how many a fraction is."""

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GitConfig, GitForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_opentrans.spectra.layers import (
    MatrixLayer,
    by_block,
    by_group,
    find_layers,
    how_many,
    is_elongated,
    matches,
)

PROJECTIONS = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def named(**modules):
    return nn.Sequential(OrderedDict(modules))


def bottleneck(width, **others):
    return named(
        conv1=nn.Conv2d(width, width, 1), bn1=nn.BatchNorm2d(width), conv2=nn.Conv2d(width, width, 3), **others
    )


def tiny_resnet():
    downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    return named(
        conv1=nn.Conv2d(3, 4, 3, bias=False),
        relu=nn.ReLU(),
        layer1=nn.Sequential(bottleneck(4, downsample=downsample), bottleneck(4)),
        fc=nn.Linear(4, 2),
    )


def test_all_layers_of_clip_are_found_in_the_models_order(tiny_clip):
    towers = {"text_model": 2, "vision_model": 3}
    expected = {
        f"{tower}.encoder.layers.{index}.{projection}"
        for tower, count in towers.items()
        for index in range(count)
        for projection in PROJECTIONS
    }
    expected |= {"vision_model.embeddings.patch_embedding", "visual_projection", "text_projection"}
    found = find_layers(tiny_clip)
    assert set(found) == expected
    assert len(found) == 33
    assert list(found) == [name for name, _ in tiny_clip.named_modules() if name in expected]
    assert all(name == layer.name for name, layer in found.items())


@pytest.mark.parametrize(
    ("name", "kind", "group", "block"),
    [
        (
            "vision_model.encoder.layers.2.mlp.fc1",
            "fc1",
            "vision_model.encoder.layers.*.mlp.fc1",
            "vision_model.encoder.layers.2",
        ),
        (
            "text_model.encoder.layers.0.self_attn.q_proj",
            "q_proj",
            "text_model.encoder.layers.*.self_attn.q_proj",
            "text_model.encoder.layers.0",
        ),
        ("vision_model.embeddings.patch_embedding", "conv8x8", "conv8x8", "vision_model.embeddings"),
        ("visual_projection", "visual_projection", "visual_projection", ""),
    ],
)
def test_layers_of_clip_are_described(tiny_clip, name, kind, group, block):
    assert find_layers(tiny_clip)[name] == MatrixLayer(name, kind, group, block, parts=1)


def test_groups_do_the_same_job_in_one_tower(tiny_clip):
    layers = find_layers(tiny_clip).values()
    groups = by_group(layers)
    assert groups["vision_model.encoder.layers.*.mlp.fc2"] == [
        f"vision_model.encoder.layers.{index}.mlp.fc2" for index in range(3)
    ]
    assert len(groups["text_model.encoder.layers.*.mlp.fc2"]) == 2
    assert len(groups) == 2 * 6 + 3
    blocks = by_block(layers)
    assert list(blocks)[:2] == ["text_model.encoder.layers.0", "text_model.encoder.layers.1"]
    assert set(map(len, blocks.values())) == {6, 1, 2}  # transformer layers, patch embedding, two projections
    assert sum(map(len, groups.values())) == sum(map(len, blocks.values())) == 33


def test_layers_of_a_resnet_are_described():
    found = [(layer.name, layer.type, layer.group, layer.block) for layer in find_layers(tiny_resnet()).values()]
    assert found == [
        ("conv1", "conv3x3", "conv3x3", ""),
        ("layer1.0.conv1", "conv1x1", "conv1x1", "layer1.0"),
        ("layer1.0.conv2", "conv3x3", "conv3x3", "layer1.0"),
        ("layer1.0.downsample.1", "conv1x1", "conv1x1", "layer1.0"),
        ("layer1.1.conv1", "conv1x1", "conv1x1", "layer1.1"),
        ("layer1.1.conv2", "conv3x3", "conv3x3", "layer1.1"),
        ("fc", "fc", "fc", ""),
    ]


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Conv1d(2, 2, 3), "conv3"),
        (nn.Conv2d(2, 2, (3, 5)), "conv3x5"),
        (nn.Conv3d(2, 2, 2), "conv2x2x2"),
        (nn.Linear(2, 2), "layer"),
        (Conv1D(4, 2), "layer"),
    ],
)
def test_every_kind_of_matrix_is_found(module, kind):
    assert find_layers(named(layer=module))["layer"] == MatrixLayer("layer", kind, kind, "")


def test_modules_without_a_matrix_are_no_layers():
    others = {"norm": nn.LayerNorm(4), "table": nn.Embedding(4, 4), "up": nn.ConvTranspose2d(4, 4, 2)}
    assert list(find_layers(named(**others, fc=nn.Linear(4, 4)))) == ["fc"]


def test_unnamed_layers_are_called_by_their_number():
    found = find_layers(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4))))
    assert found["0"] == MatrixLayer("0", "0", "*", "0")
    assert found["1.1"] == MatrixLayer("1.1", "1.1", "*.*", "1")


@pytest.mark.parametrize("name", ["qkv", "in_proj", "c_attn", "query_key_value", "img_qkv"])
def test_fused_projections_have_three_parts(name):
    fused = nn.ModuleDict({name: nn.Linear(8, 24)})
    assert find_layers(fused)[name].parts == 3


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("fc1", nn.Linear(8, 24)),  # wide, and not a projection
        ("qkv", nn.Linear(8, 16)),  # grouped queries: not three equal parts
        ("qkv", nn.Linear(24, 8)),
        ("qkv", nn.Conv2d(8, 24, 1)),
    ],
)
def test_other_layers_have_one_part(name, module):
    assert find_layers(nn.ModuleDict({name: module}))[name].parts == 1


def test_only_the_last_part_of_a_name_tells_a_fused_projection():
    assert find_layers(named(qkv=named(fc=nn.Linear(8, 24))))["qkv.fc"].parts == 1


def test_output_embeddings_are_left_out():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    model = GitForCausalLM(GitConfig(vision_config=vision, **sizes, **tokens))  # pyright: ignore[reportArgumentType]
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert linear - set(find_layers(model)) == {"output"}
    assert model.get_output_embeddings() is model.get_submodule("output")


def stack(count):
    return named(layers=nn.Sequential(*(named(fc=nn.Linear(4, 4), proj=nn.Linear(4, 4)) for _ in range(count))))


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["fc"], [f"layers.{index}.fc" for index in range(12)]),
        (["1.fc"], ["layers.1.fc"]),  # not layers.11.fc
        (["layers.1.fc"], ["layers.1.fc"]),
        (["layers.1"], []),  # no layer ends with it
        (["c", "ayers.1.fc"], []),  # an ending starts after a dot
        (("layers.3.fc", "0.proj"), ["layers.0.proj", "layers.3.fc"]),
        (r"layers\.1\.fc", ["layers.1.fc"]),
        (r"layers\.1.*", [f"layers.{index}.{name}" for index in (1, 10, 11) for name in ("fc", "proj")]),
        (r"layers\.1\..*", ["layers.1.fc", "layers.1.proj"]),
        (r"fc", []),  # the whole name
        (r".*\.(fc|none)", [f"layers.{index}.fc" for index in range(12)]),
    ],
)
def test_names_are_matched_as_in_peft(wanted, expected):
    names = list(find_layers(stack(12)))
    assert [name for name in names if matches(name, wanted)] == expected
    if expected:
        assert list(find_layers(stack(12), wanted)) == expected
        assert list(find_layers(stack(12), exclude_modules=wanted)) == [n for n in names if n not in expected]


def test_layer_1_is_never_layer_10():
    assert not matches("layers.10", ["layers.1"])
    assert not matches("layers.10", "layers.1")
    assert not matches("layers.1", ["layers.10", "ayers.1", ""])
    assert matches("layers.1", ["layers.1"])
    assert matches("encoder.layers.1", ["layers.1"])
    assert not matches("encoder.layers.1", "layers.1")


def test_exclusion_comes_after_the_choice():
    assert list(find_layers(stack(2), ["fc"], ["0.fc"])) == ["layers.1.fc"]


@pytest.mark.parametrize("exclude", [None, ["fc"]])
def test_a_model_without_layers_is_refused(exclude):
    model = nn.Sequential(nn.ReLU()) if exclude is None else named(fc=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"The Sequential has no linear or convolution layer\. Spectra need"):
        find_layers(model, exclude_modules=exclude)


def test_names_that_no_layer_has_are_named():
    with pytest.raises(ValueError, match=r"no linear or convolution layer that target_modules=\['gone'\] names"):
        find_layers(stack(1), ["gone"])


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(8, 64), True),
        (nn.Linear(64, 8), True),
        (nn.Linear(8, 63), False),
        (nn.Linear(8, 8), False),
        (Conv1D(64, 8), True),
        (nn.Conv2d(1, 64, 3), False),
    ],
)
def test_linear_layers_eight_times_as_long_as_wide_are_elongated(module, expected):
    assert is_elongated(module) is expected
    assert is_elongated(nn.Linear(4, 8), most=2)


@pytest.mark.parametrize(
    ("fraction", "count", "expected"),
    [(0.5, 55, 28), (0.5, 54, 27), (1.0, 7, 7), (0.01, 7, 1), (0.3, 10, 3), (0.7, 10, 7), (1 / 3, 3, 1), (0.34, 3, 2)],
)
def test_fractions_are_rounded_up(fraction, count, expected):
    assert how_many(fraction, count) == expected


@settings(deadline=None)
@given(fraction=st.floats(1e-6, 1), count=st.integers(1, 1000))
def test_a_fraction_is_never_less_than_asked_for_nor_one_more(fraction, count):
    found = how_many(fraction, count)
    assert 1 <= found <= count
    assert fraction * count - 1e-6 <= found < fraction * count + 1


@settings(deadline=None)
@given(count=st.integers(1, 1000), data=st.data())
def test_exact_fractions_are_exact(count, data):
    part = data.draw(st.integers(1, count))
    assert how_many(part / count, count) == part


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_fractions_out_of_range_are_refused(fraction):
    with pytest.raises(ValueError, match=rf"fraction is {fraction}\. It must lie in \(0, 1\]: the share of layers"):
        how_many(fraction, 5)
