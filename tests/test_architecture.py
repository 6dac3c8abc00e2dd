"""The shape of the package: who may import whom, how large things get, what is documented."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "hf_opentrans"
# A module may import the modules of its first matching row. Names are relative to hf_opentrans;
# a package is its __init__ and "." is the root. No row lists the cli but its own.
CONFIGS, MODELINGS = "models.configuration_*", "models.modeling_*"
CLIP, OPEN = "models.modeling_sparse_clip", "models.modeling_open_vocabulary"
QUERIES, QUERY_BASE = "models.modeling_mask_queries", "models.modeling_mask_query_base"
TEXT = "models.image_loading models.prompt_templates models.vocabulary"
ALL_BUT_CLI = "_* models* data* pruning* spectra* training* loading evaluation* benchmark* hub* deploy* demo*"
MAY_IMPORT = {
    "__main__": "cli",
    "_optional": "",
    "_*": "_*",
    "models": "models.*",
    CONFIGS: CONFIGS,
    CLIP: CONFIGS,
    OPEN: f"{CONFIGS} {CLIP} models.vocabulary",
    QUERIES: f"{CONFIGS} {CLIP} {OPEN} models.vocabulary",
    QUERY_BASE: f"{CONFIGS} {CLIP} {OPEN} {QUERIES} models.vocabulary",
    "models.modeling_elastic_clip": f"{CONFIGS} {CLIP} {OPEN} models.modeling_dense_clip models.vocabulary",
    MODELINGS: f"{CONFIGS} {CLIP} {OPEN} {QUERIES} {QUERY_BASE} models.vocabulary",  # never each other
    "models.auto_segmentation": f"{CONFIGS} {MODELINGS}",
    "models.vocabulary": TEXT,
    "models.processing_*": f"{TEXT} models.segmentation_result {MODELINGS}",
    "models.segmenting": "models.*",
    "models.pipeline_*": "models.*",
    "models.*": "",
    "data": "data.*",
    "data.*": "_* data.*",
    "pruning": "pruning.*",
    "pruning.allocation": "_* pruning.*",  # numbers in, numbers out: it never sees a model
    "pruning.*": "_* models* pruning.*",
    "spectra": "spectra.*",
    "spectra.esd": "",  # tensors in, frozen results out
    "spectra.tail_fits": "spectra.esd",
    "spectra.*": "_* spectra.*",  # any model, pruned or not
    "training": "_optional training.*",
    "training.*": "_* models* data* spectra* training.*",
    "loading": "_* models*",
    "evaluation*": "_* models* data* loading evaluation*",
    "benchmark*": ALL_BUT_CLI,
    "hub": "hub.*",
    "hub.*": "_* models* data* pruning* spectra* loading evaluation* benchmark* hub.*",
    "deploy": "deploy.*",
    "deploy.*": "_* models* pruning* loading deploy.*",
    "demo*": ALL_BUT_CLI,
    "app*": f"{ALL_BUT_CLI} app.*",
    "cli*": "*",
    ".": ALL_BUT_CLI,
}
# Inside pruning, from left to right. A module that is not listed is below them all.
PRUNING_ORDER = ["plan", "macs", "sizes", "calibration statistics", "importance low_rank"]
PRUNING_ORDER += ["allocation foreign", "menus search", "reconstruction", "refit", "surgery"]
PRUNING_ORDER += ["latency latency_timing", "baselines", "selection", "hosts", "unused", "transfer", "transferred"]
PRUNING_ORDER += ["subnetwork", "report", "summary", "prune"]
PRUNING_ORDER += ["elastic_order elastic_report", "elastic"]
PRUNING_ORDER += ["channel_statistics", "channel_selection channel_rebuild", "channels"]
PRUNING_ORDER += ["semi_structured"]  # on two_of_four, which is below them all
RANK = {f"pruning.{name}": i for i, level in enumerate(PRUNING_ORDER, 1) for name in level.split()}
# Files in models/ travel with checkpoints as remote code.
REMOTE_CODE = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "PIL"} | sys.stdlib_module_names
FOLDERS = {"hf_opentrans", "notebooks", "tests", "model_cards", ".ci"}
DOCUMENTED_ELSEWHERE = {"overload", "override", "setter"}  # decorators
MAX_FUNCTION, MAX_FILE, MAX_MODELING = 60, 500, 600  # lines; functions without docstring

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def _module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "."


FILES = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8"), str(path)) for name, path in FILES.items()}


def _place(module: str, node: ast.stmt | ast.expr) -> str:
    return f"{FILES[module].relative_to(REPOSITORY).as_posix()}:{node.lineno}"


def _imports(module: str) -> Iterator[tuple[str, ast.Import | ast.ImportFrom]]:
    """Yield the absolute dotted names that a module imports, inside functions too."""
    package = ["hf_opentrans", *(part for part in module.split(".") if part)]
    if FILES[module].name != "__init__.py":
        package.pop()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            yield from ((".".join([*base, alias.name]), node) for alias in node.names)


def _edges(module: str) -> Iterator[tuple[str, str]]:
    """Yield (imported module, place) for every import of one of our own modules."""
    for name, node in _imports(module):
        if name.split(".")[0] == "hf_opentrans":
            target = name.removeprefix("hf_opentrans").removeprefix(".")
            if target not in FILES:  # a name inside a module, not a module
                target = target.rpartition(".")[0]
            yield target or ".", _place(module, node)


def _is_allowed(module: str, target: str) -> bool:
    row = next((row for name, row in MAY_IMPORT.items() if fnmatchcase(module, name)), "")
    in_row = any(fnmatchcase(target, item) for item in row.split())
    inside_pruning = module.startswith("pruning.") and target.startswith("pruning.")
    return in_row and (not inside_pruning or RANK.get(module, 0) >= RANK.get(target, 0))


def _public(body: list[ast.stmt]) -> Iterator[FunctionNode | ast.ClassDef]:
    """Yield public functions and classes, and the public methods of the classes."""
    for node in body:
        if isinstance(node, FunctionNode | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            yield from _public(node.body) if isinstance(node, ast.ClassDef) else ()


def _untyped(node: FunctionNode) -> list[str]:
    a = node.args
    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    names = [argument.arg for argument in arguments if not argument.annotation]
    return [n for n in names if n not in {"self", "cls"}] + ([] if node.returns else ["return"])


def import_direction() -> Iterator[str]:
    graph: dict[str, set[str]] = {module: set() for module in FILES}
    for module in FILES:
        for target, place in _edges(module):
            graph[module] |= {target} - {module}
            if not _is_allowed(module, target):
                yield f"{place}: {module} -> {target} is not in the table of allowed imports"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "import cycle (each is imported by the next): " + " -> ".join(error.args[1])


def outside_imports() -> Iterator[str]:
    for module in FILES:
        for name, node in _imports(module):
            root = name.split(".")[0]
            if module.split(".")[0] == "models":
                sibling = getattr(node, "level", 0) == 1 and name.count(".") == 3
                if not sibling and root not in REMOTE_CODE:
                    yield f"{_place(module, node)}: remote code may not import {name}"
            elif module == "pruning.allocation" and root == "transformers":
                yield f"{_place(module, node)}: allocation sees numbers, never a model: {name}"


def sizes() -> Iterator[str]:
    for module, path in FILES.items():
        lines = len(path.read_text("utf-8").splitlines())
        if lines > (MAX_MODELING if module.startswith("models.modeling_") else MAX_FILE):
            yield f"{path.relative_to(REPOSITORY).as_posix()}: {lines} lines"
        for node in ast.walk(TREES[module]):
            if isinstance(node, FunctionNode):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
                if lines > MAX_FUNCTION:
                    yield f"{_place(module, node)}: {node.name} has {lines} lines"


def documentation_and_types() -> Iterator[str]:
    for module, tree in TREES.items():
        for node in _public(tree.body):
            decorators = {ast.unparse(item).rpartition(".")[2] for item in node.decorator_list}
            if not ast.get_docstring(node) and not decorators & DOCUMENTED_ELSEWHERE:
                yield f"{_place(module, node)}: {node.name} has no docstring"
            if isinstance(node, FunctionNode) and (missing := _untyped(node)):
                yield f"{_place(module, node)}: {node.name} lacks types for {missing}"


def assert_and_print() -> Iterator[str]:
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                yield f"{_place(module, node)}: assert in library code"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                yield f"{_place(module, node)}: print( in library code"


def public_names() -> Iterator[str]:
    package = importlib.import_module("hf_opentrans")
    for name in package.__all__:
        documentation = getattr(getattr(package, name, None), "__doc__", None) or f"{name}("
        if documentation.startswith(f"{name}("):  # the docstring that a dataclass makes up
            yield f"hf_opentrans.{name} cannot be imported or has no docstring"


def top_level_folders() -> Iterator[str]:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True).splitlines()
    for folder in {path.split("/")[0] for path in listed if "/" in path}:
        if folder not in FOLDERS:
            yield f"{folder}/: the only folders at the top are {sorted(FOLDERS)}"


RULES = [import_direction, outside_imports, sizes, documentation_and_types]
RULES += [assert_and_print, public_names, top_level_folders]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_architecture(rule):
    offences = list(rule())
    assert not offences, "\n" + "\n".join(offences)
