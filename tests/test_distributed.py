"""Several processes give the same answer as one: statistics, plan and weights; and only the first one writes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_opentrans import PruningConfig, SparseCLIPModel, prune_model
from hf_opentrans import _distributed as distributed
from hf_opentrans.pruning import prune, selection
from hf_opentrans.pruning.calibration import load_calibration, walk_layers
from hf_opentrans.pruning.plan import PruningPlan
from hf_opentrans.pruning.surgery import to_sparse
from hf_opentrans.pruning.tower import Tower

PROCESSES = 2
# Five batches to fit on and two held out: an uneven share each.
CONFIG: dict[str, Any] = {"keep": 0.7, "batch_size": 6, "held_out": 0.3}
# Every process runs this; it writes what it found to a file of its own.
SCRIPT = """
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from transformers import CLIPModel

from hf_opentrans import PruningConfig, _distributed, prune_model
from hf_opentrans.pruning.calibration import load_calibration, walk_layers
from hf_opentrans.pruning.surgery import to_sparse
from hf_opentrans.pruning.tower import Tower

torch.set_num_threads(1)
folder = Path(sys.argv[1])
options = json.loads(sys.argv[2])
assert not _distributed.is_distributed()
_distributed.start_processes()
_distributed.start_processes()  # a second call changes nothing
rank = dist.get_rank()
assert _distributed.is_distributed()
assert dist.get_world_size() == int(os.environ["WORLD_SIZE"]) == 2
assert dist.get_backend() == "gloo", dist.get_backend()
assert _distributed.is_main_process() == (rank == 0)
images = [Image.fromarray(picture) for picture in np.load(folder / "images.npy")]
model = CLIPModel.from_pretrained(folder / "dense").eval()
config = PruningConfig(**options)

tower = Tower.of(to_sparse(model))
calibration = load_calibration(images, config, tower)
share = _distributed.own_share(calibration.fit)
expected = calibration.fit[rank::2]
assert len(share) == len(expected) and all(map(torch.equal, share, expected))
found = {}
for layer, statistics in walk_layers(tower, calibration):
    for kind, parts in statistics.items():
        for name, part in zip(("fit", "held_out"), parts):
            key = f"{layer} {kind} {name}"
            found |= {f"{key} mean": part.mean, f"{key} covariance": part.covariance}
            found |= {f"{key} rate": part.positive_rate}
            found |= {f"{key} size": torch.tensor([part.weight, part.rows], dtype=torch.float64)}
first = _distributed.from_first(torch.tensor([rank + 1.0]))
total = torch.tensor([rank + 1.0])
_distributed.add_up(total)
assert (first.item(), total.item()) == (1.0, 3.0)

result = prune_model(model, images, config, progress=True)
result.save_pretrained(folder / "pruned")
assert (folder / "pruned" / "pruning_report.json").exists()  # no process goes on before the folder is there
if rank:  # a process that is not the first one writes nothing, wherever it is told to
    writes = []
    result.model.save_pretrained = lambda *args, **kwargs: writes.append(args)
result.save_pretrained(folder / f"again-of-{0 if rank == 0 else 1}")
assert rank == 0 or not writes
try:
    prune_model(model, images, PruningConfig(keep=0.7, batch_size=64))
except ValueError as error:
    message = str(error)
else:
    message = "no error"
values = {"plan": result.subnetwork.plan.to_dict(), "message": message, "report": result.report.to_dict()}
torch.save({"statistics": found, "weights": result.model.state_dict()}, folder / f"{rank}.pt")
(folder / f"{rank}.json").write_text(json.dumps(values))
dist.destroy_process_group()
"""


@pytest.fixture
def images():
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, size=(40, 5, 6, 3), dtype=np.uint8)
    return [Image.fromarray(picture).resize((32, 32), Image.Resampling.BICUBIC) for picture in coarse]


def launch(folder: Path, script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    (folder / "script.py").write_text(script)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = str(Path(distributed.__file__).parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(PROCESSES)]
    command += ["--standalone", str(folder / "script.py"), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the processes that it started, too
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path, tiny_clip, images):
    pytest.importorskip("accelerate")
    tiny_clip.save_pretrained(tmp_path / "dense")
    np.save(tmp_path / "images.npy", np.stack([np.asarray(image) for image in images]))
    done = launch(tmp_path, SCRIPT, str(tmp_path), json.dumps(CONFIG))
    assert done.returncode == 0, done.stderr[-3000:]
    tensors = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
    values = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(PROCESSES)]

    config = PruningConfig(**CONFIG)
    tower = Tower.of(to_sparse(tiny_clip))
    calibration = load_calibration(images, config, tower)
    assert (len(calibration.fit), len(calibration.held_out)) == (5, 2)
    count = 0
    for layer, statistics in walk_layers(tower, calibration):
        for kind, parts in statistics.items():
            for name, part in zip(("fit", "held_out"), parts, strict=True):
                for found in tensors:
                    rows = found["statistics"]
                    key = f"{layer} {kind} {name}"
                    assert rows[f"{key} size"].tolist() == pytest.approx([part.weight, part.rows], rel=1e-14)
                    assert relative(rows[f"{key} mean"], part.mean) <= 1e-12
                    assert relative(rows[f"{key} covariance"], part.covariance) <= 1e-12
                    assert relative(rows[f"{key} rate"], part.positive_rate) <= 1e-12
                    count += 1
    assert count == 3 * 4 * 2 * PROCESSES

    single = prune_model(tiny_clip, images, config)
    for found, value in zip(tensors, values, strict=True):
        assert PruningPlan.from_dict(value["plan"]) == single.subnetwork.plan
        for name, weight in single.model.state_dict().items():
            torch.testing.assert_close(found["weights"][name], weight, atol=1e-5, rtol=1e-5)
        for name in ("realised_error", "predicted_error"):
            assert value["report"][name] == pytest.approx(getattr(single.report, name), rel=1e-4)
        assert value["report"]["calibration_images"] == 40
        # 32 images to fit on and 8 held out: one batch of each for two processes.
        assert value["message"].startswith("There are 1 batches of calibration images for 2 processes.")
        assert "Use more images, a smaller batch_size, or fewer processes." in value["message"]
    for name, weight in tensors[0]["weights"].items():
        assert torch.equal(weight, tensors[1]["weights"][name])

    written = SparseCLIPModel.from_pretrained(tmp_path / "pruned").state_dict()
    assert all(torch.equal(written[name], weight) for name, weight in tensors[0]["weights"].items())
    assert (tmp_path / "again-of-0").is_dir()
    assert not (tmp_path / "again-of-1").exists()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]  # no half-written folder
    assert done.stderr.count("Pruning:   0%") == 1  # only the first process shows a bar


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.start_processes()
    assert not distributed.is_distributed()
    assert distributed.is_main_process()
    assert distributed.own_share((1, 2, 3)) == [1, 2, 3]
    assert distributed.own_share([]) == []
    tensor = torch.ones(2)
    distributed.add_up(tensor)
    assert distributed.from_first(tensor) is tensor
    assert tensor.tolist() == [1.0, 1.0]
    distributed.wait_for_all()


def test_starting_without_accelerate_says_what_to_install(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"accelerate.*hf_opentrans\[train\]"):
        distributed.start_processes()


@pytest.mark.parametrize(("rank", "expected"), [(0, [0, 3, 6]), (1, [1, 4]), (2, [2, 5])])
def test_batches_are_dealt_out(monkeypatch, rank, expected):
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: rank)
    assert distributed.own_share(range(7)) == expected
    with pytest.raises(ValueError, match=r"There are 2 batches of calibration images for 3 processes\. Every process"):
        distributed.own_share([1, 2])


@pytest.mark.filterwarnings("ignore:40 calibration images give")
def test_every_process_gets_a_batch_of_probes(tiny_clip, images, monkeypatch):
    tower, config = Tower.of(to_sparse(tiny_clip)), PruningConfig(keep=0.7, batch_size=16, probe_images=24)
    calibration = load_calibration(images, config, tower)
    batches: list[int] = []
    monkeypatch.setattr(selection, "output_metrics", lambda _, found, **__: batches.append(len(found)) or {})
    for processes in (1, 2, 24):
        monkeypatch.setattr(selection, "process_count", lambda processes=processes: processes)
        selection.probe(tower, calibration, config)
    assert batches == [3, 3, 24]


def test_the_bar_counts_the_steps_of_its_own_process(tiny_clip, monkeypatch):
    tower, config = Tower.of(to_sparse(tiny_clip)), PruningConfig(keep=0.7, batch_size=4, num_images=40, refit=False)
    totals = []
    for processes in (1, 2):
        monkeypatch.setattr(prune, "process_count", lambda processes=processes: processes)
        totals.append(prune._steps(tower, config, 40))
    # Forty images are read by every process; eleven and six batches go through three layers.
    assert totals[0] - totals[1] == 3 * (11 - 6) * (1 + 2) + (11 - 6)
