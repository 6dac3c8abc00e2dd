"""The spectra of all layers of a model: one frozen report that can be printed, saved and drawn."""

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_opentrans._files import write_json

from .esd import (
    MIN_EIGENVALUES,
    SpectralMetrics,
    Spectrum,
    compute_spectrum,
    compute_windowed_spectrum,
    is_zero,
    spectral_metrics,
)
from .layers import CONVOLUTIONS, MOST_ELONGATED, MatrixLayer, find_layers, is_elongated
from .tail_fits import TailFit, check_method, confidence_interval, fit_tail

Table = tuple[list[str], list[list[str]]]
FITTED = ("alpha", "ks_distance", "alpha_weighted", "log_alpha_norm", "alpha_debiased")
UNFITTED = tuple(field.name for field in fields(SpectralMetrics))
METRICS = FITTED + UNFITTED
# Share of the layers that lie inside what counts as the spread between layers: that of the confidence intervals.
LEVEL = 0.95


@dataclass(frozen=True)
class LayerSpectrum:
    """What the spectrum of one layer says.

    Args:
        layer: The layer.
        shape: Of its weight.
        num_eigenvalues: How many there are, over all matrices of the layer.
        fit: The fitted tail.
        metrics: What needs no fit.
        alpha_weighted: alpha * log10 of the largest eigenvalue.
        log_alpha_norm: log10 of the sum of lambda^alpha.
        alpha_debiased: Hill's alpha over windows of one aspect ratio (FARMS); None where it was not asked for.
        is_undecided: Whether the fit failed, or its confidence interval is wider than the spread between layers.
    """

    layer: MatrixLayer
    shape: tuple[int, ...]
    num_eigenvalues: int
    fit: TailFit
    metrics: SpectralMetrics
    alpha_weighted: float | None = None
    log_alpha_norm: float | None = None
    alpha_debiased: float | None = None
    is_undecided: bool = False

    def value(self, metric: str) -> float | None:
        """Return one of `METRICS`; None where it could not be measured.

        Raises:
            ValueError: If the metric is unknown.
        """
        check_metric(metric)
        source = self.metrics if metric in UNFITTED else self.fit if metric in ("alpha", "ks_distance") else self
        found = getattr(source, metric)
        return None if found is None or not math.isfinite(found) else found

    def to_dict(self) -> dict[str, Any]:
        """Return one flat JSON-ready object."""
        own = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name.startswith(("al", "l", "is"))
        }
        own.pop("layer")
        flat = {**asdict(self.layer), "shape": list(self.shape), "num_eigenvalues": self.num_eigenvalues}
        flat |= {**asdict(self.fit), **asdict(self.metrics), **own}
        return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in flat.items()}

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> "LayerSpectrum":
        """Read what `to_dict` wrote."""

        def part(kind: Any) -> Any:
            return kind(**{field.name: flat[field.name] for field in fields(kind)})

        fit: TailFit = part(TailFit)
        nan = float("nan")
        missing = {name: nan for name in ("alpha", "xmin", "standard_error") if getattr(fit, name) is None}
        interval = None if fit.interval is None else (fit.interval[0], fit.interval[1])
        own = {name: flat[name] for name in ("alpha_weighted", "log_alpha_norm", "alpha_debiased", "is_undecided")}
        fit = replace(fit, **missing, interval=interval)
        shape = tuple(flat["shape"])
        return cls(part(MatrixLayer), shape, flat["num_eigenvalues"], fit, part(SpectralMetrics), **own)


@dataclass(frozen=True)
class SpectralReport:
    """The spectra of a model.

    Args:
        model: Name of the model, without local folders.
        fit: How tails were fitted.
        compat: Whether the OpenTrans code was followed, slips included.
        layers: One entry per layer, in the model's order.
        skipped: Reason by name, of layers that have no spectrum worth fitting.
    """

    model: str
    fit: str
    compat: bool
    layers: tuple[LayerSpectrum, ...]
    skipped: dict[str, str]

    def values(self, metric: str) -> dict[str, float | None]:
        """Return a metric by name of the layer; None where it could not be measured.

        Raises:
            ValueError: If the metric is unknown.
        """
        return {entry.layer.name: entry.value(metric) for entry in self.layers}

    def table(self) -> Table:
        """Return header and cells for people, one line per layer."""
        header = ["layer", "shape", "alpha", "interval", "KS", "debiased", "stable rank", "spikes"]
        return _without_empty(header, [_cells(entry) for entry in self.layers])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values; `layers` holds one flat object per layer."""
        layers = [entry.to_dict() for entry in self.layers]
        return {"model": self.model, "fit": self.fit, "compat": self.compat, "layers": layers, "skipped": self.skipped}

    def save(self, path: str | Path) -> None:
        """Write everything to a JSON file."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "SpectralReport":
        """Read what `save` or `hf-opentrans analyze --json` wrote.

        Raises:
            ValueError: If the file is something else.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            layers = tuple(LayerSpectrum.from_dict(entry) for entry in values["layers"])
            return cls(values["model"], values["fit"], values["compat"], layers, values["skipped"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"The file {str(path)!r} is no spectral report ({error!r}). It must be one that `analyze` wrote. Give "
                "another file, or the model itself."
            ) from error

    def plot(self, path: str | Path | None = None, *, metric: str = "alpha") -> Any:
        """Draw a metric by depth, one line per type of layer.

        Args:
            path: Where to save the picture; not saved without.
            metric: One of `METRICS`.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If the metric is unknown, or was not measured.
        """
        from .plots import draw_report

        return draw_report(self, path, metric)


def analyze_spectra(
    model: nn.Module,
    *,
    fit: str = "hill",
    target_modules: str | Collection[str] | None = None,
    exclude_modules: str | Collection[str] | None = None,
    compat: bool = False,
    debias: bool = False,
    intervals: bool = False,
    precision: torch.dtype = torch.float64,
    on_layer: Callable[[int, int], object] = lambda done, total: None,
) -> SpectralReport:
    """Fit the heavy tail of every weight matrix of a model, one matrix at a time, on the weight's own device.

    Args:
        model: Any model with linear or convolution layers; not changed.
        fit: "hill", "peak", "ks" or "adaptive"; see `fit_tail`.
        target_modules: Which layers; a regular expression or names, as in PEFT. Defaults to all.
        exclude_modules: Which layers not.
        compat: Whether to follow the OpenTrans code, slips included.
        debias: Whether to measure `alpha_debiased` too (aspect-ratio debiasing, FARMS).
        intervals: Whether to bootstrap a confidence interval of every alpha, and to mark layers whose interval is
            wider than the spread between layers as undecided.
        precision: float64, or float32 for twice the speed (alpha to three digits).
        on_layer: Called after every layer with how many are done and how many there are.

    Raises:
        ValueError: If there is no layer, no layer has enough eigenvalues, a weight is not finite, or the fit is
            unknown.
    """
    check_method(fit)
    found, entries, skipped = find_layers(model, target_modules, exclude_modules), [], {}
    for done, (name, layer) in enumerate(found.items(), 1):
        module = model.get_submodule(name)
        weight = weight_of(module, compat=compat)
        reason = _reason_to_skip(module, weight, layer)
        if reason:
            skipped[name] = reason
        else:
            try:
                entries.append(_analyze(layer, weight, fit, compat, debias, intervals, precision))
            except ValueError as error:
                raise ValueError(f"Layer {name!r}: {error}") from error
        on_layer(done, len(found))
    if not entries:
        first, reason = next(iter(skipped.items()))
        raise ValueError(
            f"None of the {len(skipped)} layers has a spectrum to fit ({first!r}: {reason}). A tail needs at least "
            f"{MIN_EIGENVALUES} eigenvalues. Give a larger model, or other names."
        )
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
    name = Path(name).name if Path(name).exists() else name
    return SpectralReport(name, fit, compat, _mark_undecided(entries), skipped)


def weight_of(module: nn.Module, *, compat: bool = False) -> torch.Tensor:
    """Return a layer's weight with outputs first.

    A convolution whose windows do not overlap (a patch embedding) is a linear layer on flat windows, and is returned
    as one; `compat` keeps it a convolution.
    """
    weight = module.weight
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"The {type(module).__name__} has no weight tensor. Leave this layer out.")
    if isinstance(module, Conv1D):
        return weight.detach().T
    if isinstance(module, CONVOLUTIONS) and not compat:
        is_patchwise = max(module.kernel_size) > 1 and module.kernel_size == module.stride and module.groups == 1
        return weight.detach().flatten(1) if is_patchwise else weight.detach()
    return weight.detach()


def layer_spectrum(model: nn.Module, name: str, *, precision: torch.dtype = torch.float64) -> Spectrum:
    """Return the eigenvalues of one layer.

    Raises:
        ValueError: If there is no such linear or convolution layer.
    """
    layers = find_layers(model)
    if name not in layers:
        raise ValueError(
            f"There is no linear or convolution layer {name!r}. One of {_some(layers)} is meant. Correct it."
        )
    return compute_spectrum(weight_of(model.get_submodule(name)), precision=precision, parts=layers[name].parts)


def check_metric(metric: str) -> None:
    """Raise ValueError if the metric is unknown."""
    if metric not in METRICS:
        raise ValueError(f"The metric is {metric!r}. It must be one of {', '.join(METRICS)}. Correct it.")


def _some(names: Collection[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (f", ... ({len(listed)} in all)" if len(listed) > 4 else "")


def _reason_to_skip(module: nn.Module, weight: torch.Tensor, layer: MatrixLayer) -> str:
    if is_elongated(module):
        return f"its sides {tuple(weight.shape)} differ by a factor of {MOST_ELONGATED:g} or more"
    sides = (len(weight) // layer.parts, *weight.shape[1:2])
    count = min(sides) * layer.parts * math.prod(weight.shape[2:])
    if count < MIN_EIGENVALUES:
        return f"it has {count} eigenvalues, fewer than {MIN_EIGENVALUES}"
    return "its weight is zero everywhere" if is_zero(weight) else ""


def _analyze(
    layer: MatrixLayer,
    weight: torch.Tensor,
    method: str,
    compat: bool,
    debias: bool,
    intervals: bool,
    precision: torch.dtype,
) -> LayerSpectrum:
    spectrum = compute_spectrum(weight, precision=precision, parts=layer.parts, compat=compat)
    if len(spectrum) < MIN_EIGENVALUES:
        fit = TailFit(float("nan"), float("nan"), 0, 1.0, float("nan"), method, False, "the weight is of low rank")
    else:
        fit = fit_tail(spectrum, method, compat=compat)
    if intervals and fit.reliable:
        fit = replace(fit, interval=confidence_interval(spectrum, method, level=LEVEL))
    metrics, debiased = spectral_metrics(spectrum), None
    if debias:
        windows = compute_windowed_spectrum(weight, precision=precision, parts=layer.parts)
        debiased = fit_tail(windows, "hill").alpha if len(windows) >= MIN_EIGENVALUES else None
    weighted = norm = None
    if fit.reliable:
        weighted = fit.alpha * metrics.log_spectral_norm
        relative = (spectrum.eigenvalues / spectrum.eigenvalues[-1]) ** fit.alpha
        norm = weighted + math.log10(float(relative.sum()))
    return LayerSpectrum(layer, tuple(weight.shape), len(spectrum), fit, metrics, weighted, norm, debiased)


def _mark_undecided(entries: list[LayerSpectrum]) -> tuple[LayerSpectrum, ...]:
    alphas = torch.tensor([entry.fit.alpha for entry in entries if entry.fit.reliable], dtype=torch.float64)
    if not len(alphas):
        return tuple(replace(entry, is_undecided=True) for entry in entries)
    spread = float(alphas.quantile((1 + LEVEL) / 2) - alphas.quantile((1 - LEVEL) / 2))

    def is_undecided(fit: TailFit) -> bool:
        return not fit.reliable or (fit.interval is not None and not fit.interval[1] - fit.interval[0] <= spread)

    return tuple(replace(entry, is_undecided=is_undecided(entry.fit)) for entry in entries)


def _cells(entry: LayerSpectrum) -> list[str]:
    def show(value: float | None, form: str) -> str:
        return "-" if value is None or not math.isfinite(value) else format(value, form)

    fit, metrics = entry.fit, entry.metrics
    interval = "-" if fit.interval is None else f"{fit.interval[0]:.2f}-{fit.interval[1]:.2f}"
    return [
        entry.layer.name,
        "x".join(map(str, entry.shape)),
        show(fit.alpha, ".3f") + (" ?" if entry.is_undecided else ""),
        interval,
        show(fit.ks_distance if fit.reliable else None, ".3f"),
        show(entry.alpha_debiased, ".3f"),
        show(metrics.stable_rank, ".1f"),
        show(metrics.num_spikes, "d"),
    ]


def _without_empty(header: list[str], lines: list[list[str]]) -> Table:
    kept = [place for place in range(len(header)) if any(line[place] != "-" for line in lines)]
    return [header[place] for place in kept], [[line[place] for place in kept] for line in lines]
