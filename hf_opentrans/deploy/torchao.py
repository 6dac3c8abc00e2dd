"""int8 in PyTorch by torchao, for GPUs: weights alone, or weights and activations.

| precision    | weights               | activations                                  |
|--------------|-----------------------|----------------------------------------------|
| int8-weights | int8, scale per output | as they are                                  |
| int8-dynamic | int8, scale per output | int8, range of every token at the time of use |

transformers does the same while it loads a vision tower: `from_pretrained(folder, quantization_config=TorchAoConfig(
Int8WeightOnlyConfig()))`. What that cannot do, and `quantize_torchao` can: models with two towers, layers that pruning
has emptied, and leaving out those that CUDA has no int8 product for. On a processor use `hf-opentrans export --int8`.
"""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPVisionModel, PreTrainedModel, TorchAoConfig

from hf_opentrans._optional import require
from hf_opentrans.models.modeling_elastic_clip import ElasticMixin

TORCHAO_PRECISIONS = ("int8-weights", "int8-dynamic")
# CUDA's int8 product takes no other widths; torchao then computes on the processor, which costs more than it saves.
_MULTIPLE = 8


@dataclass(frozen=True)
class Int8Layers:
    """What a model holds in int8.

    Args:
        quantized: Paths of the linear layers in int8.
        left: Paths of the other linear layers of the same towers, with the reason; layers without weights are none.
        weight_bytes: Of the linear layers in `quantized` and `left`, scales included.
    """

    quantized: tuple[str, ...]
    left: dict[str, str]
    weight_bytes: int


def quantize_torchao(
    model: PreTrainedModel, precision: str = "int8-weights", *, include_text: bool = False
) -> PreTrainedModel:
    """Return a copy whose linear layers in the vision tower are int8; the model stays as it is.

    The rest computes in the model's own precision: bfloat16 or float16 is what a GPU wants. The copy of a vision tower
    is saved and loaded by `save_pretrained` and `from_pretrained`. A model with two towers cannot be saved in int8,
    because the names of its weights are more than torchao reads: save it before, and quantise after loading.

    Args:
        model: A vision tower, a CLIP or a segmenter with one, in evaluation mode; pruned or not.
        precision: One of `TORCHAO_PRECISIONS`.
        include_text: Whether the text tower's linear layers are int8 too; it is read once per vocabulary.

    Raises:
        ImportError: If torchao is not installed.
        TypeError: If there is no CLIP vision tower that is a ViT, or a checkpoint holds several budgets.
        ValueError: If the precision is unknown, or the model is in training mode, quantised or not of floats.
    """
    if precision not in TORCHAO_PRECISIONS:
        raise ValueError(f"precision is {precision!r}. It must be one of {', '.join(TORCHAO_PRECISIONS)}. Use one.")
    _check_model(model)
    small = copy.deepcopy(model)
    chosen, left = _sort_layers(small, precision, include_text=include_text)
    with _quiet():
        require("torchao", "torchao")
        torchao: Any = import_module("torchao.quantization")
        settings = _settings(torchao, precision, model.device)
        torchao.quantize_(small, settings, filter_fn=lambda module, name: name in chosen)
    _make_savable(small, settings, sorted(left))
    return small


def int8_layers(model: PreTrainedModel) -> Int8Layers:
    """List what is in int8 in the towers of a model, and what its linear layers weigh."""
    quantized, left, size = [], {}, 0
    for name, linear in _linears(model, include_text=True):
        parts = getattr(linear.weight, "tensor_data_names", None)  # of torchao's tensors
        if parts is None:
            left[name] = f"{linear.weight.dtype}".removeprefix("torch.")
            size += linear.weight.nbytes
        else:
            quantized.append(name)
            size += sum(cast("torch.Tensor", getattr(linear.weight, part)).nbytes for part in parts)
    return Int8Layers(tuple(quantized), left, size)


def _check_model(model: Any) -> None:
    if isinstance(model, ElasticMixin):
        raise TypeError(
            f"The model is a {type(model).__name__} with several budgets. int8 weights cannot be cut to a budget. "
            "Quantise one of them: model.extract()."
        )
    if not isinstance(model, PreTrainedModel) or not _towers(model, CLIPVisionModel):
        raise TypeError(
            f"The model is a {type(model).__name__}. It must be or hold a CLIP vision tower that is a ViT. Load one, "
            "such as DenseCLIPForSegmentation or SparseCLIPVisionModel."
        )
    if model.training:
        raise ValueError("The model is in training mode. int8 weights cannot be trained. Call model.eval() first.")
    if getattr(model, "hf_quantizer", None) is not None or int8_layers(model).quantized:
        raise ValueError("The model is quantised already. It must hold floats. Load it again without a quantisation.")
    if not model.dtype.is_floating_point or model.device.type == "meta":
        raise ValueError(
            f"The model is of {model.dtype} on {model.device}. It must hold floats on a real device. Load it again."
        )


def _towers(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def _linears(model: nn.Module, *, include_text: bool) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers of the towers that hold weights, with their paths."""
    kinds = (CLIPVisionModel, CLIPTextModel) if include_text else (CLIPVisionModel,)
    for tower in _towers(model, cast("Any", kinds)):
        for name, module in model.get_submodule(tower).named_modules(prefix=tower):
            if isinstance(module, nn.Linear) and module.weight.numel():
                yield name, module


def _sort_layers(model: nn.Module, precision: str, *, include_text: bool) -> tuple[set[str], set[str]]:
    """Return the paths of the linear layers to quantise, and of all others."""
    chosen = set()
    for name, linear in _linears(model, include_text=include_text):
        widths = (linear.in_features, linear.out_features)
        if precision == "int8-weights" or not any(width % _MULTIPLE for width in widths):
            chosen.add(name)
    return chosen, {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - chosen


def _settings(torchao: Any, precision: str, device: torch.device) -> Any:
    """Return torchao's own settings; they must not change those of torch.compile for everybody else."""
    if precision == "int8-weights":
        return torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    # Without these instructions a processor adds pairs of products in 16 bits: full ranges would overflow.
    is_narrow = import_module("torchao.utils").should_reduce_range(device)
    return torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, reduce_range=is_narrow)


def _make_savable(model: PreTrainedModel, settings: Any, left: list[str]) -> None:
    """Let `save_pretrained` write what `from_pretrained` reads, or say why it cannot."""
    quantizers = import_module("transformers.quantizers.quantizer_torchao")
    config = TorchAoConfig(settings, modules_to_not_convert=left)
    quantizer = quantizers.TorchAoHfQuantizer(config, pre_quantized=True)
    if any("." not in name for name, _ in model.named_parameters()):  # torchao reads "module.weight" alone
        quantizer.is_serializable = _refuse_to_save
    else:
        model.config.quantization_config = config
    model.hf_quantizer = quantizer


def _refuse_to_save() -> bool:
    raise ValueError(
        "The model is in int8 and has weights outside all modules, such as logit_scale. torchao writes those but "
        "cannot read them. Save the model before quantize_torchao, and quantise after loading."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torchao says on import: which of its GPU kernels this machine lacks, and deprecations of its own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
