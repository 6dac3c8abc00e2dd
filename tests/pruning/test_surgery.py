"""Masks and slicing: they agree, masks hold through training and disk, and inputs stay untouched."""

import hashlib
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CLIPTextModel, CLIPVisionModel, CLIPVisionModelWithProjection

from hf_opentrans import (
    DenseCLIPForSegmentation,
    PruningPlan,
    SparseCLIPModel,
    SparseCLIPVisionConfig,
    SparseCLIPVisionModel,
    SparseCLIPVisionModelWithProjection,
    apply_masks,
    slice_model,
)
from hf_opentrans.pruning import LayerPlan, to_sparse
from hf_opentrans.pruning.surgery import plan_of_masks, unit_columns
from hf_opentrans.pruning.tower import Tower

QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PLAN = PruningPlan(
    (
        LayerPlan((1, 3), tuple(range(5, 40))),
        LayerPlan((), (0, 63)),
        LayerPlan((0, 1, 2), ()),
    )
)


def kept(width):
    return st.sets(st.integers(0, width - 1)).map(lambda units: tuple(sorted(units)))


layers = st.builds(LayerPlan, kept(4), kept(64))
plans = st.tuples(layers, layers, layers).map(PruningPlan)


def vision_of(clip) -> Any:
    model: Any = CLIPVisionModel(clip.config.vision_config).eval()
    model.load_state_dict(clip.vision_model.state_dict())
    return model


def projected(clip):
    model = CLIPVisionModelWithProjection(clip.config.vision_config).eval()
    model.vision_model.load_state_dict(clip.vision_model.state_dict())
    model.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    return model


KINDS = {
    "vision": (vision_of, SparseCLIPVisionModel),
    "projection": (projected, SparseCLIPVisionModelWithProjection),
    "clip": (lambda clip: clip, SparseCLIPModel),
}


def tokens(model):
    """Return unit tokens of the ordinary pass, of all tokens: stricter than the pooled one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return Tower.of(model).tokens(torch.randn(2, 3, 32, 32, generator=generator))


def fingerprint(model):
    digest = hashlib.sha256(repr(model.config.to_dict()).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def silence(model, plan):
    """Independent reference: zero the columns that read removed units, in a copy of a dense stock tower."""
    model = vision_of(model)
    with torch.no_grad():
        for layer, keep in zip(model.encoder.layers, plan.layers, strict=True):
            for head in set(range(4)) - set(keep.heads):
                layer.self_attn.out_proj.weight[:, 8 * head : 8 * head + 8] = 0
            for neuron in set(range(64)) - set(keep.neurons):
                layer.mlp.fc2.weight[:, neuron] = 0
    return model


@QUICK
@given(plan=plans)
def test_sliced_equals_masked_equals_silenced(tiny_clip, plan):
    vision = vision_of(tiny_clip)
    sliced, masked = slice_model(vision, plan), apply_masks(vision, plan)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        reference = silence(tiny_clip, plan)(pixels).last_hidden_state
        for model in (sliced, masked):
            assert float((model(pixels).last_hidden_state - reference).abs().max()) <= 1e-5
    widths = [(len(layer.heads), len(layer.neurons)) for layer in plan.layers]
    assert [(x.self_attn.num_heads, x.mlp.fc1.out_features) for x in Tower.of(sliced).layers] == widths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_all_classes_slice_and_mask(tmp_path, tiny_clip, kind, implementation):
    build, expected = KINDS[kind]
    model = build(tiny_clip)
    model.set_attn_implementation(implementation)
    before = fingerprint(model)
    sliced, masked, same = slice_model(model, PLAN), apply_masks(model, PLAN), to_sparse(model)
    assert fingerprint(model) == before
    for made in (sliced, masked, same):
        assert type(made) is expected
        assert not made.training
        assert made.config._attn_implementation == implementation
        assert not {p.data_ptr() for p in made.parameters() if p.numel()} & {p.data_ptr() for p in model.parameters()}
    assert float((tokens(sliced) - tokens(masked)).abs().max()) <= 1e-5
    assert float((tokens(sliced) - tokens(same)).abs().max()) > 1e-2
    masked.save_pretrained(tmp_path / "masked")
    again = expected.from_pretrained(tmp_path / "masked", attn_implementation=implementation)
    assert torch.equal(tokens(to_sparse(again)), tokens(masked))
    again = apply_masks(sliced, PruningPlan.keep_all([2, 0, 3], [35, 2, 0]))
    assert torch.equal(tokens(again), tokens(sliced))


def test_keeping_all_is_bit_equal(tiny_clip):
    everything = PruningPlan.keep_all([4] * 3, [64] * 3)
    for made in (slice_model(tiny_clip, everything), apply_masks(tiny_clip, everything)):
        assert torch.equal(tokens(made), tokens(to_sparse(tiny_clip)))


def test_masks_hold_in_training(tiny_clip):
    masked = apply_masks(vision_of(tiny_clip), PLAN).train()
    optimizer = torch.optim.AdamW(masked.parameters(), lr=1e-2, weight_decay=0.1)
    start = tokens(masked)
    for _ in range(3):
        optimizer.zero_grad()
        masked(torch.randn(2, 3, 32, 32)).pooler_output.square().sum().backward()
        optimizer.step()
    assert not torch.allclose(tokens(masked), start, atol=1e-2)
    assert plan_of_masks(masked) == PLAN
    assert float((tokens(slice_model(masked)) - tokens(masked)).abs().max()) <= 1e-5


def test_masks_come_back_from_disk(tmp_path, tiny_clip):
    masked = apply_masks(tiny_clip, PLAN)
    masked.save_pretrained(tmp_path)
    again = SparseCLIPModel.from_pretrained(tmp_path)
    assert again.config == masked.config
    assert plan_of_masks(again) == PLAN
    for one, other in zip(Tower.of(again).layers, Tower.of(masked).layers, strict=True):
        for a, b in (
            (one.self_attn.head_mask, other.self_attn.head_mask),
            (one.mlp.neuron_mask, other.mlp.neuron_mask),
        ):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)
    assert "head_mask" not in " ".join(masked.state_dict())


def test_slicing_a_masked_model_needs_no_plan(tiny_clip):
    masked = apply_masks(tiny_clip, PLAN)
    sliced, direct = slice_model(masked), slice_model(tiny_clip, PLAN)
    assert sliced.config == direct.config
    assert all(torch.equal(value, direct.state_dict()[key]) for key, value in sliced.state_dict().items())
    with pytest.raises(ValueError, match=r"The model has no masks. slice_model then needs a plan. Pass `plan`"):
        slice_model(sliced)


def test_slicing_twice_equals_slicing_once(tiny_clip):
    first = PruningPlan((LayerPlan((0, 1, 3), tuple(range(0, 64, 2))),) * 3)
    # In the sliced model's own numbering: heads 1, 2 are the dense 1, 3; neurons 0, 5 are the dense 0, 10.
    twice = slice_model(slice_model(tiny_clip, first), PruningPlan((LayerPlan((1, 2), (0, 5)),) * 3))
    once = slice_model(tiny_clip, PruningPlan((LayerPlan((1, 3), (0, 10)),) * 3))
    assert all(torch.equal(value, once.state_dict()[key]) for key, value in twice.state_dict().items())
    assert torch.equal(tokens(twice), tokens(once))


def test_masks_that_are_kept_are_renumbered(tiny_clip):
    masked = apply_masks(tiny_clip, PruningPlan((LayerPlan((0, 1, 3), tuple(range(60))),) * 3))
    sliced = slice_model(masked, PruningPlan((LayerPlan((1, 2, 3), tuple(range(10, 64))),) * 3))
    layer = Tower.of(sliced).layers[0]
    assert layer.self_attn.masked_heads == [1]  # the dense head 2
    assert layer.mlp.masked_neurons == [50, 51, 52, 53]  # the dense neurons 60 to 63
    both = slice_model(tiny_clip, PruningPlan((LayerPlan((1, 3), tuple(range(10, 60))),) * 3))
    assert float((tokens(sliced) - tokens(both)).abs().max()) <= 1e-5


def test_layers_with_widths_of_their_own_and_skipped_sublayers(tiny_clip):
    values = tiny_clip.config.vision_config.to_dict()
    values.pop("model_type")
    layers = {0: {"qk_head_dim": 5, "v_head_dim": 11}, 1: {"skip": ["attention"]}, 2: {"skip": ["mlp"]}}
    model = SparseCLIPVisionModel(SparseCLIPVisionConfig(**values | {"per_layer_config": layers})).eval()
    plan = PruningPlan((LayerPlan((1, 2), (3, 9)), LayerPlan((), (7,)), LayerPlan((3,), ())))
    sliced, masked = slice_model(model, plan), apply_masks(model, plan)
    attention = Tower.of(sliced).layers[0].self_attn
    assert tuple(attention.q_proj.weight.shape) == (10, 32)
    assert tuple(attention.out_proj.weight.shape) == (32, 22)
    assert float((tokens(sliced) - tokens(masked)).abs().max()) <= 1e-5


def test_a_segmenter_stays_one(tmp_path, tiny_clip):
    tiny_clip.save_pretrained(tmp_path)
    dense = DenseCLIPForSegmentation.from_pretrained(tmp_path)
    assert type(slice_model(dense, PLAN)) is DenseCLIPForSegmentation


def test_precision_and_mode_are_kept(tiny_clip):
    sliced = slice_model(tiny_clip.to(torch.bfloat16).train(), PLAN)
    assert sliced.dtype == torch.bfloat16
    assert sliced.training


def test_plans_that_do_not_fit_are_refused(tiny_clip):
    for change in (slice_model, apply_masks):
        with pytest.raises(ValueError, match=r"The plan has 1 layers and the vision tower 3. Both must agree"):
            change(tiny_clip, PruningPlan((LayerPlan((0,), (0,)),)))
        with pytest.raises(ValueError, match="The plan keeps head 4 of layer 1, which has 4 heads"):
            change(tiny_clip, PruningPlan.keep_all([4, 5, 4], [64] * 3))
        with pytest.raises(ValueError, match="The plan keeps neuron 64 of layer 2, which has 64 neurons"):
            change(tiny_clip, PruningPlan.keep_all([4] * 3, [64, 64, 65]))


def test_models_without_a_vision_tower_are_refused(tiny_clip):
    with pytest.raises(TypeError, match=r"The model is a CLIPTextModel. Pruning needs a CLIP vision tower"):
        slice_model(CLIPTextModel(tiny_clip.config.text_config), PLAN)  # pyright: ignore[reportArgumentType]


def test_unit_columns():
    assert unit_columns((0, 2), 3).tolist() == [0, 1, 2, 6, 7, 8]
    assert unit_columns((), 3).tolist() == []
