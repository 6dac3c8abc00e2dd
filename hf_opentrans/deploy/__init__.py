"""Export to real runtimes, and exported models loaded again."""

from .export import ExportConfig, export_model, load_exportable
from .parity import LIMITS, Parity
from .quantization import supports_bfloat16, to_bfloat16
from .record import EXPORT_FILE, ExportRecord
from .segmenter import (
    ExportedModel,
    ExportedSegmenter,
    ExportedTower,
    OnnxSegmenter,
    OpenVINOSegmenter,
    TorchExportSegmenter,
    load_exported,
)
from .sessions import PRECISIONS
from .vocabularies import load_vocabulary, read_vocabulary, save_vocabulary

__all__ = [
    "EXPORT_FILE",
    "LIMITS",
    "PRECISIONS",
    "ExportConfig",
    "ExportRecord",
    "ExportedModel",
    "ExportedSegmenter",
    "ExportedTower",
    "OnnxSegmenter",
    "OpenVINOSegmenter",
    "Parity",
    "TorchExportSegmenter",
    "export_model",
    "load_exportable",
    "load_exported",
    "load_vocabulary",
    "read_vocabulary",
    "save_vocabulary",
    "supports_bfloat16",
    "to_bfloat16",
]
