"""A short evolutionary refinement: errors do not quite add up over sublayers, so try, measure, keep the better."""

from collections.abc import Callable, Sequence

import numpy as np

from .allocation import Budget, pareto, spend_rest
from .sizes import Menu, Size

# Steps along a menu that one mutation takes at most.
LONGEST_MOVE = 4


def evolve(
    menus: Sequence[Menu],
    sizes: Sequence[Size],
    budget: Budget,
    score: Callable[[list[Size]], float],
    *,
    steps: int,
    seed: int,
    on_step: Callable[[], object] = int,
) -> tuple[list[Size], list[float]]:
    """Move budget between sublayers at random and keep what scores better (one parent, one child: EvoPress-like).

    A mutation makes one or two sublayers smaller, a random other one larger by at most what became free, and spends
    the rest where the menus promise most.

    Args:
        menus: All sublayers.
        sizes: Where to start; of each menu one that no other beats in both cost and error, as `allocate` returns them.
        budget: What may stay; every child meets it.
        score: Higher is better; called once per new child.
        steps: Children.
        seed: Of the mutations.
        on_step: Called after every child.

    Returns:
        The best sizes, and the best score after every step, the start's first.
    """
    rng = np.random.default_rng(seed)
    fronts = [[size for _, size in pareto(menu, budget.cost)] for menu in menus]
    movable = [index for index, front in enumerate(fronts) if len(front) > 1]
    best, scores = list(sizes), [score(list(sizes))]
    tried = {tuple(best)}
    for _ in range(steps if len(movable) > 1 else 0):
        child = _mutate(best, fronts, movable, menus, budget, rng)
        if tuple(child) not in tried:
            tried.add(tuple(child))
            value = score(child)
            if value > scores[-1]:
                best = child
                scores.append(value)
                on_step()
                continue
        scores.append(scores[-1])
        on_step()
    return best, scores


def _mutate(
    parent: list[Size],
    fronts: list[list[Size]],
    movable: list[int],
    menus: Sequence[Menu],
    budget: Budget,
    rng: np.random.Generator,
) -> list[Size]:
    child = list(parent)
    count = int(rng.integers(1, 3))
    *shrunk, grown = rng.choice(movable, size=min(count + 1, len(movable)), replace=False)
    for index in shrunk:
        place = fronts[index].index(child[index]) - int(rng.integers(1, LONGEST_MOVE + 1))
        child[index] = fronts[index][max(place, 0)]
    place = fronts[grown].index(child[grown])
    for larger in range(min(place + LONGEST_MOVE, len(fronts[grown]) - 1), place, -1):
        bigger = [*child[:grown], fronts[grown][larger], *child[grown + 1 :]]
        if budget.share(menus, bigger) <= budget.keep + 1e-9:
            child = bigger
            break
    return spend_rest(menus, child, budget)
