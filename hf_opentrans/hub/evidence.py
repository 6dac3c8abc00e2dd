"""The documents that a card is written from: the reports in a folder, and results that were measured elsewhere."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from hf_opentrans._fingerprints import model_fingerprint
from hf_opentrans.benchmark_evaluation import EvaluationRow
from hf_opentrans.benchmark_runtime_plan import RuntimeRow
from hf_opentrans.loading import load_segmenter
from hf_opentrans.models.auto_segmentation import SEGMENTERS
from hf_opentrans.models.configuration_clip_resnet import CLIPResNetVisionConfig
from hf_opentrans.models.configuration_elastic_clip import ELASTIC_TYPES
from hf_opentrans.models.configuration_sparse_clip import VISION_MODEL_TYPES
from hf_opentrans.pruning.channels import CHANNEL_REPORT_FILE
from hf_opentrans.pruning.elastic_report import ELASTIC_REPORT_FILE
from hf_opentrans.pruning.report import REPORT_FILE
from hf_opentrans.pruning.subnetwork import JSON_FILE, SUBNETWORK_FOLDER
from hf_opentrans.pruning.transfer import REPORT_FILE as TRANSFER_FILE
from hf_opentrans.pruning.transfer import SPARSE_TOWER

from .elastic_facts import check_elastic, is_elastic
from .licence import Licence, base_folder, check_repo_id, find_licence

CONFIG_FILE, TRAINING_FILE = "config.json", "training_report.json"
SUBNETWORK_FILE = f"{SUBNETWORK_FOLDER}/{JSON_FILE}"
READ = (
    CONFIG_FILE,
    REPORT_FILE,
    CHANNEL_REPORT_FILE,
    ELASTIC_REPORT_FILE,
    SUBNETWORK_FILE,
    TRAINING_FILE,
    TRANSFER_FILE,
)
# Documents that are not files: sizes of files, and what the caller gave.
SIZES, GIVEN, LICENCE = "file sizes", "given", "licence"
SEGMENTER, TOWER, RESNET, HOST = "segmenter", "tower", "resnet", "host"


class CardOptions(TypedDict):
    """What a card says besides what lies in the folder; see `build_card`."""

    evaluations: NotRequired[Sequence[str | Path]]
    latency: NotRequired[str | Path | None]
    base: NotRequired[str | Path | None]
    base_model: NotRequired[str | None]
    base_licence: NotRequired[str | Licence | None]
    datasets: NotRequired[Sequence[str]]


@dataclass(frozen=True)
class Evidence:
    """Documents by name, and what they are.

    Args:
        folder: Of the model.
        kind: "segmenter" (a CLIP with both towers, or a trained segmenter), "tower" (a vision tower alone), "resnet",
            or "host" (another model that carries a pruned tower).
        documents: JSON values by name.
        evaluations: Rows of `evaluate` by document.
        own: Documents and positions of the rows that were measured with these very weights; of a checkpoint of several
            budgets with the position of the budget, otherwise with None.
        latency: Name of the document of `benchmark latency`; None where there is none.
        base: Folder of the base model, where it is known.
        licence: Of the base weights, where it is known.
    """

    folder: Path
    kind: str
    documents: dict[str, Any]
    evaluations: dict[str, list[EvaluationRow]]
    own: Mapping[tuple[str, int], int | None] = field(default_factory=dict)
    latency: str | None = None
    base: Path | None = None
    licence: Licence | None = None

    @property
    def licence_files(self) -> list[Path]:
        """Texts of the licence: in the folder, or in that of the base."""
        own = sorted(self.folder.glob("LICENSE*"))
        return own or (sorted(self.base.glob("LICENSE*")) if self.base is not None else [])

    @classmethod
    def read(cls, folder: str | Path, repo_id: str | None = None, **options: Any) -> "Evidence":
        """Read all documents, and check that the measurements are of this model.

        Args:
            folder: Of the model.
            repo_id: Where it shall be published.
            **options: Of [`CardOptions`].

        Raises:
            FileNotFoundError: If the folder or a file is missing.
            ValueError: If a file is damaged, or its figures are of another model.
        """
        if repo_id is not None:
            check_repo_id(repo_id)
        path = Path(folder)
        kind = model_kind(path)
        documents = {name: _read_json(path / name) for name in READ if (path / name).is_file()}
        if is_elastic(documents):
            check_elastic(path, documents[CONFIG_FILE])
        given = {"folder": path.resolve().name, "repo_id": repo_id, "base_model": options.get("base_model")}
        documents[GIVEN] = given
        recorded, revision, _ = recorded_base(documents)
        base_model = given["base_model"] or recorded
        base = base_folder(options.get("base"), base_model)
        commit = revision if base_model == recorded else None
        licence = find_licence(options.get("base_licence"), base, base_model, commit)
        documents[LICENCE] = licence.to_dict() if licence else {}
        documents[SIZES] = {"weights": weight_bytes(path), "base": weight_bytes(base)}
        evaluations = {}
        for file in options.get("evaluations") or ():
            name = _unique(Path(file).name, documents)
            documents[name], evaluations[name] = _read_evaluation(Path(file))
        budgets = documents[CONFIG_FILE].get("elastic_budgets") if is_elastic(documents) else None
        own = _own_rows(path, kind, evaluations, [entry["budget"] for entry in budgets or []])
        latency = None
        if (file := options.get("latency")) is not None:
            latency = _unique(Path(file).name, documents)
            documents[latency] = _read_latency(Path(file), path)
        return cls(path, kind, documents, evaluations, own, latency, base, licence)


def model_kind(folder: Path) -> str:
    """Return "segmenter", "tower", "resnet" or "host" by a folder's config.json.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or of a model that this package does not publish.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"There is no {CONFIG_FILE} in {str(folder)!r}. A model folder holds one, as `hf-opentrans prune` writes "
            "it. Check the path."
        )
    config = _read_json(folder / CONFIG_FILE)
    model_type = config.get("model_type")
    if model_type in SEGMENTERS:
        return SEGMENTER
    if model_type in (*VISION_MODEL_TYPES, *ELASTIC_TYPES):  # with both towers: above
        return TOWER
    if model_type == CLIPResNetVisionConfig.model_type:
        return RESNET
    if SPARSE_TOWER in config or (folder / TRANSFER_FILE).is_file():
        return HOST
    raise ValueError(
        f"{str(folder)!r} holds a model of type {model_type!r}. Published are CLIP models, their vision "
        "towers, trained segmenters, and hosts that `hf-opentrans transfer` wrote. Give one of these, or push it with "
        "transformers."
    )


def recorded_base(documents: Mapping[str, Any]) -> tuple[str | None, str | None, tuple[str, tuple[str, ...]] | None]:
    """Return name and commit of the dense model, and the document and place that they stand in; None if unknown."""
    config = documents.get(CONFIG_FILE, {})
    places = [(SUBNETWORK_FILE, ())]
    places += [(CONFIG_FILE, place) for place in (("vision_config", "pruning_config"), ("pruning_config",))]
    for file, place in places:
        values: Any = documents.get(file) if file == SUBNETWORK_FILE else config
        for key in place:
            values = (values or {}).get(key)
        if values and values.get("base_model"):
            return values["base_model"], values.get("base_revision"), (file, place)
    return None, None, None


def weight_bytes(folder: Path | None) -> int | None:
    """Return the bytes of the weight files of a folder, without those below it; None where there are none."""
    files = [] if folder is None else folder.glob("*.safetensors")
    return sum(path.stat().st_size for path in files) or None


def short_command(command: str) -> str:
    """Return a command with paths cut to their last part: nobody else has these folders.

    Args:
        command: As it was typed.
    """
    return re.sub(r"(?<![\w./~-])(?:~|\.{1,2})?(?:/[^\s/'\"]+)+/?", lambda match: Path(match.group()).name, command)


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}. A file of results is needed. Check the path.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{str(path)!r} is not valid JSON ({err}). It must be whole. Write it again.") from err
    if not isinstance(values, dict):
        raise ValueError(  # noqa: TRY004 (the file is wrong, not a type)
            f"{str(path)!r} holds no JSON object. A report is one. Write it again."
        )
    return values


def _read_evaluation(path: Path) -> tuple[dict[str, Any], list[EvaluationRow]]:
    values = _read_json(path)
    try:
        rows = [EvaluationRow(**row) for row in values["rows"]]
    except (KeyError, TypeError, ValueError) as err:
        raise ValueError(
            f"{str(path)!r} is no result of `hf-opentrans evaluate` ({err!r}). A card takes the file of its --json. "
            "Give that one."
        ) from err
    return values, rows


def _own_rows(
    folder: Path, kind: str, files: dict[str, list[EvaluationRow]], budgets: Sequence[float]
) -> dict[tuple[str, int], int | None]:
    """Return the rows whose fingerprint is that of the folder's weights, at any of its budgets."""
    if not files:
        return {}
    if kind != SEGMENTER:
        raise ValueError(
            f"There are evaluations, and {str(folder)!r} holds a {kind}. Segmentation is measured with both towers. "
            "Leave them out."
        )
    known: dict[str, int | None] = {model_fingerprint(load_segmenter(folder)[0]): 0 if budgets else None}
    for place, budget in enumerate(budgets):
        known[model_fingerprint(load_segmenter(folder, budget=budget)[0])] = place
    found = {
        (name, index): known[row.result.model_fingerprint]
        for name, rows in files.items()
        for index, row in enumerate(rows)
        if row.result.model_fingerprint in known
    }
    strangers = sorted(set(files) - {name for name, _ in found})
    if strangers:
        models = ", ".join(dict.fromkeys(row.model for row in files[strangers[0]]))
        raise ValueError(
            f"{strangers[0]} holds scores of {models}, with other weights than those in {str(folder)!r}. A "
            "card states what was measured with its own model. Run `hf-opentrans evaluate` on this folder and "
            "give that file."
        )
    return found


def _read_latency(path: Path, folder: Path) -> dict[str, Any]:
    values = _read_json(path)
    try:
        rows = [RuntimeRow(**row) for row in values["rows"]]
        environment = values["environment"]["versions"]
    except (KeyError, TypeError) as err:
        raise ValueError(
            f"{str(path)!r} is no result of `hf-opentrans benchmark latency` ({err!r}). A card takes the file of its "
            "--json. Give that one."
        ) from err
    names = list(dict.fromkeys(row.model for row in rows))
    if not environment or folder.resolve().name not in {Path(name).name for name in names}:
        raise ValueError(
            f"{path.name} holds times of {', '.join(names)}, not of {folder.resolve().name!r}. A card states what was "
            f"measured with its own model. Run `hf-opentrans benchmark latency --models BASE {folder.name}`."
        )
    return values


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    """Return the name of a file, with a number where another document has the name."""
    found, number = name, 2
    while found in taken:
        found, number = f"{name} ({number})", number + 1
    return found
