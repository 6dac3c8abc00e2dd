"""The benchmark of the first use: what is timed, in which order, and how it is told."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_opentrans import benchmark_cold_start as cold_start
from hf_opentrans.benchmark_cold_start import (
    CLIP_VOCABULARY,
    NAMES,
    OURS,
    REFERENCE,
    STAGES,
    STATEMENTS,
    ColdStart,
    Timing,
    cold_start_notes,
    cold_start_table,
    empty_file_cache,
    import_shares,
    measure_cold_start,
    random_tokenizer,
    time_first_use,
    time_statement,
    write_clip,
    write_picture,
)
from hf_opentrans.cli import app

PUBLISHED = Path(__file__).resolve().parents[1] / "model_cards" / "results" / "cold-start.json"


def result(ours=(2.2, 2.6, 2.4), reference=(2.0, 2.0, 3.0), **values):
    torch = Timing("import torch", (1.0, 1.5, 1.0), (0.9, 0.9, 0.9))
    imports = (torch, Timing(REFERENCE, reference, (1.0, 2.0, 1.0)), Timing(OURS, ours, (1.0, 3.0, 1.2)))
    stages = tuple(Timing(name, (0.1 * n, 0.2 * n, 0.3 * n)) for n, name in enumerate(STAGES, 1))
    return ColdStart(imports, stages, (("torch", 0.6), ("transformers", 0.3)), values.pop("cold", False), "a model")


@pytest.fixture
def fake(monkeypatch):
    """Time nothing; return the list of what would be."""
    done = []
    monkeypatch.setattr(cold_start, "time_statement", lambda statement: done.append(statement) or (1.0, 0.8))
    monkeypatch.setattr(cold_start, "time_first_use", lambda folder, picture: done.append("first use") or (0.5,) * 6)
    monkeypatch.setattr(cold_start, "import_shares", lambda statement: (("torch", 0.9), ("numpy", 0.1)))
    return done


def test_ratio_and_total_are_medians_of_rounds():
    found = result()
    assert found.ratio == pytest.approx(1.1)  # of 1.1, 1.3 and 0.8
    assert found.cpu_ratio == pytest.approx(1.2)  # of 1.0, 1.5 and 1.2
    assert found.total == pytest.approx(0.2 * 21)
    assert found.to_dict()["ratio"] == found.ratio


def test_statements_take_turns(fake, tmp_path):
    lines = []
    found = measure_cold_start(tmp_path, tmp_path / "picture.png", 2, say=lines.append)
    assert fake == [*STATEMENTS, "first use"] * 2
    assert [timing.seconds for timing in found.imports] == [(1.0, 1.0)] * 3
    assert [timing.cpu_seconds for timing in found.imports] == [(0.8, 0.8)] * 3
    assert [timing.name for timing in found.stages] == list(STAGES)
    assert [line.split(":")[0] for line in lines] == ["Round 1 of 2", "Round 2 of 2"]
    assert (found.is_cache_emptied, found.model) == (False, tmp_path.as_posix())


def test_the_cache_is_emptied_before_every_process(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(cold_start, "empty_file_cache", lambda folders: fake.append(folders[-1]))
    measure_cold_start(tmp_path, tmp_path / "picture.png", 1, is_cold=True)
    assert fake == [item for timed in (*STATEMENTS, "first use") for item in (tmp_path, timed)]


def test_no_round_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"repeats is 0. It must be at least 1"):
        measure_cold_start(tmp_path, tmp_path, 0)


def test_a_statement_is_timed_without_the_interpreter():
    wall, cpu = time_statement("time.sleep(0.5)")
    assert cpu < 0.4 < 0.5 <= wall
    with pytest.raises(RuntimeError, match=r"ended with code 1: ModuleNotFoundError: No module named 'no_such_thing'"):
        time_statement("import no_such_thing")


def test_shares_name_what_was_imported():
    shares = import_shares("import wave, json.tool")
    assert {"wave", "json"} <= {name for name, _ in shares}
    assert sum(share for _, share in shares) == pytest.approx(1)
    assert [share for _, share in shares] == sorted((share for _, share in shares), reverse=True)


@pytest.mark.slow
def test_a_first_use_has_all_stages(tmp_path, tiny_clip_config):
    write_clip(tmp_path / "model", tiny_clip_config())
    write_picture(tmp_path / "picture.png", (64, 48))
    seconds = time_first_use(tmp_path / "model", tmp_path / "picture.png", ["cat", "dog"])
    assert len(seconds) == len(STAGES)
    assert all(value > 0 for value in seconds)
    assert seconds[1] == max(seconds)  # the model is tiny; only the import takes time


@pytest.mark.parametrize("entries", [514, 538, CLIP_VOCABULARY])
def test_a_random_tokenizer_has_so_many_entries(entries):
    tokenizer = random_tokenizer(entries)
    assert len(tokenizer) == entries
    assert tokenizer.eos_token_id == entries - 1
    words = tokenizer("wall of glass")["input_ids"]
    assert words[0] == entries - 2
    assert str(tokenizer.decode(words[1:-1])).replace(" ", "") == "wallofglass"


@pytest.mark.parametrize("entries", [513, 514 + 256**2 + 1])
def test_an_impossible_tokenizer_is_refused(entries):
    with pytest.raises(ValueError, match=rf"has {entries} entries. It must have 514 to 66050"):
        random_tokenizer(entries)


def test_a_picture_has_its_size(tmp_path):
    write_picture(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (640, 480)


def test_files_are_forgotten_and_kept(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("a", "folder/b"):
        (tmp_path / name).write_text(name)
    assert empty_file_cache([tmp_path]) == 2
    assert (tmp_path / "folder" / "b").read_text() == "folder/b"


def test_without_the_call_it_says_so(tmp_path, monkeypatch):
    monkeypatch.delattr("os.posix_fadvise")
    with pytest.raises(OSError, match=rf"cannot be emptied on {sys.platform}. It takes posix_fadvise"):
        empty_file_cache([tmp_path])


def test_table_and_notes():
    header, cells = cold_start_table(result())
    assert header == ["what", "median", "fastest", "slowest", "against transformers"]
    assert cells[2] == [OURS, "2.40 s", "2.20 s", "2.60 s", "1.20x"]
    assert [line[0] for line in cells] == [*STATEMENTS, *STAGES, "process start to first result"]
    assert cells[-1][1:4] == ["4.20 s", "2.10 s", "6.30 s"]
    notes = " ".join(cold_start_notes(result()))
    assert "takes 1.10 times as long" in notes
    assert "1.20 in processor time), within the 1.3" in notes
    assert "torch 60%, transformers 30%" in notes
    assert f"{len(NAMES)} names" in notes
    assert "File cache: warm" in notes
    assert "beyond the 1.3" in cold_start_notes(result(ours=(4.0, 4.0, 4.0)))[0]
    assert "emptied before every process" in cold_start_notes(result(cold=True))[-1]


def test_the_command_writes_every_figure(fake, tmp_path, tiny_clip_folder):
    target = tmp_path / "cold.json"
    ran = CliRunner().invoke(
        app,
        ["benchmark", "cold-start", "--model", str(tiny_clip_folder), "--repeats", "2", "--json", str(target)],
    )
    assert ran.exit_code == 0, ran.stderr
    assert "process start to first result" in ran.stdout
    values = json.loads(target.read_text())
    assert values["ratio"] == values["cpu_ratio"] == 1
    assert values["total"] == 3
    assert [timing["name"] for timing in values["stages"]] == list(STAGES)
    assert "torch" in values["environment"]["versions"]
    assert values["command"].startswith("hf-opentrans")


def test_the_command_makes_its_own_model(fake, monkeypatch):
    seen = []
    monkeypatch.setattr(cold_start, "write_clip", seen.append)
    ran = CliRunner().invoke(app, ["benchmark", "cold-start", "--repeats", "1"])
    assert ran.exit_code == 0, ran.stderr
    assert len(seen) == 1
    assert not seen[0].exists()
    assert "random weights of the size of CLIP ViT-B/16" in ran.stdout


def test_a_model_that_is_not_here_is_refused(tmp_path):
    ran = CliRunner().invoke(app, ["benchmark", "cold-start", "--model", str(tmp_path)])
    assert ran.exit_code == 2
    assert "There is no model folder" in " ".join(ran.stderr.split())


def test_a_stored_result_comes_back():
    stored = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    result = ColdStart.from_dict(stored)
    again = json.loads(json.dumps(result.to_dict()))
    assert again == {name: stored[name] for name in again}
    assert result.ratio <= cold_start.ALLOWED_RATIO
