"""Progress bar and wall times of a pruning run."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from tqdm.auto import tqdm

from hf_opentrans._distributed import is_main_process

_T = TypeVar("_T")


class StagedRun:
    """Progress bar and wall times of one call.

    Args:
        steps: Steps in all.
        progress: Whether to show the bar; other processes than the first never do.
    """

    def __init__(self, steps: int, progress: bool) -> None:
        is_shown = progress and is_main_process()
        self.bar = tqdm(total=steps, desc="Pruning", unit="step", disable=not is_shown, leave=False)
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def __enter__(self) -> "StagedRun":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
        self.seconds["total"] = time.perf_counter() - self._start

    def step(self) -> None:
        """Advance the bar."""
        self.bar.update()

    def time(self, stage: str, work: Callable[[], _T]) -> _T:
        """Run `work` and note how long it took."""
        start = time.perf_counter()
        self.bar.set_description(f"Pruning: {stage}")
        result = work()
        self.seconds[stage] = time.perf_counter() - start
        return result
