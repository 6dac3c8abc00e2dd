"""The transfer study: what is planned, what is compared, what is counted, how it goes on, what is published."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_opentrans.benchmark_layer_selection import Study
from hf_opentrans.benchmark_tables import result_table
from hf_opentrans.benchmark_transfer import (
    STUDIED,
    RememberedRegions,
    Run,
    TransferStudy,
    plan_transfer,
)
from hf_opentrans.benchmark_transfer_tables import (
    COST,
    QUALITY,
    TransferRow,
    TransferTiming,
    claims,
    transfer_notes,
    transfer_table,
)
from hf_opentrans.cli import app
from hf_opentrans.cli._common import repeat_options
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.loading import load_dense_clip
from hf_opentrans.training.finetune import FinetuneConfig

USAGE = 2
NAMES = ("sky", "cat", "dog", "wall")
T_OF_TWO = 4.302653  # Student's t, 2 degrees of freedom, 97.5 %, from printed tables


def run(*arguments):
    """Return exit code, standard output and the error on one line."""
    result = CliRunner().invoke(app, repeat_options(["benchmark", "transfer", *map(str, arguments)]))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture
def dataset(write_segmentation_folder, tiny_images):
    """Return a folder with the splits train and val and four classes in stripes; the first is twice as wide."""

    def mask_of(image, _):
        stripes = np.minimum(np.arange(image.width) * 5 // image.width, 4)
        return np.array([0, 0, 1, 2, 3], dtype=np.uint8)[stripes][None].repeat(image.height, 0)

    classes = {"id_to_name": dict(enumerate(NAMES))}
    return write_segmentation_folder({"train": tiny_images[:4], "val": tiny_images[:2]}, mask_of, classes)


@pytest.fixture
def images(tmp_path, tiny_images):
    folder = tmp_path / "unlabelled"
    folder.mkdir()
    for index in range(40):
        tiny_images[index % 8].rotate(9 * index).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def study(tiny_clip_folder, dataset, tiny_images):
    model, processor = load_dense_clip(str(tiny_clip_folder))
    config = FinetuneConfig(steps=2, batch_size=2, decoder_channels=8, save_every=3)
    train, val = (SegmentationFolder(dataset, split) for split in ("train", "val"))
    calibration = [tiny_images[index % 8].rotate(9 * index) for index in range(40)]
    return TransferStudy(Study(model, processor, train, val, config), calibration)


def row(framework, method, keep, seed, seen, unseen=0.5, trained="head", **values):
    return TransferRow(framework, method, keep, seed, trained, seen, unseen, 0.9, **values)


# The plan


def test_every_tower_meets_every_framework():
    runs = plan_transfer(STUDIED, range(3))
    assert len(runs) == len({run.key for run in runs})
    for framework in STUDIED:
        own = {(run.method, run.keep) for run in runs if run.framework == framework and run.trained in ("", "head")}
        at_half = {("dense", 1.0), ("obs", 0.5), ("magnitude", 0.5), ("random", 0.5)}
        more = {("obs", 0.65), ("magnitude", 0.65), ("random", 0.65)}
        assert own == (at_half | more if framework in ("dense-clip", "deeplabv3plus") else at_half)
    joined = {(run.framework, run.method, run.keep, run.trained) for run in runs if run.trained not in ("", "head")}
    assert joined == {("deeplabv3plus", "dense", 1.0, "full"), ("deeplabv3plus", "obs", 0.65, "alpha")}
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def test_unknown_frameworks_are_refused():
    with pytest.raises(ValueError, match=r"framework is 'sam'. It must be one of dense-clip, "):
        plan_transfer(["sam"], [0])


# The runs


@pytest.mark.filterwarnings("ignore:.*calibration images")
@pytest.mark.parametrize("framework", STUDIED)
def test_a_run_scores_and_counts(study, framework):
    trained = "" if framework == "dense-clip" else "head"
    dense, ours = (study.measure(Run(0, framework, *tower, trained)) for tower in (("dense", 1.0), ("obs", 0.5)))
    for found in (dense, ours):
        assert len(found.seen_classes) == 2
        assert 0 <= min(found.seen, found.unseen, found.pixel_accuracy) <= 1
        assert (found.first_loss is None) == (framework == "dense-clip")
    assert ours.tower_macs <= 0.5 * dense.tower_macs
    # What the tower saves, the whole saves, but for what a mode does not read of the last block: the head is the same.
    saved = (dense.macs - ours.macs) / (dense.tower_macs - ours.tower_macs)
    assert 0.7 < saved < 1.05
    assert ours.params < dense.params


@pytest.mark.filterwarnings("ignore:.*calibration images")
def test_the_tower_is_left_as_it_was(study):
    tower = study.tower("obs", 0.5, 0)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    model, losses, _ = study._train_head(Run(0, "deeplabv3plus", "obs", 0.5, "head"), tower)
    assert losses
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
        assert torch.equal(tower.state_dict()[name], value), name
    untrained = study.segmenter("deeplabv3plus", tower, 0)
    moved = [not torch.equal(a, b) for a, b in zip(model.head.parameters(), untrained.head.parameters(), strict=True)]
    assert any(moved)


@pytest.mark.filterwarnings("ignore:.*calibration images")
def test_joined_rows_train_the_tower_too(study):
    full = study.measure(Run(0, "deeplabv3plus", "dense", 1.0, "full"))
    alpha = study.measure(Run(0, "deeplabv3plus", "obs", 0.65, "alpha"))
    assert 0 < alpha.training_macs < full.training_macs
    assert full.training_macs > 2 * full.macs


@pytest.mark.filterwarnings("ignore:.*calibration images")
def test_a_tower_is_pruned_once_for_all_frameworks_of_a_seed(study):
    first = study.tower("random", 0.5, 0)
    assert study.tower("random", 0.5, 0) is first
    other = study.tower("random", 0.5, 1)
    sizes = [[p.shape for p in tower.vision_model.parameters()] for tower in (first, other)]
    values = [torch.cat([p.flatten() for p in tower.vision_model.parameters()]) for tower in (first, other)]
    assert sizes[0] != sizes[1] or not torch.equal(*values)


def test_the_constant_class_by_hand(study):
    found = study.measure(Run(0, "constant", "constant", 1.0, ""))
    areas = {"sky": 0.4, "cat": 0.2, "dog": 0.2, "wall": 0.2}
    expected = [
        max(areas[name] for name in NAMES if (name in found.seen_classes) == is_seen) / 2 for is_seen in (1, 0)
    ]
    assert (found.seen, found.unseen) == pytest.approx(expected, abs=0.02)
    assert found.pixel_accuracy == pytest.approx(0.4, abs=0.02)


def test_teachers_embed_the_same_crops_once():
    class Teacher:
        calls = 0

        def embed(self, pixel_values, labels, ignore_index):
            self.calls += 1
            return [pixel_values[0, 0], labels[0]]

    teacher = Teacher()
    remembered = RememberedRegions(teacher)
    pixels, labels = torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    first = remembered.embed(pixels, labels, 255)
    assert remembered.embed(pixels.clone(), labels.clone(), 255) is first
    remembered.embed(pixels, labels + 1, 255)
    remembered.embed(pixels + 1, labels, 255)
    assert teacher.calls == 3


@pytest.mark.parametrize("framework", STUDIED)
def test_expected_times_grow_with_the_steps(study, framework, monkeypatch):
    monkeypatch.setattr("hf_opentrans.benchmark_transfer.milliseconds", lambda run, device: run() or 500.0)
    trained = "" if framework == "dense-clip" else "head"
    found = study.expected_seconds(Run(0, framework, "dense", 1.0, trained))
    steps = {"dense-clip": 0, "fcclip": 6, "gkc": 6}.get(framework, 2)
    assert found == 0.5 * steps


@pytest.mark.filterwarnings("ignore:.*calibration images")
def test_times_are_those_of_the_framework(study):
    timing = study.time("deeplabv3plus", "obs", 0.5, 0)
    assert (timing.framework, timing.method, timing.keep) == ("deeplabv3plus", "obs", 0.5)
    assert min(timing.ms, timing.dense_ms, timing.speed_up) > 0


# Claims


def rows_of(ours, dense, random, keep=0.65) -> list[TransferRow]:
    rows = []
    for seed in range(3):
        values = {"obs": ours[seed], "magnitude": random[seed], "random": random[seed]}
        rows += [row("fcclip", method, keep, seed, value, value) for method, value in values.items()]
        rows.append(row("fcclip", "dense", 1.0, seed, dense[seed], dense[seed]))
    return rows


def test_claims_and_their_intervals_by_hand():
    rows = rows_of([0.51, 0.52, 0.53], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    found = {claim.text: claim for claim in claims(rows)}
    above = found["fcclip, keep 0.65, seen: ours above random"]
    # Differences 0.01, 0.02, 0.03: deviation 0.01.
    reach = T_OF_TWO * 0.01 / 3**0.5
    assert (above.difference.low, above.difference.high) == pytest.approx((0.02 - reach, 0.02 + reach), abs=1e-8)
    assert above.verdict == "not shown"
    kept = found["fcclip, keep 0.65, seen: ours above 95% of dense"]
    assert kept.difference.mean == pytest.approx(0.52 - 0.95 * 0.5)
    assert kept.verdict == "holds"
    assert len(found) == 6


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [([0.6, 0.61, 0.6], "holds"), ([0.4, 0.41, 0.4], "fails"), ([0.4, 0.5, 0.58], "fails on average")],
)
def test_verdicts(ours, verdict):
    rows = rows_of(ours, [0.5] * 3, [0.5] * 3)
    assert claims(rows)[0].verdict == verdict


def test_one_seed_claims_nothing():
    assert claims([each for each in rows_of([0.6] * 3, [0.5] * 3, [0.5] * 3) if each.seed == 0]) == []


def test_the_share_of_dense_is_claimed_at_its_budget_alone():
    rows = rows_of([0.6] * 3, [0.5] * 3, [0.5] * 3, keep=0.5)
    assert not any("of dense" in claim.text for claim in claims(rows))


def test_joined_rows_are_compared_with_full_fine_tuning():
    rows = [row("deeplabv3plus", "obs", 0.65, seed, 0.6, trained="alpha") for seed in range(3)]
    rows += [row("deeplabv3plus", "dense", 1.0, seed, 0.5 + seed / 100, trained="full") for seed in range(3)]
    found = claims(rows)
    assert [claim.text for claim in found] == [
        f"deeplabv3plus, {score}: pruned and alpha against dense and full fine-tuning" for score in ("seen", "unseen")
    ]
    assert found[0].difference.mean == pytest.approx(0.09)
    assert [claim.verdict for claim in found] == ["higher", "no difference shown"]


# Tables


def test_tables_say_what_was_measured():
    rows = [
        row("fcclip", "dense", 1.0, seed, 0.5 + seed / 50, macs=5 * 10**8, first_loss=3.0, last_loss=1.0)
        for seed in (0, 1)
    ]
    rows += [row("fcclip", "obs", 0.5, seed, 0.4, params=2 * 10**6) for seed in (0, 1)]
    rows.append(row("constant", "constant", 1.0, 0, 0.01, trained=""))
    header, cells = transfer_table(rows, [TransferTiming("fcclip", "obs", 0.5, 20.0, 10.0, 1.9)])
    lines = [dict(zip(header, line, strict=True)) for line in cells]
    assert [line["tower"] for line in lines] == ["constant class", "dense", "ours"]
    assert lines[1]["mIoU seen"] == "51.0% ± 1.0"
    assert lines[1]["loss"] == "3 to 1"
    assert (lines[1]["time"], lines[2]["time"]) == ("20.0 ms", "10.0 ms (1.90x)")
    assert lines[2]["params"] == "2.00 M"
    assert {*QUALITY, *COST} == set(header)


def test_published_files_become_tables():
    rows = [each.to_dict() for each in rows_of([0.6] * 3, [0.5] * 3, [0.4] * 3)]
    settings = {"classes": 4, "steps": 300, "batch_size": 8, "side": 80}
    values = {"rows": rows, "timings": [], "settings": settings, "environment": {}, "command": "a command"}
    text = result_table(values)
    assert "| fcclip | ours | 0.65 | head | 60.0% ± 0.0 |" in text
    assert "ours above random | +20.0 | +20.0 to +20.0 | holds |" in text
    assert "300 steps of 8 crops of 80 px" in text
    assert transfer_notes(rows_of([1] * 3, [1] * 3, [1] * 3)[:1], settings)[0].startswith("Means over 1 seed ")


# The command


@pytest.fixture
def base(tiny_clip_folder, dataset, images) -> list[Any]:
    given = ["--model", tiny_clip_folder, "--dataset", dataset, "--images", images, "--steps", 2, "--batch-size", 2]
    return [*given, "--frameworks", "dense-clip", "--seeds", 1]


@pytest.mark.filterwarnings("ignore:.*calibration images")
def test_the_command_goes_on_where_it_stopped(tmp_path, base):
    target = tmp_path / "transfer.json"
    code, shown, error = run(*base, "--no-time", "--json", target)
    assert code == 0, error
    values = json.loads(target.read_text())
    assert len(values["rows"]) == 8
    assert values["timings"] == []
    assert "Training will take about" in error
    assert "8 of 8: dense-clip, random at 0.5, seed 0: mIoU" in error
    assert "what it can do" in shown
    values["rows"] = values["rows"][:6]
    target.write_text(json.dumps(values))
    code, _, error = run(*base, "--json", target)
    assert code == 0, error
    assert "8 runs: 6 in the file already, 2 to do." in error
    again = json.loads(target.read_text())
    assert again["rows"][:6] == values["rows"]
    assert len(again["timings"]) == 6


def test_mistakes_are_told_before_work_starts(base):
    for more, message in (
        (["--frameworks", "dense-clip", "sam"], "framework is 'sam'"),
        (["--steps", "0"], "steps is 0"),
        (["--seen", "1"], "It must see some and not all"),
    ):
        code, _, error = run(*base, *more)
        assert code == USAGE
        assert message in error
