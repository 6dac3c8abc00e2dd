"""Looking at a checkpoint before any of it is loaded: nothing of it is run, and nothing of its size is allocated.

Weights are read from safetensors alone: a header of names, types and shapes, then numbers. A pickle is a program, and
is never opened. The header is compared with what the configuration asks for, so that a configuration with absurd
widths is refused while the model has no memory yet.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils.hub import cached_file

MOST_CONFIG_BYTES = 4 * 2**20
MOST_INDEX_BYTES = 64 * 2**20
MOST_TOKENIZER_BYTES = 256 * 2**20
# Layers of a foreign model that cost next to nothing, whatever its files hold.
MOST_FREE_LAYERS = 1000
# Tied weights are stored once and counted twice; so many parameters need no file.
TIED, SPARE_PARAMETERS = 2, 2**20
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
CONFIG_FILES += ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "adapter_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_AGAIN = "Save or download the model again."
# What safetensors calls floating-point types.
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of a tensor.

    Args:
        shape: Its shape.
        dtype: Its type, as safetensors writes it: "F32", "I64", ...
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return torch.Size(self.shape).numel()


def read_object(path: Path, most: int = MOST_CONFIG_BYTES) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: The file.
        most: Bytes that it may have.

    Raises:
        ValueError: If it is larger, or holds anything else.
    """
    size = path.stat().st_size
    if size > most:
        raise ValueError(
            f"{str(path)!r} has {size / 2**20:,.0f} MiB. Such a file has at most {most / 2**20:,.0f} MiB, so it is "
            f"not what its name says. {_AGAIN}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:  # a UnicodeDecodeError and a number of too many digits are ValueErrors
        reason = "nested too deeply" if isinstance(err, RecursionError) else str(err)
        raise ValueError(f"{str(path)!r} is not valid ({reason}). It must hold one JSON object. {_AGAIN}") from err
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} is not valid: it holds no JSON object. It must hold one. {_AGAIN}")  # noqa: TRY004
    return values


def check_folder(folder: Path) -> None:
    """Check the small files of a local model folder, and that no other weights than the usual would be read.

    Raises:
        ValueError: If a file is too large, is no JSON object, or the folder holds what is not loaded here.
    """
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            read_object(folder / name)
    for name in TOKENIZER_FILES:
        if (folder / name).is_file() and (folder / name).stat().st_size > MOST_TOKENIZER_BYTES:
            raise ValueError(
                f"{str(folder / name)!r} has more than {MOST_TOKENIZER_BYTES // 2**20} MiB. No tokenizer is that "
                f"large. {_AGAIN}"
            )
    if any(_DISTRIBUTED.fullmatch(path.name) for path in folder.iterdir()):
        raise ValueError(
            f"{str(folder)!r} holds a distributed checkpoint. It would be read in place of {WEIGHTS}, without its "
            "shapes being checked. Save the model again without `distributed_checkpoint`."
        )
    if (folder / "adapter_model.bin").is_file() and not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{str(folder)!r} holds an adapter as a pickle, adapter_model.bin. Reading a pickle can run any program, "
            "so it is never opened. Ask for adapter_model.safetensors, or remove the adapter."
        )


def check_config(values: Mapping[str, Any], source: str) -> None:
    """Check what a configuration says besides sizes.

    Args:
        values: The content of config.json.
        source: Folder or Hub id, for the message.

    Raises:
        ValueError: If it names foreign weights or kernels, or a field has an impossible value.
    """
    for name in ("configuration_files", "transformers_weights"):
        if values.get(name) is not None:
            raise ValueError(
                f"config.json of {source!r} names other files in {name}. Only config.json, {WEIGHTS} and its shards "
                "are read. Save the model again with `save_pretrained`."
            )
    if not isinstance(values.get("model_type") or "", str):
        raise ValueError(f"config.json of {source!r} has a model_type that is no name. {_AGAIN}")  # noqa: TRY004
    names = values.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"config.json of {source!r} has architectures that are no list of names. {_AGAIN}")
    if values.get("quantization_config") is not None:
        raise ValueError(
            f"The weights in {source!r} are quantized. Only floating-point weights are loaded. Give the model that "
            "they were made from."
        )
    for name, value in _fields(values):
        if name in ("dtype", "torch_dtype") and value is not None:
            if not (isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)):
                raise ValueError(
                    f"config.json of {source!r} has {name}={str(value)[:40]!r}. PyTorch has no such type. Correct it: "
                    '"float32".'
                )
        elif name.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise ValueError(
                f"config.json of {source!r} asks for the kernel {value[:60]!r}. That is code of someone else, and is "
                f"never fetched because of a file. Remove {name}."
            )


def _fields(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield all names and values of a configuration, those of its parts too."""
    waiting = [values]
    while waiting:
        part = waiting.pop()
        yield from part.items()
        waiting += [value for value in part.values() if isinstance(value, Mapping)]


def weight_files(source: str, revision: str | None = None) -> list[Path]:
    """Return the safetensors files of a folder or Hub id, fetched where they are not here yet.

    Raises:
        OSError: If there are none, or one of them is missing.
        ValueError: If there are pickles in their place, or the index names files elsewhere.
    """
    whole = cached_file(source, WEIGHTS, revision=revision, _raise_exceptions_for_missing_entries=False)
    if whole is not None:
        return [Path(whole)]
    index = cached_file(source, INDEX, revision=revision, _raise_exceptions_for_missing_entries=False)
    if index is None:
        _refuse_pickles(source)
        raise OSError(f"There is no {WEIGHTS} and no {INDEX}")
    values = read_object(Path(index), MOST_INDEX_BYTES)
    shards = values.get("weight_map")
    if not isinstance(shards, dict) or not isinstance(values.get("metadata"), dict):
        raise ValueError(f"{INDEX} in {source!r} has no weight_map and metadata. It must have both. {_AGAIN}")  # noqa: TRY004
    names = sorted({str(name) for name in shards.values()})
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(
                f"{INDEX} in {source!r} names {name[:80]!r}. Shards are .safetensors files beside it. {_AGAIN}"
            )
    found = {
        name: cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        for name in names
    }
    absent = [name for name, path in found.items() if path is None]
    if absent:
        raise OSError(f"{INDEX} names {len(absent)} files that are not there, among them {absent[0]}")
    return [Path(str(path)) for path in found.values()]


def _refuse_pickles(source: str) -> None:
    folder = Path(source)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)) if folder.is_dir() else []
    if pickles:
        raise ValueError(
            f"{source!r} holds its weights as a pickle, {pickles[0]}. Reading a pickle can run any program, so only "
            f"{WEIGHTS} is opened. Convert it where you trust its origin: load it with the model's own class of "
            "transformers, `use_safetensors=False`, and call `save_pretrained`."
        )


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Read names, types and shapes of all tensors, without their values.

    Raises:
        SafetensorError: If a file is damaged, cut short, or no safetensors file at all.
    """
    stored: dict[str, StoredTensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                piece = opened.get_slice(name)
                stored[name] = StoredTensor(tuple(piece.get_shape()), piece.get_dtype())
    return stored


def check_fits(
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    source: str,
    *,
    prefixes: Sequence[str] = (),
    ignored: Iterable[str] = (),
) -> None:
    """Compare a model that has no memory yet (device "meta") with what the files hold.

    Args:
        model: Built from the configuration.
        stored: See `read_headers`.
        source: Folder or Hub id, for the message.
        prefixes: What names in the files may have in front.
        ignored: Patterns of stored names that the model has no use for.

    Raises:
        ValueError: If a tensor has another shape, is no floating-point one, is missing, or has no place.
    """
    kind, used = type(model).__name__, set[str]()
    missing, misshapen, foreign = [], [], []
    for name, tensor in model.state_dict().items():
        key = next((start + name for start in ("", *prefixes) if start + name in stored), None)
        if key is None:
            missing.append(name)
            continue
        used.add(key)
        if stored[key].shape != tuple(tensor.shape):
            misshapen.append(f"{key} is {stored[key].shape} and not {tuple(tensor.shape)}")
        elif tensor.is_floating_point() and stored[key].dtype not in FLOATS:
            foreign.append(f"{key} ({stored[key].dtype})")
    extra = [name for name in stored if name not in used and not any(re.search(p, name) for p in ignored)]
    if misshapen:
        raise ValueError(
            f"The weights in {source!r} do not have the shapes that its config.json states: {misshapen[0]}"
            f"{_more(misshapen)}. Both must come from the same model. Save the model again with `save_pretrained`."
        )
    if foreign:
        raise ValueError(
            f"The weights in {source!r} are not all floating-point numbers: {foreign[0]}{_more(foreign)}. They must "
            f"be {', '.join(sorted(FLOATS))}. {_AGAIN}"
        )
    if missing:
        raise ValueError(
            f"The checkpoint {source!r} lacks {len(missing)} of the weights that {kind} needs, among them "
            f"{', '.join(missing[:3])}. Missing weights would be random numbers, so nothing was loaded. Give a "
            "complete CLIP checkpoint of this architecture."
        )
    if extra:
        raise ValueError(
            f"The checkpoint {source!r} holds {len(extra)} weights that {kind} has no place for, among them "
            f"{', '.join(sorted(extra)[:3])}. It would compute something else without them. Give the config.json that "
            "belongs to the weights."
        )


def _more(items: Sequence[str]) -> str:
    return f", and {len(items) - 1} more" if len(items) > 1 else ""


def check_foreign_layers(values: Mapping[str, Any], tensors: int, source: str) -> None:
    """Refuse a configuration of any model that counts more layers than its files hold tensors.

    Raises:
        ValueError: If it does.
    """
    most = max(MOST_FREE_LAYERS, tensors)
    for name, value in _fields(values):
        counts = value if isinstance(value, list) else [value]
        if re.search("layer|depth|block", name) and any(type(n) is int and n > most for n in counts):
            raise ValueError(
                f"config.json of {source!r} has {name}={str(value)[:40]}, and its files hold {tensors} tensors. There "
                f"cannot be more layers than weights. {_AGAIN}"
            )


def check_foreign_size(model: nn.Module, stored: Mapping[str, StoredTensor], source: str) -> None:
    """Refuse a model of any class that has far more parameters than its files hold.

    Args:
        model: Built from the configuration on device "meta".
        stored: See `read_headers`.
        source: Folder or Hub id, for the message.

    Raises:
        ValueError: If it has.
    """
    asked = sum(tensor.numel() for tensor in model.state_dict().values())
    held = sum(tensor.numel for tensor in stored.values())
    if asked > TIED * held + SPARE_PARAMETERS:
        raise ValueError(
            f"config.json of {source!r} states a model of {asked:,} parameters, and its files hold {held:,}. Both "
            f"must come from the same model. {_AGAIN}"
        )
