"""What the channels of a CLIP ResNet are chosen from: output metrics, and moments of what convolutions read."""

from collections.abc import Callable

import torch
from torch.nn.functional import unfold

from hf_opentrans._distributed import own_share, process_count

from .calibration import ROWS_PER_COLUMN, Calibration, check_statistics
from .channel_trunk import Trunk, observe
from .importance import probe_moments
from .plan import PruningConfig
from .selection import PROBE_BATCH, PROBE_BYTES
from .statistics import CovarianceStatistics

Key = tuple[int, str]  # bottleneck, and the convolution that reads the channels: "conv2" or "conv3"
Parts = tuple[CovarianceStatistics, CovarianceStatistics]  # fitted, and held out
Hidden = list[list[torch.Tensor]]
KERNELS = {"conv2": 3, "conv3": 1}
# Neighbouring positions say nearly the same. More rows than these are drawn from: twice what least squares needs, and
# never fewer than FEWEST_ROWS.
ROWS, FEWEST_ROWS = 2 * ROWS_PER_COLUMN, 20_000


def trunk_metrics(
    trunk: Trunk, calibration: Calibration, config: PruningConfig, on_batch: Callable[[], object] = int
) -> dict[Key, torch.Tensor]:
    """Measure how the outputs of all second and third convolutions move the final tokens; see `output_metrics`.

    The tokens are the image's embedding and the dense features of all positions, each of unit length.
    """
    images = torch.cat(calibration.fit[: -(-config.probe_images // config.batch_size)])[: config.probe_images]
    fitting, share = PROBE_BYTES // _probe_bytes(trunk, images[:1]), len(images) // process_count()
    batches = images.split(max(1, min(config.batch_size, PROBE_BATCH, fitting, share)))

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, dict[Key, torch.Tensor]]:
        outputs: dict[Key, torch.Tensor] = {}
        with torch.enable_grad():
            hidden = trunk.stem(pixels).detach().requires_grad_()
            for index, block in enumerate(trunk.bottlenecks):
                seen = observe(block, hidden)
                outputs |= {(index, name): output for name, output in seen.outputs.items()}
                hidden = seen.output
            return trunk.finish(hidden), outputs

    def moment(_: Key, gradient: torch.Tensor) -> torch.Tensor:
        rows = gradient.transpose(0, 1).flatten(1)
        return (rows @ rows.T).double()

    metrics = probe_moments(
        forward,
        moment,
        batches,
        device=trunk.model.device,
        probes=config.probes,
        seed=config.seed,
        on_batch=on_batch,
    )
    for (index, name), metric in metrics.items():
        if not bool(torch.isfinite(metric).all()):
            raise ValueError(
                f"The gradients behind {trunk.names[index]}.{name} are not finite. Pruning needs finite numbers. "
                "Check the weights and the images."
            )
    return metrics


@torch.no_grad()
def _probe_bytes(trunk: Trunk, image: torch.Tensor) -> int:
    """Estimate what the gradients of one image keep: every convolution's output, normalised and rectified too."""
    hidden, floats = trunk.stem(image.to(trunk.model.device)), 0
    for block in trunk.bottlenecks:
        seen = observe(block, hidden)
        hidden = seen.output
        floats += 3 * (2 * seen.outputs["conv2"].numel() + seen.outputs["conv3"].numel())
    return 4 * floats


@torch.no_grad()
def embed_parts(trunk: Trunk, calibration: Calibration) -> Hidden:
    """Return what the first bottleneck reads, for this process's share of the fitted and of the held-out images."""
    parts = (calibration.fit, calibration.held_out)
    return [[trunk.stem(batch.to(trunk.model.device)) for batch in own_share(part)] for part in parts]


def rows_per_image(columns: int, calibration: Calibration) -> int:
    """Return how many positions of every image the statistics of a convolution need."""
    return -(-max(ROWS * columns, FEWEST_ROWS) // calibration.num_images)


def draw_positions(count: int, wanted: int, *seeds: int) -> torch.Tensor:
    """Return the indices of `wanted` of `count` positions, ascending; all where there are no more."""
    if wanted >= count:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(hash(seeds) % 2**63)
    return torch.randperm(count, generator=generator)[:wanted].sort().values


def read_rows(inputs: torch.Tensor, kernel: int, positions: torch.Tensor) -> torch.Tensor:
    """Return what a convolution with stride 1 reads at some positions of all images.

    Args:
        inputs: Of shape `(batch_size, channels, height, width)`.
        kernel: Side of the kernel, odd; padded by half of it.
        positions: Indices into height x width.

    Returns:
        Of shape `(batch_size * positions, channels * kernel ** 2)`: adjacent columns belong to one channel, as in
        the flattened weight.
    """
    columns = unfold(inputs, kernel, padding=kernel // 2) if kernel > 1 else inputs.flatten(2)
    return columns[:, :, positions.to(inputs.device)].transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def gather_inputs(
    trunk: Trunk,
    index: int,
    hidden: Hidden,
    calibration: Calibration,
    seed: int,
    on_batch: Callable[[], object] = int,
) -> dict[str, Parts]:
    """Gather the moments of what the second and the third convolution of one bottleneck read; moves `hidden` on.

    Raises:
        ValueError: If activations are not finite.
    """
    block = trunk.bottlenecks[index]
    widths = {"conv2": 9 * block.conv2.in_channels, "conv3": block.conv3.in_channels}
    device = trunk.model.device
    found = {n: (CovarianceStatistics(w, device), CovarianceStatistics(w, device)) for n, w in widths.items()}
    for part, batches in enumerate(hidden):
        for number, batch in enumerate(batches):
            seen = observe(block, batch)
            for name, statistics in found.items():
                inputs = seen.inputs[name]
                wanted = rows_per_image(widths[name], calibration)
                positions = draw_positions(inputs[0, 0].numel(), wanted, seed, index, part, number)
                statistics[part].update(read_rows(inputs, KERNELS[name], positions))
            batches[number] = seen.output
            on_batch()
    for name, parts in found.items():
        check_statistics(index, f"channels of {trunk.names[index]}.{name}", parts)
    return found
