"""What to prune and how far (`PruningConfig`), and what was decided (`PruningPlan`): numbers only, no model."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

METHODS = (
    "obs",
    "corp-refit",
    "corp",
    "flap",
    "vbp",
    "magnitude-compensated",
    "magnitude",
    "imp",
    "random",
    "torch-pruning",
)
# These read no activations:
WITHOUT_IMAGES = ("magnitude", "imp", "torch-pruning")  # and nothing random: every seed gives the same
WITHOUT_STATISTICS = (*WITHOUT_IMAGES, "random")
UNITS = ("macs", "params", "latency")
STRUCTURES = ("mlp", "heads", "ranks")
SOLVERS = ("dp", "lagrangian", "uniform")
METRICS = ("probes", "identity")
SEARCHES = ("none", "evolution")
PLAN_FILE = "plan.json"


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """How to prune a CLIP vision tower.

    Args:
        keep: Share of the dense tower's budget to keep, in (0, 1]. The realised share lies in [keep - 0.02, keep].
        unit: What `keep` counts: "macs" (multiply-accumulates of one image), "params" (parameters of the tower) or
            "latency" (measured time of one pass; `prune_model` then needs a `LatencyTable`).
        method: "obs" is ours: greedy OBS and whitened SVD error menus, one budget over all layers, least-squares
            rebuilding. The others are published methods, written from their formulas, and controls; see
            `pruning/baselines.py`.
        structures: What "obs" may reduce: "mlp" (neurons), "heads" (whole heads), "ranks" (the width of queries and
            keys, and of values, inside every head).
        refit: Whether "obs" rebuilds in depth order on the pruned stream (True), or every layer on the dense model's
            own activations (False).
        solver: How the budget is spread: "dp" (exact knapsack), "lagrangian" (on convex hulls) or "uniform" (the same
            share in every layer, for ablations).
        metric: "probes" (errors under their effect on the final tokens) or "identity" (plain squared error relative
            to the residual stream, for ablations).
        search: "evolution" mutates the solution and scores it by the real tokens' cosine; "none" trusts the menus.
        search_steps: Mutations that the evolution tries.
        resolution: Side in pixels of the square calibration images, and the size that MACs are counted at. Defaults to
            the model's `image_size`.
        num_images: Calibration images, drawn at random by the seed; all of them where there are fewer.
        seed: Of the draw, the probes and the random control.
        batch_size: Images per forward pass.
        min_heads: Heads that every layer keeps at least.
        min_neurons: Share of the MLP neurons that every layer keeps at least, in [0, 1].
        round_neurons: Kept neurons are a multiple of this. Defaults to 32, or a sixteenth of a narrower MLP.
        round_head_dim: Kept query-key and value widths are a multiple of this. Defaults to 8, or a quarter of a
            narrower head.
        protect_last_attention: Keep all heads of the last block, whose queries, keys and values training-free dense
            heads read.
        probes: Random probes per image for the output metric.
        probe_images: Calibration images that the probes run on.
        held_out: Share of the calibration images that choose the ridge, in (0, 0.5].

    Raises:
        ValueError: If a value is outside its range.
    """

    keep: float = 0.6
    unit: str = "macs"
    method: str = "obs"
    structures: tuple[str, ...] = STRUCTURES
    refit: bool = True
    solver: str = "dp"
    metric: str = "probes"
    search: str = "none"
    search_steps: int = 100
    resolution: int | None = None
    num_images: int = 1024
    seed: int = 0
    batch_size: int = 16
    min_heads: int = 1
    min_neurons: float = 0.1
    round_neurons: int | None = None
    round_head_dim: int | None = None
    protect_last_attention: bool = True
    probes: int = 1
    probe_images: int = 64
    held_out: float = 0.2

    def __post_init__(self) -> None:
        _check("keep", self.keep, 0 < self.keep <= 1, "lie in (0, 1]: the share of the dense model to keep", "0.6")
        choices = {"unit": UNITS, "method": METHODS, "solver": SOLVERS, "metric": METRICS, "search": SEARCHES}
        for name, allowed in choices.items():
            value = getattr(self, name)
            _check(name, value, value in allowed, f"be one of {', '.join(allowed)}", allowed[0])
        kinds = (self.structures,) if isinstance(self.structures, str) else tuple(self.structures)
        is_known = bool(kinds) and set(kinds) <= set(STRUCTURES)
        _check("structures", kinds, is_known, f"name some of {', '.join(STRUCTURES)}", "('mlp', 'heads')")
        object.__setattr__(self, "structures", tuple(kind for kind in STRUCTURES if kind in kinds))
        size = self.resolution
        _check("resolution", size, size is None or size > 0, "be a positive number of pixels", "224")
        for name, lowest in (
            ("num_images", 1),
            ("batch_size", 1),
            ("probes", 1),
            ("probe_images", 1),
            ("min_heads", 0),
            ("search_steps", 1),
            ("round_neurons", 1),
            ("round_head_dim", 1),
        ):
            value = getattr(self, name)
            if value is None and name.startswith("round_"):
                continue
            _check(name, value, isinstance(value, int) and value >= lowest, f"be a whole number >= {lowest}", "16")
        _check("min_neurons", self.min_neurons, 0 <= self.min_neurons <= 1, "lie in [0, 1]", "0.1")
        _check("held_out", self.held_out, 0 < self.held_out <= 0.5, "lie in (0, 0.5]", "0.2")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


def _check(name: str, value: Any, is_valid: bool, rule: str, example: str) -> None:
    if not is_valid:
        raise ValueError(f"{name} is {value!r}. It must {rule}. Use for example {name}={example}.")


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps.

    Args:
        heads: Indices of the dense model's heads, ascending.
        neurons: Indices of its MLP neurons, ascending.
        qk_head_dim: Width of queries and keys per head; None where it stays.
        v_head_dim: Width of values per head; None where it stays.
    """

    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    qk_head_dim: int | None = None
    v_head_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("heads", "neurons"):
            kept = tuple(int(index) for index in getattr(self, name))
            if list(kept) != sorted(set(kept)) or any(index < 0 for index in kept):
                raise ValueError(
                    f"A layer keeps the {name} {list(kept)[:8]}. They must be ascending, distinct and not negative. "
                    "Sort them and drop duplicates."
                )
            object.__setattr__(self, name, kept)


@dataclass(frozen=True)
class PruningPlan:
    """Which heads and MLP neurons each layer keeps, first layer first."""

    layers: tuple[LayerPlan, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))

    def __len__(self) -> int:
        return len(self.layers)

    @classmethod
    def keep_all(cls, heads: Iterable[int], neurons: Iterable[int]) -> "PruningPlan":
        """Return the plan that removes nothing, given each layer's number of heads and of neurons."""
        pairs = zip(heads, neurons, strict=True)
        return cls(tuple(LayerPlan(tuple(range(h)), tuple(range(n))) for h, n in pairs))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready dictionaries and lists."""
        layers = [asdict(layer) for layer in self.layers]
        return {"layers": [{k: list(v) if isinstance(v, tuple) else v for k, v in layer.items()} for layer in layers]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PruningPlan":
        """Build a plan from `to_dict`'s output.

        Raises:
            ValueError: If the structure is another one.
        """
        try:
            return cls(
                tuple(
                    LayerPlan(tuple(v["heads"]), tuple(v["neurons"]), v.get("qk_head_dim"), v.get("v_head_dim"))
                    for v in values["layers"]
                )
            )
        except (KeyError, TypeError) as err:
            raise ValueError(
                f"The plan lacks {err}. It needs `layers`, each with `heads` and `neurons`. Save it again."
            ) from err

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `plan.json` into `folder`, which is created."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / PLAN_FILE).write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "PruningPlan":
        """Read what `save_pretrained` wrote."""
        return cls.from_dict(json.loads((Path(folder) / PLAN_FILE).read_text(encoding="utf-8")))
