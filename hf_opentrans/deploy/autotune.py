"""Measure an elastic segmenter on this device, and choose budget, resolution and inference that are fast enough."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch

from hf_opentrans._files import write_json
from hf_opentrans.loading import SAFE, quiet_transformers, resolve_model
from hf_opentrans.models.image_loading import ImageInput, as_list
from hf_opentrans.models.modeling_elastic_clip import ElasticCLIPForSegmentation
from hf_opentrans.models.processing_open_vocabulary import OpenVocabularyProcessor
from hf_opentrans.models.segmenting import INFERENCES, SLIDE_RATIO
from hf_opentrans.pruning.latency_timing import device_of, milliseconds

# What is compared first, second and third among settings that are fast enough.
ORDER = ("budget", "resolution", "inference")
# A setting this many times slower than the limit in its first timed run is not run again.
HOPELESS = 3.0
SHAPES = 4  # images that are timed at most
_NAMES = "budget, resolution and inference, each once"


@dataclass(frozen=True)
class Candidate:
    """One setting, measured.

    Args:
        budget: Share of the dense model.
        resolution: Short side in pixels.
        inference: "whole" or "slide".
        fidelity: Cosine of the budget's patch tokens to the dense model's, as the checkpoint says; or None.
        milliseconds: Median time of one image, from pixels to dense tokens.
        runs: Timed runs; 1 where the first was too slow by far.
        fits: Whether the median is within the limit.
    """

    budget: float
    resolution: int
    inference: str
    fidelity: float | None
    milliseconds: float
    runs: int
    fits: bool


@dataclass(frozen=True)
class TunedSettings:
    """The best setting that is fast enough on this device, and all that were measured.

    Args:
        budget, resolution, inference: What was chosen; see `Candidate`.
        fidelity: See `Candidate`.
        milliseconds: Median time of one image.
        max_latency_ms: The limit.
        order: What was compared first, second and third.
        device: Where it was measured: processor, accelerator, threads, torch, dtype.
        candidates: All settings, fastest first.
    """

    budget: float
    resolution: int
    inference: str
    fidelity: float | None
    milliseconds: float
    max_latency_ms: float
    order: tuple[str, ...]
    device: dict[str, Any]
    candidates: tuple[Candidate, ...]

    def apply(self, model: ElasticCLIPForSegmentation) -> dict[str, Any]:
        """Set the model's budget; return the options of `segment` that belong to it."""
        model.set_budget(self.budget)
        return {"resolution": self.resolution, "inference": self.inference}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write one JSON object."""
        write_json(path, self.to_dict())


def load_elastic(
    name: str | Path, *, revision: str | None = None
) -> tuple[ElasticCLIPForSegmentation, OpenVocabularyProcessor]:
    """Load an elastic checkpoint as a segmenter, with its processor. No code of the folder is run.

    Args:
        name: A folder that `prune_elastic` wrote, or a Hub id.
        revision: Commit, tag or branch on the Hub.

    Raises:
        ValueError: If it is no elastic CLIP with both towers, or damaged.
    """
    path = resolve_model(name)
    with quiet_transformers():
        model = ElasticCLIPForSegmentation.from_pretrained(path, revision=revision or "main", **SAFE)
        return model.eval(), OpenVocabularyProcessor.from_pretrained(path, revision=revision or "main")


@torch.no_grad()
def autotune(
    model: ElasticCLIPForSegmentation | str | Path,
    processor: OpenVocabularyProcessor | None = None,
    images: ImageInput | Sequence[ImageInput] | None = None,
    *,
    max_latency_ms: float,
    resolutions: Sequence[int] | None = None,
    inferences: Sequence[str] = INFERENCES,
    order: Sequence[str] = ORDER,
    repeats: int = 5,
    device: str | torch.device | None = None,
) -> TunedSettings:
    """Time every budget, resolution and inference on this device, and choose the best that is fast enough.

    Among the settings within the limit the one with the highest fidelity of its budget is chosen, then the largest
    resolution, then "slide" before "whole" (`order` changes what comes first), then the fastest. All settings are
    timed in turn, round after round, so that a busy moment meets all of them.

    Args:
        model: An elastic segmenter, or the folder of one. Its budget is set again as it was.
        processor: Its processor; that of the folder where a folder is given.
        images: What is timed, four at most: their shapes count. Defaults to a square.
        max_latency_ms: Most milliseconds that the median pass of one image may take, from pixels to dense tokens.
        resolutions: Short sides in pixels. Defaults to the processor's, and 1.5 times that.
        inferences: "whole", "slide" or both. Windows as large as the image are "whole": such settings are left out.
        order: "budget", "resolution" and "inference", the most important first.
        repeats: Rounds.
        device: Where to measure; the model is moved there. Defaults to where it is.

    Raises:
        TypeError: If the model is not elastic, or the processor is missing.
        ValueError: If an argument is out of range, or nothing is fast enough: names the fastest.
    """
    if isinstance(model, str | Path):
        model, loaded = load_elastic(model)
        processor = processor or loaded
    elastic = _checked(model, processor)
    reader = cast("OpenVocabularyProcessor", processor)
    sides = list(resolutions or (reader.resolution, round(SLIDE_RATIO * reader.resolution)))
    _check(elastic, sides, inferences, order, repeats, max_latency_ms)
    if device is not None:
        elastic.to(cast("Any", device))
    pixels = {side: _pixels(elastic, reader, images, side) for side in dict.fromkeys(sides)}
    before, training = elastic.budget, elastic.training
    try:
        times = _measure(elastic.eval(), pixels, list(dict.fromkeys(inferences)), repeats, max_latency_ms)
    finally:
        elastic.set_budget(before).train(training)
    found = [_candidate(elastic, setting, taken, max_latency_ms) for setting, taken in times.items()]
    return _choose(found, tuple(order), max_latency_ms, device_of(elastic.vision_model))


Setting = tuple[float, int, str]


def _checked(model: Any, processor: Any) -> ElasticCLIPForSegmentation:
    if not isinstance(model, ElasticCLIPForSegmentation) or not model.budgets:
        raise TypeError(
            f"The model is a {type(model).__name__} without budgets. autotune needs an ElasticCLIPForSegmentation. "
            "Make one with `prune_elastic`, and load its folder."
        )
    if not isinstance(processor, OpenVocabularyProcessor):
        raise TypeError(
            f"The processor is a {type(processor).__name__}. It must be an OpenVocabularyProcessor. Load it from the "
            "model's folder."
        )
    return model


def _check(
    model: ElasticCLIPForSegmentation,
    sides: Sequence[int],
    inferences: Sequence[str],
    order: Sequence[str],
    repeats: int,
    limit: float,
) -> None:
    patch = cast("int", model.vision_model.config.patch_size)
    rules = (
        ("max_latency_ms", limit, limit > 0, "be a positive number of milliseconds", "50"),
        ("resolutions", list(sides), all(side >= patch for side in sides), f"be {patch} pixels or more", "[224, 336]"),
        (
            "inferences",
            list(inferences),
            bool(inferences) and set(inferences) <= set(INFERENCES),
            f"be some of {', '.join(INFERENCES)}",
            str(list(INFERENCES)),
        ),
        ("order", list(order), sorted(order) == sorted(ORDER), f"name {_NAMES}", str(list(ORDER))),
        ("repeats", repeats, repeats >= 1, "be 1 or more", "5"),
    )
    for name, value, is_valid, rule, example in rules:
        if not is_valid:
            raise ValueError(f"{name} is {value!r}. It must {rule}. Use for example {name}={example}.")


def _pixels(
    model: ElasticCLIPForSegmentation, processor: OpenVocabularyProcessor, images: Any, side: int
) -> list[torch.Tensor]:
    """Return one batch of one image for every shape that is timed."""
    patch = cast("int", model.vision_model.config.patch_size)
    where: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    if images is None:
        side = max(side // patch, 1) * patch
        return [torch.randn(1, 3, side, side).to(**where)]
    chosen = as_list(images)[:SHAPES]
    found = [processor(image, resolution=side, size_divisor=patch)["pixel_values"] for image in chosen]
    return [cast("torch.Tensor", batch).to(**where) for batch in found]


def _measure(
    model: ElasticCLIPForSegmentation,
    pixels: dict[int, list[torch.Tensor]],
    inferences: Sequence[str],
    repeats: int,
    limit: float,
) -> dict[Setting, list[float]]:
    """Time all settings, round after round; the first round warms up and is not counted."""
    window = cast("int", model.vision_model.config.image_size)
    settings = [
        (side, inference)
        for side, inference in product(pixels, inferences)
        if inference == "whole" or len(inferences) == 1 or any(max(p.shape[-2:]) > window for p in pixels[side])
    ]
    times: dict[Setting, list[float]] = {}
    for turn in range(repeats + 1):
        for budget in model.budgets:
            model.set_budget(budget)
            for side, inference in settings:
                taken = times.setdefault((budget, side, inference), [])
                if taken and taken[0] > HOPELESS * limit:
                    continue
                passes = [milliseconds(_pass(model, batch, inference), model.device) for batch in pixels[side]]
                if turn:
                    taken.append(statistics.fmean(passes))
    return times


def _pass(model: ElasticCLIPForSegmentation, batch: torch.Tensor, inference: str) -> Callable[[], object]:
    return lambda: model(batch, inference=inference)


def _candidate(model: ElasticCLIPForSegmentation, setting: Setting, taken: Sequence[float], limit: float) -> Candidate:
    budget, side, inference = setting
    entry = cast("list[dict[str, Any]]", model.config.elastic_budgets)[model.budgets.index(budget)]
    median = statistics.median(taken)
    return Candidate(budget, side, inference, entry.get("cosine_patches"), median, len(taken), median <= limit)


def _choose(found: list[Candidate], order: tuple[str, ...], limit: float, device: dict[str, Any]) -> TunedSettings:
    ranked = sorted(found, key=lambda candidate: candidate.milliseconds)
    fitting = [candidate for candidate in ranked if candidate.fits]
    if not fitting:
        best = ranked[0]
        raise ValueError(
            f"No setting takes {limit:g} ms or less on this device. The fastest is budget={best.budget:g} at "
            f"{best.resolution} pixels, {best.inference}, with {best.milliseconds:.1f} ms. Raise max_latency_ms, give "
            "smaller resolutions, or prune to a smaller budget."
        )

    def score(candidate: Candidate) -> tuple[float, ...]:
        fidelity = candidate.budget if candidate.fidelity is None else candidate.fidelity
        values = {
            "budget": fidelity,
            "resolution": float(candidate.resolution),
            "inference": float(candidate.inference == "slide"),
        }
        return (*(values[name] for name in order), -candidate.milliseconds)

    best = max(fitting, key=score)
    return TunedSettings(
        budget=best.budget,
        resolution=best.resolution,
        inference=best.inference,
        fidelity=best.fidelity,
        milliseconds=best.milliseconds,
        max_latency_ms=float(limit),
        order=order,
        device=device,
        candidates=tuple(ranked),
    )


__all__ = ["ORDER", "Candidate", "TunedSettings", "autotune", "load_elastic"]
