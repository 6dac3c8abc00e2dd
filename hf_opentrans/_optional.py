"""Check that the packages of an optional extra are installed."""

import importlib

_PURPOSES = {
    "app": "the page to click on",
    "bench": "comparing with other pruners",
    "demo": "drawing the demonstration scenes",
    "onnx": "the ONNX export",
    "openvino": "running and writing OpenVINO models",
    "peft": "LoRA fine-tuning",
    "torchao": "int8 in PyTorch",
    "train": "training",
}


def require(extra: str, *modules: str) -> None:
    """Import the modules of an extra, or say how to install them.

    Args:
        extra: Name of the extra in `pip install "hf_opentrans[EXTRA]"`.
        modules: Import names (not distribution names), tried in order.

    Raises:
        ImportError: If one of them cannot be imported; names the module, the extra and the pip
            line, and keeps the original error as its cause.

    Example:
        >>> require("demo", "json")
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as err:
            purpose = _PURPOSES.get(extra, f"the `{extra}` features")
            raise ImportError(
                f"`{module}` is needed for {purpose} but cannot be imported ({err}). "
                f"It comes with the extra `{extra}`. "
                f'Run: pip install "hf_opentrans[{extra}]"',
                name=module,
            ) from err
