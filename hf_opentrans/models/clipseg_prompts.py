"""CLIPSeg with many prompts on one image: the image goes through the tower once, not once per prompt."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import CLIPSegForImageSegmentation


@torch.inference_mode()
def clipseg_logits(
    model: CLIPSegForImageSegmentation,
    pixel_values: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    prompts_per_pass: int = 16,
) -> torch.Tensor:
    """Return what CLIPSeg answers to every prompt, for every image; the stock forward repeats the image per prompt.

    Args:
        model: A CLIPSeg, dense or with a transferred subnetwork.
        pixel_values: Images of shape `(batch_size, 3, height, width)`, square.
        input_ids: Prompts of shape `(prompts, tokens)`.
        attention_mask: Of the prompts, same shape.
        prompts_per_pass: Prompts that go through the decoder together.

    Returns:
        Logits of shape `(batch_size, prompts, height, width)`.

    Raises:
        ValueError: If there is no image, or no prompt.
    """
    for name, tensor in (("pixel_values", pixel_values), ("input_ids", input_ids)):
        if len(tensor) == 0:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}. At least one row is needed. Add one.")
    clip: Any = model.clip
    prompts = clip.get_text_features(input_ids, attention_mask=attention_mask).pooler_output
    vision = clip.vision_model(pixel_values, output_hidden_states=True)
    activations = [vision.hidden_states[index + 1] for index in model.extract_layers]
    images = zip(*activations, strict=True)
    return torch.stack([torch.cat(list(_decode(model, image, prompts, prompts_per_pass))) for image in images])


def _decode(
    model: CLIPSegForImageSegmentation, image: tuple[torch.Tensor, ...], prompts: torch.Tensor, size: int
) -> Iterator[torch.Tensor]:
    """Yield the masks of one image, some prompts at a time: activations are shared, not copied, until the decoder."""
    for chunk in prompts.split(size):
        shared = tuple(activation.expand(len(chunk), *activation.shape) for activation in image)
        logits = model.decoder(shared, chunk).logits
        yield logits if logits.ndim == 3 else logits[None]  # a single prompt comes back without its axis
