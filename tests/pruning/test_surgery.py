"""Masks and slicing: they agree, masks hold through training and disk, and inputs stay untouched."""

import hashlib
import json
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
from hf_opentrans.pruning.surgery import HeadMaps, plan_of_masks, unit_columns
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


def random_maps(heads, width, seed=0):
    """Return maps from 8 to `width` dimensions, one per head and part."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(heads, width, 8, generator=generator) / 8**0.5 for _ in range(4)]


def rotations(heads):
    return torch.linalg.qr(torch.randn(heads, 8, 8, generator=torch.Generator().manual_seed(2)))[0]


def attend(model, hidden, heads, maps):
    """Independent reference in double precision: attention of some heads of a stock layer 1 with reduced vectors.

    Args:
        model: A stock tower.
        hidden: Of shape `(batch_size, tokens, 32)`.
        heads: Of the dense layer.
        maps: Query, key, value and output maps, each `(heads, new width, 8)`; None where the width stays.
    """
    attention = model.encoder.layers[1].self_attn
    query, key, value, output = maps
    total = attention.out_proj.bias.double()
    for place, head in enumerate(heads):
        rows = slice(8 * head, 8 * head + 8)
        q, k, v = (
            hidden @ projection.weight[rows].double().T + projection.bias[rows].double()
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if query is not None:
            k = k - attention.k_proj.bias[rows].double()
            q, k = q @ query[place].double().T, k @ key[place].double().T
        weights = (q @ k.mT / 8**0.5).softmax(-1)  # the scale of the dense model, whatever is left
        if value is not None:
            v = v @ value[place].double().T @ output[place].double()
        total = total + weights @ v @ attention.out_proj.weight[:, rows].double().T
    return total


@pytest.mark.parametrize("narrowed", ["qk", "v", "both"])
@pytest.mark.parametrize("heads", [(0, 1, 2, 3), (1, 3)])
@torch.no_grad()
def test_narrowed_heads_compute_attention_of_reduced_vectors(tiny_clip, narrowed, heads):
    dense = vision_of(tiny_clip)
    query, key, *_ = random_maps(len(heads), 3)
    *_, value, output = random_maps(len(heads), 5)
    has_qk, has_v = narrowed != "v", narrowed != "qk"
    maps = (query if has_qk else None, key if has_qk else None, value if has_v else None, output if has_v else None)
    everything = tuple(range(64))
    layer = LayerPlan(heads, everything, 3 if has_qk else None, 5 if has_v else None)
    whole = LayerPlan((0, 1, 2, 3), everything)
    sliced: Any = slice_model(dense, PruningPlan((whole, layer, whole)), {1: HeadMaps(*maps)})
    attention = sliced.encoder.layers[1].self_attn
    assert (attention.num_heads, attention.qk_head_dim, attention.v_head_dim) == (
        len(heads),
        3 if has_qk else 8,
        5 if has_v else 8,
    )
    assert attention.scale == 8**-0.5
    hidden = torch.randn(2, 17, 32)
    expected = attend(dense, hidden.double(), heads, maps)
    torch.testing.assert_close(attention(hidden)[0].double(), expected, atol=1e-5, rtol=1e-5)
    if has_qk:
        assert float(attention.k_proj.bias.abs().max()) == 0.0
    other = sliced.encoder.layers[0].self_attn
    assert torch.equal(other.q_proj.weight, dense.encoder.layers[0].self_attn.q_proj.weight)


@torch.no_grad()
def test_maps_that_lose_nothing_change_nothing(tiny_clip):
    dense = vision_of(tiny_clip)
    turn = rotations(4)
    everything = PruningPlan.keep_all([4] * 3, [64] * 3)
    same = slice_model(dense, everything, {0: HeadMaps(turn, turn, turn, turn)})
    assert torch.equal(tokens(same), tokens(to_sparse(dense)))
    stated = PruningPlan((LayerPlan((0, 1, 2, 3), tuple(range(64)), 8, 8), *everything.layers[1:]))
    assert torch.equal(tokens(slice_model(dense, stated)), tokens(to_sparse(dense)))
    # Queries of rank 5 and values of rank 6 in a turned basis: the maps into that basis lose nothing.
    attention = dense.encoder.layers[0].self_attn
    for projection, rank in ((attention.q_proj, 5), (attention.v_proj, 6)):
        keeper = torch.block_diag(*(turn[:, :rank].mT @ turn[:, :rank]))
        projection.weight.copy_(keeper @ projection.weight)
        projection.bias.copy_(keeper @ projection.bias)
    layer = LayerPlan((0, 1, 2, 3), tuple(range(64)), 5, 6)
    maps = HeadMaps(turn[:, :5], turn[:, :5], turn[:, :6], turn[:, :6])
    narrow = slice_model(dense, PruningPlan((layer, *everything.layers[1:])), {0: maps})
    assert float((tokens(narrow) - tokens(to_sparse(dense))).abs().max()) <= 1e-5
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize(
    ("maps", "width"),
    [
        ({}, "qk_head_dim"),
        ({1: HeadMaps()}, "qk_head_dim"),
        ({1: HeadMaps(query=torch.ones(2, 3, 8))}, "qk_head_dim"),
        ({1: HeadMaps(torch.ones(2, 3, 8), torch.ones(4, 3, 8))}, "qk_head_dim"),  # maps of the dense heads
        ({1: HeadMaps(torch.ones(2, 4, 8), torch.ones(2, 4, 8))}, "qk_head_dim"),
        ({1: HeadMaps(torch.ones(2, 8, 3), torch.ones(2, 8, 3))}, "qk_head_dim"),
        ({0: HeadMaps(torch.ones(2, 3, 8), torch.ones(2, 3, 8))}, "qk_head_dim"),  # of another layer
        ({1: HeadMaps(torch.ones(2, 3, 8), torch.ones(2, 3, 8))}, "v_head_dim"),
        ({1: HeadMaps(torch.ones(2, 3, 8), torch.ones(2, 3, 8), torch.ones(2, 5, 8))}, "v_head_dim"),
    ],
)
def test_narrower_heads_need_fitting_maps(tiny_clip, maps, width):
    whole = LayerPlan((0, 1, 2, 3), tuple(range(64)))
    plan = PruningPlan((whole, LayerPlan((1, 3), tuple(range(64)), 3, 5), whole))
    with pytest.raises(ValueError, match=rf"narrows {width} of layer 1 to .*each of the 2 heads\. Pass `maps`"):
        slice_model(tiny_clip, plan, maps)


@pytest.mark.parametrize("width", [{"qk_head_dim": 4}, {"v_head_dim": 4}])
def test_masks_cannot_narrow_heads(tiny_clip, width):
    whole = LayerPlan((0, 1, 2, 3), tuple(range(64)))
    plan = PruningPlan((whole, whole, LayerPlan((0, 1, 2, 3), tuple(range(64)), **width)))
    with pytest.raises(ValueError, match=r"narrows the heads of layer 2\. Masks can only leave out whole heads"):
        apply_masks(tiny_clip, plan)
    dense = PruningPlan((LayerPlan((0, 1), tuple(range(64)), 8, 8), whole, whole))
    assert plan_of_masks(apply_masks(tiny_clip, dense)).layers[0].heads == (0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_widths_are_stated_in_the_configuration_and_come_back(tmp_path, tiny_clip, kind):
    build, sparse = KINDS[kind]
    query, key, *_ = random_maps(2, 3)
    *_, value, output = random_maps(2, 5)
    whole = LayerPlan((0, 1, 2, 3), tuple(range(64)))
    plan = PruningPlan((whole, LayerPlan((1, 3), tuple(range(40)), 3, 5), LayerPlan((), ())))
    sliced = slice_model(build(tiny_clip), plan, {1: HeadMaps(query, key, value, output)})
    sliced.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    layers = values.get("vision_config", values)["per_layer_config"]
    assert [layers["1"][name] for name in ("num_attention_heads", "qk_head_dim", "v_head_dim")] == [2, 3, 5]
    again = sparse.from_pretrained(tmp_path)
    assert torch.equal(tokens(to_sparse(again)), tokens(to_sparse(sliced)))
    attention = Tower.of(again).layers[1].self_attn
    assert (attention.qk_head_dim, attention.v_head_dim, attention.num_heads) == (3, 5, 2)
    # What is narrow already is sliced like any other width: the plan's None keeps it.
    twice = slice_model(again, PruningPlan((whole, LayerPlan((1,), (0,)), LayerPlan((), ()))))
    one = slice_model(again, PruningPlan.keep_all([4, 2, 0], [64, 40, 0]))
    assert torch.equal(tokens(one), tokens(to_sparse(sliced)))
    assert tuple(Tower.of(twice).layers[1].self_attn.v_proj.weight.shape) == (5, 32)


@torch.no_grad()
def test_queries_and_keys_are_balanced_and_their_products_stay(tiny_clip):
    dense = vision_of(tiny_clip)
    query, key, *_ = random_maps(4, 6)
    query, key = query * 1e4, key * 1e-4  # as a whitening basis may be
    query[0, 0], key[1, 1] = 0.0, 0.0
    layer = LayerPlan((0, 1, 2, 3), tuple(range(64)), 6)
    plan = PruningPlan((layer, *PruningPlan.keep_all([4] * 2, [64] * 2).layers))
    sliced: Any = slice_model(dense, plan, {0: HeadMaps(query, key)})
    attention = sliced.encoder.layers[0].self_attn
    q_rows = torch.cat([attention.q_proj.weight, attention.q_proj.bias[:, None]], 1)  # keys have no bias any more
    sizes = [q_rows.norm(dim=1), attention.k_proj.weight.norm(dim=1)]
    balanced = torch.ones(24, dtype=torch.bool)
    balanced[[0, 7]] = False
    torch.testing.assert_close(sizes[0][balanced], sizes[1][balanced])
    assert float(sizes[0][balanced].max()) < 10
    stock = dense.encoder.layers[0].self_attn
    hidden = torch.randn(17, 32, dtype=torch.float64)
    for head in range(4):
        rows, new = slice(8 * head, 8 * head + 8), slice(6 * head, 6 * head + 6)
        q = (hidden @ stock.q_proj.weight[rows].double().T + stock.q_proj.bias[rows].double()) @ query[head].double().T
        k = hidden @ stock.k_proj.weight[rows].double().T @ key[head].double().T
        ours = (hidden @ p.weight[new].double().T + p.bias[new].double() for p in (attention.q_proj, attention.k_proj))
        left, right = ours
        torch.testing.assert_close(left @ right.T, q @ k.T, rtol=1e-5, atol=1e-6)
