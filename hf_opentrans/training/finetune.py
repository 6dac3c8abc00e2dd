"""Fine-tune a segmenter or recover a pruned tower: one frozen configuration in, a saved folder with a report out."""

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback

from hf_opentrans._files import check_output_folder
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.models.modeling_deeplabv3plus import DeepLabV3PlusForSegmentation
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPModel
from hf_opentrans.models.vocabulary import Vocabulary
from hf_opentrans.spectra.cost import TrainingCost, training_cost
from hf_opentrans.spectra.layers import how_many
from hf_opentrans.spectra.selection import (
    GRANULARITIES,
    RULES,
    WITH_BATCHES,
    LayerSelection,
    freeze_unselected,
    select_layers,
)

from .runs import REPORT_FILE, SELECTION_FILE, Schedule, checkpoints_of, find_checkpoint, save_run
from .segmentation import SegmentationDataset, SegmentationTrainer

FRAMEWORKS = ("deeplabv3plus",)
EVERYTHING, HEAD = "full", "head"
TOWER = r"vision_model\..*"


@dataclass(frozen=True)
class FinetuneConfig(Schedule):
    """How to train.

    Args:
        framework: What is put on the CLIP: "deeplabv3plus".
        select: Which layers of the vision tower train beside the head: a rule of `select_layers`, "full" for all of
            the tower, or "head" for none.
        fraction: Share of the layers that a rule trains, in (0, 1].
        granularity: "module" or "block".
        gradient_batches: Batches that the rules "gradient" and "gain_per_cost" look at.
        tower_rate: Learning rate of the tower / that of the head.
        resolution: Side of the crops in pixels; the CLIP's own where it is None.
        decoder_channels: Width of the decoder.

    All fields of `Schedule` too; `learning_rate` is that of the head.

    Raises:
        ValueError: If a value is unknown or out of range.
    """

    framework: str = "deeplabv3plus"
    select: str = "alpha"
    fraction: float = 0.5
    granularity: str = "module"
    gradient_batches: int = 8
    tower_rate: float = 0.1
    resolution: int | None = None
    decoder_channels: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = [rule for rule in RULES if rule != "damage"]
        choices = {"framework": FRAMEWORKS, "select": (EVERYTHING, HEAD, *rules), "granularity": GRANULARITIES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}. It must be one of {', '.join(known)}. Correct it."
                )
        how_many(self.fraction, 1)
        for name in ("tower_rate", "decoder_channels", "gradient_batches"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}. It must be positive. Correct it.")


@dataclass(frozen=True)
class FinetuneResult:
    """What training gave.

    Args:
        model: The trained segmenter.
        selection: Which layers trained; None for "full" and "head".
        report: Configuration, scores before and after, training cost beside that of full fine-tuning, seconds.
    """

    model: DeepLabV3PlusForSegmentation
    selection: LayerSelection | None
    report: dict[str, Any]


def finetune(
    clip: SparseCLIPModel,
    processor: Any,
    train: SegmentationFolder,
    evaluate: SegmentationFolder,
    config: FinetuneConfig,
    output: str | Path,
    *,
    resume: bool = False,
    on_stage: Callable[[str], object] = lambda line: None,
    progress: bool = False,
) -> FinetuneResult:
    """Train a segmentation head and the selected layers of the tower, and save model, processor and report.

    Checkpoints lie beside the output, in `OUTPUT.checkpoints`, until the run is done; `resume` goes on from the last.

    Args:
        clip: The CLIP, dense or pruned; not changed.
        processor: Its processor.
        train: Images and masks to train on.
        evaluate: Images and masks to score on; of the same classes.
        config: How.
        output: New, empty, or an earlier output.
        resume: Whether to go on from a checkpoint of the same configuration.
        on_stage: Called with a line on what comes next.
        progress: Whether Trainer shows its bar.

    Raises:
        FileExistsError: If the output holds something else.
        ValueError: If the data sets differ in their classes, or there is nothing, or something else, to resume from.
    """
    target = check_output_folder(output, marker=REPORT_FILE)
    checkpoints = checkpoints_of(target)
    if train.class_names != evaluate.class_names:
        raise ValueError(
            f"Training has {len(train.class_names)} classes and evaluation {len(evaluate.class_names)}, or in another "
            "order. Both must be the same. Give two splits of one data set."
        )
    last = find_checkpoint(checkpoints, config, resume)
    torch.manual_seed(config.seed)
    model = DeepLabV3PlusForSegmentation.from_clip(clip, decoder_channels=config.decoder_channels)
    side = config.resolution or int(model.vision_model.config.image_size)  # pyright: ignore[reportArgumentType]
    datasets = [
        SegmentationDataset(
            folder, processor.image_processor, resolution=side, is_training=is_training, seed=config.seed
        )
        for folder, is_training in ((train, True), (evaluate, False))
    ]
    text = class_embeddings(model, train.class_names, processor.tokenizer)
    batches = _batches(datasets[0], config, text)
    on_stage(f"Selecting layers by {config.select!r}")
    selection = _select(model, config, batches)
    costs = {"selected": training_cost(model, batches[0]), "full": _cost_of_everything(model, batches[0])}
    trainer = _trainer(model, config, checkpoints, text, datasets, progress)
    on_stage(f"Training {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters")
    before = trainer.evaluate()
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last)
    seconds = time.perf_counter() - start
    after = trainer.evaluate()
    report = {
        "config": asdict(config),
        "before": _scores(before),
        "after": _scores(after),
        "training_cost": {name: cost.to_dict() for name, cost in costs.items()},
        "samples": config.steps * config.batch_size * trainer.args.world_size,
        "seconds": seconds,
        "trained_layers": list(selection.names) if selection else config.select,
    }

    def save_more(folder: Path) -> None:
        processor.save_pretrained(folder)
        if selection is not None:
            selection.save(folder / SELECTION_FILE)

    save_run(target, model, report, save_more)
    return FinetuneResult(model, selection, report)


def class_embeddings(
    model: DeepLabV3PlusForSegmentation, class_names: tuple[str, ...], tokenizer: Any
) -> torch.Tensor:
    """Return one unit embedding per class, the mean over its aliases, of shape `(classes, dim)`."""
    vocabulary = Vocabulary(class_names, templates=model.config.segmentation_templates)
    encoded = model.eval().encode_vocabulary(vocabulary, tokenizer)
    queries, owners = encoded.text_embeddings, encoded.query_to_class
    if queries is None:
        raise RuntimeError("Encoding the vocabulary gave no embeddings. This is a fault of the package: report it.")
    total = queries.new_zeros(len(class_names), queries.shape[1]).index_add_(0, owners.to(queries.device), queries)
    return torch.nn.functional.normalize(total, dim=-1)


def _batches(dataset: Dataset[Any], config: FinetuneConfig, text: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Return some batches of their own random crops, the same whether a run is resumed or not."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        generator = torch.Generator().manual_seed(config.seed)
        loader = DataLoader(dataset, config.batch_size, shuffle=True, generator=generator)
        count = config.gradient_batches if config.select in WITH_BATCHES else 1
        return [{**batch, "text_embeddings": text} for batch in itertools.islice(loader, count)]


def _select(
    model: DeepLabV3PlusForSegmentation, config: FinetuneConfig, batches: list[dict[str, torch.Tensor]]
) -> LayerSelection | None:
    if config.select == EVERYTHING:
        return None
    if config.select == HEAD:
        model.vision_model.requires_grad_(False)
        return None
    selection = select_layers(
        model,
        config.select,
        config.fraction,
        config.granularity,
        target_modules=TOWER,
        seed=config.seed,
        batches=batches if config.select in WITH_BATCHES else None,
    )
    freeze_unselected(model, selection, ["head"])
    return selection


def _cost_of_everything(model: DeepLabV3PlusForSegmentation, batch: dict[str, torch.Tensor]) -> TrainingCost:
    """Return the cost of full fine-tuning: head and tower; the text tower never trains."""
    before = [(parameter, parameter.requires_grad) for parameter in model.vision_model.parameters()]
    model.vision_model.requires_grad_(True)
    try:
        return training_cost(model, batch)
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


def _trainer(
    model: DeepLabV3PlusForSegmentation,
    config: FinetuneConfig,
    checkpoints: Path,
    text: torch.Tensor,
    datasets: list[SegmentationDataset],
    progress: bool,
) -> SegmentationTrainer:
    args = config.arguments(checkpoints, progress=progress)
    tower = [p for p in model.vision_model.parameters() if p.requires_grad]
    head = [p for p in model.head.parameters() if p.requires_grad]
    groups = [{"params": head, "lr": config.learning_rate}]
    if tower:
        groups.append({"params": tower, "lr": config.learning_rate * config.tower_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    train, evaluate = datasets
    trainer = SegmentationTrainer(
        model, args, text_embeddings=text, train_dataset=train, eval_dataset=evaluate, optimizers=(optimizer, None)
    )
    trainer.remove_callback(PrinterCallback)  # figures go into the report, not to standard output
    return trainer


def _scores(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[f"eval_{name}"] for name in ("loss", "mean_iou", "pixel_accuracy")}
