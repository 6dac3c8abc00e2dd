"""Unlabelled images in, statistics of every layer out, one layer at a time."""

import hashlib
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import CLIPImageProcessorPil

from hf_opentrans._distributed import own_share
from hf_opentrans.models.image_loading import IMAGE_SUFFIXES, center_crop
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPEncoderLayer

from .plan import WITHOUT_STATISTICS, PruningConfig
from .statistics import CovarianceStatistics
from .tower import Tower

# Share of the weight that the class token gets in the statistics: it is one token among hundreds, and half the output.
CLASS_TOKEN_SHARE = 0.1
# Share of a batch's tokens whose distance from the mean is taken as it is.
OUTLIER_QUANTILE = 0.999
# Calibration images are doubted where fewer than this share of them differ.
SHARE_OF_COPIES = 0.1
# Design measurements: below about ten rows per column, least squares fits noise.
ROWS_PER_COLUMN = 10


@dataclass(frozen=True)
class Calibration:
    """Calibration images as pixel values.

    Args:
        fit: Batches of shape `(batch_size, 3, side, side)` that the weights are fitted on.
        held_out: Batches that choose the ridge; a single image is in both parts.
        fingerprint: SHA-256 of all pixel values.
        num_images: Images in both parts together.
        warnings: What the user should know about the set.
    """

    fit: tuple[torch.Tensor, ...]
    held_out: tuple[torch.Tensor, ...]
    fingerprint: str
    num_images: int
    warnings: tuple[str, ...] = ()


def list_images(images: Any) -> list[Any]:
    """Turn what users give as images into a list: a folder (searched recursively), a dataset, or any iterable.

    Of a folder with `images/` and `classes.json` (the layout of segmentation data) only `images/` is searched.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If there is no image, or a dataset has no image column.
    """
    if isinstance(images, (str, Path)):
        return _list_folder(Path(images))
    features = getattr(images, "features", None)
    if features is not None and not isinstance(images, np.ndarray):
        column = next((name for name, kind in features.items() if type(kind).__name__ == "Image"), None)
        if column is None:
            raise ValueError(
                f"The dataset has the columns {list(features)}, none of type Image. One is needed. Cast it with "
                "dataset.cast_column(name, datasets.Image())."
            )
        if not hasattr(images, "__len__"):  # a streamed dataset
            return [row[column] for row in images]
        return [_Row(images, index, column) for index in range(len(images))]
    if not isinstance(images, Iterable):
        raise TypeError(f"images is {type(images).__name__}. It must be a folder, a dataset or an iterable of images.")
    found = list(images)
    if not found:
        raise ValueError("There are 0 calibration images. At least one is needed. Give a folder or a list of images.")
    return found


def _list_folder(folder: Path) -> list[Any]:
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}. Calibration images must exist. Check the path.")
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file. A folder of images is needed. Give the folder that holds it.")
    if (folder / "classes.json").exists() and (folder / "images").is_dir():
        folder = folder / "images"  # a segmentation folder: its masks are pictures too, but not photographs
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise ValueError(
            f"The folder {str(folder)!r} holds 0 images ({', '.join(IMAGE_SUFFIXES)}). At least one is needed. "
            "Give another folder."
        )
    return found


@dataclass(frozen=True)
class _Row:
    """One image of a dataset, decoded when it is needed."""

    dataset: Any
    index: int
    column: str


def load_calibration(
    images: Any, config: PruningConfig, tower: Tower, image_processor: Any = None, on_image: Callable[[], object] = int
) -> Calibration:
    """Draw images by the seed, prepare them, and check that there are enough.

    Args:
        images: See `list_images`.
        config: Number, seed, resolution, held-out share.
        tower: The tower that will read them.
        image_processor: CLIP's image processor. Defaults to CLIP's mean and deviation.
        on_image: Called after every image.

    Raises:
        ValueError: If there are too few tokens for the widest layer, or an image cannot be read.
    """
    found = list_images(images)
    chosen = draw_images(len(found), config)
    vision = tower.vision.config
    patch = cast("int", vision.patch_size)
    side = config.resolution or cast("int", vision.image_size)
    side = max(side // patch, 1) * patch
    tokens = len(chosen) * (1 + (side // patch) ** 2)
    widest = max(module.in_features for module in tower.consumers.values())
    # The controls read no statistics: any number of images will do for them.
    notes = _check_tokens(tokens, widest, len(chosen)) if config.method not in WITHOUT_STATISTICS else ()
    pixels = prepare_images(found, chosen, side, image_processor, on_image)
    if config.method not in WITHOUT_STATISTICS:
        notes += check_copies(pixels)
    return split_images(pixels, config, notes)


def draw_images(count: int, config: PruningConfig) -> list[int]:
    """Return which of `count` images to use, drawn by the seed."""
    return np.random.default_rng(config.seed).permutation(count)[: config.num_images].tolist()


def prepare_images(
    found: list[Any],
    chosen: Iterable[int],
    side: int,
    image_processor: Any = None,
    on_image: Callable[[], object] = int,
) -> list[torch.Tensor]:
    """Return pixel values `(3, side, side)` of the chosen ones of what `list_images` found."""
    processor = image_processor or CLIPImageProcessorPil()
    pixels = []
    for index in chosen:
        item = found[index]
        image = item.dataset[item.index][item.column] if isinstance(item, _Row) else item
        image = image.get("image", image) if isinstance(image, dict) else image
        pixels.append(center_crop(image, processor, side))
        on_image()
    return pixels


def split_images(pixels: list[torch.Tensor], config: PruningConfig, notes: tuple[str, ...] = ()) -> Calibration:
    """Divide pixel values into batches that weights are fitted on and batches that choose the ridge."""
    held = max(1, round(len(pixels) * config.held_out)) if len(pixels) > 1 else 0
    stacked = torch.stack(pixels)
    digest = hashlib.sha256(stacked.numpy().tobytes()).hexdigest()
    fit, held_out = stacked[held:].split(config.batch_size), stacked[: held or 1].split(config.batch_size)
    return Calibration(fit, held_out, digest, len(pixels), notes)


def check_copies(pixels: list[torch.Tensor]) -> tuple[str, ...]:
    """Warn where most images are copies of each other; return what was warned of."""
    different = len({hash(image.numpy().tobytes()) for image in pixels})
    if different > SHARE_OF_COPIES * len(pixels):
        return ()
    note = (
        f"Only {different} of the {len(pixels)} calibration images differ. Copies teach nothing, and held-out copies "
        "cannot warn of overfitting. Give different images."
    )
    warnings.warn(note, UserWarning, stacklevel=5)
    return (note,)


def _check_tokens(tokens: int, widest: int, images: int) -> tuple[str, ...]:
    per_image = tokens // images
    if tokens < widest + 1:
        raise ValueError(
            f"{images} calibration images give {tokens} tokens. The widest layer has {widest} inputs and needs at "
            f"least {widest + 1}. Give {-(-(widest + 1) // per_image)} images or more, or a larger resolution."
        )
    if tokens >= ROWS_PER_COLUMN * widest:
        return ()
    enough = -(-ROWS_PER_COLUMN * widest // per_image)
    note = (
        f"{images} calibration images give {tokens} tokens for layers of up to {widest} inputs. Fewer than "
        f"{ROWS_PER_COLUMN} tokens per input make the compensation noisy. Use {enough} images or more."
    )
    warnings.warn(note, UserWarning, stacklevel=5)  # the line that called prune_model
    return (note,)


def token_weights(rows: torch.Tensor) -> torch.Tensor:
    """Weigh tokens for the statistics: the class token counts more, outlier tokens less.

    The class token of every image gets `CLASS_TOKEN_SHARE` of the image's weight. A token farther from the batch's
    mean than all but one in a thousand is weighed down to that distance: single register-like tokens would otherwise
    rule the second moments.

    Args:
        rows: Of shape `(batch_size, tokens, dim)`, the class token first.

    Returns:
        Weights of shape `(batch_size * tokens,)`.
    """
    patches = rows.shape[1] - 1
    weights = rows.new_ones(rows.shape[:2])
    weights[:, 0] = patches * CLASS_TOKEN_SHARE / (1 - CLASS_TOKEN_SHARE)
    distances = (rows - rows.mean((0, 1))).norm(dim=-1)
    limit = torch.quantile(distances.flatten().float(), OUTLIER_QUANTILE).to(distances)
    return torch.where(distances > limit, weights * (limit / distances).square(), weights).flatten()


Statistics = dict[str, tuple[CovarianceStatistics, CovarianceStatistics]]
# What is gathered: inputs of `out_proj` and of `fc2`, outputs of `q_proj` and of `k_proj`.
KINDS = ("heads", "neurons", "queries", "keys")


@torch.no_grad()
def walk_layers(
    tower: Tower, calibration: Calibration, on_batch: Callable[[], object] = int, kinds: Container[str] = KINDS
) -> Iterator[tuple[int, Statistics]]:
    """Yield `(layer, {kind: (fit, held out)})`, holding one layer's statistics and the hidden states of all images.

    Args:
        tower: The tower.
        calibration: The images.
        on_batch: Called after every batch.
        kinds: What to gather, some of `KINDS`.

    Raises:
        ValueError: If activations are not finite.
    """
    hidden = embed_parts(tower, calibration)
    for index, layer in enumerate(tower.layers):
        sources = {kind: module for kind, module in _sources(layer).items() if kind in kinds and _width(kind, module)}
        found: Statistics = {}
        for kind, module in sources.items():
            width, device = _width(kind, module), tower.vision.device
            found[kind] = (CovarianceStatistics(width, device), CovarianceStatistics(width, device))
        for part, batches in enumerate(hidden):
            hooks = [_hook(kind, module, found[kind][part]) for kind, module in sources.items()]
            try:
                for position, batch in enumerate(batches):
                    batches[position] = layer(batch, None)
                    on_batch()
            finally:
                for hook in hooks:
                    hook.remove()
        for kind, parts in found.items():
            check_statistics(index, kind, parts)
        yield index, found


def embed_parts(tower: Tower, calibration: Calibration) -> list[list[torch.Tensor]]:
    """Return what the first layer reads, for this process's share of the fitted and of the held-out images."""
    device = tower.vision.device
    parts = (calibration.fit, calibration.held_out)
    return [[tower.embed(batch.to(device)) for batch in own_share(part)] for part in parts]


def _sources(layer: SparseCLIPEncoderLayer) -> dict[str, torch.nn.Linear]:
    found: dict[str, torch.nn.Linear] = {}
    if layer.has_attention:
        attention = layer.self_attn
        found |= {"heads": attention.out_proj, "queries": attention.q_proj, "keys": attention.k_proj}
    return found | ({"neurons": layer.mlp.fc2} if layer.has_mlp else {})


def _width(kind: str, module: torch.nn.Linear) -> int:
    return module.in_features if kind in ("heads", "neurons") else module.out_features


def _hook(kind: str, module: torch.nn.Linear, statistics: CovarianceStatistics) -> Any:
    def feed(rows: torch.Tensor) -> None:
        statistics.update(rows.flatten(0, 1), token_weights(rows))

    def feed_inputs(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        feed(inputs[0])

    def feed_output(_: torch.nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        feed(output)

    if kind in ("heads", "neurons"):
        return module.register_forward_pre_hook(feed_inputs)
    return module.register_forward_hook(feed_output)


def check_statistics(layer: int, kind: str, parts: tuple[CovarianceStatistics, CovarianceStatistics]) -> None:
    """Add up over processes, and raise ValueError where activations were not finite."""
    for part in parts:
        part.reduce()
        if not bool(torch.isfinite(part.covariance).all()):
            raise ValueError(
                f"The activations before the {kind} of layer {layer} are not finite. Pruning needs finite numbers. "
                "Check the weights and the images, or load the model in float32."
            )
