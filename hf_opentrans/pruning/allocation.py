"""Spread one budget over all layers: a Lagrangian over the lower convex hulls of the error curves."""

import math
from dataclasses import dataclass
from itertools import pairwise

from .importance import ErrorCurve

# The realised share may lie this far below `keep`.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Budget:
    """How much must go.

    Args:
        unit: "macs" or "params".
        dense: Cost of the dense tower.
        keep: Share to keep.
        unit_costs: Cost of one head and of one neuron by `(layer, kind)`.
        lowest: Lowest share that the floors allow.
        floor: The floor that binds, in words.
    """

    unit: str
    dense: int
    keep: float
    unit_costs: dict[tuple[int, str], int]
    lowest: float
    floor: str

    @property
    def to_remove(self) -> int:
        """Cost that must be removed at least; costs are whole, so the rounding error of `keep` is not one more."""
        return math.ceil(self.dense * (1 - self.keep) - 1e-6)

    def check(self) -> None:
        """Raise ValueError where the floors forbid the budget."""
        if self.keep < self.lowest:
            raise ValueError(
                f"keep={self.keep:g} of the {self.unit} is below what the floors allow: {self.floor} leave "
                f"{self.lowest:.4f} at least. Raise keep to {_ceil(self.lowest)} or more, or lower the floor."
            )


def _ceil(value: float) -> float:
    return -int(-value * 1000 // 1) / 1000


@dataclass(frozen=True)
class _Segment:
    """A straight piece of a lower hull: the only sizes that a Lagrangian ever chooses are its ends."""

    price: float  # error per unit of cost
    curve: int
    start: int
    stop: int


def allocate(curves: list[ErrorCurve], budget: Budget) -> list[int]:
    """Choose how many units each curve removes: minimise the summed error at the given cost.

    For a multiplier nu every curve removes up to the end of its hull's segments whose price is at most nu. Raising nu
    takes the segments of all hulls in the order of their price, so one sorted pass solves the problem for all nu; the
    last segment is taken in part.

    Args:
        curves: Error curves; their errors must be comparable.
        budget: What must go.

    Returns:
        Units removed, one number per curve.

    Raises:
        ValueError: If the budget cannot be met.
    """
    budget.check()
    costs = [budget.unit_costs[curve.layer, curve.kind] for curve in curves]
    removed = [0] * len(curves)
    missing = budget.to_remove
    segments = sorted(_segments(curves, costs), key=lambda s: (s.price, s.curve, s.start))
    # One head more would often overshoot the tolerance: finer units follow. Where they run out, it is taken after all.
    tolerance = budget.dense * (1 - budget.keep + TOLERANCE) - budget.to_remove
    for overshoot in (tolerance, math.inf):
        missing = _take(segments, removed, costs, missing, overshoot)
    missing += _give_back(removed, curves, costs, -missing)
    if not -tolerance <= missing <= 0:
        raise ValueError(
            f"keep={budget.keep:g} cannot be met within {TOLERANCE:g}: the structures that may go are too coarse. "
            "Choose another keep, or a lower floor."
        )
    return removed


def _take(segments: list[_Segment], removed: list[int], costs: list[int], missing: int, overshoot: float) -> int:
    """Remove along `segments` until nothing is missing; return what is (negative: removed too much)."""
    for segment in segments:
        index = segment.curve
        if missing <= 0:
            break
        if not segment.start <= removed[index] < segment.stop:
            continue  # taken already, or an earlier segment of this hull was too coarse to take
        units = min(segment.stop - removed[index], -(-missing // costs[index]))
        if units * costs[index] - missing > overshoot:
            units -= 1
        removed[index] += units
        missing -= units * costs[index]
    return missing


def _give_back(removed: list[int], curves: list[ErrorCurve], costs: list[int], slack: int) -> int:
    """Spend what a coarse last step removed too much on the neurons whose removal cost most; return what is spent."""
    left = slack
    segments = [s for s in _segments(curves, costs) if curves[s.curve].kind == "neurons"]
    for segment in sorted(segments, key=lambda s: -s.price):
        taken = removed[segment.curve] - segment.start
        if 0 < taken <= segment.stop - segment.start:
            units = min(taken, left // costs[segment.curve])
            removed[segment.curve] -= units
            left -= units * costs[segment.curve]
    return slack - left


def _segments(curves: list[ErrorCurve], costs: list[int]) -> list[_Segment]:
    found = []
    for index, (curve, cost) in enumerate(zip(curves, costs, strict=True)):
        corners = lower_hull(curve.errors)
        for start, stop in pairwise(corners):
            price = (curve.errors[stop] - curve.errors[start]) / ((stop - start) * cost)
            found.append(_Segment(price, index, start, stop))
    return found


def lower_hull(errors: tuple[float, ...]) -> list[int]:
    """Return the indices of the corners of the lower convex hull of `(i, errors[i])`, first and last included."""
    corners: list[int] = []
    for right in range(len(errors)):
        while len(corners) >= 2:
            left, middle = corners[-2], corners[-1]
            if (errors[middle] - errors[left]) * (right - left) < (errors[right] - errors[left]) * (middle - left):
                break
            corners.pop()
        corners.append(right)
    return corners


def allocate_uniform(orders: list[ErrorCurve], totals: list[int], budget: Budget) -> list[int]:
    """Remove the same share of heads and of neurons in every layer (the baselines' rule).

    Of all numbers of heads, the one is taken whose share comes nearest to the share of neurons that then meets the
    budget; single neurons are given back while they fit.

    Args:
        orders: Removal orders; the length of `errors` gives how many units may go.
        totals: Units of each sublayer.
        budget: What must go.
    """
    budget.check()
    costs = [budget.unit_costs[curve.layer, curve.kind] for curve in orders]
    limits = [len(curve.errors) - 1 for curve in orders]
    best: tuple[float, list[int]] | None = None
    for step in range(101):
        share = step / 100
        removed = [
            min(limit, round(share * total)) if curve.kind == "heads" else 0
            for curve, limit, total in zip(orders, limits, totals, strict=True)
        ]
        missing = budget.to_remove - sum(r * c for r, c in zip(removed, costs, strict=True))
        ratio = _neuron_share(orders, totals, limits, costs, missing)
        if ratio is None:
            continue
        for index, curve in enumerate(orders):
            if curve.kind == "neurons":
                removed[index] = min(limits[index], int(ratio * totals[index]))
        _top_up(removed, orders, limits, costs, budget)
        distance = abs(share - ratio)
        if best is None or distance < best[0]:
            best = (distance, removed)
    if best is None:
        raise ValueError(
            f"keep={budget.keep:g} cannot be met with one share for all layers. Use method='obs', or a larger keep."
        )
    return best[1]


def _neuron_share(
    orders: list[ErrorCurve], totals: list[int], limits: list[int], costs: list[int], missing: float
) -> float | None:
    """Return the share of neurons to remove in every layer, or None where the heads took too much or too little."""
    neurons = [i for i, curve in enumerate(orders) if curve.kind == "neurons"]
    possible = sum(totals[i] * costs[i] for i in neurons)
    if missing < 0 or missing > sum(limits[i] * costs[i] for i in neurons):
        return None
    return missing / possible if possible else None


def _top_up(removed: list[int], orders: list[ErrorCurve], limits: list[int], costs: list[int], budget: Budget) -> None:
    """Remove single neurons in turn until the budget is met."""
    neurons = [i for i, curve in enumerate(orders) if curve.kind == "neurons"]
    while sum(r * c for r, c in zip(removed, costs, strict=True)) < budget.to_remove:
        open_ = [i for i in neurons if removed[i] < limits[i]]
        index = min(open_, key=lambda i: removed[i] / limits[i])
        removed[index] += 1
