"""Keeping freed memory: page faults disappear where the setting exists, and nothing happens elsewhere."""

import platform
import subprocess
import sys

import pytest

from hf_opentrans import _memory

COUNT_FAULTS = """
import resource, sys
from hf_opentrans._memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
block = 64 * 2**20
for _ in range(2):
    bytearray(block)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting belongs to glibc")
def test_freed_blocks_are_used_again():
    faults = {}
    for mode in ("default", "kept"):
        answer = subprocess.run([sys.executable, "-c", COUNT_FAULTS, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(answer.stdout)
    assert faults["kept"] < 0.2 * faults["default"]


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(_memory.sys, "platform", "darwin")
    assert _memory.keep_freed_memory() is False
    monkeypatch.setattr(_memory.sys, "platform", "linux")
    monkeypatch.setattr(_memory.ctypes, "CDLL", lambda _: object())  # a libc without mallopt
    assert _memory.keep_freed_memory() is False


def test_the_package_runs_as_a_module():
    answer = subprocess.run(
        [sys.executable, "-m", "hf_opentrans", "--help"], capture_output=True, text=True, check=True
    )
    assert "latency-table" in answer.stdout
