"""Streaming mean and covariance in double precision, mergeable over batches and over processes."""

from itertools import pairwise

import torch

from hf_opentrans._distributed import add_up, from_first

# A product with its own transpose is symmetric: blocks of at least this many columns form its upper half alone.
BLOCK = 256
MOST_BLOCKS = 8


class CovarianceStatistics:
    """Weighted mean and covariance of rows that arrive in batches.

    Products are formed in the rows' precision after a shift by the first batch's mean, and summed in fp64: the shift
    keeps the fp32 products accurate where the mean is large against the deviation. All processes use the first
    process's shift, so that several processes form the same products as one.

    Args:
        dim: Width of the rows.
        device: Where the sums live.
        tail: The last columns, which are multiplied by the first `tail_with` columns and by nothing else. The other
            entries of their rows and columns are zero in `covariance` and `moment`.
        tail_with: See `tail`.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu", *, tail: int = 0, tail_with: int = 0) -> None:
        self.tail, self.tail_with = tail, tail_with
        self.weight = 0.0
        self.rows = 0
        self._shift: torch.Tensor | None = None
        self._first = torch.zeros(dim, dtype=torch.float64, device=device)
        self._second = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._positive = torch.zeros(dim, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add rows of shape `(count, dim)`, with optional weights of shape `(count,)`."""
        if not len(rows):
            return
        rows = rows.float()
        weights = rows.new_ones(len(rows)) if weights is None else weights.to(rows)
        if self._shift is None:
            self._shift = from_first((weights @ rows) / weights.sum())
        shifted = rows - self._shift
        self._first += (weights @ shifted).double()
        weighted = shifted * weights[:, None]
        for inner, outer in _upper_blocks(len(self._first) - self.tail):
            self._second[inner, outer] += (weighted[:, inner].T @ shifted[:, outer]).double()
        if self.tail:
            last = len(self._first) - self.tail
            self._second[: self.tail_with, last:] += (weighted[:, : self.tail_with].T @ shifted[:, last:]).double()
        self._positive += (weights @ (rows > 0).to(rows)).double()
        self.weight += float(weights.sum(dtype=torch.float64))
        self.rows += len(rows)

    def reduce(self) -> None:
        """Add up what all processes have gathered, in place. Every process must have had rows."""
        counts = torch.tensor([self.weight, float(self.rows)], dtype=torch.float64, device=self._first.device)
        add_up(counts, self._first, self._second, self._positive)
        self.weight, self.rows = float(counts[0]), int(counts[1])

    def merge(self, other: "CovarianceStatistics") -> "CovarianceStatistics":
        """Return the statistics of both sets of rows together; neither input changes."""
        if other._shift is None or self._shift is None:
            return self if other._shift is None else other
        merged = CovarianceStatistics(len(self._first), self._first.device, tail=self.tail, tail_with=self.tail_with)
        merged._shift, merged.weight, merged.rows = self._shift, self.weight + other.weight, self.rows + other.rows
        offset = (other._shift - self._shift).double()
        first = other._first + other.weight * offset
        cross = torch.outer(other._first, offset)
        merged._positive = self._positive + other._positive
        merged._first = self._first + first
        merged._second = self._second + other._second + cross + cross.T + other.weight * torch.outer(offset, offset)
        return merged

    @property
    def mean(self) -> torch.Tensor:
        """Mean of shape `(dim,)`, fp64."""
        if self._shift is None:
            raise ValueError("The statistics hold no rows. Their mean is undefined. Call update first.")
        return self._shift.double() + self._first / self.weight

    @property
    def covariance(self) -> torch.Tensor:
        """Centred covariance of shape `(dim, dim)`, fp64."""
        if self._shift is None:
            raise ValueError("The statistics hold no rows. Their covariance is undefined. Call update first.")
        offset = self._first / self.weight
        return self._mirrored(self._second / self.weight - torch.outer(offset, offset))

    @property
    def positive_rate(self) -> torch.Tensor:
        """Share of the rows that are positive, of shape `(dim,)`, fp64."""
        return self._positive / self.weight

    @property
    def moment(self) -> torch.Tensor:
        """Uncentred second moment of shape `(dim, dim)`, fp64."""
        return self._mirrored(self.covariance + torch.outer(self.mean, self.mean))

    def _mirrored(self, upper: torch.Tensor) -> torch.Tensor:
        """Return the symmetric matrix of an upper half, zero where no products were formed."""
        if self.tail:
            upper[self.tail_with :, len(upper) - self.tail :] = 0
        return upper.triu() + upper.triu(1).T


def _upper_blocks(dim: int) -> list[tuple[slice, slice]]:
    """Return row and column ranges that cover the upper half of a square matrix."""
    count = min(max(dim // BLOCK, 1), MOST_BLOCKS)
    edges = [round(index * dim / count) for index in range(count + 1)]
    return [(slice(start, end), slice(start, dim)) for start, end in pairwise(edges)]
