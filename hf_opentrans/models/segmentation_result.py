"""What a segmentation returns for one image: ids, scores, a list as transformers' pipelines give it, a picture."""

import colorsys
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

UNLABELLED = -1


@dataclass(frozen=True)
class SegmentationResult:
    """One segmented image.

    Args:
        segmentation: Class index per pixel, of shape `(height, width)`; -1 where no class passed the threshold.
        scores: Probability of that class per pixel, in 0..1, same shape.
        labels: Class names; `labels[i]` is the name of index i.
        image: The picture that was segmented, for `plot`.
    """

    segmentation: torch.Tensor
    scores: torch.Tensor
    labels: tuple[str, ...]
    image: Image.Image | None = field(default=None, repr=False, compare=False)

    def to_list(self) -> list[dict[str, Any]]:
        """Return `[{"score", "label", "mask"}, ...]` as transformers' image-segmentation pipeline does.

        One entry per class that occurs, largest first; `mask` is a PIL image of mode "L" with 0 and 255, `score` the
        mean probability in it.
        """
        entries = []
        for index, _ in self._areas():
            inside = self.segmentation == index
            mask = Image.fromarray((inside.cpu().numpy() * 255).astype(np.uint8))
            entries.append({"score": float(self.scores[inside].mean()), "label": self.labels[index], "mask": mask})
        return entries

    def plot(self, image: Image.Image | None = None, *, legend: bool = True, opacity: float = 0.6) -> Image.Image:
        """Draw the classes over the picture, with a legend beside it (largest class first, share of the area).

        Args:
            image: The picture to draw on. Defaults to the segmented one; without any, a grey ground.
            legend: Whether to add the legend.
            opacity: Of the colours, in 0..1.
        """
        height, width = self.segmentation.shape
        ground = image or self.image or Image.new("RGB", (width, height), (128, 128, 128))
        ground = ground.convert("RGB").resize((width, height))
        colours = np.array([(0, 0, 0), *(class_colour(i) for i in range(len(self.labels)))], np.float32)
        ids = self.segmentation.cpu().numpy() + 1
        weight = np.where(ids > 0, opacity, 0.0)[..., None]
        pixels = np.asarray(ground, np.float32) * (1 - weight) + colours[ids] * weight
        picture = _enlarge(Image.fromarray(pixels.round().astype(np.uint8)))
        return self._with_legend(picture) if legend else picture

    def save(self, path: str | Path, **options: Any) -> Path:
        """Write the picture that `plot` draws; the suffix chooses the format. Folders are created.

        Args:
            path: Such as "overlay.png".
            **options: Of `plot`.

        Returns:
            The path.

        Raises:
            ValueError: If the suffix is no picture's.
        """
        target = Path(path)
        if Image.registered_extensions().get(target.suffix.lower()) not in Image.SAVE:
            raise ValueError(
                f"{str(path)!r} ends in {target.suffix!r}. The suffix chooses the format of the picture. Use .png, "
                ".jpg or .webp."
            )
        picture = self.plot(**options)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{os.getpid()}.{target.name}")
        try:
            picture.save(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return target

    def _areas(self) -> list[tuple[int, float]]:
        counts = torch.bincount(self.segmentation.flatten() + 1, minlength=len(self.labels) + 1)[1:]
        order = torch.argsort(counts, descending=True, stable=True).tolist()
        return [(i, float(counts[i]) / self.segmentation.numel()) for i in order if counts[i]]

    def _with_legend(self, picture: Image.Image) -> Image.Image:
        areas = self._areas()
        shown = areas[:20]
        size = max(14, min(22, picture.height // (len(shown) + 3)))
        font = ImageFont.load_default(size)
        rows = [(class_colour(i), f"{_shorten(self.labels[i])}  {share:.0%}") for i, share in shown]
        if len(areas) > len(shown):
            rows.append(((255, 255, 255), f"and {len(areas) - len(shown)} more"))
        unlabelled = 1 - sum(share for _, share in areas)
        if unlabelled > 1e-9:
            rows.append(((255, 255, 255), f"unlabelled  {unlabelled:.0%}"))
        line = int(size * 1.5)
        wide = int(max(font.getlength(text) for _, text in rows)) + 3 * size
        tall = line * len(rows) + size
        is_beside = picture.width <= 3 * picture.height  # under panoramas: beside them nobody would find it
        left, top = (picture.width, 0) if is_beside else (0, picture.height)
        sheet = Image.new("RGB", (max(picture.width, left + wide), max(picture.height, top + tall)), "white")
        sheet.paste(picture, (0, 0))
        draw = ImageDraw.Draw(sheet)
        for row, (colour, text) in enumerate(rows):
            x, y = left + size // 2, top + size // 2 + row * line
            draw.rectangle((x, y, x + size, y + size), fill=colour, outline="black")
            draw.text((x + int(size * 1.5), y), text, fill="black", font=font)
        return sheet


class SegmentList(list[dict[str, Any]]):
    """What transformers' image-segmentation pipeline returns, `[{"score", "label", "mask"}, ...]`, and can be drawn.

    Args:
        result: The segmentation that the list is made of; kept as `result`.
    """

    def __init__(self, result: SegmentationResult) -> None:
        super().__init__(result.to_list())
        self.result = result

    def draw(self, image: Image.Image | None = None, **options: Any) -> Image.Image:
        """Draw the classes over the picture: see `SegmentationResult.plot`."""
        return self.result.plot(image, **options)

    def save(self, path: str | Path, **options: Any) -> Path:
        """Write the drawing: see `SegmentationResult.save`."""
        return self.result.save(path, **options)


def class_colour(index: int) -> tuple[int, int, int]:
    """Return the colour of a class: hues by the golden ratio, so that neighbours differ for any number of classes."""
    hue = (0.02 + index * 0.61803398875) % 1.0
    value, saturation = (0.95, 0.65, 0.8)[index % 3], (0.85, 0.95, 0.6)[(index // 3) % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _enlarge(picture: Image.Image, shortest: int = 320) -> Image.Image:
    factor = shortest / max(picture.size)
    if factor <= 1:
        return picture
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.NEAREST)


def _shorten(text: str, longest: int = 28) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "\u2026"
