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
from .semi_structured import SemiStructuredModel, to_semi_structured
from .sessions import PRECISIONS
from .torchao import TORCHAO_PRECISIONS, Int8Layers, int8_layers, quantize_torchao
from .vocabularies import read_vocabulary

__all__ = [
    "EXPORT_FILE",
    "LIMITS",
    "PRECISIONS",
    "TORCHAO_PRECISIONS",
    "ExportConfig",
    "ExportRecord",
    "ExportedModel",
    "ExportedSegmenter",
    "ExportedTower",
    "Int8Layers",
    "OnnxSegmenter",
    "OpenVINOSegmenter",
    "Parity",
    "SemiStructuredModel",
    "TorchExportSegmenter",
    "export_model",
    "int8_layers",
    "load_exportable",
    "load_exported",
    "quantize_torchao",
    "read_vocabulary",
    "supports_bfloat16",
    "to_bfloat16",
    "to_semi_structured",
]
