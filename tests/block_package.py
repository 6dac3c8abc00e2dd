"""Make hf_opentrans impossible to import, even where it is installed: run at the start of other processes' code."""

import sys


class Blocker:
    """A finder that refuses the package."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_opentrans":
            raise ImportError("hf_opentrans is blocked")


sys.meta_path.insert(0, Blocker())  # pyright: ignore[reportArgumentType]
