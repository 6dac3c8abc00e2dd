"""Evaluation protocols by name: everything besides model and data that a segmentation score depends on.

Scores of different protocols must not be compared. `native` is the model's own way; the others follow two groups of
papers as far as their knobs are known: see `PROTOCOLS`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, cast

from hf_opentrans.models.configuration_sparse_clip import SEGMENTATION_MODES
from hf_opentrans.models.modeling_dense_clip import DenseCLIPForSegmentation
from hf_opentrans.models.modeling_open_vocabulary import OpenVocabularyModel
from hf_opentrans.models.processing_open_vocabulary import ALIAS_REDUCES, OpenVocabularyProcessor
from hf_opentrans.models.prompt_templates import resolve_templates
from hf_opentrans.models.segmenting import SLIDE_RATIO
from hf_opentrans.models.vocabulary import BACKGROUND_NAME, Vocabulary, background_class

_WHOLE_NUMBERS = ("resolution", "longest_side", "window", "stride", "prefilter")
_NUMBERS = ("logit_scale", "threshold")
INFERENCES = ("whole", "slide")
EVERY_ALIAS_REDUCE = (*ALIAS_REDUCES, "mean_embedding")
ABSENT = ("zero", "ignore")


@dataclass(frozen=True)
class Protocol:
    """What a segmentation score depends on, besides model and data. None leaves a knob to the model.

    Args:
        name: Of the protocol; one that was changed ends in "+".
        resolution: Short side in pixels that images are resized to (bilinear, keeping the shape; then both sides are
            rounded to multiples of the patch size). None: the processor's, times 1.5 in "slide".
        longest_side: Upper bound on the long side in pixels. None: six times the short side.
        inference: "whole": one pass per image. "slide": overlapping square windows, whose tokens are averaged.
        window: Side of the windows in pixels. None: the model's `image_size`.
        stride: Distance of the windows in pixels. None: half a window.
        templates: Prompt templates, by name or as a list. None: the model's own.
        logit_scale: Factor on the cosines before the softmax; it decides what passes a threshold, never which class
            wins. None: the model's own.
        alias_reduce: How the names of a class become its score. "max_prob": highest probability among them, softmax
            over all names (SCLIP, NACLIP). "max_logit": highest logit among them, softmax over classes (FC-CLIP). Both
            choose the same class. "mean_embedding": one query per class, the mean of its names' embeddings.
        background: Words that the class "background" of the data stands for: "words26", "words17", "background", or
            words joined by ";". None: as the data name it. Data without such a class do not get one.
        threshold: Pixels whose best probability is lower become "background", in 0..1. Data without such a class
            ignore it: there it could only lose. None: no threshold.
        prefilter: In every image keep this many names, those with the highest logit anywhere in it; probabilities are
            then over these. None: all names.
        absent: What a class counts in mIoU that is predicted and nowhere in the masks: "zero" (mmsegmentation), or
            "ignore" (detectron2: only classes in the masks are averaged).
        mode: How a training-free segmenter reads the last block of CLIP (see `modeling_open_vocabulary`). None: the
            model's own.

    Raises:
        ValueError: If a value is out of range, or knobs exclude each other.
    """

    name: str = "native"
    resolution: int | None = None
    longest_side: int | None = None
    inference: str = "whole"
    window: int | None = None
    stride: int | None = None
    templates: str | Sequence[str] | None = None
    logit_scale: float | None = None
    alias_reduce: str = "max_prob"
    background: str | None = None
    threshold: float | None = None
    prefilter: int | None = None
    absent: Literal["zero", "ignore"] = "zero"
    mode: str | None = None

    def __post_init__(self) -> None:
        choices: dict[str, Sequence[str]] = {"inference": INFERENCES, "alias_reduce": EVERY_ALIAS_REDUCE}
        choices |= {"absent": ABSENT} | ({"mode": SEGMENTATION_MODES} if self.mode is not None else {})
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}. It must be one of {', '.join(known)}.")
        for name in ("resolution", "longest_side", "window", "stride", "logit_scale", "prefilter"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}. It must be above 0. Correct it or leave it to the model.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}. It is a probability and must lie in 0..1.")
        if self.inference == "whole" and (self.window, self.stride) != (None, None):
            raise ValueError(
                f"inference is 'whole', with window {self.window} and stride {self.stride}. Windows belong to "
                "'slide'. Leave them out, or use inference='slide'."
            )
        if self.longest_side is not None and self.longest_side < (self.resolution or 0):
            raise ValueError(
                f"longest_side is {self.longest_side}, below the resolution {self.resolution}. The long side is at "
                "least as long as the short one. Raise it."
            )
        if self.templates is not None:
            resolve_templates(self.templates)
            if not isinstance(self.templates, str):
                object.__setattr__(self, "templates", tuple(self.templates))

    def to_dict(self) -> dict[str, Any]:
        """Return every knob, ready for JSON."""
        values = asdict(self)
        return values | ({} if isinstance(self.templates, str | None) else {"templates": list(self.templates)})

    def describe(self) -> str:
        """Return every knob in one line for people."""
        words = [f"{name} {_spoken(value)}" for name, value in self.to_dict().items() if name != "name"]
        return f"Protocol {self.name}: {', '.join(words)}."

    def check_model(self, model: OpenVocabularyModel) -> None:
        """Refuse knobs that a model does not have.

        Raises:
            ValueError: If a trained segmenter is asked for windows, another mode or another scale.
        """
        if isinstance(model, DenseCLIPForSegmentation):
            return
        asked = {"inference": self.inference if self.inference != "whole" else None}
        asked |= {"mode": self.mode, "logit_scale": self.logit_scale}
        wrong = [f"{name}={value!r}" for name, value in asked.items() if value is not None]
        if wrong:
            raise ValueError(
                f"The protocol {self.name} sets {', '.join(wrong)}, and the model is a {type(model).__name__}. A "
                "trained segmenter reads whole images, in the mode and with the scale that it was trained with. Use "
                "the protocol 'detectron2' or 'native'."
            )

    def resolve(self, model: OpenVocabularyModel, processor: OpenVocabularyProcessor) -> "Protocol":
        """Return the protocol with what it leaves to the model filled in.

        Raises:
            ValueError: See `check_model`.
        """
        self.check_model(model)
        config = cast("Any", model.config)
        own = processor.resolution * (SLIDE_RATIO if self.inference == "slide" else 1)
        values: dict[str, Any] = {"resolution": int(own), "templates": config.segmentation_templates}
        values["mode"] = config.segmentation_mode
        if self.inference == "slide":
            values["window"] = int(config.vision_config.image_size)
            values["stride"] = (self.window or values["window"]) // 2
        if isinstance(model, DenseCLIPForSegmentation):
            values["logit_scale"] = float(config.segmentation_logit_scale)
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})

    def vocabulary(self, class_names: Sequence[str]) -> Vocabulary:
        """Return the classes of a data set as this protocol names them, not yet encoded.

        Args:
            class_names: Names by class index; ";" separates aliases.

        Raises:
            ValueError: If the templates are left to the model: see `resolve`.
        """
        if self.templates is None:
            raise ValueError("The protocol leaves the templates to the model. They are needed. Call resolve first.")
        plain = Vocabulary(class_names, templates=self.templates)
        if self.background is not None and BACKGROUND_NAME in plain.names:
            groups = list(plain.classes)
            place = plain.names.index(BACKGROUND_NAME)
            groups[place] = background_class(self.background, [*groups[:place], *groups[place + 1 :]])
            plain = Vocabulary(groups, templates=self.templates)
        return plain.merged() if self.alias_reduce == "mean_embedding" else plain


def _spoken(value: object) -> str:
    if value is None:
        return "-"
    return f"[{len(value)}]" if isinstance(value, list) else f"{value}"


PROTOCOLS: dict[str, Protocol] = {
    "native": Protocol("native"),
    # SCLIP and NACLIP, in mmsegmentation. Of their repositories: the long side of at most 2048, and the threshold of
    # the sets with background. They tune aliases and scale for single sets, which is left out here.
    "dense336": Protocol(
        "dense336",
        resolution=336,
        longest_side=2048,
        inference="slide",
        window=224,
        stride=112,
        templates="imagenet80",
        logit_scale=40.0,
        alias_reduce="max_prob",
        threshold=0.1,
        absent="zero",
    ),
    # FC-CLIP and other trained segmenters, in detectron2.
    "detectron2": Protocol(
        "detectron2",
        resolution=640,
        longest_side=2560,
        templates="vild14",
        alias_reduce="max_logit",
        absent="ignore",
    ),
}


def find_protocol(name: str, /, **overrides: Any) -> Protocol:
    """Return a protocol by name, with some knobs changed.

    Args:
        name: One of `PROTOCOLS`.
        **overrides: Fields of [`Protocol`]. `inference="whole"` also drops the windows.

    Raises:
        ValueError: If the name or a knob is unknown, or a value does not fit.

    Example:
        >>> find_protocol("dense336", stride=56).stride
        56
    """
    if name not in PROTOCOLS:
        raise ValueError(f"There is no protocol {name!r}. The protocols are {', '.join(PROTOCOLS)}. Choose one.")
    known = [field.name for field in fields(Protocol) if field.name != "name"]
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ValueError(f"A protocol has no knob {unknown[0]!r}. Its knobs are {', '.join(known)}. Correct the name.")
    if overrides.get("inference") == "whole":
        overrides = {"window": None, "stride": None} | overrides
    found = PROTOCOLS[name]
    changed = replace(found, **overrides)
    return found if changed == found else replace(changed, name=f"{name}+")


def knobs_of_text(assignments: Sequence[str]) -> dict[str, Any]:
    """Read knobs of a protocol as they are typed: "stride=56", "threshold=0.3", "background=words26", "window=none".

    Args:
        assignments: KNOB=VALUE each; "none" leaves the knob to the model.

    Raises:
        ValueError: If one is no assignment, its value is no number where one is needed, or a knob is set twice.
    """
    found: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name or not value:
            raise ValueError(f"Got {text!r}. A knob is set as KNOB=VALUE. Write for example threshold=0.3.")
        if name in found:
            raise ValueError(f"The knob {name!r} is set twice, to {found[name]!r} and {value!r}. Keep one of them.")
        found[name] = _typed(name, value)
    return found


def _typed(name: str, value: str) -> int | float | str | None:
    if value.casefold() == "none":
        return None
    if name not in (*_WHOLE_NUMBERS, *_NUMBERS):
        return value
    whole = name in _WHOLE_NUMBERS
    try:
        return int(value) if whole else float(value)
    except ValueError:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name} is {value!r}. It must be {kind}, or none. Correct it.") from None
