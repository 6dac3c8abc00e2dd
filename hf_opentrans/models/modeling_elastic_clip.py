"""CLIP with several nested budgets in one checkpoint: switch at run time, or load one of them alone.

Heads, dimensions inside heads and neurons lie in the order of their importance, so that every budget keeps the first
ones. What makes units (rows of `q_proj`, `k_proj`, `v_proj`, `fc1`) is shared. What reads them (`out_proj`, `fc2`, the
last LayerNorm and the projection) is compensated in closed form for every budget; for the smaller budgets the
difference from the largest is stored, in 8 bits per weight with one scale per column.
This file travels with checkpoints as remote code: it imports nothing but torch, safetensors, transformers, siblings.
Reading order: cutting and coding of tensors, reading of files, what all elastic models share, the four models.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.hub import cached_file

from .configuration_elastic_clip import (
    ElasticCLIPConfig,
    ElasticCLIPVisionConfig,
    find_budget,
    values_at,
)
from .configuration_sparse_clip import SparseCLIPConfig, SparseCLIPVisionConfig
from .modeling_dense_clip import DenseCLIPForSegmentation
from .modeling_open_vocabulary import HUB_OPTIONS, PER_FILE_KEYS
from .modeling_sparse_clip import (
    SparseCLIPEncoderLayer,
    SparseCLIPModel,
    SparseCLIPVisionModel,
    SparseCLIPVisionModelWithProjection,
)
from .vocabulary import Vocabulary

WEIGHTS = "model.safetensors"
PREFIX = "elastic"
LARGEST_CODE = 127  # of int8
# Keys of a configuration that belong to one kind of model or one saved model.
_PER_FILE_KEYS = (*PER_FILE_KEYS, "elastic_budgets")
# Linear layers whose rows (or columns) belong to units, and what the units are: positions in a layer's `WIDTHS`.
_QUERIES, _VALUES, _NEURONS = (0, 1), (0, 2), (3, None)
_ROWS = {"self_attn.q_proj": _QUERIES, "self_attn.k_proj": _QUERIES, "self_attn.v_proj": _VALUES, "mlp.fc1": _NEURONS}
_COLUMNS = {"self_attn.out_proj": _VALUES, "mlp.fc2": _NEURONS}
# Options of `from_pretrained` that one budget alone understands, or that the Auto classes pass on for themselves.
_OPTIONS = {*HUB_OPTIONS, "config", "dtype", "torch_dtype", "attn_implementation", "use_safetensors"}
_OPTIONS |= {"trust_remote_code", "code_revision", "adapter_kwargs", "_from_auto", "_commit_hash"}


@dataclass(frozen=True)
class Place:
    """Where a tensor that differs between budgets is, and how.

    Args:
        name: Of the tensor in the model.
        layer: Index of its layer; None above all layers.
        dim: Dimension that the units lie along; None where every budget has all of it.
        units: Positions of units and of their inner width in the `WIDTHS` of the layer.
        kind: "shared" (cut from the largest budget's), "coded" (cut, plus a coded difference) or "own".
    """

    name: str
    layer: int | None
    dim: int | None
    units: tuple[int, int | None]
    kind: str

    def size(self, widths: list[int]) -> tuple[int, int]:
        """Return how many units there are in a layer of these widths, and the inner width."""
        count, inner = self.units
        return widths[count], 1 if inner is None else widths[inner]

    def cut(self, full: torch.Tensor, wide: list[int], narrow: list[int]) -> torch.Tensor:
        """Return the part of the first units: a view where the inner width stays, a copy where it shrinks.

        Args:
            full: The tensor of a layer with the widths `wide`, or its first units.
            wide: Widths of the layer that `full` belongs to.
            narrow: Widths to cut to.
        """
        if self.dim is None:
            return full
        (_, inner), (units, narrower) = self.size(wide), self.size(narrow)
        if inner == narrower or units == 0:
            return full.narrow(self.dim, 0, units * narrower)
        parts = full.unflatten(self.dim, (-1, inner)).narrow(self.dim, 0, units)
        return parts.narrow(self.dim + 1, 0, narrower).flatten(self.dim, self.dim + 1)


def places_of(model: nn.Module) -> list[Place]:
    """List the tensors of a vision tower that differ between budgets.

    Args:
        model: Any of the sparse CLIP classes.
    """
    is_tower = isinstance(model, SparseCLIPVisionModel)
    vision = model if is_tower else cast("SparseCLIPVisionModel", model.vision_model)
    prefix = "" if is_tower else "vision_model."
    found = []
    for index, layer in enumerate(cast("list[SparseCLIPEncoderLayer]", vision.encoder.layers)):
        there = {"self_attn": layer.has_attention, "mlp": layer.has_mlp}
        names = {name: units for name, units in (_ROWS | _COLUMNS).items() if there[name.split(".")[0]]}
        for name, units in names.items():
            path = f"{prefix}encoder.layers.{index}.{name}"
            is_row = name in _ROWS
            found.append(Place(f"{path}.weight", index, 0 if is_row else 1, units, "shared" if is_row else "coded"))
            found.append(Place(f"{path}.bias", index, 0 if is_row else None, units, "shared" if is_row else "own"))
    found += [Place(f"{prefix}post_layernorm.{part}", None, None, (0, None), "own") for part in ("weight", "bias")]
    if hasattr(model, "visual_projection"):
        found.append(Place("visual_projection.weight", None, None, (0, None), "coded"))
    return found


def encode(base: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `target - base` of shape `(rows, columns)` as int8 codes and one float32 scale per column."""
    difference = target.float() - base.float()
    most = difference.abs().amax(0) if len(difference) else difference.new_zeros(difference.shape[1])
    scale = most / LARGEST_CODE
    codes = torch.where(scale > 0, difference / scale.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    return codes.round().clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8), scale


def decode(base: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return what `encode` was given as target, but for rounding, in the precision of `base`."""
    exact = torch.promote_types(base.dtype, torch.float32)
    return (codes.to(exact).mul_(scale.to(exact)).add_(base.to(exact))).to(base.dtype)


def stored_names(place: Place, budget: int) -> tuple[str, ...]:
    """Return the names in the file of what a smaller budget adds for one tensor: codes and scale, or a value."""
    name = f"{PREFIX}.{budget}.{place.name}"
    return {"shared": (), "own": (name,), "coded": (f"{name}.codes", f"{name}.scale")}[place.kind]


def at_budget(
    place: Place, full: torch.Tensor, wide: list[int], narrow: list[int], added: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Return one tensor of a smaller budget, in the precision of the largest budget's.

    Args:
        place: Which tensor.
        full: The largest budget's, or its first units.
        wide: Widths of the layer in the largest budget.
        narrow: Widths of the layer in the smaller one.
        added: What the file adds, see `stored_names`.
    """
    if place.kind == "own":
        return added[0].to(full)
    part = place.cut(full, wide, narrow)
    return decode(part, *added) if place.kind == "coded" else part


class _File:
    """The weights of an elastic checkpoint, opened; reads no more than it is asked for, and counts it."""

    def __init__(self, name: Any, source: Mapping[str, Any]) -> None:
        self.name = str(name)
        self.bytes_read = 0
        found = cached_file(str(name), WEIGHTS, **source)
        try:
            self.opened = safe_open(str(found), framework="pt")
        except SafetensorError as err:
            raise self.damaged(f"cannot be opened ({err})") from err

    def damaged(self, what: str) -> ValueError:
        """Return the error that says what is wrong with the file."""
        return ValueError(
            f"{WEIGHTS} of {self.name!r} {what}. It must be as `save_pretrained` of an elastic model wrote it. Save "
            "or download the model again."
        )

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Read a whole tensor of a known shape."""
        return self._read(name, shape, lambda entry: entry[:] if entry.get_shape() else self.opened.get_tensor(name))

    def start(self, name: str, dim: int, count: int) -> torch.Tensor:
        """Read the first `count` rows (dim 0) or columns (dim 1)."""
        return self._read(name, None, lambda entry: entry[:count] if dim == 0 else entry[:, :count])

    def _read(self, name: str, shape: tuple[int, ...] | None, get: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        try:
            entry = self.opened.get_slice(name)
            found = tuple(entry.get_shape())
            if shape is not None and found != shape:
                raise self.damaged(f"has {name} of the shape {found}, and {shape} belongs there")
            value = get(entry)
        except SafetensorError as err:
            raise self.damaged(f"has no {name} that can be read ({err})") from err
        wants_codes = name.endswith(".codes")
        if wants_codes != (value.dtype == torch.int8) or not (wants_codes or bool(torch.isfinite(value).all())):
            raise self.damaged(f"has {name} with values that cannot be used")
        self.bytes_read += value.numel() * value.element_size()
        return value

    def added(self, place: Place, index: int, narrow: list[int]) -> tuple[torch.Tensor, ...]:
        """Read what a smaller budget adds for one tensor."""
        names = stored_names(place, index)
        if not names:
            return ()
        base = tuple(self.opened.get_slice(place.name).get_shape())
        if place.kind == "own":
            return (self.read(names[0], base),)
        columns = base[1] if place.dim is None else math.prod(place.size(narrow))
        return self.read(names[0], (base[0], columns)), self.read(names[1], (columns,))


_Base = PreTrainedModel if TYPE_CHECKING else object


class ElasticMixin(_Base):
    """Nested budgets of one vision tower. At every moment the model is a pruned model of the budget that is set."""

    plain_class: ClassVar[type[Any]]
    """The class that one budget alone has."""

    _added: dict[str, torch.Tensor] | None = None
    _full: dict[str, nn.Parameter]
    _places: list[Place]
    _active: int = 0

    @property
    def budgets(self) -> tuple[float, ...]:
        """Shares of the dense model that can be set, largest first."""
        return tuple(float(entry["budget"]) for entry in self._entries)

    @property
    def budget(self) -> float:
        """The share of the dense model that is set."""
        return self.budgets[self._active]

    @property
    def _entries(self) -> list[dict[str, Any]]:
        return cast("list[dict[str, Any]]", cast("Any", self.config).elastic_budgets or [])

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, budget: float | None = None, **kwargs: Any
    ) -> Any:
        """Load all budgets, with the largest set; or one of them alone.

        Args:
            pretrained_model_name_or_path: A folder or Hub id.
            *args: Passed on.
            budget: One of `budgets`: nothing else is read from the file, and the result is a plain pruned model.
            **kwargs: Passed on; with `budget` only those that say which files are meant, the precision and the
                implementation of attention.

        Raises:
            ValueError: If there is no such budget, or the file is damaged.
            TypeError: If an option cannot be used with `budget`.
        """
        source = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        if budget is not None:
            return cls._load_alone(pretrained_model_name_or_path, budget, source, kwargs)[0]
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # pyright: ignore[reportGeneralTypeIssues]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if not model._entries:
            raise ValueError(
                f"config.json of {str(pretrained_model_name_or_path)!r} has no elastic_budgets. An elastic model "
                "needs them. Save the model again with `prune_elastic`."
            )
        file, added = _File(pretrained_model_name_or_path, source), {}
        for index, entry in enumerate(model._entries[1:], 1):
            for place in places_of(model):
                narrow = [] if place.layer is None else entry["layers"][place.layer]
                added |= zip(stored_names(place, index), file.added(place, index, narrow), strict=True)
        model.adopt(added)
        return loaded

    @classmethod
    def bytes_of_budget(cls, pretrained_model_name_or_path: Any, budget: float, **source: Any) -> int:
        """Load one budget, and return how many bytes of the file's tensors were read for it.

        Args:
            pretrained_model_name_or_path: A folder or Hub id.
            budget: One of `budgets`.
            **source: Which files are meant, such as `revision`.

        Raises:
            ValueError: If there is no such budget, or the file is damaged.
        """
        return cls._load_alone(pretrained_model_name_or_path, budget, source, dict(source))[1]

    @classmethod
    def _load_alone(cls, name: Any, budget: float, source: dict[str, Any], kwargs: dict[str, Any]) -> tuple[Any, int]:
        unknown = sorted(set(kwargs) - _OPTIONS)
        if unknown:
            raise TypeError(
                f"{unknown[0]} is given with budget={budget!r}. One budget alone is read without it. Leave it out, or "
                "load all budgets."
            )
        config = kwargs.get("config") or cast("Any", cls.config_class).from_pretrained(name, **source)
        index = find_budget(config.elastic_budgets or [], budget)
        entry, wide = config.elastic_budgets[index], config.elastic_budgets[0]["layers"]
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        dtype = config.dtype if dtype in (None, "auto") else dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        with no_init_weights():
            options = {"attn_implementation": kwargs.get("attn_implementation"), "dtype": dtype or torch.float32}
            model = cls.plain_class._from_config(plain_config(config, index), **options)
        file, state = _File(name, source), {}
        places = {place.name: place for place in places_of(model)}
        for key, value in model.state_dict().items():
            place = places.get(key)
            if place is None or index == 0:
                state[key] = file.read(key, tuple(value.shape))
                continue
            layers = ([], []) if place.layer is None else (wide[place.layer], entry["layers"][place.layer])
            if place.dim is None:
                full = file.read(key, tuple(value.shape))
            else:
                full = file.start(key, place.dim, place.size(layers[1])[0] * place.size(layers[0])[1])
            # In the precision of the model first: as a model of all budgets does it.
            state[key] = at_budget(place, full.to(value.dtype), *layers, file.added(place, index, layers[1]))
        model.load_state_dict(state, strict=True)
        model.config.name_or_path = str(name)
        if isinstance(model, DenseCLIPForSegmentation):
            model.loaded_revision = source.get("revision")
            model.default_vocabulary = Vocabulary.find(name, **source)
        return model.eval(), file.bytes_read

    def adopt(self, added: Mapping[str, torch.Tensor]) -> None:
        """Take over what the smaller budgets add to the weights, which are those of the largest.

        Args:
            added: Tensors under the names that `stored_names` gives.
        """
        parameters = dict(self.named_parameters())
        self._places = places_of(self)
        self._full = {place.name: parameters[place.name] for place in self._places}
        self._added = {name: value.to(self.device) for name, value in added.items()}
        self._active = 0

    def set_budget(self, budget: float) -> Self:
        """Set how much of the dense model runs, without reading anything.

        Shared weights become views into those of the largest budget (copies where heads get narrower); what reads them
        is computed from the stored difference. New parameters take the place of the old ones: make optimisers, and
        compiled or exported copies, after this call.

        Args:
            budget: One of `budgets`.

        Raises:
            ValueError: If there is no such budget.
            RuntimeError: If the model was made from a configuration alone.
        """
        index = find_budget(self._entries, budget)
        if index != self._active:
            if self._added is None:
                raise RuntimeError(
                    f"This {type(self).__name__} was made without the weights of its smaller budgets. They come with "
                    "`from_pretrained` or `prune_elastic`. Load the model from its folder."
                )
            self._switch(index)
        return self

    @torch.no_grad()
    def _switch(self, index: int) -> None:
        added, wide, narrow = self._added or {}, *(self._entries[i]["layers"] for i in (0, index))
        for place in self._places:
            full = self._full[place.name]
            value = full
            if index:
                layers = ([], []) if place.layer is None else (wide[place.layer], narrow[place.layer])
                own = tuple(added[name] for name in stored_names(place, index))
                value = nn.Parameter(at_budget(place, full, *layers, own), requires_grad=full.requires_grad)
            path, _, attribute = place.name.rpartition(".")
            module = self.get_submodule(path)
            setattr(module, attribute, value)
            if isinstance(module, nn.Linear) and attribute == "weight":
                module.out_features, module.in_features = value.shape
        self._set_widths(narrow)
        self._active = index

    def _set_widths(self, layers: list[list[int]]) -> None:
        """Tell the attentions and the configuration of the vision tower about the widths of every layer."""
        vision = self if isinstance(self, SparseCLIPVisionModel) else cast("Any", self).vision_model
        for layer, widths in zip(cast("list[SparseCLIPEncoderLayer]", vision.encoder.layers), layers, strict=True):
            if layer.has_attention:
                layer.self_attn.num_heads, layer.self_attn.qk_head_dim, layer.self_attn.v_head_dim = widths[:3]
                layer.self_attn.head_dim = widths[2]
        found = {id(module.config): module.config for module in vision.modules() if hasattr(module, "config")}
        own = getattr(self.config, "vision_config", self.config)
        for config in cast("dict[int, Any]", {**found, id(own): own}).values():
            config.per_layer_config = values_at(config, {"layers": layers, "budget": None})["per_layer_config"]

    def added_bytes(self, index: int) -> int:
        """Return the bytes that one smaller budget, number 1 or higher, adds to the largest one's weights."""
        start = f"{PREFIX}.{index}."
        values = [value for name, value in (self._added or {}).items() if name.startswith(start)]
        return sum(value.numel() * value.element_size() for value in values)

    def extract(self) -> Any:
        """Return a plain pruned model of the budget that is set, with copies of its weights."""
        config = plain_config(cast("Any", self.config), self._active)
        with no_init_weights():
            implementation = self.config._attn_implementation
            model = self.plain_class._from_config(config, attn_implementation=implementation, dtype=self.dtype)
        model.load_state_dict(self.state_dict(), strict=True)
        model.config.name_or_path = self.config.name_or_path
        if hasattr(self, "default_vocabulary"):
            model.default_vocabulary, model.loaded_revision = self.default_vocabulary, self.loaded_revision
        return model.to(self.device).train(self.training)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save all budgets as [`PreTrainedModel.save_pretrained`] does, in one file; the largest is loaded first."""
        active = self._active
        self._switch(0)
        try:
            state = kwargs.pop("state_dict", None) or self.state_dict()
            added = {name: value.contiguous() for name, value in (self._added or {}).items()}
            kwargs["max_shard_size"] = "1000TB"  # one file: parts of it are read by name
            super().save_pretrained(save_directory, *args, state_dict={**state, **added}, **kwargs)
        finally:
            self._switch(active)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move or convert the weights of the largest budget, and cut those of the others from them again."""
        if self._added is None:
            return super()._apply(fn, recurse)
        active = self._active
        self._switch(0)
        super()._apply(fn, recurse)
        self.adopt(self._added)
        self._switch(active)
        return self


def plain_config(config: ElasticCLIPConfig | ElasticCLIPVisionConfig, index: int) -> Any:
    """Return the configuration of a plain pruned model of one budget.

    Args:
        config: Of an elastic model.
        index: Position of the budget in `elastic_budgets`.
    """
    values, entry = config.to_dict(), (config.elastic_budgets or [])[index]
    for name in _PER_FILE_KEYS:
        values.pop(name, None)
    if isinstance(config, ElasticCLIPVisionConfig):
        tower = {k: v for k, v in values_at(config, entry).items() if k not in _PER_FILE_KEYS}
        return SparseCLIPVisionConfig(**tower)
    values["vision_config"] = values_at(cast("SparseCLIPVisionConfig", config.vision_config), entry)
    return SparseCLIPConfig(**values)


def _ignored(kind: type[PreTrainedModel]) -> list[str]:
    """Return the patterns of the tensors in a file that a model leaves to others: those of `ElasticMixin` too."""
    return [*(kind._keys_to_ignore_on_load_unexpected or ()), rf"^{PREFIX}\."]


class ElasticCLIPVisionModel(ElasticMixin, SparseCLIPVisionModel):
    """A [`SparseCLIPVisionModel`] of several budgets."""

    config: ElasticCLIPVisionConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = ElasticCLIPVisionConfig
    plain_class = SparseCLIPVisionModel
    _keys_to_ignore_on_load_unexpected = _ignored(SparseCLIPVisionModel)


class ElasticCLIPVisionModelWithProjection(ElasticMixin, SparseCLIPVisionModelWithProjection):
    """A [`SparseCLIPVisionModelWithProjection`] of several budgets."""

    config: ElasticCLIPVisionConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = ElasticCLIPVisionConfig
    plain_class = SparseCLIPVisionModelWithProjection
    _keys_to_ignore_on_load_unexpected = _ignored(SparseCLIPVisionModelWithProjection)


class ElasticCLIPModel(ElasticMixin, SparseCLIPModel):
    """A [`SparseCLIPModel`] whose vision tower has several budgets."""

    config: ElasticCLIPConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = ElasticCLIPConfig
    plain_class = SparseCLIPModel
    _keys_to_ignore_on_load_unexpected = _ignored(SparseCLIPModel)


class ElasticCLIPForSegmentation(ElasticMixin, DenseCLIPForSegmentation):
    """A [`DenseCLIPForSegmentation`] whose vision tower has several budgets."""

    config: ElasticCLIPConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = ElasticCLIPConfig
    plain_class = DenseCLIPForSegmentation
    _keys_to_ignore_on_load_unexpected = _ignored(DenseCLIPForSegmentation)


__all__ = [
    "ElasticCLIPForSegmentation",
    "ElasticCLIPModel",
    "ElasticCLIPVisionModel",
    "ElasticCLIPVisionModelWithProjection",
]
