"""Images of any kind to 8-bit RGB: paths, PIL images, arrays; grey, palette, transparent and 16-bit ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

ImageInput = str | Path | Image.Image | np.ndarray | torch.Tensor
# Pillow's own guard against decompression bombs stays in force; this only names the suffixes of folders' images.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def load_rgb(image: ImageInput) -> Image.Image:
    """Return an 8-bit RGB image, upright by its EXIF tag, transparent parts on white.

    Args:
        image: A path, a PIL image, or an array of shape `(height, width)`, `(height, width, 1 | 3 | 4)` with values in
            0..255 (uint8), 0..65535 (uint16) or 0..1 (floating point).

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If the file is no image, is cut short, or the array has another shape or range.
        TypeError: If it is something else.
    """
    if isinstance(image, (str, Path)):
        return _open(Path(image))
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(_to_uint8(image))
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"Got {type(image).__name__} as an image. It must be a path, a PIL image or an array. Convert it first."
        )
    return _to_rgb(image)


def as_list(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """Return one image or several as a list; an array or tensor is one image."""
    return list(images) if isinstance(images, (list, tuple)) else [cast("ImageInput", images)]


def center_crop(image: ImageInput, image_processor: Any, side: int) -> torch.Tensor:
    """Return pixel values of shape `(3, side, side)`: short side resized, centre cropped, normalised.

    Args:
        image: See `load_rgb`.
        image_processor: CLIP's image processor.
        side: In pixels.
    """
    rgb = load_rgb(image)
    short, long = min(rgb.size), max(rgb.size)
    if long > 3 * short:  # three squares will do: resizing all of a panorama would make it huge for one crop
        margin = (long - 3 * short) // 2
        is_wide = rgb.width == long
        rgb = rgb.crop((margin, 0, long - margin, short) if is_wide else (0, margin, short, long - margin))
    size, crop = {"shortest_edge": side}, {"height": side, "width": side}
    return image_processor(rgb, size=size, crop_size=crop, return_tensors="pt")["pixel_values"][0]


def _open(path: Path) -> Image.Image:
    if not path.exists():
        raise FileNotFoundError(f"There is no image {str(path)!r}. The path must exist. Check the spelling.")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder. A single image is needed here. Name the file.")
    try:
        with Image.open(path) as opened:
            return _to_rgb(opened)
    except UnidentifiedImageError as err:
        raise ValueError(
            f"{str(path)!r} is not an image that Pillow can read. Give a JPEG, PNG, WebP, BMP, GIF or TIFF file."
        ) from err
    except Image.DecompressionBombError as err:
        raise ValueError(f"{str(path)!r} is too large: {err}. Scale it down before use.") from err
    except (OSError, SyntaxError, ValueError, EOFError) as err:
        raise ValueError(
            f"The image {str(path)!r} is damaged or cut short ({err}). Every pixel must be readable. "
            "Copy or download it again."
        ) from err


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit or wider grey: Pillow's own conversion clips at 255
        image = Image.fromarray(_grey_to_uint8(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_to_uint8(values: np.ndarray) -> np.ndarray:
    top = float(values.max(initial=0))
    scale = 1.0 if 1 < top <= 255 else (255.0 if top <= 1 else 255.0 / 65535.0)
    return np.clip(values.astype(np.float64) * scale, 0, 255).astype(np.uint8)


def _to_uint8(array: np.ndarray) -> np.ndarray:
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(
            f"The image array has shape {array.shape}. It must be (height, width) or (height, width, channels) with "
            "1, 3 or 4 channels, channels last. Transpose or squeeze it first."
        )
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return (array // 257).astype(np.uint8)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    values = array.astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 255:
        raise ValueError(
            f"The image array of type {array.dtype} has values outside 0..255 or NaN. Floating-point images must lie "
            "in 0..1, integer ones in 0..255. Rescale it first."
        )
    is_unit = np.issubdtype(array.dtype, np.floating) and values.max() <= 1
    return np.round(values * (255 if is_unit else 1)).astype(np.uint8)
