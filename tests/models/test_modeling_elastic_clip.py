"""Elastic checkpoints: budgets are prefixes, switching equals loading alone, one file, clear errors, remote code."""

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, CLIPVisionConfig
from transformers.initialization import no_init_weights

from hf_opentrans import (
    DenseCLIPForSegmentation,
    SparseCLIPConfig,
    SparseCLIPModel,
    SparseCLIPVisionConfig,
    SparseCLIPVisionModel,
    SparseCLIPVisionModelWithProjection,
    Vocabulary,
)
from hf_opentrans.models.configuration_elastic_clip import ElasticCLIPConfig, ElasticCLIPVisionConfig
from hf_opentrans.models.modeling_elastic_clip import (
    ElasticCLIPForSegmentation,
    ElasticCLIPModel,
    ElasticCLIPVisionModel,
    ElasticCLIPVisionModelWithProjection,
    decode,
    encode,
    places_of,
)
from hf_opentrans.pruning.elastic import make_elastic
from hf_opentrans.pruning.elastic_order import cut_model

# Heads, query-key width, value width, neurons of three layers: whole, narrower in every way, partly empty.
LAYERS = [
    [[4, 8, 8, 64], [3, 8, 8, 48], [4, 8, 8, 60]],
    [[3, 8, 6, 40], [3, 4, 8, 48], [4, 8, 8, 32]],
    [[1, 4, 6, 8], [0, 4, 8, 16], [4, 8, 8, 0]],
]
BUDGETS = (0.9, 0.6, 0.3)
ELASTIC = {
    "clip": ElasticCLIPModel,
    "segmenter": ElasticCLIPForSegmentation,
    "vision": ElasticCLIPVisionModel,
    "projection": ElasticCLIPVisionModelWithProjection,
}
PLAIN = {
    "clip": SparseCLIPModel,
    "segmenter": DenseCLIPForSegmentation,
    "vision": SparseCLIPVisionModel,
    "projection": SparseCLIPVisionModelWithProjection,
}


@pytest.fixture(autouse=True)
def _registered():
    for config, model in ((ElasticCLIPConfig, ElasticCLIPModel), (ElasticCLIPVisionConfig, ElasticCLIPVisionModel)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        config.register_for_auto_class()
        model.register_for_auto_class("AutoModel")
    ElasticCLIPVisionModelWithProjection.register_for_auto_class("AutoModel")
    AutoModelForSemanticSegmentation.register(ElasticCLIPConfig, ElasticCLIPForSegmentation, exist_ok=True)
    ElasticCLIPForSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")


@pytest.fixture
def make(tiny_clip_config):
    """Return a function that makes an elastic model of each kind, and the models that it was made of."""

    def build(kind="clip"):
        torch.manual_seed(0)
        config = SparseCLIPConfig(**{k: v for k, v in tiny_clip_config().to_dict().items() if k != "model_type"})
        is_whole = kind in ("clip", "segmenter")
        dense = PLAIN[kind](config if is_whole else config.vision_config).eval().requires_grad_(False)
        for parameter in dense.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        towers = [cut_model(dense, layers) for layers in LAYERS]
        for tower in towers:  # as a rebuild changes them
            for name, parameter in tower.named_parameters():
                if any(part in name for part in ("fc2", "out_proj", "post_layernorm", "visual_projection")):
                    parameter.data.add_(0.05 * torch.randn_like(parameter))
        return make_elastic(towers, BUDGETS, LAYERS), towers

    return build


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def run(model):
    """Return outputs of a model; of a copy, because the alignment of weights changes the rounding."""
    model = copy.deepcopy(model)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(model.dtype)
    vision = model if isinstance(model, SparseCLIPVisionModel) else model.vision_model
    with torch.no_grad():
        return vision(pixels).last_hidden_state


@pytest.mark.parametrize("kind", ELASTIC)
def test_setting_a_budget_is_loading_it_alone_bit_for_bit(tmp_path, make, kind):
    model, towers = make(kind)
    model.save_pretrained(tmp_path)
    loaded = ELASTIC[kind].from_pretrained(tmp_path)
    assert type(loaded) is ELASTIC[kind]
    assert loaded.budgets == BUDGETS
    assert loaded.budget == 0.9
    assert equal(state(loaded), state(towers[0]))
    for budget, tower in zip(BUDGETS, towers, strict=True):
        alone = ELASTIC[kind].from_pretrained(tmp_path, budget=budget)
        assert type(alone) is PLAIN[kind]
        assert not alone.training
        assert loaded.set_budget(budget) is loaded
        assert loaded.budget == budget
        assert equal(state(loaded), state(alone))
        assert torch.equal(run(loaded), run(alone))
        assert loaded.extract().config == alone.config
        assert equal(state(loaded.extract()), state(alone))
        assert torch.nn.functional.cosine_similarity(run(loaded), run(tower), dim=-1).min() > 0.9999
    alone = ELASTIC[kind].from_pretrained(tmp_path, budget=0.6)
    alone.save_pretrained(tmp_path / "alone")
    assert equal(state(PLAIN[kind].from_pretrained(tmp_path / "alone")), state(alone))


def test_weights_that_make_units_are_shared_and_the_file_is_not_needed_again(tmp_path, make):
    model, _ = make()
    model.save_pretrained(tmp_path)
    model = ElasticCLIPModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    before = state(model)
    layers = model.vision_model.encoder.layers
    shared = {place.name: model.get_parameter(place.name).data_ptr() for place in places_of(model)}
    for budget, narrowed in ((0.6, {(0, "v_proj"), (1, "q_proj"), (1, "k_proj")}), (0.3, None)):
        model.set_budget(budget)
        for index, layer in enumerate(layers):
            parts = {"q_proj": layer.self_attn.q_proj, "v_proj": layer.self_attn.v_proj, "fc1": layer.mlp.fc1}
            for name, part in parts.items():
                assert part.weight.is_contiguous()
                assert part.weight.shape == (part.out_features, part.in_features)
                if narrowed is not None and (index, name) not in narrowed:
                    path = f"vision_model.encoder.layers.{index}.{'mlp' if name == 'fc1' else 'self_attn'}.{name}"
                    assert part.weight.data_ptr() == shared[f"{path}.weight"]
        assert model.config.vision_config.per_layer_config[0].intermediate_size == layers[0].mlp.fc1.out_features
    model.set_budget(0.9)
    assert equal(state(model), before)
    assert {name: model.get_parameter(name).data_ptr() for name in shared} == shared


def test_saving_at_a_small_budget_saves_all_of_them(tmp_path, make):
    model, _ = make()
    expected = {budget: state(model.set_budget(budget)) for budget in BUDGETS}
    model.set_budget(0.6).save_pretrained(tmp_path)
    assert model.budget == 0.6
    assert equal(state(model), expected[0.6])
    again = ElasticCLIPModel.from_pretrained(tmp_path)
    for budget in BUDGETS:
        assert equal(state(again.set_budget(budget)), expected[budget])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_precision_can_change_at_any_budget(tmp_path, make, dtype):
    model, _ = make()
    model.save_pretrained(tmp_path)
    expected = {b: state(ElasticCLIPModel.from_pretrained(tmp_path, budget=b, dtype=dtype)) for b in BUDGETS}
    model.set_budget(0.3).to(dtype)
    assert model.budget == 0.3
    for budget in (0.3, 0.9, 0.6):
        assert equal(state(model.set_budget(budget)), expected[budget])
        assert model.dtype == dtype


def test_a_half_precision_file_loads_the_same_either_way(tmp_path, make):
    model, _ = make("vision")
    model.save_pretrained(tmp_path, state_dict={name: value.half() for name, value in model.state_dict().items()})
    loaded = ElasticCLIPVisionModel.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    for budget in BUDGETS:
        assert equal(
            state(loaded.set_budget(budget)), state(ElasticCLIPVisionModel.from_pretrained(tmp_path, budget=budget))
        )


def test_auto_classes_load_all_budgets_or_one(tmp_path, make):
    model, _ = make("segmenter")
    model.default_vocabulary = Vocabulary(["dog", "wall"], templates="plain")
    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is ElasticCLIPModel
    assert type(AutoModel.from_pretrained(tmp_path, budget=0.6)) is SparseCLIPModel
    whole = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    alone = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, budget=0.6, dtype=torch.float16)
    assert (type(whole), type(alone)) == (ElasticCLIPForSegmentation, DenseCLIPForSegmentation)
    assert whole.default_vocabulary == alone.default_vocabulary == whole.extract().default_vocabulary
    assert alone.dtype == torch.float16
    assert alone.config.vision_config.per_layer_config[1].num_attention_heads == 3


def test_copies_switch_on_their_own(make):
    model, _ = make()
    twin = copy.deepcopy(model.set_budget(0.6))
    assert equal(state(model), state(twin))
    small = state(twin.set_budget(0.3))
    assert model.budget == 0.6
    assert equal(state(model.set_budget(0.3)), small)
    assert equal(state(twin.set_budget(0.9)), state(model.set_budget(0.9)))


# Shares of the units in every layer, as a budget of that share of the MACs keeps them.
@pytest.mark.parametrize(("shares", "limit"), [((0.8, 0.6, 0.4), 1.5), ((0.9, 0.8, 0.7, 0.6, 0.5, 0.4), 2.4)])
def test_sizes_of_a_base_tower(shares, limit):
    layers = [[[round(12 * s), 64, 64, round(3072 * s)] for _ in range(12)] for s in shares]
    stock = CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
    values: dict[str, Any] = {**stock.to_dict(), "patch_size": 16, "projection_dim": 512}
    values.pop("model_type")
    with torch.device("meta"), no_init_weights():
        towers = []
        for widths in layers:
            names = ("num_attention_heads", "qk_head_dim", "v_head_dim", "intermediate_size")
            values["per_layer_config"] = {i: dict(zip(names, w, strict=True)) for i, w in enumerate(widths)}
            towers.append(SparseCLIPVisionModelWithProjection(SparseCLIPVisionConfig(**values)))
        elastic = make_elastic(towers, shares, layers)
    largest = sum(parameter.numel() for parameter in towers[0].parameters())
    added = sum(elastic.added_bytes(index) for index in range(1, len(shares)))
    assert 6e7 < largest < 9e7
    for bytes_each in (4, 2):  # of a weight of the largest budget
        assert 1 < 1 + added / (bytes_each * largest) < limit


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 99), size=st.floats(1e-6, 1e4))
@settings(max_examples=40, deadline=None)
def test_codes_are_within_half_a_step_of_every_column(rows, columns, seed, size):
    generator = torch.Generator().manual_seed(seed)
    base, target = (size * torch.randn(rows, columns, generator=generator) for _ in range(2))
    target[:, 0] = base[:, 0]
    codes, scale = encode(base, target)
    found = decode(base, codes, scale)
    step = (target - base).abs().amax(0) / 127
    assert codes.dtype == torch.int8
    assert bool(((found - target).abs() <= 0.501 * step + 1e-6 * target.abs() + 1e-30).all())
    assert torch.equal(found[:, 0], base[:, 0])


@given(widths=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=3, max_size=3))
@settings(max_examples=40, deadline=None)
def test_cuts_of_cuts_are_cuts(widths):
    wide, middle, narrow = (
        [max(units for units, _ in widths[index:]), max(inner for _, inner in widths[index:])] for index in range(3)
    )
    place = next(p for p in places_of(_stub()) if p.name.endswith("q_proj.weight"))
    full = torch.arange(wide[0] * wide[1] * 2.0).view(-1, 2)
    found = place.cut(place.cut(full, wide, middle), middle, narrow)
    rows = [head * wide[1] + dim for head in range(narrow[0]) for dim in range(narrow[1])]
    assert torch.equal(found, full[rows])
    assert torch.equal(place.cut(full, wide, narrow), found)


def _stub() -> Any:
    """Return what `places_of` looks at, of one layer."""
    layer = SimpleNamespace(has_attention=True, has_mlp=True)
    return SimpleNamespace(vision_model=SimpleNamespace(encoder=SimpleNamespace(layers=[layer])))


def test_mistakes_are_named(tmp_path, make):
    model, _ = make()
    model.save_pretrained(tmp_path)
    for wrong in (0.5, 60, True, "0.6", None):
        with pytest.raises(ValueError, match=r"budget is .* holds the budgets 0\.9, 0\.6, 0\.3 and no others"):
            model.set_budget(wrong)
    assert model.budget == 0.9
    with pytest.raises(ValueError, match=r"budget is 0\.5\. This checkpoint holds the budgets 0\.9, 0\.6, 0\.3"):
        ElasticCLIPModel.from_pretrained(tmp_path, budget=0.5)
    with pytest.raises(TypeError, match=r"device_map is given with budget=0\.6"):
        ElasticCLIPModel.from_pretrained(tmp_path, budget=0.6, device_map="auto")
    with pytest.raises(RuntimeError, match="without the weights of its smaller budgets"):
        ElasticCLIPModel(model.config).set_budget(0.6)
    with pytest.raises(ValueError, match="holds a model of type 'elastic_clip'"):
        ElasticCLIPVisionModel.from_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "elastic_budgets": None}))
    with pytest.raises(ValueError, match=r"has no elastic_budgets\. An elastic model needs them"):
        ElasticCLIPModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"elastic_budgets in config\.json is missing or empty"):
        ElasticCLIPModel.from_pretrained(tmp_path, budget=0.6)


def test_bytes_that_one_budget_reads_are_counted(tmp_path, make):
    model, _ = make()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    largest = sum(t.numel() * t.element_size() for name, t in stored.items() if not name.startswith("elastic."))
    read = [ElasticCLIPModel.bytes_of_budget(tmp_path, budget) for budget in BUDGETS]
    assert read[0] == largest
    # By hand: what the smallest budget keeps of every tensor, and what the file adds for it.
    alone = ElasticCLIPModel.from_pretrained(tmp_path, budget=0.3)
    kept = sum(value.numel() * value.element_size() for value in alone.state_dict().values())
    assert read[2] >= kept + model.added_bytes(2) - 4 * 32  # "own" values are read besides those that they replace
    assert read[2] < read[1] < largest < sum(t.numel() * t.element_size() for t in stored.values())


WEIGHT = "vision_model.encoder.layers.1.mlp.fc2.weight"
DAMAGES = {
    "missing": (lambda tensors: tensors.pop(f"elastic.1.{WEIGHT}.codes"), rf"has no elastic\.1\.{WEIGHT}\.codes"),
    "shape": (lambda tensors: tensors.update({f"elastic.1.{WEIGHT}.scale": torch.ones(3)}), r"of the shape \(3,\)"),
    "nan": (lambda tensors: tensors[f"elastic.1.{WEIGHT}.scale"].fill_(torch.nan), "values that cannot be used"),
    "type": (
        lambda tensors: tensors.update({f"elastic.1.{WEIGHT}.codes": tensors[f"elastic.1.{WEIGHT}.codes"].float()}),
        "values that cannot be used",
    ),
}


@pytest.mark.parametrize("budget", [None, 0.6])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(tmp_path, make, damage, budget):
    make()[0].save_pretrained(tmp_path)
    change, message = DAMAGES[damage]
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        ElasticCLIPModel.from_pretrained(tmp_path, budget=budget)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[1].update(budget=0.95), "The largest must come first"),
        (lambda b: b[1].update(budget=7), r"keeps 7\. It must lie in"),
        (lambda b: b[1].update(macs="many"), "macs='many', no number"),
        (lambda b: b[1]["layers"].pop(), "4 widths for each of 3 layers"),
        (lambda b: b[2]["layers"][0].__setitem__(3, 48), "next larger budget has"),
        (lambda b: b[0]["layers"][0].__setitem__(3, 32), "tower has"),
        (lambda b: b[2]["layers"][1].__setitem__(1, 0), "those inside heads 1 or more"),
        (lambda b: b[2]["layers"][1].__setitem__(0, -1), "whole numbers"),
    ],
)
@pytest.mark.parametrize("kind", ["clip", "vision"])
def test_budgets_that_are_not_nested_are_refused(tmp_path, make, kind, change, message):
    make(kind)[0].save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    change(values["elastic_budgets"])
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(Exception, match=message):
        ELASTIC[kind].config_class.from_pretrained(tmp_path)


LOAD = """
torch.set_grad_enabled(False)
pixels = load_file(f"{folder}/inputs.safetensors")["pixels"]
auto = {"clip": transformers.AutoModel, "segmenter": transformers.AutoModelForSemanticSegmentation}
for kind, loader in auto.items():
    model = loader.from_pretrained(f"{folder}/{kind}", trust_remote_code=True)
    for budget in (None, *model.budgets):
        if budget is not None:
            model.set_budget(budget)
        outputs[f"{kind} {budget}"] = copy.deepcopy(model).vision_model(pixels).last_hidden_state
        if budget is not None:
            alone = loader.from_pretrained(f"{folder}/{kind}", trust_remote_code=True, budget=budget)
            outputs[f"{kind} {budget} alone"] = copy.deepcopy(alone).vision_model(pixels).last_hidden_state
    model.save_pretrained(f"{folder}/{kind}-again")
"""


@pytest.mark.slow
def test_budgets_can_be_set_where_the_package_is_missing(tmp_path, make, run_without_package):
    pixels, expected = torch.randn(2, 3, 32, 32), {}
    for kind in ("clip", "segmenter"):
        model, _ = make(kind)
        model.save_pretrained(tmp_path / kind)
        with torch.no_grad():
            for budget in BUDGETS:
                twin = copy.deepcopy(model.set_budget(budget))
                expected[f"{kind} {budget}"] = twin.vision_model(pixels).last_hidden_state
    save_file({"pixels": pixels}, tmp_path / "inputs.safetensors")
    outputs = run_without_package(LOAD, tmp_path)
    for kind in ("clip", "segmenter"):
        assert torch.equal(outputs[f"{kind} None"], expected[f"{kind} 0.9"])
        for budget in BUDGETS:
            assert torch.equal(outputs[f"{kind} {budget}"], expected[f"{kind} {budget}"])
            assert torch.equal(outputs[f"{kind} {budget} alone"], expected[f"{kind} {budget}"])
        again = ELASTIC[kind].from_pretrained(tmp_path / f"{kind}-again")
        assert equal(state(again), state(make(kind)[0]))
