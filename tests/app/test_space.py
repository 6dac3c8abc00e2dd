"""The exported folder: what is in it, and that it runs where nobody has this repository."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from PIL import Image

from hf_opentrans.app import space as module
from hf_opentrans.app.preparation import Example, Sources
from hf_opentrans.app.space import export_space, pinned_requirements, read_space


@pytest.fixture
def installed(monkeypatch):
    """Let gradio count as installed: writing the folder needs its version alone."""
    monkeypatch.setattr(module, "require", lambda *names: None)
    monkeypatch.setattr(module, "version", lambda name: "6.0.0" if name == "gradio" else version(name))


@pytest.fixture
def sources(folders, tmp_path):
    path = tmp_path / "pictures" / "a.png"
    path.parent.mkdir()
    Image.new("RGB", (32, 32), "red").save(path)
    return Sources(str(folders[0]), str(folders[1]), (Example(path, "cat; sky"),), "By somebody.")


@pytest.fixture
def exported(installed, sources, tmp_path):
    return export_space(sources, tmp_path / "space")


def test_the_folder_holds_all_that_a_space_needs(exported):
    front, _, text = exported.joinpath("README.md").read_text("utf-8").removeprefix("---\n").partition("\n---\n")
    values = yaml.safe_load(front)
    assert (values["sdk"], values["sdk_version"], values["app_file"]) == ("gradio", "6.0.0", "app.py")
    assert values["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert len(values["short_description"]) <= 60
    assert "Apache-2.0" in text
    assert "models" not in values
    names = {path.name for path in exported.iterdir()}
    folders = {"dense", "examples", "hf_opentrans", "model"}
    assert names == {"README.md", "app.py", "requirements.txt", "space.json", ".gitattributes", *folders}
    package = {path.relative_to(exported).as_posix() for path in (exported / "hf_opentrans").rglob("*")}
    assert "hf_opentrans/LICENSE" in package
    assert not [path for path in package if "__pycache__" in path or "clip-scenes" in path]


def test_requirements_are_pinned_as_installed(installed):
    lines = pinned_requirements()
    assert f"transformers=={version('transformers')}" in lines
    assert f"torch=={version('torch').partition('+')[0]}" in lines
    assert "gradio==6.0.0" in lines
    assert not [line for line in lines if "pytest" in line or line.count("==") != 1]


def test_models_on_the_hub_stay_there(installed, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(module.SegmentationService, "load", lambda *names: None)
    on_hub = Sources("someone/elastic", "someone/dense")
    folder = export_space(on_hub, tmp_path / "space")
    front = folder.joinpath("README.md").read_text("utf-8").split("---")[1]
    assert yaml.safe_load(front)["models"] == ["someone/elastic", "someone/dense"]
    assert not (folder / "model").exists()
    assert read_space(folder) == on_hub


def test_the_folder_runs_without_this_repository(exported, tmp_path):
    code = f"""
import sys
sys.path[:] = [{str(exported)!r}] + [path for path in sys.path if {str(Path(module.__file__).parents[2])!r} != path]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import hf_opentrans
from hf_opentrans.app import SegmentationService, read_space
found = read_space({str(exported)!r})
shown = found.examples[0]
answer = SegmentationService.load(found.model, found.dense).answer(shown.path, shown.classes, 0.4)
print(hf_opentrans.__file__, answer.pruned.budget, shown.classes, found.credit, sep="|")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    file, budget, classes, credit = done.stdout.strip().split("|")
    assert Path(file) == exported / "hf_opentrans" / "__init__.py"
    assert (budget, classes, credit) == ("0.4", "cat; sky", "By somebody.")


def test_an_export_is_replaced_and_foreign_folders_stay(installed, sources, exported, tmp_path):
    (exported / "model" / "old").write_text("")
    export_space(sources, exported)
    assert not (exported / "model" / "old").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"already holds README.md"):
        export_space(sources, foreign)
    assert (foreign / "README.md").read_text() == "mine"


def test_models_that_cannot_run_are_refused_before_anything_is_written(installed, folders, tmp_path):
    with pytest.raises(ValueError, match=r"without budgets"):
        export_space(Sources(str(folders[1]), None), tmp_path / "space")
    assert not (tmp_path / "space").exists()


def test_other_folders_are_no_exports(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no space.json. It must come from `hf-opentrans app"):
        read_space(tmp_path)
    (tmp_path / "space.json").write_text(json.dumps({"model": "a"}))
    with pytest.raises(ValueError, match=r"space.json lacks credit, dense, examples"):
        read_space(tmp_path)
