"""One-shot structured pruning of CLIP vision towers. Start reading in `prune.py`."""

from .channels import ChannelPruningReport, ChannelPruningResult, prune_channels
from .elastic import ElasticResult, prune_elastic
from .elastic_report import BudgetReport, ElasticReport
from .latency import LatencyTable, measure_latency_table
from .nominal import NominalAccount, nominal_account
from .plan import LayerPlan, PruningConfig, PruningPlan
from .prune import PruningResult, prune_model
from .report import LayerReport, PruningReport
from .semi_structured import (
    SemiStructuredConfig,
    SemiStructuredReport,
    SemiStructuredResult,
    prune_semi_structured,
)
from .subnetwork import Subnetwork
from .surgery import apply_masks, slice_model, to_sparse
from .transfer import TransferReport, TransferResult
from .transferred import load_transferred, save_transferred

__all__ = [
    "BudgetReport",
    "ChannelPruningReport",
    "ChannelPruningResult",
    "ElasticReport",
    "ElasticResult",
    "LatencyTable",
    "LayerPlan",
    "LayerReport",
    "NominalAccount",
    "PruningConfig",
    "PruningPlan",
    "PruningReport",
    "PruningResult",
    "SemiStructuredConfig",
    "SemiStructuredReport",
    "SemiStructuredResult",
    "Subnetwork",
    "TransferReport",
    "TransferResult",
    "apply_masks",
    "load_transferred",
    "measure_latency_table",
    "nominal_account",
    "prune_channels",
    "prune_elastic",
    "prune_model",
    "prune_semi_structured",
    "save_transferred",
    "slice_model",
    "to_sparse",
]
