"""Empirical spectral densities (ESD) of weights: a tensor in, eigenvalues and what they say out."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from scipy.linalg import eigvalsh

# Tail fits below this many eigenvalues say nothing.
MIN_EIGENVALUES = 10
# The reference's scaling of convolutions and its absolute filter (OpenTrans, after WeightWatcher).
REFERENCE_CONV_SCALE = 0.5
REFERENCE_SMALLEST = 1e-5
# Upper 1 % point of the Tracy-Widom law (order 1): the largest eigenvalue of pure noise lies below it.
TRACY_WIDOM_99 = 2.0234


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of W^T W, of one matrix or pooled over the slices of a layer.

    Args:
        eigenvalues: Positive, ascending, fp64, of shape `(count,)`. Not divided by the larger dimension.
        rows, columns: Larger and smaller side of one matrix.
        matrices: How many matrices were pooled: kernel positions, parts of a fused projection, or windows.
        trace: Sum of all eigenvalues, those that are not listed too.
        is_partial: Whether only the largest eigenvalues are listed.
    """

    eigenvalues: torch.Tensor
    rows: int
    columns: int
    matrices: int = 1
    trace: float = 0.0
    is_partial: bool = False

    def __len__(self) -> int:
        return len(self.eigenvalues)


@dataclass(frozen=True)
class SpectralMetrics:
    """What a spectrum says without a fit.

    Args:
        spectral_norm: Largest singular value.
        log_norm: log10 of the squared Frobenius norm.
        log_spectral_norm: log10 of the largest eigenvalue.
        stable_rank: Sum of the eigenvalues / the largest; in [1, count].
        effective_rank: exp of the entropy of the normalised eigenvalues; in [1, count]. None for a partial spectrum.
        entropy: That entropy / ln(count); in [0, 1]. None for a partial spectrum.
        mp_edge: Largest eigenvalue that pure noise of this shape and median would have: the Marchenko-Pastur edge with
            its Tracy-Widom fluctuation, scaled by the median (Gavish and Donoho 2014). None for a partial spectrum.
        mp_soft_rank: mp_edge / largest eigenvalue, at most 1; 1 means that nothing stands out of the noise.
        num_spikes: Eigenvalues above the edge.
    """

    spectral_norm: float
    log_norm: float
    log_spectral_norm: float
    stable_rank: float
    effective_rank: float | None
    entropy: float | None
    mp_edge: float | None
    mp_soft_rank: float | None
    num_spikes: int | None


@torch.no_grad()
def compute_spectrum(
    weight: torch.Tensor,
    *,
    precision: torch.dtype = torch.float64,
    parts: int = 1,
    compat: bool = False,
) -> Spectrum:
    """Return the eigenvalues of W^T W through the Gram matrix of the smaller side, on the weight's own device.

    A convolution of shape `(out, in, *kernel)` is cut into one `out x in` matrix per kernel position; their
    eigenvalues are pooled. Nothing is scaled: alpha does not depend on the scale. Eigenvalues that are rounding noise,
    `lambda <= 4 sqrt(count) eps lambda_max`, are left out.

    Args:
        weight: Of a linear layer, `(out, in)`, or of a convolution.
        precision: Of the products and of the eigenvalues: float64, or float32 for twice the speed.
        parts: Equal parts of the outputs that are matrices of their own (3 for a fused q-k-v projection).
        compat: Whether to follow the OpenTrans code: convolutions times sqrt(0.5), and `lambda > 1e-5` kept.

    Raises:
        ValueError: If the weight is no matrix or convolution, is not finite, or is zero.
    """
    matrices = as_matrices(weight, parts)
    values = _eigenvalues(matrices, precision)
    if compat and weight.ndim > 2:
        values = values * REFERENCE_CONV_SCALE
    return _keep_positive(values, matrices, precision, compat)


@torch.no_grad()
def compute_windowed_spectrum(
    weight: torch.Tensor,
    *,
    aspect_ratio: float = 1.0,
    windows: int = 10,
    largest: int = 2000,
    precision: torch.dtype = torch.float64,
    parts: int = 1,
) -> Spectrum:
    """Return the pooled eigenvalues of windows of one aspect ratio (FARMS, arXiv 2506.06280).

    The spectrum of a random matrix depends on its aspect ratio alone: layers of different shapes can be compared once
    all are cut into windows of the same one. Windows cover the matrix with as little overlap as their number allows.

    Args:
        weight: As in `compute_spectrum`.
        aspect_ratio: Longer / shorter side of a window.
        windows: Most windows along one side.
        largest: Longest side of a window.
        precision: As in `compute_spectrum`.
        parts: As in `compute_spectrum`.

    Raises:
        ValueError: If the weight is no matrix or convolution, is not finite, or is zero; or a value is out of range.
    """
    if aspect_ratio < 1 or windows < 1 or largest < 2:
        raise ValueError(
            f"aspect_ratio is {aspect_ratio}, windows {windows}, largest {largest}. They must be at least 1, 1 and 2. "
            "Correct them."
        )
    matrices = as_matrices(weight, parts)
    rows, columns = matrices.shape[1:]
    long = min(rows, largest, round(columns * aspect_ratio))
    short = max(1, min(columns, round(long / aspect_ratio)))
    cut = [
        matrices[:, top : top + long, left : left + short]
        for top in _starts(rows, long, windows)
        for left in _starts(columns, short, windows)
    ]
    pooled = torch.cat(cut)
    return _keep_positive(_eigenvalues(pooled, precision), pooled, precision, compat=False)


@torch.no_grad()
def compute_partial_spectrum(
    weight: torch.Tensor, count: int, *, parts: int = 1, passes: int = 4, seed: int = 0
) -> Spectrum:
    """Return the largest eigenvalues by randomised subspace iteration, for layers too large for all of them.

    The cost is `2 (passes + 1)` products with `count + 16` vectors instead of a cubic decomposition. The largest
    values are accurate, the last of them are lower bounds.

    Args:
        weight: As in `compute_spectrum`.
        count: How many eigenvalues of every matrix, fewer than its smaller side.
        parts: As in `compute_spectrum`.
        passes: Power iterations; more make the last values more accurate.
        seed: Of the random start.

    Raises:
        ValueError: If the weight is no matrix or convolution, is not finite or zero, or `count` is out of range.
    """
    matrices = as_matrices(weight, parts).double()
    columns = matrices.shape[2]
    if not 1 <= count < columns:
        raise ValueError(
            f"count is {count}. It must lie in [1, {columns - 1}], below the smaller side. Use compute_spectrum for "
            "all eigenvalues."
        )
    generator = torch.Generator().manual_seed(seed)
    width = min(count + 16, columns)
    basis = torch.randn(columns, width, generator=generator, dtype=torch.float64).to(matrices)
    found = []
    for matrix in matrices:
        subspace = torch.linalg.qr(matrix @ basis).Q
        for _ in range(passes):
            subspace = torch.linalg.qr(matrix @ (matrix.T @ subspace)).Q
        found.append(torch.linalg.svdvals(subspace.T @ matrix)[:count].square())
    whole = _keep_positive(torch.cat(found), matrices, torch.float64, compat=False)
    trace = float(matrices.square().sum())
    return Spectrum(whole.eigenvalues, whole.rows, whole.columns, whole.matrices, trace, is_partial=True)


def spectral_metrics(spectrum: Spectrum) -> SpectralMetrics:
    """Return ranks, norms, and what stands out of noise."""
    values, largest = spectrum.eigenvalues, float(spectrum.eigenvalues[-1])
    shares = values / values.sum()
    entropy = None if spectrum.is_partial else float(-(shares * shares.log()).sum())
    edge = None if spectrum.is_partial else _noise_edge(spectrum)
    return SpectralMetrics(
        spectral_norm=math.sqrt(largest),
        log_norm=math.log10(spectrum.trace),
        log_spectral_norm=math.log10(largest),
        stable_rank=spectrum.trace / largest,
        effective_rank=None if entropy is None else math.exp(entropy),
        entropy=None if entropy is None else entropy / math.log(max(len(values), 2)),
        mp_edge=edge,
        mp_soft_rank=None if edge is None else min(1.0, edge / largest),
        num_spikes=None if edge is None else int((values > edge).sum()),
    )


def as_matrices(weight: torch.Tensor, parts: int = 1) -> torch.Tensor:
    """Return a weight as matrices of shape `(count, larger side, smaller side)`.

    Raises:
        ValueError: If the weight is no matrix or convolution, is not finite, is zero, or cannot be cut into `parts`.
    """
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(
            f"The weight has the shape {tuple(weight.shape)}. A spectrum needs a matrix, or a convolution of shape "
            "(out, in, *kernel). Leave this parameter out."
        )
    if len(weight) % parts:
        raise ValueError(f"parts is {parts}. It must divide the {len(weight)} outputs of the weight. Correct it.")
    if not is_finite(weight):
        raise ValueError("The weight is not finite. A spectrum needs finite numbers. Load the weights again.")
    if is_zero(weight):
        raise ValueError("The weight is zero everywhere. It has no spectrum. Leave this layer out.")
    flat = weight.detach().flatten(2) if weight.ndim > 2 else weight.detach()[..., None]
    matrices = flat.unflatten(0, (parts, -1)).permute(0, 3, 1, 2).flatten(0, 1)
    return matrices if matrices.shape[1] >= matrices.shape[2] else matrices.mT


def is_finite(weight: torch.Tensor) -> bool:
    """Tell whether all numbers are finite: their norm says so in one pass, unless it overflows."""
    norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.promote_types(weight.dtype, torch.float32))
    return bool(torch.isfinite(norm)) or bool(torch.isfinite(weight).all())


def is_zero(weight: torch.Tensor) -> bool:
    """Tell whether all numbers are zero; the first row tells it of most weights."""
    return not (bool(weight[0].any()) or bool(weight.any()))


def _eigenvalues(matrices: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    found = []
    for matrix in matrices:  # one by one: a batched product would hold all Gram matrices
        found.append(gram_eigenvalues(matrix.to(precision)))
    return torch.cat(found).double()


def gram_eigenvalues(matrix: torch.Tensor) -> torch.Tensor:
    """Return the eigenvalues of `matrix^T matrix`, ascending, `(columns,)`, in the precision of the matrix.

    On the CPU through NumPy and SciPy: their OpenBLAS needs about 0.6 of the time of the MKL in torch on AMD's
    processors, in both products and eigenvalues.
    """
    if matrix.device.type != "cpu":
        return torch.linalg.eigvalsh(matrix.mT @ matrix)
    array = matrix.numpy()
    return torch.from_numpy(eigvalsh(array.T @ array, overwrite_a=True, check_finite=False))


def _keep_positive(values: torch.Tensor, matrices: torch.Tensor, precision: torch.dtype, compat: bool) -> Spectrum:
    values = values.sort().values
    noise = 4 * math.sqrt(matrices.shape[2]) * torch.finfo(precision).eps * float(values[-1])
    smallest = REFERENCE_SMALLEST if compat else noise
    kept = values[values > smallest]
    if compat and not len(kept):
        kept = values[values > noise]
    count, rows, columns = matrices.shape
    return Spectrum(kept, rows, columns, count, float(kept.sum()))


def _starts(length: int, window: int, most: int) -> list[int]:
    count = min(most, math.ceil(length / window))
    return [round(index * (length - window) / max(count - 1, 1)) for index in range(count)]


def _noise_edge(spectrum: Spectrum) -> float:
    """Return the edge of noise whose median eigenvalue is the spectrum's: spikes and tails do not move a median."""
    n, m = spectrum.rows, spectrum.columns
    variance = float(spectrum.eigenvalues.quantile(0.5)) / (n * marchenko_pastur_median(m / n))
    root = math.sqrt(n) + math.sqrt(m)
    # Johnstone (2001): location and scale of the largest eigenvalue of noise of unit variance.
    return variance * (root**2 + TRACY_WIDOM_99 * root * (1 / math.sqrt(n) + 1 / math.sqrt(m)) ** (1 / 3))


@lru_cache
def marchenko_pastur_median(ratio: float) -> float:
    """Return the median of the Marchenko-Pastur law of unit variance.

    Args:
        ratio: Smaller / larger side of the matrix, in (0, 1].
    """
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # x = low + (high - low) sin^2 removes the singularities at both ends.
    angles = torch.linspace(0, math.pi / 2, 4001, dtype=torch.float64)[1:-1]
    values = low + (high - low) * angles.sin().square()
    # density dx / d angle, up to a constant
    share = (((high - values) * (values - low)).sqrt() / values * angles.sin() * angles.cos()).cumsum(0)
    return float(values[int((share < share[-1] / 2).sum())])
