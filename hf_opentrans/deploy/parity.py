"""The comparison of an exported graph with the model in PyTorch, made at every export."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, interpolate

Run = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
NOISE, PICTURES = "noise", "pictures"
_BATCHES = (1, 3)
_MASKS = "masks_queries_logits"
# Outputs in the order in which they are asked for directions, and the dimension that is compared. Masks come first:
# beside them dense embeddings are those of the tower alone.
_DIRECTIONS = {
    _MASKS: 1,
    "dense_embeds": 1,
    "image_embeds": -1,
    "last_hidden_state": -1,
    "text_embeds": -1,
    "logits": 1,
}


@dataclass(frozen=True)
class Limits:
    """What an export must reach.

    Args:
        difference: Largest difference of a value, as a share of the largest absolute value; None where it is only
            reported.
        cosine: Lowest mean cosine of the vectors of all positions.
        agreement: Lowest share of positions with the same best class.
    """

    difference: float | None
    cosine: float
    agreement: float


# fp32 differs by the order of sums alone. Rounding to bf16 or int8 moves every vector, so a single largest difference
# says little there: what counts is the direction of the vectors and the class.
LIMITS = {
    "fp32": Limits(difference=1e-3, cosine=0.9999, agreement=0.99),
    "bf16": Limits(difference=None, cosine=0.99, agreement=0.90),
    "int8": Limits(difference=None, cosine=0.97, agreement=0.85),
}


@dataclass(frozen=True)
class Parity:
    """How far exported and original outputs are apart.

    Args:
        max_difference: Largest difference of a value of the first output.
        max_relative: The same, as a share of the largest absolute value.
        cosine: Mean cosine of the vectors of all positions.
        worst_cosine: The lowest one.
        agreement: Share of positions with the same best class; None where there are no classes.
        vectors: Number of compared vectors.
        median_relative: As `max_relative`, of the median difference.
        has_masks: Whether masks are among the outputs. Their decoder looks at what lies inside of them, so a mask that
            is zero but for rounding may go either way, and a single largest difference says little: the median counts.
    """

    max_difference: float
    max_relative: float
    cosine: float
    worst_cosine: float
    agreement: float | None
    vectors: int
    median_relative: float = 0.0
    has_masks: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return asdict(self)


def limits_of(precision: str) -> Limits:
    """Return what an export in a precision must reach."""
    kind = "int8" if "int8" in precision else precision
    return LIMITS[kind]


def parity_images(size: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return normalised images, four of noise and four with smooth areas and edges as photographs have them.

    Args:
        size: `(height, width)` in pixels.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(sum(_BATCHES), 3, *size, generator=generator)
    coarse = torch.randn(sum(_BATCHES), 3, 5, 5, generator=generator)
    smooth = interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    blocks = torch.randn(sum(_BATCHES), 3, 3, 3, generator=generator)
    flat = interpolate(blocks, size=size, mode="nearest")
    right = torch.arange(size[1]) >= size[1] // 2
    return {NOISE: noise, PICTURES: torch.where(right, flat, smooth).contiguous()}


def measure_parity(
    reference: Run, exported: Run, images: Mapping[str, torch.Tensor], texts: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, Parity]:
    """Run both on every kind of images, as a batch of one and one of three, and compare.

    Args:
        reference: The model in PyTorch.
        exported: What was written, loaded again.
        images: For every kind, at least four images.
        texts: Further inputs, by name, of the batch of one and of that of three; empty where there are none.
    """
    found = {}
    for kind, pixels in images.items():
        pairs = []
        for part, text in zip(pixels.split(_BATCHES), texts or [{}] * len(_BATCHES), strict=False):
            inputs = {"pixel_values": part.contiguous(), **text}
            pairs.append((reference(inputs), exported(inputs)))
        found[kind] = compare(pairs)
    return found


def compare(pairs: list[tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]]) -> Parity:
    """Compare original and exported outputs of several runs.

    Raises:
        RuntimeError: If an exported value is not finite.
    """
    first = next(iter(pairs[0][0]))
    direction = next((name for name in _DIRECTIONS if name in pairs[0][0]), first)
    largest = difference = 0.0
    cosines, same, differences = [], [], []
    for expected, actual in pairs:
        for name, value in actual.items():
            if not bool(value.isfinite().all()):
                raise RuntimeError(
                    f"The exported graph gives NaN or infinite {name}. All values must be finite. Use another "
                    "precision, or export in another format."
                )
        largest = max(largest, float(expected[first].abs().max()))
        differences.append((expected[first] - actual[first]).abs().flatten())
        difference = max(difference, float(differences[-1].max()))
        axis = _DIRECTIONS.get(direction, -1)
        cosines.append(cosine_similarity(expected[direction], actual[direction], dim=axis).flatten())
        if "logits" in expected:
            same.append((expected["logits"].argmax(1) == actual["logits"].argmax(1)).flatten())
    cosine = torch.cat(cosines).double().clamp(-1, 1)  # rounding
    return Parity(
        max_difference=difference,
        max_relative=difference / max(largest, 1e-30),
        cosine=float(cosine.mean()),
        worst_cosine=float(cosine.min()),
        agreement=float(torch.cat(same).double().mean()) if same else None,
        vectors=cosine.numel(),
        median_relative=float(torch.cat(differences).median()) / max(largest, 1e-30),
        has_masks=_MASKS in pairs[0][0],
    )


def check_parity(found: Mapping[str, Parity], precision: str) -> None:
    """Raise where an export is too far from its model.

    In fp32 all kinds of images count. In lower precisions only pictures do: noise is nothing that a model was made
    for, and its classes are decided by less than the rounding.

    Raises:
        RuntimeError: With the figures and the limits.
    """
    limits = limits_of(precision)
    counted = {kind: parity for kind, parity in found.items() if precision == "fp32" or kind != NOISE}
    for kind, parity in counted.items():
        wrong = []
        differs = parity.median_relative if parity.has_masks else parity.max_relative
        if limits.difference is not None and not differs <= limits.difference:
            wrong.append(f"values differ by {differs:.1e} of the largest (at most {limits.difference:g})")
        if not parity.cosine >= limits.cosine:
            wrong.append(f"the mean cosine is {parity.cosine:.4f} (at least {limits.cosine:g})")
        if parity.agreement is not None and not parity.agreement >= limits.agreement:
            wrong.append(
                f"{parity.agreement:.1%} of the positions have the same class (at least {limits.agreement:.0%})"
            )
        if wrong:
            advice = "Report this model: fp32 must not differ."
            if precision != "fp32":
                advice = "Use fp32, or for int8 in ONNX give --calibration images like those that it will see."
            raise RuntimeError(
                f"The exported graph in {precision} is not the model: on {kind} {', '.join(wrong)}. Nothing was "
                f"written. {advice}"
            )
