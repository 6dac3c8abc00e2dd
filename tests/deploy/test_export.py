"""Export as a whole, in the format that needs no other package: what is written, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_opentrans import (
    DeepLabV3PlusForSegmentation,
    Vocabulary,
)
from hf_opentrans.deploy import (
    EXPORT_FILE,
    ExportConfig,
    ExportRecord,
    OnnxSegmenter,
    TorchExportSegmenter,
    export_model,
    load_exportable,
    load_exported,
)
from hf_opentrans.deploy import export as export_module
from hf_opentrans.evaluation_runs import model_fingerprint

HERE = ExportConfig(format="torch-export")
NAMES = ["cat", "sofa; couch", "wall"]


def exported(parts, folder, config=HERE, **options):
    export_model(parts[0], parts[1], folder, config, **options)
    return load_exported(folder)


def test_a_segmenter_gives_what_the_model_gives(parts, tmp_path):
    model, processor = parts
    config = ExportConfig(format="torch-export", resolution=(40, 24), mode="sclip")
    stages: list[str] = []
    again = exported(parts, tmp_path / "out", config, source="me/my-model", on_stage=stages.append)
    assert type(again) is TorchExportSegmenter
    pixels = torch.randn(5, 3, 40, 24)
    vocabulary = again.encode_vocabulary(Vocabulary(NAMES))
    expected = model.encode_vocabulary(Vocabulary(NAMES), processor.tokenizer)
    torch.testing.assert_close(vocabulary.text_embeddings, expected.text_embeddings)
    found = again(pixels, vocabulary=vocabulary)
    with torch.no_grad():
        outputs = model(pixels, vocabulary=expected, mode="sclip")
    torch.testing.assert_close(found.logits, outputs.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.dense_embeds, outputs.dense_embeds, atol=1e-5, rtol=1e-5)
    assert found.vocabulary is vocabulary
    assert stages == ["tracing", "writing torch-export", "comparing with the model"]
    record = again.record
    assert (record.source, record.image_size, record.patch_size, record.mode) == ("me/my-model", (40, 24), 8, "sclip")
    assert record.folded[0] == "positions interpolated from 4x4 to 5x3 patches"


def test_the_record_says_what_was_done(parts, free_folder):
    record = ExportRecord.load(free_folder)
    assert record.fingerprint == model_fingerprint(parts[0])
    assert set(record.parity) == {"limits", "noise", "pictures", "text"}
    assert record.parity["pictures"]["max_relative"] < 1e-5
    assert record.parity["noise"]["vectors"] == 4 * 16
    assert (record.computed_in, record.versions["torch"]) == ("f32", torch.__version__)
    assert record.folded[0] == "neighbour bias of 17 tokens"
    listed = {path.name for path in free_folder.iterdir()}
    assert listed == {*record.files, EXPORT_FILE}
    assert {"model.pt2", "text.pt2", "tokenizer.json", "preprocessor_config.json"} <= listed


def test_a_fixed_vocabulary_needs_no_text_tower(parts, fixed_folder, tiny_images):
    model, processor = parts
    listed = {path.name for path in fixed_folder.iterdir()}
    assert listed == {"model.pt2", "preprocessor_config.json", EXPORT_FILE}
    again = load_exported(fixed_folder)
    assert again.record.inputs == ("pixel_values",)
    assert "vocabulary of 20 names; text tower left out" in again.record.folded
    expected = model.encode_vocabulary(Vocabulary(["cat", "sofa; couch"], "plain", "words17"), processor.tokenizer)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        outputs = model(pixels, vocabulary=expected)
    torch.testing.assert_close(again(pixels).logits, outputs.logits, atol=1e-4, rtol=1e-4)
    assert again.segment(tiny_images[0])[0].labels == ("cat", "sofa", "background")
    assert again.segment(tiny_images[0], again.vocabulary)[0].labels[0] == "cat"
    for labels, message in (
        (["cat", "dog"], "Asked for cat, dog, and the vocabulary of this export is fixed: cat, sofa, background"),
        (Vocabulary(["dog"]), "Asked for dog"),
    ):
        with pytest.raises(ValueError, match=message):
            again.segment(tiny_images[0], labels)
    with pytest.raises(ValueError, match="has a fixed vocabulary and no text tower"):
        again.encode_vocabulary(Vocabulary(["dog"]))


def test_what_can_be_exported_is_loaded(tmp_path, parts, tiny_clip_folder):
    model, processor = load_exportable(tiny_clip_folder)
    assert type(model) is type(parts[0])
    assert processor.resolution == 32
    parts[0].vision_model.save_pretrained(tmp_path / "tower")
    parts[1].image_processor.save_pretrained(tmp_path / "tower")
    model, _ = load_exportable(tmp_path / "tower")
    assert type(model).__name__ == "SparseCLIPVisionModel"
    with pytest.raises(FileNotFoundError, match="There is no model folder"):
        load_exportable(tmp_path / "none")


def test_a_failing_comparison_leaves_nothing(parts, fixed_folder, tmp_path, monkeypatch):
    tower = parts[0].vision_model, parts[1].image_processor
    real = export_module.measure_parity

    def shifted(reference, run, images, text):
        return real(lambda inputs: {n: -v for n, v in reference(inputs).items()}, run, images, text)

    monkeypatch.setattr(export_module, "measure_parity", shifted)
    before = (fixed_folder / EXPORT_FILE).read_text()
    with pytest.raises(RuntimeError, match="in fp32 is not the model: on noise values differ by"):
        export_model(*tower, tmp_path / "out", HERE)
    with pytest.raises(RuntimeError, match="is not the model"):
        export_model(*tower, fixed_folder, HERE)  # an earlier export stays
    assert [path.name for path in tmp_path.iterdir()] == [fixed_folder.name]
    assert (fixed_folder / EXPORT_FILE).read_text() == before
    load_exported(fixed_folder)


def test_bad_choices(parts, tmp_path):
    model, processor = parts
    choices: list[tuple[dict[str, Any], str]] = [
        ({"format": "tensorrt"}, "format is 'tensorrt'. It must be one of onnx, openvino, torch-export"),
        ({"format": "torch-export", "precision": "bf16"}, "torch-export has fp32"),
        ({"precision": "int8-weights"}, "onnx has fp32, int8-dynamic, int8-static"),
        ({"mode": "magic"}, "mode is 'magic'"),
    ]
    for options, message in choices:
        with pytest.raises(ValueError, match=message):
            ExportConfig(**options)
    for resolution, near in ((30, "32x32"), ((32, 45), "32x48"), (3, "8x8")):
        config = ExportConfig(format="torch-export", resolution=resolution)
        with pytest.raises(ValueError, match=f"multiples of the patch size 8. Use {near}"):
            export_model(model, processor, tmp_path / "out", config)
    with pytest.raises(ValueError, match="calibration images and the precision is fp32"):
        export_model(model, processor, tmp_path / "out", HERE, calibration=tmp_path)
    with pytest.raises(ValueError, match="reads no text"):
        export_model(model.vision_model, processor, tmp_path / "out", HERE, vocabulary=Vocabulary(["cat"]))
    with pytest.raises(TypeError, match="Got a CLIPTextModel"):
        export_model(model.text_model, processor, tmp_path / "out", HERE)
    tower = type(model.vision_model)(model.vision_model.config)
    with pytest.raises(ValueError, match=r"training mode, torch.float32, on cpu"):
        export_model(tower.train(), processor, tmp_path / "out", HERE)
    trained = DeepLabV3PlusForSegmentation.from_clip(
        model, decoder_channels=24, skip_channels=8, atrous_rates=[1, 2]
    ).eval()
    with pytest.raises(ValueError, match="Only a training-free segmenter has a choice"):
        export_model(trained, processor, tmp_path / "out", ExportConfig(format="torch-export", mode="sclip"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="already holds thesis"):
        export_model(model, processor, tmp_path / "foreign", HERE)
    assert not (tmp_path / "out").exists()


def truncate(folder: Path) -> None:
    path = folder / "model.pt2"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.pt2"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def rewrite(folder: Path, **values: object) -> None:
    path = folder / EXPORT_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_damaged_folders(fixed_folder, tmp_path):
    whole = fixed_folder
    cases = [
        (lambda folder: (folder / "model.pt2").unlink(), FileNotFoundError, "model.pt2 is missing"),
        (truncate, ValueError, "cut short: it has"),
        (flip_a_bit, ValueError, "was changed or is damaged"),
        (lambda folder: (folder / EXPORT_FILE).write_text("{"), ValueError, "is not valid JSON"),
        (lambda folder: rewrite(folder, schema=99), ValueError, "has the layout 99"),
        (lambda folder: rewrite(folder, format="coreml"), ValueError, "names the format 'coreml'"),
        (lambda folder: rewrite(folder, outputs=None), ValueError, "is damaged: outputs cannot be read"),
        (lambda folder: rewrite(folder, files=3), ValueError, "is damaged: files cannot be read"),
        (lambda folder: rewrite(folder, image_size=[32]), ValueError, "is damaged: image_size cannot"),
        (lambda folder: rewrite(folder, image_size=[32, "wide"]), ValueError, "is damaged: image_size cannot"),
        (lambda folder: rewrite(folder, patch_size=0), ValueError, "is damaged: patch_size cannot"),
        (lambda folder: rewrite(folder, vocabulary={"classes": 3}), ValueError, "is damaged: vocabulary cannot"),
        (lambda folder: rewrite(folder, files={"model.pt2": 1}), ValueError, "is damaged: files cannot"),
        (lambda folder: (folder / EXPORT_FILE).unlink(), FileNotFoundError, "There is no export.json"),
    ]
    for number, (damage, error, message) in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        damage(folder)
        with pytest.raises(error, match=message):
            load_exported(folder)
    for content in (b"", b"no zip", (whole / "model.pt2").read_bytes()[:-1000]):
        (whole / "model.pt2").write_bytes(content)
        with pytest.raises(ValueError, match="is no graph that torch"):
            load_exported(whole, check=False)


def test_another_class_or_precision(fixed_folder):
    with pytest.raises(ValueError, match=r"holds the format 'torch-export'\. OnnxSegmenter reads 'onnx'"):
        OnnxSegmenter.from_pretrained(fixed_folder)
    with pytest.raises(ValueError, match="Only OpenVINO files can compute in another one"):
        load_exported(fixed_folder, precision="bf16")
