"""Rebuild a linear layer after inputs were removed: centred delta-ridge, the ridge chosen on held-out data."""

from dataclasses import dataclass

import torch

from .statistics import CovarianceStatistics

# Ridges relative to the mean diagonal of the kept covariance. Large ones matter: design measurements hit 1e-1 often.
RIDGES = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# A ridge of None keeps the weights and only moves the bias by the mean of what was removed.
MEAN_SHIFT = None


@dataclass(frozen=True)
class Rebuilt:
    """A rebuilt layer.

    Args:
        weight: Of shape `(outputs, kept inputs)`, fp64.
        bias: Of shape `(outputs,)`, fp64.
        ridge: The ridge that was chosen; None for the mean shift alone.
        error: Held-out error of the choice under the output metric.
        error_uncompensated: The same for dropping the inputs without any compensation.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    ridge: float | None
    error: float
    error_uncompensated: float


@torch.no_grad()
def delta_ridge(
    weight: torch.Tensor,
    bias: torch.Tensor,
    kept: torch.Tensor,
    fit: CovarianceStatistics,
    held_out: CovarianceStatistics,
    metric: torch.Tensor,
) -> Rebuilt:
    """Move the work of removed inputs onto the kept ones in closed form.

        B = C_PS (C_SS + ridge I)^-1,   W' = W_S + W_P B,   b' = b + W_P (mu_P - B mu_S)

    The ridge shrinks towards plain removal with a mean shift, not towards zero. It is chosen by the held-out error
    `tr(M D C D^T)`; the final solve uses all data.

    Args:
        weight: Of shape `(outputs, inputs)`.
        bias: Of shape `(outputs,)`.
        kept: Indices of the inputs that stay.
        fit: Statistics of the inputs that choose B.
        held_out: Statistics that choose the ridge.
        metric: Output metric M of shape `(outputs, outputs)`.
    """
    device = fit.mean.device
    weight, bias, metric = (x.to(device, torch.float64) for x in (weight, bias, metric))
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=device)
    gone[kept] = False
    total = fit.merge(held_out)
    plain = weight[:, gone]
    centred = held_out.moment_about(fit.mean)
    errors = {}
    for ridge in (MEAN_SHIFT, *RIDGES):
        moved = _moved(plain, fit.covariance, kept, gone, ridge)
        if moved is not None:
            errors[ridge] = _error(plain, moved, centred, kept, gone, metric)
    best, moved = MEAN_SHIFT, torch.zeros_like(weight[:, kept])
    for ridge in sorted(errors, key=errors.__getitem__):  # a system that the fit rows solve may still fail here
        solved = _moved(plain, total.covariance, kept, gone, ridge)
        if solved is not None:
            best, moved = ridge, solved
            break
    zero_mean_shift = held_out.moment_about(torch.zeros_like(fit.mean))
    return Rebuilt(
        weight=weight[:, kept] + moved,
        bias=bias + plain @ total.mean[gone] - moved @ total.mean[kept],
        ridge=best,
        error=errors[best],
        error_uncompensated=_error(plain, torch.zeros_like(moved), zero_mean_shift, kept, gone, metric),
    )


def _moved(
    plain: torch.Tensor, covariance: torch.Tensor, kept: torch.Tensor, gone: torch.Tensor, ridge: float | None
) -> torch.Tensor | None:
    """Return W_P B of shape `(outputs, kept inputs)`; None where the system cannot be solved without a ridge."""
    inner = covariance[kept][:, kept]
    if ridge is None or not len(kept):
        return plain.new_zeros(len(plain), len(kept))
    regular = inner + ridge * inner.diagonal().mean() * torch.eye(len(inner)).to(inner)
    factor, info = torch.linalg.cholesky_ex(regular)
    if int(info) != 0:
        return None
    return torch.cholesky_solve(covariance[kept][:, gone] @ plain.T, factor).T


def _error(
    plain: torch.Tensor,
    moved: torch.Tensor,
    moment: torch.Tensor,
    kept: torch.Tensor,
    gone: torch.Tensor,
    metric: torch.Tensor,
) -> float:
    difference = plain.new_zeros(len(plain), len(moment))
    difference[:, gone] = plain
    difference[:, kept] = -moved
    return float(((metric @ difference) * (difference @ moment)).sum())
