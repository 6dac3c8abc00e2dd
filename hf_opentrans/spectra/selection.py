"""Which layers to train and which to freeze."""

import json
import math
import random
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from hf_opentrans._files import write_json

from .analysis import SpectralReport, analyze_spectra
from .gradients import Loss, gradient_scores
from .hierarchy import ensemble_scores
from .layers import MatrixLayer, by_block, find_layers, how_many, matches

# What is trained: the layers with the largest scores.
RULES = {
    "alpha": "light tails train, heavy tails freeze (OpenTrans)",
    "alpha_star": "the reverse: heavy tails train",
    "alpha_debiased": "as alpha, over windows of one aspect ratio (FARMS)",
    "ensemble": "mean rank of several spectral metrics",
    "random": "at random",
    "depth": "the last layers",
    "gradient": "largest gradient relative to the weights, on a few batches",
    "gain_per_cost": "largest certain gain per multiply-accumulate, on a few batches",
    "damage": "the layers that pruning hurt most",
}
SPECTRAL = ("alpha", "alpha_star", "alpha_debiased", "ensemble")
WITH_BATCHES = ("gradient", "gain_per_cost")
GRANULARITIES = ("module", "block")
# What transformers call the list of a vision tower's layers.
LISTS_OF_LAYERS = ("layers", "layer", "blocks", "resblocks")


@dataclass(frozen=True)
class LayerSelection:
    """Which layers train.

    Args:
        rule: One of `RULES`.
        fraction: Share of the layers, or of the blocks, that train.
        granularity: "module" or "block".
        names: Exact names of the modules that train, in the model's order.
        frozen: Exact names of the others.
        scores: By name; the largest train.
        seed: Of rule "random".
        notes: What the user should know.
    """

    rule: str
    fraction: float
    granularity: str
    names: tuple[str, ...]
    frozen: tuple[str, ...]
    scores: dict[str, float]
    seed: int = 0
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write everything to a JSON file."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "LayerSelection":
        """Read what `save` wrote.

        Raises:
            ValueError: If the file is something else.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            lists = {name: tuple(values[name]) for name in ("names", "frozen", "notes")}
            return cls(**{**values, **lists})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"The file {str(path)!r} is no layer selection ({error!r}). It must be one that LayerSelection.save "
                "wrote. Give another file."
            ) from error

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if the model has not all of these layers."""
        own = {name for name, _ in model.named_modules()}
        missing = [name for name in (*self.names, *self.frozen) if name not in own]
        if missing:
            raise ValueError(
                f"The {type(model).__name__} has no layer {missing[0]!r} ({len(missing)} of the selection are "
                "missing). Names must be those of the model that was analysed. Select the layers of this model."
            )

    def learning_rates(self, base: float, *, low: float = 0.5, high: float = 1.5) -> dict[str, float]:
        """Map scores to learning rates: the soft alternative to freezing (TempBalance, NeurIPS 2023).

            lr_i = base (low + (high - low) (score_i - min) / (max - min))

        Args:
            base: Learning rate of a layer in the middle.
            low: Factor for the smallest score.
            high: Factor for the largest score.
        """
        values = self.scores.values()
        least, span = min(values), max(values) - min(values)
        factors = {name: (score - least) / span if span else 0.5 for name, score in self.scores.items()}
        return {name: base * (low + (high - low) * factor) for name, factor in factors.items()}


def select_layers(
    report_or_model: SpectralReport | nn.Module,
    rule: str = "alpha",
    fraction: float = 0.5,
    granularity: str = "module",
    *,
    target_modules: str | Collection[str] | None = None,
    seed: int = 0,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    pruning_report: Any = None,
) -> LayerSelection:
    """Choose the layers to train. Names are exact: "layers.1" never means "layers.10".

    Ties are broken by depth, the later layer trains. Half of 55 layers is 28: those at the median train, as in
    OpenTrans. A layer whose score is unknown (no reliable tail) gets the median score, and the selection says so.

    Args:
        report_or_model: A report of `analyze_spectra`, or the model; rules on gradients need the model.
        rule: One of `RULES`.
        fraction: Share to train, in (0, 1].
        granularity: "module", or "block": whole blocks by the mean score of their layers.
        target_modules: Which layers are there to choose from; a regular expression or names, as in PEFT.
        seed: Of rule "random".
        batches: For "gradient" and "gain_per_cost": inputs of the model, with labels.
        loss: For these rules; see `gradient_scores`.
        pruning_report: For "damage": the `PruningReport` of this model.

    Raises:
        ValueError: If the rule or the granularity is unknown, the fraction is out of range, a rule lacks what it
            needs, or the model has no layer to choose.
    """
    check_selection(rule, granularity, fraction)
    report, model = report_or_model, None
    if not isinstance(report, SpectralReport):
        report, model = None, report
    if rule in SPECTRAL and model is not None:
        report = analyze_spectra(model, target_modules=target_modules, debias=rule in ("alpha_debiased", "ensemble"))
    layers = _layers(report, model, target_modules)
    if rule in SPECTRAL and report is not None:
        scores = _spectral_scores(report, rule)
    elif rule in WITH_BATCHES:
        scores = _gradient_scores(model, batches, rule, [layer.name for layer in layers], loss)
    elif rule == "damage":
        scores = _damage_scores(layers, pruning_report)
    else:
        scores = _plain_scores(layers, rule, seed)
    known, notes = _fill({layer.name: scores.get(layer.name) for layer in layers})
    names = _largest_blocks(layers, known, fraction) if granularity == "block" else _largest(known, fraction)
    frozen = tuple(name for name in known if name not in names)
    return LayerSelection(
        rule, fraction, granularity, tuple(n for n in known if n in names), frozen, known, seed, notes
    )


def freeze_unselected(
    model: nn.Module, selection: LayerSelection, modules_to_save: str | Collection[str] | None = None
) -> nn.Module:
    """Set `requires_grad` in place: the selected layers and `modules_to_save` train, all else is frozen.

    Do this before an optimiser or a Trainer is built. Norms, embeddings and task heads are in no selection: name them
    in `modules_to_save`, as in PEFT.

    Args:
        model: The model whose layers were selected.
        selection: Of `select_layers`.
        modules_to_save: Modules that train as well; a regular expression, or names or endings of names.

    Returns:
        The same model.

    Raises:
        ValueError: If the model has not all of the selection's layers, or nothing is called as in `modules_to_save`.
    """
    selection.check(model)
    chosen = set(selection.names)
    if modules_to_save:
        for wanted in [modules_to_save] if isinstance(modules_to_save, str) else [[name] for name in modules_to_save]:
            more = {name for name, _ in model.named_modules() if matches(name, wanted)}
            if not more:
                raise ValueError(
                    f"No module of the {type(model).__name__} is called {wanted!r}. modules_to_save must name "
                    "modules. Correct it."
                )
            chosen |= more
    model.requires_grad_(False)
    for name in chosen:
        model.get_submodule(name).requires_grad_(True)
    return model


def parameter_groups(
    model: nn.Module, selection: LayerSelection, learning_rate: float, *, low: float = 0.5, high: float = 1.5
) -> list[dict[str, Any]]:
    """Return an optimiser's parameter groups, one learning rate per selected or unselected layer (TempBalance).

    Parameters of other modules get `learning_rate`. Frozen ones are left out.

    Args:
        model: The model whose layers were selected.
        selection: Of `select_layers`; only its scores are used.
        learning_rate: Of a layer in the middle.
        low: Factor for the smallest score.
        high: Factor for the largest score.

    Raises:
        ValueError: If the model has not all of the selection's layers.
    """
    selection.check(model)
    rates = selection.learning_rates(learning_rate, low=low, high=high)
    grouped: dict[float, list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for name, rate in rates.items():
        own = [p for p in model.get_submodule(name).parameters() if p.requires_grad and p not in seen]
        seen |= set(own)
        grouped.setdefault(rate, []).extend(own)
    rest = [p for p in model.parameters() if p.requires_grad and p not in seen]
    grouped.setdefault(learning_rate, []).extend(rest)
    return [{"params": parameters, "lr": rate} for rate, parameters in grouped.items() if parameters]


def check_selection(rule: str, granularity: str, fraction: float) -> None:
    """Raise ValueError if a value is unknown or out of range."""
    for name, value, known in (("rule", rule, RULES), ("granularity", granularity, GRANULARITIES)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}. It must be one of {', '.join(known)}. Correct it.")
    how_many(fraction, 1)


def _layers(
    report: SpectralReport | None, model: nn.Module | None, target_modules: str | Collection[str] | None
) -> list[MatrixLayer]:
    if model is not None and report is None:
        return list(find_layers(model, target_modules).values())
    layers = [] if report is None else [entry.layer for entry in report.layers]
    if target_modules is None:
        return layers
    found = [layer for layer in layers if matches(layer.name, target_modules)]
    if not found:
        raise ValueError(f"The report has no layer that target_modules={target_modules!r} names. Correct it.")
    return found


def _spectral_scores(report: SpectralReport, rule: str) -> dict[str, float | None]:
    if rule == "ensemble":
        return dict(ensemble_scores(report))
    values = report.values("alpha_debiased" if rule == "alpha_debiased" else "alpha")
    if all(value is None for value in values.values()):
        raise ValueError(
            f"No layer of the report has a value for rule {rule!r}. It must be measured. Call analyze_spectra(..., "
            "debias=True) for 'alpha_debiased', or choose another fit."
        )
    sign = -1.0 if rule == "alpha_star" else 1.0
    return {name: None if value is None else sign * value for name, value in values.items()}


def _gradient_scores(
    model: nn.Module | None, batches: Iterable[Any] | None, rule: str, names: list[str], loss: Loss | None
) -> dict[str, float]:
    if model is None or batches is None:
        raise ValueError(
            f"rule={rule!r} needs the model and `batches`. A report of spectra knows no gradients. Call "
            f"select_layers(model, rule={rule!r}, batches=...)."
        )
    return gradient_scores(model, batches, rule, names=names, loss=loss)


def _damage_scores(layers: list[MatrixLayer], report: Any) -> dict[str, float]:
    """Return the error that pruning left in the sublayer of every layer, from the report's layers by their index."""
    if report is None:
        raise ValueError(
            "rule='damage' needs `pruning_report`. It says which layers pruning hurt. Pass the report of prune_model, "
            "or PruningReport.load(folder)."
        )
    scores: dict[str, float] = {}
    for layer in layers:
        parts = layer.name.split(".")
        numbers = (int(part) for before, part in pairwise(parts) if part.isdigit() and before in LISTS_OF_LAYERS)
        index = next(numbers, None)
        if index is None or index >= len(report.layers) or ("vision" not in layer.name and "text" in layer.name):
            continue
        entry = report.layers[index]
        error = entry.heads_error if "attn" in layer.name or "attention" in layer.name else entry.neurons_error
        scores[layer.name] = error or 0.0
    if not any(scores.values()):
        raise ValueError(
            "The pruning report has no error of any of these layers. rule='damage' needs a method that rebuilds. "
            "Choose another rule."
        )
    return scores


def _plain_scores(layers: list[MatrixLayer], rule: str, seed: int) -> dict[str, float]:
    if rule == "random":
        draw: Callable[[], float] = random.Random(seed).random
        return {layer.name: draw() for layer in layers}
    return {layer.name: float(place) for place, layer in enumerate(layers)}


def _fill(scores: Mapping[str, float | None]) -> tuple[dict[str, float], tuple[str, ...]]:
    known = [score for score in scores.values() if score is not None and math.isfinite(score)]
    if not known:
        raise ValueError("No layer has a score. Choose another rule.")
    middle = statistics.median(known)
    missing = [name for name, score in scores.items() if score is None or not math.isfinite(score)]
    notes = (f"No score for {', '.join(missing)}: the median was taken.",) if missing else ()
    filled = {n: middle if s is None or not math.isfinite(s) else s for n, s in scores.items()}
    return filled, notes


def _largest(scores: Mapping[str, float], fraction: float) -> set[str]:
    order = sorted(range(len(scores)), key=lambda place: (list(scores.values())[place], place), reverse=True)
    names = list(scores)
    return {names[place] for place in order[: how_many(fraction, len(names))]}


def _largest_blocks(layers: list[MatrixLayer], scores: Mapping[str, float], fraction: float) -> set[str]:
    blocks = by_block(layers)
    means = {block: statistics.fmean(scores[name] for name in names) for block, names in blocks.items()}
    return {name for block in _largest(means, fraction) for name in blocks[block]}
