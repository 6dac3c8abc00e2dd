"""What the page is given to show: masks, colours, the table, errors; and that visitors' words stay words."""

import gc
import html
import os
import socket
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from hf_opentrans.app.interface import SHOWN_CLASSES, _placeholder, build_interface, figures, free_port, overlay
from hf_opentrans.app.preparation import Sources
from hf_opentrans.app.service import SegmentationService
from hf_opentrans.models.segmentation_result import SegmentationResult, class_colour

# Gradio leaves event loops and their sockets behind that nobody closes.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
EVIL = "<img src=x onerror=alert(1)>"


def _gradio():
    if os.environ.get("HF_OPENTRANS_REQUIRE_BROWSER") == "1":
        import gradio

        return gradio
    return pytest.importorskip("gradio", reason='gradio is not installed: pip install "hf_opentrans[app]"')


def _build(service, sources):
    _gradio()
    return build_interface(service, sources)


@pytest.fixture(scope="module", autouse=True)
def _collect():
    """Free what Gradio left behind while its warnings are still expected, not in somebody else's test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def page(service, folders):
    """Return the page, not served."""
    return _build(service, Sources(str(folders[0]), str(folders[1])))


def _run(page):
    """Return what a click on the button calls."""
    return next(function.fn for function in page.fns.values() if function.api_name == "segment")


def test_masks_come_largest_first_in_the_colours_of_plot():
    ids = torch.tensor([[0, 2, 2], [2, 1, -1]])
    result = SegmentationResult(ids, torch.ones(2, 3), ("cat", "dog", "sky"), Image.new("RGB", (3, 2)))
    (picture, sections), colours = overlay(result)
    assert picture.shape == (2, 3, 3)
    names = [name for _, name in sections]
    assert names == ["sky (50%)", "cat (17%)", "dog (17%)"]
    assert np.array_equal(sections[0][0] > 0, ids.numpy() == 2)
    assert colours["sky (50%)"] == "#{:02x}{:02x}{:02x}".format(*class_colour(2))


def test_many_classes_share_the_last_entry():
    count = SHOWN_CLASSES + 6
    ids = torch.arange(count)[None]
    labels = tuple(f"class {i}" for i in range(count))
    (_, sections), _ = overlay(SegmentationResult(ids, torch.ones(1, count), labels, Image.new("RGB", (count, 1))))
    assert len(sections) == SHOWN_CLASSES + 1
    assert sections[-1][1] == "6 more (20%)"
    assert (sections[-1][0] > 0).sum() == 6


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text.append(data)


def test_the_table_escapes_every_text(folders, picture):
    loaded = SegmentationService.load(*folders)
    loaded.names = (EVIL, "dense")
    parser = _Tags()
    answer = loaded.answer(picture, "cat; dog", 0.6)
    parser.feed(figures(answer))
    assert parser.tags == {"table", "thead", "tbody", "tr", "th", "td", "p"}
    assert EVIL in parser.text
    assert f"{answer.pruned.milliseconds:.1f} ms" in parser.text
    assert f"{answer.agreement:.1%} of the pixels" in parser.text


def test_a_click_gives_both_sides_and_the_figures(page, picture):
    reference, pruned, table = _run(page)(str(picture), "cat; dog; wall", 0.4, "whole")
    assert reference.label.startswith("Dense: ")
    assert pruned.label.startswith("Pruned, budget 0.4: ")
    assert "of the pixels" in table


def test_without_a_picture_the_page_says_what_to_do(page):
    assert _run(page)(None, "cat", 0.6, "whole") == (None, None, _placeholder())


@pytest.mark.parametrize(
    ("classes", "budget", "message"),
    [
        ("", 0.6, "There are no classes"),
        (f"{EVIL}; {EVIL}", 0.6, EVIL),
        ("cat", 3.0, "The budget is 3.0. This model has budgets from 0.4 to 0.8"),
    ],
)
def test_errors_reach_the_visitor_escaped(page, picture, classes, budget, message):
    with pytest.raises(_gradio().Error) as caught:
        _run(page)(str(picture), classes, budget, "whole")
    assert html.escape(message) in caught.value.message
    assert "<" not in caught.value.message


def test_a_file_that_vanished_tells_no_path(page, tmp_path):
    with pytest.raises(_gradio().Error) as caught:
        _run(page)(str(tmp_path / "gone.png"), "cat", 0.6, "whole")
    assert "cannot be read" in caught.value.message
    assert str(tmp_path) not in caught.value.message


def test_the_slider_stops_at_budgets_and_hides_without_them(page, folders, picture):
    slider = next(block for block in page.blocks.values() if block.elem_id == "budget")
    assert (slider.minimum, slider.maximum, slider.step, slider.value) == (0.4, 0.8, 0.2, 0.6)
    plain = SegmentationService.load(folders[1], folders[1])
    other = _build(plain, Sources("dense", "dense"))
    assert not next(block for block in other.blocks.values() if block.elem_id == "budget").visible
    assert "of the pixels" in _run(other)(str(picture), "cat; dog", 1.0, "whole")[2]


def test_a_taken_port_is_refused_and_zero_finds_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match=r"The port must be free. Choose another with --port, or 0"):
            free_port("127.0.0.1", taken.getsockname()[1])
    assert free_port("127.0.0.1", 0) > 0
