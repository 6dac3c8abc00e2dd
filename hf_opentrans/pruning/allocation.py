"""Spread one budget over the sizes of all sublayers: exact knapsack, Lagrangian, or the same share everywhere."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .macs import CostModel
from .sizes import Menu, Size

# The realised share may lie this far below `keep`.
TOLERANCE = 0.02
# Resolution of the knapsack: costs are rounded up to this share of what can be spent.
BINS = 10_000


@dataclass(frozen=True)
class Budget:
    """How much may stay.

    Args:
        unit: "macs", "params" or "latency".
        cost: The cost model of that unit.
        dense: Cost of the dense tower.
        keep: Share to keep.
        lowest: Lowest share that the floors allow.
        floor: The floor that binds, in words.
    """

    unit: str
    cost: CostModel
    dense: float
    keep: float
    lowest: float
    floor: str

    @property
    def allowed(self) -> float:
        """Cost that all sublayers together may have; the rounding error of `keep` does not forbid a size."""
        return self.dense * (self.keep + 1e-9) - self.cost.fixed()

    def check(self) -> None:
        """Raise ValueError where the floors forbid the budget."""
        if self.keep < self.lowest - 1e-9:
            raise ValueError(
                f"keep={self.keep:g} of the {self.unit} is below what the floors allow: {self.floor} leave "
                f"{self.lowest:.4f} at least. Raise keep to {math.ceil(self.lowest * 1000) / 1000} or more, or lower "
                "the floor."
            )

    def share(self, menus: Sequence[Menu], sizes: Sequence[Size]) -> float:
        """Return the share of the dense cost that `sizes` take."""
        spent = sum(menu.cost(size, self.cost) for menu, size in zip(menus, sizes, strict=True))
        return (self.cost.fixed() + spent) / self.dense


def allocate(menus: Sequence[Menu], budget: Budget, solver: str = "dp") -> list[Size]:
    """Choose one size per menu: the smallest summed error whose cost the budget allows.

    Args:
        menus: Their errors must be comparable.
        budget: What may stay.
        solver: "dp" (multiple-choice knapsack, exact but for costs rounded up to 1 / 10,000), "lagrangian" (one price
            per unit of cost for all menus, on lower convex hulls) or "uniform" (the same share everywhere).

    Raises:
        ValueError: If the floors forbid the budget, or the sizes are too coarse to come within 0.02 of it.
    """
    budget.check()
    if budget.keep >= 1:
        return [menu.sizes[0] for menu in menus]
    fronts = [pareto(menu, budget.cost) for menu in menus]
    solve = {"dp": _knapsack, "lagrangian": _lagrangian, "uniform": _uniform}[solver]
    chosen = _enlarge(solve(fronts, budget.allowed), fronts, budget.allowed)
    sizes = [front[index][1] for front, index in zip(fronts, chosen, strict=True)]
    share = budget.share(menus, sizes)
    if not budget.keep - TOLERANCE <= share <= budget.keep + 1e-6:
        raise ValueError(
            f"keep={budget.keep:g} cannot be met within {TOLERANCE:g}: the nearest choice keeps {share:.3f} because "
            "the structures that may go are too coarse. Choose another keep, a lower floor, or a smaller "
            "round_neurons or round_head_dim."
        )
    return sizes


Front = list[tuple[float, Size]]  # cost and size, cheapest first, errors falling


def pareto(menu: Menu, cost: CostModel) -> Front:
    """Return costs and sizes that no other one beats in both cost and error; cheapest first, errors falling."""
    priced = sorted(((menu.cost(size, cost), size) for size in menu.sizes), key=lambda p: (p[0], p[1].error))
    front: Front = []
    for price, size in priced:
        if not front or size.error < front[-1][1].error:
            front.append((price, size))
    return front


def _knapsack(fronts: list[Front], allowed: float) -> list[int]:
    """Multiple-choice knapsack by dynamic programming over the cost."""
    base = sum(front[0][0] for front in fronts)
    unit = max(allowed - base, 0.0) / BINS or 1.0
    best, picks = np.zeros(BINS + 1), []
    for front in fronts:
        # Costs are counted above the cheapest size, and rounded up: the sum can only be overestimated.
        extra = [math.ceil((price - front[0][0]) / unit - 1e-9) for price, _ in front]
        candidates = np.full((len(front), BINS + 1), np.inf)
        for row, (bins, (_, size)) in enumerate(zip(extra, front, strict=True)):
            if bins <= BINS:
                candidates[row, bins:] = best[: BINS + 1 - bins] + size.error
        pick = candidates.argmin(0)
        best = candidates[pick, np.arange(BINS + 1)]
        picks.append((pick, extra))
    left, chosen = int(best.argmin()), []
    for pick, extra in reversed(picks):
        chosen.append(int(pick[left]))
        left -= extra[chosen[-1]]
    return chosen[::-1]


def _lagrangian(fronts: list[Front], allowed: float) -> list[int]:
    """Take the segments of all hulls, steepest gain per cost first, until the next one does not fit."""
    hulls = [lower_hull([(price, size.error) for price, size in front]) for front in fronts]
    segments = []
    for index, (front, hull) in enumerate(zip(fronts, hulls, strict=True)):
        for start, stop in pairwise(hull):
            price = front[stop][0] - front[start][0]
            gain = (front[start][1].error - front[stop][1].error) / price
            segments.append((-gain, index, stop, price))
    chosen, left = [0] * len(fronts), allowed - sum(front[0][0] for front in fronts)
    for _, index, stop, price in sorted(segments):
        if price > left:
            break  # a Lagrangian chooses corners in this order only; the caller spends the rest
        chosen[index], left = stop, left - price
    return chosen


def lower_hull(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the corners of the lower convex hull of points with ascending abscissa."""
    corners: list[int] = []
    for right, (x, y) in enumerate(points):
        while len(corners) >= 2:
            (x0, y0), (x1, y1) = points[corners[-2]], points[corners[-1]]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            corners.pop()
        corners.append(right)
    return corners


def _uniform(fronts: list[Front], allowed: float) -> list[int]:
    """Keep the same share of every sublayer's cost; the largest share that fits."""

    def at(share: float) -> list[int]:
        return [max((i for i, (price, _) in enumerate(f) if price <= share * f[-1][0]), default=0) for f in fronts]

    def spent(chosen: list[int]) -> float:
        return sum(front[index][0] for front, index in zip(fronts, chosen, strict=True))

    shares = [step / 1000 for step in range(1001)]
    fitting = [share for share in shares if spent(at(share)) <= allowed]
    return at(max(fitting, default=0.0))


def spend_rest(menus: Sequence[Menu], sizes: Sequence[Size], budget: Budget) -> list[Size]:
    """Enlarge a choice of sizes while the budget allows it, best gain per cost first."""
    fronts = [pareto(menu, budget.cost) for menu in menus]
    chosen = []
    for front, menu, size in zip(fronts, menus, sizes, strict=True):
        price = menu.cost(size, budget.cost)
        chosen.append(max(i for i, (cost, _) in enumerate(front) if cost <= price))
    chosen = _enlarge(chosen, fronts, budget.allowed)
    return [front[index][1] for front, index in zip(fronts, chosen, strict=True)]


def _enlarge(chosen: list[int], fronts: list[Front], allowed: float) -> list[int]:
    """Enlarge sublayers while something fits, best gain per cost first."""
    chosen = list(chosen)
    left = allowed - sum(front[index][0] for front, index in zip(fronts, chosen, strict=True))
    while True:
        best: tuple[float, int, int] | None = None
        for index, front in enumerate(fronts):
            price, size = front[chosen[index]]
            for larger in range(chosen[index] + 1, len(front)):
                extra = front[larger][0] - price
                if extra > left:
                    break
                gain = (size.error - front[larger][1].error) / extra
                if best is None or gain > best[0]:
                    best = (gain, index, larger)
        if best is None:
            return chosen
        _, index, larger = best
        left -= fronts[index][larger][0] - fronts[index][chosen[index]][0]
        chosen[index] = larger
