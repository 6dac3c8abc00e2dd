"""What removing heads and neurons costs: output metrics from random probes, and greedy OBS removal."""

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import torch

from hf_opentrans._distributed import add_up, own_share

from .tower import Tower

# Ridge on the covariance in the selection, relative to its mean diagonal.
SELECTION_RIDGE = 1e-3
# Removals per step of the neuron selection: one step costs a pass over the inverse covariance.
STEPS_PER_LAYER = 192
K = TypeVar("K", bound=Hashable)


def output_metrics(
    tower: Tower,
    batches: Iterable[torch.Tensor],
    *,
    probes: int,
    seed: int,
    on_batch: Callable[[], object] = int,
) -> dict[tuple[int, str], torch.Tensor]:
    """Measure how each sublayer's output moves the final tokens: M = E[g g^T], g = d<v, z> / dy.

    z are the unit tokens in the shared space, y the output of `out_proj` or `fc2`. The probes v are normal with
    variance 1 on the class token and 1 / patches on every patch, so that tr(M Cov(dy)) estimates the squared change of
    the class token plus the mean squared change of the patches. Needs no labels (Gauss-Newton, Hutchinson).

    Args:
        tower: The dense tower.
        batches: Pixel values of shape `(batch_size, 3, side, side)`.
        probes: Random probes per image.
        seed: Of the probes.
        on_batch: Called after every batch.

    Returns:
        Matrices of shape `(hidden_size, hidden_size)` by `(layer, "heads" | "neurons")`, and of shape
        `(heads, qk_head_dim, qk_head_dim)` by `(layer, "queries")`; fp64.
    """
    sums = probe_moments(
        lambda pixels: _observed_forward(tower, pixels),
        lambda key, gradient: _second_moment(tower, key, gradient),
        batches,
        device=tower.vision.device,
        probes=probes,
        seed=seed,
        on_batch=on_batch,
    )
    for (layer, kind), total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise ValueError(
                f"The gradients behind the {kind} of layer {layer} are not finite. Pruning needs finite numbers. "
                "Check the weights and the images."
            )
    return sums


def probe_moments(
    forward: Callable[[torch.Tensor], tuple[torch.Tensor, dict[K, torch.Tensor]]],
    moment: Callable[[K, torch.Tensor], torch.Tensor],
    batches: Iterable[torch.Tensor],
    *,
    device: torch.device,
    probes: int,
    seed: int,
    on_batch: Callable[[], object] = int,
) -> dict[K, torch.Tensor]:
    """Return the mean second moments of the probes' gradients; see `output_metrics`.

    Args:
        forward: From pixel values to unit tokens `(batch_size, 1 + positions, dim)`, that of the image first, and to
            the outputs that the gradients are taken at.
        moment: Of one output's gradient, summed over the images.
        batches: Pixel values.
        device: Where `forward` wants them.
        probes: Random probes per image.
        seed: Of the probes.
        on_batch: Called after every batch.
    """
    sums: dict[K, torch.Tensor] = {}
    images = torch.zeros((), dtype=torch.float64, device=device)
    for number, batch in own_share(list(enumerate(batches))):
        # Seeded by the batch, so that the probes do not depend on how batches are dealt out to processes.
        generator = torch.Generator().manual_seed(hash((seed, number)) % 2**63)
        tokens, outputs = forward(batch.to(device))
        weights = tokens.new_full((tokens.shape[1], 1), (tokens.shape[1] - 1) ** -0.5)
        weights[0] = 1.0
        for probe in range(probes):
            direction = torch.randn(tokens.shape, generator=generator).to(tokens) * weights
            gradients = torch.autograd.grad(
                (direction * tokens).sum(), list(outputs.values()), retain_graph=probe < probes - 1
            )
            for key, gradient in zip(outputs, gradients, strict=True):
                sums[key] = moment(key, gradient) + sums.get(key, 0.0)
        images += len(batch)
        on_batch()
    add_up(images, *sums.values())
    return {key: total / (images * probes) for key, total in sums.items()}


def _second_moment(tower: Tower, key: tuple[int, str], gradient: torch.Tensor) -> torch.Tensor:
    rows = gradient.flatten(0, 1)
    if key[1] != "queries":
        return (rows.T @ rows).double()
    heads = rows.unflatten(1, (tower.layers[key[0]].self_attn.num_heads, -1)).transpose(0, 1)
    return (heads.mT @ heads).double()


def _observed_forward(tower: Tower, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[tuple[int, str], torch.Tensor]]:
    """Run the tower with gradients; return the final tokens, every consumer's output, and the queries."""
    outputs: dict[tuple[int, str], torch.Tensor] = {}

    def keep(key: tuple[int, str]) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            outputs[key] = output

        return hook

    observed: dict[tuple[int, str], torch.nn.Module] = dict(tower.consumers)
    for index, kind in tower.consumers:
        if kind == "heads":
            observed[index, "queries"] = tower.layers[index].self_attn.q_proj
    handles = [module.register_forward_hook(keep(key)) for key, module in observed.items()]
    try:
        with torch.enable_grad():
            hidden = tower.embed(pixels).detach().requires_grad_()
            for layer in tower.layers:
                hidden = layer(hidden, None)
            return tower.finish(hidden), outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def greedy_removal(
    weight: torch.Tensor, covariance: torch.Tensor, metric: torch.Tensor, *, group_size: int, fewest: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Order groups of input columns by greedy OBS removal; the running error is exact for the set removed so far.

    The error of removing columns P of a linear layer with full compensation by the others is
    `tr(M W_P [(C^-1)_PP]^-1 W_P^T)`; after each removal W and C^-1 are updated (Optimal Brain Surgeon, block form as
    in ZipLM, arXiv 2302.04089).

    Args:
        weight: The layer, of shape `(outputs, inputs)`.
        covariance: Of its inputs, `(inputs, inputs)`.
        metric: Output metric M, `(outputs, outputs)`, positive semi-definite.
        group_size: Adjacent columns that go together: the head width, or 1 for neurons.
        fewest: Groups that are never removed.

    Returns:
        The groups in order of removal (the survivors last), and the errors after 0, 1, 2, ... removals.
    """
    groups = weight.shape[1] // group_size
    device = covariance.device
    v = square_root(metric.to(device, torch.float64)) @ weight.to(device, torch.float64)
    k = torch.cholesky_inverse(torch.linalg.cholesky(regular(covariance)))
    alive = torch.arange(groups, device=device)
    present = torch.ones(groups, dtype=torch.bool, device=device)
    order, errors = [], [0.0]
    step = max(1, groups // STEPS_PER_LAYER) if group_size == 1 else 1
    while (left := groups - len(order)) > fewest:
        gains = _removal_errors(v, k, group_size).masked_fill(~present, torch.inf)
        gone = torch.topk(gains, min(step, left - fewest), largest=False).indices
        columns = (gone[:, None] * group_size + torch.arange(group_size, device=device)).flatten()
        factor = torch.linalg.cholesky(k[columns][:, columns])
        half = torch.linalg.solve_triangular(factor, k[columns], upper=False)
        moved = torch.linalg.solve_triangular(factor, v[:, columns].T, upper=False)
        # Within a step the error is shared out by the single scores: the block is too small to matter.
        share = gains[gone] / gains[gone].sum().clamp(min=torch.finfo(torch.float64).tiny)
        errors.extend((errors[-1] + float(moved.square().sum()) * share.cumsum(0)).tolist())
        order.extend(alive[gone].tolist())
        present[gone] = False
        v.addmm_(moved.T, half, alpha=-1)
        k.addmm_(half.T, half, alpha=-1)
        if present.sum() < 0.75 * len(present):  # drop dead rows from time to time: each costs as much as a live one
            rest = present.repeat_interleave(group_size).nonzero()[:, 0]
            v, k, alive, present = v[:, rest], k[rest][:, rest], alive[present], present[present]
        else:  # keep the inverse of dead units harmless: exact zeros but for a unit diagonal
            k[columns], k[:, columns], v[:, columns] = 0.0, 0.0, 0.0
            k[columns, columns] = 1.0
    return (*order, *alive[present].tolist()), tuple(errors)


def regular(covariance: torch.Tensor) -> torch.Tensor:
    """Add the selection's ridge to a covariance, so that constant and dependent channels stay solvable."""
    ridge = SELECTION_RIDGE * covariance.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny ** 0.5)
    return covariance + ridge * torch.eye(len(covariance)).to(covariance)


def _removal_errors(v: torch.Tensor, k: torch.Tensor, group_size: int) -> torch.Tensor:
    if group_size == 1:
        return v.square().sum(0) / k.diagonal()
    blocks = torch.stack([k[i : i + group_size, i : i + group_size] for i in range(0, len(k), group_size)])
    columns = v.T.unflatten(0, (-1, group_size))
    return torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), columns, upper=False).square().sum((1, 2))


def square_root(metric: torch.Tensor) -> torch.Tensor:
    """Return R with R^T R = M for a symmetric positive semi-definite M."""
    values, vectors = torch.linalg.eigh(metric)
    return vectors.T * values.clamp(min=0).sqrt()[:, None]
