"""Backdrops of the demonstration scenes: procedural patterns and crops of bundled photographs."""

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from hf_opentrans._optional import require

# All are CC0 or public domain according to the scikit-image documentation.
_PHOTOS = (
    "camera.png",
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "rocket.jpg",
    "text.png",
    "clock_motion.png",
)


@lru_cache(maxsize=16)
def load_bundled(file: str) -> np.ndarray:
    """Read a picture that the scikit-image package contains; downloads nothing.

    Args:
        file: File name in the folder `skimage/data` of the installed package.

    Returns:
        (height, width, 3) uint8, read-only.

    Raises:
        ImportError: If scikit-image is not installed, or lacks the file.
    """
    require("demo", "skimage")
    import skimage

    path = Path(skimage.__file__).parent / "data" / file
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except OSError as err:
        raise ImportError(
            f"The installed scikit-image has no readable {path}. The scenes use pictures "
            'bundled with scikit-image 0.26. Run: pip install --upgrade "hf_opentrans[demo]"'
        ) from err
    pixels.flags.writeable = False
    return pixels


def crop_photo(rng: np.random.Generator, photo: np.ndarray, size: int, smallest: float, largest: float) -> np.ndarray:
    """Cut a random square out of a photograph, scale it and maybe flip it.

    Args:
        rng: Advanced by four or five draws.
        photo: (height, width, 3) uint8.
        size: Side of the result in pixels.
        smallest: Smallest side of the square, as a share of the shorter side of `photo`.
        largest: Largest side, at most 1.

    Returns:
        (size, size, 3) float32, 0 to 255.
    """
    height, width = photo.shape[:2]
    side = int(rng.uniform(smallest, largest) * min(height, width))
    y, x = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    square = Image.fromarray(photo[y : y + side, x : x + side])
    square = square.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=1.5)
    pixels = np.asarray(square, np.float32)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def draw_backdrop(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a flat, nearly white, gradient, cloudy, striped or photographic backdrop.

    Args:
        rng: Source of all choices; advanced.
        size: Side in pixels.

    Returns:
        (size, size, 3) float32, a fresh array; photographs may exceed 255 a little.

    Raises:
        ImportError: If a photograph is drawn and scikit-image is not installed.
    """
    kind = rng.random()
    first, second = rng.uniform(0, 255, 3), rng.uniform(0, 255, 3)
    if kind < 0.2:
        return np.broadcast_to(first.astype(np.float32), (size, size, 3)).copy()
    if kind < 0.3:
        return np.full((size, size, 3), rng.uniform(215, 255), np.float32)
    if kind >= 0.78:
        photo = load_bundled(_PHOTOS[rng.integers(len(_PHOTOS))])
        return crop_photo(rng, photo, size, 0.15, 1.0) * np.float32(rng.uniform(0.7, 1.2))
    if kind < 0.5:
        share = _gradient(rng, size)
    elif kind < 0.65:
        share = _clouds(rng, size)
    else:
        share = _stripes(rng, size)
    share = share[..., None]
    return (first * share + second * (1 - share)).astype(np.float32)


def _coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    return y, x


def _gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _coordinates(size)
    angle = rng.uniform(0, 2 * math.pi)
    return np.clip(0.5 + (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle), 0, 1)


def _clouds(rng: np.random.Generator, size: int) -> np.ndarray:
    cells = int(rng.integers(2, 12))
    noise = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
    return np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))


def _stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _coordinates(size)
    frequency, angle = rng.uniform(4, 40), rng.uniform(0, math.pi)
    wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * frequency)
    return (wave > 0).astype(np.float32)
