"""How this process asks the system for memory."""

import ctypes
import sys

# glibc's numbers of these settings (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER, _PAD = 2**31 - 1, 256 * 2**20


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of handing every large block back to the system.

    PyTorch frees and asks again for activations of many megabytes all the time. By default each of them is mapped
    anew, and the system zeroes every page: element-wise operations then take up to five times as long. The price is
    that the process holds its peak memory until it ends, which suits a command.

    Returns:
        Whether the setting exists here and was made; elsewhere (macOS, Windows, musl) nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _PAD))
    return all(bool(mallopt(name, value)) for name, value in settings)
