"""The menus of ours: every size of every sublayer with its error, in the one currency of the final tokens."""

from dataclasses import dataclass
from functools import cached_property

import torch

from .importance import greedy_removal, regular, square_root
from .low_rank import Bases, query_key_bases, value_bases
from .plan import PruningConfig
from .sizes import Menu, Size, head_dim_step, neuron_step, rounded_widths
from .tower import Tower


@dataclass(frozen=True)
class AttentionStatistics:
    """What the subspaces of one layer's heads are found from.

    Args:
        weight: `out_proj`, `(outputs, heads * v_head_dim)`, fp64.
        covariance: Of its inputs.
        metric: Output metric of `out_proj`.
        query_metric: Second moment of the probes' gradients at the queries, `(heads, qk_head_dim, qk_head_dim)`.
        query_moment: Uncentred second moment of the queries, the same shape.
    """

    weight: torch.Tensor
    covariance: torch.Tensor
    metric: torch.Tensor
    query_metric: torch.Tensor
    query_moment: torch.Tensor

    @cached_property
    def root(self) -> torch.Tensor:
        """Root of the output metric: its eigenvalues are found once, not for every number of heads."""
        return square_root(self.metric)

    def query_key_bases(self) -> Bases:
        """Return the subspaces of queries and keys of all heads."""
        return query_key_bases(self.query_metric, self.query_moment)

    def value_bases(self, heads: tuple[int, ...]) -> tuple[Bases, torch.Tensor, torch.Tensor]:
        """Return the subspaces of the values of `heads`, given that the others are gone and compensated.

        Also returns the compensated `out_proj` under the metric's root and the inverse covariance of what stays, both
        in the new bases.
        """
        width = self.weight.shape[1] // len(self.query_moment)
        kept = (torch.tensor(heads)[:, None] * width + torch.arange(width)).flatten().to(self.weight.device)
        gone = torch.ones(self.weight.shape[1], dtype=torch.bool, device=self.weight.device)
        gone[kept] = False
        covariance = regular(self.covariance)
        inverse = torch.linalg.inv(covariance[kept][:, kept])
        compensated = self.weight[:, kept] + self.weight[:, gone] @ covariance[gone][:, kept] @ inverse
        outgoing = self.root @ compensated
        # What a head adds to the others: the inverse of its block of the joint inverse covariance.
        inner = torch.linalg.inv(diagonal_blocks(inverse, len(heads)))
        bases = value_bases(outgoing.unflatten(1, (-1, width)).transpose(0, 1), inner)
        expand = torch.block_diag(*bases.expand.mT)
        return bases, outgoing @ expand, expand.T @ inverse @ expand


def diagonal_blocks(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the square diagonal blocks of a matrix over concatenated heads, `(heads, width, width)`."""
    width = len(matrix) // heads
    return torch.stack([matrix[i : i + width, i : i + width] for i in range(0, len(matrix), width)])


def attention_menu(tower: Tower, layer: int, statistics: AttentionStatistics, config: PruningConfig) -> Menu:
    """List the sizes of one layer's attention: heads x query-key width x value width.

    Heads leave in the order of greedy OBS with full compensation by the others. For every number of heads that is
    left, values lose dimensions of the best basis of each head, and the error is that of one joint least-squares
    solve; query-key errors are those of the heads that are left. The same widths hold for all heads of a layer.
    """
    attention = tower.layers[layer].self_attn
    heads, qk, v = attention.num_heads, attention.qk_head_dim, attention.v_head_dim
    dense = Size(0.0, heads, qk, v)
    is_protected = config.protect_last_attention and layer == len(tower.layers) - 1
    if is_protected or not {"heads", "ranks"} & set(config.structures):
        return Menu(layer, "heads", tuple(range(heads)), (dense,))
    fewest = min(config.min_heads, heads) if "heads" in config.structures else heads
    order, errors = greedy_removal(
        statistics.weight, statistics.covariance, statistics.metric, group_size=v, fewest=fewest
    )
    has_ranks = "ranks" in config.structures
    qk_widths, v_widths = (_widths(w, config.round_head_dim) if has_ranks else [w] for w in (qk, v))
    query_errors = statistics.query_key_bases().errors if has_ranks else None
    sizes = []
    for removed, error in enumerate(errors):
        kept = sorted(order[removed:])
        if not kept:
            sizes.append(Size(error, 0, qk, v))
            continue
        value_errors = _value_errors(statistics, tuple(kept), v_widths)
        for qk_width in qk_widths:
            lost = 0.0 if query_errors is None else float(query_errors[kept, qk_width].sum())
            sizes += [Size(error + e + lost, len(kept), qk_width, w) for w, e in value_errors.items()]
    return Menu(layer, "heads", order, tuple(sizes))


def _widths(dense: int, asked: int | None) -> list[int]:
    step = head_dim_step(dense, asked)
    return rounded_widths(dense, min(step, dense), step)


def _value_errors(statistics: AttentionStatistics, heads: tuple[int, ...], widths: list[int]) -> dict[int, float]:
    """Return the error of each value width, all heads together, the kept dimensions compensating jointly."""
    if len(widths) == 1:
        return {widths[0]: 0.0}
    _, outgoing, inverse = statistics.value_bases(heads)
    width, smallest = len(inverse) // len(heads), min(widths)
    # The last dimension of every head goes first. A Cholesky factor holds those of all its leading blocks, so that one
    # factor has the errors of all widths.
    dimensions = torch.arange(len(inverse), device=inverse.device).unflatten(0, (-1, width))
    gone = dimensions[:, smallest:].flip(1).T.flatten()
    factor = torch.linalg.cholesky(inverse[gone][:, gone])
    half = torch.linalg.solve_triangular(factor, outgoing[:, gone].T, upper=False)
    errors = [0.0, *half.square().sum(1).unflatten(0, (-1, len(heads))).sum(1).cumsum(0).tolist()]
    return {kept: errors[width - kept] for kept in widths}


def neuron_menu(
    tower: Tower, layer: int, covariance: torch.Tensor, metric: torch.Tensor, config: PruningConfig
) -> Menu:
    """List the widths of one layer's MLP: the exact error of every prefix of the greedy OBS order."""
    weight = tower.consumers[layer, "neurons"].weight
    dense = weight.shape[1]
    fewest = fewest_neurons(dense, config)
    if "mlp" not in config.structures:
        return Menu(layer, "neurons", tuple(range(dense)), (Size(0.0, dense),))
    order, errors = greedy_removal(weight, covariance, metric, group_size=1, fewest=fewest)
    widths = rounded_widths(dense, fewest, neuron_step(dense, config.round_neurons))
    return Menu(layer, "neurons", order, tuple(Size(errors[dense - width], width) for width in widths))


def fewest_neurons(dense: int, config: PruningConfig) -> int:
    """Return how many neurons of an MLP must stay: the floor, rounded up to what widths are rounded to."""
    step = neuron_step(dense, config.round_neurons)
    return min(dense, -int(-dense * config.min_neurons // step) * step)
