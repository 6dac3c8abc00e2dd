"""What a repository on the Hub shall hold: a copy of a model's folder that loads without this package, and a card."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from hf_opentrans._files import check_output_folder, write_folder
from hf_opentrans._safety import FLOATS
from hf_opentrans.benchmark_evaluation import EVAL_RESULTS_FOLDER, write_eval_results
from hf_opentrans.loading import load_segmenter
from hf_opentrans.models.configuration_elastic_clip import ElasticCLIPConfig
from hf_opentrans.models.configuration_sparse_clip import SparseCLIPConfig
from hf_opentrans.models.modeling_elastic_clip import ElasticCLIPModel
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPModel
from hf_opentrans.pruning.subnetwork import SUBNETWORK_FOLDER

from .card import validate_card, write_card
from .card_facts import CardFacts, facts_of, hub_data_set, missing_parts
from .evidence import CONFIG_FILE, SEGMENTER, CardOptions, Evidence
from .licence import CARD_FILE
from .picture import PICTURE

# Files that hold pickled objects: loading them runs whatever they say.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
# What Trainer leaves beside a model. It belongs to the run, not to the model.
RUN_FILES = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json")
_RUN_PATTERN = re.compile(r"rng_state.*\.pth")
COPIED = (".json", ".safetensors", ".txt", ".model", ".jinja", ".py", ".yaml")
SUBFOLDERS = (SUBNETWORK_FOLDER, EVAL_RESULTS_FOLDER)
MARKER = ".hf-opentrans"  # of a folder that `prepare_folder` wrote; it is not published
_TOKENIZERS = ("tokenizer.json", "vocab.json", "merges.txt")  # their entries are no paths
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
# What AutoModel makes of a training-free segmenter.
_PLAIN: dict[type, type] = {SparseCLIPConfig: SparseCLIPModel, ElasticCLIPConfig: ElasticCLIPModel}
_NAME_KEYS = ("_name_or_path", "name_or_path")


@dataclass(frozen=True)
class PreparedFolder:
    """A folder that is ready to be published.

    Args:
        path: Of the folder.
        files: Path in the repository and bytes of every file.
        left_out: Files and folders of the source that are not published.
        hints: What the card leaves out and how to get it.
        card: The card.
    """

    path: Path
    files: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...]
    hints: tuple[str, ...]
    card: ModelCard


def prepare_folder(
    folder: str | Path, output: str | Path, *, repo_id: str | None = None, **options: Unpack[CardOptions]
) -> PreparedFolder:
    """Write what shall be published into another folder, or nothing at all; the source stays as it is.

    A model with both towers is written as the segmenter that it is: `AutoModel`, `AutoModelForSemanticSegmentation`
    and the pipeline load it, with this package and without.

    Args:
        folder: Of the model, as pruning, transfer or fine-tuning wrote it.
        output: New, empty, or an earlier output of this function.
        repo_id: Where it shall be published.
        **options: Of the card; see `build_card`.

    Raises:
        FileNotFoundError: If a folder or a file is missing.
        FileExistsError: If the output holds something else.
        ValueError: If there is a pickle, a token or a path of this machine in the folder, the weights are damaged, or
            a figure of the card is of another model.
    """
    source = Path(folder)
    if Path(output).resolve() == source.resolve():
        raise ValueError(f"The output {str(output)!r} is the model's own folder. It must be another. Choose one.")
    check_output_folder(output, marker=MARKER)
    evidence = Evidence.read(source, repo_id, **options)
    check_pickles(source)
    _check_weights(source)
    facts = facts_of(evidence, options)
    with write_folder(output, marker=MARKER) as target:
        left_out = _copy(source, target, is_model=evidence.kind != SEGMENTER)
        if evidence.kind == SEGMENTER:
            _save_segmenter(source, target)
        _name_base(target, facts)
        _write_results(evidence, facts, target)
        _copy_licence(evidence, target)
        card = write_card(evidence, facts, target / CARD_FILE)
        validate_card(card, target)
        check_private(target, source)
        (target / MARKER).write_text("Written by hf-opentrans push. Not part of the model.\n", encoding="utf-8")
    path = Path(output)
    files = tuple((name, (path / name).stat().st_size) for name in sorted(_names(path)) if name != MARKER)
    return PreparedFolder(path, files, tuple(left_out), tuple(missing_parts(facts)), card)


def check_pickles(folder: Path) -> None:
    """Refuse files that run code when they are loaded, but for what Trainer leaves behind, which is never published.

    Raises:
        ValueError: If there are any.
    """
    found = [name for name in sorted(_names(folder)) if Path(name).suffix in PICKLES and not _is_of_run(name)]
    if found:
        raise ValueError(
            f"{str(folder)!r} holds {', '.join(found[:3])}{' ...' * (len(found) > 3)}. Only safetensors are "
            "published: "
            "other weight files run code when they are loaded. Save the model again with save_pretrained, and delete "
            "them."
        )


def check_private(folder: Path, source: Path) -> None:
    """Refuse tokens and paths of this machine in the text files of a folder.

    Raises:
        ValueError: If there are any.
    """
    home = str(Path.home())
    places = [str(source.resolve()) + "/", f'{source.resolve()}"', *([f"{home}/"] if len(home) > 1 else [])]
    for name in sorted(_names(folder)):
        if Path(name).suffix == ".safetensors" or Path(name).name in (*_TOKENIZERS, PICTURE):
            continue
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
        if _TOKEN.search(text):
            raise ValueError(f"{name} holds an access token. A token must never be published. Remove and revoke it.")
        here = next((place for place in places if place in text), None)
        if here is not None:
            raise ValueError(
                f"{name} names a folder of this machine, {here.rstrip(chr(34))!r}. Others do not have it, and it "
                "tells about you. Remove it from the file."
            )


def _copy(source: Path, target: Path, *, is_model: bool) -> list[str]:
    """Copy reports, licences and the subnetwork, of other models all else too; return what is left out."""
    left_out = []
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            if entry.name in SUBFOLDERS:
                shutil.copytree(entry, target / entry.name)
            else:
                left_out.append(f"{entry.name}/")
        elif entry.name == MARKER or (entry.name == CONFIG_FILE and not is_model):
            continue
        elif _is_of_run(entry.name) or not _is_published(entry):
            left_out.append(entry.name)
        elif is_model or not _is_written_again(entry):
            shutil.copyfile(entry, target / entry.name)
    return left_out


def _is_published(entry: Path) -> bool:
    return entry.suffix in COPIED or entry.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))


def _is_of_run(name: str) -> bool:
    last = Path(name).name
    return last in RUN_FILES or _RUN_PATTERN.fullmatch(last) is not None or "checkpoint-" in name


def _is_written_again(entry: Path) -> bool:
    """Tell whether saving model and processor writes a file: weights, code and the configuration of both."""
    stem = entry.name.split(".")[0]
    return entry.suffix in (".safetensors", ".py") or entry.name.endswith(".index.json") or stem.endswith("_config")


def _save_segmenter(source: Path, target: Path) -> None:
    """Write model and processor, in the precision of the source, so that every Auto class finds its own."""
    precision = dict(_tensor_types(source))
    model, processor = load_segmenter(source)
    plain = _PLAIN.get(type(model.config))  # trained heads have configurations of their own
    if plain is not None:
        model.config.auto_map = {"AutoModel": f"{plain.__module__.rpartition('.')[2]}.{plain.__name__}"}
    state = model.state_dict()
    common = next(iter(precision.values()), torch.float32)
    cast("Any", model).save_pretrained(
        target, state_dict={name: value.to(precision.get(name, common)) for name, value in state.items()}
    )
    processor.save_pretrained(target)


def _tensor_types(folder: Path) -> Iterator[tuple[str, torch.dtype]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                if (kind := opened.get_slice(name).get_dtype()) in FLOATS:
                    yield name, FLOATS[kind]


def _check_weights(folder: Path) -> None:
    """Read the heads of all weight files: they state how long the file must be."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"There are no weights in {str(folder)!r}. They must be *.safetensors. Save the model again.")
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                opened.keys()
        except SafetensorError as err:
            raise ValueError(
                f"{path.name} in {str(folder)!r} is damaged or cut short ({err}). A published file must be complete. "
                "Copy or write it again."
            ) from err


def _name_base(target: Path, facts: CardFacts) -> None:
    """Put the name of the base where transformers writes the folder that a model came from."""
    for path in target.glob("*.json"):
        if path.name in _TOKENIZERS:
            continue
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and any(values.get(key) for key in _NAME_KEYS):
            values |= {key: facts.base or facts.name for key in _NAME_KEYS if values.get(key)}
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_results(evidence: Evidence, facts: CardFacts, target: Path) -> None:
    """Write the scores of benchmarks that the Hub has a data set for."""
    rows = [evidence.evaluations[name][index] for name, index in facts.hub_results]
    for row in rows:
        write_eval_results([row], target, {row.benchmark: hub_data_set(row.benchmark)})


def _copy_licence(evidence: Evidence, target: Path) -> None:
    """Put the licence of the base weights beside these, where it is known and none is there yet."""
    for path in evidence.licence_files:
        shutil.copyfile(path, target / path.name)


def _names(folder: Path) -> Iterator[str]:
    yield from (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
