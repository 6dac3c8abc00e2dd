"""`AutoModelForOpenVocabularySegmentation`: the right segmenter for any checkpoint, by the type in its config."""

from typing import Any, NoReturn

from transformers import PreTrainedConfig

from .configuration_catseg import CATSegConfig
from .configuration_deeplabv3plus import DeepLabV3PlusConfig
from .configuration_elastic_clip import ElasticCLIPConfig
from .configuration_fcclip import FCCLIPConfig
from .configuration_gkc import GKCConfig
from .configuration_sparse_clip import CLIP_MODEL_TYPES
from .modeling_catseg import CATSegForSegmentation
from .modeling_deeplabv3plus import DeepLabV3PlusForSegmentation
from .modeling_dense_clip import DenseCLIPForSegmentation
from .modeling_elastic_clip import ElasticCLIPForSegmentation
from .modeling_fcclip import FCCLIPForSegmentation
from .modeling_gkc import GKCForSegmentation
from .modeling_open_vocabulary import OpenVocabularyModel

SEGMENTERS: dict[str, type[OpenVocabularyModel]] = dict.fromkeys(CLIP_MODEL_TYPES, DenseCLIPForSegmentation)
SEGMENTERS |= {
    ElasticCLIPConfig.model_type: ElasticCLIPForSegmentation,
    DeepLabV3PlusConfig.model_type: DeepLabV3PlusForSegmentation,
    CATSegConfig.model_type: CATSegForSegmentation,
    FCCLIPConfig.model_type: FCCLIPForSegmentation,
    GKCConfig.model_type: GKCForSegmentation,
}


class AutoModelForOpenVocabularySegmentation:
    """Chooses among the segmenters of this package, as the Auto classes of transformers do.

    A plain CLIP, dense or pruned, becomes a [`DenseCLIPForSegmentation`], which needs no training.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(
            "AutoModelForOpenVocabularySegmentation has no instances. It only chooses a class. Use its "
            "`from_pretrained` or `from_config`."
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a folder or Hub id as the segmenter that its config names.

        Args:
            pretrained_model_name_or_path: A checkpoint of this package, or any CLIP with both towers.
            *args: Passed to the class's `from_pretrained`.
            **kwargs: Passed to the class's `from_pretrained`.

        Raises:
            ValueError: If it holds another kind of model.
        """
        config = kwargs.get("config")
        if config is None:
            source = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "subfolder") if name in kwargs}
            values, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **source)
            model_type = values.get("model_type")
        else:
            model_type = config.model_type
        kind = _class_of(model_type, repr(str(pretrained_model_name_or_path)))
        return kind.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """Build the segmenter of a configuration, with random weights."""
        return _class_of(config.model_type, f"The {type(config).__name__}")._from_config(config, **kwargs)


def _class_of(model_type: Any, source: str) -> type[OpenVocabularyModel]:
    if model_type not in SEGMENTERS:
        raise ValueError(
            f"{source} holds a model of type {model_type!r}. An open-vocabulary segmenter is one of "
            f"{', '.join(SEGMENTERS)}. Give a CLIP model with both towers, or a segmenter that this package trained."
        )
    return SEGMENTERS[model_type]


__all__ = ["AutoModelForOpenVocabularySegmentation"]
