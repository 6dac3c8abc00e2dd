"""The cost model against PyTorch's own counter of operations and the parameters of real models."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

from hf_opentrans import SparseCLIPVisionConfig, SparseCLIPVisionModel, SparseCLIPVisionModelWithProjection
from hf_opentrans.pruning import LayerPlan, PruningPlan
from hf_opentrans.pruning.macs import CountedCost, LayerWidths, TowerCost, count_macs, count_params, layer_widths
from hf_opentrans.pruning.surgery import apply_masks
from hf_opentrans.pruning.tower import Tower

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
layers = st.fixed_dictionaries(
    {
        "num_attention_heads": st.integers(0, 5),
        "qk_head_dim": st.integers(1, 9),
        "v_head_dim": st.integers(1, 9),
        "intermediate_size": st.integers(0, 40),
    },
    optional={"skip": st.sampled_from([["attention"], ["mlp"], ["attention", "mlp"]])},
)


def counted(model, side):
    """Count multiply-accumulates of one image with PyTorch's counter (2 operations each), attention written out."""
    model.requires_grad_(False).set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, side, side), interpolate_pos_encoding=side != 32)
    return counter.get_total_flops() / 2


def params(model):
    return sum(parameter.numel() for parameter in model.parameters())


@QUICK
@given(per_layer=st.lists(layers, min_size=2, max_size=2), side=st.sampled_from([32, 48]))
def test_sparse_towers(tiny_clip_config, per_layer, side):
    values = tiny_clip_config(num_hidden_layers=2, intermediate_size=40).vision_config.to_dict()
    values.pop("model_type")
    config = SparseCLIPVisionConfig(**values | {"per_layer_config": dict(enumerate(per_layer))})
    plain, projected = SparseCLIPVisionModel(config), SparseCLIPVisionModelWithProjection(config)
    assert count_params(config, projection=False) == params(plain)
    assert count_params(config) == params(projected)
    assert count_macs(config, resolution=side, projection=False) == counted(plain, side)
    assert count_macs(config, resolution=side) == counted(projected, side)


def test_stock_towers(tiny_clip_config):
    config = tiny_clip_config().vision_config
    plain, projected = CLIPVisionModel(config), CLIPVisionModelWithProjection(config)
    assert count_params(config, projection=False) == params(plain)
    assert count_params(config) == params(projected)
    assert count_macs(config) == counted(projected, 32)
    assert count_macs(config, projection=False, resolution=48) == counted(plain, 48)


def test_vit_b_16_by_hand():
    config = SparseCLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16,
        image_size=224, projection_dim=512,
    )  # fmt: skip
    # 197 tokens. A layer has 4 * 768^2 + 2 * 768 * 3072 weights; both attention products take 2 * 197^2 * 768.
    layer = 197 * (4 * 768**2 + 2 * 768 * 3072) + 2 * 197**2 * 768
    assert count_macs(config) == 196 * 768 * 768 + 12 * layer + 768 * 512


def test_units_add_up(tiny_clip_config):
    config = tiny_clip_config().vision_config
    cost, widths = TowerCost.of(config), layer_widths(config)
    assert widths == (LayerWidths(4, 8, 8, 64),) * 3
    for unit, total in (("macs", count_macs(config)), ("params", count_params(config))):
        parts = 12 * cost.head(unit, 8, 8) + 192 * cost.neuron(unit) + 6 * cost.sublayer(unit)
        assert cost.fixed(unit) + parts == cost.total(unit, widths) == total


@pytest.mark.parametrize(("unit", "count"), [("macs", count_macs), ("params", count_params)])
def test_one_head_and_one_neuron_less(tiny_clip_config, unit, count):
    values = tiny_clip_config().vision_config.to_dict()
    values.pop("model_type")
    cost, dense = TowerCost.of(tiny_clip_config().vision_config), count(SparseCLIPVisionConfig(**values))
    less = {1: {"num_attention_heads": 3}, 2: {"intermediate_size": 63}}
    smaller = count(SparseCLIPVisionConfig(**values | {"per_layer_config": less}))
    assert dense - smaller == cost.head(unit, 8, 8) + cost.neuron(unit)


@pytest.mark.parametrize(("qk", "v"), [(8, 8), (2, 8), (8, 2), (5, 3), (1, 64)])
def test_attention_products_run_at_the_larger_width(tiny_clip_config, qk, v):
    """`pad_heads` fills up the narrower side: PyTorch's counter sees it, and so must the model of the costs."""
    values = tiny_clip_config(num_hidden_layers=1).vision_config.to_dict()
    values.pop("model_type")
    shape = {"num_attention_heads": 3, "qk_head_dim": qk, "v_head_dim": v}
    config = SparseCLIPVisionConfig(**values | {"per_layer_config": {0: shape}})
    model = SparseCLIPVisionModel(config).requires_grad_(False)
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 32, 32))
    by_operation = {str(name): count / 2 for name, count in counter.get_flop_counts()["Global"].items()}
    assert by_operation["aten.bmm"] == 2 * 17**2 * 3 * max(qk, v)
    cost = TowerCost.of(config)
    assert cost.head("macs", qk, v) == 17 * 2 * 32 * (qk + v) + 2 * 17**2 * max(qk, v)
    assert cost.head("params", qk, v) == 2 * 32 * (qk + v) + 2 * qk + v


@QUICK
@given(
    per_layer=st.lists(layers, min_size=3, max_size=3),
    unit=st.sampled_from(["macs", "params"]),
    projection=st.booleans(),
)
def test_counted_cost_adds_up_to_the_tower(tiny_clip_config, per_layer, unit, projection):
    values = tiny_clip_config().vision_config.to_dict()
    values.pop("model_type")
    config = SparseCLIPVisionConfig(**values | {"per_layer_config": dict(enumerate(per_layer))})
    widths, tower = layer_widths(config), TowerCost.of(config, projection=projection)
    cost = CountedCost(tower, unit, sum(w.has_attention + w.has_mlp for w in widths))
    parts = [cost.attention(w.heads, w.qk_head_dim, w.v_head_dim) + cost.mlp(w.neurons) for w in widths]
    expected = (
        count_macs(config, projection=projection) if unit == "macs" else count_params(config, projection=projection)
    )
    assert cost.fixed() + sum(parts) == tower.total(unit, widths) == expected


def test_masks_save_nothing(tiny_clip):
    """Masked units are still computed; only slicing makes a model cheaper."""
    dense = tiny_clip.vision_model.config
    masked = Tower.of(apply_masks(tiny_clip, PruningPlan((LayerPlan((0,), (1, 2)),) * 3))).vision.config
    assert layer_widths(masked) == layer_widths(dense)
    assert count_macs(masked) == count_macs(dense)
    assert count_params(masked) == count_params(dense)
