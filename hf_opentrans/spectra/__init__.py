"""Heavy tails of weight spectra: which layers are under-trained, and training those alone."""

from .analysis import LayerSpectrum, SpectralReport, analyze_spectra
from .cost import TrainingCost, full_training_cost, training_cost
from .esd import Spectrum, compute_partial_spectrum, compute_spectrum, compute_windowed_spectrum, spectral_metrics
from .hierarchy import HierarchicalScores, ensemble_scores, hierarchical_scores
from .selection import LayerSelection, freeze_unselected, parameter_groups, select_layers
from .tail_fits import TailFit, confidence_interval, fit_tail
from .tuner import SpectralConfig, get_peft_model

__all__ = [
    "HierarchicalScores",
    "LayerSelection",
    "LayerSpectrum",
    "SpectralConfig",
    "SpectralReport",
    "Spectrum",
    "TailFit",
    "TrainingCost",
    "analyze_spectra",
    "compute_partial_spectrum",
    "compute_spectrum",
    "compute_windowed_spectrum",
    "confidence_interval",
    "ensemble_scores",
    "fit_tail",
    "freeze_unselected",
    "full_training_cost",
    "get_peft_model",
    "hierarchical_scores",
    "parameter_groups",
    "select_layers",
    "spectral_metrics",
    "training_cost",
]
