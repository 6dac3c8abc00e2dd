"""Folders and files are written as a whole or not at all."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from hf_opentrans._files import check_output_folder, folder_bytes, is_disk_full, write_folder, write_json

MARKER = "marker.json"


def write(folder, text="new", error: BaseException | None = None):
    with write_folder(folder, marker=MARKER) as target:
        (target / MARKER).write_text("{}")
        (target / "weights").write_text(text)
        if error is not None:
            raise error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_with_parents(tmp_path):
    write(tmp_path / "a" / "b")
    assert names(tmp_path / "a") == ["b"]
    assert names(tmp_path / "a" / "b") == [MARKER, "weights"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert names(tmp_path / "out") == [MARKER, "weights"]


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("out")
    assert names(tmp_path / "out") == [MARKER, "weights"]


def test_an_earlier_output_is_replaced_as_a_whole(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "stale").write_text("x")
    write(tmp_path / "out")
    assert names(tmp_path / "out") == [MARKER, "weights"]
    assert (tmp_path / "out" / "weights").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_the_target_does_not_exist_before_the_end(tmp_path):
    with write_folder(tmp_path / "out", marker=MARKER) as target:
        assert not (tmp_path / "out").exists()
        assert target.parent == tmp_path  # the same disk, so that renaming is one step


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("earlier", [False, True])
def test_nothing_is_half_written(tmp_path, error, earlier):
    if earlier:
        write(tmp_path / "out", "old")
    with pytest.raises(type(error)):
        write(tmp_path / "out", error=error)
    assert names(tmp_path) == (["out"] if earlier else [])
    if earlier:
        assert (tmp_path / "out" / "weights").read_text() == "old"


def test_an_interrupt_between_the_two_renames_restores_the_old_folder(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    rename, calls = Path.rename, []

    def interrupted(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "weights").read_text() == "old"


def test_an_interrupt_while_the_old_folder_is_removed(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    remove, calls = shutil.rmtree, []

    def interrupted(path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "weights").read_text() == "new"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("earlier", [False, True])
def test_a_full_disk_is_said_clearly(tmp_path, error, earlier):
    if earlier:
        write(tmp_path / "out", "old")
    with pytest.raises(OSError, match=r"No space is left for '.*out'. Nothing was written. Free some space") as caught:
        write(tmp_path / "out", error=error)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == (["out"] if earlier else [])
    if earlier:
        assert (tmp_path / "out" / "weights").read_text() == "old"


def test_a_disk_that_is_full_from_the_start(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(OSError, match=r"No space is left for '.*out'. Nothing was written"):
        write(tmp_path / "out")


def test_foreign_files_are_refused(tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError, match=r"already holds a, b, c \.\.\.\. An output folder must be new, empty"):
        write(tmp_path)
    assert names(tmp_path) == ["a", "b", "c", "d"]
    with pytest.raises(FileExistsError, match=r"already holds a, b, c \.\.\."):
        check_output_folder(str(tmp_path), marker=MARKER)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match=r"file' is a file. The output must be a folder. Choose another name"):
        write(tmp_path / "file")


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match=r"file' is a file\. No folder can lie in it"):
        check_output_folder(tmp_path / "file" / "more" / "out", marker=MARKER)

    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("hf_opentrans._files.tempfile.mkdtemp", refuse)
        with pytest.raises(PermissionError, match=r"cannot be written to \(Permission denied\)\. .* another place"):
            check_output_folder(tmp_path / "new" / "out", marker=MARKER)
    check_output_folder(tmp_path / "new" / "out", marker=MARKER)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "weights").read_text() == "new"
    assert names(tmp_path) == ["link", "real"]


def test_the_folder_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").mkdir()
    write(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_json_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": [1, 2]})
    assert json.loads(path.read_text()) == {"a": [1, 2]}
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2]}
    assert names(path.parent) == ["a.json"]
    write_json("/dev/null", {"a": 1})
    assert not Path("/dev/null").is_file()


def test_disk_full_is_recognised():
    assert is_disk_full(OSError(errno.ENOSPC, "x"))
    assert not is_disk_full(OSError(errno.EACCES, "x"))
    assert not is_disk_full(ValueError("x"))


def test_folder_bytes(tmp_path):
    write(tmp_path / "out", "12345")
    assert folder_bytes(tmp_path) == 7
    assert folder_bytes(tmp_path, "weights") == 5
