"""What a latency table times: sublayers alone at any width, the dense tower, and the same without its layers."""

import copy
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from hf_opentrans.models.configuration_sparse_clip import SparseCLIPVisionConfig
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPEncoderLayer, SparseCLIPVisionModel

from .macs import layer_widths
from .surgery import PrunableModel
from .tower import Tower

# Copies of a sublayer that are timed one after the other, as one layer follows the other.
CHAIN = 4
# Weights begin at multiples of this many elements, as those of separate tensors do.
_ALIGNMENT = 64
_Name = TypeVar("_Name")
_COPIED = ("hidden_size", "hidden_act", "layer_norm_eps", "image_size", "patch_size", "num_channels", "projection_dim")

# ("attention", heads, qk width, v width), ("mlp", neurons, 0, 0), or DENSE or FIXED.
Point = tuple[str, int, int, int]
DENSE: Point = ("dense", 0, 0, 0)
FIXED: Point = ("fixed", 0, 0, 0)


def timed_passes(
    vision: CLIPVisionModel,
    dense: SparseCLIPVisionConfig,
    points: Sequence[Point],
    images: tuple[int, int],
    *,
    has_projection: bool,
) -> dict[Point, Callable[[], Any]]:
    """Return everything that a round runs: DENSE, FIXED, and a chain of `CHAIN` sublayers for each of `points`.

    Args:
        vision: Where and in which precision to run, and with which attention implementation.
        dense: Of the dense tower.
        points: Widths to build.
        images: Images per pass, and their side in pixels.
        has_projection: Whether the tower ends in the projection of the class token.
    """
    batch_size, side = images
    where: dict[str, Any] = {"device": vision.device, "dtype": vision.dtype}
    pixels = torch.randn(batch_size, dense.num_channels, side, side).to(**where)
    tokens = 1 + (side // cast("int", dense.patch_size)) ** 2
    hidden = torch.randn(batch_size, tokens, dense.hidden_size).to(**where)
    projection = nn.Linear(dense.hidden_size, dense.projection_dim, bias=False, **where) if has_projection else None
    tower = SparseCLIPVisionModel._from_config(dense, attn_implementation=vision.config._attn_implementation)
    tower = tower.to(**where).eval()
    weights = sum(parameter.numel() for parameter in tower.encoder.layers.parameters())
    pool = _Pool(torch.randn(weights + CHAIN * _ALIGNMENT * 16).mul_(0.02).to(**where))
    layers, tower.encoder.layers = tower.encoder.layers, nn.ModuleList()
    bare = copy.deepcopy(tower)  # with all that a forward pass does around its layers
    tower.encoder.layers = layers

    def run_tower(which: SparseCLIPVisionModel) -> torch.Tensor:
        pooled = which(pixels, interpolate_pos_encoding=True).pooler_output
        return pooled if projection is None else projection(pooled)

    def run_chain(chain: list[nn.Module]) -> torch.Tensor:
        output = hidden
        for sublayer in chain:
            output = sublayer(output, None)
        return output

    passes: dict[Point, Callable[[], Any]] = {
        DENSE: lambda: run_tower(tower),
        FIXED: lambda: run_tower(bare),
    }
    for point in points:
        chain = _chain(dense, point, pool)
        passes[point] = lambda chain=chain: run_chain(chain)
    return passes


class _Pool:
    """Weights as views into one tensor, one after the other, from the start again at its end."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.next = values, 0

    def take(self, shape: torch.Size) -> nn.Parameter:
        count = math.prod(shape)
        if self.next + count > self.values.numel():
            self.next = 0
        taken = self.values[self.next : self.next + count].view(shape)
        self.next += -(-count // _ALIGNMENT) * _ALIGNMENT
        return nn.Parameter(taken, requires_grad=False)


def _chain(dense: SparseCLIPVisionConfig, point: Point, pool: _Pool) -> list[nn.Module]:
    """Build blocks whose other sublayer is left out, with weights from the pool."""
    kind, units, qk, v = point
    if kind == "mlp":
        widths: dict[str, Any] = {"intermediate_size": units, "skip": ["attention"]}
    else:
        widths = {"num_attention_heads": units, "skip": ["mlp"]}
        widths |= {"qk_head_dim": qk, "v_head_dim": v} if units else {}
    config = SparseCLIPVisionConfig(**dense_values(dense) | {"num_hidden_layers": 1, "per_layer_config": {0: widths}})
    config._attn_implementation = dense._attn_implementation
    with torch.device("meta"):
        chain: list[nn.Module] = [SparseCLIPEncoderLayer(config, 0).eval() for _ in range(CHAIN)]
    for block in chain:
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, pool.take(parameter.shape))
    return chain


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return how long `run` takes, with everything that it queues on the device."""
    start = _now(device)
    run()
    return (_now(device) - start) * 1000


def interleave(
    passes: Mapping[_Name, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    device: torch.device | None = None,
    settle: float = 0.0,
) -> dict[_Name, list[float]]:
    """Time passes in turn, A B C A B C ..., so that a drifting machine speed cancels in the ratios of a round.

    Args:
        passes: What to run, by name.
        rounds: Counted rounds.
        warmup: Rounds before those.
        device: Where they run. Defaults to the processor.
        settle: Pause in seconds before every pass.

    Returns:
        Milliseconds by name, one per round.
    """
    where = device or torch.device("cpu")
    times: dict[_Name, list[float]] = {name: [] for name in passes}
    for turn in range(warmup + rounds):
        for name, run in passes.items():
            if settle:
                time.sleep(settle)
            taken = milliseconds(run, where)
            if turn >= warmup:
                times[name].append(taken)
    return times


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def vision_of(model: PrunableModel | Tower) -> CLIPVisionModel:
    """Find the vision tower of a stock or sparse CLIP.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(model, Tower):
        return model.vision
    if isinstance(model, CLIPVisionModel):
        return model
    if isinstance(model, CLIPModel | CLIPVisionModelWithProjection):
        return model.vision_model
    raise TypeError(
        f"The model is a {type(model).__name__}. A latency table needs a CLIP vision tower: CLIPModel, "
        "CLIPVisionModel, CLIPVisionModelWithProjection or their sparse classes. Load the model with one of them."
    )


def dense_config(config: CLIPVisionConfig) -> SparseCLIPVisionConfig:
    """Return the configuration of the dense tower, also of a pruned one."""
    values = dense_values(config)
    dense = SparseCLIPVisionConfig(**values, num_hidden_layers=config.num_hidden_layers)
    dense._attn_implementation = config._attn_implementation
    return dense


def dense_values(config: CLIPVisionConfig) -> dict[str, Any]:
    """Return the widths of the dense tower and all else that its speed depends on, but the number of layers."""
    # __dict__: a plain read raises once a value has become a per-layer attribute.
    stated, widths = config.__dict__, layer_widths(config)
    heads = max(stated["num_attention_heads"], *(width.heads for width in widths))
    return {name: getattr(config, name) for name in _COPIED} | {
        "num_attention_heads": heads,
        "head_dim": stated.get("head_dim") or config.hidden_size // heads,
        "intermediate_size": max(stated["intermediate_size"], *(width.neurons for width in widths)),
    }


def shape_of(vision: CLIPVisionModel) -> dict[str, Any]:
    """Return what `LatencyTable.shape` holds."""
    values = dense_values(vision.config)
    return {
        "hidden_size": values["hidden_size"],
        "layers": vision.config.num_hidden_layers,
        "heads": values["num_attention_heads"],
        "head_dim": values["head_dim"],
        "intermediate_size": values["intermediate_size"],
        "patch_size": values["patch_size"],
        "hidden_act": values["hidden_act"],
        "attention": vision.config._attn_implementation,
    }


def device_of(vision: CLIPVisionModel) -> dict[str, Any]:
    """Return what `LatencyTable.device` holds, of here and now."""
    device = vision.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "processor": processor_name(),
        "accelerator": None if device.type == "cpu" else name,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "dtype": str(vision.dtype).removeprefix("torch."),
    }


def processor_name() -> str:
    """Return what the operating system calls the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
