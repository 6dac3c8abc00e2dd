"""The page: inputs on top, both results side by side, the figures below. The only module that knows Gradio."""

import socket
from html import escape
from typing import Any, cast

import numpy as np

from hf_opentrans._optional import require
from hf_opentrans.models.segmentation_result import SegmentationResult, class_colour

from .preparation import Example, Sources, first_classes
from .service import Answer, SegmentationService, Side
from .uploads import MOST_BYTES, MOST_CHARACTERS, MOST_NAMES, MOST_PIXELS

TITLE = "Open-vocabulary segmentation with a pruned CLIP"
_SUBTITLE = "Name anything and see where it is, by two models at once: what pruning costs, and what it saves."
SHOWN_CLASSES = 24  # the largest; the others share one entry of the legend
_OPACITY = 0.6
_WAITING = 32  # visitors in the queue, at most
_CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important}
#figures table {width: 100%; margin: 0; border: none !important; border-collapse: collapse}
#figures td {font-variant-numeric: tabular-nums}
#figures tr, #figures th, #figures td {border: none; background: none}
#figures th, #figures td {padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--border-color-primary)}
#figures th:first-child, #figures td:first-child {text-align: left}
#figures p {margin: 8px 10px 0; color: var(--body-text-color); font-size: 0.9em}
#figures {overflow-x: auto}
"""
_MODES = {"whole": "whole image", "slide": "sliding windows (finer, slower)"}


def build_interface(service: SegmentationService, sources: Sources) -> Any:
    """Return the page as Gradio Blocks, not started.

    Args:
        service: What answers.
        sources: What it was loaded from, and the examples.

    Raises:
        ImportError: If the extra `app` is not installed.
    """
    require("app", "gradio")
    import gradio as gr

    examples = sources.examples
    left, right = service.names[1].capitalize(), service.names[0].capitalize()
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"# {TITLE}\n{_SUBTITLE}")
        with gr.Row():
            with gr.Column():
                upload = _upload(examples)
            with gr.Column():
                classes = gr.Textbox(
                    first_classes(examples),
                    lines=3,
                    max_lines=6,
                    max_length=MOST_CHARACTERS,
                    label="Classes",
                    info="; between classes, commas between names of one class: cat; sofa, couch; wall",
                    elem_id="classes",
                )
                budget = _slider(service)
                mode = gr.Radio(
                    [(_MODES[each], each) for each in service.inferences],
                    value="whole",
                    label="Mode",
                    visible=len(service.inferences) > 1,
                    elem_id="mode",
                )
                button = gr.Button("Segment", variant="primary", elem_id="run")
        inputs = [upload, classes, budget, mode]
        if examples:
            gallery = _gallery(examples, sources.credit)
            gallery.click(_choice(examples), gallery, [upload, classes], api_visibility="private")
        with gr.Row():
            outputs: list[Any] = [
                gr.AnnotatedImage(label=name, elem_id=side, format="png", height=420, min_width=320)
                for name, side in ((left, "reference"), (right, "pruned"))
            ]
        outputs.append(gr.HTML(_placeholder(), elem_id="figures"))
        gr.Markdown(_limits(), elem_id="limits")
        # One event for all: of several, an answer to what was asked earlier could come last and stay.
        asked = [button.click, classes.submit, budget.change, mode.change, upload.change]
        asked += [blocks.load] if examples else []
        gr.on(
            asked,
            _runner(service),
            inputs,
            outputs,
            api_name="segment",
            trigger_mode="always_last",
            concurrency_limit=1,
        )
    return blocks


def serve(
    blocks: Any,
    sources: Sources,
    host: str | None = "127.0.0.1",
    port: int | None = 7860,
    *,
    is_blocking: bool = True,
) -> str:
    """Start the server.

    Args:
        blocks: The page.
        sources: The same as for `build_interface`; its examples become readable for visitors.
        host: Address to listen at; None for what the environment says (as in a Space).
        port: 0 for any free one; None for what the environment says.
        is_blocking: Whether to return only when the server was stopped.

    Returns:
        Its address.

    Raises:
        OSError: If the port is taken.
    """
    import gradio as gr

    blocks.queue(max_size=_WAITING)
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=None if port is None else free_port(host or "127.0.0.1", port),
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MOST_BYTES,
        allowed_paths=sorted({str(example.path.resolve()) for example in sources.examples}),
        theme=cast("Any", gr).themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=_CSS,
        footer_links=[],
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        inbrowser=False,
    )
    if is_blocking:
        blocks.block_thread()
    return address


def free_port(host: str, port: int) -> int:
    """Return `port` if it can be listened at, or some free one for 0.

    Raises:
        OSError: If it is taken.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as err:
            raise OSError(
                f"The server cannot listen at {host}, port {port} ({err.strerror}). The port must be free. Choose "
                "another with --port, or 0 for any."
            ) from err
        return int(probe.getsockname()[1])


def overlay(result: SegmentationResult) -> tuple[tuple[np.ndarray, list[tuple[np.ndarray, str]]], dict[str, str]]:
    """Return what Gradio's AnnotatedImage shows: picture and masks with names, largest first; and colours by name.

    Args:
        result: With its image.
    """
    ids = result.segmentation.cpu().numpy()
    areas = np.bincount(ids[ids >= 0], minlength=len(result.labels))
    order = [int(index) for index in np.argsort(-areas, kind="stable") if areas[index]]
    sections, colours = [], {}
    for index in order[:SHOWN_CLASSES]:
        name = _entry(result.labels[index], areas[index] / ids.size)
        sections.append(((ids == index) * _OPACITY, name))
        colours[name] = "#{:02x}{:02x}{:02x}".format(*class_colour(index))
    others = order[SHOWN_CLASSES:]
    if others:
        name = f"{len(others)} more ({areas[others].sum() / ids.size:.0%})"
        sections.append((np.isin(ids, others) * _OPACITY, name))
        colours[name] = "#999999"
    return (np.asarray(result.image), sections), colours


def figures(answer: Answer) -> str:
    """Return the table of figures as HTML; every text in it is escaped."""
    left, right = answer.reference, answer.pruned
    per = "one window" if answer.inference == "slide" else "this picture"
    rows = [
        ("Budget", *("-" if side.budget is None else f"{side.budget:g}" for side in (left, right)), ""),
        (
            "Forward pass",
            f"{left.milliseconds:.1f} ms",
            f"{right.milliseconds:.1f} ms",
            _faster(answer.speed_up),
        ),
        (f"Multiply-accumulates, {per}", _giga(left.macs), _giga(right.macs), f"{right.macs / left.macs:.1%}"),
        ("Weights in use", _mega(left), _mega(right), f"{right.weight_bytes / left.weight_bytes:.1%}"),
        ("Same class as on the left", "", f"{answer.agreement:.1%} of the pixels", ""),
    ]
    head = ("", left.name, right.name, f"{right.name} / {left.name}")
    lines = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    note = (
        f"Time: this request on this machine ({answer.machine}); median of {answer.rounds} passes of each model in "
        "turn, picture and names already prepared, nobody else's request running. Multiply-accumulates and weights "
        "(float32 in memory): the image encoder, exact."
    )
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table><p>{escape(note)}</p>"


def _upload(examples: tuple[Example, ...]) -> Any:
    import gradio as gr

    first = str(examples[0].path.resolve()) if examples else None
    upload = gr.Image(
        first, label="Picture", type="filepath", sources=["upload", "clipboard"], height=330, elem_id="upload"
    )
    # Gradio would decode whatever comes, of any size, and answer with Pillow's own words.
    upload.preprocess = lambda payload: None if payload is None else payload.path
    return upload


def _gallery(examples: tuple[Example, ...], credit: str) -> Any:
    import gradio as gr

    return gr.Dataset(
        components=[gr.Image(type="filepath", visible=False)],
        samples=[[str(each.path.resolve())] for each in examples],
        label=f"Examples. {credit}".strip(),
        type="index",
        layout="gallery",
        elem_id="examples",
    )


def _choice(examples: tuple[Example, ...]) -> Any:
    """Return what a click on an example calls: picture and classes, which stay where the example has none."""
    import gradio as gr

    def choose(index: int) -> tuple[str, Any]:
        chosen = examples[index]
        return str(chosen.path.resolve()), chosen.classes or gr.skip()

    return choose


def _slider(service: SegmentationService) -> Any:
    import gradio as gr

    budgets: list[float] = list(service.budgets) or [1.0]
    thousandths = [round(1000 * each) for each in budgets]
    step = np.gcd.reduce([thousandths[0] - each for each in thousandths]) / 1000
    return gr.Slider(
        budgets[-1] if len(budgets) > 1 else 0.0,  # Gradio refuses a range of one value, also of what is hidden
        budgets[0],
        value=budgets[len(budgets) // 2],
        step=step or 0.1,
        label="Budget",
        info="Share of the dense model that runs on the right",
        visible=len(service.budgets) > 1,
        elem_id="budget",
    )


def _runner(service: SegmentationService) -> Any:
    """Return what events call: the answer as values of the outputs, or an error that the visitor reads."""
    import gradio as gr

    def run(picture: str | None, classes: str, budget: float, mode: str) -> tuple[Any, ...]:
        if picture is None:  # not yet there, or taken away
            return None, None, _placeholder()
        try:
            answer = service.answer(picture, classes, budget if service.budgets else None, mode)
        except (ValueError, TypeError, OSError) as err:
            raise gr.Error(escape(_told(err)), duration=None, print_exception=False) from err
        shown = []
        for side in (answer.reference, answer.pruned):
            value, colours = cast("Any", overlay(side.result))
            shown.append(gr.AnnotatedImage(value, color_map=colours, label=_title(side)))
        return (*shown, figures(answer))

    return run


def _told(err: Exception) -> str:
    """Return an error's message; those of the system would tell a visitor paths of this machine."""
    if isinstance(err, OSError):
        return "The picture cannot be read. It may have been removed meanwhile. Upload it again."
    return str(err)


def _title(side: Side) -> str:
    budget = "" if side.budget is None or side.name.endswith(f"{side.budget:g}") else f", budget {side.budget:g}"
    return f"{side.name.capitalize()}{budget}: {side.milliseconds:.1f} ms"


def _entry(label: str, share: float) -> str:
    text = " ".join(label.split())
    return f"{text if len(text) <= 40 else text[:39] + chr(0x2026)} ({share:.0%})"


def _faster(factor: float) -> str:
    return f"{factor:.2f}x faster" if factor >= 1 else f"{1 / factor:.2f}x slower"


def _giga(macs: int) -> str:
    return f"{macs / 1e9:.3g} G"


def _mega(side: Side) -> str:
    return f"{side.weight_bytes / 1e6:.1f} MB"


def _placeholder() -> str:
    return "<p>Upload a picture, or choose an example. The figures of both models appear here.</p>"


def _limits() -> str:
    return (
        f"<sub>Pictures up to {MOST_BYTES // 2**20} MiB and {MOST_PIXELS // 10**6} million pixels; up to {MOST_NAMES} "
        "names. Pictures are scaled to at most 1024 pixels, are kept for an hour at most, and go nowhere else.</sub>"
    )
