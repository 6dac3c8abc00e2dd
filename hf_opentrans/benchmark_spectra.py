"""Spectral analysis against WeightWatcher, and against the cost of the eigenvalues alone, in one run."""

import contextlib
import gc
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel

from hf_opentrans._optional import require
from hf_opentrans.benchmark_memory import PeakMemory
from hf_opentrans.benchmarks import vit_config
from hf_opentrans.spectra.analysis import analyze_spectra, weight_of
from hf_opentrans.spectra.esd import gram_eigenvalues
from hf_opentrans.spectra.layers import find_layers

# Widths of the towers that are only analysed by us: hidden size, MLP width, layers, patch size.
LARGE = {"ViT-L/14": (1024, 4096, 24, 14), "ViT-g/14": (1408, 6144, 40, 14)}


@dataclass(frozen=True)
class SpectraRow:
    """One way to fit all tails of a tower.

    Args:
        model: Name of the tower.
        method: "weightwatcher", "ours fp64", "ours fp32", or "eigenvalues fp64" and "eigenvalues fp32": Gram matrices
            and eigenvalues without any fit, the least that a dense method costs.
        matrices: How many.
        seconds: CPU time, median over the rounds.
        speed_up: WeightWatcher's time / this time, median over paired rounds.
        over_eigenvalues: This time / that of the eigenvalues alone in the same precision, median over paired rounds.
        alpha_difference: Largest relative difference of alpha from WeightWatcher's.
        extra_memory_mib: Largest memory of the process over that before, in MiB: what the analysis needs besides the
            model.
        rounds: Counted rounds.
    """

    model: str
    method: str
    matrices: int
    seconds: float
    speed_up: float | None = None
    over_eigenvalues: float | None = None
    alpha_difference: float | None = None
    extra_memory_mib: float | None = None
    rounds: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


def heavy_tower(hidden: int, neurons: int, layers: int, patch: int, *, seed: int = 0, half: bool = False) -> nn.Module:
    """Return a random CLIP vision tower whose rows vary like Student's t, so that its spectra have heavy tails.

    Args:
        hidden: Width of the residual stream.
        neurons: Width of the MLPs.
        layers: How many.
        patch: Side of a patch in pixels.
        seed: Of the weights.
        half: Whether to store them in float16.
    """
    config = vit_config(hidden, neurons, layers, patch)
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16 if half else default)
    try:
        model = CLIPVisionModel(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for index, module in enumerate(model.modules()):
            if isinstance(module, nn.Linear):
                freedom = 2.2 + 0.2 * (index % 12)
                scale = torch.distributions.StudentT(freedom).sample((module.out_features, 1)).abs() + 0.1
                module.weight.mul_(scale.to(module.weight))
    return model.eval()


def compare_with_weightwatcher(
    *, layers: int = 12, rounds: int = 3, say: Callable[[str], None] = lambda line: None
) -> list[SpectraRow]:
    """Fit all tails of a B/16-sized tower by every method in turn, A B C A B C, and time the process's CPU.

    Args:
        layers: Of the tower; 12 for the whole B/16.
        rounds: Counted rounds, after one that is not.
        say: Called with a line on what comes next.

    Raises:
        ImportError: If weightwatcher is not installed.
    """
    require("bench", "weightwatcher")
    model = heavy_tower(768, 3072, layers, 16)
    methods: dict[str, Callable[[], dict[str, float | None]]] = {"weightwatcher": lambda: _weightwatcher(model)}
    for name, precision in (("fp64", torch.float64), ("fp32", torch.float32)):
        methods[f"eigenvalues {name}"] = lambda precision=precision: _eigenvalues(model, precision)
        methods[f"ours {name}"] = lambda precision=precision: analyze_spectra(
            model, fit="ks", precision=precision
        ).values("alpha")
    times: dict[str, list[float]] = {name: [] for name in methods}
    alphas: dict[str, dict[str, float | None]] = {}
    for index in range(rounds + 1):
        say(f"Round {index} of {rounds}" + (" (not counted)" if not index else ""))
        for name, run in methods.items():
            start = time.process_time()
            alphas[name] = run()
            if index:
                times[name].append(time.process_time() - start)
    count = len(find_layers(model))
    return [_row(name, f"ViT-B/16, {layers} layers", count, times, alphas, rounds) for name in methods]


def analyze_large(say: Callable[[str], None] = lambda line: None) -> Iterator[SpectraRow]:
    """Yield time and memory of the analysis of towers that WeightWatcher takes minutes for.

    Args:
        say: Called with a line on what comes next.
    """
    for name, (hidden, neurons, layers, patch) in LARGE.items():
        say(f"{name}: {layers} layers of width {hidden}, weights in float16")
        model = heavy_tower(hidden, neurons, layers, patch, half=True)
        gc.collect()
        with PeakMemory(torch.device("cpu")) as before:
            pass
        start = time.process_time()
        with PeakMemory(torch.device("cpu")) as during:
            report = analyze_spectra(model, fit="ks", precision=torch.float32)
        seconds = time.process_time() - start
        extra = None if during.mib is None or before.mib is None else during.mib - before.mib
        yield SpectraRow(name, "ours fp32", len(report.layers), seconds, extra_memory_mib=extra)
        del model


def spectra_table(rows: list[SpectraRow]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells for people."""

    def show(value: float | None, form: str, unit: str = "") -> str:
        return "-" if value is None else f"{value:{form}}{unit}"

    header = ["model", "method", "matrices", "CPU time", "speed-up", "of eigenvalues", "alpha differs by", "memory"]
    cells = [
        [
            row.model,
            row.method,
            str(row.matrices),
            show(row.seconds, ".2f", " s"),
            show(row.speed_up, ".2f", "x"),
            show(row.over_eigenvalues, ".2f", "x"),
            show(row.alpha_difference, ".1e"),
            show(row.extra_memory_mib, ",.0f", " MiB"),
        ]
        for row in rows
    ]
    return header, cells


def _row(
    name: str,
    model: str,
    matrices: int,
    times: dict[str, list[float]],
    alphas: dict[str, dict[str, float | None]],
    rounds: int,
) -> SpectraRow:
    def ratio(other: str) -> float | None:
        if other == name or other not in times:
            return None
        return statistics.median(a / b for a, b in zip(times[other], times[name], strict=True))

    floor = ratio(f"eigenvalues {name.rpartition(' ')[2]}") if name.startswith("ours") else None
    theirs, difference = alphas["weightwatcher"], None
    if name.startswith("ours"):
        pairs = [(alphas[name][layer], alpha) for layer, alpha in theirs.items() if layer in alphas[name]]
        difference = max(abs(a / b - 1) for a, b in pairs if a is not None and b is not None)
    return SpectraRow(
        model,
        name,
        matrices,
        statistics.median(times[name]),
        ratio("weightwatcher"),
        None if floor is None else 1 / floor,
        difference,
        rounds=rounds,
    )


def _weightwatcher(model: nn.Module) -> dict[str, float | None]:
    """Return WeightWatcher's alpha of every linear layer by name."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            import weightwatcher

            details = weightwatcher.WeightWatcher(model=model).analyze()
        finally:
            logging.disable(level)
    named = dict(zip(details["longname"], details["alpha"], strict=True))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {name: float(named[name]) for name in linear if name in named}


@torch.no_grad()
def _eigenvalues(model: nn.Module, precision: torch.dtype) -> dict[str, float | None]:
    for name in find_layers(model):
        weight = weight_of(model.get_submodule(name))
        gram_eigenvalues((weight if len(weight) >= weight.shape[1] else weight.T).to(precision))
    return {}
