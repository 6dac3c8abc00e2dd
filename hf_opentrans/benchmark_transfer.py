"""One subnetwork in every framework: towers pruned once, the same heads and data for all, seen and unseen names."""

import hashlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback

from hf_opentrans.benchmark_layer_selection import Study
from hf_opentrans.benchmark_rows import RowFile, duration
from hf_opentrans.benchmark_transfer_tables import (
    ALPHA,
    CONSTANT,
    DENSE,
    FULL,
    HEAD,
    OURS,
    TRAINING_FREE,
    TransferRow,
    TransferTiming,
)
from hf_opentrans.data.metrics import MeanIoU
from hf_opentrans.models.modeling_dense_clip import DenseCLIPForSegmentation
from hf_opentrans.models.modeling_open_vocabulary import OpenVocabularyModel
from hf_opentrans.models.vocabulary import Vocabulary
from hf_opentrans.pruning.latency_timing import milliseconds
from hf_opentrans.pruning.macs import count_macs
from hf_opentrans.pruning.plan import PruningConfig
from hf_opentrans.pruning.prune import prune_model
from hf_opentrans.training.cached_features import CachedFeatures, RegionEmbedder, collate_features
from hf_opentrans.training.finetune import FRAMEWORKS, FinetuneConfig, class_embeddings
from hf_opentrans.training.regions import RegionTeacher
from hf_opentrans.training.segmentation import SegmentationDataset, SegmentationTrainer

CONTROLS = ("magnitude", "random")
EVERYWHERE, TWICE = 0.5, 0.65  # budget of all frameworks; the second one of TWICE_IN
TWICE_IN = (TRAINING_FREE, "deeplabv3plus")
JOINED_IN = "deeplabv3plus"
STUDIED = (TRAINING_FREE, *FRAMEWORKS)
TIMED_ROUNDS, WARM_UP = 15, 3
IGNORED = 255
_QUERIES = {
    "hidden_dim": 64,
    "num_queries": 20,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward_dim": 128,
    "num_attention_heads": 4,
}
# Mask queries learn slowly: more and smaller steps.
QUERY_FRAMEWORKS, QUERY_STEPS = ("fcclip", "gkc"), 3
# As DeepLabV3+ (by the schedule), all are 64 wide but CAT-Seg: it has one map per class.
HEADS: dict[str, dict[str, Any]] = {
    "fcclip": _QUERIES,
    "gkc": {**_QUERIES, "clip_residual": True},
    "catseg": {
        "cost_channels": 32,
        "aggregation_blocks": 1,
        "decoder_channels": (16, 8),
        "guidance_channels": 32,
        "text_guidance_channels": 32,
    },
}


@dataclass(frozen=True, order=True)
class Run:
    """One row to measure: seed by seed, so that an interrupted study has whole seeds.

    Args:
        seed: Of everything.
        framework, method, keep, trained: See [`TransferRow`].
    """

    seed: int
    framework: str
    method: str
    keep: float
    trained: str

    @property
    def key(self) -> tuple[str, str, float, str, int]:
        """As `TransferRow.key`."""
        return self.framework, self.method, self.keep, self.trained, self.seed

    @property
    def kind(self) -> tuple[str, str]:
        """What decides how long it takes."""
        return self.framework, self.trained


def plan_transfer(frameworks: Sequence[str], seeds: Iterable[int]) -> list[Run]:
    """List the runs: every tower in every framework, the constant class, and the joined rows.

    Raises:
        ValueError: If a framework is unknown.
    """
    for framework in frameworks:
        if framework not in STUDIED:
            raise ValueError(f"framework is {framework!r}. It must be one of {', '.join(STUDIED)}. Correct it.")
    runs = []
    for seed in seeds:
        runs.append(Run(seed, CONSTANT, CONSTANT, 1.0, ""))
        for framework in frameworks:
            trained = "" if framework == TRAINING_FREE else HEAD
            runs.append(Run(seed, framework, DENSE, 1.0, trained))
            keeps = (TWICE, EVERYWHERE) if framework in TWICE_IN else (EVERYWHERE,)
            runs += [Run(seed, framework, m, keep, trained) for keep in keeps for m in (OURS, *CONTROLS)]
            if framework == JOINED_IN:
                runs += [Run(seed, framework, DENSE, 1.0, FULL), Run(seed, framework, OURS, TWICE, ALPHA)]
    return runs


class TransferFile(RowFile[TransferRow]):
    """The rows of `benchmark transfer`, and the timings of its towers; see `RowFile`."""

    row_type, written_by = TransferRow, "benchmark transfer"

    def __init__(self, path: Path | None, settings: dict[str, Any], command: str) -> None:
        self.timings: list[TransferTiming] = []
        super().__init__(path, settings, command)

    def read_more(self, values: dict[str, Any]) -> None:
        """Take the timings from the file's object."""
        self.timings = [TransferTiming(**timing) for timing in values["timings"]]

    def more(self) -> dict[str, Any]:
        """Return the timings for the file's object."""
        return {"timings": [timing.to_dict() for timing in self.timings]}


@dataclass
class TransferStudy:
    """Prunes every tower once per seed, puts it into frameworks, trains heads on kept features, and scores.

    Args:
        study: CLIP, processor, data and schedule, shared with the study of layer selection.
        images: Unlabelled images to prune with.
        num_images: How many of them at most.
        copies: Crops per training image whose features are kept.
    """

    study: Study
    images: Sequence[Any]
    num_images: int = 256
    copies: int = 2
    _towers: dict[tuple[str, float, int], DenseCLIPForSegmentation] = field(default_factory=dict, repr=False)
    _teachers: dict[int, "RememberedRegions"] = field(default_factory=dict, repr=False)

    def measure(self, run: Run) -> TransferRow:
        """Do one run."""
        if run.framework == CONSTANT:
            return self._constant(run)
        tower = self.tower(run.method, run.keep, run.seed)
        if run.framework == TRAINING_FREE:
            return self._score(run, tower)
        if run.trained != HEAD:
            return self._train_tower(run, tower)
        model, losses, seconds = self._train_head(run, tower)
        return replace(self._score(run, model), first_loss=losses[0], last_loss=losses[-1], seconds=seconds)

    def tower(self, method: str, keep: float, seed: int) -> DenseCLIPForSegmentation:
        """Return a training-free segmenter on the dense tower, or with a subnetwork transferred into it."""
        dense = DenseCLIPForSegmentation.from_clip(self.study.clip, **self._mode).eval()
        if method == DENSE:
            return dense
        key = method, keep, seed
        if key not in self._towers:
            self._towers = {kept: tower for kept, tower in self._towers.items() if kept[2] == seed}
            config = PruningConfig(
                keep=keep, method=method, seed=seed, num_images=self.num_images, resolution=self.study.side
            )
            processor = self.study.processor.image_processor
            pruned = prune_model(dense, self.images, config, image_processor=processor)
            moved = pruned.subnetwork.apply_to(dense)
            self._towers[key] = DenseCLIPForSegmentation.from_clip(cast("Any", moved.model)).eval()
        return self._towers[key]

    @property
    def _mode(self) -> dict[str, Any]:
        mode = self.study.config.mode
        return {} if mode is None else {"segmentation_mode": mode, "segmentation_reduced": None}

    def segmenter(self, framework: str, tower: DenseCLIPForSegmentation, seed: int = 0) -> OpenVocabularyModel:
        """Put an untrained head on a tower."""
        if framework == TRAINING_FREE:
            return tower
        torch.manual_seed(seed)
        options = dict(HEADS.get(framework, {"decoder_channels": self.study.config.decoder_channels}))
        if framework == "catseg":  # a calm start, see its configuration
            options["classifier_bias"] = -self._mean_logit(tower)
        return cast("Any", FRAMEWORKS[framework]).from_clip(tower, **options).eval()

    @torch.no_grad()
    def _mean_logit(self, tower: DenseCLIPForSegmentation) -> float:
        data = self._dataset(None, is_training=False)
        pixels = torch.stack([data[index]["pixel_values"] for index in range(min(8, len(data)))])
        text = class_embeddings(tower, self.study.train.class_names, self.study.processor.tokenizer)
        return float(cast("Any", tower(pixels.to(tower.device), text_embeddings=text).logits).mean())

    def _dataset(self, classes: list[int] | None, *, is_training: bool, seed: int = 0) -> SegmentationDataset:
        folder = self.study.train if is_training else self.study.evaluate
        processor, side = self.study.processor.image_processor, self.study.side
        given: dict[str, Any] = {"resolution": side, "is_training": is_training, "classes": classes, "seed": seed}
        return SegmentationDataset(folder, processor, ignore_index=IGNORED, **given)

    def _train_head(self, run: Run, tower: DenseCLIPForSegmentation) -> tuple[OpenVocabularyModel, list[float], float]:
        config, start = self._schedule(run), time.perf_counter()
        model: Any = self.segmenter(run.framework, tower, run.seed)
        crops = self._dataset(self.study.seen_classes(run.seed), is_training=True, seed=run.seed)
        if hasattr(model.config, "seen_classes"):
            model.config.seen_classes = list(crops.class_names)
        teacher = self._teacher(run.seed) if run.framework == "gkc" else None
        data = CachedFeatures(model, crops, copies=self.copies, batch_size=config.batch_size, teacher=teacher)
        text = class_embeddings(model, crops.class_names, self.study.processor.tokenizer)
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        with TemporaryDirectory() as folder:
            trainer = SegmentationTrainer(
                model,
                config.arguments(Path(folder), progress=False),
                text_embeddings=text,
                train_dataset=data,
                data_collator=collate_features,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return model.eval(), losses, time.perf_counter() - start

    def _schedule(self, run: Run) -> FinetuneConfig:
        config = replace(self.study.config, seed=run.seed)
        if run.framework not in QUERY_FRAMEWORKS:
            return config
        steps, batch_size = QUERY_STEPS * config.steps, max(1, config.batch_size // 2)
        return replace(config, steps=steps, batch_size=batch_size, save_every=steps + 1)

    def expected_seconds(self, run: Run) -> float:
        """Time one step of a run's training on the dense tower; return what all of its steps would take."""
        if not run.trained:
            return 0.0
        model: Any = self.segmenter(run.framework, self.tower(DENSE, 1.0, run.seed), run.seed)
        config, crops = self._schedule(run), self._dataset(self.study.seen_classes(run.seed), is_training=True)
        batch = next(iter(DataLoader(crops, config.batch_size)))
        text = class_embeddings(model, crops.class_names, self.study.processor.tokenizer)
        pixels, labels = batch["pixel_values"].to(model.device), batch["labels"].to(model.device)
        given = {"pixel_values": pixels}
        if run.trained == HEAD:
            with torch.no_grad():
                given = {"features": model.encode(pixels)}

        def step() -> None:
            model.train()(**given, labels=labels, text_embeddings=text).loss.backward()

        step()  # the first one is slower
        return config.steps * milliseconds(step, pixels.device) / 1e3

    def _teacher(self, seed: int) -> "RememberedRegions":
        if seed not in self._teachers:
            teacher = RegionTeacher(self.study.clip, self.study.processor.image_processor, side=self.study.side)
            self._teachers = {seed: RememberedRegions(teacher)}
        return self._teachers[seed]

    def _train_tower(self, run: Run, tower: DenseCLIPForSegmentation) -> TransferRow:
        row = replace(self.study, clip=tower).run(run.trained, run.seed)
        counted = self._costs(self.segmenter(run.framework, tower))
        quality = row.seen, row.unseen, row.pixel_accuracy
        return TransferRow(
            *(run.framework, run.method, run.keep, run.seed, run.trained, *quality),
            **counted,
            training_macs=row.macs_per_sample,
            seconds=row.seconds,
            seen_classes=row.seen_classes,
        )

    @torch.inference_mode()
    def _score(self, run: Run, model: OpenVocabularyModel) -> TransferRow:
        names = self.study.evaluate.class_names
        vocabulary = self._vocabulary(model)
        owners = vocabulary.query_to_class.to(model.device)
        metric = MeanIoU(len(names), IGNORED)
        for batch in DataLoader(self._dataset(None, is_training=False), self.study.config.batch_size):
            pixels = batch["pixel_values"].to(model.device)
            logits: Any = cast("Any", model.eval())(pixels, vocabulary=vocabulary).logits
            full = interpolate(logits.float(), batch["labels"].shape[-2:], mode="bilinear", align_corners=False)
            metric.update(owners[full.argmax(1)].cpu(), batch["labels"])
        scores = metric.compute()
        row = self._row(run, scores.per_class_iou, scores.pixel_accuracy)
        return replace(row, **self._costs(model))

    def _vocabulary(self, model: OpenVocabularyModel) -> Vocabulary:
        templates = cast("Any", model.config).segmentation_templates
        vocabulary = Vocabulary(self.study.evaluate.class_names, templates=templates)
        return model.encode_vocabulary(vocabulary, self.study.processor.tokenizer)

    def _row(self, run: Run, ious: Sequence[float], pixel_accuracy: float) -> TransferRow:
        classes, every = self.study.seen_classes(run.seed), np.asarray(ious)
        is_seen = np.isin(np.arange(len(every)), classes)
        seen, unseen = (float(np.nanmean(every[chosen])) for chosen in (is_seen, ~is_seen))
        names = [self.study.train.class_names[index] for index in classes]
        parts = run.framework, run.method, run.keep, run.seed, run.trained, seen, unseen, pixel_accuracy
        return TransferRow(*parts, seen_classes=names)

    def _constant(self, run: Run) -> TransferRow:
        """Score the most frequent class everywhere: of the seen ones for "seen", of the others for "unseen"."""
        pixels = self._pixels_per_class
        seen = self.study.seen_classes(run.seed)
        others = [index for index in range(len(pixels)) if index not in seen]
        ious = np.where(pixels > 0, 0.0, np.nan)  # classes that no image shows do not count
        for group in (seen, others):
            best = max(group, key=lambda index: pixels[index])
            ious[best] = pixels[best] / pixels.sum()
        return self._row(run, ious.tolist(), float(pixels.max() / pixels.sum()))

    @cached_property
    def _pixels_per_class(self) -> np.ndarray:
        data, counts = self._dataset(None, is_training=False), np.zeros(len(self.study.evaluate.class_names))
        for sample in data:
            labels = sample["labels"]
            counts += np.bincount(labels[labels != IGNORED].flatten(), minlength=len(counts))
        return counts

    @torch.no_grad()
    def _costs(self, model: OpenVocabularyModel) -> dict[str, int]:
        side, vision = self.study.side, cast("Any", model).vision_model
        pixels = torch.zeros(1, 3, side, side, device=model.device)
        vocabulary = self._vocabulary(model)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
            model(pixels, vocabulary=vocabulary)
        text = ("text_model.", "text_projection.")
        params = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(text))
        tower = count_macs(vision.config, resolution=side, projection=False)
        return {"macs": counter.get_total_flops() // 2, "params": params, "tower_macs": tower}

    @torch.inference_mode()
    def time(self, framework: str, method: str, keep: float, seed: int) -> TransferTiming:
        """Time a framework with a pruned and with the dense tower in turn, on one image and all names."""
        towers = self.tower(DENSE, 1.0, seed), self.tower(method, keep, seed)
        pair: list[Any] = [self.segmenter(framework, tower) for tower in towers]
        pixels = torch.randn(1, 3, self.study.side, self.study.side, device=pair[0].device)
        vocabulary = self._vocabulary(pair[0])  # the text tower is the same
        times = []
        for index in range(WARM_UP + TIMED_ROUNDS):
            both = [milliseconds(lambda m=m: m(pixels, vocabulary=vocabulary), pixels.device) for m in pair]
            times += [both] if index >= WARM_UP else []
        dense, pruned = (statistics.median(column) for column in zip(*times, strict=True))
        speed_up = statistics.median(row[0] / row[1] for row in times)
        return TransferTiming(framework, method, keep, dense, pruned, speed_up)


class RememberedRegions:
    """A teacher that computes the regions of a batch once: all towers of a seed see the same crops."""

    def __init__(self, teacher: RegionEmbedder) -> None:
        self.teacher = teacher
        self._known: dict[bytes, Sequence[torch.Tensor]] = {}

    def embed(self, pixel_values: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> Sequence[torch.Tensor]:
        """See `RegionTeacher.embed`."""
        digest = hashlib.blake2b(pixel_values.cpu().numpy().tobytes())
        digest.update(labels.cpu().numpy().tobytes())
        key = digest.digest()
        if key not in self._known:
            self._known[key] = self.teacher.embed(pixel_values, labels, ignore_index)
        return self._known[key]


def run_transfer(
    study: TransferStudy,
    runs: Sequence[Run],
    results: TransferFile,
    *,
    say: Callable[[str], None] = lambda line: None,
    timed: bool = True,
) -> None:
    """Do all runs that `results` does not hold yet; then time every framework with every tower.

    Args:
        study: Does them.
        runs: From `plan_transfer`.
        results: Takes the rows.
        say: Called with a line on what is done, and how long the rest will take.
        timed: Whether to take times.
    """
    done = {row.key for row in results.rows}
    left = [run for run in runs if run.key not in done]
    say(f"{len(runs)} runs: {len(runs) - len(left)} in the file already, {len(left)} to do.")
    expected = {run.kind: study.expected_seconds(run) for run in reversed(left)}
    if left:
        say(f"Training will take about {duration(sum(expected[run.kind] for run in left))}, and pruning beside it.")
    spent: dict[tuple[str, str], list[float]] = {}
    for number, run in enumerate(left, 1):
        start = time.perf_counter()
        row = study.measure(run)
        results.add(row)
        spent.setdefault(run.kind, []).append(time.perf_counter() - start)
        expected[run.kind] = statistics.fmean(spent[run.kind])
        rest = duration(sum(expected[other.kind] for other in left[number:]))
        what = f"{run.framework}, {run.method} at {run.keep:g}, seed {run.seed}"
        say(
            f"{number} of {len(left)}: {what}: mIoU {row.seen:.1%} seen, {row.unseen:.1%} unseen."
            + (f" About {rest} left." if number < len(left) else "")
        )
    if timed:
        _time_all(study, runs, results, say)
    results.save(at_end=True)


def _time_all(study: TransferStudy, runs: Sequence[Run], results: TransferFile, say: Callable[[str], None]) -> None:
    known = {(timing.framework, timing.method, timing.keep) for timing in results.timings}
    pruned = [run for run in runs if run.method not in (DENSE, CONSTANT) and run.trained in ("", HEAD)]
    wanted = dict.fromkeys((run.framework, run.method, run.keep) for run in pruned)
    left = [each for each in wanted if each not in known]
    if left:
        say(f"Timing {len(left)} pairs of towers. Nothing else should run meanwhile.")
    for (framework, method, keep), seed in itertools.product(left, [min(run.seed for run in runs)]):
        results.timings.append(study.time(framework, method, keep, seed))
        results.save()
