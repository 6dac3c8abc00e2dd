"""The command `export`: what it writes and says, and how mistakes end."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_opentrans import Vocabulary
from hf_opentrans.cli import app
from hf_opentrans.cli import export as command
from hf_opentrans.deploy import ExportRecord, load_exported

USAGE, FAILURE = 2, 1


def run(*arguments: Any) -> tuple[int, str, str]:
    """Return exit code, standard output and the error on one line."""
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())


def test_files_comparison_and_folded_parts_are_shown(tmp_path, tiny_clip_folder, tiny_images):
    target = tmp_path / "figures.json"
    options = ["--format", "torch-export", "--resolution", "24x40", "--mode", "sclip", "--json", target]
    code, out, error = run(tiny_clip_folder, *options, "--output", tmp_path / "out")
    assert (code, error) == (0, "")
    record = ExportRecord.load(tmp_path / "out")
    assert (record.image_size, record.mode, record.source) == ((24, 40), "sclip", "tiny-clip")
    assert str(tmp_path) not in (tmp_path / "out" / "export.json").read_text()
    for shown in ("model.pt2", "text.pt2", "noise", "pictures", "positions interpolated from 4x4 to 3x5", "100.0%"):
        assert shown in out
    assert json.loads(target.read_text())["export"]["fingerprint"] == record.fingerprint
    assert load_exported(tmp_path / "out").segment(tiny_images[0], ["cat", "dog"])[0].labels == ("cat", "dog")


def test_a_built_in_vocabulary(tmp_path, tiny_clip_folder):
    base = [tiny_clip_folder, "--format", "torch-export", "--output"]
    (tmp_path / "names.json").write_text('["cat", "sofa; couch"]')
    options = ["--vocabulary", tmp_path / "names.json", "--templates", "plain"]
    code, out, error = run(*base, tmp_path / "out", *options)
    assert code == 0, error
    assert "vocabulary of 3 names; text tower left out" in out
    stored = ExportRecord.load(tmp_path / "out").vocabulary
    assert stored == {"classes": [["cat"], ["sofa", "couch"]], "templates": ["{}"], "is_merged": False}


def test_an_encoded_vocabulary_must_be_of_this_model(tmp_path, tiny_clip_folder, parts):
    model, processor = parts
    encoded = model.encode_vocabulary(Vocabulary(["cat", "dog"]), processor.tokenizer)
    path = encoded.save_pretrained(tmp_path / "names").parent
    found = command._vocabulary(str(path), None, model)
    assert found is not None
    assert found == encoded
    assert found.text_embeddings is not None
    options = ["--format", "torch-export", "--vocabulary", path, "--output", tmp_path / "out"]
    code, _, error = run(tiny_clip_folder, *options)  # a model with another text tower
    assert (code, "was made with another model" in error) == (USAGE, True), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "coreml"], "format is 'coreml'. It must be one of onnx, openvino, torch-export"),
        (["--precision", "fp8"], "--precision is 'fp8'"),
        (["--precision", "bf16"], "onnx has fp32, int8-dynamic, int8-static"),
        (["--int8", "--precision", "bf16"], "Only openvino has both, not onnx"),
        (["--int8", "--format", "torch-export"], "torch-export has fp32"),
        (["--calibration", "x"], "Ranges are measured for --int8 --format onnx alone"),
        (["--resolution", "0"], "--resolution is '0'. It must be a side or HEIGHTxWIDTH"),
        (["--resolution", "2x3x4"], "--resolution is '2x3x4'"),
        (["--vocabulary", "cat;;dog"], "has an empty name"),
        (["--vocabulary", "none.json"], "There is no vocabulary file 'none.json'"),
        (["--templates", "plain"], "without --vocabulary"),
        (["--mode", "magic"], "mode is 'magic'"),
    ],
)
def test_bad_options_end_before_a_model_is_loaded(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(command, "load_exportable", None)
    code, _, error = run("none", "--output", tmp_path / "out", *options)
    assert (code, message in error) == (USAGE, True), error
    assert list(tmp_path.iterdir()) == []


def test_the_names_of_precisions():
    made = [
        command._precision(kind, computes_in, int8=int8, is_static=is_static)
        for kind, computes_in, int8, is_static in (
            ("onnx", "fp32", False, False),
            ("onnx", "fp32", True, False),
            ("onnx", "fp32", True, True),
            ("openvino", "bf16", False, False),
            ("openvino", "fp32", True, False),
            ("openvino", "bf16", True, False),
        )
    ]
    assert made == ["fp32", "int8-dynamic", "int8-static", "bf16", "int8-weights", "int8-weights-bf16"]


def test_mistakes_end_in_one_sentence(tmp_path, tiny_clip_folder):
    base = ["--format", "torch-export", "--output", tmp_path / "out"]
    code, _, error = run(tmp_path / "none", *base)
    assert (code, "There is no model folder" in error) == (USAGE, True), error
    code, _, error = run(tiny_clip_folder, *base, "--resolution", 30)
    assert (code, "Use 32x32" in error) == (USAGE, True), error
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("precious")
    code, _, error = run(tiny_clip_folder, "--format", "torch-export", "--output", tmp_path / "foreign")
    assert (code, "already holds thesis.txt" in error) == (USAGE, True), error
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be_used(tmp_path, tiny_clip_folder):
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "more"):
        code, _, error = run(tiny_clip_folder, "--format", "torch-export", "--output", output)
        assert (code, f"'{tmp_path / 'file'}' is a file" in error) == (USAGE, True), error
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.onnx
def test_calibration_images_that_cannot_be_used(tmp_path, tiny_clip_folder):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed; it comes with hf_opentrans[onnx]")
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"junk")
    cases = {"empty": "holds 0 images", "none": "There is no folder", "broken": "is not an image that Pillow can read"}
    for name, message in cases.items():
        options = ["--int8", "--calibration", tmp_path / name, "--output", tmp_path / "out"]
        code, _, error = run(tiny_clip_folder, *options)
        assert (code in (USAGE, FAILURE), message in error) == (True, True), error
        assert not (tmp_path / "out").exists()


def test_500_names_are_built_in(tmp_path, tiny_clip_folder, tiny_images):
    names = "; ".join(f"name {index}" for index in range(500))
    code, out, error = run(
        tiny_clip_folder, "--format", "torch-export", "--vocabulary", names, "--output", tmp_path / "out"
    )
    assert (code, "vocabulary of 500 names" in out) == (0, True), error
    (result,) = load_exported(tmp_path / "out").segment(tiny_images[0])
    assert len(result.labels) == 500
