"""The best subspaces inside attention heads: whitened SVD for values and for query-key products."""

from dataclasses import dataclass

import torch

# Eigenvalues below this share of the largest are lifted to it before a root or an inverse is taken.
FLOOR = 1e-9


@dataclass(frozen=True)
class Bases:
    """A change of basis per head whose first rows matter most.

    Args:
        reduce: Maps a head's vector to the new basis, `(heads, head_dim, head_dim)`; keep the first rows.
        expand: Maps back, or acts on the other factor of the product; keep the first rows of it.
        errors: `errors[h, r]` is the error of keeping `r` rows of head `h`, `(heads, head_dim + 1)`.
    """

    reduce: torch.Tensor
    expand: torch.Tensor
    errors: torch.Tensor


def value_bases(outgoing: torch.Tensor, inner: torch.Tensor) -> Bases:
    """Find the subspaces of head outputs u that matter most to `outgoing @ u`.

    With inner = Cov(u), F = outgoing inner^1/2 = U S V^T: keeping r rows of V^T inner^-1/2 u costs the sum of the
    squared singular values beyond r (Eckart-Young; the attention rows sum to one, so the map moves into `v_proj`).

    Args:
        outgoing: The head's columns of `out_proj` under the root of the output metric, `(heads, outputs, head_dim)`.
        inner: Covariance of every head's output, given the others or alone, `(heads, head_dim, head_dim)`.
    """
    root, inverse = _roots(inner)
    gram = root @ outgoing.mT @ outgoing @ root
    values, vectors = _descending(gram)
    return Bases(vectors.mT @ inverse, (root @ vectors).mT, _tails(values))


def query_key_bases(metric: torch.Tensor, moment: torch.Tensor) -> Bases:
    """Find the subspaces of queries that matter most.

    `metric` is E[g g^T] of the probes' gradients g at the queries: a covariance of the keys, weighed by how attention
    and all later layers respond. The error of a query change dq is tr(metric E[dq dq^T]). `reduce` maps queries and
    `expand` keys: q . k is kept on the subspace. A constant added to all keys never matters to softmax, so the keys'
    bias is dropped exactly.

    Args:
        metric: `(heads, head_dim, head_dim)`.
        moment: Uncentred E[q q^T], `(heads, head_dim, head_dim)`.
    """
    root, inverse = _roots(moment)
    values, vectors = _descending(root @ metric @ root)
    return Bases(vectors.mT @ inverse, vectors.mT @ root, _tails(values))


def _roots(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return square root and inverse square root of symmetric positive semi-definite matrices."""
    values, vectors = torch.linalg.eigh(matrices)
    tiny = torch.finfo(values.dtype).tiny ** 0.5
    values = values.clamp(min=tiny).maximum(FLOOR * values[..., -1:])
    return (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT, (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT


def _descending(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(matrices)
    return values.flip(-1).clamp(min=0), vectors.flip(-1)


def _tails(values: torch.Tensor) -> torch.Tensor:
    tails = values.flip(-1).cumsum(-1).flip(-1)
    return torch.nn.functional.pad(tails, (0, 1))
