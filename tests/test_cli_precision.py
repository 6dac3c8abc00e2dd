"""The command `sparsify`: what it prints, writes and refuses; and whole models in bfloat16."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_opentrans.cli import app
from hf_opentrans.cli._common import repeat_options
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.deploy import to_bfloat16
from hf_opentrans.evaluation_protocols import find_protocol
from hf_opentrans.evaluation_runs import evaluate_data
from hf_opentrans.loading import load_clip, load_segmenter
from hf_opentrans.models.segmenting import segment
from hf_opentrans.pruning.semi_structured import SEMI_STRUCTURED_FILE
from hf_opentrans.pruning.two_of_four import is_two_of_four

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration images give:UserWarning")


def _sparsify(*arguments):
    return CliRunner().invoke(app, repeat_options(["sparsify", *map(str, arguments)]))


def test_a_folder_with_zeros_and_an_honest_word(tiny_clip_folder, images, tmp_path):
    output, figures = tmp_path / "out", tmp_path / "figures.json"
    run = _sparsify(
        tiny_clip_folder, "--images", images, "--output", output, "--structures", "mlp", "attention", "--json", figures
    )
    assert run.exit_code == 0, run.output
    said = " ".join(run.stdout.split())
    assert "linear layers that are 2:4 18" in said
    assert "zeros in the linear layers 50.0%" in said
    assert "no faster on a processor. GPUs of compute capability 8.0 or newer" in said
    assert "1.10x with --structures mlp. Not measured here." in said
    assert is_two_of_four(load_clip(output).model.get_parameter("vision_model.encoder.layers.0.mlp.fc1.weight"))
    written = json.loads(figures.read_text())
    assert written["report"] == json.loads((output / SEMI_STRUCTURED_FILE).read_text())
    assert written["report"]["config"]["structures"] == ["attention", "mlp"]
    assert written["report"]["unseen_images"] == 2


def test_a_control_of_one_structure(tiny_clip_folder, images, tmp_path):
    output = tmp_path / "out"
    run = _sparsify(
        tiny_clip_folder, "--images", images, "--output", output, "--structures", "mlp", "--method", "magnitude"
    )
    assert run.exit_code == 0, run.output
    assert "linear layers that are 2:4 6" in " ".join(run.stdout.split())
    layer = load_clip(output).model.get_submodule("vision_model.encoder.layers.0")
    assert is_two_of_four(layer.get_parameter("mlp.fc2.weight"))
    assert not is_two_of_four(layer.get_parameter("self_attn.q_proj.weight"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "wanda"], "method is 'wanda'. It must be of obs, magnitude, random"),
        (["--structures", "heads"], "It must be of attention, mlp"),
        (["--num-images", "0"], "num_images is 0"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(tmp_path, arguments, said):
    run = _sparsify("no-such-model", "--images", "nowhere", "--output", tmp_path / "out", *arguments)
    assert run.exit_code == 2
    assert said in " ".join(run.output.split())


def test_a_folder_of_someone_else_is_left_alone(tiny_clip_folder, images, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    run = _sparsify(tiny_clip_folder, "--images", images, "--output", tmp_path / "mine")
    assert run.exit_code == 2
    assert "already holds thesis.txt" in " ".join(run.output.split())


@pytest.fixture
def in_both(monkeypatch):
    """Return a segmenter, the same in bfloat16 whether or not this processor has the instructions, and a processor."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    model, processor = load_segmenter("clip-scenes")
    half = to_bfloat16(model)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    return model, half, processor


def test_bfloat16_gives_the_same_classes(in_both, tiny_images):
    *models, processor = in_both
    found = [segment(model, processor, tiny_images, ["cat", "sky", "wall"], resolution=64) for model in models]
    same = torch.cat([(a.segmentation == b.segmentation).flatten() for a, b in zip(*found, strict=True)])
    assert float(same.double().mean()) >= 0.99
    assert len({int(index) for result in found[0] for index in result.segmentation.unique()}) > 1


def test_bfloat16_is_evaluated_as_a_model_of_its_own(in_both, tiny_images, write_segmentation_folder):
    model, half, processor = in_both

    def mask(image, index):
        return np.zeros((image.height, image.width), dtype=np.uint8)

    names = {"id_to_name": {"0": "cat", "1": "sky", "2": "wall"}}
    folder = SegmentationFolder(write_segmentation_folder({"val": tiny_images[:4]}, mask, names))
    plain, rough = (evaluate_data(m, processor, folder, find_protocol("native", resolution=64)) for m in (model, half))
    assert abs(plain.scores.pixel_accuracy - rough.scores.pixel_accuracy) <= 0.01
    assert plain.model_fingerprint != rough.model_fingerprint  # rows of both fit into one file
