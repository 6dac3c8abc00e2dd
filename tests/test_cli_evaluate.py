"""The command `evaluate`: all pairs of model and benchmark, files that it goes on from, and what it writes."""

import json

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import parse_eval_result_entries
from PIL import Image
from transformers import CLIPModel
from typer.testing import CliRunner

from hf_opentrans import DeepLabV3PlusForSegmentation, DenseCLIPForSegmentation, OpenVocabularyProcessor
from hf_opentrans.cli import app
from hf_opentrans.cli import evaluate as command
from hf_opentrans.cli._common import repeat_options
from hf_opentrans.evaluation_runs import ProtocolSegmenter

USAGE, FAILURE, INTERRUPTED = 2, 1, 130


def run(*arguments):
    """Return exit code, standard output and the error on one line."""
    typed = repeat_options(["evaluate", *(str(argument) for argument in arguments)])
    result = CliRunner().invoke(app, typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def write_folder(root, images, names, split="val"):
    for part in ("images", "masks"):
        (root / part / split).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index, image in enumerate(images):
        image.save(root / "images" / split / f"{index}.png")
        mask = rng.integers(0, len(names), (image.height, image.width), dtype=np.uint8)
        Image.fromarray(mask).save(root / "masks" / split / f"{index}.png")
    content = {"id_to_name": {str(i): name for i, name in enumerate(names)}, "ignore_id": 255}
    (root / "classes.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def root(tmp_path, tiny_images):
    """Return a folder of two benchmarks in our own layout: scenes, and VOC with 21 classes."""
    voc = ["background; sky", *(f"thing {i}" for i in range(20))]
    write_folder(tmp_path / "root" / "scenes", tiny_images[:3], ["cat", "dog"])
    write_folder(tmp_path / "root" / "pascal-voc-21", tiny_images[3:5], voc)
    return tmp_path / "root"


@pytest.fixture
def other(tmp_path, tiny_clip_folder, make_tiny_clip):
    """Return a second model, with other weights."""
    folder = tmp_path / "other-clip"
    make_tiny_clip(seed=1).save_pretrained(folder)
    OpenVocabularyProcessor.from_pretrained(tiny_clip_folder).save_pretrained(folder)
    return folder


def test_a_missing_benchmark_lists_its_layouts_line_by_line(tmp_path):
    result = CliRunner().invoke(
        app, ["evaluate", "clip-scenes", "--benchmark", "cityscapes", "--data-root", str(tmp_path)]
    )
    assert result.exit_code == USAGE
    items = [line for line in result.stderr.splitlines() if line.startswith("  - cityscapes: ")]
    assert len(items) == 3
    assert result.stderr.splitlines()[-1].startswith("Nothing is downloaded. Get the data from https://")


def forbid_scoring(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(command, "evaluate_data", refuse)


def test_all_pairs_are_measured_and_kept(tmp_path, root, tiny_clip_folder, other, monkeypatch):
    target, markdown = tmp_path / "out.json", tmp_path / "out.md"
    names = ["--benchmark", "scenes", "pascal-voc-21", "--data-root", root]
    arguments = [tiny_clip_folder, other, *names, "--json", target, "--markdown", markdown]
    code, out, error = run(*arguments)
    assert code == 0, error
    values = json.loads(target.read_text())
    pairs = [(model, name) for model in (tiny_clip_folder, other) for name in ("scenes", "pascal-voc-21")]
    assert [(row["model"], row["benchmark"]) for row in values["rows"]] == [(str(m), n) for m, n in pairs]
    assert [row["result"]["images"] for row in values["rows"]] == [3, 2, 3, 2]
    assert values["settings"]["protocol"]["name"] == "native"
    assert values["rows"][0]["split"] == "val"
    assert "mIoU" not in values  # there are several
    written = markdown.read_text()
    for row in values["rows"]:
        assert f"{row['result']['scores']['mean_iou']:.2%}" in out
        assert f"| {row['benchmark']} | {row['result']['images']} |" in written
    assert written.count("| tiny-clip |") == written.count("| other-clip |") == 2
    assert out.count("Protocol native:") == written.count("Protocol native:") == 1
    assert "resolution 32" in out
    assert not list(tmp_path.glob(".out.json*"))
    # The second time nothing is measured; a third model would only add its rows.
    with monkeypatch.context() as patch:
        forbid_scoring(patch)
        code, again, error = run(*arguments)
        assert (code, again) == (0, out), error
    code, _, error = run(other, *names, "--json", target, "--resolution", 64)
    assert (code, "measured with other settings" in error) == (USAGE, True), error


def test_a_row_of_other_weights_is_measured_anew(tmp_path, root, tiny_clip_folder):
    target = tmp_path / "out.json"
    arguments = [tiny_clip_folder, "--benchmark", "scenes", "--data-root", root, "--json", target]
    assert run(*arguments)[0] == 0
    before = json.loads(target.read_text())["rows"]
    model = CLIPModel.from_pretrained(tiny_clip_folder)
    with torch.no_grad():
        model.visual_projection.weight.neg_()
    model.save_pretrained(tiny_clip_folder)
    code, _, error = run(*arguments)
    after = json.loads(target.read_text())["rows"]
    assert (code, "measured anew" in error) == (0, True), error
    assert (len(before), len(after)) == (1, 1)
    assert after[0]["result"]["model_fingerprint"] != before[0]["result"]["model_fingerprint"]
    assert after[0]["result"]["scores"] != before[0]["result"]["scores"]


def test_precision(tmp_path, root, tiny_clip_folder, monkeypatch):
    target, seen = tmp_path / "out.json", []
    original = ProtocolSegmenter.classes

    def classes(self, *args):
        seen.append(self.model.dtype)
        return original(self, *args)

    monkeypatch.setattr(ProtocolSegmenter, "classes", classes)
    arguments = [tiny_clip_folder, "--benchmark", "scenes", "--data-root", root, "--json", target]
    for precision in ("fp32", "bf16"):
        code, _, error = run(*arguments, "--precision", precision)
        assert code == 0, error
    rows = json.loads(target.read_text())["rows"]
    assert [row["model"] for row in rows] == [str(tiny_clip_folder), f"{tiny_clip_folder} in bf16"]
    assert seen == [torch.float32] * 3 + [torch.bfloat16] * 3
    assert rows[0]["result"]["model_fingerprint"] != rows[1]["result"]["model_fingerprint"]
    code, _, error = run(*arguments, "--precision", "int4")
    assert (code, "--precision is 'int4'. It must be one of fp32, bf16, fp16." in error) == (USAGE, True), error


def test_an_interrupted_command_goes_on(tmp_path, root, tiny_clip_folder, monkeypatch):
    target, whole = tmp_path / "out.json", tmp_path / "whole.json"
    arguments = [tiny_clip_folder, "--benchmark", "scenes", "--data-root", root, "--json"]
    assert run(*arguments, whole)[0] == 0
    original, calls = ProtocolSegmenter.classes, []

    def classes(self, *args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ProtocolSegmenter, "classes", classes)
        assert run(*arguments, target)[0] == INTERRUPTED
    assert not target.exists()
    assert len(list(tmp_path.glob(".out.json.*.0-of-1"))) == 1
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(ProtocolSegmenter, "classes", lambda *args: calls.append(1) or original(*args))
        assert run(*arguments, target)[0] == 0
    assert len(calls) == 1
    ours, expected = (json.loads(path.read_text())["rows"][0]["result"]["scores"] for path in (target, whole))
    assert ours == expected
    assert not list(tmp_path.glob(".out.json.*"))


def test_results_for_the_hub(tmp_path, root, tiny_clip_folder, other, monkeypatch):
    names = ["--benchmark", "scenes", "--data-root", root, "--limit", 1]
    code, out, error = run(tiny_clip_folder, *names, "--eval-results", tmp_path / "card", "--resolution", 48)
    assert (code, "No data set on the Hub is known for scenes" in error) == (0, True), error
    path = tmp_path / "card" / ".eval_results" / "scenes_native-changed.yaml"
    assert str(path) in out.replace("\n", "")
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id) == ("scenes", "mean_iou")
    assert 0 <= entry.value <= 100
    assert f"{entry.value:.2f}%" in out
    assert entry.date is not None
    assert entry.date.endswith("Z")
    assert "1 images of scenes, split val" in str(entry.notes)
    assert "resolution 48, " in str(entry.notes)
    assert "absent zero" in str(entry.notes)
    # A data set that is on the Hub is named by its id; several models get a folder each.
    monkeypatch.setattr(command, "_hub_id", lambda _: "someone/scenes")
    code, _, error = run(tiny_clip_folder, other, *names, "--eval-results", tmp_path / "cards")
    assert (code, error) == (0, "")
    for model in ("tiny-clip", "other-clip"):
        text = (tmp_path / "cards" / model / ".eval_results" / "scenes_native.yaml").read_text()
        assert yaml.safe_load(text)[0]["dataset"] == {"id": "someone/scenes", "task_id": "mean_iou"}


def test_protocols_reach_the_measurement(tmp_path, root, tiny_clip_folder):
    target = tmp_path / "out.json"
    names = ["--benchmark", "pascal-voc-21", "--data-root", root, "--limit", 1, "--json", target]
    options = ["--protocol", "dense336", "--resolution", 48, "--mode", "sclip", "--set", "stride=112", "threshold=0.3"]
    code, out, error = run(tiny_clip_folder, *names, *options)
    assert code == 0, error
    knobs = json.loads(target.read_text())["rows"][0]["result"]["protocol"]
    assert (knobs["name"], knobs["resolution"], knobs["mode"]) == ("dense336+", 48, "sclip")
    assert (knobs["inference"], knobs["window"], knobs["templates"]) == ("slide", 224, "imagenet80")
    assert (knobs["stride"], knobs["threshold"]) == (112, 0.3)
    assert "Protocol dense336+: resolution 48" in out


def test_missing_data_are_told_before_a_model_is_loaded(tmp_path, root, tiny_clip_folder, monkeypatch):
    monkeypatch.setattr(command, "load_segmenter", lambda _: pytest.fail("a model was loaded"))
    cases = [
        (["--benchmark", "ade20k-150", "--data-root", root], "was not found in"),
        (["--benchmark", "scenes", "ade20k", "--data-root", root], "There is no benchmark 'ade20k'"),
        (["--dataset", tmp_path / "none"], "There is no folder"),
        ([], "Exactly one of them says what is scored"),
        (["--dataset", root / "scenes", "--benchmark", "scenes"], "Exactly one of them says what is scored"),
        (["--dataset", root / "scenes", "--protocol", "dense"], "There is no protocol 'dense'"),
        (["--dataset", root / "scenes", "--mode", "magic"], "mode is 'magic'. It must be one of"),
        (["--dataset", root / "scenes", "--inference", "tiles"], "inference is 'tiles'. It must be one of"),
        (["--dataset", root / "scenes", "--set", "stride"], "A knob is set as KNOB=VALUE"),
        (["--dataset", root / "scenes", "--mode", "sclip", "--set", "mode=naclip"], "One of them decides"),
    ]
    for arguments, message in cases:
        code, _, error = run(tiny_clip_folder, *arguments)
        assert (code, message in error) == (USAGE, True), error


def test_a_trained_segmenter_refuses_windows(tmp_path, root, tiny_clip_folder):
    dense = DenseCLIPForSegmentation.from_pretrained(tiny_clip_folder)
    trained = DeepLabV3PlusForSegmentation.from_clip(dense, decoder_channels=8)
    for part in (trained, OpenVocabularyProcessor.from_pretrained(tiny_clip_folder)):
        part.save_pretrained(tmp_path / "trained")
    code, _, error = run(tmp_path / "trained", "--dataset", root / "scenes", "--protocol", "dense336")
    assert (code, "A trained segmenter reads whole images" in error) == (USAGE, True), error
    code, out, error = run(tmp_path / "trained", tiny_clip_folder, "--dataset", root / "scenes", "--limit", 1)
    assert code == 0, error
    assert out.count("Protocol native:") == 2  # what is left to the models differs


def test_several_benchmarks_follow_one_option():
    typed = ["evaluate", "a", "b", "--benchmark", "x", "y", "--limit", "3"]
    assert repeat_options(typed) == ["evaluate", "a", "b", "--benchmark", "x", "--benchmark", "y", "--limit", "3"]
    assert repeat_options(["evaluate", "--dataset", "d", "m"]) == ["evaluate", "--dataset", "d", "m"]
