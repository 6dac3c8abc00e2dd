"""Comparing layers: within their kind, then by block, then over the model; and ensembles of several metrics."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scipy.stats import rankdata

from .analysis import SpectralReport, check_metric
from .layers import MatrixLayer, by_block, by_group

# High ranks mean a light tail, that is a layer that is worth training; the sign says which way a metric points.
ENSEMBLE: dict[str, float] = {"alpha_debiased": 1.0, "stable_rank": 1.0, "effective_rank": 1.0, "num_spikes": -1.0}


@dataclass(frozen=True)
class HierarchicalScores:
    """One metric on three levels.

    Args:
        metric: Name.
        modules: z-score of every layer among the layers of its group; 0 where it could not be measured.
        blocks: Mean of these over the layers of a block.
        model: z-score of every block among all blocks.
    """

    metric: str
    modules: dict[str, float]
    blocks: dict[str, float]
    model: dict[str, float]


def hierarchical_scores(report: SpectralReport, metric: str = "alpha") -> HierarchicalScores:
    """Compare layers with their own kind first: in a vision transformer alpha differs between kinds by their shape.

    Args:
        report: Of `analyze_spectra`.
        metric: One of `METRICS`.

    Raises:
        ValueError: If the metric is unknown.
    """
    layers, values = [entry.layer for entry in report.layers], report.values(metric)
    modules: dict[str, float] = {}
    for names in by_group(layers).values():
        modules |= _z_scores({name: values[name] for name in names})
    modules = {layer.name: modules[layer.name] for layer in layers}
    blocks = {block: statistics.fmean(modules[name] for name in names) for block, names in by_block(layers).items()}
    return HierarchicalScores(metric, modules, blocks, _z_scores(blocks))


def ensemble_scores(report: SpectralReport, weights: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return the weighted mean rank of several metrics, in [0, 1] by layer; high means worth training.

    Ranks are taken within groups of layers that do the same job, because every metric depends on the shape. Layers
    that a metric could not measure, and those whose alpha is undecided, get the middle rank of it.

    Args:
        report: Of `analyze_spectra`, with `debias` where "alpha_debiased" has a weight.
        weights: By metric; negative where a small value means worth training. Defaults to `ENSEMBLE`.

    Raises:
        ValueError: If a metric is unknown or was not measured, or all weights are zero.
    """
    weights = dict(ENSEMBLE if weights is None else weights)
    total = sum(abs(weight) for weight in weights.values())
    if not total:
        raise ValueError(f"The weights of the ensemble are {weights}. At least one must not be zero. Correct them.")
    layers = [entry.layer for entry in report.layers]
    undecided = {entry.layer.name for entry in report.layers if entry.is_undecided}
    scores = dict.fromkeys((layer.name for layer in layers), 0.0)
    for metric, weight in weights.items():
        check_metric(metric)
        values = report.values(metric)
        if all(value is None for value in values.values()):
            raise ValueError(
                f"The report has no {metric!r}. The ensemble needs it. Call analyze_spectra(..., debias=True), or "
                "give weights without it."
            )
        if "alpha" in metric:
            values = {name: None if name in undecided else value for name, value in values.items()}
        for name, rank in _ranks(layers, values).items():
            scores[name] += (weight * rank if weight > 0 else -weight * (1 - rank)) / total
    return scores


def _ranks(layers: Iterable[MatrixLayer], values: Mapping[str, float | None]) -> dict[str, float]:
    """Return ranks within groups in [0, 1]; ties share theirs, and the middle is for what was not measured."""
    found: dict[str, float] = {}
    for names in by_group(layers).values():
        known = [name for name in names if values[name] is not None]
        ranks = rankdata([values[name] for name in known]) if known else []
        found |= dict.fromkeys(names, 0.5)
        found |= {name: (rank - 0.5) / len(known) for name, rank in zip(known, ranks, strict=True)}
    return found


def _z_scores(values: Mapping[str, float | None]) -> dict[str, float]:
    known = [value for value in values.values() if value is not None]
    mean, deviation = (statistics.fmean(known), statistics.pstdev(known)) if known else (0.0, 0.0)
    return {
        name: (value - mean) / deviation if value is not None and deviation else 0.0 for name, value in values.items()
    }
