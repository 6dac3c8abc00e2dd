"""What 2:4 sparsity does to quality: models before and after, ours and the controls, dense and pruned."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_opentrans.benchmark_rows import RowFile
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.evaluation import (
    FidelityReference,
    center_crops,
    evaluate_segmentation,
    folder_samples,
    native_side,
)
from hf_opentrans.loading import load_dense_clip
from hf_opentrans.models.image_loading import load_rgb
from hf_opentrans.models.modeling_dense_clip import DenseCLIPForSegmentation
from hf_opentrans.models.processing_open_vocabulary import OpenVocabularyProcessor
from hf_opentrans.pruning.semi_structured import SPARSITY_STRUCTURES, SemiStructuredConfig, prune_semi_structured

NO_SPARSITY = "none"
# Methods and whose layers, for every model.
VARIANTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (NO_SPARSITY, ()),
    ("obs", SPARSITY_STRUCTURES),
    ("obs", ("mlp",)),
    ("magnitude", SPARSITY_STRUCTURES),
    ("random", SPARSITY_STRUCTURES),
)
_NAMES = {"obs": "2:4, ours", "magnitude": "2:4 by size", "random": "2:4 at random", NO_SPARSITY: "-"}


@dataclass(frozen=True)
class SemiStructuredRow:
    """One model in one variant.

    Args:
        model: As it was named.
        sparsity: "none" or a method.
        structures: Whose linear layers are 2:4.
        zeros: Share of zeros in the linear layers of the tower's blocks; 0 for "none", where nothing is counted.
        skipped: Linear layers that could not be made 2:4.
        class_token_cosine, patch_token_cosine: Mean cosines to the first model's tokens, on the scored images.
        mean_iou, pixel_accuracy: Of the segmentation.
        images: Scored images.
        fit_images: Unlabelled images that weights were fitted on; 0 for controls.
        seconds: Wall time of making it sparse; None for "none".
    """

    model: str
    sparsity: str
    structures: tuple[str, ...]
    zeros: float
    skipped: int
    class_token_cosine: float
    patch_token_cosine: float
    mean_iou: float
    pixel_accuracy: float
    images: int
    fit_images: int
    seconds: float | None

    @property
    def key(self) -> tuple[str, str, tuple[str, ...]]:
        """What tells this row from the others of its file."""
        return self.model, self.sparsity, tuple(self.structures)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


class SemiStructuredFile(RowFile[SemiStructuredRow]):
    """The rows of `benchmark semi-structured`; see `RowFile`."""

    row_type, written_by = SemiStructuredRow, "benchmark semi-structured"


@dataclass(frozen=True)
class SparsityStudy:
    """What all rows share.

    Args:
        images: Unlabelled images that weights are fitted on.
        segmentation: Images and masks that are scored.
        limit: How many of them; None for all.
        options: Of `SemiStructuredConfig`, without method and structures.
    """

    images: Any
    segmentation: SegmentationFolder
    limit: int | None = None
    options: dict[str, Any] | None = None

    def score(
        self,
        model: DenseCLIPForSegmentation,
        processor: OpenVocabularyProcessor,
        reference: FidelityReference,
    ) -> dict[str, float | int]:
        """Return the figures of one model."""
        close = reference.compare(model)
        samples = folder_samples(self.segmentation, self.limit)
        scores = evaluate_segmentation(model, processor, samples, self.segmentation.class_names)
        return {
            "class_token_cosine": close.class_token,
            "patch_token_cosine": close.patch_tokens,
            "mean_iou": scores.mean_iou,
            "pixel_accuracy": scores.pixel_accuracy,
            "images": close.images,
        }

    def reference(self, model: DenseCLIPForSegmentation, processor: OpenVocabularyProcessor) -> FidelityReference:
        """Return the tokens of the first model on the scored images."""
        count = len(self.segmentation) if self.limit is None else min(self.limit, len(self.segmentation))
        pictures = [load_rgb(self.segmentation[index].image_path) for index in range(count)]
        return FidelityReference.of(model, center_crops(pictures, processor.image_processor, native_side(model)))


def run_semi_structured(
    models: Sequence[str],
    study: SparsityStudy,
    results: SemiStructuredFile,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> None:
    """Measure every model in every variant that `results` does not hold yet.

    Args:
        models: Folders or Hub ids of CLIPs; the first is what all others are compared with.
        study: What is measured.
        results: Takes the rows.
        say: Called with a line on what comes next.
        progress: Whether a progress bar is shown.
    """
    done = {row.key for row in results.rows}
    left = [(name, *variant) for name in dict.fromkeys(models) for variant in VARIANTS if (name, *variant) not in done]
    say(f"{len(left)} of {len(set(models)) * len(VARIANTS)} rows to do.")
    reference = study.reference(*load_dense_clip(models[0])) if left else None
    for name, method, structures in left:
        say(f"{name}, {_NAMES[method]} {' and '.join(structures)}")
        model, processor = load_dense_clip(name)
        zeros, skipped, fitted, seconds = 0.0, 0, 0, None
        if method != NO_SPARSITY:
            config = SemiStructuredConfig(method=method, structures=structures, **(study.options or {}))
            images = {"image_processor": processor.image_processor, "progress": progress}
            result = prune_semi_structured(model, study.images, config, **images)
            report, model = result.report, result.model
            zeros, skipped, fitted = report.zeros, len(report.skipped), report.fit_images
            seconds = report.seconds["sparsify"]
        figures: dict[str, Any] = study.score(model, processor, reference)  # pyright: ignore[reportArgumentType]
        facts = {"zeros": zeros, "skipped": skipped, "fit_images": fitted, "seconds": seconds}
        results.add(SemiStructuredRow(name, method, structures, **facts, **figures))
    results.save(at_end=True)


def semi_structured_table(rows: Sequence[SemiStructuredRow]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells."""
    header = ["model", "sparsity", "layers", "zeros", "CLS cos", "patch cos", "mIoU", "pixAcc"]
    cells = [
        [
            row.model,
            _NAMES[row.sparsity],
            ", ".join(row.structures) or "-",
            f"{row.zeros:.0%}",
            f"{row.class_token_cosine:.4f}",
            f"{row.patch_token_cosine:.4f}",
            f"{row.mean_iou:.1%}",
            f"{row.pixel_accuracy:.1%}",
        ]
        for row in rows
    ]
    return header, cells


def semi_structured_notes(rows: Sequence[SemiStructuredRow]) -> list[str]:
    """Return the sentences that belong under the table."""
    fitted = max(row.fit_images for row in rows)
    notes = [
        f"Cosines are to {rows[0].model}, on the {rows[0].images} scored images. Ours was fitted on {fitted} other "
        "images without labels; the controls read none.",
        "Speed is not measured here: these zeros cost a processor as much as other numbers, and only GPUs of compute "
        "capability 8.0 or newer can skip them.",
    ]
    skipped = sum(row.skipped for row in rows)
    return [*notes, f"{skipped} layers in all could not be made 2:4."] if skipped else notes
