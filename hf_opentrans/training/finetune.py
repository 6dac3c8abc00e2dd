"""Fine-tune a segmenter or recover a pruned tower: one frozen configuration in, a saved folder with a report out."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback

from hf_opentrans._files import check_output_folder
from hf_opentrans._optional import require
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.models.configuration_sparse_clip import SEGMENTATION_MODES
from hf_opentrans.models.modeling_catseg import CATSegForSegmentation
from hf_opentrans.models.modeling_deeplabv3plus import DeepLabV3PlusForSegmentation
from hf_opentrans.models.modeling_fcclip import FCCLIPForSegmentation
from hf_opentrans.models.modeling_gkc import GKCForSegmentation
from hf_opentrans.models.modeling_open_vocabulary import OpenVocabularyModel
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPModel
from hf_opentrans.models.vocabulary import Vocabulary
from hf_opentrans.spectra.cost import TrainingCost, training_cost
from hf_opentrans.spectra.layers import exactly, find_layers, how_many
from hf_opentrans.spectra.selection import (
    GRANULARITIES,
    RULES,
    WITH_BATCHES,
    LayerSelection,
    freeze_unselected,
    select_layers,
)

from .regions import RegionTeacher
from .runs import REPORT_FILE, SELECTION_FILE, Schedule, checkpoints_of, find_checkpoint, save_run
from .segmentation import SegmentationDataset, SegmentationTrainer
from .synonyms import MEAN, RANDOM, SynonymSampler

FRAMEWORKS: dict[str, type[OpenVocabularyModel]] = {
    "deeplabv3plus": DeepLabV3PlusForSegmentation,
    "catseg": CATSegForSegmentation,
    "fcclip": FCCLIPForSegmentation,
    "gkc": GKCForSegmentation,
}
FROZEN_TOWER = ("fcclip",)  # these keep no graph of the tower
EVERYTHING, HEAD, LORA, OWN = "full", "head", "lora", "own"
TOWER = r"vision_model\..*"


@dataclass(frozen=True)
class FinetuneConfig(Schedule):
    """How to train.

    Args:
        framework: What is put on the CLIP: "deeplabv3plus", "catseg", "fcclip" (whose tower never trains: select must
            be "head" or "own") or "gkc" (whose queries learn CLIP's embeddings of their regions: the teacher is a
            frozen copy of the CLIP that is given, dense or pruned, which sees squares of its own `image_size`).
        select: Which layers of the vision tower train beside the head: a rule of `select_layers`, "full" for all of
            the tower, "head" for none, "own" for what the framework's paper trains (CAT-Seg: queries and values;
            DeepLabV3+, GKC: all), or "lora" for low-rank updates of all its linear layers (PEFT), which are merged at
            the end.
        fraction: Share of the layers that a rule trains, in (0, 1].
        granularity: "module" or "block".
        gradient_batches: Batches that the rules "gradient" and "gain_per_cost" look at.
        tower_rate: Learning rate of the tower / that of the head. Defaults to 0.1, and to 1 for "lora".
        lora_rank: Rank of the updates of "lora".
        resolution: Side of the crops in pixels; the CLIP's own where it is None.
        decoder_channels: Width of the decoder of DeepLabV3+.
        clip_residual: Whether the head adds to CLIP's own dense embedding (CAT-Seg: to its cosines), and begins with
            adding nothing; otherwise it learns them from scratch.
        head_options: More fields of the framework's configuration, such as `cost_channels`.
        mode: How CLIP's last block is read for it (`SparseCLIPConfig.segmentation_mode`). Defaults to the model's.
            GKC reads it as CLIP does, whatever the mode.
        synonyms: What a class with several names ("sofa; couch") is called in training: "mean", the mean of their
            embeddings, or "random", one of them, drawn anew in every step. Scores are always of the mean.

    All fields of `Schedule` too; `learning_rate` is that of the head.

    Raises:
        ValueError: If a value is unknown or out of range.
    """

    framework: str = "deeplabv3plus"
    select: str = "alpha"
    fraction: float = 0.5
    granularity: str = "module"
    gradient_batches: int = 8
    tower_rate: float | None = None
    lora_rank: int = 8
    resolution: int | None = None
    decoder_channels: int = 256
    clip_residual: bool = True
    head_options: dict[str, Any] = field(default_factory=dict)
    mode: str | None = None
    synonyms: str = MEAN

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "framework": FRAMEWORKS,
            "select": (EVERYTHING, HEAD, OWN, LORA, *RULES),
            "granularity": GRANULARITIES,
            "synonyms": (MEAN, RANDOM),
        }
        choices |= {"mode": (None, *SEGMENTATION_MODES)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                listed = ", ".join(filter(None, known))
                raise ValueError(f"{name} is {getattr(self, name)!r}. It must be one of {listed}. Correct it.")
        if self.framework in FROZEN_TOWER and self.select not in (HEAD, OWN):
            raise ValueError(
                f"select is {self.select!r} with framework {self.framework!r}, which never trains the tower. It must "
                f"be {HEAD!r} or {OWN!r}. Correct one of them."
            )
        how_many(self.fraction, 1)
        for name in ("tower_rate", "lora_rank", "decoder_channels", "gradient_batches"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}. It must be positive. Correct it.")
        _head_options(self)


@dataclass(frozen=True)
class FinetuneResult:
    """What training gave.

    Args:
        model: The trained segmenter.
        selection: Which layers trained; None where no rule chose.
        report: Configuration, scores before and after, training cost beside that of full fine-tuning, seconds.
    """

    model: OpenVocabularyModel
    selection: LayerSelection | None
    report: dict[str, Any]


def finetune(
    clip: SparseCLIPModel,
    processor: Any,
    folders: tuple[SegmentationFolder, SegmentationFolder],
    config: FinetuneConfig,
    output: str | Path,
    *,
    resume: bool = False,
    pruning_report: Any = None,
    on_stage: Callable[[str], object] = lambda line: None,
    progress: bool = False,
) -> FinetuneResult:
    """Train a segmentation head and the selected layers of the tower, and save model, processor and report.

    Checkpoints lie beside the output, in `OUTPUT.checkpoints`, until the run is done; `resume` goes on from the last.

    Args:
        clip: The CLIP, dense or pruned; not changed.
        processor: Its processor.
        folders: Images and masks to train on, and others of the same classes to score on.
        config: How.
        output: New, empty, or an earlier output.
        resume: Whether to go on from a checkpoint of the same configuration.
        pruning_report: For rule "damage": the `PruningReport` of the CLIP.
        on_stage: Called with a line on what comes next.
        progress: Whether Trainer shows its bar.

    Raises:
        FileExistsError: If the output holds something else.
        ValueError: If the data sets differ in their classes, or there is nothing, or something else, to resume from.
    """
    target = check_output_folder(output, marker=REPORT_FILE)
    checkpoints = checkpoints_of(target)
    train, evaluate = folders
    if train.class_names != evaluate.class_names:
        raise ValueError(
            f"Training has {len(train.class_names)} classes and evaluation {len(evaluate.class_names)}, or in another "
            "order. Both must be the same. Give two splits of one data set."
        )
    last = find_checkpoint(checkpoints, config, resume, clip)
    ready = prepare(
        clip,
        processor,
        folders,
        config,
        checkpoints,
        pruning_report=pruning_report,
        on_stage=on_stage,
        progress=progress,
    )
    model, trainer = ready.model, ready.trainer
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
        "training_cost": {name: cost.to_dict() for name, cost in ready.costs.items()},
        "samples": config.samples * trainer.args.world_size,
        "seconds": seconds,
        "trained_layers": list(ready.selection.names) if ready.selection else config.select,
    }

    def save_more(folder: Path) -> None:
        processor.save_pretrained(folder)
        if ready.selection is not None:
            ready.selection.save(folder / SELECTION_FILE)

    ready.merge()
    save_run(target, model, report, save_more)
    return FinetuneResult(model, ready.selection, report)


@dataclass(frozen=True)
class ReadyToTrain:
    """A segmenter with everything that its training needs.

    Args:
        model: What must not train is frozen.
        trainer: Of the model.
        selection: Which layers train; None where no rule chose.
        costs: Of a training step: "selected" as the model stands, and "full" for the whole tower and the head.
        merge: Puts low-rank updates into the layers that they belong to; to be called after training.
    """

    model: OpenVocabularyModel
    trainer: SegmentationTrainer
    selection: LayerSelection | None
    costs: dict[str, TrainingCost]
    merge: Callable[[], object]


def prepare(
    clip: SparseCLIPModel,
    processor: Any,
    folders: tuple[SegmentationFolder, SegmentationFolder],
    config: FinetuneConfig,
    checkpoints: Path,
    *,
    classes: Sequence[int] | None = None,
    pruning_report: Any = None,
    on_stage: Callable[[str], object] = lambda line: None,
    progress: bool = False,
) -> ReadyToTrain:
    """Put a new head on a CLIP, select and freeze layers, and build the Trainer.

    Args:
        clip: The CLIP, dense or pruned; not changed.
        processor: Its processor.
        folders: Images and masks to train on, and others of the same classes to score on.
        config: How.
        checkpoints: Folder for Trainer's checkpoints.
        classes: Positions of the classes to train and to score on; pixels of others do not count. Defaults to all.
        pruning_report: For rule "damage": the `PruningReport` of the CLIP.
        on_stage: Called with a line on what comes next.
        progress: Whether Trainer shows its bar.
    """
    torch.manual_seed(config.seed)
    model: Any = FRAMEWORKS[config.framework].from_clip(clip, **_head_options(config))
    side = config.resolution or int(model.vision_model.config.image_size)
    datasets = [
        SegmentationDataset(
            folder,
            processor.image_processor,
            resolution=side,
            is_training=is_training,
            classes=classes,
            seed=config.seed,
        )
        for folder, is_training in zip(folders, (True, False), strict=True)
    ]
    if hasattr(model.config, "seen_classes"):  # of the ensemble: what training shows
        model.config.seen_classes = list(datasets[0].class_names)
    synonyms = class_synonyms(model, datasets[0].class_names, processor.tokenizer, config.synonyms)
    teacher = _teacher(clip, processor.image_processor, model)
    batches = _batches(model, datasets[0], config, synonyms.mean(), teacher)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.vision_model.requires_grad_(True)
    costs = {"full": training_cost(model, batches[0])}  # the text tower never trains
    if config.select == OWN:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
    on_stage(f"Selecting layers by {config.select!r}")
    selection, merge = _select(model, config, batches, pruning_report)
    _freeze_unread(model, batches[0])
    costs["selected"] = training_cost(model, batches[0])
    trainer = _trainer(model, config, checkpoints, synonyms, datasets, teacher, progress)
    return ReadyToTrain(model, trainer, selection, costs, merge)


def _head_options(config: FinetuneConfig) -> dict[str, Any]:
    """Return the fields of the framework's configuration.

    Raises:
        ValueError: If one is unknown.
    """
    kind = FRAMEWORKS[config.framework]
    known = {item.name for item in fields(cast("Any", kind.config_class))}
    unknown = sorted(set(config.head_options) - known)
    if unknown:
        raise ValueError(
            f"head_options holds {', '.join(unknown)}. {cast('Any', kind.config_class).__name__} has no such field. "
            "Correct it."
        )
    if config.framework == "deeplabv3plus":
        options = {"decoder_channels": config.decoder_channels, "clip_residual": config.clip_residual}
    else:
        options = {"cost_residual": config.clip_residual} if config.framework == "catseg" else {}
    if config.mode is not None:
        options |= {"segmentation_mode": config.mode, "segmentation_reduced": None}
    return options | config.head_options


def _freeze_unread(model: OpenVocabularyModel, batch: dict[str, Any]) -> None:
    """Freeze what no gradient reaches, such as queries that the mode does not read: several processes wait for it."""
    moved = send_to_device(batch, model.device)
    cast("Any", model)(**moved).loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.requires_grad_(False)
    model.zero_grad(set_to_none=True)


def class_synonyms(
    model: OpenVocabularyModel, class_names: tuple[str, ...], tokenizer: Any, mode: str = MEAN
) -> SynonymSampler:
    """Return the names of the classes, embedded, of which training takes what `mode` says."""
    vocabulary = Vocabulary(class_names, templates=cast("Any", model.config).segmentation_templates)
    return SynonymSampler(model.eval().encode_vocabulary(vocabulary, tokenizer), mode)


def class_embeddings(model: OpenVocabularyModel, class_names: tuple[str, ...], tokenizer: Any) -> torch.Tensor:
    """Return one unit embedding per class, the mean over its aliases, of shape `(classes, dim)`."""
    return class_synonyms(model, class_names, tokenizer).mean()


def _teacher(clip: SparseCLIPModel, image_processor: Any, model: OpenVocabularyModel) -> RegionTeacher | None:
    """Return what embeds regions, for a model that learns from them."""
    config: Any = model.config
    if getattr(config, "distillation", "none") == "none":
        return None
    return RegionTeacher(clip, image_processor, max_regions=config.max_regions)


def _batches(
    model: OpenVocabularyModel,
    dataset: Dataset[Any],
    config: FinetuneConfig,
    text: torch.Tensor,
    teacher: RegionTeacher | None,
) -> list[dict[str, Any]]:
    """Return some batches of their own random crops, the same whether a run is resumed or not."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        generator = torch.Generator().manual_seed(config.seed)
        loader = DataLoader(dataset, config.batch_size, shuffle=True, generator=generator)
        count = config.gradient_batches if config.select in WITH_BATCHES else 1
        batches = [{**batch, "text_embeddings": text} for batch in itertools.islice(loader, count)]
        if teacher is not None:
            ignored = cast("Any", model.config).semantic_loss_ignore_index
            for batch in batches:
                batch["region_embeddings"] = teacher.embed(batch["pixel_values"], batch["labels"], ignored)
        return batches


def _select(
    model: OpenVocabularyModel,
    config: FinetuneConfig,
    batches: list[dict[str, Any]],
    pruning_report: Any,
) -> tuple[LayerSelection | None, Callable[[], object]]:
    """Freeze what shall not train; return the selection, and what to call after training."""
    if config.select in (EVERYTHING, OWN):
        return None, int
    if config.select == HEAD:
        model.vision_model.requires_grad_(False)
        return None, int
    if config.select == LORA:
        return None, _add_lora(model, config)
    selection = select_layers(
        model,
        config.select,
        config.fraction,
        config.granularity,
        target_modules=TOWER,
        seed=config.seed,
        batches=batches if config.select in WITH_BATCHES else None,
        pruning_report=pruning_report,
    )
    freeze_unselected(model, selection, ["head"])
    return selection, int


def _add_lora(model: OpenVocabularyModel, config: FinetuneConfig) -> Callable[[], object]:
    """Put PEFT's low-rank updates on all linear layers of the tower, in place; return what merges them."""
    require("train", "peft")
    from peft import LoraConfig, LoraModel

    names = [name for name, layer in find_layers(model, TOWER).items() if "conv" not in layer.type]
    lora = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules=exactly(names))
    tuner: Any = LoraModel(model, lora, "default")
    cast("Any", model).head.requires_grad_(True)
    return tuner.merge_and_unload


def _trainer(
    model: OpenVocabularyModel,
    config: FinetuneConfig,
    checkpoints: Path,
    synonyms: SynonymSampler,
    datasets: list[SegmentationDataset],
    teacher: RegionTeacher | None,
    progress: bool,
) -> SegmentationTrainer:
    args = config.arguments(checkpoints, progress=progress)
    rate = config.tower_rate or (1.0 if config.select == LORA else 0.1)

    def groups(model: Any) -> list[dict[str, Any]]:
        parts = ((model.head, config.learning_rate), (model.vision_model, config.learning_rate * rate))
        found = [{"params": [p for p in part.parameters() if p.requires_grad], "lr": lr} for part, lr in parts]
        return [group for group in found if group["params"]]

    train, evaluate = datasets
    trainer = SegmentationTrainer(
        model,
        args,
        text_embeddings=synonyms.mean(),
        synonyms=None if config.synonyms == MEAN else synonyms,
        teacher=teacher,
        train_dataset=train,
        eval_dataset=evaluate,
        parameter_groups=groups,
    )
    trainer.remove_callback(PrinterCallback)  # figures go into the report, not to standard output
    return trainer


def _scores(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[f"eval_{name}"] for name in ("loss", "mean_iou", "pixel_accuracy")}
