"""Images of any kind to 8-bit RGB: paths, PIL images, arrays; grey, palette, transparent and 16-bit ones."""

import io
import re
import time
from collections.abc import Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, cast
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

ImageInput = str | Path | Image.Image | np.ndarray | torch.Tensor
# Pillow's own guard against decompression bombs stays in force; this only names the suffixes of folders' images.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_DOWNLOAD_BYTES = 64 * 2**20
DOWNLOAD_SECONDS = 30.0
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# Neither local files nor ftp, also when a server redirects there.
_HANDLERS = (
    request.ProxyHandler,
    request.UnknownHandler,
    request.HTTPHandler,
    request.HTTPSHandler,
    request.HTTPDefaultErrorHandler,
    request.HTTPRedirectHandler,
    request.HTTPErrorProcessor,
)


def load_rgb(image: ImageInput, timeout: float | None = None) -> Image.Image:
    """Return an 8-bit RGB image, upright by its EXIF tag, transparent parts on white.

    Args:
        image: A path, an address (http, https; up to 64 MiB), a PIL image, or an array of shape `(height, width)`,
            `(height, width, 1 | 3 | 4)` with values in 0..255 (uint8), 0..65535 (uint16) or 0..1 (floating point).
        timeout: Seconds that a download may take. Defaults to 30.

    Raises:
        FileNotFoundError: If the path or the address does not exist.
        ConnectionError: If the address cannot be read.
        TimeoutError: If the download takes too long.
        ValueError: If the file is no image, is cut short or too large, or the array has another shape or range.
        TypeError: If it is something else.
    """
    if isinstance(image, str) and _ADDRESS.match(image):
        return _from_address(image, timeout)
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


def check_timeout(timeout: float | None) -> None:
    """Refuse a time limit that is not a positive number of seconds.

    Raises:
        ValueError: If it is not.
    """
    is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and 0 < timeout < float("inf")):
        raise ValueError(f"timeout is {timeout!r}. It must be a positive number of seconds. Leave it out for 30.")


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
    return _decode(path, repr(str(path)))


def _decode(source: Path | io.BytesIO, name: str) -> Image.Image:
    """Read the file at a path or in memory; `name` is what errors call it."""
    try:
        with Image.open(source) as opened:
            return _to_rgb(opened)
    except UnidentifiedImageError as err:
        raise ValueError(
            f"{name} is not an image that Pillow can read. Give a JPEG, PNG, WebP, BMP, GIF or TIFF file."
        ) from err
    except Image.DecompressionBombError as err:
        raise ValueError(f"{name} is too large: {err}. Scale it down before use.") from err
    except (OSError, SyntaxError, ValueError, EOFError) as err:
        raise ValueError(
            f"The image {name} is damaged or cut short ({err}). Every pixel must be readable. "
            "Copy or download it again."
        ) from err


def _from_address(address: str, timeout: float | None) -> Image.Image:
    check_timeout(timeout)
    try:
        parts = urlsplit(address)
    except ValueError as err:
        raise ValueError(
            f"The address of an image is not valid ({err}). It must be one of http or https. Correct it."
        ) from err
    if parts.scheme.lower() not in ("http", "https"):
        raise ValueError(
            f"The image is named by an address of the kind {parts.scheme!r}. Only http and https are read. "
            "Give a path for a file on this machine."
        )
    if "@" in parts.netloc:
        raise ValueError(
            f"The address of an image on {parts.hostname!r} holds a user name or password. Neither is sent. Give an "
            "address that is open to everybody."
        )
    shown = f"{parts.scheme}://{parts.hostname}{parts.path}"  # without the query, which may hold a secret
    data, kind = _download(address, shown, DOWNLOAD_SECONDS if timeout is None else timeout)
    return _decode(io.BytesIO(data), f"{shown!r} ({kind})")


def _download(address: str, shown: str, seconds: float) -> tuple[bytes, str]:
    """Return the bytes at an address, and what the server says that they are."""
    opener = request.OpenerDirector()
    for handler in _HANDLERS:
        opener.add_handler(handler())
    try:
        asked = request.Request(address, headers={"User-Agent": "hf_opentrans", "Accept": "image/*"})
        with opener.open(asked, timeout=seconds) as answer:
            return _read(answer, shown, time.monotonic() + seconds), answer.headers.get_content_type()
    except HTTPError as err:
        err.close()
        kind = FileNotFoundError if err.code in (404, 410) else ConnectionError
        raise kind(
            f"The image {shown!r} cannot be read: the server answers {err.code} {err.reason}. The address must be "
            "open to everybody. Check it in a browser."
        ) from err
    except (URLError, HTTPException, ConnectionError, TimeoutError, UnicodeError) as err:
        if isinstance(err, TimeoutError) or isinstance(getattr(err, "reason", None), TimeoutError):
            raise TimeoutError(
                f"The image {shown!r} did not come within {seconds:g} seconds. It must be complete by then. Raise "
                "timeout, or download it first."
            ) from err
        raise ConnectionError(
            f"The image {shown!r} cannot be read ({getattr(err, 'reason', err)}). The server must be within reach. "
            "Check the address and the network."
        ) from err


def _read(answer: HTTPResponse, shown: str, deadline: float) -> bytes:
    """Read an answer to its end, but no longer than the deadline and no more than the limit."""
    parts: list[bytes] = []
    announced, size = answer.length or 0, 0
    while max(announced, size) <= MAX_DOWNLOAD_BYTES:
        if time.monotonic() > deadline:
            raise TimeoutError
        part = answer.read1(2**16)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
    raise ValueError(
        f"The image {shown!r} is larger than {MAX_DOWNLOAD_BYTES // 2**20} MiB. Downloads are limited to that. "
        "Download it yourself and give the path."
    )


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
