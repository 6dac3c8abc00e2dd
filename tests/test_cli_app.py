"""The command `app`: what is refused before anything is loaded, and what it starts."""

import importlib
import socket
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_opentrans.app.preparation import Sources
from hf_opentrans.cli._common import app

module = importlib.import_module("hf_opentrans.cli.app")


class _Page:
    def __init__(self):
        self.is_blocking = False

    def block_thread(self):
        self.is_blocking = True


@pytest.fixture
def calls(monkeypatch):
    """Replace everything that needs gradio or a model; return what was called."""
    found: dict[str, Any] = {"page": _Page()}
    monkeypatch.setattr(module, "require", lambda *names: None)
    monkeypatch.setattr(module.SegmentationService, "load", lambda *names: found.setdefault("loaded", names))
    monkeypatch.setattr(module, "build_interface", lambda service, sources: found["page"])
    monkeypatch.setattr(module, "serve", lambda *given, **options: found.setdefault("served", given) and "http://a:1")
    monkeypatch.setattr(module, "export_space", lambda *given: found.setdefault("exported", given)[1])
    monkeypatch.setattr(module, "prepare_embedded", lambda cache, on_stage: Sources("made", "clip-scenes"))
    return found


def run(*arguments):
    result = CliRunner().invoke(app, ["app", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_a_model_is_served_until_it_is_stopped(calls):
    code, text = run("elastic", "--dense", "dense", "--host", "127.0.0.1", "--port", "0")
    assert (code, text) == (0, "Open http://a:1 in a browser. Stop with Ctrl+C.")
    assert calls["loaded"] == ("elastic", "dense")
    assert calls["served"][1:] == (Sources("elastic", "dense"), "127.0.0.1", 0)
    assert calls["page"].is_blocking


def test_without_a_model_the_embedded_one_is_shown(calls):
    assert run("--port", "0")[0] == 0
    assert calls["loaded"] == ("made", "clip-scenes")


def test_a_space_is_written_and_nothing_served(calls, tmp_path):
    code, text = run("elastic", "--export-space", tmp_path / "space")
    assert code == 0
    assert "app.py" in text
    assert calls["exported"] == (Sources("elastic", None), tmp_path / "space")
    assert "served" not in calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dense", "x", "--port", "0"], "--dense is 'x' without MODEL. It is what MODEL is compared with"),
        (["x", "--examples", "nowhere", "--port", "0"], "There is no folder 'nowhere'"),
        (["x", "--port", "70000"], "--port"),
    ],
)
def test_usage_is_checked_before_anything_is_loaded(calls, arguments, message):
    code, text = run(*arguments)
    assert code == 2
    assert message in text.replace("│", "")
    assert "loaded" not in calls


def test_a_foreign_folder_and_a_taken_port_are_refused_first(calls, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    code, text = run("x", "--export-space", tmp_path)
    assert code == 2
    assert "already holds mine.txt" in text
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, text = run("x", "--port", taken.getsockname()[1])
    assert code == 1
    assert "The port must be free" in text
    assert "loaded" not in calls


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    code, text = run("x", "--port", "0")
    assert code == 2
    assert 'pip install "hf_opentrans[app]"' in text
