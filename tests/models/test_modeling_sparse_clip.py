"""The sparse CLIP classes against stock CLIP, through disk, and in every way transformers runs a model."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSemanticSegmentation,
    BertConfig,
    CLIPTextModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from hf_opentrans import (
    DenseCLIPForSegmentation,
    SparseCLIPConfig,
    SparseCLIPModel,
    SparseCLIPVisionConfig,
    SparseCLIPVisionModel,
    SparseCLIPVisionModelWithProjection,
)

KINDS = ["vision", "projection", "clip"]
SPARSE = {
    "vision": SparseCLIPVisionModel,
    "projection": SparseCLIPVisionModelWithProjection,
    "clip": SparseCLIPModel,
}
# Every layer has other widths: 0 heads, value heads wider than query-key heads, masks, a skipped sublayer.
UNEQUAL = {
    0: {"num_attention_heads": 0, "intermediate_size": 20, "masked_neurons": [3, 19]},
    1: {"num_attention_heads": 3, "qk_head_dim": 5, "v_head_dim": 11, "masked_heads": [1], "intermediate_size": 0},
    2: {"skip": ["mlp"], "num_attention_heads": 2},
}


def stock_model(clip, kind) -> Any:
    """Return `clip` or its vision tower as the stock class."""
    if kind == "clip":
        return clip
    model: Any = (CLIPVisionModel if kind == "vision" else CLIPVisionModelWithProjection)(
        clip.config.vision_config
    ).eval()
    vision = model if kind == "vision" else model.vision_model
    vision.load_state_dict(clip.vision_model.state_dict())
    if kind == "projection":
        model.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    return model


def sparse_model(stock, kind, **vision):
    """Build the sparse class from its own constructor with the stock weights."""
    values = stock.config.to_dict()
    values.pop("model_type")
    model = SPARSE[kind](SPARSE[kind].config_class(**values | vision)).eval()
    model.load_state_dict(stock.state_dict())
    return model


def unequal_model(kind="vision"):
    torch.manual_seed(1)
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 16,
        "per_layer_config": UNEQUAL,
    }
    text: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "bos_token_id": 48, "eos_token_id": 49, "projection_dim": 16}
    if kind == "clip":
        config = SparseCLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    else:
        config = SparseCLIPVisionConfig(**vision)
    model = SPARSE[kind](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run(model, kind, **options):
    generator = torch.Generator().manual_seed(3)
    options.setdefault("pixel_values", torch.randn(2, 3, 32, 32, generator=generator).to(model.dtype))
    if kind == "clip":
        options["input_ids"] = torch.tensor([[48, 5, 6, 49], [48, 7, 49, 49]])
    # A copy, because weights that were read from disk are memory-mapped, and their alignment changes the rounding.
    with torch.no_grad():
        return copy.deepcopy(model)(**options)


def tensors_of(outputs):
    found = []
    for value in outputs.to_tuple():
        if torch.is_tensor(value):
            found.append(value)
        elif hasattr(value, "to_tuple"):
            found += tensors_of(value)
        elif isinstance(value, tuple):
            found += [part for part in value if part is not None]
    return found


def assert_same(left, right):
    left, right = tensors_of(left), tensors_of(right)
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_width_equals_stock_clip_bit_for_bit(tiny_clip, kind, implementation):
    stock = stock_model(tiny_clip, kind)
    sparse = sparse_model(stock, kind)
    for model in (stock, sparse):
        model.set_attn_implementation(implementation)
    assert_same(run(sparse, kind), run(stock, kind))


@pytest.mark.parametrize("size", [(48, 24), (16, 16), (40, 32)])
def test_other_image_sizes_equal_stock_clip(tiny_clip, size):
    stock = stock_model(tiny_clip, "vision")
    options = {"pixel_values": torch.randn(2, 3, *size), "interpolate_pos_encoding": True}
    ours = run(sparse_model(stock, "vision"), "vision", **options)
    assert_same(ours, run(stock, "vision", **options))
    assert ours.last_hidden_state.shape == (2, 1 + size[0] * size[1] // 64, 32)


def test_hidden_states_and_attentions_equal_stock_clip(tiny_clip):
    stock = stock_model(tiny_clip, "vision")
    sparse = sparse_model(stock, "vision")
    options = {"output_hidden_states": True, "output_attentions": True}
    for model in (stock, sparse):
        model.set_attn_implementation("eager")
    ours = run(sparse, "vision", **options)
    assert_same(ours, run(stock, "vision", **options))
    assert len(ours.hidden_states) == 4
    assert len(ours.attentions) == 3


def test_attentions_have_the_width_of_their_layer():
    model = unequal_model()
    model.set_attn_implementation("eager")
    outputs = run(model, "vision", output_attentions=True, output_hidden_states=True)
    # One per layer, as of a dense tower: layer 0 has no heads.
    assert [part.shape for part in outputs.attentions] == [(2, 0, 17, 17), (2, 3, 17, 17), (2, 2, 17, 17)]
    assert len(outputs.hidden_states) == 4


def test_query_key_and_value_widths_may_differ(tiny_clip):
    # A dense model whose queries and keys are zero beyond 5 of 8 values a head computes what qk_head_dim=5 computes;
    # values 5 and above that out_proj ignores may go as well.
    stock = stock_model(tiny_clip, "vision")
    attention = stock.encoder.layers[1].self_attn
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.unflatten(0, (4, 8))[:, 5:] = 0
            projection.bias.unflatten(0, (4, 8))[:, 5:] = 0
        attention.out_proj.weight.unflatten(1, (4, 8))[:, :, 6:] = 0
    state = stock.state_dict()
    for name, width in (("q", 5), ("k", 5), ("v", 6)):
        for part in ("weight", "bias"):
            key = f"encoder.layers.1.self_attn.{name}_proj.{part}"
            state[key] = state[key].unflatten(0, (4, 8))[:, :width].flatten(0, 1)
    key = "encoder.layers.1.self_attn.out_proj.weight"
    state[key] = state[key].unflatten(1, (4, 8))[:, :, :6].flatten(1, 2)
    values: dict[str, Any] = stock.config.to_dict() | {"per_layer_config": {1: {"qk_head_dim": 5, "v_head_dim": 6}}}
    values.pop("model_type")
    narrow = SparseCLIPVisionModel(SparseCLIPVisionConfig(**values)).eval()
    narrow.load_state_dict(state)
    for ours, theirs in zip(tensors_of(run(narrow, "vision")), tensors_of(run(stock, "vision")), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("qk", "v"), [(3, 8), (8, 3), (2, 5), (5, 5)])
@torch.no_grad()
def test_unequal_widths_are_padded_and_compute_unpadded_attention(qk, v):
    values: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 16}
    values |= {"num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
    values["per_layer_config"] = {0: {"num_attention_heads": 3, "qk_head_dim": qk, "v_head_dim": v}}
    torch.manual_seed(2)
    model = SparseCLIPVisionModel(SparseCLIPVisionConfig(**values)).eval()
    for parameter in model.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    attention: Any = model.encoder.layers[0].self_attn
    hidden = torch.randn(2, 17, 32)
    outputs = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs[implementation] = attention(hidden)[0]
    torch.testing.assert_close(outputs["sdpa"], outputs["eager"], atol=1e-5, rtol=1e-5)
    parts = []
    for head in range(3):
        q, k, x = (
            (hidden.double() @ p.weight.double().T + p.bias.double())[..., head * width : (head + 1) * width]
            for p, width in ((attention.q_proj, qk), (attention.k_proj, qk), (attention.v_proj, v))
        )
        parts.append((q @ k.mT / 8**0.5).softmax(-1) @ x)  # 8: of the dense head, 32 / 4
    output = attention.out_proj
    expected = torch.cat(parts, -1) @ output.weight.double().T + output.bias.double()
    torch.testing.assert_close(outputs["eager"].double(), expected, atol=1e-5, rtol=1e-5)
    widths = [part.shape[-1] for part in attention.pad_heads(*attention.project(hidden))]
    assert widths == [max(qk, v)] * 3


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(("sublayer", "silent"), [("attention", "self_attn.out_proj"), ("mlp", "mlp.fc2")])
def test_skipping_a_sublayer_equals_silencing_it(tiny_clip, layer, sublayer, silent):
    stock = stock_model(tiny_clip, "vision")
    module = stock.encoder.layers[layer].get_submodule(silent)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
    values: dict[str, Any] = stock.config.to_dict() | {"per_layer_config": {layer: {"skip": [sublayer]}}}
    values.pop("model_type")
    skipping = SparseCLIPVisionModel(SparseCLIPVisionConfig(**values)).eval()
    keys = skipping.state_dict().keys()
    assert len(keys) < len(stock.state_dict())
    skipping.load_state_dict({key: value for key, value in stock.state_dict().items() if key in keys})
    assert_same(run(skipping, "vision"), run(stock, "vision"))


def test_a_layer_may_skip_both_sublayers():
    config = unequal_model().config.to_dict() | {"per_layer_config": {1: {"skip": ["attention", "mlp"]}}}
    config.pop("model_type")
    model = SparseCLIPVisionModel(SparseCLIPVisionConfig(**config)).eval()
    states = run(model, "vision", output_hidden_states=True).hidden_states
    assert torch.equal(states[1], states[2])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_models_come_back_equal(tmp_path, kind):
    model = unequal_model(kind)
    model.save_pretrained(tmp_path)
    again, info = SPARSE[kind].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.config == model.config
    assert not again.training
    assert_same(run(again, kind), run(model, kind))


def test_a_full_folder_opens_as_any_sparse_class(tmp_path):
    model = unequal_model("clip")
    model.save_pretrained(tmp_path)
    whole = run(model, "clip")
    vision = SparseCLIPVisionModel.from_pretrained(tmp_path)
    projected = SparseCLIPVisionModelWithProjection.from_pretrained(tmp_path)
    assert torch.equal(run(vision, "vision").last_hidden_state, whole.vision_model_output.last_hidden_state)
    embeds = torch.nn.functional.normalize(run(projected, "projection").image_embeds, dim=-1)
    torch.testing.assert_close(embeds, whole.image_embeds)


def test_auto_classes_return_ours(tmp_path):
    unequal_model("vision").save_pretrained(tmp_path / "vision")
    unequal_model("clip").save_pretrained(tmp_path / "clip")
    assert type(AutoConfig.from_pretrained(tmp_path / "vision")) is SparseCLIPVisionConfig
    assert type(AutoConfig.from_pretrained(tmp_path / "clip")) is SparseCLIPConfig
    assert type(AutoModel.from_pretrained(tmp_path / "vision")) is SparseCLIPVisionModel
    assert type(AutoModel.from_pretrained(tmp_path / "clip")) is SparseCLIPModel
    dense = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "clip")
    assert type(dense) is DenseCLIPForSegmentation


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(tmp_path, kind, dtype):
    model = unequal_model(kind)
    expected = run(model, kind)[0]
    model.to(dtype).save_pretrained(tmp_path)
    again = SPARSE[kind].from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    outputs = run(again, kind)
    assert_same(outputs, run(model, kind))
    assert outputs[0].dtype == dtype
    torch.testing.assert_close(outputs[0].float(), expected, atol=0.15, rtol=0.1)
    assert SPARSE[kind].from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_sharded_save(tmp_path):
    model = unequal_model("clip")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(run(SparseCLIPModel.from_pretrained(tmp_path), "clip"), run(model, "clip"))


def test_eager_and_sdpa_agree(tmp_path):
    unequal_model().save_pretrained(tmp_path)
    outputs = []
    for name in ("eager", "sdpa"):
        model = SparseCLIPVisionModel.from_pretrained(tmp_path, attn_implementation=name)
        assert model.config._attn_implementation == name
        outputs.append(run(model, "vision").last_hidden_state)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_activation_checkpointing_gives_equal_gradients():
    gradients = []
    for enable in (False, True):
        model = unequal_model().train()
        if enable:
            model.activation_checkpointing_enable()
        model(torch.ones(1, 3, 32, 32)).pooler_output.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert float(plain["encoder.layers.0.mlp.fc1.weight"].abs().sum()) > 0


def test_compiles_as_one_graph():
    model = unequal_model()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(pixels)
        assert_same(compiled, model(pixels))


def write_checkpoint(folder: Path, config, state):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(
        {key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def stock_checkpoints(folder, clip):
    """Return the forms that stock checkpoints have on the Hub: (name, classes that read it, folder)."""
    vision = clip.vision_model.state_dict()
    prefixed = {f"vision_model.{key}": value for key, value in vision.items()}
    # Old files hold the buffer of position indices too.
    prefixed["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    projection = {"visual_projection.weight": clip.visual_projection.weight.detach()}
    text = {f"text_model.{key}": value for key, value in clip.text_model.state_dict().items()}
    text |= {"text_projection.weight": clip.text_projection.weight.detach(), "logit_scale": clip.logit_scale.detach()}
    config = clip.config.vision_config
    return {
        "prefixed": (["vision"], write_checkpoint(folder / "prefixed", config, prefixed)),
        "flat": (["vision"], write_checkpoint(folder / "flat", config, vision)),
        "projected": (
            ["vision", "projection"],
            write_checkpoint(folder / "projected", config, prefixed | projection),
        ),
        "full": (KINDS, write_checkpoint(folder / "full", clip.config, prefixed | projection | text)),
    }


@pytest.mark.parametrize("form", ["prefixed", "flat", "projected", "full"])
def test_stock_checkpoints_load_completely(tmp_path, tiny_clip, form):
    kinds, folder = stock_checkpoints(tmp_path, tiny_clip)[form]
    for kind in kinds:
        model, info = SPARSE[kind].from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_same(run(model, kind), run(stock_model(tiny_clip, kind), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_what_save_pretrained_of_stock_clip_writes_loads(tmp_path, tiny_clip, kind):
    stock = stock_model(tiny_clip, kind)
    stock.save_pretrained(tmp_path)
    model = SPARSE[kind].from_pretrained(tmp_path)
    assert_same(run(model, kind), run(stock, kind))
    # Saved again, under our names, it still loads.
    model.save_pretrained(tmp_path / "again")
    assert_same(run(SPARSE[kind].from_pretrained(tmp_path / "again"), kind), run(stock, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_tensor_is_an_error(tmp_path, tiny_clip, kind):
    folder = stock_checkpoints(tmp_path, tiny_clip)["full"][1]
    state = load_file(folder / "model.safetensors")
    del state["vision_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the weights .*layers\.1\.mlp\.fc1\.weight.*complete CLIP"):
        SPARSE[kind].from_pretrained(folder)


def test_no_matching_tensor_is_an_error(tmp_path, tiny_clip):
    folder = write_checkpoint(tmp_path / "m", tiny_clip.config.vision_config, {"other.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="lacks 55 of the weights"):
        SparseCLIPVisionModel.from_pretrained(folder)
    _, info = SparseCLIPVisionModel.from_pretrained(folder, output_loading_info=True)
    assert len(info["missing_keys"]) == 55  # who asks for the list gets it instead


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_that_differs_from_the_config_is_an_error(tmp_path, tiny_clip, kind):
    folder = stock_checkpoints(tmp_path, tiny_clip)["full"][1]
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 48
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"do not have the shapes that its config\.json states"):
        SPARSE[kind].from_pretrained(folder)


def test_other_models_are_refused(tmp_path, tiny_clip):
    text = CLIPTextModel(tiny_clip.config.text_config)
    text.save_pretrained(tmp_path / "text")
    BertConfig().save_pretrained(tmp_path / "bert")
    vision = stock_checkpoints(tmp_path, tiny_clip)["flat"][1]
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"type 'clip_text_model'.*Give a CLIP model"):
            SPARSE[kind].from_pretrained(tmp_path / "text")
        with pytest.raises(ValueError, match=r"type 'bert'.*Give a CLIP model"):
            SPARSE[kind].from_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"type 'clip_vision_model'.*with both towers"):
        SparseCLIPModel.from_pretrained(vision)
