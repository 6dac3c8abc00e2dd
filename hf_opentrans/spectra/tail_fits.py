"""Power-law fits of a spectrum's tail: where it starts, how heavy it is, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from .esd import MIN_EIGENVALUES, Spectrum

FitMethod = Literal["hill", "peak", "ks", "adaptive"]
FIT_METHODS: tuple[str, ...] = get_args(FitMethod)
HISTOGRAM_BINS = 100
PEAK_WINDOW = (0.95, 1.5)
# The adaptive fit: fewest eigenvalues of a tail, least share of all, and most starts that are tried.
ADAPTIVE_COUNT, ADAPTIVE_SHARE, ADAPTIVE_STARTS = 20, 0.05, 200
# Rows of one block of the scan over all starts: a block of doubles stays in the cache.
SCAN_BLOCK = 64
BOOTSTRAP_STARTS = 40
# Eigenvalues whose logarithms differ by less than this on average are equal but for rounding.
EQUAL = 1e-5


@dataclass(frozen=True)
class TailFit:
    """A power law `p(lambda) ~ lambda^-alpha` above `xmin`.

    Args:
        alpha: Exponent of the density; small means a heavy tail. NaN where nothing could be fitted.
        xmin: Where the tail starts.
        tail_count: Eigenvalues in the tail.
        ks_distance: Largest distance of the two distribution functions, in [0, 1].
        standard_error: (alpha - 1) / sqrt(tail_count), as for independent samples.
        method: How xmin was chosen.
        reliable: Whether there was something to fit.
        note: Why not; else "".
        interval: Bootstrap confidence interval of alpha; None where it was not asked for.
    """

    alpha: float
    xmin: float
    tail_count: int
    ks_distance: float
    standard_error: float
    method: str
    reliable: bool = True
    note: str = ""
    interval: tuple[float, float] | None = None

    @property
    def hill_index(self) -> float:
        """Exponent of the distribution function, alpha - 1."""
        return self.alpha - 1


@torch.no_grad()
def fit_tail(spectrum: Spectrum, method: str = "hill", *, compat: bool = False) -> TailFit:
    """Fit a power law to the largest eigenvalues by maximum likelihood.

    With the eigenvalues ascending, a tail that starts at `i` has `n = count - i` members and (Clauset et al. 2009)

        alpha_i = 1 + n / sum_{j >= i} ln(l_j / l_i),   D_i = max_j |1 - (l_j / l_i)^(1 - alpha_i) - (j - i) / n|

    | method | the tail starts |
    |---|---|
    | hill | at the median: the k = count / 2 largest, textbook Hill (xmin itself is not counted) |
    | peak | where D is smallest among starts in [0.95 p, 1.5 p] around the peak p of the log10 histogram (100 bins) |
    | ks | where D is smallest of all (WeightWatcher's default) |
    | adaptive | as ks, among at most 200 log-spaced tails of at least 20 members and 5 %; ties go to the longer tail |

    Args:
        spectrum: Of `compute_spectrum`.
        method: One of the table.
        compat: Whether to follow the OpenTrans code, slips included: "hill" counts xmin as a member, and the lower end
            of "peak" is log10(0.95 p) and not 0.95 p. An empty window is flagged and never alpha = 0.

    Raises:
        ValueError: If the method is unknown, or there are too few eigenvalues.
    """
    check_method(method)
    values = spectrum.eigenvalues
    if len(values) < MIN_EIGENVALUES:
        raise ValueError(
            f"The spectrum has {len(values)} eigenvalues. A tail fit needs at least {MIN_EIGENVALUES}. Leave this "
            "layer out, or use stable_rank, which needs no fit."
        )
    if spectrum.is_partial and method in ("hill", "peak"):
        raise ValueError(
            f"method is {method!r} and the spectrum is partial. Its median and its peak are unknown. Use 'ks' or "
            "'adaptive'."
        )
    logs = values.log()
    if _are_equal(values):
        return _nothing(method, "all eigenvalues of the tail are equal")
    if method == "hill" and not compat:
        return _textbook_hill(values, logs)
    starts = _starts(values, method, compat)
    return _best_of(values, logs, starts, method, prefers_long=method == "adaptive")


@torch.no_grad()
def confidence_interval(
    spectrum: Spectrum, method: str = "hill", *, level: float = 0.95, samples: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Return the bootstrap percentile interval of alpha, xmin chosen anew in every sample.

    Eigenvalues repel each other and are not independent: the interval is a heuristic that compares layers. Scans try
    40 log-spaced starts.

    Args:
        spectrum: Of `compute_spectrum`.
        method: See `fit_tail`.
        level: Share of the samples inside, in (0, 1).
        samples: How many.
        seed: Of the resampling.

    Raises:
        ValueError: If a value is out of range, or there are too few eigenvalues.
    """
    if not 0 < level < 1 or samples < 10:
        raise ValueError(
            f"level is {level} and samples {samples}. They must lie in (0, 1) and be at least 10. Correct them."
        )
    fit_tail(spectrum, method)  # refuses what cannot be fitted
    generator = torch.Generator().manual_seed(seed)
    values, found = spectrum.eigenvalues.cpu(), []
    for _ in range(samples):
        drawn = values[torch.randint(len(values), (len(values),), generator=generator)].sort().values
        if _are_equal(drawn):
            continue
        starts = _starts(drawn, method, compat=False)
        if method == "ks":
            starts = _log_spaced(len(drawn), 2, BOOTSTRAP_STARTS)
        if method == "adaptive":
            starts = starts[:: max(1, len(starts) // BOOTSTRAP_STARTS)]
        logs = drawn.log()
        alpha = _textbook_hill(drawn, logs).alpha if method == "hill" else _best_of(drawn, logs, starts, method).alpha
        if math.isfinite(alpha):
            found.append(alpha)
    if not found:
        return (float("nan"), float("nan"))
    ends = torch.tensor(found, dtype=torch.float64).quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).double())
    return float(ends[0]), float(ends[1])


def check_method(method: str) -> None:
    """Raise ValueError if the method is unknown."""
    if method not in FIT_METHODS:
        raise ValueError(f"The fit is {method!r}. It must be one of {', '.join(FIT_METHODS)}. Correct it.")


def _textbook_hill(values: torch.Tensor, logs: torch.Tensor) -> TailFit:
    count = len(values) // 2
    start = len(values) - count - 1
    total = float((logs[start + 1 :] - logs[start]).sum())
    if total <= count * EQUAL:
        return _nothing("hill", "all eigenvalues of the tail are equal")
    alpha = 1 + count / total
    distance = float(_distances(logs, torch.tensor([alpha]).to(logs), [start])[0])
    return TailFit(alpha, float(values[start]), count, distance, (alpha - 1) / math.sqrt(count), "hill")


def _starts(values: torch.Tensor, method: str, compat: bool) -> list[int]:
    """Return the positions where a tail may start; the last eigenvalue alone is no tail."""
    count = len(values)
    if method == "hill":
        return [count // 2]
    if method == "peak":
        logs = values.log10().cpu().numpy()
        heights, edges = np.histogram(logs, bins=HISTOGRAM_BINS)
        peak = 10 ** float(edges[int(heights.argmax())])
        low, high = (side * peak for side in PEAK_WINDOW)
        low = math.log10(low) if compat else low
        inside = (values[:-1] >= low) & (values[:-1] <= high)
        return inside.nonzero().flatten().tolist()
    if method == "adaptive":
        return _log_spaced(count, max(ADAPTIVE_COUNT, math.ceil(ADAPTIVE_SHARE * count)), ADAPTIVE_STARTS)
    return list(range(count - 1))


def _log_spaced(count: int, fewest: int, most: int) -> list[int]:
    """Return starts of tails whose lengths are log-spaced, longest tail first."""
    fewest = min(fewest, count)
    lengths = torch.logspace(math.log10(fewest), math.log10(count), most, dtype=torch.float64).round().long()
    return (count - lengths.unique()).flip(0).clamp(max=count - 2).unique().tolist()


def _best_of(
    values: torch.Tensor, logs: torch.Tensor, starts: Sequence[int], method: str, *, prefers_long: bool = False
) -> TailFit:
    if not len(starts):
        return _nothing(method, "no eigenvalue lies in the window around the peak")
    every = torch.as_tensor(starts, device=logs.device)
    # Relative to the largest: sums over short tails then lose nothing to cancellation.
    below = logs[-1] - logs
    sums = below.flip(0).cumsum(0).flip(0)[every]
    members = len(logs) - every
    alphas = 1 + members / (members * below[every] - sums)
    usable = torch.isfinite(alphas) & (alphas > 1) & (alphas - 1 < 1 / EQUAL)
    if not bool(usable.any()):
        return _nothing(method, "all eigenvalues of the tail are equal")
    distances = torch.where(usable, _distances(logs, alphas, starts), torch.ones_like(alphas))
    best = int(distances.argmin())  # the first: with starts ascending, the longest tail
    if prefers_long:
        best = int((distances <= distances[best] * (1 + 1e-9)).nonzero()[0])
    alpha, count = float(alphas[best]), int(members[best])
    start = int(every[best])
    error = (alpha - 1) / math.sqrt(count)
    return TailFit(alpha, float(values[start]), count, float(distances[best]), error, method)


def _distances(logs: torch.Tensor, alphas: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
    """Return the Kolmogorov-Smirnov distance of every start; `starts` ascending."""
    positions = torch.arange(len(logs), device=logs.device, dtype=logs.dtype)
    every = torch.as_tensor(starts, device=logs.device)
    found = torch.empty_like(alphas)
    for block in range(0, len(starts), SCAN_BLOCK):
        rows = slice(block, block + SCAN_BLOCK)
        first = int(starts[block])
        at = every[rows, None]
        theory = (logs[first:] - logs[at]).mul_(1 - alphas[rows, None]).exp_()
        # 1 - theory - (j - i) / n, and nothing left of the start
        gaps = theory.add_((positions[first:] - at) / (len(logs) - at)).sub_(1).abs_()
        found[rows] = gaps.masked_fill_(positions[first:] < at, 0.0).amax(1)
    return found


def _are_equal(values: torch.Tensor) -> bool:
    return float(values[-1] / values[0]) < 1 + EQUAL


def _nothing(method: str, note: str) -> TailFit:
    nan = float("nan")
    return TailFit(nan, nan, 0, 1.0, nan, method, reliable=False, note=note)
