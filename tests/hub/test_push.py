"""Publishing: what a repository gets, what is never published, and the way to a loopback Hub and back."""

import copy
import json
import shutil
from types import SimpleNamespace

import httpx2
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalTokenNotFoundError
from PIL import Image
from safetensors.torch import load, load_file, save_file
from transformers import AutoModel, AutoModelForSemanticSegmentation, CLIPModel, CLIPProcessor

from hf_opentrans import (
    DeepLabV3PlusForSegmentation,
    DenseCLIPForSegmentation,
    PruningConfig,
    SparseCLIPModel,
    SparseCLIPVisionModel,
    SparseCLIPVisionModelWithProjection,
    Subnetwork,
    prune_model,
)
from hf_opentrans.benchmark_evaluation import EvaluationRow
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.evaluation_protocols import find_protocol
from hf_opentrans.evaluation_runs import evaluate_data
from hf_opentrans.hub import prepare_folder, push_folder, push_model, push_to_hub
from hf_opentrans.hub import push as pushing
from hf_opentrans.hub.folder import MARKER
from hf_opentrans.loading import load_segmenter

TEXT = torch.nn.functional.normalize(torch.arange(48.0).reshape(3, 16).sin(), dim=-1)
PIXELS = torch.arange(3.0 * 32 * 32).reshape(1, 3, 32, 32).cos()
SECRET = "hf_" + "A1b2" * 9


@pytest.fixture(scope="module")
def parts(tiny_clip_config, tiny_tokenizer, tiny_image_processor):
    """Return the result of a pruning and its processor."""
    torch.manual_seed(0)
    dense = CLIPModel(tiny_clip_config()).eval()
    dense.config.name_or_path = "tester/base"
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(40)]
    return prune_model(dense, images, PruningConfig(keep=0.7)), CLIPProcessor(tiny_image_processor, tiny_tokenizer)


@pytest.fixture
def pruned(parts, tmp_path):
    folder = tmp_path / "tiny-pruned"
    parts[0].save_pretrained(folder, parts[1])
    return folder


@pytest.fixture
def plain(monkeypatch):
    """Leave the picture out: drawing takes longer than all else."""
    monkeypatch.setattr("hf_opentrans.hub.card.has_picture", lambda facts: False)


def logits(model):
    with torch.no_grad():
        return model(PIXELS, text_embeddings=TEXT).logits


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_prepared_folder_loads_as_everything_that_it_is(pruned, tmp_path):
    before = contents(pruned)
    prepared = prepare_folder(pruned, tmp_path / "out", repo_id="someone/small")
    assert contents(pruned) == before
    names = {name for name, _ in prepared.files}
    assert {"README.md", "widths.png", "config.json", "model.safetensors", "pruning_report.json"} <= names
    assert {
        "modeling_sparse_clip.py",
        "modeling_dense_clip.py",
        "tokenizer.json",
        "subnetwork/subnetwork.json",
    } <= names
    assert MARKER not in names
    assert dict(prepared.files)["model.safetensors"] == (prepared.path / "model.safetensors").stat().st_size
    auto_map = json.loads((prepared.path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_sparse_clip.SparseCLIPModel"
    assert auto_map["AutoModelForSemanticSegmentation"] == "modeling_dense_clip.DenseCLIPForSegmentation"
    expected = logits(DenseCLIPForSegmentation.from_pretrained(pruned))
    assert type(AutoModel.from_pretrained(prepared.path)) is SparseCLIPModel
    assert torch.equal(logits(AutoModelForSemanticSegmentation.from_pretrained(prepared.path)), expected)
    assert len(Subnetwork.from_pretrained(prepared.path / "subnetwork").plan) == 3
    with Image.open(prepared.path / "widths.png") as picture:
        assert picture.width > 500
        assert np.asarray(picture.convert("L")).std() > 10  # something is drawn


def test_preparing_twice_gives_the_same_files(pruned, tmp_path):
    prepare_folder(pruned, tmp_path / "out", repo_id="a/b")
    first = contents(tmp_path / "out")
    prepare_folder(pruned, tmp_path / "out", repo_id="a/b")  # an earlier output is replaced
    assert contents(tmp_path / "out") == first
    again = prepare_folder(
        tmp_path / "out", tmp_path / "again", repo_id="a/b"
    )  # what came from the Hub is published again
    assert contents(again.path) == first


@pytest.mark.usefixtures("plain")
def test_the_precision_on_disk_is_kept(parts, tmp_path):
    parts[0].save_pretrained(tmp_path / "half", parts[1], disk_dtype=torch.float16)
    prepared = prepare_folder(tmp_path / "half", tmp_path / "out")
    stored, before = (load_file(folder / "model.safetensors") for folder in (prepared.path, tmp_path / "half"))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.items())


@pytest.mark.usefixtures("plain")
def test_other_kinds_of_models_are_published_as_they_are(parts, tmp_path, tiny_clip_config):
    result, processor = parts
    result.subnetwork.to_model().save_pretrained(tmp_path / "tower")
    tower = prepare_folder(tmp_path / "tower", tmp_path / "a").path
    # Copies, because the alignment of memory-mapped weights changes the rounding.
    loaded = copy.deepcopy(SparseCLIPVisionModelWithProjection.from_pretrained(tower))
    assert torch.equal(loaded(PIXELS).image_embeds, result.subnetwork.to_model()(PIXELS).image_embeds)
    trained = DeepLabV3PlusForSegmentation.from_clip(result.model, decoder_channels=8).eval()
    trained.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    path = prepare_folder(tmp_path / "trained", tmp_path / "b").path
    assert "AutoModel" not in json.loads((path / "config.json").read_text())["auto_map"]
    torch.testing.assert_close(
        logits(AutoModelForSemanticSegmentation.from_pretrained(path)), logits(trained), atol=1e-5, rtol=0
    )


@pytest.mark.usefixtures("plain")
def test_a_stock_clip_is_published_as_the_segmenter_that_it_is(tiny_clip_folder, tmp_path):
    prepared = prepare_folder(tiny_clip_folder, tmp_path / "out")
    values = json.loads((prepared.path / "config.json").read_text())
    assert values["auto_map"]["AutoModel"] == "modeling_sparse_clip.SparseCLIPModel"
    assert "zero-shot-image-segmentation" in values["custom_pipelines"]
    assert type(AutoModel.from_pretrained(prepared.path)) is SparseCLIPModel
    assert "## How it was pruned" not in str(prepared.card)


@pytest.mark.usefixtures("plain")
def test_what_belongs_to_a_run_is_left_out(pruned, tmp_path):
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "notes.md", "photo.jpg"):
        (pruned / name).write_bytes(b"x")
    (pruned / "checkpoint-5").mkdir()
    (pruned / "checkpoint-5" / "optimizer.pt").write_bytes(b"x")
    prepared = prepare_folder(pruned, tmp_path / "out")
    assert set(prepared.left_out) == {
        *("training_args.bin", "optimizer.pt", "rng_state_0.pth", "notes.md", "photo.jpg", "checkpoint-5/"),
    }
    assert not [name for name, _ in prepared.files if name.endswith((".bin", ".pt", ".pth", ".md"))][1:]  # the card


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "subnetwork/x.pkl"])
def test_pickles_are_refused(pruned, tmp_path, name):
    (pruned / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"holds {name}\. Only safetensors .* run code .* delete them"):
        prepare_folder(pruned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("secret", "message"),
    [
        (SECRET, r"names\.json holds an access token\. .* Remove and revoke it"),
        ("{source}/data", r"names\.json names a folder of this machine, .* Remove it from the file"),
        ("{home}/data", r"names\.json names a folder of this machine"),
    ],
)
def test_tokens_and_folders_of_this_machine_are_refused(pruned, tmp_path, secret, message, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    text = secret.format(source=pruned, home="/home/somebody")
    (pruned / "names.json").write_text(json.dumps({"place": text}))
    with pytest.raises(ValueError, match=message) as caught:
        prepare_folder(pruned, tmp_path / "out")
    assert SECRET not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_folder_that_a_model_came_from_is_replaced_by_the_name_of_its_base(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_opentrans.hub.card.has_picture", lambda facts: False)
    values = json.loads((pruned / "tokenizer_config.json").read_text())
    (pruned / "tokenizer_config.json").write_text(json.dumps({**values, "name_or_path": str(pruned)}))
    prepared = prepare_folder(pruned, tmp_path / "out")
    read = {path.name: path.read_text() for path in prepared.path.glob("*.json")}
    assert [name for name, text in read.items() if str(tmp_path) in text] == []


@pytest.mark.usefixtures("plain")
def test_damaged_weights_and_foreign_outputs_are_refused(pruned, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.md").write_text("x")
    with pytest.raises(FileExistsError, match=r"already holds thesis\.md"):
        prepare_folder(pruned, tmp_path / "mine")
    with pytest.raises(ValueError, match=r"is the model's own folder\. It must be another\. Choose one"):
        prepare_folder(pruned, pruned)
    weights = pruned / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"model\.safetensors in .* is damaged or cut short .* Copy or write it again"
    ):
        prepare_folder(pruned, tmp_path / "out")
    weights.unlink()
    with pytest.raises(ValueError, match=r"There are no weights in .* Save the model again"):
        prepare_folder(pruned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("plain")
def test_scores_on_data_sets_of_the_hub_get_a_file_of_their_own(
    pruned, tmp_path, write_segmentation_folder, tiny_images
):
    shape = (40, 48)
    data = write_segmentation_folder(
        {"val": tiny_images[:2]},
        lambda image, index: np.full(shape, index, np.uint8),
        {"id_to_name": {"0": "cat", "1": "dog"}, "ignore_id": 255},
    )
    result = evaluate_data(*load_segmenter(pruned), SegmentationFolder(data, "val"), find_protocol("native"))
    rows = [EvaluationRow("tiny-pruned", name, "val", result).to_dict() for name in ("ade20k-150", "own-data")]
    (tmp_path / "scores.json").write_text(json.dumps({"command": "x", "rows": rows}))
    prepared = prepare_folder(pruned, tmp_path / "out", evaluations=[tmp_path / "scores.json"])
    (name,) = [name for name, _ in prepared.files if name.startswith(".eval_results/")]
    assert "zhoubolei/scene_parse_150" in (prepared.path / name).read_text()
    assert "own-data" in str(prepared.card)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"repo_id": "a/b/c"}, ValueError, r"The repository is 'a/b/c'\. It must be owner/name, .* Correct it"),
        ({"create_pr": True, "revision": "x"}, ValueError, r"revision 'x'\. .* Leave one of them out"),
        ({"token": None}, ValueError, r"There is no access token\. .*hf auth login"),
        ({"offline": True}, ConnectionError, r"HF_HUB_OFFLINE is set\. .*--dry-run"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before_anything_is_read(monkeypatch, tmp_path, arguments, kind, message):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", arguments.pop("offline", False))
    monkeypatch.setattr(pushing, "get_token", lambda: None)
    values = {"repo_id": "someone/small", "token": SECRET, **arguments}
    with pytest.raises(kind, match=message):
        push_folder(tmp_path / "is-not-there", values.pop("repo_id"), **values)
    with pytest.raises(kind, match=message):
        push_model(None, None, **{"repo_id": "someone/small", "token": SECRET, **arguments})  # pyright: ignore[reportArgumentType]


def refusal(status, said):
    request = httpx2.Request("POST", "https://hub.example/api")
    return HfHubHTTPError(said, response=httpx2.Response(status, request=request), server_message=said)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            refusal(401, "Invalid"),
            RuntimeError,
            r"refused the push to 'someone/small' \(status 401: Invalid\)\. .*hf auth",
        ),
        (refusal(403, f"no {SECRET}"), RuntimeError, r"status 403: no \*\*\*\)\. The token may not write there\."),
        (refusal(404, ""), RuntimeError, r"\(status 404\)\. There is no such repository or branch"),
        (refusal(503, ""), RuntimeError, r"\(status 503\)\. The repository has what it had, .*push again"),
        (httpx2.ConnectError("refused"), ConnectionError, r"cannot be reached \(refused\)\. .* push again"),
        (ConnectionResetError(SECRET), ConnectionError, r"cannot be reached \(\*\*\*\)\."),
        (LocalTokenNotFoundError("none"), ValueError, r"does not accept the push to 'someone/small' \(none\)\."),
        (ValueError("LFS: too large"), ValueError, r"\(LFS: too large\)\. .* Correct what it names, and push again"),
        (refusal(422, "Odd"), RuntimeError, r"\(status 422: Odd\)\. Correct what it names\."),
        (RuntimeError("Error while uploading"), RuntimeError, r"broke off \(Error while uploading\)\. .*push again"),
    ],
)
def test_errors_of_the_hub_say_what_to_do_and_hide_the_token(pruned, monkeypatch, error, kind, message):
    def fail(*_, **__):
        raise error

    def nothing(*_, **__):
        raise EntryNotFoundError

    fake = SimpleNamespace(create_repo=fail, hf_hub_download=nothing, endpoint="https://hub.example")
    monkeypatch.setattr(pushing, "HfApi", lambda token: fake)
    monkeypatch.setattr("huggingface_hub.ModelCard.validate", lambda self: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(kind, match=message) as caught:
        push_folder(pruned, "someone/small", token=SECRET)
    assert SECRET not in str(caught.value)


@pytest.mark.usefixtures("plain")
def test_one_commit_publishes_all_and_a_second_push_none(pruned, online, tmp_path):
    result = push_folder(pruned, "tester/small", private=True)
    sent = online.files("tester/small")
    assert set(sent) == {name for name, _ in result.prepared.files}
    assert len(online.commits("tester/small")) == 2  # the first is the Hub's own
    assert (result.commit, result.revision) == (online.commits("tester/small")[0].oid, "main")
    assert result.url == f"{online.url}/tester/small"
    for name, content in sent.items():
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / name).write_bytes(content)
    there = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "there")
    assert torch.equal(logits(there), logits(DenseCLIPForSegmentation.from_pretrained(pruned)))
    puts = len(online.paths("PUT"))
    assert push_folder(pruned, "tester/small").commit == result.commit
    assert len(online.commits("tester/small")) == 2
    assert len(online.paths("PUT")) == puts  # no large file was sent again
    assert online.unknown == []


@pytest.mark.usefixtures("plain")
def test_weights_of_an_earlier_push_are_not_left_behind(pruned, online, api):
    push_folder(pruned, "tester/small")
    api.upload_file(path_or_fileobj=b"old", path_in_repo="model-00001-of-00002.safetensors", repo_id="tester/small")
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="demo.py", repo_id="tester/small")
    shutil.rmtree(pruned / "subnetwork")
    push_folder(pruned, "tester/small")
    names = set(online.files("tester/small"))
    assert "demo.py" in names
    assert not [name for name in names if name.startswith(("model-0", "subnetwork/"))]


@pytest.mark.usefixtures("plain")
def test_a_branch_is_made_and_the_main_one_stays(pruned, online):
    push_folder(pruned, "tester/small")
    (pruned / "names.json").write_text("{}")
    result = push_folder(pruned, "tester/small", revision="trial", commit_message="Another")
    assert result.revision == "trial"
    assert "names.json" in online.files("tester/small", "trial")
    assert "names.json" not in online.files("tester/small")
    assert online.commits("tester/small", "trial")[0].title == "Another"


FAULTS = [
    ("drop", part) for part in ("validate-yaml", "repos/create", "/tree/", "preupload", "lfs/objects", "PUT /lfs/")
]
FAULTS += [(mode, "/commit/") for mode in ("drop", "500", "lost", "truncated")] + [("500", "PUT /lfs/")]


@pytest.mark.usefixtures("plain")
def test_an_upload_that_is_interrupted_leaves_the_old_model_and_goes_on(pruned, online):
    push_folder(pruned, "tester/small")
    for number, (mode, part) in enumerate(FAULTS):
        before = online.files("tester/small")
        state = load_file(pruned / "model.safetensors")
        save_file(
            {**state, "logit_scale": torch.tensor(float(number))}, pruned / "model.safetensors", {"format": "pt"}
        )
        online.fail(mode=mode, contains=part, times=None)
        with pytest.raises((RuntimeError, ConnectionError), match=r"[Pp]ush again"):
            push_folder(pruned, "tester/small")
        now = online.files("tester/small")
        # An answer that is lost on its way back may be the commit's: then all of it is there.
        assert now == before or (
            mode in ("lost", "truncated") and now["model.safetensors"] != before["model.safetensors"]
        )
        online.heal()
    puts, commits = len(online.paths("PUT")), len(online.commits("tester/small"))
    assert puts > len(FAULTS)
    push_folder(pruned, "tester/small")
    assert len(online.commits("tester/small")) == commits + 1
    assert load(online.files("tester/small")["model.safetensors"])["logit_scale"] == len(FAULTS) - 1


@pytest.mark.usefixtures("plain")
def test_large_files_that_arrived_are_not_sent_again(pruned, online):
    online.fail(contains="/commit/", times=None)
    with pytest.raises(ConnectionError, match="not sent again"):
        push_folder(pruned, "tester/small")
    puts = len(online.paths("PUT"))
    assert puts >= 2  # the model and its subnetwork
    online.heal()
    push_folder(pruned, "tester/small")
    assert len(online.paths("PUT")) == puts


@pytest.mark.usefixtures("plain")
def test_results_models_and_folders_are_pushed_by_one_function(parts, pruned, online):
    result, processor = parts
    pushed = push_to_hub(result, "tester/a", processor)
    assert (
        online.files("tester/a")["model.safetensors"]
        == online.files(push_to_hub(pruned, "tester/b").repo_id)["model.safetensors"]
    )
    assert "pruning_report.json" in online.files("tester/a")
    assert "## Size" in str(pushed.prepared.card)
    push_to_hub(SparseCLIPModel.from_pretrained(pruned), "tester/c", processor)
    assert "modeling_dense_clip.py" in online.files("tester/c")
    push_to_hub(SparseCLIPVisionModel.from_pretrained(pruned), "tester/d")
    assert "modeling_sparse_clip.py" in online.files("tester/d")
    with pytest.raises(TypeError, match=r"A processor is given with the folder .* Leave the processor out"):
        push_to_hub(pruned, "tester/b", processor)
    with pytest.raises(TypeError, match=r"The source is a dict\. .* Give one of these"):
        push_to_hub({}, "tester/b")  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("plain")
def test_the_licence_of_the_base_is_read_on_the_hub(pruned, online, api):
    api.create_repo("tester/base")
    unknown = push_folder(pruned, "tester/small").prepared
    assert unknown.card.data.to_dict().get("license") is None
    assert any("--base-licence" in hint for hint in unknown.hints)
    api.upload_file(path_or_fileobj=b"---\nlicense: MIT\n---\n", path_in_repo="README.md", repo_id="tester/base")
    assert push_folder(pruned, "tester/small").prepared.card.data.to_dict().get("license") == "mit"


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_process_without_the_package_loads_what_was_pushed(pruned, online, tmp_path):
    push_folder(pruned, "tester/small")
    Image.new("RGB", (40, 48)).save(tmp_path / "photo.png")
    save_file({"pixels": PIXELS, "text": TEXT}, tmp_path / "inputs.safetensors")
    code = """
        import copy, sys
        from pathlib import Path
        from safetensors.torch import load, load_file, save_file
        from transformers import AutoModel, AutoModelForSemanticSegmentation, pipeline
        folder = Path(sys.argv[1])
        inputs = {name: tensor.clone() for name, tensor in load_file(folder / "inputs.safetensors").items()}
        options = {"trust_remote_code": True}
        assert type(AutoModel.from_pretrained("tester/small", **options)).__name__ == "SparseCLIPModel"
        model = AutoModelForSemanticSegmentation.from_pretrained("tester/small", **options)
        logits = copy.deepcopy(model)(inputs["pixels"], text_embeddings=inputs["text"]).logits
        pipe = pipeline("zero-shot-image-segmentation", model="tester/small", **options)
        assert [part["label"] for part in pipe(str(folder / "photo.png"), candidate_labels=["cat"])] == ["cat"]
        save_file({"logits": logits.detach()}, folder / "outputs.safetensors")
    """
    online.run(code, tmp_path, with_package=False)
    # Copied, because the alignment of memory-mapped weights changes the rounding.
    expected = logits(copy.deepcopy(DenseCLIPForSegmentation.from_pretrained(pruned)))
    assert torch.equal(load_file(tmp_path / "outputs.safetensors")["logits"], expected)
