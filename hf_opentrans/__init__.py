"""Prune a CLIP image encoder once, without labels; segment any class with it; load it anywhere."""

from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation

from .data.benchmarks import BENCHMARKS, open_benchmark
from .data.metric_loading import load_metric
from .data.metrics import MeanIoU
from .data.panoptic import PanopticQuality
from .evaluation_protocols import PROTOCOLS, Protocol, find_protocol
from .evaluation_runs import EvaluationResult, evaluate_data
from .models.auto_segmentation import AutoModelForOpenVocabularySegmentation
from .models.configuration_catseg import CATSegConfig
from .models.configuration_clip_resnet import CLIPResNetVisionConfig
from .models.configuration_deeplabv3plus import DeepLabV3PlusConfig
from .models.configuration_fcclip import FCCLIPConfig
from .models.configuration_gkc import GKCConfig
from .models.configuration_sparse_clip import SparseCLIPConfig, SparseCLIPVisionConfig
from .models.modeling_catseg import CATSegForSegmentation
from .models.modeling_clip_resnet import CLIPResNetVisionModel
from .models.modeling_deeplabv3plus import DeepLabV3PlusForSegmentation
from .models.modeling_dense_clip import DenseCLIPForSegmentation
from .models.modeling_fcclip import FCCLIPForSegmentation
from .models.modeling_gkc import GKCForSegmentation
from .models.modeling_open_vocabulary import OpenVocabularySegmenterOutput
from .models.modeling_sparse_clip import (
    SparseCLIPModel,
    SparseCLIPVisionModel,
    SparseCLIPVisionModelWithProjection,
)
from .models.processing_masks import post_process_instance_segmentation, post_process_panoptic_segmentation
from .models.processing_open_vocabulary import OpenVocabularyProcessor
from .models.segmentation_result import SegmentationResult
from .models.segmenting import segment
from .models.vocabulary import Vocabulary
from .pruning import (
    ChannelPruningReport,
    ChannelPruningResult,
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

for _config, _model in (
    (SparseCLIPVisionConfig, SparseCLIPVisionModel),
    (SparseCLIPConfig, SparseCLIPModel),
    (CLIPResNetVisionConfig, CLIPResNetVisionModel),
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
AutoModelForSemanticSegmentation.register(SparseCLIPConfig, DenseCLIPForSegmentation)
SparseCLIPVisionModelWithProjection.register_for_auto_class("AutoModel")
DenseCLIPForSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")

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
    "OpenVocabularySegmenterOutput",
    "PanopticQuality",
    "Protocol",
    "PruningConfig",
    "PruningPlan",
    "PruningReport",
    "PruningResult",
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
    "Vocabulary",
    "analyze_spectra",
    "apply_masks",
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
    "prune_channels",
    "prune_model",
    "save_transferred",
    "segment",
    "select_layers",
    "slice_model",
    "training_cost",
]
