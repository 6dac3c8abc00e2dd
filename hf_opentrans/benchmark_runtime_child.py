"""Run as a script by `benchmark_runtime_memory`: loads one model in one runtime, runs it, and says its memory.

It imports what that runtime needs and nothing else: what counts is what a server would hold.
"""

import json
import sys
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


def run(job: dict[str, Any]) -> None:
    """Load the model of a job and run it twice.

    Args:
        job: `runtime`; `precision`; `path` of a .onnx or .xml file, or of a folder with a vision tower; `batch_size`;
            `resolution` in pixels; `threads`.
    """
    shape = (job["batch_size"], 3, job["resolution"], job["resolution"])
    runners = {"onnxruntime": _run_onnx, "openvino": _run_openvino}
    runners.get(job["runtime"], _run_torch)(job, shape)


def _run_onnx(job: dict[str, Any], shape: tuple[int, ...]) -> None:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    session = onnxruntime.InferenceSession(job["path"], options, providers=["CPUExecutionProvider"])
    for _ in range(2):
        session.run(None, {"pixel_values": np.zeros(shape, np.float32)})


def _run_openvino(job: dict[str, Any], shape: tuple[int, ...]) -> None:
    import numpy as np
    import openvino

    hint = "bf16" if job["precision"].endswith("bf16") else "f32"
    options = {
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job["threads"],
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(job["path"]), "CPU", options)
    for _ in range(2):
        compiled({"pixel_values": np.zeros(shape, np.float32)})


def _run_torch(job: dict[str, Any], shape: tuple[int, ...]) -> None:
    import torch

    from hf_opentrans.models.modeling_sparse_clip import SparseCLIPVisionModel

    torch.set_num_threads(job["threads"])
    dtype = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    model: Any = SparseCLIPVisionModel.from_pretrained(job["path"], dtype=dtype).eval()
    if job["runtime"] == "compile":
        model = torch.compile(model, fullgraph=True, dynamic=False)
    with torch.inference_mode():
        for _ in range(2):
            model(torch.zeros(shape, dtype=dtype), interpolate_pos_encoding=True)


def peak_mib() -> float | None:
    """Return the largest resident memory of this process in MiB; None where the system has no /proc.

    Not that of `getrusage`: it also counts the process that this one was started from.
    """
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
    sys.stdout.write(json.dumps({"mib": peak_mib()}) + "\n")
