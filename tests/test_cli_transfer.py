"""The command `transfer`: what it prints, writes and refuses."""

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation
from typer.testing import CliRunner

from hf_opentrans import PruningConfig, SparseCLIPModel, Subnetwork, load_transferred, prune_model
from hf_opentrans.cli import app


def run(*arguments: Any):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def pruned(tmp_path, tiny_clip, tiny_images):
    """Return a folder as `prune` writes it."""
    result = prune_model(tiny_clip, tiny_images * 5, PruningConfig(keep=0.6, method="magnitude"))
    result.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.fixture
def clipseg_folder(tmp_path, tiny_clip):
    values = tiny_clip.config.to_dict()
    options: dict[str, Any] = {"reduce_dim": 8, "extract_layers": [0, 1], "decoder_num_attention_heads": 2}
    config = CLIPSegConfig(
        text_config=values["text_config"], vision_config=values["vision_config"], projection_dim=16, **options
    )
    model = CLIPSegForImageSegmentation(config)
    planted = {
        f"clip.{key}": value for key, value in tiny_clip.state_dict().items() if "vision" in key or "visual" in key
    }
    model.load_state_dict(planted, strict=False)
    model.save_pretrained(tmp_path / "clipseg")
    return tmp_path / "clipseg"


def test_transfer_writes_a_smaller_host_and_says_what_matched(tmp_path, pruned, clipseg_folder):
    done = run("transfer", pruned, clipseg_folder, "--output", tmp_path / "out", "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    assert "compensated weights" in done.output
    assert "equal" in done.output
    assert "Dropped: clip.vision_model.encoder.layers.2" in done.output
    assert "no processor beside the target" in done.output
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["matches"]["different"] == 0
    assert values["params"] < values["dense_params"]
    model = load_transferred(tmp_path / "out")
    assert type(model) is CLIPSegForImageSegmentation
    assert sum(p.numel() for p in model.clip.vision_model.parameters()) < values["dense_params"]


def test_transfer_into_a_clip_keeps_its_processor(tmp_path, pruned, tiny_clip_folder):
    done = run("transfer", pruned / "subnetwork", tiny_clip_folder, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert type(load_transferred(tmp_path / "out")) is SparseCLIPModel
    assert (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_target_keeps_its_precision(tmp_path, pruned, clipseg_folder, dtype):
    model = CLIPSegForImageSegmentation.from_pretrained(clipseg_folder).to(dtype)
    model.save_pretrained(clipseg_folder)
    done = run("transfer", pruned, clipseg_folder, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "compensated weights" in done.output
    loaded = load_transferred(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as opened:
        names = list(opened.keys())
        assert {opened.get_tensor(name).dtype for name in names if "position_ids" not in name} == {dtype}
    expected = Subnetwork.from_pretrained(pruned / "subnetwork").apply_to(model.eval()).model
    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "pixel_values": torch.randn(1, 3, 32, 32, dtype=dtype)}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected(**inputs).logits)


def test_a_half_precision_clip_stays_one(tmp_path, pruned, tiny_clip, tiny_clip_folder):
    tiny_clip.half().save_pretrained(tiny_clip_folder)
    done = run("transfer", pruned, tiny_clip_folder, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert load_transferred(tmp_path / "out").dtype == torch.float16


def test_a_refit_is_computed_in_float32_and_saved_in_half_precision(tmp_path, clipseg_folder, tiny_clip, tiny_images):
    source = prune_model(tiny_clip, tiny_images * 5, PruningConfig(keep=0.9, method="magnitude")).subnetwork
    source.save_pretrained(tmp_path / "sub")
    model = CLIPSegForImageSegmentation.from_pretrained(clipseg_folder)
    with torch.no_grad():
        for parameter in model.clip.vision_model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.half().save_pretrained(clipseg_folder)
    many = tmp_path / "many"
    many.mkdir()
    for index in range(40):
        tiny_images[index % 8].rotate(index).save(many / f"{index}.png")
    done = run("transfer", tmp_path / "sub", clipseg_folder, "--output", tmp_path / "out", "--images", many)
    assert done.exit_code == 0, done.output
    assert "plan, refitted" in done.output
    found = load_transferred(tmp_path / "out").clip.vision_model
    whole = source.apply_to(model.float(), many, config=PruningConfig(num_images=256)).model
    state = whole.clip.vision_model.state_dict()
    assert all(torch.equal(value, state[key].to(value.dtype)) for key, value in found.state_dict().items())


def test_images_rebuild_other_weights(tmp_path, pruned, clipseg_folder, images):
    model = CLIPSegForImageSegmentation.from_pretrained(clipseg_folder)
    with torch.no_grad():
        for parameter in model.clip.vision_model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(clipseg_folder)
    plain = run("transfer", pruned, clipseg_folder, "--output", tmp_path / "plain")
    assert "plan alone" in plain.output
    assert "nothing was rebuilt: no images were given" in plain.output
    done = run("transfer", pruned, clipseg_folder, "--output", tmp_path / "out", "--images", images)
    assert done.exit_code in (0, 1), done.output
    # Eight tiny images give too few tokens for least squares: that is said before anything is written.
    assert "plan, refitted" in done.output or "calibration images give" in done.output


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["nowhere", "TARGET"], "There is no subnetwork.json in", 2),
        (["PRUNED", "nowhere/x"], "There is no model folder", 2),
        (["PRUNED", "TARGET", "--num-images", "0"], "num_images is 0", 2),
        (["PRUNED", "TARGET", "--prefix", "eyes"], "has no module 'eyes'", 1),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, pruned, clipseg_folder, arguments, message, code):
    places = {"PRUNED": pruned, "TARGET": clipseg_folder, "nowhere/x": tmp_path / "a/b/c"}
    chosen = [places.get(argument, argument) for argument in arguments]
    done = run("transfer", *chosen, "--output", tmp_path / "out")
    assert done.exit_code == code, done.output
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_a_foreign_output_folder_is_left_alone(tmp_path, pruned, clipseg_folder):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    done = run("transfer", pruned, clipseg_folder, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "already holds mine.txt" in done.output
    assert (tmp_path / "out/mine.txt").read_text() == "mine"
