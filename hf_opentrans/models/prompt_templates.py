"""Prompt templates by name, as the open-vocabulary literature uses them.

`imagenet80` is the list published with OpenAI's CLIP (MIT licence); `vild14` is the one of ViLD.
"""

from collections.abc import Sequence

_IMAGENET80 = """a bad photo of a {}.|a photo of many {}.|a sculpture of a {}.|a photo of the hard to see {}.
a low resolution photo of the {}.|a rendering of a {}.|graffiti of a {}.|a bad photo of the {}.
a cropped photo of the {}.|a tattoo of a {}.|the embroidered {}.|a photo of a hard to see {}.
a bright photo of a {}.|a photo of a clean {}.|a photo of a dirty {}.|a dark photo of the {}.
a drawing of a {}.|a photo of my {}.|the plastic {}.|a photo of the cool {}.
a close-up photo of a {}.|a black and white photo of the {}.|a painting of the {}.|a painting of a {}.
a pixelated photo of the {}.|a sculpture of the {}.|a bright photo of the {}.|a cropped photo of a {}.
a plastic {}.|a photo of the dirty {}.|a jpeg corrupted photo of a {}.|a blurry photo of the {}.
a photo of the {}.|a good photo of the {}.|a rendering of the {}.|a {} in a video game.
a photo of one {}.|a doodle of a {}.|a close-up photo of the {}.|a photo of a {}.
the origami {}.|the {} in a video game.|a sketch of a {}.|a doodle of the {}.
a origami {}.|a low resolution photo of a {}.|the toy {}.|a rendition of the {}.
a photo of the clean {}.|a photo of a large {}.|a rendition of a {}.|a photo of a nice {}.
a photo of a weird {}.|a blurry photo of a {}.|a cartoon {}.|art of a {}.
a sketch of the {}.|a embroidered {}.|a pixelated photo of a {}.|itap of the {}.
a jpeg corrupted photo of the {}.|a good photo of a {}.|a plushie {}.|a photo of the nice {}.
a photo of the small {}.|a photo of the weird {}.|the cartoon {}.|art of the {}.
a drawing of the {}.|a photo of the large {}.|a black and white photo of a {}.|the plushie {}.
a dark photo of a {}.|itap of a {}.|graffiti of the {}.|a toy {}.
itap of my {}.|a photo of a cool {}.|a photo of a small {}.|a tattoo of the {}."""

_VILD_SIZES = (
    "a photo of a {size} {{}}.",
    "This is a photo of a {size} {{}}.",
    "There is a {size} {{}} in the scene.",
)

PROMPT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "photo": ("a photo of a {}.",),
    "vild14": (
        "a photo of a {}.",
        "This is a photo of a {}",
        "There is a {} in the scene",
        "There is the {} in the scene",
        "a photo of a {} in the scene",
        *(text.format(size=size) for text in _VILD_SIZES for size in ("small", "medium", "large")),
    ),
    "imagenet80": tuple(_IMAGENET80.replace("\n", "|").split("|")),
}


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Return prompt templates, given one of the names in `PROMPT_TEMPLATES` or the templates themselves.

    Raises:
        ValueError: If the name is unknown, the list is empty, or a template lacks its `{}`.
    """
    if isinstance(templates, str) and "{}" not in templates:
        if templates not in PROMPT_TEMPLATES:
            raise ValueError(
                f"There are no prompt templates named {templates!r}. Known names: {', '.join(PROMPT_TEMPLATES)}. "
                'Give one of them, or your own list such as ["a photo of a {}."].'
            )
        return PROMPT_TEMPLATES[templates]
    chosen = (templates,) if isinstance(templates, str) else tuple(templates)
    without = [text for text in chosen if text.count("{}") != 1]
    if without or not chosen:
        raise ValueError(
            f"The prompt templates {list(chosen)[:3]} are not usable. Each needs exactly one {{}} for the name, and "
            'there must be at least one. Give for example ["a photo of a {}."].'
        )
    return chosen
