"""Which layers to train: every rule with the same head, data and seeds, scored on seen and on unseen names."""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from hf_opentrans.benchmark_memory import PeakMemory
from hf_opentrans.benchmark_rows import RowFile, duration
from hf_opentrans.benchmark_selection_tables import BASE, FULL, UNTRAINED, SelectionRow, StepTiming
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.data.metrics import MeanIoU
from hf_opentrans.evaluation import evaluate_segmentation, folder_samples
from hf_opentrans.models.modeling_open_vocabulary import OpenVocabularyModel
from hf_opentrans.models.processing_open_vocabulary import OpenVocabularyProcessor
from hf_opentrans.training.finetune import FinetuneConfig, ReadyToTrain, class_embeddings, prepare
from hf_opentrans.training.segmentation import SegmentationDataset

STUDIED = (FULL, BASE, "alpha_star", "random", "ensemble", "gradient", "depth", "lora")
TIMED_ROUNDS, WARM_UP = 7, 2


class SelectionFile(RowFile[SelectionRow]):
    """The rows of `benchmark layer-selection`, and the timings of its rules; see `RowFile`."""

    row_type, written_by = SelectionRow, "benchmark layer-selection"

    def __init__(self, path: Path | None, settings: dict[str, Any], command: str) -> None:
        self.timings: list[StepTiming] = []
        super().__init__(path, settings, command)

    def read_more(self, values: dict[str, Any]) -> None:
        """Take the timings from the file's object."""
        self.timings = [StepTiming(**timing) for timing in values["timings"]]

    def more(self) -> dict[str, Any]:
        """Return the timings for the file's object."""
        return {"timings": [timing.to_dict() for timing in self.timings]}


@dataclass(frozen=True)
class Study:
    """What all runs share.

    Args:
        clip: The CLIP with both towers.
        processor: Its processor.
        train, evaluate: Two splits of one data set.
        config: Of training; rule and seed are set run by run.
        seen: Share of the classes that the head is trained with, in (0, 1).

    Raises:
        ValueError: If a share leaves no class on one side.
    """

    clip: OpenVocabularyModel
    processor: OpenVocabularyProcessor
    train: SegmentationFolder
    evaluate: SegmentationFolder
    config: FinetuneConfig
    seen: float = 0.5

    def __post_init__(self) -> None:
        count = len(self.train.class_names)
        if not 0 < round(self.seen * count) < count:
            raise ValueError(
                f"seen is {self.seen:g}: the head sees {round(self.seen * count)} of {count} classes. It must see "
                "some and not all. Choose another share."
            )

    @property
    def side(self) -> int:
        """Side of the crops in pixels."""
        return self.config.resolution or int(self.clip.vision_model.config.image_size)  # pyright: ignore[reportArgumentType]

    def seen_classes(self, seed: int) -> list[int]:
        """Draw the classes that the head sees; the same for all rules."""
        count = len(self.train.class_names)
        drawn = np.random.default_rng(seed).permutation(count)[: round(self.seen * count)]
        return sorted(drawn.tolist())

    def prepare(self, rule: str, seed: int, folder: str, *, progress: bool = False) -> ReadyToTrain:
        """Build the model and the Trainer of a run."""
        config = replace(self.config, select=rule, seed=seed)
        classes, folders = self.seen_classes(seed), (self.train, self.evaluate)
        return prepare(self.clip, self.processor, folders, config, Path(folder), classes=classes, progress=progress)

    def run(self, rule: str, seed: int, *, progress: bool = False) -> SelectionRow:
        """Train by one rule and score on all classes."""
        with TemporaryDirectory() as folder:
            ready = self.prepare(rule, seed, folder, progress=progress)
            trainable = sum(p.numel() for p in ready.model.parameters() if p.requires_grad)
            with PeakMemory(ready.trainer.args.device) as memory:
                start = time.perf_counter()
                ready.trainer.train()
                seconds = time.perf_counter() - start
        ready.merge()
        scores = self._score(ready.model)
        return replace(
            self._row(rule, seed, *scores),
            macs_per_sample=ready.costs["selected"].per_sample,
            full_macs_per_sample=ready.costs["full"].per_sample,
            trainable_params=trainable,
            seconds=seconds,
            peak_memory_mib=memory.mib,
            trained=None if ready.selection is None else list(ready.selection.names),
        )

    def untrained(self, seeds: Sequence[int]) -> list[SelectionRow]:
        """Score the CLIP itself, without a head, on the classes of every seed."""
        names, samples = self.evaluate.class_names, folder_samples(self.evaluate)
        mode = self.config.mode
        scores = evaluate_segmentation(self.clip, self.processor, samples, names, resolution=self.side, mode=mode)
        return [self._row(UNTRAINED, seed, scores.per_class_iou, scores.pixel_accuracy) for seed in seeds]

    def _row(self, rule: str, seed: int, ious: Sequence[float], pixel_accuracy: float) -> SelectionRow:
        classes, every = self.seen_classes(seed), np.asarray(ious)
        is_seen = np.isin(np.arange(len(every)), classes)
        means = [float(np.nanmean(every[chosen])) for chosen in (is_seen, ~is_seen)]
        names = [self.train.class_names[index] for index in classes]
        return SelectionRow(rule, seed, means[0], means[1], pixel_accuracy, seen_classes=names)

    @torch.inference_mode()
    def _score(self, model: OpenVocabularyModel) -> tuple[tuple[float, ...], float]:
        names, device = self.evaluate.class_names, model.device
        text = class_embeddings(model, names, self.processor.tokenizer).to(device)
        dataset = SegmentationDataset(
            self.evaluate, self.processor.image_processor, resolution=self.side, is_training=False, ignore_index=-100
        )
        metric = MeanIoU(len(names), -100)
        for batch in DataLoader(dataset, self.config.batch_size):
            logits: Any = model.eval()(batch["pixel_values"].to(device), text_embeddings=text).logits
            full = torch.nn.functional.interpolate(logits.float(), batch["labels"].shape[-2:], mode="bilinear")
            metric.update(full.argmax(1).cpu(), batch["labels"])
        scores = metric.compute()
        return scores.per_class_iou, scores.pixel_accuracy

    def time(self, rule: str, seed: int) -> StepTiming:
        """Time training steps of a rule and of the whole tower in turn, on one batch."""
        with TemporaryDirectory() as folder:
            pair = [self.prepare(name, seed, folder) for name in (FULL, rule)]
            batch = next(iter(pair[0].trainer.get_train_dataloader()))
            batch = {**batch, "text_embeddings": pair[0].trainer.text_embeddings.to(batch["labels"].device)}
            steps = [_Step(ready, batch) for ready in pair]
            # One after the other: what a step leaves behind (gradients, optimiser state) is part of its memory.
            memories = [step.memory() for step in steps]
            times = [[step.seconds() for step in steps] for _ in range(TIMED_ROUNDS)]
        full, this = (statistics.median(column) for column in zip(*times, strict=True))
        speed_up = statistics.median(row[0] / row[1] for row in times)
        return StepTiming(rule, 1e3 * this, 1e3 * full, speed_up, memories[1], memories[0])


class _Step:
    """Training steps on one batch."""

    def __init__(self, ready: ReadyToTrain, batch: dict[str, Any]) -> None:
        self.model, self.batch = ready.model.train(), batch
        self.optimizer: Any = ready.trainer.create_optimizer()
        self.device = ready.trainer.args.device

    def __call__(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self) -> float | None:
        """Return the memory that steps need beside what is there, in MiB."""
        gc.collect()
        with PeakMemory(self.device) as before:
            pass
        with PeakMemory(self.device) as during:
            for _ in range(WARM_UP):
                self()
        return None if during.mib is None or before.mib is None else during.mib - before.mib

    def seconds(self) -> float:
        """Return the wall time of one step."""
        start = time.perf_counter()
        self()
        return time.perf_counter() - start


def run_study(
    study: Study,
    rules: Sequence[str],
    seeds: Sequence[int],
    results: SelectionFile,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> None:
    """Do all runs that `results` does not hold yet, seed by seed; then time the steps of all rules.

    Args:
        study: What all runs share.
        rules: Rules of `FinetuneConfig.select`.
        seeds: One run each per rule.
        results: Takes the rows.
        say: Called with a line on what is done, and how long the rest will take.
        progress: Whether Trainer shows its bar.
    """
    done = {row.key for row in results.rows}
    left = [(rule, seed) for seed, rule in itertools.product(seeds, rules) if (rule, seed) not in done]
    untried = [seed for seed in seeds if (UNTRAINED, seed) not in done]
    timed = {timing.rule for timing in results.timings}
    untimed = [rule for rule in rules if rule != FULL and rule not in timed]
    count = len(rules) * len(seeds)
    say(f"{count} runs: {count - len(left)} in the file already, {len(left)} to do.")
    for row in study.untrained(untried) if untried else []:
        results.add(row)
    for number, (rule, seed) in enumerate(left, 1):
        row = study.run(rule, seed, progress=progress)
        results.add(row)
        spent = [other.seconds for other in results.rows if other.seconds is not None]
        rest = duration(statistics.fmean(spent) * (len(left) - number))
        say(
            f"{number} of {len(left)}: {rule}, seed {seed}: mIoU {row.seen:.1%} seen, {row.unseen:.1%} unseen, "
            f"trained in {duration(row.seconds or 0)}." + (f" About {rest} left." if number < len(left) else "")
        )
    if untimed:
        say(f"Timing the steps of {len(untimed)} rules. Nothing else should run meanwhile.")
    for rule in untimed:
        results.timings.append(study.time(rule, seeds[0]))
        results.save()
    results.save(at_end=True)
