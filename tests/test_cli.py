"""The command line: what it writes, what it says about bad input, and with which exit code it ends."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_opentrans import DenseCLIPForSegmentation, OpenVocabularyProcessor, SparseCLIPModel, Subnetwork
from hf_opentrans.cli import app
from hf_opentrans.cli._common import repeat_options
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.pruning.plan import METHODS

USAGE, FAILURE = 2, 1


def run(*arguments):
    """Return exit code, standard output and the error on one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def read(path):
    """Return the pixels of an image file."""
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def dataset(tmp_path, tiny_images):
    root = tmp_path / "dataset"
    (root / "images" / "val").mkdir(parents=True)
    (root / "masks" / "val").mkdir(parents=True)
    for index, image in enumerate(tiny_images[:3]):
        image.save(root / "images" / "val" / f"{index}.png")
        mask = np.full((image.height, image.width), index % 2, np.uint8)
        mask[0] = 255
        Image.fromarray(mask).save(root / "masks" / "val" / f"{index}.png")
    classes = {"id_to_name": {"0": "cat", "1": "dog"}, "ignore_id": 255}
    (root / "classes.json").write_text(json.dumps(classes))
    return root


@pytest.fixture
def pruned(tmp_path, tiny_clip_folder, images):
    folder = tmp_path / "pruned"
    code, _, error = run("prune", tiny_clip_folder, "--images", images, "--keep", 0.7, "--output", folder)
    assert (code, "Error" in error) == (0, False), error
    return folder


def test_prune_writes_a_folder_that_everything_reads(tmp_path, pruned, images, dataset):
    report = json.loads((pruned / "pruning_report.json").read_text())
    assert 0.68 <= report["realised_keep"] <= 0.7
    assert SparseCLIPModel.from_pretrained(pruned).config.vision_config.pruning_config["keep"] == 0.7
    assert len(Subnetwork.from_pretrained(pruned / "subnetwork").plan) == 3
    DenseCLIPForSegmentation.from_pretrained(pruned)
    OpenVocabularyProcessor.from_pretrained(pruned)
    again = tmp_path / "again"
    code, out, error = run("prune", pruned, "--images", images, "--keep", 0.8, "--method", "random", "--output", again)
    assert code == 0, error
    assert "80.0%" in out or "79." in out
    assert run("evaluate", pruned, "--dataset", dataset)[0] == 0
    assert run("segment", pruned, images / "0.png", "--labels", "cat; dog", "--output", tmp_path / "out")[0] == 0
    code, out, _ = run("info", pruned)
    assert code == 0
    assert f"{report['macs'] / 1e6:,.2f} M" in out


def test_prune_replaces_its_own_output_and_writes_json(tmp_path, pruned, tiny_clip_folder, images):
    target = tmp_path / "report.json"
    arguments = ["--images", images, "--keep", 0.9, "--output", pruned, "--json", target, "--seed", 3]
    code, _, error = run("prune", tiny_clip_folder, *arguments)
    assert code == 0, error
    values = json.loads(target.read_text())
    assert values["seed"] == 3
    assert values["report"]["config"]["keep"] == 0.9
    assert values["environment"]["versions"]["torch"]
    assert json.loads((pruned / "pruning_report.json").read_text())["config"]["keep"] == 0.9


def test_segment_writes_overlay_mask_and_list(tmp_path, tiny_clip_folder, images):
    output, target = tmp_path / "out", tmp_path / "out.json"
    labels = ["--labels", "cat; dog, puppy", "--output", output]
    code, out, error = run("segment", tiny_clip_folder, images / "0.png", *labels, "--json", target)
    assert code == 0, error
    mask = read(output / "0.mask.png")
    assert mask.shape == (40, 48)
    assert set(np.unique(mask)) <= {0, 1}
    assert read(output / "0.overlay.png").shape[1] > 48
    values = json.loads(target.read_text())
    assert values["labels"] == ["cat", "dog"]
    assert sum(values["images"][0]["area"].values()) == pytest.approx(1)
    assert "0.overlay.png" in out.replace("\n", "")
    # A second call adds to the folder and keeps what was there.
    assert run("segment", tiny_clip_folder, images / "1.png", *labels, "--threshold", 1)[0] == 0
    assert sorted(p.name for p in output.glob("*.mask.png")) == ["0.mask.png", "1.mask.png"]
    assert read(output / "1.mask.png").min() == 255
    assert list(json.loads((output / "segmentation.json").read_text())) == ["0", "1"]


def test_unusual_images_are_segmented(tmp_path, tiny_clip_folder, tiny_images):
    rgb = tiny_images[0]
    grey = np.asarray(rgb.convert("L"))
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 2000, 3), dtype=np.uint8))
    made = {
        "grey": rgb.convert("L"),
        "rgba": rgb.convert("RGBA"),
        "deep": Image.fromarray(grey.astype(np.uint16) * 257),
        "one": Image.new("RGB", (1, 1)),
        "wide": wide,
    }
    for name, image in made.items():
        image.save(tmp_path / f"{name}.png")
    paths = [tmp_path / f"{name}.png" for name in made]
    code, _, error = run("segment", tiny_clip_folder, *paths, "--labels", "cat; dog", "--output", tmp_path / "out")
    assert code == 0, error
    for name, image in made.items():
        assert read(tmp_path / "out" / f"{name}.mask.png").shape[::-1] == image.size
    many = ";".join(f"cat {i}" for i in range(2000))
    code, _, error = run("segment", tiny_clip_folder, paths[0], "--labels", many, "--output", tmp_path / "many")
    assert code == 0, error
    assert read(tmp_path / "many" / "grey.mask.png").dtype.itemsize >= 2


def test_evaluate_prints_and_writes_the_metrics(tmp_path, tiny_clip_folder, dataset):
    target = tmp_path / "evaluation.json"
    arguments = ["--dataset", dataset, "--split", "val", "--limit", 2, "--inference", "slide", "--json", target]
    code, out, error = run("evaluate", tiny_clip_folder, *arguments)
    assert code == 0, error
    values = json.loads(target.read_text())
    assert values["images"] == 2
    assert 0 <= values["mIoU"] <= 1
    assert f"{values['mIoU']:.2%}" in out
    assert set(values["per_class_iou"]) == {"cat", "dog"}


def bad_labels(folder, images, tmp_path):
    return ["segment", folder, images / "0.png", "--output", tmp_path / "out", "--labels"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [("cat;;dog", "Class 2 of the labels has an empty name"), ("cat; Cat", "occurs twice"), ("", "empty name")],
)
def test_bad_labels(tmp_path, tiny_clip_folder, images, labels, message):
    code, _, error = run(*bad_labels(tiny_clip_folder, images, tmp_path), labels)
    assert (code, message in error) == (USAGE, True), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", 0], "keep is 0.0. It must lie in (0, 1]"),
        (["--keep", 1.5], "keep is 1.5. It must lie in (0, 1]"),
        (["--keep", 0.05], "Raise keep to"),
        (["--method", "magic"], f"It must be one of {', '.join(METHODS)}"),
        (["--unit", "flops"], "It must be one of macs, params, latency"),
        (["--num-images", 0], "num_images is 0"),
    ],
)
def test_bad_pruning_options(tmp_path, tiny_clip_folder, images, options, message):
    base = ["--images", images, "--output", tmp_path / "out"]
    code, _, error = run("prune", tiny_clip_folder, *base, *options)
    assert (code, message in error) == (USAGE, True), error
    assert not (tmp_path / "out").exists()


def test_a_budget_below_the_floors_names_floor_and_lowest_value(tmp_path, tiny_clip_folder, images):
    base = ["--images", images, "--output", tmp_path / "out", "--keep"]
    _, _, error = run("prune", tiny_clip_folder, *base, 0.05)
    assert "min_heads=1 and min_neurons=0.1" in error
    lowest = error.split("Raise keep to ")[1].split()[0]
    code, _, error = run("prune", tiny_clip_folder, *base, lowest)
    assert code == 0, error


def test_bad_images(tmp_path, tiny_clip_folder, images):
    text, cut, empty = tmp_path / "text.jpg", tmp_path / "cut.png", tmp_path / "empty"
    text.write_text("no image")
    cut.write_bytes((images / "0.png").read_bytes()[:300])
    empty.mkdir()
    segmenting = ["--labels", "cat; dog", "--output", tmp_path / "out"]
    for path, message in ((text, "is not an image"), (cut, "is damaged or cut short")):
        code, _, error = run("segment", tiny_clip_folder, path, *segmenting)
        assert (code, message in error) == (FAILURE, True), error
        assert path.name in error
    code, _, error = run("segment", tiny_clip_folder, tmp_path / "none.png", *segmenting)
    assert (code, "There is no image" in error) == (USAGE, True), error
    pruning = ["--output", tmp_path / "out", "--images"]
    assert run("prune", tiny_clip_folder, *pruning, empty)[0] == FAILURE
    assert run("prune", tiny_clip_folder, *pruning, tmp_path / "none")[0] == USAGE
    (images / "bad.jpg").write_text("no image")
    code, _, error = run("prune", tiny_clip_folder, *pruning, images)
    assert (code, "bad.jpg" in error) == (FAILURE, True), error
    (empty / "one.png").write_bytes((images / "0.png").read_bytes())
    code, _, error = run("prune", tiny_clip_folder, *pruning, empty)
    assert (code, "1 calibration images give 17 tokens" in error) == (FAILURE, True), error
    assert not (tmp_path / "out").exists()


def test_foreign_output_folders_are_left_alone(tmp_path, tiny_clip_folder, images):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    pruning = ["prune", tiny_clip_folder, "--images", images]
    segmenting = ["segment", tiny_clip_folder, images / "0.png", "--labels", "cat; dog"]
    for command in (pruning, segmenting):
        code, _, error = run(*command, "--output", foreign)
        assert (code, "already holds thesis.txt" in error) == (USAGE, True), error
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"]


def test_bad_models(tmp_path, tiny_clip_folder, images):
    pruning = ["--images", images, "--output", tmp_path / "out"]
    code, _, error = run("prune", tmp_path / "none", *pruning)
    assert (code, "There is no model folder" in error) == (USAGE, True), error
    weights = tiny_clip_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, _, error = run("prune", tiny_clip_folder, *pruning)
    assert (code, "damaged or cut short" in error) == (FAILURE, True), error


def test_an_interrupt_leaves_nothing_behind(tmp_path, tiny_clip_folder, images, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_opentrans.pruning.prune.rebuild", interrupt)
    pruning = ["--images", images, "--keep", 0.6, "--output", tmp_path / "out"]
    code, _, error = run("prune", tiny_clip_folder, *pruning)
    assert (code, "Interrupted" in error) == (130, True), error
    assert not (tmp_path / "out").exists()


def test_options_with_several_values():
    given = ["benchmark", "latency", "--keep", "0.7", "0.5", "--batch", "1", "8", "--rounds", "3"]
    expected = ["--keep", "0.7", "--keep", "0.5", "--batch", "1", "--batch", "8", "--rounds", "3"]
    assert repeat_options(given) == ["benchmark", "latency", *expected]
    assert repeat_options(["prune", "m", "--keep", "0.7", "x"]) == ["prune", "m", "--keep", "0.7", "x"]


def test_benchmark_latency_runs(tmp_path, tiny_clip_folder):
    target = tmp_path / "latency.json"
    options = ["--models", tiny_clip_folder, "--batch", 1, "--rounds", 3, "--json", target]
    code, _, error = run("benchmark", "latency", *options)
    assert code == 0, error
    rows = json.loads(target.read_text())["rows"]
    assert [row["speed_up"] for row in rows] == [1.0]


def test_scenes_of_two_splits_share_their_classes(tmp_path):
    pytest.importorskip("resvg_py")
    folder = tmp_path / "scenes"
    code, _, error = run("scenes", "--output", folder, "--count", 3, "--val", 2, "--names", 8, "--seed", 4)
    assert code == 0, error
    train, val = (SegmentationFolder(folder, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 2)
    assert train.class_names == val.class_names
    assert len(train.class_names) == 8
    pixels = {path.read_bytes() for path in folder.glob("images/*/*.png")}
    assert len(pixels) == 5  # no scene is in both
    code, _, error = run("scenes", "--output", tmp_path / "other", "--single", "--val", 2)
    assert (code, "--val is given with --single" in error) == (2, True), error


@pytest.mark.parametrize("command", ["demo", "prune", "segment", "evaluate", "info", "scenes", "benchmark"])
def test_help_is_there(command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Usage:" in out
