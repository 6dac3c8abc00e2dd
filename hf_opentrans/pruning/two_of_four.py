"""2:4 weight matrices: which two of four consecutive weights stay, and what they become. Tensors in, tensors out."""

from itertools import combinations

import torch

GROUP, KEPT = 4, 2
# Which two of four go.
_PAIRS = torch.tensor(list(combinations(range(GROUP), GROUP - KEPT)))
# Columns whose updates are applied to all later columns at once.
_BLOCK = 128
# Of the mean diagonal, added to the covariance before it is inverted; as in SparseGPT.
DAMPING = 1e-2
# Steps of conjugate gradients that polish the weights that stay.
POLISH = 24


def two_of_four(scores: torch.Tensor) -> torch.Tensor:
    """Return which weights stay: of every four consecutive columns the two with the largest scores.

    Args:
        scores: Of shape `(outputs, inputs)`, with a multiple of four inputs.

    Returns:
        Booleans of the same shape.
    """
    groups = scores.unflatten(1, (-1, GROUP))
    kept = torch.zeros_like(groups, dtype=torch.bool)
    return kept.scatter_(-1, groups.topk(KEPT, dim=-1).indices, True).flatten(1)


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Tell whether a matrix has at most two values that are not zero in every four consecutive columns."""
    if weight.ndim != 2 or weight.shape[1] % GROUP or not weight.numel():
        return False
    return bool(((weight != 0).unflatten(1, (-1, GROUP)).sum(-1) <= KEPT).all())


def compensate_two_of_four(
    weight: torch.Tensor, covariance: torch.Tensor, *, damping: float = DAMPING
) -> torch.Tensor:
    """Make a weight matrix 2:4 so that its outputs change least: optimal brain surgeon, pair by pair.

    With H the damped covariance of the inputs, w one row, P a pair in the current group, and K the inverse of H
    without the columns of earlier groups, which are fixed:

        error(P) = w_P (K_PP)^-1 w_P^T,   w <- w - w_P (K_PP)^-1 K_P:

    Of the six pairs the one with the smallest error goes. K comes from one Cholesky factor U of H^-1: without its
    first j rows and columns, `U^T U` is the inverse of H without its first j rows and columns.

    Weights of earlier groups do not follow the later choices. When all are made, conjugate gradients bring every row
    close to the least-squares weights of its own choice.

    Args:
        weight: Of shape `(outputs, inputs)`, with a multiple of four inputs.
        covariance: Of the inputs, of shape `(inputs, inputs)`.
        damping: Added to the diagonal, as a share of its mean.

    Returns:
        The new weight, fp64.

    Raises:
        RuntimeError: If the covariance is not positive definite in spite of the damping.
    """
    covariance, weight = covariance.double(), weight.double()
    variances = covariance.diagonal()
    mean = torch.where(variances.mean() > 0, variances.mean(), 1.0)  # if no input ever changes, the largest stay
    damped = covariance + damping * mean * torch.eye(len(covariance)).to(mean)
    if bool((variances > 0).any()):
        weight = weight * (variances > 0)  # dead inputs go first: they cost nothing
    return _polish(weight, _remove_pairs(weight.clone(), _inverse_factor(damped)), damped)


def _remove_pairs(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Set the cheapest pair of every group to zero in place, and adapt what comes after it."""
    inputs, pairs = weight.shape[1], _PAIRS.to(weight.device)
    rows = torch.arange(len(weight), device=weight.device)
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        steps = weight.new_zeros(len(weight), end - start)
        for column in range(start, end, GROUP):
            group = slice(column, column + GROUP)
            corner = factor[group, group]
            inner = corner.T @ corner
            inverse = torch.linalg.inv(inner[pairs[:, :, None], pairs[:, None, :]])  # (6, 2, 2)
            values = weight[:, group][:, pairs]  # (outputs, 6, 2)
            gone = torch.einsum("rpi,pij,rpj->rp", values, inverse, values).argmin(1)
            back = inverse @ corner[:, pairs].permute(1, 2, 0)  # (6, 2, 4)
            step = torch.einsum("ri,rij->rj", values[rows, gone], back[gone])
            weight[:, column:end] -= step @ factor[group, column:end]
            weight[rows[:, None], column + pairs[gone]] = 0.0  # what rounding has left
            steps[:, column - start : column - start + GROUP] = step
        weight[:, end:] -= steps @ factor[start:end, end:]
    return weight


def _inverse_factor(damped: torch.Tensor) -> torch.Tensor:
    """Return upper triangular U with `U^T U` the inverse of a matrix."""
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) == 0:
        factor, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if int(info) != 0:
        raise RuntimeError(
            f"The damped covariance of {len(damped)} inputs cannot be inverted. It must be positive definite. Give "
            "more or other calibration images."
        )
    return factor


def _polish(aim: torch.Tensor, weight: torch.Tensor, damped: torch.Tensor) -> torch.Tensor:
    """Lower `tr((aim - weight) damped (aim - weight)^T)` in the weights that are not zero; every step does."""
    mask = (weight != 0).to(weight)
    scale, tiny = damped.diagonal(), torch.finfo(weight.dtype).tiny
    residual = mask * ((aim - weight) @ damped)
    direction = residual / scale
    product = (residual * direction).sum(1, keepdim=True)
    for _ in range(POLISH):
        moved = mask * (direction @ damped)
        length = product / (direction * moved).sum(1, keepdim=True).clamp(min=tiny)
        weight = weight + length * direction
        residual = residual - length * moved
        before, product = product, (residual**2 / scale).sum(1, keepdim=True)
        direction = residual / scale + product / before.clamp(min=tiny) * direction
    return weight
