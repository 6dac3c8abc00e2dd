"""Measured latency as a cost model: what every width of a sublayer takes on this machine, in milliseconds."""

import json
import statistics
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.interpolate import RegularGridInterpolator
from transformers import CLIPVisionConfig, CLIPVisionModel

from hf_opentrans._files import write_json
from hf_opentrans.models.configuration_sparse_clip import SparseCLIPVisionConfig

from .latency_timing import (
    CHAIN,
    DENSE,
    FIXED,
    Point,
    dense_config,
    dense_values,
    device_of,
    milliseconds,
    shape_of,
    timed_passes,
    vision_of,
)
from .surgery import PrunableModel
from .tower import Tower

SCHEMA = 1

Steps = tuple[int, ...]
Values = tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True)
class LatencyGrid:
    """The widths that are measured, each ascending up to the dense one.

    Args:
        heads: Numbers of heads, from 0.
        qk_head_dims, v_head_dims: Widths inside each head, from 1 or more.
        neurons: Widths of the MLP, from 0.

    Raises:
        ValueError: If a list is not ascending or begins elsewhere.
    """

    heads: Steps
    qk_head_dims: Steps
    v_head_dims: Steps
    neurons: Steps

    def __post_init__(self) -> None:
        for name in ("heads", "qk_head_dims", "v_head_dims", "neurons"):
            steps = tuple(int(step) for step in getattr(self, name))
            counts = name in ("heads", "neurons")
            is_ascending = len(steps) >= 1 + counts and list(steps) == sorted(set(steps))
            if not is_ascending or (steps[0] != 0 if counts else steps[0] < 1):
                raise ValueError(
                    f"The grid has {name}={list(steps)[:8]}. They must be ascending and distinct, and "
                    f"{'begin at 0 and hold another number' if counts else 'begin at 1 or more'}. "
                    "Use LatencyGrid.of(config)."
                )
            object.__setattr__(self, name, steps)

    @classmethod
    def of(cls, config: CLIPVisionConfig) -> "LatencyGrid":
        """Return the usual grid of a tower: quarters of heads and of their widths, eighths of the MLP.

        Added are one head and an eighth of the width, because launch costs and vector widths bend the curves there.
        """
        dense = dense_config(config)
        dims = _shares(cast("int", dense.head_dim), (1, 2, 4, 6, 8))
        heads, neurons = dense.__dict__["num_attention_heads"], dense.__dict__["intermediate_size"]
        return cls(
            heads=(0, *sorted({1, *_shares(heads, (2, 4, 6, 8))})),
            qk_head_dims=dims,
            v_head_dims=dims,
            neurons=(0, *_shares(neurons, range(1, 9))),
        )

    @property
    def points(self) -> list[Point]:
        """What is timed: ("attention", heads, qk, v) and ("mlp", neurons, 0, 0); without heads, widths are 0."""
        attention = [
            ("attention", heads, qk, v)
            for heads in self.heads[1:]
            for qk in self.qk_head_dims
            for v in self.v_head_dims
        ]
        return [("attention", 0, 0, 0), *attention, *(("mlp", neurons, 0, 0) for neurons in self.neurons)]


@dataclass(frozen=True)
class LatencyTable:
    """A `CostModel` of measured times, all in milliseconds of one forward pass of one batch.

    A larger width never costs less than a smaller one: noise must not make a smaller layer look dearer. Where a
    narrower layer really is slower (kernels that need equal or aligned widths), the wider one is raised to it.

    Args:
        device: Where it was measured: "processor", "accelerator" (None on the CPU), "threads", "torch", "dtype".
        shape: Of the dense tower: "hidden_size", "layers", "heads", "head_dim", "intermediate_size", "patch_size",
            "hidden_act", "attention" (the implementation).
        resolution: Side of the square images in pixels.
        batch_size: Images per pass.
        grid: The widths that were measured.
        attention_ms: Attention sublayer with its LayerNorm and residual sum, over heads x qk x v widths.
        mlp_ms: The same of the MLP, over neurons.
        fixed_ms: A pass through the tower without its layers.
        dense_ms: A pass through the dense tower.
        scale: Factor that the sublayers' times were multiplied by, so that
            `fixed_ms + layers * (attention + mlp) == dense_ms` for dense layers; near 1 where sublayers alone behave
            as they do inside the tower.

    Raises:
        ValueError: If the values do not fit the grid, are not finite, or fall while a width grows.
    """

    device: dict[str, Any]
    shape: dict[str, Any]
    resolution: int
    batch_size: int
    grid: LatencyGrid
    attention_ms: Values
    mlp_ms: tuple[float, ...]
    fixed_ms: float
    dense_ms: float
    scale: float

    def __post_init__(self) -> None:
        grid = self.grid
        sizes = (len(grid.heads), len(grid.qk_head_dims), len(grid.v_head_dims))
        for name, values, size in (
            ("attention_ms", self.attention_ms, sizes),
            ("mlp_ms", self.mlp_ms, (len(grid.neurons),)),
            ("fixed_ms, dense_ms and scale", (self.fixed_ms, self.dense_ms, self.scale), None),
        ):
            array = np.asarray(values, dtype=float)
            is_valid = bool(np.isfinite(array).all() and (array >= 0).all())
            if size is not None:
                is_valid &= array.shape == size and np.array_equal(array, _monotone(array))
            if not is_valid:
                raise ValueError(
                    f"The latency table's {name} cannot be used. Times must be finite, not negative, one per width of "
                    "the grid, and never fall as a width grows. Measure again with `hf-opentrans latency-table MODEL`."
                )

    @classmethod
    def from_measured(
        cls,
        times: dict[Point, float],
        *,
        grid: LatencyGrid,
        fixed_ms: float,
        dense_ms: float,
        **where: Any,
    ) -> "LatencyTable":
        """Build a table from raw medians: make them monotone, then scale them to the dense tower's time.

        Args:
            times: Milliseconds of each of `grid.points`.
            grid: The widths.
            fixed_ms: Of the tower without layers.
            dense_ms: Of the dense tower.
            where: `device`, `shape`, `resolution` and `batch_size`.

        Raises:
            RuntimeError: If the dense tower took no longer than the one without layers.
        """
        if not dense_ms > fixed_ms:
            raise RuntimeError(
                f"The dense tower took {dense_ms:.3f} ms and the same without its layers {fixed_ms:.3f} ms. The whole "
                "must take longer, so something else was running. Measure again on an idle machine, with more rounds."
            )
        raw = [
            [
                [times[("attention", h, q, v) if h else ("attention", 0, 0, 0)] for v in grid.v_head_dims]
                for q in grid.qk_head_dims
            ]
            for h in grid.heads
        ]
        attention, mlp = _monotone(np.array(raw)), _monotone(np.array([times["mlp", n, 0, 0] for n in grid.neurons]))
        layers = where["shape"]["layers"]
        scale = (dense_ms - fixed_ms) / float(layers * (attention[-1, -1, -1] + mlp[-1]))
        return cls(
            grid=grid,
            attention_ms=_nested(attention * scale),
            mlp_ms=_nested(mlp * scale),
            fixed_ms=fixed_ms,
            dense_ms=dense_ms,
            scale=scale,
            **where,
        )

    def fixed(self) -> float:
        """Milliseconds of everything that pruning does not touch."""
        return self.fixed_ms

    def attention(self, heads: int, qk_head_dim: int, v_head_dim: int) -> float:
        """Milliseconds of one layer's attention with its LayerNorm; without heads, those of the LayerNorm and bias.

        Widths inside heads that lie below the grid cost what the lowest measured ones do.

        Raises:
            ValueError: If a width is larger than the dense one.
        """
        key = (heads, qk_head_dim, v_head_dim) if heads else (0, 0, 0)
        if key not in self._known:
            self._known[key] = self._interpolate_attention(*key)
        return self._known[key]

    def mlp(self, neurons: int) -> float:
        """Milliseconds of one layer's MLP with its LayerNorm; without neurons, those of the LayerNorm and bias.

        Raises:
            ValueError: If there are more neurons than in the dense MLP.
        """
        _check_width("neurons", neurons, self.grid.neurons)
        if (neurons,) not in self._known:
            self._known[(neurons,)] = float(self._mlp_curve([[neurons]])[0])
        return self._known[(neurons,)]

    def _interpolate_attention(self, heads: int, qk: int, v: int) -> float:
        grid = self.grid
        for name, value, steps in (
            ("heads", heads, grid.heads),
            ("qk_head_dim", qk, grid.qk_head_dims),
            ("v_head_dim", v, grid.v_head_dims),
        ):
            _check_width(name, value, steps)
        low_qk, high_qk, s = _bracket(qk, grid.qk_head_dims)
        low_v, high_v, t = _bracket(v, grid.v_head_dims)
        # Triangles instead of rectangles: some kernels are fast for equal widths only, so the cost between two pairs
        # of equal widths must not be mixed with that of unequal ones.
        middle = (heads, high_qk, low_v) if s >= t else (heads, low_qk, high_v)
        corners = self._attention_curve([(heads, low_qk, low_v), middle, (heads, high_qk, high_v)])
        return float(corners @ [1 - max(s, t), abs(s - t), min(s, t)])

    @cached_property
    def _known(self) -> dict[tuple[int, ...], float]:
        return {}

    @cached_property
    def _attention_curve(self) -> RegularGridInterpolator:
        axes = (self.grid.heads, self.grid.qk_head_dims, self.grid.v_head_dims)
        return RegularGridInterpolator(axes, np.asarray(self.attention_ms))

    @cached_property
    def _mlp_curve(self) -> RegularGridInterpolator:
        return RegularGridInterpolator((self.grid.neurons,), np.asarray(self.mlp_ms))

    def check(
        self, model: PrunableModel | Tower, resolution: int | None = None, batch_size: int | None = None
    ) -> None:
        """Refuse a model, machine or input that the table was not measured for.

        Args:
            model: The model to prune, where it will run; a pruned one counts as the dense one it came from.
            resolution: Side of the square images in pixels. Defaults to the model's `image_size`.
            batch_size: Images per pass; not compared where None.

        Raises:
            ValueError: If device, threads, precision, torch (major.minor), shape, resolution or batch size differ.
            TypeError: If the model has no CLIP vision tower.
        """
        vision = vision_of(model)
        table, here = dict(self.device), device_of(vision)
        for values in (table, here):
            values["torch"] = ".".join(str(values.get("torch")).split(".")[:2])
        table |= self.shape | {"resolution": self.resolution}
        here |= shape_of(vision) | {"resolution": resolution or vision.config.image_size}
        if batch_size is not None:
            table, here = table | {"batch_size": self.batch_size}, here | {"batch_size": batch_size}
        differing = [
            f"{name} ({table.get(name)!r}, here {here[name]!r})" for name in here if table.get(name) != here[name]
        ]
        if differing:
            raise ValueError(
                f"The latency table was measured with another {', '.join(differing)}. A table holds only for the "
                "machine, settings and shape that it was measured with. Measure one here with "
                "`hf-opentrans latency-table MODEL`."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LatencyTable":
        """Build a table from `to_dict`'s output.

        Raises:
            ValueError: If it has another schema, lacks a field, or holds unusable values.
        """
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            found = values.get("schema") if isinstance(values, dict) else None
            raise ValueError(
                f"The latency table has schema {found!r}. This version reads schema {SCHEMA}. "
                "Measure again with `hf-opentrans latency-table MODEL`."
            )
        fields = {key: value for key, value in values.items() if key != "schema"}
        try:
            grid = LatencyGrid(**{name: tuple(steps) for name, steps in fields.pop("grid").items()})
            for name in ("attention_ms", "mlp_ms"):
                fields[name] = _nested(np.asarray(fields[name], dtype=float))
            for name in ("device", "shape"):
                fields[name] = dict(fields[name])
            return cls(grid=grid, **fields)
        except (KeyError, TypeError, AttributeError, ValueError) as err:
            raise ValueError(
                f"The latency table is damaged ({err}). It needs all fields that `LatencyTable.save` writes. "
                "Measure again with `hf-opentrans latency-table MODEL`."
            ) from err

    def save(self, path: str | Path) -> None:
        """Write the table as one JSON file, replacing an older one as a whole."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged or of another schema.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"There is no latency table {str(path)!r}. It must be a JSON file. Measure one with "
                f"`hf-opentrans latency-table MODEL --output {path}`."
            )
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as err:
            raise ValueError(
                f"The latency table {str(path)!r} is no valid JSON ({err}). It must be a whole file that "
                "`LatencyTable.save` wrote. Measure again with `hf-opentrans latency-table MODEL`."
            ) from err
        return cls.from_dict(values)


def measure_latency_table(
    model: PrunableModel,
    *,
    resolution: int | None = None,
    batch_size: int = 1,
    rounds: int = 15,
    warmup: int = 3,
    grid: LatencyGrid | None = None,
    on_point: Callable[[int, int], None] = lambda done, total: None,
) -> LatencyTable:
    """Time the sublayers of a vision tower at the widths of a grid, on the model's device, in its precision.

    Every round times all points, the dense tower and the tower without layers once, so that a drifting machine speed
    hits all alike; medians count. Each point is a chain of `CHAIN` sublayers whose weights lie one after the other in
    a pool as large as all layers, so that they are as cold in the caches as in a real pass. The sublayers' times are
    then multiplied by one factor (`LatencyTable.scale`) that makes the dense layers add up to the dense tower. Weights
    are random: they do not change the time. The model is not changed.

    Args:
        model: A stock or sparse CLIP; of a pruned one, the dense tower that it came from is measured.
        resolution: Side of the square images in pixels. Defaults to the model's `image_size`.
        batch_size: Images per pass.
        rounds: Counted rounds.
        warmup: Rounds before those.
        grid: Widths to measure, up to the dense ones. Defaults to `LatencyGrid.of(config)`.
        on_point: Called with the number of timings done and in all after each of them.

    Raises:
        TypeError: If the model has no CLIP vision tower.
        ValueError: If an argument is out of range, or the grid does not end at the dense widths.
        RuntimeError: If the dense tower took no longer than one without layers.
    """
    vision = vision_of(model)
    side = cast("int", vision.config.image_size) if resolution is None else resolution
    patch = cast("int", vision.config.patch_size)
    for name, value, lowest in (
        ("resolution", side, patch),
        ("batch_size", batch_size, 1),
        ("rounds", rounds, 1),
        ("warmup", warmup, 0),
    ):
        if not isinstance(value, int) or value < lowest:
            raise ValueError(f"{name} is {value!r}. It must be a whole number >= {lowest}. Use for example {lowest}.")
    dense = dense_config(vision.config)
    grid = _check_grid(grid or LatencyGrid.of(dense), dense)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        passes = timed_passes(
            vision, dense, grid.points, (batch_size, side), has_projection=not isinstance(model, CLIPVisionModel)
        )
        times: dict[Point, list[float]] = {point: [] for point in passes}
        total = (warmup + rounds) * len(passes)
        for index in range(total):
            point = list(passes)[index % len(passes)]
            elapsed = milliseconds(passes[point], vision.device)
            if index >= warmup * len(passes):
                times[point].append(elapsed)
            on_point(index + 1, total)
    medians = {point: statistics.median(measured) for point, measured in times.items()}
    return LatencyTable.from_measured(
        {point: medians[point] / CHAIN for point in grid.points},
        grid=grid,
        fixed_ms=medians[FIXED],
        dense_ms=medians[DENSE],
        device=device_of(vision),
        shape=shape_of(vision),
        resolution=side,
        batch_size=batch_size,
    )


def _check_grid(grid: LatencyGrid, dense: SparseCLIPVisionConfig) -> LatencyGrid:
    values = dense_values(dense)
    ends = {
        "heads": values["num_attention_heads"],
        "qk_head_dims": values["head_dim"],
        "v_head_dims": values["head_dim"],
        "neurons": values["intermediate_size"],
    }
    for name, end in ends.items():
        if getattr(grid, name)[-1] != end:
            raise ValueError(
                f"The grid's {name} end at {getattr(grid, name)[-1]}. They must end at the dense tower's {end}. "
                "Use LatencyGrid.of(config)."
            )
    return grid


def _check_width(name: str, value: int, steps: Steps) -> None:
    if not 0 <= value <= steps[-1]:
        raise ValueError(
            f"{name} is {value}. The latency table covers 0 to {steps[-1]}, the dense tower's. "
            "Use a table of this model: `hf-opentrans latency-table MODEL`."
        )


def _shares(dense: int, eighths: Sequence[int]) -> Steps:
    return tuple(sorted({max(1, round(dense * share / 8)) for share in eighths}))


def _bracket(value: int, steps: Steps) -> tuple[int, int, float]:
    """Return the measured widths below and above, and how far between them `value` lies, 0 to 1."""
    value = max(value, steps[0])
    upper = min(bisect_right(steps, value), len(steps) - 1)
    low, high = steps[max(upper - 1, 0)], steps[upper]
    return low, high, (value - low) / (high - low) if high > low else 0.0


def _monotone(values: np.ndarray) -> np.ndarray:
    for axis in range(values.ndim):
        values = np.maximum.accumulate(values, axis=axis)
    return values


def _nested(values: np.ndarray) -> Any:
    """Turn an array into nested tuples, which compare and do not change."""
    return tuple(_nested(value) for value in values) if values.ndim else float(values)
