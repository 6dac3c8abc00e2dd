"""Training by several processes, and through a kill: the same layers, scores and weights as by one left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_opentrans
from hf_opentrans import DeepLabV3PlusForSegmentation, LayerSelection

pytestmark = pytest.mark.slow  # every start of a process takes seconds


@pytest.fixture
def dataset(write_segmentation_folder, tiny_images):
    """Return a folder with eight training images and five others: an uneven share for two processes."""

    def mask_of(image, index):
        mask = np.zeros((image.height, image.width), np.uint8)
        mask[:, (index + 1) * image.width // 10 :] = 1
        return mask

    classes = {"id_to_name": {"0": "sky", "1": "cat"}, "ignore_id": 255}
    return write_segmentation_folder({"train": tiny_images, "val": tiny_images[:5]}, mask_of, classes)


def command(folder: Path, dataset: Path, output: Path, *more: str, **config: float) -> list[str]:
    """Return the arguments of `finetune`, with the configuration in a file of its own."""
    path = output.with_suffix(".json")
    path.write_text(json.dumps({"decoder_channels": 8, "save_every": 2, **config}))
    given = ["finetune", str(folder), "--dataset", str(dataset), "--config", str(path), "--output", str(output)]
    return [*given, "--json", str(output.with_suffix(".figures.json")), *more]


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = str(Path(hf_opentrans.__file__).parents[1])
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": path}


def finish(arguments: list[str]) -> None:
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def figures(output: Path) -> dict:
    return json.loads(output.with_suffix(".figures.json").read_text())


def weights(output: Path) -> dict[str, torch.Tensor]:
    return DeepLabV3PlusForSegmentation.from_pretrained(output).state_dict()


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2"],
    # With --cpu it starts several processes by mpirun alone; the way of several GPUs works without GPUs too.
    "accelerate": [
        *["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
        *["--mixed_precision", "no", "--dynamo_backend", "no"],
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_as_one(tmp_path, tiny_clip_folder, dataset, launcher):
    alone, together = tmp_path / "alone", tmp_path / "together"
    shared = {"steps": 2, "learning_rate": 1e-3}
    finish([sys.executable, "-m", "hf_opentrans", *command(tiny_clip_folder, dataset, alone, **shared, batch_size=8)])
    start = [sys.executable, *LAUNCHERS[launcher], "-m", "hf_opentrans"]
    finish([*start, *command(tiny_clip_folder, dataset, together, **shared, batch_size=4)])
    one, two = figures(alone), figures(together)
    first, second = (LayerSelection.load(output / "selection.json") for output in (alone, together))
    assert first == second
    assert one["samples"] == two["samples"] == 16
    # Every epoch is one step over all eight images, in whatever order: the same gradients, but for rounding.
    assert two["before"]["mean_iou"] == one["before"]["mean_iou"]
    assert two["after"]["mean_iou"] == pytest.approx(one["after"]["mean_iou"], abs=5e-3)
    mine, theirs = weights(alone), weights(together)
    # AdamW divides by the size of a gradient: where it is all rounding, single weights go elsewhere.
    changes = torch.cat([(mine[name] - value).abs().flatten() for name, value in theirs.items()])
    assert float(changes.quantile(0.9)) < 1e-6


def test_two_processes_recover_as_one(tmp_path, tiny_clip_folder, images):
    start, alone, together = [sys.executable, "-m", "hf_opentrans"], tmp_path / "alone", tmp_path / "together"
    options = ["--keep", "0.6", "--method", "magnitude", "--output", str(tmp_path / "pruned")]
    finish([*start, "prune", str(tiny_clip_folder), "--images", str(images), *options])
    given = ["distill", str(tmp_path / "pruned"), "--teacher", str(tiny_clip_folder), "--images", str(images)]
    given += ["--steps", "3", "--learning-rate", "0.003"]
    for output, launcher, size in ((alone, start[:1], 6), (together, [start[0], *LAUNCHERS["torchrun"]], 3)):
        figures_file = str(output.with_suffix(".figures.json"))
        more = ["--batch-size", str(size), "--output", str(output), "--json", figures_file]
        config = output.with_suffix(".json")
        # 6 of 8 images train. Taps are scaled by their mean square in the batch, which is another one per process.
        config.write_text('{"held_out": 0.25, "taps": 0}')
        finish([*launcher, "-m", "hf_opentrans", *given, *more, "--config", str(config)])
    one, two = figures(alone), figures(together)
    assert one["samples"] == two["samples"] == 18
    for name in ("class_token_cosine", "patch_token_cosine"):
        assert two["before"][name] == pytest.approx(one["before"][name], abs=1e-6)
        assert two["after"][name] == pytest.approx(one["after"][name], abs=1e-4)
        assert abs(one["after"][name] - one["before"][name]) > 0.01  # both have trained


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, tiny_clip_folder, dataset):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"steps": 60, "batch_size": 3, "learning_rate": 1e-3}
    start = [sys.executable, "-m", "hf_opentrans"]
    finish([*start, *command(tiny_clip_folder, dataset, whole, **settings)])
    arguments = command(tiny_clip_folder, dataset, parts, **settings)
    checkpoints = parts.with_name("parts.checkpoints")
    with subprocess.Popen([*start, *arguments], env=environment(), stderr=subprocess.DEVNULL) as running:
        deadline = time.monotonic() + 200
        while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
            assert running.poll() is None, "the run ended before its first checkpoint"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
    assert running.returncode == -signal.SIGKILL
    assert not parts.exists()
    finish([*start, *arguments, "--resume"])
    mine, theirs = weights(whole), weights(parts)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert figures(whole)["after"] == figures(parts)["after"]
