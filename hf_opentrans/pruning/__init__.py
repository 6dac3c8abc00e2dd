"""One-shot structured pruning of CLIP vision towers. Start reading in `prune.py`."""

from .latency import LatencyTable, measure_latency_table
from .plan import LayerPlan, PruningConfig, PruningPlan
from .prune import PruningResult, prune_model
from .report import LayerReport, PruningReport
from .subnetwork import Subnetwork
from .surgery import apply_masks, slice_model, to_sparse
from .transfer import TransferReport, TransferResult
from .transferred import load_transferred, save_transferred

__all__ = [
    "LatencyTable",
    "LayerPlan",
    "LayerReport",
    "PruningConfig",
    "PruningPlan",
    "PruningReport",
    "PruningResult",
    "Subnetwork",
    "TransferReport",
    "TransferResult",
    "apply_masks",
    "load_transferred",
    "measure_latency_table",
    "prune_model",
    "save_transferred",
    "slice_model",
    "to_sparse",
]
