"""The sizes that one sublayer may take, each with its error: what all structures of all layers compete with."""

from dataclasses import dataclass

from .macs import CostModel


@dataclass(frozen=True)
class Size:
    """One size of one sublayer.

    Args:
        error: What the final tokens lose by it (squared change), all other sublayers dense.
        units: Heads or neurons that stay.
        qk_head_dim, v_head_dim: Widths inside each head; 0 for an MLP.
    """

    error: float
    units: int
    qk_head_dim: int = 0
    v_head_dim: int = 0


@dataclass(frozen=True)
class Menu:
    """All sizes of one sublayer, the dense one first.

    Args:
        layer: Index of the layer.
        kind: "heads" or "neurons".
        order: Heads or neurons in the order of removal; a size keeps the last `units` of them.
        sizes: What can be chosen.
    """

    layer: int
    kind: str
    order: tuple[int, ...]
    sizes: tuple[Size, ...]

    def kept(self, size: Size) -> tuple[int, ...]:
        """Return the heads or neurons that stay in `size`, ascending."""
        return tuple(sorted(self.order[len(self.order) - size.units :]))

    def cost(self, size: Size, cost: CostModel) -> float:
        """Return what `size` costs."""
        if self.kind == "neurons":
            return cost.mlp(size.units)
        return cost.attention(size.units, size.qk_head_dim, size.v_head_dim)


def rounded_widths(dense: int, fewest: int, step: int) -> list[int]:
    """Return the widths from `dense` down to `fewest` that are multiples of `step`, and `dense` itself, descending."""
    widths = [width for width in range(dense // step * step, 0, -step) if fewest <= width < dense]
    return [dense, *widths, *([0] if fewest == 0 < dense else [])]


def neuron_step(dense: int, asked: int | None) -> int:
    """Return the rounding of MLP widths: 32, or a sixteenth of a narrower MLP, unless another is asked for."""
    return asked or min(32, max(1, dense // 16))


def head_dim_step(dense: int, asked: int | None) -> int:
    """Return the rounding of widths inside heads: 8, or a quarter of a narrower head, unless another is asked for."""
    return asked or min(8, max(1, dense // 4))
