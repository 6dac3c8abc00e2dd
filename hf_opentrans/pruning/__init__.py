"""One-shot structured pruning of CLIP vision towers. Start reading in `prune.py`."""

from .latency import LatencyTable, measure_latency_table
from .plan import LayerPlan, PruningConfig, PruningPlan
from .prune import PruningResult, prune_model
from .report import LayerReport, PruningReport
from .subnetwork import Subnetwork
from .surgery import apply_masks, slice_model, to_sparse

__all__ = [
    "LatencyTable",
    "LayerPlan",
    "LayerReport",
    "PruningConfig",
    "PruningPlan",
    "PruningReport",
    "PruningResult",
    "Subnetwork",
    "apply_masks",
    "measure_latency_table",
    "prune_model",
    "slice_model",
    "to_sparse",
]
