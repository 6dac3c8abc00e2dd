"""Checkpoints of several budgets: an honest card, and the way to a loopback Hub and back, one budget at a time."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSemanticSegmentation,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionModel,
    pipeline,
)

from hf_opentrans import (
    AutoModelForOpenVocabularySegmentation,
    DenseCLIPForSegmentation,
    ElasticCLIPForSegmentation,
    ElasticCLIPModel,
    ElasticReport,
    SparseCLIPModel,
    find_protocol,
    prune_elastic,
)
from hf_opentrans.benchmark_evaluation import EvaluationRow
from hf_opentrans.benchmarks import environment
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.evaluation_runs import evaluate_data
from hf_opentrans.hub import build_card, card_numbers, collect_facts, prepare_folder, push_folder, push_to_hub
from hf_opentrans.hub.card_facts import missing_parts
from hf_opentrans.hub.citations import uncited_numbers
from hf_opentrans.loading import load_segmenter
from hf_opentrans.models.pipeline_open_vocabulary import TASK, register_pipeline

BUDGETS = (0.8, 0.6, 0.4)
TEXT = torch.nn.functional.normalize(torch.arange(48.0).reshape(3, 16).sin(), dim=-1)
PIXELS = torch.arange(3.0 * 32 * 32).reshape(1, 3, 32, 32).cos()


@pytest.fixture(scope="module")
def parts(tiny_clip_config, tiny_tokenizer, tiny_image_processor):
    """Return the result of a pruning to three budgets, and its processor."""
    torch.manual_seed(0)
    dense = CLIPModel(tiny_clip_config()).eval()
    dense.config.name_or_path = "tester/base"
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(44)]
    return prune_elastic(dense, images, BUDGETS), CLIPProcessor(tiny_image_processor, tiny_tokenizer)


@pytest.fixture
def folder(parts, tmp_path):
    parts[0].save_pretrained(tmp_path / "tiny-elastic", parts[1])
    return tmp_path / "tiny-elastic"


def logits(model):
    with torch.no_grad():  # of a copy: the alignment of memory-mapped weights changes the rounding
        return copy.deepcopy(model)(PIXELS, text_embeddings=TEXT).logits


def test_every_number_of_the_card_has_a_source(folder):
    card, facts = build_card(folder, base_licence="mit"), collect_facts(folder, base_licence="mit")
    assert uncited_numbers(str(card), facts.citations) == []
    values = json.loads((folder / "elastic_report.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors")
    for index, entry in enumerate(values["budgets"]):  # from the files, in another way than the library does
        sizes = [t.numel() * t.element_size() for name, t in stored.items() if name.startswith(f"elastic.{index}.")]
        line = [f"{entry['budget']:g}", f"{entry['macs'] / 1e6:,.1f} M", f"{entry['macs'] / values['dense_macs']:.1%}"]
        line += [f"{entry['params'] / 1e6:,.2f} M"]
        line += [f"{config['elastic_budgets'][index][name]:.4f}" for name in ("cosine_class", "cosine_patches")]
        line += [f"{4 * entry['params'] / 1e6:,.2f} MB", f"{sum(sizes) / 1e6:,.2f} MB"]
        assert f"| {' | '.join(line)} |" in card.text
    assert "made of" not in card.text
    assert "`tester/base` at several budgets in one file, " in card.text
    assert f"{values['size_ratio']:.2f} times the bytes of the largest alone" in " ".join(card.text.split())
    assert f"| unlabelled images | {values['calibration_images']} |" in card.text
    assert {"0.8", "0.6", "0.4"} <= set(card_numbers(str(card)))
    for snippet in ("budget=0.6)", "model.set_budget(0.6)", "autotune(model, processor, max_latency_ms=50)"):
        assert snippet in card.text
    assert "The budgets are 80%, 60%, 40% of the macs" in card.text
    assert "Only the listed budgets can be set" in card.text
    assert card.data.to_dict()["base_model"] == "tester/base"
    assert "pruned" in card.data.to_dict()["tags"]
    assert [hint for hint in missing_parts(facts) if "times" in hint]


def test_a_card_without_a_report_has_what_the_config_says(folder):
    (folder / "elastic_report.json").unlink()
    card = build_card(folder, base_licence="mit")
    assert "## Budgets" in card.text
    assert "adds to the file" not in card.text
    assert "## How it was pruned" not in card.text
    entry = json.loads((folder / "config.json").read_text())["elastic_budgets"][1]
    assert f"| 0.6 | {entry['macs'] / 1e6:,.1f} M | {entry['params'] / 1e6:,.2f} M |" in card.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v["budgets"][1].update(bytes_added=5),
            r"states 1\..* times the largest budget's bytes, and it has",
        ),
        (lambda v: v["budgets"][2].update(bytes_alone=7), r"states bytes_alone=7 for budget 0\.4, and it has"),
        (lambda v: v["budgets"][1].update(cosine_class=0.99999), "with other figures than config.json"),
        (lambda v: v["budgets"].pop(), r"states the budgets \[0\.8, 0\.6\] with other figures"),
        (lambda v: v.update(resolution=64), r"states macs=\d+ for budget 0\.8, and it has \d+"),
        (lambda v: v.pop("seconds"), "is no report of `prune_elastic`"),
    ],
)
def test_a_report_of_another_checkpoint_is_refused(folder, tmp_path, change, message):
    values = json.loads((folder / "elastic_report.json").read_text())
    change(values)
    (folder / "elastic_report.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        build_card(folder)
    with pytest.raises(ValueError, match=message):
        prepare_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_belong_to_the_report_are_refused(folder):
    stored = load_file(folder / "model.safetensors")
    name = next(name for name in stored if name.startswith("elastic.2.") and name.endswith(".codes"))
    stored[name] = stored[name][:, :-1].contiguous()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"times the largest budget's bytes, and it has .* delete the report"):
        build_card(folder)


def test_scores_of_every_budget_are_its_own(folder, tmp_path):
    for part in ("images", "masks"):
        (tmp_path / "data" / part / "val").mkdir(parents=True)
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(tmp_path / "data" / "images" / "val" / "0.png")
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(tmp_path / "data" / "masks" / "val" / "0.png")
    classes = {"id_to_name": {"0": "cat", "1": "dog"}, "ignore_id": 255}
    (tmp_path / "data" / "classes.json").write_text(json.dumps(classes))
    data, protocol = SegmentationFolder(tmp_path / "data", "val"), find_protocol("native")
    rows = [
        EvaluationRow(name, "ade20k-150", "val", evaluate_data(*load_segmenter(folder, budget=b), data, protocol))
        for name, b in (("whole", None), ("small at budget 0.4", 0.4))
    ]
    values = {"command": "hf-opentrans evaluate", "settings": {}, "rows": [row.to_dict() for row in rows]}
    (tmp_path / "scores.json").write_text(json.dumps({**values, "environment": environment()}))
    facts = collect_facts(folder, evaluations=[tmp_path / "scores.json"])
    assert facts.evaluations is not None
    assert [line[0] for line in facts.evaluations[1]] == ["**this model**, budget 0.8", "**this model**, budget 0.4"]
    assert facts.hub_results == (("scores.json", 0),)  # one result per data set: the largest budget's
    build_card(folder, evaluations=[tmp_path / "scores.json"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_prepared_folder_holds_all_budgets(parts, tmp_path, dtype):
    parts[0].save_pretrained(tmp_path / "made", parts[1], disk_dtype=dtype)
    prepared = prepare_folder(tmp_path / "made", tmp_path / "out", repo_id="someone/elastic")
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "made", prepared.path))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    auto_map = json.loads((prepared.path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_elastic_clip.ElasticCLIPModel"
    assert auto_map["AutoModelForSemanticSegmentation"] == "modeling_elastic_clip.ElasticCLIPForSegmentation"
    assert type(AutoModel.from_pretrained(prepared.path)) is ElasticCLIPModel
    assert type(AutoModel.from_pretrained(prepared.path, budget=0.6)) is SparseCLIPModel
    report = ElasticReport.load(prepared.path)
    assert [entry.budget for entry in report.budgets] == list(BUDGETS)
    again = prepare_folder(prepared.path, tmp_path / "again", repo_id="someone/elastic")  # as it comes from the Hub
    assert {name for name, _ in again.files} == {name for name, _ in prepared.files}


def test_the_pipeline_runs_at_any_budget(folder, tiny_images):
    register_pipeline()
    make: Any = pipeline  # its types know the tasks of transformers alone
    pipe = make(TASK, model=str(folder))
    assert type(pipe.model) is ElasticCLIPForSegmentation
    words = {"candidate_labels": ["cat", "sofa; couch", "wall"]}
    for budget in BUDGETS:
        pipe.model.set_budget(budget)
        alone = make(TASK, model=str(folder), model_kwargs={"budget": budget})
        assert not hasattr(alone.model, "set_budget")
        found, expected = (each(tiny_images[0], **words).result for each in (pipe, alone))
        torch.testing.assert_close(found.scores, expected.scores)
        assert torch.equal(found.segmentation, expected.segmentation)


LOAD = """
import json, sys
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSemanticSegmentation, pipeline

work, name = sys.argv[1:]
inputs = load_file(f"{work}/inputs.safetensors")
found, kinds = {}, {}
remote = {"trust_remote_code": True}
alone = AutoModel.from_pretrained(name, budget=0.6, **remote)
kinds["alone"] = type(alone).__name__
kinds["whole"] = type(AutoModel.from_pretrained(name, **remote)).__name__
import copy
with torch.no_grad():
    for budget in (0.8, 0.6, 0.4):
        model = AutoModelForSemanticSegmentation.from_pretrained(name, budget=budget, **remote)
        found[f"{budget}"] = copy.deepcopy(model)(inputs["pixels"], text_embeddings=inputs["text"]).logits
    kinds["segmenter"] = type(model).__name__
pipe = pipeline("zero-shot-image-segmentation", model=name, **remote)
pipe.model.set_budget(0.4)
found["ids"] = pipe(f"{work}/image.png", candidate_labels=["cat", "wall"]).result.segmentation
try:
    AutoModel.from_pretrained(name, budget=0.5, **remote)
except ValueError as err:
    kinds["refused"] = str(err)
assert not any(module.split(".")[0] == "hf_opentrans" for module in sys.modules)
save_file({key: value.contiguous() for key, value in found.items()}, f"{work}/outputs.safetensors")
open(f"{work}/kinds.json", "w").write(json.dumps(kinds))
"""


def test_a_pushed_checkpoint_comes_back_one_budget_at_a_time(online, folder, tmp_path, tiny_images):
    result = push_folder(folder, "tester/elastic", base_licence="mit")
    files = online.files("tester/elastic")
    assert {"model.safetensors", "modeling_elastic_clip.py", "elastic_report.json", "README.md"} <= set(files)
    assert "## Budgets" in files["README.md"].decode()
    assert result.prepared.hints
    # With the package: one budget reads less than the file, which comes once and whole.
    before = len(online.requests)
    alone = AutoModelForOpenVocabularySegmentation.from_pretrained("tester/elastic", budget=0.6)
    assert type(alone) is DenseCLIPForSegmentation
    fetched = [r.path for r in online.requests[before:] if r.method == "GET" and "/resolve/" in r.path]
    assert sum("model.safetensors" in path for path in fetched) == 1
    assert not [path for path in fetched if path.endswith(".py") or "tokenizer" in path]
    assert torch.equal(logits(alone), logits(load_segmenter(folder, budget=0.6)[0]))
    whole = sum(tensor.numel() * tensor.element_size() for tensor in load_file(folder / "model.safetensors").values())
    read = [ElasticCLIPForSegmentation.bytes_of_budget("tester/elastic", budget) for budget in BUDGETS]
    assert read[2] < read[1] < whole
    assert read == [ElasticCLIPForSegmentation.bytes_of_budget(folder, budget) for budget in BUDGETS]
    # Without the package.
    save_file({"pixels": PIXELS, "text": TEXT}, tmp_path / "inputs.safetensors")
    tiny_images[0].save(tmp_path / "image.png")
    online.run(LOAD, tmp_path, "tester/elastic", with_package=False)
    outputs, kinds = load_file(tmp_path / "outputs.safetensors"), json.loads((tmp_path / "kinds.json").read_text())
    assert [kinds[name] for name in ("alone", "whole", "segmenter")] == [
        *("SparseCLIPModel", "ElasticCLIPModel", "DenseCLIPForSegmentation")
    ]
    assert "This checkpoint holds the budgets 0.8, 0.6, 0.4 and no others" in kinds["refused"]
    segmenter = AutoModelForSemanticSegmentation.from_pretrained("tester/elastic")
    for budget in BUDGETS:
        torch.testing.assert_close(outputs[f"{budget}"], logits(segmenter.set_budget(budget)), atol=1e-4, rtol=0)
    assert outputs["ids"].shape == (40, 48)


def test_results_of_pruning_are_pushed(online, parts):
    pushed = push_to_hub(parts[0], "tester/result", parts[1], base_licence="mit")
    assert "elastic_report.json" in online.files("tester/result")
    assert "at several budgets in one file" in pushed.prepared.card.text
    assert load_segmenter("tester/result")[0].budgets == BUDGETS


def test_a_tower_of_several_budgets_has_a_card(tmp_path, tiny_clip_config):
    dense = CLIPVisionModel(tiny_clip_config().vision_config).eval()
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(44)]
    prune_elastic(dense, images, (0.7, 0.5)).save_pretrained(tmp_path / "tower")
    card = build_card(tmp_path / "tower", base_licence="mit")
    assert "The vision tower of a CLIP" in card.text
    assert "`model.set_budget(0.5)` switches" in card.text
