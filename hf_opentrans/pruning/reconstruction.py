"""Rebuild a linear layer in closed form: regress what is missing on what is left; held-out data choose how far."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .statistics import CovarianceStatistics

# Ridges relative to the mean diagonal of the inputs' covariance. Design measurements hit 1e-1 often.
RIDGES = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# A ridge of None keeps the weights and only moves the bias.
MEAN_SHIFT = None
# Less than the full gap only where held-out error falls by this share: a held-out split is noisier than the final
# solve, which has all images. Measured: small gains there are losses on unseen images.
GAP_MARGIN = 0.05


@dataclass(frozen=True)
class Rebuilt:
    """A rebuilt layer.

    Args:
        weight: Of shape `(outputs, inputs)`, fp64.
        bias: Of shape `(outputs,)`, fp64.
        ridge: The ridge that was chosen; None where the weights were kept.
        gap_factor: Share of the earlier layers' error that the target includes.
        error: Held-out error of the choice under the output metric.
        error_before: The same for the weights that came in.
        is_kept: Whether nothing was changed, because every change raised the held-out error.
        is_singular: Whether no ridge made the system solvable, so that only the bias could move.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    ridge: float | None
    gap_factor: float
    error: float
    error_before: float
    is_kept: bool = False
    is_singular: bool = False


@torch.no_grad()
def regress(
    weight: torch.Tensor,
    bias: torch.Tensor,
    fit: CovarianceStatistics,
    held_out: CovarianceStatistics,
    metric: torch.Tensor,
    *,
    ridges: Sequence[float] = RIDGES,
    gap_factors: Sequence[float] = (1.0,),
) -> Rebuilt:
    """Refit a linear layer to a target by centred ridge regression that shrinks towards the weights that came in.

        D = C_rx (C_xx + ridge I)^-1,   W' = W + D,   b' = E[t] - W' E[x],   r = t - W x

    Shrinking the change and not the weights (delta-ridge) makes a large ridge equal to plain removal with a mean
    shift. With x the kept inputs of the dense layer and t its output this is the optimal compensation of removed
    inputs; with x the pruned model's own inputs and t the dense output plus the gap of the residual streams it is
    the depth-order refit. Ridge and gap factor are chosen by the held-out `tr(M E[(t - y)(t - y)^T])`, the full gap
    included; the final solve uses all data.

    Args:
        weight: W of shape `(outputs, inputs)`.
        bias: Of shape `(outputs,)`.
        fit: Statistics of rows [x, t] or [x, t, gap], where t includes the full gap.
        held_out: The same of other images.
        metric: Output metric M of shape `(outputs, outputs)`.
        ridges: Candidates; the mean shift alone and no change at all are always candidates too.
        gap_factors: Candidates; anything but 1 needs the gap in the rows.
    """
    device = fit.mean.device
    weight, bias, metric = (x.to(device, torch.float64) for x in (weight, bias, metric))
    seen, unseen, total = (_Residual(weight, part) for part in (fit, held_out, fit.merge(held_out)))
    before = unseen.error(torch.zeros_like(weight), bias, metric)
    scores: dict[tuple[float | None, float], float] = {}
    for ridge in (MEAN_SHIFT, *ridges):
        solved = seen.solve(ridge, 1.0)
        if solved is not None:
            scores[ridge, 1.0] = unseen.error(*solved, metric)
    best, _ = min(scores, key=scores.__getitem__)
    for factor in gap_factors:
        solved = seen.solve(best, factor) if factor != 1.0 else None
        error = float("inf") if solved is None else unseen.error(*solved, metric)
        if error < (1 - GAP_MARGIN) * scores[best, 1.0]:
            scores[best, factor] = error
    is_singular = bool(ridges) and all(ridge is MEAN_SHIFT for ridge, _ in scores)
    for ridge, factor in sorted(scores, key=scores.__getitem__):
        solved = total.solve(ridge, factor)  # a system that the fit rows solve may still fail here
        if scores[ridge, factor] >= before:
            break
        if solved is not None:
            error = scores[ridge, factor]
            return Rebuilt(weight + solved[0], solved[1], ridge, factor, error, before, is_singular=is_singular)
    return Rebuilt(weight, bias, None, 1.0, before, before, is_kept=True, is_singular=is_singular)


class _Residual:
    """Moments of the inputs and of the residual r = t - W x."""

    def __init__(self, weight: torch.Tensor, rows: CovarianceStatistics) -> None:
        outputs, inputs = weight.shape
        mean, covariance = rows.mean, rows.covariance
        target = slice(inputs, inputs + outputs)
        self.inputs, self.mean_inputs = covariance[:inputs, :inputs], mean[:inputs]
        self.mean = mean[target] - weight @ self.mean_inputs
        self.cross = covariance[target, :inputs] - weight @ self.inputs
        self.residual = covariance[target, target] - self.cross @ weight.T - weight @ covariance[target, :inputs].T
        self.gap_mean, self.gap_cross = mean[inputs + outputs :], covariance[inputs + outputs :, :inputs]

    def solve(self, ridge: float | None, factor: float) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the change of the weights and the new bias; None where the system cannot be solved."""
        cross, mean = self.cross, self.mean
        if factor != 1.0:
            cross, mean = cross - (1 - factor) * self.gap_cross, mean - (1 - factor) * self.gap_mean
        change = torch.zeros_like(cross)
        if ridge is not None and change.numel():
            scale = self.inputs.diagonal().mean()
            factored, info = torch.linalg.cholesky_ex(
                self.inputs + ridge * scale * torch.eye(len(self.inputs)).to(self.inputs)
            )
            if int(info) != 0 or float(scale) <= 0:
                return None
            change = torch.cholesky_solve(cross.T, factored).T
        return change, mean - change @ self.mean_inputs

    def error(self, change: torch.Tensor, bias: torch.Tensor, metric: torch.Tensor) -> float:
        """Return tr(M E[e e^T]) of e = r - change x - bias."""
        offset = self.mean - change @ self.mean_inputs - bias
        covariance = self.residual - 2 * change @ self.cross.T + change @ self.inputs @ change.T
        return float((metric * covariance).sum() + offset @ metric @ offset)


def oas_ridge(covariance: torch.Tensor, rows: int) -> float:
    """Return the shrinkage in (0, 1] of the oracle approximating estimator (Chen et al. 2010), which CORP uses."""
    width = len(covariance)
    squared, traced = float(covariance.square().sum()), float(covariance.diagonal().sum()) ** 2
    spread = (rows + 1 - 2 / width) * (squared - traced / width)
    return 1.0 if spread <= 0 else min(1.0, ((1 - 2 / width) * squared + traced) / spread)


@torch.no_grad()
def regress_without_bias(
    weight: torch.Tensor, fit: CovarianceStatistics, held_out: CovarianceStatistics, ridges: Sequence[float] = RIDGES
) -> tuple[torch.Tensor, float | None]:
    """Refit a linear layer that has no bias (the visual projection), as `regress` does with M = I.

    Args:
        weight: Of shape `(outputs, inputs)`.
        fit: Statistics of rows [x, t].
        held_out: The same of other images.
        ridges: Candidates; no change is always one too.

    Returns:
        The new weight, and the ridge; None where the weight was kept.
    """
    weight = weight.to(fit.mean.device, torch.float64)
    inputs = weight.shape[1]

    def solve(moment: torch.Tensor, ridge: float) -> torch.Tensor | None:
        inner = moment[:inputs, :inputs]
        eye = torch.eye(inputs).to(inner)
        factored, info = torch.linalg.cholesky_ex(inner + ridge * inner.diagonal().mean() * eye)
        if int(info) != 0:
            return None
        return weight + torch.cholesky_solve((moment[inputs:, :inputs] - weight @ inner).T, factored).T

    def error(candidate: torch.Tensor) -> float:
        left = torch.cat([-candidate, torch.eye(len(candidate)).to(candidate)], 1)
        return float((left * (left @ held_out.moment)).sum())

    scores: dict[float | None, float] = {None: error(weight)}
    for ridge in ridges:
        solved = solve(fit.moment, ridge)
        if solved is not None:
            scores[ridge] = error(solved)
    best = min(scores, key=scores.__getitem__)
    final = None if best is None else solve(fit.merge(held_out).moment, best)
    return (weight, None) if final is None else (final, best)
