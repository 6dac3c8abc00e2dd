"""The largest memory that a piece of work takes, without further packages."""

import ctypes
import gc
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

_MIB = 2**20
_STATM = Path("/proc/self/statm")


class PeakMemory:
    """Context manager that notes the peak of the memory while its block runs, in `mib` (MiB).

    On CUDA it is the peak of PyTorch's tensors on the device. Elsewhere it is the resident memory of the whole process
    with the libraries and the model in it, sampled by a thread; a shorter peak than the interval can be missed. Where
    the system has no /proc it is the largest resident memory since the process started, and None where that is not
    known either.

    Args:
        device: Where the work runs.
        interval: Seconds between two samples.
    """

    def __init__(self, device: torch.device, interval: float = 0.01) -> None:
        self.device, self.interval = device, interval
        self.mib: float | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _STATM.exists():
            _return_free_memory()
            self._sample()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.mib = torch.cuda.max_memory_allocated(self.device) / _MIB
        elif self._thread is not None:
            self._done.set()
            self._thread.join()
            self._sample()
        else:
            self.mib = _peak_of_process()

    def _watch(self) -> None:
        while not self._done.wait(self.interval):
            self._sample()

    def _sample(self) -> None:
        pages = int(_STATM.read_text(encoding="ascii").split()[1])
        self.mib = max(self.mib or 0.0, pages * os.sysconf("SC_PAGE_SIZE") / _MIB)


def _peak_of_process() -> float | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB


def _return_free_memory() -> None:
    """Give back what earlier work freed: the allocator keeps it, and it would count as the next work's."""
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
