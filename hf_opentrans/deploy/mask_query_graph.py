"""Segmenters with mask queries as graphs: the classes of the text come in as numbers, for the graph reads no names.

A class may have several names, and FC-CLIP weighs CLIP's own classification by whether training showed the class. Both
follow from the names, so they are worked out outside, by the code that the model in PyTorch runs.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.nn.functional import normalize

from hf_opentrans.deploy.wrappers import TEXT, Exportable
from hf_opentrans.models.modeling_fcclip import FCCLIPForSegmentation, clip_weights
from hf_opentrans.models.modeling_mask_queries import TextClasses
from hf_opentrans.models.modeling_mask_query_base import MaskQueriesModel
from hf_opentrans.models.vocabulary import Vocabulary

QUERIES, WEIGHTS = "class_queries", "class_weights"
# The smallest vocabularies that the tracer takes for "any number".
_EXAMPLE_CLASSES = ((0, 0, 0), (1, 2, 1), (3, 3, 3))


class MaskQueriesGraph(Exportable):
    """A segmenter with mask queries, whose text is an input: embeddings, and how they make up classes.

    Args:
        model: In evaluation mode.
        example: Images to find out by which outputs there are, `(batch_size, 3, height, width)`.
        vocabulary: An encoded one to build in; images are the only input then.
    """

    def __init__(self, model: MaskQueriesModel, example: torch.Tensor, vocabulary: Vocabulary | None = None) -> None:
        super().__init__()
        self.model = model
        fixed: dict[str, torch.Tensor] = {}
        if vocabulary is not None:
            fixed = class_inputs(vocabulary, cast("Any", vocabulary.text_embeddings), ensemble_of(model))
        for name in (TEXT, QUERIES, WEIGHTS):
            self.register_buffer(f"fixed_{name}", fixed.get(name))
        text = torch.eye(4, cast("int", model.config.projection_dim)), torch.tensor(_EXAMPLE_CLASSES)
        with torch.no_grad():
            outputs = self._outputs(example, *text, torch.full((3,), 0.5))
        tensors = [name for name, value in outputs.items() if isinstance(value, torch.Tensor)]
        self.output_names = tuple(sorted(tensors, key=lambda name: name != "logits"))

    def forward(
        self,
        pixel_values: torch.Tensor,
        text_embeddings: torch.Tensor | None = None,
        class_queries: torch.Tensor | None = None,
        class_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return the outputs of the model in the order of `output_names`.

        Args:
            pixel_values: Images of shape `(batch_size, 3, height, width)`.
            text_embeddings: Unit embeddings of shape `(queries, dim)`, class after class. This and all that follows is
                None where a vocabulary is built in.
            class_queries: Indices of the queries of every class, ascending, and its first one again where another
                class has more, `(classes, most)`.
            class_weights: Of FC-CLIP alone: the weight of CLIP's own classification for every class, `(classes,)`.
        """
        if text_embeddings is None or class_queries is None:
            buffers = dict(self.named_buffers(recurse=False))
            text_embeddings, class_queries = buffers[f"fixed_{TEXT}"], buffers[f"fixed_{QUERIES}"]
            class_weights = buffers.get(f"fixed_{WEIGHTS}")
        outputs = self._outputs(pixel_values, text_embeddings, class_queries, class_weights)
        return tuple(cast("torch.Tensor", outputs[name]) for name in self.output_names)

    def _outputs(
        self, pixels: torch.Tensor, text: torch.Tensor, queries: torch.Tensor, weights: torch.Tensor | None
    ) -> Any:
        index = torch.arange(text.shape[0], device=text.device)
        owners = (index[:, None] >= queries[None, :, 0]).long().sum(1) - 1
        classes = TextClasses(text, owners, queries.shape[0], weights, class_queries=queries)
        return self.model(pixels, text_embeddings=classes)


def ensemble_of(model: Any) -> dict[str, Any] | None:
    """Return what FC-CLIP's weights follow from, for `class_inputs`; None of any other model."""
    if not isinstance(model, FCCLIPForSegmentation):
        return None
    config = model.config
    return {"seen": sorted(config.seen_names), "alpha": config.ensemble_alpha, "beta": config.ensemble_beta}


def class_inputs(
    vocabulary: Vocabulary | None, text: torch.Tensor, ensemble: Mapping[str, Any] | None
) -> dict[str, torch.Tensor]:
    """Return all inputs of a graph but the images, by name, in its order.

    Args:
        vocabulary: What the embeddings are of. None makes each a class, which counts as seen, as in PyTorch.
        text: Unit embeddings of shape `(queries, dim)`.
        ensemble: See `ensemble_of`.
    """
    if vocabulary is None:
        count, queries = len(text), torch.arange(len(text))[:, None]
    else:
        count = len(vocabulary.classes)
        owners = vocabulary.query_to_class
        groups = [(owners == index).nonzero()[:, 0].tolist() for index in range(count)]
        most = max(map(len, groups))
        queries = torch.tensor([group + group[:1] * (most - len(group)) for group in groups])
    inputs = {TEXT: text.float(), QUERIES: queries}
    if ensemble is None:
        return inputs
    alpha, beta = float(ensemble["alpha"]), float(ensemble["beta"])
    weights = torch.full((count,), alpha)
    if vocabulary is not None:
        weights = clip_weights(vocabulary, set(ensemble["seen"]), alpha, beta)
    return {**inputs, WEIGHTS: weights}


def parity_inputs(model: MaskQueriesModel, text: torch.Tensor) -> tuple[dict[str, torch.Tensor], ...]:
    """Return text inputs for two runs: every embedding a class; and fewer, with aliases, of seen and unseen classes.

    Args:
        model: FC-CLIP's get weights too.
        text: Unit embeddings of shape `(queries, dim)`, at least 4.
    """
    few = normalize(text[:4], dim=-1)
    queries = torch.tensor(_EXAMPLE_CLASSES)
    ensemble = ensemble_of(model)
    if ensemble is None:
        return {TEXT: few, QUERIES: queries}, class_inputs(None, text, None)
    mixed = torch.tensor([ensemble["alpha"], ensemble["beta"], ensemble["beta"]], dtype=torch.float32)
    return {TEXT: few, QUERIES: queries, WEIGHTS: mixed}, class_inputs(None, text, ensemble)


def dynamic_sizes(inputs: Mapping[str, torch.Tensor]) -> dict[str, dict[int, Any]]:
    """Return which sizes of text inputs are free: the number of queries, and that of classes."""
    queries, classes = torch.export.Dim("queries", min=1), torch.export.Dim("classes", min=1)
    aliases = {1: torch.export.Dim("aliases", min=1)}
    return {
        name: {0: queries} if name == TEXT else {0: classes, **(aliases if name == QUERIES else {})} for name in inputs
    }
