"""torch-pruning as a baseline: whole heads, the budget, and a tower that nobody touched."""

import sys
import warnings

import pytest
import torch
from transformers import CLIPVisionModel

from hf_opentrans.pruning import foreign
from hf_opentrans.pruning.allocation import Budget
from hf_opentrans.pruning.foreign import torch_pruning_plan
from hf_opentrans.pruning.macs import CountedCost, TowerCost, layer_widths
from hf_opentrans.pruning.matching import hash_tensors
from hf_opentrans.pruning.plan import LayerPlan, PruningConfig, PruningPlan
from hf_opentrans.pruning.surgery import apply_masks, slice_model, to_sparse
from hf_opentrans.pruning.tower import Tower

torch_pruning = pytest.importorskip("torch_pruning")


def make_budget(tower, config):
    widths = layer_widths(tower.vision.config)
    counted = TowerCost.of(tower.vision.config, projection=tower.projection is not None)
    cost = CountedCost(counted, config.unit, len(widths))
    return Budget(config.unit, cost, counted.total(config.unit, widths), config.keep, 0.0, "no floor")


def share(tower, budget, plan):
    width = layer_widths(tower.vision.config)[0].v_head_dim
    spent = sum(
        budget.cost.attention(len(layer.heads), width, width) + budget.cost.mlp(len(layer.neurons))
        for layer in plan.layers
    )
    return (budget.cost.fixed() + spent) / budget.dense


def choose(model, **config):
    config = PruningConfig(method="torch-pruning", **config)
    tower = Tower.of(to_sparse(model))
    budget = make_budget(tower, config)
    return tower, budget, torch_pruning_plan(tower, budget, config)


def magnitude(tower, layer, kind):
    """Return torch-pruning's group magnitude: squared weights, biases left out."""
    block = tower.layers[layer]
    if kind == "neurons":
        return block.mlp.fc1.weight.square().sum(1) + block.mlp.fc2.weight.square().sum(0)
    attention = block.self_attn
    matrices = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, attention.out_proj.weight.T]
    return (
        torch.stack([matrix.square().sum(1) for matrix in matrices])
        .sum(0)
        .unflatten(0, (attention.num_heads, -1))
        .sum(1)
    )


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("keep", [0.5, 0.6, 0.75, 0.9, 0.97])
def test_the_budget_is_met_with_equal_numbers_everywhere(tiny_clip, keep, unit):
    tower, budget, plan = choose(tiny_clip, keep=keep, unit=unit, round_neurons=1)
    assert keep - 0.02 <= share(tower, budget, plan) <= keep + 1e-6
    assert len(plan) == 3
    assert len({len(layer.heads) for layer in plan.layers[:-1]}) == 1
    assert len({len(layer.neurons) for layer in plan.layers}) == 1
    assert all(layer.qk_head_dim is None and layer.v_head_dim is None for layer in plan.layers)


@pytest.mark.parametrize("protect", [True, False])
def test_the_heaviest_heads_and_neurons_stay(make_tiny_clip, protect):
    tower, _, plan = choose(make_tiny_clip(1), keep=0.6, protect_last_attention=protect, round_neurons=1)
    for index, layer in enumerate(plan.layers):
        for kind in ("heads", "neurons"):
            kept = getattr(layer, kind)
            heaviest = magnitude(tower, index, kind).topk(len(kept)).indices.sort().values
            assert list(kept) == heaviest.tolist()
    assert len(plan.layers[0].heads) < 4
    assert (len(plan.layers[-1].heads) == 4) == protect


def test_the_pruned_copy_computes_what_the_sliced_tower_computes(tiny_clip, monkeypatch):
    copies = []
    prune = foreign._prune

    def spy(model, *args):
        prune(model, *args)
        copies.append(model)

    monkeypatch.setattr(foreign, "_prune", spy)
    tower, _, plan = choose(tiny_clip, keep=0.6)
    small, pixels = slice_model(tower.vision, plan), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = small(pixels).last_hidden_state
        torch.testing.assert_close(copies[0](pixels).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_nothing_but_the_copy_changes(tiny_clip):
    model = to_sparse(tiny_clip)
    before, state = hash_tensors(model), torch.get_rng_state()
    config = PruningConfig(method="torch-pruning", keep=0.6)
    plans = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            plans.append(torch_pruning_plan(Tower.of(model), make_budget(Tower.of(model), config), config))
    assert hash_tensors(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert plans[0] == plans[1] == plans[2]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_half_precision_and_vision_only_models(tiny_clip):
    vision = CLIPVisionModel(tiny_clip.config.vision_config).eval()
    vision.load_state_dict(tiny_clip.vision_model.state_dict())
    _, _, full = choose(vision, keep=0.6)
    tower, budget, half = choose(vision.bfloat16(), keep=0.6)
    assert len(full) == len(half) == 3
    assert 0.58 <= share(tower, budget, half) <= 0.6


def test_only_heads_go_where_neurons_are_floored(tiny_clip):
    tower, budget, plan = choose(tiny_clip, keep=0.93, min_neurons=1.0)
    assert all(len(layer.neurons) == 64 for layer in plan.layers)
    assert [len(layer.heads) for layer in plan.layers] == [3, 3, 4]
    assert 0.91 <= share(tower, budget, plan) <= 0.93


def test_only_neurons_go_where_heads_are_floored(tiny_clip):
    _, _, plan = choose(tiny_clip, keep=0.8, min_heads=4)
    assert all(len(layer.heads) == 4 and len(layer.neurons) < 64 for layer in plan.layers)


def test_asked_rounding_is_kept(tiny_clip):
    _, _, plan = choose(tiny_clip, keep=0.6, round_neurons=8)
    assert all(len(layer.neurons) % 8 == 0 for layer in plan.layers)


def test_keeping_all_removes_nothing(tiny_clip):
    _, _, plan = choose(tiny_clip, keep=1.0)
    assert plan == PruningPlan.keep_all([4] * 3, [64] * 3)


def test_equal_units_stand_in_for_each_other(tiny_clip):
    mlp = tiny_clip.vision_model.encoder.layers[0].mlp
    with torch.no_grad():
        for twin in (9, 17):
            mlp.fc1.weight[twin], mlp.fc1.bias[twin] = 3 * torch.ones(32), 0.5
            mlp.fc2.weight[:, twin] = 3.0
    _, _, plan = choose(tiny_clip, keep=0.6)
    assert {9, 17} <= set(plan.layers[0].neurons)


def test_no_warning_and_no_shared_state(tiny_clip):
    defaults = [d for d in torch_pruning.BasePruner.__init__.__defaults__ if isinstance(d, dict)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        choose(tiny_clip, keep=0.6)
    assert [str(warning.message) for warning in caught] == []
    assert not any(defaults)


def test_a_pruned_or_masked_tower_is_refused(tiny_clip):
    plan = PruningPlan(tuple(LayerPlan((0, 1, 2), tuple(range(64))) for _ in range(3)))
    for model in (slice_model(tiny_clip, plan), apply_masks(tiny_clip, plan)):
        with pytest.raises(ValueError, match="Give the dense model"):
            choose(model, keep=0.6)
    uneven = PruningPlan((*plan.layers[:2], LayerPlan((0,), (1, 2))))
    with pytest.raises(ValueError, match="2 different layer widths"):
        choose(slice_model(tiny_clip, uneven), keep=0.6)


def test_a_budget_out_of_reach_is_refused(tiny_clip):
    with pytest.raises(ValueError, match=r"keep=0.2 .*cannot be met .*every choice keeps more.*Choose another keep"):
        choose(tiny_clip, keep=0.2)
    with pytest.raises(ValueError, match=r"cannot be met .*the nearest choice keeps 0\.\d+"):
        choose(tiny_clip, keep=0.9, min_heads=4, round_neurons=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prune_head_dims": True}, "belong to no single unit|one multiple of 8"),
        ({"prune_num_heads": False, "prune_head_dims": True}, "belong to no single unit|one multiple of 8"),
        ({"ignored_layers": []}, "belong to no single unit"),
        ({"head_pruning_ratio": 0.7}, "It was asked for"),
        ({"pruning_ratio": 0.9}, "It was asked for"),
    ],
)
def test_anything_but_whole_units_is_noticed(tiny_clip, monkeypatch, change, message):
    original = torch_pruning.BasePruner
    monkeypatch.setattr(torch_pruning, "BasePruner", lambda *args, **kwargs: original(*args, **kwargs | change))
    with pytest.raises(RuntimeError, match=message):
        choose(tiny_clip, keep=0.85, protect_last_attention=False)


def test_a_missing_package_is_named(tiny_clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"hf_opentrans\[bench\]"):
        choose(tiny_clip, keep=0.6)
