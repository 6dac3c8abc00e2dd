"""The commands `prune-elastic` and `autotune`, and what the other commands do with their folders."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor
from typer.testing import CliRunner

import hf_opentrans.cli.elastic  # noqa: F401 (registers its commands)
from hf_opentrans import DenseCLIPForSegmentation, prune_elastic
from hf_opentrans._fingerprints import model_fingerprint
from hf_opentrans.cli import app
from hf_opentrans.deploy import load_exportable
from hf_opentrans.loading import load_any, load_clip, load_segmenter
from hf_opentrans.models.modeling_elastic_clip import ElasticCLIPModel
from hf_opentrans.pruning.elastic_report import ElasticReport


def run(*arguments):
    """Return exit code, standard output and the error on one line."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())


def test_a_model_is_pruned_and_tuned(tmp_path, tiny_clip_folder, images):
    output, target = tmp_path / "elastic", tmp_path / "figures.json"
    options = ["--images", images, "--output", output, "--budgets", "0.6,0.8", "--json", target]
    code, out, error = run("prune-elastic", tiny_clip_folder, *options)
    assert code == 0, error
    assert "calibration images give" in error  # the warning, in one line
    report = ElasticReport.load(output)
    assert [entry.budget for entry in report.budgets] == [0.8, 0.6]
    assert f"{report.size_ratio:.2f} times the largest tower" in out
    assert f"{report.budgets[1].cosine_patches:.4f}" in out
    assert json.loads(target.read_text())["report"] == json.loads(json.dumps(report.to_dict()))
    assert ElasticCLIPModel.from_pretrained(output).budgets == (0.8, 0.6)
    tuned = tmp_path / "tuned.json"
    options = ["--max-latency-ms", 1e6, "--resolutions", "32,40", "--repeats", 1, "--images", images, "--json", tuned]
    code, out, error = run("autotune", output, *options)
    assert code == 0, error
    assert "budget 0.8 at 40 pixels, slide" in out
    assert json.loads(tuned.read_text())["settings"]["resolution"] == 40
    code, _, error = run("autotune", output, "--max-latency-ms", 1e-6, "--repeats", 1)
    assert (code, "No setting takes 1e-06 ms or less" in error) == (1, True)


def test_mistakes_end_in_one_sentence(tmp_path, tiny_clip_folder, images):
    options = ["--images", images, "--output", tmp_path / "new"]
    code, _, error = run("prune-elastic", tiny_clip_folder, *options, "--budgets", "0.6,many")
    assert (code, "--budgets is '0.6,many'. It must be numbers" in error) == (2, True)
    code, _, error = run("prune-elastic", tiny_clip_folder, *options, "--budgets", "0.6,1.5")
    assert (code, "They must be shares in (0, 1]" in error) == (2, True)
    code, _, error = run("autotune", tiny_clip_folder, "--max-latency-ms", 5)
    assert (code, "holds a model of type 'clip'" in error) == (1, True)
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_clip_config, tiny_tokenizer, tiny_image_processor):
    """Return a folder with three budgets in half precision."""
    folder = tmp_path_factory.mktemp("made") / "elastic"
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(44)]
    result = prune_elastic(CLIPModel(tiny_clip_config()).eval(), pictures, (0.8, 0.6, 0.4))
    result.save_pretrained(folder, CLIPProcessor(tiny_image_processor, tiny_tokenizer), disk_dtype=torch.float16)
    return folder


@pytest.fixture
def elastic(made, tmp_path):
    """Return a copy of it that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "elastic"))


def test_info_has_a_line_for_every_budget(tmp_path, elastic):
    code, out, error = run("info", elastic, "--json", tmp_path / "info.json")
    assert code == 0, error
    values, report = json.loads((tmp_path / "info.json").read_text()), ElasticReport.load(elastic)
    assert "budgets of this checkpoint" in out
    for found, entry in zip(values["budgets"], report.budgets, strict=True):
        names = ("budget", "macs", "params", "bytes_alone", "bytes_added")
        assert [found[name] for name in names] == [getattr(entry, name) for name in names]
        assert f"{entry.macs / 1e6:,.2f} M" in out
    small = cast("Any", load_clip(elastic, budget=0.4).model.config).vision_config.per_layer_config
    assert [layer["neurons"] for layer in values["budgets"][2]["layers"]] == [w.intermediate_size for w in small]
    assert values["vision_tower"]["macs"]["now"] == report.budgets[0].macs


def test_segment_and_evaluate_say_which_budget(tmp_path, elastic, images, tiny_images, write_segmentation_folder):
    options = ["--labels", "cat; dog", "--output", tmp_path / "out", "--json", tmp_path / "segment.json"]
    code, out, error = run("segment", elastic, images / "0.png", *options)
    assert code == 0, error
    assert "Budget 0.8 of 0.8, 0.6, 0.4: choose with --budget." in out
    assert json.loads((tmp_path / "segment.json").read_text())["budget"] == 0.8
    code, out, error = run("segment", elastic, images / "0.png", *options, "--budget", 0.4)
    assert code == 0, error
    assert "choose with" not in out
    assert json.loads((tmp_path / "segment.json").read_text())["budget"] == 0.4
    classes = {"id_to_name": {"0": "cat", "1": "dog"}, "ignore_id": 255}
    data = write_segmentation_folder(
        {"val": tiny_images[:2]}, lambda image, index: np.full(image.size[::-1], index, np.uint8), classes
    )
    target = tmp_path / "scores.json"
    for options in ([], ["--budget", 0.4]):
        code, out, error = run("evaluate", elastic, "--dataset", data, "--json", target, *options)
        assert code == 0, error
    rows = json.loads(target.read_text())["rows"]
    assert [row["model"] for row in rows] == [str(elastic), f"{elastic} at budget 0.4"]
    assert rows[0]["result"]["model_fingerprint"] != rows[1]["result"]["model_fingerprint"]


def test_export_takes_one_budget(tmp_path, elastic, monkeypatch):
    seen = []

    def stop(model, processor, output, config, **options):
        seen.append((type(model), model.config.vision_config.pruning_config["keep"], options["source"]))
        raise RuntimeError("far enough")

    with monkeypatch.context() as patch:
        patch.setattr("hf_opentrans.cli.export.export_model", stop)
        for given in ([], ["--budget", 0.6]):
            code, out, error = run("export", elastic, "--format", "torch-export", "--output", tmp_path / "new", *given)
            assert (code, error.endswith("far enough")) == (1, True), error
            assert ("Budget 0.8 of 0.8, 0.6, 0.4: choose with --budget." in out) == (not given)
    assert [line[:2] for line in seen] == [(DenseCLIPForSegmentation, 0.8), (DenseCLIPForSegmentation, 0.6)]
    assert [line[2] for line in seen] == [f"{elastic} at budget 0.8", f"{elastic} at budget 0.6"]
    options = ["--format", "torch-export", "--vocabulary", "cat; dog", "--json", tmp_path / "e.json"]
    code, _, error = run("export", elastic, "--output", tmp_path / "exported", *options, "--budget", 0.4)
    assert code == 0, error
    values = json.loads((tmp_path / "e.json").read_text())
    assert (values["budget"], values["export"]["source"]) == (0.4, "elastic at budget 0.4")
    assert values["export"]["model_class"] == "DenseCLIPForSegmentation"
    small = load_segmenter(elastic, budget=0.4)[0]
    assert values["export"]["fingerprint"] == model_fingerprint(small)
    assert load_exportable(elastic)[0].budgets == (0.8, 0.6, 0.4)


def test_a_budget_that_is_not_there_is_named(tmp_path, elastic, tiny_clip_folder, images):
    message = "budget is 0.5. This checkpoint holds the budgets 0.8, 0.6, 0.4 and no others. Choose one of them"
    new = ["--output", tmp_path / "new"]
    commands = {
        "segment": ["segment", elastic, images / "0.png", "--labels", "cat", *new],
        "export": ["export", elastic, "--format", "torch-export", *new],
    }
    for name, arguments in commands.items():
        code, _, error = run(*arguments, "--budget", 0.5)
        assert (code, message in error) == (1, True), (name, error)
        code, _, error = run(*arguments, "--budget", 7)
        assert (code, "budget is 7.0. This checkpoint holds" in error) == (1, True), (name, error)
        code, _, error = run(*arguments, "--budget", "half")
        assert (code, "parse string as a number" in error) == (2, True), (name, error)
        arguments[1] = tiny_clip_folder
        code, _, error = run(*arguments, "--budget", 0.5)
        assert (code, "holds one model of type 'clip'. Only a checkpoint that `prune-elastic`" in error) == (1, True)
    assert not (tmp_path / "new").exists()
    for load in (load_segmenter, load_clip, load_exportable):
        with pytest.raises(ValueError, match=r"budget is 0\.5\. This checkpoint holds the budgets 0\.8, 0\.6, 0\.4"):
            load(elastic, budget=0.5)


@pytest.mark.parametrize("budget", [[], ["--budget", 0.4]])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("config", "keeps 'much'. It must lie in (0, 1]"),
        ("none", "elastic_budgets"),
        ("weights", "values that cannot be used"),
        ("shape", "do not have the shapes that its config.json states"),
        ("cut", "damaged or cut short"),
    ],
)
def test_damaged_folders_end_in_one_sentence(elastic, tmp_path, images, damage, message, budget):
    config, weights = elastic / "config.json", elastic / "model.safetensors"
    values, tensors = json.loads(config.read_text()), load_file(weights)
    if damage == "config":
        values["elastic_budgets"][2]["budget"] = "much"
    elif damage == "none":
        values["elastic_budgets"] = None
    elif damage == "weights":
        tensors["elastic.2.vision_model.encoder.layers.0.mlp.fc2.weight.scale"].fill_(torch.nan)
    else:
        name = "vision_model.encoder.layers.0.mlp.fc2.weight"
        tensors[name] = tensors[name][:, :-1].contiguous()
    config.write_text(json.dumps(values))
    save_file(tensors, weights, metadata={"format": "pt"})
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    arguments = ["--labels", "cat", "--output", tmp_path / "new", *budget]
    code, _, error = run("segment", elastic, images / "0.png", *arguments)
    assert (code, message in error) == (1, True), error
    assert "Traceback" not in error
    assert not (tmp_path / "new").exists()


def test_folders_of_several_budgets_are_clips_for_every_command(elastic):
    """Pruning, transfer, spectra and latency tables take what `load_clip` and `load_any` return."""
    assert load_any(elastic).budgets == load_clip(elastic).model.budgets == (0.8, 0.6, 0.4)
    assert load_clip(elastic).disk_dtype == torch.float16
    code, out, error = run("analyze", elastic, "--select", "depth", "--fraction", 0.5)
    assert code == 0, error
    assert "vision_model" in out
