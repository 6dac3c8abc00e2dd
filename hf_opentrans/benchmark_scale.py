"""What pruning takes: wall time, CPU time and memory on towers of real size, with random weights and images."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from hf_opentrans.benchmark_memory import PeakMemory
from hf_opentrans.benchmark_rows import RowFile, duration
from hf_opentrans.benchmarks import vit_config
from hf_opentrans.pruning.macs import count_macs
from hf_opentrans.pruning.plan import PruningConfig
from hf_opentrans.pruning.prune import prune_model

# Hidden size, MLP width, layers, patch, side, shared dimensions: OpenAI's CLIP towers.
SIZES = {
    "vit-b16": (768, 3072, 12, 16, 224, 512),
    "vit-l14": (1024, 4096, 24, 14, 224, 768),
    "vit-l14-336": (1024, 4096, 24, 14, 336, 768),
}
SCALE_RUNS = ("vit-b16:128", "vit-b16:1024", "vit-l14-336:128")
# Floating-point operations of a whole pruning run per multiply-accumulate of the tower and image, and per layer and
# cubed MLP width; counted on ViT-B/16 with 128 images. For the forecast alone.
PER_IMAGE, PER_LAYER = 13.0, 30.0


@dataclass(frozen=True)
class ScaleRow:
    """One pruning run.

    Args:
        model: One of `SIZES`.
        images: Calibration images.
        resolution: Side in pixels.
        keep: Share of the MACs that was asked for.
        seconds, cpu_seconds: Wall time, and time of all cores together.
        selection_seconds, rebuild_seconds: The two long parts of the wall time.
        peak_memory_mib: Largest memory of the process, libraries and model included; of the tensors on an accelerator.
        model_mib: What the weights take of it.
    """

    model: str
    images: int
    resolution: int
    keep: float
    seconds: float
    cpu_seconds: float
    selection_seconds: float
    rebuild_seconds: float
    peak_memory_mib: float | None
    model_mib: float

    @property
    def key(self) -> tuple[str, int]:
        """What tells this row from the others of its file: model and images."""
        return self.model, self.images

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


class ScaleFile(RowFile[ScaleRow]):
    """The rows of `benchmark scale`; see `RowFile`."""

    row_type, written_by = ScaleRow, "benchmark scale"


def parse_run(text: str) -> tuple[str, int]:
    """Read "MODEL:IMAGES".

    Raises:
        ValueError: If it is something else.
    """
    model, _, images = text.partition(":")
    if model not in SIZES or not images.isdecimal() or int(images) < 1:
        raise ValueError(
            f"The run is {text!r}. It must be MODEL:IMAGES with a model of {', '.join(SIZES)}, such as vit-b16:128. "
            "Correct it."
        )
    return model, int(images)


def tower_config(model: str) -> CLIPVisionConfig:
    """Return the configuration of one of `SIZES`."""
    hidden, neurons, layers, patch, side, shared = SIZES[model]
    return vit_config(hidden, neurons, layers, patch, image_size=side, projection_dim=shared)


def random_tower(model: str, *, seed: int = 0) -> CLIPVisionModelWithProjection:
    """Return a vision tower of one of `SIZES` with random weights."""
    torch.manual_seed(seed)
    return CLIPVisionModelWithProjection(tower_config(model)).eval()


def random_images(count: int, side: int, *, seed: int = 0) -> Iterator[Image.Image]:
    """Yield smooth random pictures."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        coarse = rng.integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
        yield Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def measure(model: str, images: int, keep: float, *, progress: bool = False) -> ScaleRow:
    """Prune once and note what it took."""
    tower = random_tower(model)
    side = SIZES[model][4]
    pictures = list(random_images(images, side))
    with PeakMemory(tower.device) as memory:
        before = time.process_time()
        result = prune_model(tower, pictures, PruningConfig(keep=keep, num_images=images), progress=progress)
        used = time.process_time() - before
    seconds, weights = result.report.seconds, sum(p.numel() * p.element_size() for p in tower.parameters())
    parts = (seconds["total"], used, seconds["selection"], seconds["rebuild"])
    return ScaleRow(model, images, side, keep, *parts, memory.mib, weights / 2**20)


def forecast(runs: Sequence[tuple[str, int]]) -> float:
    """Return about how many seconds the runs will take, from the speed of a matrix product on this machine."""
    square = torch.randn(1536, 1536)
    torch.mm(square, square)
    start = time.perf_counter()
    for _ in range(3):
        torch.mm(square, square)
    rate = 3 * 2 * 1536**3 / (time.perf_counter() - start)
    flops = 0.0
    for model, images in runs:
        neurons, layers = SIZES[model][1:3]
        macs = count_macs(tower_config(model), resolution=SIZES[model][4])
        flops += PER_IMAGE * macs * images + PER_LAYER * layers * neurons**3
    return flops / rate


def run_scale(
    runs: Sequence[tuple[str, int]],
    keep: float,
    results: ScaleFile,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> None:
    """Do all runs that `results` does not hold yet.

    Args:
        runs: Models and numbers of images.
        keep: Share of the MACs to keep.
        results: Takes the rows.
        say: Called with a line on what comes next.
        progress: Whether pruning shows its bar.
    """
    done = {row.key for row in results.rows}
    left = [run for run in dict.fromkeys(runs) if run not in done]
    say(f"{len(runs)} runs: {len(runs) - len(left)} in the file already, {len(left)} to do.")
    for model, images in left:
        about = duration(forecast([(model, images)]))
        say(f"{model}, {images} images: about {about}. Nothing else should run meanwhile.")
        results.add(measure(model, images, keep, progress=progress))
    results.save(at_end=True)


def scale_table(rows: Sequence[ScaleRow]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells."""
    header = ["tower", "px", "images", "keep", "time", "selection", "rebuild", "CPU time", "memory", "of it weights"]
    cells = [
        [
            row.model,
            str(row.resolution),
            f"{row.images:,}",
            f"{row.keep:g}",
            *map(_minutes, (row.seconds, row.selection_seconds, row.rebuild_seconds, row.cpu_seconds)),
            "-" if row.peak_memory_mib is None else f"{row.peak_memory_mib / 1024:.1f} GiB",
            f"{row.model_mib / 1024:.1f} GiB",
        ]
        for row in rows
    ]
    return header, cells


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"
