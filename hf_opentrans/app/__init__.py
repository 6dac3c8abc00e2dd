"""The clickable demo: dense and pruned side by side, in a browser (extra `app`)."""

from .interface import build_interface, serve
from .preparation import Example, Sources, cache_folder, prepare_embedded, read_examples
from .service import Answer, SegmentationService, Side
from .space import export_space, launch_space, read_space

__all__ = [
    "Answer",
    "Example",
    "SegmentationService",
    "Side",
    "Sources",
    "build_interface",
    "cache_folder",
    "export_space",
    "launch_space",
    "prepare_embedded",
    "read_examples",
    "read_space",
    "serve",
]
