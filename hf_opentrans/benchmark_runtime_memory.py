"""The memory that a deployed model takes: measured in a process of its own, with nothing but its runtime in it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def peak_memory(job: dict[str, Any]) -> float | None:
    """Return the largest resident memory in MiB of a process that loads a model and runs it twice.

    Args:
        job: `runtime`, `precision`, `path`, `batch_size`, `resolution` and `threads`, see `benchmark_runtime_child`.

    Returns:
        None where the system does not tell.

    Raises:
        RuntimeError: If the process fails.
    """
    child = Path(__file__).with_name("benchmark_runtime_child.py")
    # The package's own parent: an installed copy and a checkout both find it.
    paths = [str(child.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(child), json.dumps(job)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CI": "true"},  # CI: openvino then reports nothing
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(
            f"The process that measures memory ended with code {done.returncode}: {last} It must load {job['path']!r} "
            f"in {job['runtime']}. Run the benchmark without that runtime."
        )
    return json.loads(done.stdout.splitlines()[-1])["mib"]
