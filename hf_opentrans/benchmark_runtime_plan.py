"""What a latency benchmark runs: runtimes with their precisions, and what this machine cannot run, with the reason."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from typing import Any

from hf_opentrans.benchmarks import LatencyRow
from hf_opentrans.deploy.quantization import supports_bfloat16

# For every runtime its precisions. What they mean: `deploy.quantization`.
RUNTIMES: dict[str, tuple[str, ...]] = {
    "eager": ("fp32", "bf16"),
    "compile": ("fp32", "bf16"),
    "onnxruntime": ("fp32", "int8-dynamic", "int8-static"),
    "openvino": ("fp32", "bf16", "int8-weights", "int8-weights-bf16"),
}
# The runtimes that read a graph from a file, with the format of that file.
FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}
# "int8" is every kind of it that a runtime has.
KINDS = ("fp32", "bf16", "int8")
_PACKAGES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino", "nncf")}


@dataclass(frozen=True)
class RuntimeRow(LatencyRow):
    """Paired latency of one model in one runtime and precision.

    `speed_up` is against the first model in eager fp32; `efficiency` is `gain / mac_ratio`.

    Args:
        runtime: One of `RUNTIMES`.
        precision: One of its precisions.
        gain: Median over rounds of the first model's time / this model's time, both in this runtime and precision.
        bytes: Of the files with the weights.
        peak_memory_mib: Largest resident memory of a process that loads the model and runs it, libraries included;
            None where the system does not tell.
        cosine: Mean cosine of the final tokens to those of the same model in eager fp32.
        cosine_to_first: The same, to the first model's; None where the weights are random.
        mean_iou: On the data set; None where none was given.
    """

    runtime: str = "eager"
    precision: str = "fp32"
    gain: float | None = None
    bytes: int | None = None
    peak_memory_mib: float | None = None
    cosine: float | None = None
    cosine_to_first: float | None = None
    mean_iou: float | None = None

    @property
    def setting(self) -> "Setting":
        """What this row was timed in."""
        return Setting(self.runtime, self.precision, self.batch_size, self.resolution)


@dataclass(frozen=True)
class Setting:
    """What all models are timed in, in turn.

    Args:
        runtime, precision: See `RUNTIMES`.
        batch_size: Images per pass.
        resolution: Side in pixels.
    """

    runtime: str
    precision: str
    batch_size: int
    resolution: int

    def __str__(self) -> str:
        return f"{self.runtime} {self.precision}, batch {self.batch_size}, {self.resolution} px"


@dataclass(frozen=True)
class NotRun:
    """A runtime and precision that was asked for and cannot be run here.

    Args:
        runtime, precision: What was asked for.
        reason: One sentence.
    """

    runtime: str
    precision: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


def plan_settings(
    runtimes: Sequence[str], precisions: Sequence[str], batches: Sequence[int], resolutions: Sequence[int]
) -> tuple[list[Setting], list[NotRun]]:
    """List what is timed, and what cannot be.

    Args:
        runtimes: Of `RUNTIMES`.
        precisions: "fp32", "bf16", "int8", or the exact name of a kind, such as "int8-static".
        batches: Images per pass.
        resolutions: Sides in pixels.

    Raises:
        ValueError: If a name is unknown, or nothing is left to run.
    """
    known = list(dict.fromkeys([*KINDS, *(name for kinds in RUNTIMES.values() for name in kinds)]))
    for option, values, allowed in (("runtimes", runtimes, list(RUNTIMES)), ("precision", precisions, known)):
        for value in values:
            if value not in allowed:
                raise ValueError(f"{option} has {value!r}. It must be one of {', '.join(allowed)}. Correct it.")
    pairs: list[tuple[str, str]] = []
    missing: list[NotRun] = []
    for runtime, wanted in product(dict.fromkeys(runtimes), dict.fromkeys(precisions)):
        for precision in _kinds(runtime, wanted):
            reason = _obstacle(runtime, precision)
            if reason is None:
                pairs.append((runtime, precision))
            else:
                missing.append(NotRun(runtime, precision, reason))
    pairs = list(dict.fromkeys(pairs))
    if not pairs:
        reasons = " ".join(f"{found.runtime} {found.precision}: {found.reason}" for found in missing)
        raise ValueError(f"Nothing of what was asked for can be run here. {reasons} Choose others.")
    sides = sorted(set(resolutions))
    shapes = [(batch, side) for side in sides for batch in sorted(set(batches))]
    found = [Setting(runtime, precision, *shape) for shape in shapes for runtime, precision in pairs]
    return found, missing


def _kinds(runtime: str, wanted: str) -> Iterator[str]:
    found = [name for name in RUNTIMES[runtime] if name == wanted or (wanted == "int8" and name.startswith("int8"))]
    yield from found or [wanted]


def _obstacle(runtime: str, precision: str) -> str | None:
    """Say why a runtime cannot run a precision on this machine; None where it can."""
    if precision not in RUNTIMES[runtime]:
        return f"On the processor {runtime} has {', '.join(RUNTIMES[runtime])}."
    absent = [name for name in _PACKAGES.get(runtime, ()) if find_spec(name) is None]
    if absent:
        extra = FORMATS[runtime]
        return f'{", ".join(absent)} is not installed. Run: pip install "hf_opentrans[{extra}]".'
    if precision.endswith("bf16") and not supports_bfloat16():
        return "This processor has no instructions for bfloat16."
    if runtime == "compile" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler, and there is none. Install g++."
    return None
