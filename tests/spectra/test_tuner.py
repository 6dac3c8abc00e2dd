"""Adapters on selected layers: stock PEFT in, stock PEFT out, down to a process that knows nothing of this package."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GitConfig,
    GitForCausalLM,
    OwlViTVisionConfig,
    OwlViTVisionModel,
    PreTrainedModel,
)

from hf_opentrans import PruningConfig, get_peft_model, prune_model
from hf_opentrans.spectra.analysis import analyze_spectra
from hf_opentrans.spectra.layers import find_layers
from hf_opentrans.spectra.selection import LayerSelection, select_layers
from hf_opentrans.spectra.tuner import SpectralConfig

# PEFT reads what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SAVED = "post_layernorm"
WIDTHS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION: dict[str, Any] = {**WIDTHS, "image_size": 32, "patch_size": 8}
TEXT: dict[str, Any] = {**WIDTHS, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make_clip_vision():
    return CLIPVisionModel(CLIPVisionConfig(**VISION))


def make_clip():
    text = {**TEXT, "max_position_embeddings": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))  # pyright: ignore[reportArgumentType]


def make_owl():
    return OwlViTVisionModel(OwlViTVisionConfig(**VISION))


def make_git():
    return GitForCausalLM(GitConfig(vision_config=VISION, max_position_embeddings=32, **TEXT))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Family:
    """How to build a tiny model, which of its outputs to look at, and whether it reads text."""

    make: Callable[[], PreTrainedModel]
    output: str
    reads_text: bool

    def build(self) -> PreTrainedModel:
        torch.manual_seed(0)
        return self.make().eval()

    def inputs(self) -> dict[str, torch.Tensor]:
        images = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
        words = {"input_ids": torch.tensor([[1, 5, 9, 2], [1, 7, 3, 2]])}
        return images | (words if self.reads_text else {})

    def run(self, model: nn.Module) -> torch.Tensor:
        return model(**self.inputs())[self.output]


FAMILIES = {
    "clip_vision": Family(make_clip_vision, "pooler_output", False),
    "clip": Family(make_clip, "logits_per_image", True),
    "owl": Family(make_owl, "pooler_output", False),
    "git": Family(make_git, "logits", True),
}
MODES = {"full": ("ln_tuning_layers",), "lora": ("lora_A", "lora_B")}


@pytest.fixture(params=FAMILIES.values(), ids=list(FAMILIES))
def family(request):
    return request.param


def make_config(mode="full", **options):
    return SpectralConfig(mode=mode, modules_to_save=[SAVED], **options)


def adapted_names(selection, model, mode="full", name="default") -> set[str]:
    """Return the parameters that an adapter has, written down from the names of the modules."""
    found: set[str] = set()
    for layer in selection.names:
        parts = {f"{part}.{name}" for part in MODES[mode]}
        own = [n for n, _ in model.get_submodule(layer).named_parameters()] if mode == "full" else ["weight"]
        found |= {f"base_model.model.{layer}.{part}.{parameter}" for part in parts for parameter in own}
    (saved,) = (n for n, _ in model.named_modules() if n.endswith(SAVED))
    part = "ln_tuning_layers" if mode == "full" else "modules_to_save"  # a single module is wrapped like a layer
    return found | {f"base_model.model.{saved}.{part}.{name}.{parameter}" for parameter in ("weight", "bias")}


def targets(config, model, selection=None):
    return config.resolve(model, selection).target_modules


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def wrapped(model) -> Any:
    """Return the model inside a `PeftModel`."""
    return model.base_model.model


def step(family, model, rate=0.05):
    """Make one step away from the base model; LoRA starts at a product of zero, and needs two."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(2):
        optimizer.zero_grad()
        (family.run(model) - 1).square().mean().backward()
        optimizer.step()
    return model


def make_adapted(family, mode="full", seed=0, name="default"):
    """Return (model, selection, output of the base): an adapter on a random half of the layers, after a step."""
    base = family.build()
    with torch.no_grad():
        expected = family.run(base)
    selection = select_layers(base, "random", seed=seed)
    return step(family, get_peft_model(base, make_config(mode), name, selection=selection)), selection, expected


# Training.


@pytest.mark.parametrize("mode", MODES)
def test_exactly_the_selection_and_the_modules_to_save_train(family, mode):
    base, untouched = family.build(), family.build()
    selection = select_layers(base)
    model = get_peft_model(base, make_config(mode), selection=selection)
    assert type(model) is PeftModel
    assert trained(model) == adapted_names(selection, untouched, mode)
    assert 0 < len(selection.names) < len(find_layers(untouched))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_changes_before_training(family, mode):
    base = family.build()
    with torch.no_grad():
        expected = family.run(base)
        model = get_peft_model(base, make_config(mode))
        assert torch.equal(family.run(model), expected)


def test_the_config_selects_as_select_layers_does(family):
    base = family.build()
    config = SpectralConfig("depth", 0.3, target_modules=r".*\.layers\..*", exclude_modules=["fc1", "q_proj"])
    wanted = [n for n in find_layers(base) if ".layers." in n and not n.endswith(("fc1", "q_proj"))]
    selection = config.select(base)
    assert [*selection.frozen, *selection.names] == wanted
    assert targets(config, base) == targets(config, base, selection)
    assert trained(get_peft_model(base, config)) == {
        f"base_model.model.{name}.ln_tuning_layers.default.{part}"
        for name in selection.names
        for part in ("weight", "bias")
    }


@pytest.mark.parametrize("mode", MODES)
def test_a_step_changes_what_trains_and_nothing_else(family, mode):
    base, untouched = family.build(), family.build()
    selection = select_layers(base, "random")
    model = get_peft_model(base, make_config(mode), selection=selection)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(family, model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    expected = adapted_names(selection, untouched, mode)
    # No gradient reaches the bias of a key: it moves all scores of a query alike.
    assert expected - changed <= {name for name in expected if "key" in name or "k_proj" in name}
    assert changed <= expected


def test_the_share_of_trainable_parameters_is_printed(family, capsys):
    base = family.build()
    total = sum(p.numel() for p in base.parameters())
    selection = select_layers(base, "random")
    own = sum(p.numel() for name in selection.names for p in base.get_submodule(name).parameters()) + 2 * 32
    get_peft_model(base, make_config(), selection=selection).print_trainable_parameters()
    assert f"trainable params: {own:,} || all params: {total + own:,} ||" in capsys.readouterr().out


@pytest.mark.parametrize(("mode", "kind"), [("full", LNTuningLayer), ("lora", LoraLayer)])
@pytest.mark.parametrize("wanted", [["layers.1"], ["layers.10"], ["layers.1", "layers.3"]])
def test_names_are_exact(mode, kind, wanted):
    inner = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
    base = nn.ModuleDict({"layers": nn.Sequential(*(nn.Linear(4, 4) for _ in range(11))), "other": inner})
    frozen = tuple(name for name in find_layers(base) if name not in wanted)
    assert {"other.layers.1", "layers.0"} < set(frozen)
    selection = LayerSelection("alpha", 0.1, "module", tuple(wanted), frozen, {})
    model = get_peft_model(base, SpectralConfig(mode=mode), selection=selection)
    assert [name for name, module in wrapped(model).named_modules() if isinstance(module, kind)] == wanted


# Saving and loading.


@pytest.mark.parametrize("mode", MODES)
def test_only_what_trains_is_stored(family, mode, tmp_path):
    model, selection, _ = make_adapted(family, mode)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    names = adapted_names(selection, family.build(), mode)
    assert set(stored) == {name.replace(".modules_to_save.default", "").replace(".default", "") for name in names}
    trained_values = {
        n.replace(".modules_to_save.default", "").replace(".default", ""): p
        for n, p in model.named_parameters()
        if n in names
    }
    assert all(torch.equal(value, trained_values[name]) for name, value in stored.items())


LOADER = """
import json, sys
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

outputs = {}
for job in json.load(open(sys.argv[1])):
    base = getattr(transformers, job["model"]).from_pretrained(job["base"]).eval()
    model = PeftModel.from_pretrained(base, job["adapter"], adapter_name=job["name"]).eval()
    with torch.no_grad():
        outputs[job["key"]] = model(**load_file(job["inputs"]))[job["output"]].contiguous()
assert not any(name.startswith("hf_opentrans") for name in sys.modules), "hf_opentrans was imported"
save_file(outputs, sys.argv[2])
"""
NAMES = ("default", "other")


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory):
    """Return what was expected of every saved adapter, and what another process that loads it with PEFT gets."""
    folder: Path = tmp_path_factory.mktemp("adapters")
    jobs, expected = [], {}
    for kind, family in FAMILIES.items():
        family.build().save_pretrained(folder / kind)
        save_file(family.inputs(), folder / f"{kind}.safetensors")
        for mode in MODES:
            model, _, base = make_adapted(family, mode)
            model.save_pretrained(str(folder / f"{kind}-{mode}"))
            with torch.no_grad():
                expected[kind, mode] = family.run(model), base
            job = {"model": family.make().__class__.__name__, "base": str(folder / kind), "output": family.output}
            job |= {"adapter": str(folder / f"{kind}-{mode}"), "inputs": str(folder / f"{kind}.safetensors")}
            jobs += [{**job, "name": name, "key": f"{kind}-{mode}-{name}"} for name in NAMES]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-W", "error:Found missing adapter keys", "-c", LOADER, "jobs.json", "outputs.safetensors"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    return expected, load_file(folder / "outputs.safetensors")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_plain_peft_loads_what_was_saved(loaded_elsewhere, kind, mode, name):
    expected, outputs = loaded_elsewhere
    adapted, base = expected[kind, mode]
    torch.testing.assert_close(outputs[f"{kind}-{mode}-{name}"], adapted, atol=1e-6, rtol=1e-5)
    assert (adapted - base).abs().max() > 1e-2


# PEFT's other methods.


@pytest.mark.parametrize("mode", MODES)
def test_a_disabled_adapter_is_the_base_model(family, mode):
    model, _, expected = make_adapted(family, mode)
    with torch.no_grad():
        adapted = family.run(model)
        with model.disable_adapter():
            assert torch.equal(family.run(model), expected)
        assert torch.equal(family.run(model), adapted)
    assert not torch.allclose(adapted, expected, atol=1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_merging_gives_the_plain_model_back(family, mode):
    base = family.build()
    model = step(family, get_peft_model(base, SpectralConfig("random", mode=mode)))
    with torch.no_grad():
        expected = family.run(model)
        merged: Any = model.merge_and_unload()
        torch.testing.assert_close(family.run(merged), expected, atol=1e-5, rtol=1e-4)
    plain = family.build()
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert list(merged.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(
    "mode",
    [
        "full",
        "lora",
    ],
)
def test_merging_unwraps_the_modules_to_save(mode):
    family = FAMILIES["clip_vision"]
    model, _, _ = make_adapted(family, mode)
    merged: Any = model.merge_and_unload()
    assert list(merged.state_dict()) == list(family.build().state_dict())


@pytest.mark.parametrize(
    ("mode", "seed"),
    [
        ("full", 0),
        ("lora", 0),
        ("lora", 7),
        pytest.param(
            "full",
            7,
            marks=pytest.mark.xfail(
                strict=True, raises=KeyError, reason="PEFT's LN_TUNING needs every adapter on every layer"
            ),
        ),
    ],
    ids=["full-same", "lora-same", "lora-another", "full-another"],
)
def test_a_second_adapter_stands_beside_the_first(family, mode, seed):
    plain = family.build()
    model, first_selection, base = make_adapted(family, mode)
    selection = select_layers(plain, "random", seed=seed)
    assert (selection.names == first_selection.names) is (seed == 0)
    with torch.no_grad():
        first = family.run(model)
        model.add_adapter("b", make_config(mode).resolve(plain, selection=selection))
        assert torch.equal(family.run(model), first)
        model.set_adapter("b")
        assert torch.equal(family.run(model), base)
    assert trained(model) == adapted_names(selection, plain, mode, "b")
    second = family.run(step(family, model, rate=0.02)).detach()
    assert not torch.allclose(second, first, atol=1e-2)
    with torch.no_grad():
        for name, expected in (("default", first), ("b", second)):
            model.set_adapter(name)
            assert torch.equal(family.run(model), expected)


def test_the_adapted_model_resolves_a_selection_of_the_plain_one(family):
    plain = family.build()
    model, selection, _ = make_adapted(family)
    config = make_config()
    assert targets(config, wrapped(model), selection) == targets(config, plain, selection)


def test_an_adapted_model_has_nothing_to_select():
    config = SpectralConfig("depth")
    model: Any = get_peft_model(FAMILIES["clip_vision"].build(), config)
    with pytest.raises(ValueError, match="has adapters already"):
        config.resolve(wrapped(model))


# Modes and configs.


def test_lora_is_on_the_same_modules_with_its_options(family):
    base = family.build()
    selection = select_layers(base, "random")
    options = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.25}
    full = make_config().resolve(base, selection)
    lora = make_config("lora", lora=options).resolve(base, selection)
    assert type(full) is LNTuningConfig
    assert type(lora) is LoraConfig
    saved = next(name for name, _ in base.named_modules() if name.endswith(SAVED))
    assert full.target_modules == f"{lora.target_modules}|{re.escape(saved)}"
    assert {name: getattr(lora, name) for name in options} == options
    assert (full.modules_to_save, lora.modules_to_save) == (None, [SAVED])
    model = get_peft_model(base, make_config("lora", lora=options), selection=selection)
    layers = {name: module for name, module in wrapped(model).named_modules() if isinstance(module, LoraLayer)}  # pyright: ignore[reportAttributeAccessIssue]
    assert tuple(sorted(layers)) == tuple(sorted(selection.names))
    assert {layer.r["default"] for layer in layers.values()} == {3}
    assert {layer.lora_alpha["default"] for layer in layers.values()} == {5}


def test_other_modules_to_save_are_left_out_by_default(tiny_clip):
    resolved: Any = SpectralConfig().resolve(tiny_clip)
    assert resolved.modules_to_save is None


def test_stock_configs_pass_through(family):
    base = family.build()
    stock = LoraConfig(target_modules=["fc1"], r=2)
    model = get_peft_model(base, stock, "mine")
    assert model.peft_config["mine"] is stock
    assert list(model.peft_config) == ["mine"]
    assert trained(model)
    assert all(".fc1.lora_" in name for name in trained(model))


def test_peft_says_how_to_resolve_a_config(tiny_clip):
    with pytest.raises(TypeError, match=r"hf_opentrans\.get_peft_model\(model, config\).*config\.resolve\(model\)"):
        peft.get_peft_model(tiny_clip, SpectralConfig())  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "other"}, "mode is 'other'. It must be one of full, lora"),
        ({"lora": {"r": 2}}, "mode is 'full'. Set mode='lora'"),
        ({"mode": "full", "lora": {"r": 2}}, "mode is 'full'. Set mode='lora'"),
        ({"mode": "lora", "lora": {"target_modules": ["q"]}}, r"lora holds \['target_modules'\]"),
        (
            {"mode": "lora", "lora": {"modules_to_save": ["q"], "exclude_modules": ["v"], "r": 2}},
            r"lora holds \['exclude_modules', 'modules_to_save'\]",
        ),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SpectralConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "other"}, "rule is 'other'"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"granularity": "row"}, "granularity is 'row'"),
        ({"target_modules": ["nothing"]}, "has no linear or convolution layer"),
        ({"rule": "gradient"}, "needs the model and `batches`"),
        ({"rule": "damage"}, "needs `pruning_report`"),
    ],
)
def test_a_wrong_selection_is_refused_and_the_model_is_left_alone(tiny_clip, options, message):
    before = [(name, type(module)) for name, module in tiny_clip.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_clip, SpectralConfig(**options))
    assert [(name, type(module)) for name, module in tiny_clip.named_modules()] == before


def test_the_selection_of_another_model_is_refused(tiny_clip):
    selection = select_layers(FAMILIES["git"].build(), "depth")
    with pytest.raises(ValueError, match="CLIPModel has no layer 'git"):
        get_peft_model(tiny_clip, SpectralConfig(), selection=selection)


@pytest.mark.parametrize("rule", ["alpha", "gradient"])
def test_options_of_the_selection_are_passed_on(tiny_clip, rule):
    report = analyze_spectra(tiny_clip, fit="peak") if rule == "alpha" else None
    batches = None if report else [{**FAMILIES["clip"].inputs(), "return_loss": True}]
    target = r"vision_model\..*"
    expected = select_layers(report or tiny_clip, rule, 0.2, "block", target_modules=target, batches=batches)
    config = SpectralConfig(rule, 0.2, "block", target_modules=target)
    assert config.select(tiny_clip, report=report, batches=batches) == expected
    resolved: Any = config.resolve(tiny_clip, report=report, batches=batches)
    assert resolved.target_modules == targets(config, tiny_clip, expected)


def test_the_seed_of_the_config_counts(tiny_clip):
    draws = [SpectralConfig("random", seed=seed).select(tiny_clip) for seed in range(4)]
    assert [selection.names for selection in draws] == [
        select_layers(tiny_clip, "random", seed=seed).names for seed in range(4)
    ]
    assert len({selection.names for selection in draws}) > 1


# Pruned models.


@pytest.mark.parametrize("mode", MODES)
def test_a_pruned_model_is_adapted(tiny_clip, tiny_images, mode, tmp_path):
    pruned = prune_model(tiny_clip, tiny_images * 5, PruningConfig(keep=0.5))
    family = Family(lambda: pruned.model, "image_embeds", True)
    with torch.no_grad():
        expected = family.run(pruned.model)
    target = r"vision_model\..*"
    config = SpectralConfig("damage", mode=mode, target_modules=target)
    selection = config.select(pruned.model, pruning_report=pruned.report)
    values = pruned.model.state_dict()
    shapes = {tuple(values[f"{name}.weight"].shape) for name in selection.names}
    assert shapes - {(32, 32), (64, 32), (32, 64)}
    model = get_peft_model(pruned.model, config, selection=selection)
    with torch.no_grad():
        assert torch.equal(family.run(model), expected)
    ours = {name.split(f".{part}.")[0] for name in trained(model) for part in MODES[mode] if f".{part}." in name}
    assert ours == {f"base_model.model.{name}" for name in selection.names}
    step(family, model)
    with torch.no_grad():
        adapted = family.run(model)
        torch.testing.assert_close(family.run(model.merge_and_unload()), adapted, atol=1e-5, rtol=1e-4)  # pyright: ignore[reportCallIssue]
    assert not torch.allclose(adapted, expected, atol=1e-2)
