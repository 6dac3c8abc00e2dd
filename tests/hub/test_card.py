"""The model card: every number has a source, what was not measured is left out, and it is valid."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from hf_opentrans import PruningConfig, SparseCLIPModel, find_protocol, prune_model
from hf_opentrans.benchmark_evaluation import EvaluationRow
from hf_opentrans.benchmark_runtime_plan import RuntimeRow
from hf_opentrans.benchmarks import environment, paired_latency
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.evaluation_protocols import Protocol
from hf_opentrans.evaluation_runs import evaluate_data
from hf_opentrans.hub import Licence, build_card, card_numbers, collect_facts, validate_card
from hf_opentrans.hub.card_facts import missing_parts
from hf_opentrans.hub.citations import Ledger, uncited_numbers
from hf_opentrans.hub.evidence import short_command
from hf_opentrans.loading import load_segmenter

BASE = "someone/tiny-clip-b8"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_clip_config, tiny_tokenizer, tiny_image_processor):
    """Return a folder with a dense and a pruned CLIP, scores of both, and times of both."""
    root = tmp_path_factory.mktemp("card")
    torch.manual_seed(0)
    dense = CLIPModel(tiny_clip_config()).eval()
    processor = CLIPProcessor(tiny_image_processor, tiny_tokenizer)
    dense.save_pretrained(root / "dense")
    processor.save_pretrained(root / "dense")
    dense.config.name_or_path = BASE
    dense.config._commit_hash = "0123abcd" * 5
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(8)]
    with pytest.warns(UserWarning, match="8 calibration images"):  # a note with numbers, for the card
        result = prune_model(dense, images, PruningConfig(keep=0.7, seed=3))
    result.save_pretrained(root / "tiny-pruned", processor)
    for part in ("images", "masks"):
        (root / "data" / part / "val").mkdir(parents=True)
    for index, image in enumerate(images[:2]):
        image.save(root / "data" / "images" / "val" / f"{index}.png")
        mask = rng.integers(0, 2, (40, 48), dtype=np.uint8)
        Image.fromarray(mask).save(root / "data" / "masks" / "val" / f"{index}.png")
    classes = {"id_to_name": {"0": "cat", "1": "dog"}, "ignore_id": 255}
    (root / "data" / "classes.json").write_text(json.dumps(classes))
    data, protocol = (
        SegmentationFolder(root / "data", "val"),
        find_protocol("dense336", resolution=48, window=32, stride=16),
    )
    rows = [
        EvaluationRow(
            str(root / name), "ade20k-150", "val", evaluate_data(*load_segmenter(root / name), data, protocol)
        )
        for name in ("dense", "tiny-pruned")
    ]
    command = f"hf-opentrans evaluate {root}/dense {root}/tiny-pruned --benchmark ade20k-150"
    values = {
        "command": command,
        "settings": {},
        "rows": [row.to_dict() for row in rows],
        "environment": environment(),
    }
    (root / "scores.json").write_text(json.dumps(values))
    towers = {
        str(root / name): SparseCLIPModel.from_pretrained(root / name).vision_model
        for name in ("dense", "tiny-pruned")
    }
    rows = [row for size in (1, 2) for row in paired_latency(towers, batch_size=size, rounds=3)]
    times = [RuntimeRow(**row.to_dict(), runtime="openvino", precision="int8-weights").to_dict() for row in rows]
    values = {"command": "hf-opentrans benchmark latency", "seed": 0, "rows": times, "environment": environment()}
    (root / "times.json").write_text(json.dumps(values))
    return root


@pytest.fixture
def pruned(made, tmp_path):
    """Return a copy of the pruned folder that a test may change."""
    return Path(shutil.copytree(made / "tiny-pruned", tmp_path / "tiny-pruned"))


def options(made: Path) -> dict[str, Any]:
    files = {"evaluations": [made / "scores.json"], "latency": made / "times.json", "base": made / "dense"}
    return {**files, "base_licence": "cc-by-sa-4.0"}


def value_of(citation, made):
    """Read the value of a citation from disk, in another way than the library does."""
    if citation.file == "file sizes":
        folder = {"weights": made / "tiny-pruned", "base": made / "dense"}[citation.place[0]]
        return (folder / "model.safetensors").stat().st_size
    if citation.file in ("given", "licence"):
        return {"folder": "tiny-pruned", "repo_id": None, "license": "cc-by-sa-4.0"}[citation.place[0]]
    path = made / citation.file if (made / citation.file).is_file() else made / "tiny-pruned" / citation.file
    value = json.loads(path.read_text())
    for key in citation.place:
        value = value[key]
    return value


def written(citation, made):
    """Return what a card must say for a citation, in another way than the library does."""
    value = value_of(citation, made)
    if citation.rule == "position":
        return str(citation.place[-1])
    if citation.rule == "length":
        return str(len(value))
    if citation.rule == "protocol":
        return Protocol(**value).describe()
    if citation.rule in ("text", "name"):
        text = value if isinstance(value, str) else json.dumps(value)
        return text.split("/")[-1] if citation.rule == "name" else text
    if citation.over is not None:
        below = type(citation)("", citation.file, citation.over)
        value = value / value_of(below, made)
    return format(value * citation.scale, citation.spec) + citation.unit


def test_every_number_of_the_card_is_found_in_the_report_that_it_came_from(made):
    folder = made / "tiny-pruned"
    card = build_card(folder, **options(made))
    facts = collect_facts(folder, **options(made))
    for citation in facts.citations:
        assert written(citation, made) == citation.text, citation
    numbers = card_numbers(str(card))
    assert len(numbers) > 100
    assert [n for n in numbers if not any(n in card_numbers(c.text) for c in facts.citations)] == []
    assert uncited_numbers(str(card), facts.citations) == []
    report = json.loads((folder / "pruning_report.json").read_text())
    assert {f"{report['macs'] / 1e6:,.1f}", f"{report['dense_macs'] / 1e6:,.1f}"} <= set(numbers)
    assert f"{100 * report['macs'] / report['dense_macs']:.1f}" in numbers
    assert f"{report['realised_error']:.3g}" in numbers
    assert f"| unlabelled images | {report['calibration_images']} |" in card.text
    assert f"| seed | {report['config']['seed']} |" in card.text
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size / 1e6:,.1f} MB | {size / (made / 'dense' / 'model.safetensors').stat().st_size:.1%}" in card.text
    rows = json.loads((made / "scores.json").read_text())["rows"]
    assert f"{100 * rows[1]['result']['scores']['mean_iou']:.2f}" in numbers
    assert f"{json.loads((made / 'times.json').read_text())['rows'][3]['median_ms']:.2f}" in numbers


def test_a_number_that_was_typed_in_is_noticed(made):
    facts = collect_facts(made / "tiny-pruned", **options(made))
    card = build_card(made / "tiny-pruned", **options(made))
    assert "openvino int8-weights" in card.text
    assert uncited_numbers(f"{card}\nIt is 3.7 times as fast.\n", facts.citations) == ["3.7"]
    card.text += "\nIt is 3.7 times as fast.\n"
    with pytest.raises(ValueError, match=r"the number 3\.7 has no source\. .* Correct it\."):
        validate_card(card, citations=facts.citations)


def test_another_report_gives_another_card(made, pruned):
    path = pruned / "pruning_report.json"
    values = json.loads(path.read_text())
    path.write_text(
        json.dumps(values | {"macs": 123_456_700, "realised_error": 0.0987, "notes": ["Seen on day 5|6."]})
    )
    text = build_card(pruned).text
    assert "123.5 M" in text
    assert "0.0987" in text
    assert "- Seen on day 5/6." in text  # a bar would break tables
    assert f"{123_456_700 / values['dense_macs']:.1%}" in text


def test_what_was_not_measured_is_left_out(made, pruned):
    bare = build_card(pruned)
    assert [name for name in ("## Speed", "## Scores", "metrics:", "license:") if name in str(bare)] == []
    assert "| weights on disk, whole model | - | 0." in bare.text  # the dense size is not known
    whole = build_card(pruned, **options(made))
    assert all(name in str(whole) for name in ("## Speed", "## Scores", "metrics:", "license: cc-by-sa-4.0"))
    values = json.loads((pruned / "pruning_report.json").read_text())
    for name in ("realised_error", "predicted_error"):
        values[name] = None
    (pruned / "pruning_report.json").write_text(json.dumps(values))
    assert "## Fidelity" not in build_card(pruned).text
    (pruned / "pruning_report.json").unlink()
    rest = build_card(pruned).text
    assert [name for name in ("## How it was pruned", "## What is left", "widths.png") if name in rest] == []
    assert f"made of `{BASE}`" in rest
    hints = missing_parts(collect_facts(made / "tiny-pruned"))
    assert [word for word in ("--base-licence", "--evaluation", "--latency") if word not in " ".join(hints)] == []
    assert missing_parts(collect_facts(made / "tiny-pruned", **options(made))) == []


def test_the_text_is_the_same_every_time_and_names_nothing_of_this_machine(made):
    texts = {str(build_card(made / "tiny-pruned", **options(made))) for _ in range(2)}
    (text,) = texts
    assert str(made) not in text
    assert not re.search(r"20\d\d-\d\d-\d\d", text)
    assert "hf-opentrans evaluate dense tiny-pruned --benchmark ade20k-150" in text


def test_the_metadata(made):
    card = build_card(made / "tiny-pruned", repo_id="someone/small", datasets=["someone/pictures"], **options(made))
    again = yaml.safe_load(str(card).split("---\n")[1])
    assert again == ModelCard(str(card)).data.to_dict()
    assert again["library_name"] == "transformers"
    assert again["pipeline_tag"] == "image-segmentation"
    assert again["base_model"] == BASE
    assert (again["datasets"], again["metrics"], again["license"]) == (
        ["someone/pictures"],
        ["mean_iou"],
        "cc-by-sa-4.0",
    )
    assert {"zero-shot-image-segmentation", "pruned", "hf_opentrans"} <= set(again["tags"])
    assert 'pipeline("zero-shot-image-segmentation", model="someone/small", trust_remote_code=True)' in card.text
    assert "# small\n" in card.text
    assert "0123abcd" * 5 in card.text  # the base's revision


def test_a_vision_tower_and_a_host_say_how_they_are_loaded(pruned):
    values = json.loads((pruned / "config.json").read_text())
    tower = {**values["vision_config"], "architectures": ["SparseCLIPVisionModel"]}
    (pruned / "config.json").write_text(json.dumps(tower))
    card = build_card(pruned)
    assert 'SparseCLIPVisionModel.from_pretrained("tiny-pruned")' in card.text
    assert card.data.to_dict().get("pipeline_tag") == "image-feature-extraction"
    (pruned / "config.json").write_text(
        json.dumps({"model_type": "owlvit", "sparse_tower": {}, "architectures": ["X"]})
    )
    card = build_card(pruned)
    assert 'load_transferred("tiny-pruned")' in card.text
    assert card.data.to_dict().get("pipeline_tag") is None


def test_a_trained_model_says_what_training_changed(pruned):
    scores = {"mean_iou": 0.412, "pixel_accuracy": 0.5, "loss": 1.0}
    report = {"config": {"steps": 1200}, "before": scores, "after": {**scores, "mean_iou": 0.6171}}
    (pruned / "training_report.json").write_text(json.dumps(report))
    text = build_card(pruned).text
    assert "| mIoU | 41.2% | 61.7% |" in text
    assert "after 1,200 steps" in text
    assert "not fine-tuned" not in text


def test_the_licence_is_carried_over_and_never_invented(made, pruned, tmp_path):
    assert "whose licence applies to them; it is not recorded here" in build_card(pruned).text
    base = Path(shutil.copytree(made / "dense", tmp_path / "dense"))
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: toy\nlicense_link: https://example.org/1\n---\n"
    )
    card = build_card(pruned, base=base)
    assert (card.data.to_dict().get("license"), card.data.to_dict().get("license_name")) == ("other", "toy")
    assert "under `toy` ([text](https://example.org/1))" in card.text
    (base / "README.md").write_text("No metadata.\n")
    assert build_card(pruned, base=base).data.to_dict().get("license") is None
    assert (
        build_card(pruned, base="clip-scenes").data.to_dict().get("license") == "cc-by-sa-4.0"
    )  # as the shipped model's card says
    assert "Its text is in `LICENSE`." in build_card(pruned, base="clip-scenes").text
    with pytest.raises(ValueError, match=r"The licence is 'CC BY'\. .* Give one of its list"):
        build_card(pruned, base_licence="CC BY")
    assert Licence.from_metadata({"license": ["mit", "gpl"]}) is None


def test_figures_of_other_weights_are_refused(made, pruned):
    values = json.loads((made / "scores.json").read_text())
    other = pruned.parent / "scores.json"
    other.write_text(json.dumps(values | {"rows": values["rows"][:1]}))
    with pytest.raises(ValueError, match=r"scores\.json holds scores of .*dense.*, with other weights .* evaluate"):
        build_card(pruned, evaluations=[other])
    renamed = pruned.rename(pruned.with_name("other"))
    with pytest.raises(ValueError, match=r"times\.json holds times of .*, not of 'other'\. .* benchmark latency"):
        build_card(renamed, latency=made / "times.json")


@pytest.mark.parametrize(
    ("content", "option", "message"),
    [
        ("{", "evaluations", r"is not valid JSON .* Write it again"),
        ("[1]", "latency", r"holds no JSON object\. .* Write it again"),
        ('{"rows": [{"model": "x"}]}', "evaluations", r"is no result of `hf-opentrans evaluate` .* Give that one"),
        ('{"rows": [1], "environment": {}}', "latency", r"no result of `hf-opentrans benchmark latency`"),
    ],
)
def test_a_damaged_file_of_results_is_refused(made, tmp_path, content, option, message):
    file = tmp_path / "bad.json"
    file.write_text(content)
    given: dict[str, Any] = {option: [file] if option == "evaluations" else file}
    with pytest.raises(ValueError, match=message):
        build_card(made / "tiny-pruned", **given)


def test_folders_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no config\.json in .* Check the path"):
        build_card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"holds a model of type 'bert'\. .* push it with transformers"):
        build_card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip", "architectures": ["CLIPModel"]}')
    with pytest.raises(FileNotFoundError, match=r"There is no model folder .*no-base"):
        build_card(tmp_path, base=tmp_path / "no-base")


def test_validation_lists_all_that_is_wrong(tmp_path):
    card = ModelCard("---\ntags: [a]\n---\n# x\n\n![w](widths.png)\n\n{{ facts.name }} is 5 px.\n")
    with pytest.raises(ValueError, match=r"the metadata lack library_name; .*\{\{.* not filled in.*'widths\.png'"):
        validate_card(card, tmp_path)
    (tmp_path / "widths.png").touch()
    good = ModelCard("---\nlibrary_name: transformers\ntags: [a]\n---\n![w](widths.png) ![o](https://x.org/1.png)\n")
    validate_card(good, tmp_path, citations=())


def test_what_is_text_of_a_card():
    text = "---\na: 1\n---\n# B/16\n\n5 of `6`\n\n```bash\nrun 7\n```\n<!-- 8 --> [x9](y10) "
    text += "https://a.org/11 1.5e-03, 1,122 M.\n"
    assert card_numbers(text) == ["16", "5", "6", "9", "1.5e-03", "1,122"]


@given(st.floats(1e-9, 1e9), st.sampled_from([".3g", ",.1f", ".2f", ",.0f"]), st.sampled_from(["", " M", "%", " px"]))
def test_what_the_ledger_writes_is_covered_and_its_neighbours_are_not(value, spec, unit):
    ledger = Ledger({"report.json": {"a": [value, None]}})
    text = ledger.number("report.json", "a", 0, spec=spec, unit=unit)
    assert ledger.number("report.json", "a", 1) == ledger.number("none.json", "a") == "-"
    assert len(ledger.citations) == 1
    assert uncited_numbers(f"It is {text} here.", ledger.citations) == []
    (number,) = card_numbers(f"x {text} y")
    assert float(number.replace(",", "")) == float(format(value, spec).replace(",", ""))
    for typed in (
        f"1{number}",
        f"{number}1",
        f"{number}.5" if "." not in number and "e" not in number else f"7{number}",
    ):
        assert uncited_numbers(f"It is {typed} here.", ledger.citations) != []


@pytest.mark.parametrize(
    ("typed", "short"),
    [
        ("evaluate /home/me/pruned --json=/tmp/a/b.json", "evaluate pruned --json=b.json"),
        ("evaluate ../shared/models/x ~/y clip-scenes", "evaluate x y clip-scenes"),
        ("evaluate owner/name --json results/a.json", "evaluate owner/name --json results/a.json"),
    ],
)
def test_commands_lose_the_folders_of_this_machine(typed, short):
    assert short_command(typed) == short
