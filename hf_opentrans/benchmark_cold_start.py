"""First use: what `import hf_opentrans` costs against transformers alone, and the way to the first segmentation.

Every figure is of a process of its own, as a user's first command is; statements are timed in turn, round by round.
The file cache is warm unless `empty_file_cache` is used, which needs no rights but leaves what running processes have
mapped: the shared libraries of PyTorch, where this process has them open.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

TORCH, REFERENCE, OURS = "import torch", "from transformers import CLIPModel", "import hf_opentrans"
STATEMENTS = (TORCH, REFERENCE, OURS)
# Most that the import may cost, in imports of CLIPModel.
ALLOWED_RATIO = 1.3
STAGES = ("interpreter", "import", "load", "encode names", "image pass", "post-processing")
CLIP_VOCABULARY = 49_408
PICTURE = (640, 480)
NAMES = (
    *("wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "window", "grass"),
    *("cabinet", "sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair"),
)
TOP = 5
_TIMED = (
    "import time; wall, cpu = time.perf_counter(), time.process_time(); {}; "
    "print(time.perf_counter() - wall, time.process_time() - cpu)"
)
# argv: the clock at the start of the process, the folder, the picture, the names as JSON.
_FIRST_USE = """
import json, sys, time
marks = [float(sys.argv[1]), time.time()]
import torch
from hf_opentrans import AutoModelForOpenVocabularySegmentation, OpenVocabularyProcessor, Vocabulary
marks.append(time.time())
model = AutoModelForOpenVocabularySegmentation.from_pretrained(sys.argv[2])
processor = OpenVocabularyProcessor.from_pretrained(sys.argv[2])
marks.append(time.time())
names = Vocabulary(json.loads(sys.argv[4]), templates=model.config.segmentation_templates)
vocabulary = model.encode_vocabulary(names, processor.tokenizer)
marks.append(time.time())
inputs = processor([sys.argv[3]], size_divisor=model.vision_model.config.patch_size)
with torch.inference_mode():
    outputs = model(inputs["pixel_values"], vocabulary=vocabulary)
marks.append(time.time())
processor.post_process_semantic_segmentation(outputs, inputs["target_sizes"])
marks.append(time.time())
print(json.dumps(marks))
"""


@dataclass(frozen=True)
class Timing:
    """Seconds of one statement or stage.

    Args:
        name: What was timed.
        seconds: One figure per round.
        cpu_seconds: Processor time of the same rounds; far below `seconds` where other work took the processor away.
    """

    name: str
    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class ColdStart:
    """What `measure_cold_start` found.

    Args:
        imports: One timing for each of `STATEMENTS`.
        stages: One timing for each of `STAGES`.
        packages: The `TOP` packages by the time that importing their own modules takes, with their share of the whole.
        is_cache_emptied: Whether the file cache was emptied before every process.
        model: Folder of the model, or what was made in its place.
    """

    imports: tuple[Timing, ...]
    stages: tuple[Timing, ...]
    packages: tuple[tuple[str, float], ...]
    is_cache_emptied: bool
    model: str

    @property
    def ratio(self) -> float:
        """Median over the rounds of our import over that of CLIPModel."""
        return self._ratio("seconds")

    @property
    def cpu_ratio(self) -> float:
        """The same ratio of processor times: what other work on the machine changes less."""
        return self._ratio("cpu_seconds")

    def _ratio(self, kind: str) -> float:
        named = {timing.name: getattr(timing, kind) for timing in self.imports}
        return statistics.median(ours / other for ours, other in zip(named[OURS], named[REFERENCE], strict=True))

    @property
    def total(self) -> float:
        """Median seconds from the start of the process to the first result."""
        return statistics.median(map(sum, zip(*(stage.seconds for stage in self.stages), strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Return every figure, JSON-ready."""
        return {
            **asdict(self),
            "ratio": self.ratio,
            "cpu_ratio": self.cpu_ratio,
            "allowed_ratio": ALLOWED_RATIO,
            "total": self.total,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ColdStart":
        """Return what `to_dict` wrote."""
        timings = {
            key: tuple(Timing(one["name"], *map(tuple, (one["seconds"], one["cpu_seconds"]))) for one in values[key])
            for key in ("imports", "stages")
        }
        packages = tuple((name, share) for name, share in values["packages"])
        return cls(**timings, packages=packages, is_cache_emptied=values["is_cache_emptied"], model=values["model"])


def measure_cold_start(
    folder: Path,
    picture: Path,
    repeats: int = 5,
    *,
    is_cold: bool = False,
    model: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> ColdStart:
    """Time imports and the way to the first segmentation, each in processes of its own.

    Args:
        folder: A CLIP with both towers and its processor.
        picture: The image to segment.
        repeats: Rounds, at least 1.
        is_cold: Whether to empty the file cache before every process.
        model: What to call the model in the result. Defaults to the folder.
        say: Called with a line on what is done.

    Raises:
        ValueError: If `repeats` is not positive.
        RuntimeError: If a process fails.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}. It must be at least 1. Raise it.")
    prepare = (lambda: empty_file_cache([*package_folders(), folder])) if is_cold else (lambda: None)
    imports: dict[str, list[tuple[float, float]]] = {statement: [] for statement in STATEMENTS}
    stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for number in range(1, repeats + 1):
        for statement, measured in imports.items():
            prepare()
            measured.append(time_statement(statement))
        prepare()
        for stage, seconds in zip(STAGES, time_first_use(folder, picture), strict=True):
            stages[stage].append(seconds)
        say(
            f"Round {number} of {repeats}: import {imports[OURS][-1][0]:.2f} s, transformers alone "
            f"{imports[REFERENCE][-1][0]:.2f} s, first result after {sum(s[-1] for s in stages.values()):.2f} s."
        )
    timed = tuple(Timing(name, *zip(*pairs, strict=True)) for name, pairs in imports.items())
    used = tuple(Timing(name, tuple(seconds)) for name, seconds in stages.items())
    return ColdStart(timed, used, import_shares(OURS)[:TOP], is_cold, model or folder.as_posix())


def time_statement(statement: str) -> tuple[float, float]:
    """Return wall and processor seconds of a statement in a fresh process, without the start of the interpreter."""
    wall, cpu = map(float, _run(["-c", _TIMED.format(statement)]).stdout.split())
    return wall, cpu


def time_first_use(folder: Path, picture: Path, names: Sequence[str] = NAMES) -> tuple[float, ...]:
    """Return the seconds of every one of `STAGES` from the start of a process to the first segmentation."""
    arguments = [str(time.time()), str(folder), str(picture), json.dumps(list(names))]
    marks = json.loads(_run(["-c", _FIRST_USE, *arguments]).stdout)
    return tuple(after - before for before, after in itertools.pairwise(marks))


def import_shares(statement: str) -> tuple[tuple[str, float], ...]:
    """Return the top-level packages that a statement imports, by the share of time that their own modules take.

    The interpreter's own measurement (`-X importtime`) makes every module a little slower; shares are hardly changed.
    """
    own: dict[str, int] = defaultdict(int)
    for line in _run(["-X", "importtime", "-c", statement]).stderr.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if len(parts) == 3 and parts[0].strip().isdigit():
            own[parts[2].strip().split(".")[0]] += int(parts[0])
    whole = sum(own.values())
    return tuple(sorted(((name, spent / whole) for name, spent in own.items()), key=lambda pair: -pair[1]))


def _run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # no request may be part of a time
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(
            f"A measured process ended with code {done.returncode}: {last[0]}. Every process must come to its end. "
            "Check that the model can be segmented with."
        )
    return done


def package_folders() -> list[Path]:
    """Return where the packages lie that the first use reads most of."""
    own = Path(__file__).parent
    return [own, *(Path(str(sys.modules[name].__file__)).parent for name in ("torch", "transformers", "numpy"))]


def empty_file_cache(folders: Sequence[Path]) -> int:
    """Ask the system to forget the content of all files below folders; return how many files that were.

    What a running process has mapped stays in memory.

    Raises:
        OSError: If the system has no such call.
    """
    if not hasattr(os, "posix_fadvise"):
        raise OSError(
            f"The file cache cannot be emptied on {sys.platform}. It takes posix_fadvise, which Linux has. Measure "
            "with a warm file cache instead."
        )
    count = 0
    for path in (path for folder in folders for path in folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            count += 1
    return count


def write_clip(folder: Path, config: CLIPConfig | None = None) -> None:
    """Write a CLIP with random weights, its image processor and a tokenizer, as on the Hub.

    Args:
        folder: Where.
        config: Sizes. Defaults to CLIP ViT-B/16: 150 million parameters, 600 MB.
    """
    config = config or CLIPConfig(vision_config={"patch_size": 16})
    text, vision = config.text_config, config.vision_config
    torch.manual_seed(0)
    side: Any = getattr(vision, "image_size", None)
    for part in (
        CLIPModel(config),
        random_tokenizer(getattr(text, "vocab_size", CLIP_VOCABULARY)),
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),  # pyright: ignore[reportCallIssue]
    ):
        part.save_pretrained(folder)


def random_tokenizer(entries: int) -> CLIPTokenizer:
    """Return a CLIP tokenizer of so many entries: bytes, pairs of bytes, start and end.

    It takes as long to load as a real one of that size.

    Raises:
        ValueError: If the entries do not suffice for the bytes, or are more than there are pairs.
    """
    alphabet = sorted(ByteLevel.alphabet())
    base = [*alphabet, *(f"{char}</w>" for char in alphabet)]
    count = entries - len(base) - 2
    if not 0 <= count <= len(alphabet) ** 2:
        raise ValueError(
            f"The tokenizer has {entries} entries. It must have {len(base) + 2} to "
            f"{len(base) + 2 + len(alphabet) ** 2}: bytes, pairs and two marks. Correct the number."
        )
    merges = [(left, right) for left in alphabet for right in alphabet][:count]
    tokens = [*base, *(left + right for left, right in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)  # pyright: ignore[reportArgumentType]


def write_picture(path: Path, size: tuple[int, int] = PICTURE) -> None:
    """Write a smooth random picture of `(width, height)` pixels."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


def cold_start_table(result: ColdStart) -> tuple[list[str], list[list[str]]]:
    """Return header and cells: imports first, then the stages of the first use."""
    header = ["what", "median", "fastest", "slowest", "against transformers"]
    reference = next(timing.median for timing in result.imports if timing.name == REFERENCE)
    cells = [[*_times(timing), f"{timing.median / reference:.2f}x"] for timing in result.imports]
    cells += [[*_times(timing), ""] for timing in result.stages]
    totals = tuple(map(sum, zip(*(stage.seconds for stage in result.stages), strict=True)))
    return header, [*cells, [*_times(Timing("process start to first result", totals)), ""]]


def _times(timing: Timing) -> list[str]:
    return [timing.name, *(f"{value:.2f} s" for value in (timing.median, min(timing.seconds), max(timing.seconds)))]


def cold_start_notes(result: ColdStart) -> list[str]:
    """Return what the table does not say: the ratio and its bound, what dominates, the state of the file cache."""
    verdict = "within" if result.ratio <= ALLOWED_RATIO else "beyond"
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result.packages)
    slowest = max(result.stages, key=lambda stage: stage.median)
    cache = (
        "emptied before every process, but for what other processes have mapped" if result.is_cache_emptied else "warm"
    )
    return [
        f"`{OURS}` takes {result.ratio:.2f} times as long as `{REFERENCE}` (median of paired rounds; "
        f"{result.cpu_ratio:.2f} in processor time), {verdict} the {ALLOWED_RATIO:g} that are allowed.",
        f"Of the import, by the modules' own time: {shares}.",
        f"Of the first use, '{slowest.name}' takes most: {slowest.median:.2f} of {result.total:.2f} s.",
        f"Model: {result.model}. {len(NAMES)} names, one picture of {PICTURE[0]} x {PICTURE[1]}. File cache: {cache}. "
        f"{len(result.imports[0].seconds)} rounds of fresh processes, statements in turn.",
    ]
