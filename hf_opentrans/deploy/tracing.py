"""One `torch.export` graph as the source of every format: dynamic batch, fixed image size, constants folded.

What does not depend on the input is computed once here, so that every runtime sees it as a weight: interpolated
positions, the neighbour bias of NACLIP, window masks, a fixed vocabulary. Weights that nothing reads are left out.
"""

import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

from hf_opentrans.deploy.wrappers import Exportable

# The first whose graphs can be taken apart and put together again as it is done here.
LOWEST_TORCH = (2, 11)
DynamicSizes = Mapping[str, Mapping[int, Any]]
_LINEAR, _ADD = torch.ops.aten.linear.default, torch.ops.aten.add.Tensor
# Notes of the tracer about types; they would hold up the removal of what they look at.
_CHECK = torch.ops.aten._assert_tensor_metadata.default


@dataclass(frozen=True)
class Traced:
    """A traced module.

    Args:
        program: The graph.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        folded: Number of constants that were computed once and for all.
        folded_bytes: Their size.
        emptied: Products over nothing (an MLP without neurons) that became their bias.
    """

    program: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    folded: int
    folded_bytes: int
    emptied: int

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs, -1 where any size will do."""
        user = set(self.program.graph_signature.user_inputs)
        found = [node.meta["val"].shape for node in self.program.graph.nodes if node.name in user]
        shapes = (tuple(size if isinstance(size, int) else -1 for size in shape) for shape in found)
        return dict(zip(self.inputs, shapes, strict=True))


def trace(module: Exportable, example: Mapping[str, torch.Tensor], dynamic: DynamicSizes) -> Traced:
    """Trace a module and fold its constants.

    Args:
        module: In evaluation mode, in float32, on the CPU; not changed.
        example: Inputs by name, in the order of the module's arguments; dynamic sizes must be at least 2.
        dynamic: For every input, the dimensions that may have any size, with their `torch.export.Dim`.

    Raises:
        RuntimeError: If the module does something that a graph cannot hold.
    """
    from torch._dynamo.exc import TorchDynamoException  # takes seconds, and commands import this module

    arguments = tuple(example.values())
    sizes = tuple(dict(dynamic.get(name, {})) for name in example)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.export warns of its own inner workings
            program = torch.export.export(module, arguments, dynamic_shapes=sizes)
            folded = fold_constants(program)
            again = torch.export.export(folded.module, arguments, dynamic_shapes=sizes)
    except (RuntimeError, ValueError, TypeError, AttributeError, TorchDynamoException) as err:
        name = type(getattr(module, "model", module)).__name__
        raise RuntimeError(
            f"{name} cannot be traced at {_shapes(example)}: {_first_line(err)} A graph holds no Python and no size "
            "that depends on values. Use this model in PyTorch, or export another kind."
        ) from err
    return Traced(again, tuple(example), module.output_names, folded.count, folded.size, folded.emptied)


@dataclass(frozen=True)
class Folded:
    """A graph whose constants are folded.

    Args:
        module: Takes and returns what the program did.
        count: Number of folded constants.
        size: Their bytes.
        emptied: See `Traced`.
    """

    module: fx.GraphModule
    count: int
    size: int
    emptied: int


def require_torch() -> None:
    """Raise ImportError where torch is too old for `torch.export` as it is used here."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < LOWEST_TORCH:
        lowest = ".".join(map(str, LOWEST_TORCH))
        raise ImportError(
            f"torch {torch.__version__} is installed. Export needs {lowest} or newer. "
            f'Run: pip install "torch>={lowest}"'
        )


def fold_constants(program: torch.export.ExportedProgram) -> Folded:
    """Compute every part of a graph that reads no input, and keep no weight that nothing reads."""
    if any(_is_mutable(node.target) for node in program.graph.nodes):
        program = program.run_decompositions({})  # the same without changes in place; takes as long as the tracing
    graph_module = program.module(check_guards=False)
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is _CHECK:
            graph.erase_node(node)
    emptied = _replace_empty_products(graph_module)
    values = _constant_values(graph_module)
    count = size = 0
    for node in list(graph.nodes):
        value = values.get(node)
        is_boundary = node.op == "call_function" and any(user not in values for user in node.users)
        if not is_boundary or not isinstance(value, torch.Tensor):
            continue
        name = f"folded_{count}"
        graph_module.register_buffer(name, value.detach().clone().contiguous())
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
        count, size = count + 1, size + value.numel() * value.element_size()
    graph.eliminate_dead_code()
    # A new module holds only the weights that the graph names.
    return Folded(fx.GraphModule(graph_module, graph), count, size, emptied)


def _constant_values(graph_module: fx.GraphModule) -> dict[fx.Node, Any]:
    """Return the value of every node that depends on no input."""
    values: dict[fx.Node, Any] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            values[node] = _attribute(graph_module, node)
        elif node.op == "call_function" and _is_pure(node.target) and all(n in values for n in node.all_input_nodes):
            arguments = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*arguments[0], **arguments[1])
    return values


def _is_mutable(target: Any) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _is_pure(target: Any) -> bool:
    if target is operator.getitem:
        return True
    is_op = isinstance(target, OpOverload) and not _is_mutable(target)
    return is_op and torch.Tag.nondeterministic_seeded not in target.tags


def _replace_empty_products(graph_module: fx.GraphModule) -> int:
    """Replace linear layers without inputs by their bias: some runtimes refuse tensors without elements.

    Only where the result is added to a tensor of the same shape, which is so in every block of a tower.
    """
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target is not _LINEAR or len(node.args) < 3:
            continue
        weight, bias = node.args[1], node.args[2]
        if weight.op != "get_attr":  # part of a larger one, so not empty
            continue
        if bias is None or _attribute(graph_module, weight).shape[1] or not all(map(_is_plain_sum, node.users)):
            continue
        node.replace_all_uses_with(bias)
        count += 1
    graph_module.graph.eliminate_dead_code()
    return count


def _is_plain_sum(node: fx.Node) -> bool:
    return node.target is _ADD and not node.kwargs


def _attribute(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    found: Any = graph_module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


def _shapes(example: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in example.items())


def _first_line(err: BaseException) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{(lines or [type(err).__name__])[0].rstrip('.')}."
