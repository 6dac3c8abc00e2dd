"""Prune a CLIP image encoder once, without labels; segment any class with it; load it anywhere.

Importing the package imports the models and registers them with the Auto classes of transformers. Everything else
(pruning, spectra, data, evaluation) is imported when one of its names is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, AutoProcessor

from .models.configuration_catseg import CATSegConfig
from .models.configuration_clip_resnet import CLIPResNetVisionConfig
from .models.configuration_deeplabv3plus import DeepLabV3PlusConfig
from .models.configuration_elastic_clip import ElasticCLIPConfig, ElasticCLIPVisionConfig
from .models.configuration_fcclip import FCCLIPConfig
from .models.configuration_gkc import GKCConfig
from .models.configuration_sparse_clip import SparseCLIPConfig, SparseCLIPVisionConfig
from .models.modeling_catseg import CATSegForSegmentation
from .models.modeling_clip_resnet import CLIPResNetVisionModel
from .models.modeling_deeplabv3plus import DeepLabV3PlusForSegmentation
from .models.modeling_dense_clip import DenseCLIPForSegmentation
from .models.modeling_elastic_clip import (
    ElasticCLIPForSegmentation,
    ElasticCLIPModel,
    ElasticCLIPVisionModel,
    ElasticCLIPVisionModelWithProjection,
)
from .models.modeling_fcclip import FCCLIPForSegmentation
from .models.modeling_gkc import GKCForSegmentation
from .models.modeling_sparse_clip import (
    SparseCLIPModel,
    SparseCLIPVisionModel,
    SparseCLIPVisionModelWithProjection,
)
from .models.pipeline_open_vocabulary import OpenVocabularySegmentationPipeline, register_pipeline
from .models.processing_open_vocabulary import OpenVocabularyProcessor

if TYPE_CHECKING:  # for type checkers and editors; at run time `__getattr__` imports the same names
    from .data.benchmarks import BENCHMARKS, open_benchmark
    from .data.metric_loading import load_metric
    from .data.metrics import MeanIoU
    from .data.panoptic import PanopticQuality
    from .deploy.autotune import TunedSettings, autotune
    from .evaluation_protocols import PROTOCOLS, Protocol, find_protocol
    from .evaluation_runs import EvaluationResult, evaluate_data
    from .hub import build_card, prepare_folder, push_folder, push_to_hub
    from .models.auto_segmentation import AutoModelForOpenVocabularySegmentation
    from .models.modeling_open_vocabulary import OpenVocabularySegmenterOutput
    from .models.processing_masks import post_process_instance_segmentation, post_process_panoptic_segmentation
    from .models.segmentation_result import SegmentationResult, SegmentList
    from .models.segmenting import segment
    from .models.vocabulary import Vocabulary
    from .pruning import (
        ChannelPruningReport,
        ChannelPruningResult,
        ElasticReport,
        ElasticResult,
        LatencyTable,
        NominalAccount,
        PruningConfig,
        PruningPlan,
        PruningReport,
        PruningResult,
        Subnetwork,
        TransferReport,
        TransferResult,
        apply_masks,
        load_transferred,
        measure_latency_table,
        nominal_account,
        prune_channels,
        prune_elastic,
        prune_model,
        save_transferred,
        slice_model,
    )
    from .spectra import (
        LayerSelection,
        SpectralConfig,
        SpectralReport,
        TrainingCost,
        analyze_spectra,
        freeze_unselected,
        full_training_cost,
        get_peft_model,
        select_layers,
        training_cost,
    )

__version__ = "0.1.0"

# Module -> the public names that it is imported for. The same as above; a test compares them.
_LAZY_MODULES = {
    "data.benchmarks": ("BENCHMARKS", "open_benchmark"),
    "data.metric_loading": ("load_metric",),
    "data.metrics": ("MeanIoU",),
    "data.panoptic": ("PanopticQuality",),
    "deploy.autotune": ("TunedSettings", "autotune"),
    "evaluation_protocols": ("PROTOCOLS", "Protocol", "find_protocol"),
    "evaluation_runs": ("EvaluationResult", "evaluate_data"),
    "hub": ("build_card", "prepare_folder", "push_folder", "push_to_hub"),
    "models.auto_segmentation": ("AutoModelForOpenVocabularySegmentation",),
    "models.modeling_open_vocabulary": ("OpenVocabularySegmenterOutput",),
    "models.processing_masks": ("post_process_instance_segmentation", "post_process_panoptic_segmentation"),
    "models.segmentation_result": ("SegmentList", "SegmentationResult"),
    "models.segmenting": ("segment",),
    "models.vocabulary": ("Vocabulary",),
    "pruning": (
        "ChannelPruningReport",
        "ChannelPruningResult",
        "ElasticReport",
        "ElasticResult",
        "LatencyTable",
        "NominalAccount",
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
        "nominal_account",
        "prune_channels",
        "prune_elastic",
        "prune_model",
        "save_transferred",
        "slice_model",
    ),
    "spectra": (
        "LayerSelection",
        "SpectralConfig",
        "SpectralReport",
        "TrainingCost",
        "analyze_spectra",
        "freeze_unselected",
        "full_training_cost",
        "get_peft_model",
        "select_layers",
        "training_cost",
    ),
}
_MODULE_OF = {name: module for module, names in _LAZY_MODULES.items() for name in names}

for _config, _model in (
    (SparseCLIPVisionConfig, SparseCLIPVisionModel),
    (SparseCLIPConfig, SparseCLIPModel),
    (CLIPResNetVisionConfig, CLIPResNetVisionModel),
    (ElasticCLIPVisionConfig, ElasticCLIPVisionModel),
    (ElasticCLIPConfig, ElasticCLIPModel),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
for _config, _model in (
    (DeepLabV3PlusConfig, DeepLabV3PlusForSegmentation),
    (CATSegConfig, CATSegForSegmentation),
    (FCCLIPConfig, FCCLIPForSegmentation),
    (GKCConfig, GKCForSegmentation),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForSemanticSegmentation.register(_config, _model)
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForSemanticSegmentation")
    AutoProcessor.register(_config, OpenVocabularyProcessor)
AutoModelForSemanticSegmentation.register(SparseCLIPConfig, DenseCLIPForSegmentation)
AutoModelForSemanticSegmentation.register(ElasticCLIPConfig, ElasticCLIPForSegmentation)
AutoProcessor.register(ElasticCLIPConfig, OpenVocabularyProcessor)
SparseCLIPVisionModelWithProjection.register_for_auto_class("AutoModel")
ElasticCLIPVisionModelWithProjection.register_for_auto_class("AutoModel")
ElasticCLIPForSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
DenseCLIPForSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
register_pipeline()


def __getattr__(name: str) -> Any:
    """Import what a public name stands for when it is first read, and remember it."""
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List public names before they are imported, too."""
    return sorted({*globals(), *__all__})


__all__ = [
    "BENCHMARKS",
    "PROTOCOLS",
    "AutoModelForOpenVocabularySegmentation",
    "CATSegConfig",
    "CATSegForSegmentation",
    "CLIPResNetVisionConfig",
    "CLIPResNetVisionModel",
    "ChannelPruningReport",
    "ChannelPruningResult",
    "DeepLabV3PlusConfig",
    "DeepLabV3PlusForSegmentation",
    "DenseCLIPForSegmentation",
    "ElasticCLIPConfig",
    "ElasticCLIPForSegmentation",
    "ElasticCLIPModel",
    "ElasticCLIPVisionConfig",
    "ElasticCLIPVisionModel",
    "ElasticCLIPVisionModelWithProjection",
    "ElasticReport",
    "ElasticResult",
    "EvaluationResult",
    "FCCLIPConfig",
    "FCCLIPForSegmentation",
    "GKCConfig",
    "GKCForSegmentation",
    "LatencyTable",
    "LayerSelection",
    "MeanIoU",
    "NominalAccount",
    "OpenVocabularyProcessor",
    "OpenVocabularySegmentationPipeline",
    "OpenVocabularySegmenterOutput",
    "PanopticQuality",
    "Protocol",
    "PruningConfig",
    "PruningPlan",
    "PruningReport",
    "PruningResult",
    "SegmentList",
    "SegmentationResult",
    "SparseCLIPConfig",
    "SparseCLIPModel",
    "SparseCLIPVisionConfig",
    "SparseCLIPVisionModel",
    "SparseCLIPVisionModelWithProjection",
    "SpectralConfig",
    "SpectralReport",
    "Subnetwork",
    "TrainingCost",
    "TransferReport",
    "TransferResult",
    "TunedSettings",
    "Vocabulary",
    "analyze_spectra",
    "apply_masks",
    "autotune",
    "build_card",
    "evaluate_data",
    "find_protocol",
    "freeze_unselected",
    "full_training_cost",
    "get_peft_model",
    "load_metric",
    "load_transferred",
    "measure_latency_table",
    "nominal_account",
    "open_benchmark",
    "post_process_instance_segmentation",
    "post_process_panoptic_segmentation",
    "prepare_folder",
    "prune_channels",
    "prune_elastic",
    "prune_model",
    "push_folder",
    "push_to_hub",
    "save_transferred",
    "segment",
    "select_layers",
    "slice_model",
    "training_cost",
]
