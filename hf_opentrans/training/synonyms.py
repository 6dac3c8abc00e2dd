"""Which of its names a class has in a training step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from hf_opentrans.models.vocabulary import Vocabulary

RANDOM, MAX, MEAN = "random", "max", "mean"
MODES = (MEAN, RANDOM, MAX)


@dataclass(frozen=True)
class SynonymSampler:
    """Turns the names of every class into what a segmenter is given as text.

    Args:
        vocabulary: Encoded: classes such as `"sofa; couch"`, with one embedding per name.
        mode: "mean", the normalised mean over the names of a class, always the same; "random", one name of each
            class, drawn anew in every step (Han et al., arXiv 2303.09181, diversify text so); "max", all names, of
            which the best counts, for models with mask queries alone: others take every name for a class.

    Raises:
        ValueError: If the mode is unknown, or the vocabulary is not encoded.
    """

    vocabulary: Vocabulary
    mode: str = MEAN

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}. It must be one of {', '.join(MODES)}. Correct it.")
        if self.vocabulary.text_embeddings is None:
            raise ValueError(
                "The vocabulary has no text embeddings. It must be encoded first. Call "
                "model.encode_vocabulary(vocabulary, tokenizer)."
            )

    def inputs(self, *seed: int) -> dict[str, Any]:
        """Return keyword arguments of a segmenter: `text_embeddings` of shape `(classes, dim)`, or the `vocabulary`.

        Args:
            *seed: Of the draw, such as the run's and the number of the step; at least one for "random".

        Raises:
            ValueError: If "random" has no seed.
        """
        if self.mode == MAX:
            return {"vocabulary": self.vocabulary}
        if self.mode == MEAN:
            return {"text_embeddings": self.mean()}
        return {"text_embeddings": self._embeddings[self.draw(*seed)]}

    def mean(self) -> torch.Tensor:
        """Return one unit embedding per class, the mean over its names, `(classes, dim)`."""
        found, owners = self._embeddings, self.vocabulary.query_to_class
        total = found.new_zeros(len(self.vocabulary.classes), found.shape[1])
        return normalize(total.index_add_(0, owners.to(found.device), found), dim=-1)

    def draw(self, *seed: int) -> list[int]:
        """Return for every class the position of one of its names in `vocabulary.queries`; all are equally likely.

        Args:
            *seed: The same numbers draw the same names.

        Raises:
            ValueError: If there is none.
        """
        if not seed:
            raise ValueError("There is no seed. A draw needs one, so that it can be repeated. Pass a number.")
        counts = self._counts
        chosen = np.random.default_rng(seed).integers(counts)
        return [int(first) for first in np.cumsum(counts) - counts + chosen]

    @property
    def _embeddings(self) -> Any:
        return self.vocabulary.text_embeddings

    @property
    def _counts(self) -> Sequence[int]:
        return torch.bincount(self.vocabulary.query_to_class).numpy()  # pyright: ignore[reportReturnType]
