"""Latency of vision towers in several runtimes and precisions: paired, interleaved runs, the same pixels for all."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch.nn.functional import cosine_similarity
from transformers import CLIPVisionModel

from hf_opentrans._files import folder_bytes
from hf_opentrans.benchmark_rows import RowFile, duration
from hf_opentrans.benchmark_runtime_memory import peak_memory
from hf_opentrans.benchmark_runtime_plan import FORMATS, NotRun, RuntimeRow, Setting
from hf_opentrans.benchmark_runtime_quality import RuntimeScores
from hf_opentrans.deploy.onnx_runtime import write_onnx
from hf_opentrans.deploy.openvino_runtime import convert_openvino, openvino_core, write_openvino
from hf_opentrans.deploy.quantization import (
    compress_openvino_weights,
    quantize_onnx_dynamic,
    quantize_onnx_static,
    to_bfloat16,
)
from hf_opentrans.deploy.sessions import open_session
from hf_opentrans.deploy.tracing import Traced, trace
from hf_opentrans.deploy.wrappers import PIXELS, TowerGraph
from hf_opentrans.pruning.latency_timing import interleave
from hf_opentrans.pruning.macs import count_macs

WARMUP = 2
# Threads of one runtime still spin a little after their work; the next one must not be slowed down by them.
SETTLE_SECONDS = 0.03
CALIBRATION_IMAGES, FIDELITY_IMAGES = 16, 4
_SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml"}
_VERSIONS = ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
Pass = Callable[[torch.Tensor], torch.Tensor]


class RuntimeFile(RowFile[RuntimeRow]):
    """The rows of a latency benchmark, and what was not run and why."""

    row_type = RuntimeRow
    written_by: ClassVar[str] = "hf-opentrans benchmark latency"

    def __init__(self, path: Path | None, settings: dict[str, Any], command: str) -> None:
        self.not_run: list[NotRun] = []
        super().__init__(path, settings, command)

    def more(self) -> dict[str, Any]:
        """Return what was not run."""
        return {"not_run": [found.to_dict() for found in self.not_run]}


@dataclass
class Towers:
    """Vision towers by name, the first being the reference, with their graphs in files that are made when needed.

    Args:
        models: In fp32, in eval mode, on the CPU.
        folder: For the files.
        images: Square crops of shape `(images, 3, side, side)` for a side; noise where there are no images.
        is_trained: Whether closeness to the first model says anything.
        scores: Measures mIoU; None where there is no data set.
    """

    models: Mapping[str, CLIPVisionModel]
    folder: Path
    images: Callable[[int, int], torch.Tensor]
    is_trained: bool = False
    scores: RuntimeScores | None = None
    _expected: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def saved(self, name: str) -> Path:
        """Return the folder of a model's weights."""
        folder = self.folder / f"model-{list(self.models).index(name)}"
        if not folder.exists():
            self.models[name].save_pretrained(folder)
        return folder

    def graph(self, name: str, runtime: str, precision: str, side: int) -> Path:
        """Return the file of a model's graph, written when it is first asked for.

        Raises:
            RuntimeError: If the model has no graph in that format.
        """
        stem = f"{self.saved(name).name}-{side}-{runtime}"
        kind = "int8-weights" if precision.startswith("int8-weights") else precision
        kind = "fp32" if runtime == "openvino" and precision == "bf16" else kind
        path = self.folder / f"{stem}-{kind}{_SUFFIXES[runtime]}"
        if not path.exists():
            self._write(name, runtime, kind, side, path)
        return path

    def _write(self, name: str, runtime: str, kind: str, side: int, path: Path) -> None:
        if kind == "fp32" and runtime == "openvino":
            write_openvino(convert_openvino(self._traced(name, side)), path)
            return
        if kind == "fp32":
            write_onnx(self._traced(name, side), path)
            return
        plain = self.graph(name, runtime, "fp32", side)
        if kind == "int8-weights":
            write_openvino(compress_openvino_weights(openvino_core().read_model(str(plain))), path)
        elif kind == "int8-dynamic":
            quantize_onnx_dynamic(plain, path)
        else:
            pixels = self.images(side, CALIBRATION_IMAGES)
            quantize_onnx_static(plain, path, [{PIXELS: image[None]} for image in pixels])

    def _traced(self, name: str, side: int) -> Traced:
        example = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        graph = TowerGraph(self.models[name], example).eval()
        return trace(graph, {PIXELS: example}, {PIXELS: {0: torch.export.Dim("batch", min=1)}})

    def run(self, name: str, setting: Setting, threads: int) -> Pass:
        """Return a function from pixel values to the final tokens of a model."""
        model, runtime, precision = self.models[name], setting.runtime, setting.precision
        if runtime in FORMATS:
            session = open_session(
                self.graph(name, runtime, precision, setting.resolution),
                file_format=FORMATS[runtime],
                precision=precision,
                outputs=("last_hidden_state", "pooler_output"),
                threads=threads,
            )
            return lambda pixels: session.run({PIXELS: pixels})["last_hidden_state"]
        if precision == "bf16":
            model = cast("CLIPVisionModel", to_bfloat16(model))
        dtype = model.dtype
        called: Any = torch.compile(model, fullgraph=True, dynamic=False) if runtime == "compile" else model
        return lambda pixels: called(pixels.to(dtype), interpolate_pos_encoding=True).last_hidden_state

    def bytes(self, name: str, setting: Setting) -> int:
        """Return the bytes of the files with the weights."""
        if setting.runtime not in FORMATS:
            scale = 2 if setting.precision == "bf16" else 1  # saved here in fp32
            return folder_bytes(self.saved(name), "*.safetensors") // scale
        path = self.graph(name, setting.runtime, setting.precision, setting.resolution)
        return folder_bytes(self.folder, f"{path.stem}.*")  # the graph, and its weights where they lie beside it

    def memory(self, name: str, setting: Setting, threads: int) -> float | None:
        """Return the peak memory of a process with this model alone, in MiB."""
        in_file = setting.runtime in FORMATS
        path = (
            self.graph(name, setting.runtime, setting.precision, setting.resolution) if in_file else self.saved(name)
        )
        return peak_memory(
            {
                "runtime": setting.runtime,
                "precision": setting.precision,
                "path": str(path),
                "batch_size": setting.batch_size,
                "resolution": setting.resolution,
                "threads": threads,
            }
        )

    def expected(self, name: str, side: int) -> torch.Tensor:
        """Return the final tokens of a model in eager fp32, `(images, tokens, width)`."""
        if (name, side) not in self._expected:
            pixels = self.images(side, FIDELITY_IMAGES)
            found = self.models[name](pixels, interpolate_pos_encoding=True)
            self._expected[name, side] = found.last_hidden_state
        return self._expected[name, side]


@torch.inference_mode()
def run_benchmark(
    towers: Towers,
    settings: Sequence[Setting],
    results: RuntimeFile,
    *,
    rounds: int,
    threads: int,
    say: Callable[[str], object] = str,
    memory: bool = True,
) -> None:
    """Measure all models in all settings that the file does not hold yet; a setting is written when it is done.

    Args:
        towers: The models.
        settings: Where to time them.
        results: Where the rows go.
        rounds: Counted rounds; each runs the first model in eager fp32, and then every model in the setting.
        threads: Of every runtime.
        say: Called with a line on what comes next and how long it may take.
        memory: Whether to measure memory, in processes of their own.

    Raises:
        RuntimeError: If a runtime cannot run a model.
    """
    torch.set_num_threads(threads)
    done = {row.setting for row in results.rows}
    left = [setting for setting in settings if setting not in done]
    say(f"{len(left)} settings to do, {len(settings) - len(left)} done.")
    for index, setting in enumerate(left):
        start = time.perf_counter()
        with _fresh_compiler(setting):
            rows = _measure(towers, setting, rounds, threads, memory=memory)
        results.rows.extend(rows)
        for (name, runtime, precision), reason in towers.scores.refused.items() if towers.scores else ():
            refused = NotRun(runtime, precision, f"mIoU of {Path(name).name}: {reason}")
            results.not_run += [] if refused in results.not_run else [refused]
        results.save()
        taken = time.perf_counter() - start
        best = max(row.speed_up for row in rows)
        say(f"{index + 1} of {len(left)}: {setting}, {duration(taken)}; up to {best:.2f} times as fast.")


@contextmanager
def _fresh_compiler(setting: Setting) -> Iterator[None]:
    """Forget what torch compiled before: after some shapes it stops compiling and says nothing."""
    if setting.runtime == "compile":
        torch._dynamo.reset()
    yield
    if setting.runtime == "compile":
        torch._dynamo.reset()


def _measure(towers: Towers, setting: Setting, rounds: int, threads: int, *, memory: bool) -> list[RuntimeRow]:
    names, side = list(towers.models), setting.resolution
    reference = towers.models[names[0]]
    passes = {name: towers.run(name, setting, threads) for name in names}
    faithful = {name: _fidelity(towers, name, side, passes[name]) for name in names}
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randn(setting.batch_size, 3, side, side, generator=noise)
    is_reference = (setting.runtime, setting.precision) == ("eager", "fp32")
    timed: dict[str, Callable[[], object]] = {name: lambda run=run: run(pixels) for name, run in passes.items()}
    if not is_reference:
        timed = {"": lambda: reference(pixels, interpolate_pos_encoding=True), **timed}
    times = interleave(timed, rounds, warmup=WARMUP, settle=SETTLE_SECONDS)
    first, dense = next(iter(times.values())), times[names[0]]
    macs = {name: count_macs(m.config, resolution=side, projection=False) for name, m in towers.models.items()}
    rows = []
    for name in names:
        against = [a / b for a, b in zip(first, times[name], strict=True)]
        gain = statistics.median(a / b for a, b in zip(dense, times[name], strict=True))
        ratio = macs[names[0]] / macs[name]
        rows.append(
            RuntimeRow(
                model=name,
                batch_size=setting.batch_size,
                resolution=side,
                threads=threads,
                median_ms=statistics.median(times[name]),
                speed_up=statistics.median(against),
                speed_up_range=(min(against), max(against)),
                mac_ratio=ratio,
                efficiency=gain / ratio,
                rounds=rounds,
                runtime=setting.runtime,
                precision=setting.precision,
                gain=gain,
                bytes=towers.bytes(name, setting),
                peak_memory_mib=towers.memory(name, setting, threads) if memory else None,
                cosine=faithful[name][0],
                cosine_to_first=faithful[name][1] if towers.is_trained else None,
                mean_iou=towers.scores and towers.scores(name, setting.runtime, setting.precision),
            )
        )
    return rows


def _fidelity(towers: Towers, name: str, side: int, run: Pass) -> tuple[float, float]:
    """Return the mean cosine of a model's final tokens to its own and to the first model's in eager fp32."""
    pixels = towers.images(side, FIDELITY_IMAGES)
    found = torch.cat([run(image[None]).float() for image in pixels])
    own, first = towers.expected(name, side), towers.expected(next(iter(towers.models)), side)
    return tuple(float(cosine_similarity(found, expected, dim=-1).mean()) for expected in (own, first))  # pyright: ignore[reportReturnType]


def runtime_versions() -> dict[str, str]:
    """Return the versions of the packages that export and run graphs, of those that are installed."""
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
