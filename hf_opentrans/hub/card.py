"""The model card: facts into a template, the picture of the widths, and the checks that need no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import ModelCard, ModelCardData

from hf_opentrans._optional import require
from hf_opentrans.benchmark_evaluation import write_text
from hf_opentrans.pruning.report import PruningReport

from .card_facts import CardFacts, facts_of
from .citations import Citation, uncited_numbers
from .evidence import HOST, RESNET, SEGMENTER, TOWER, Evidence, short_command
from .licence import Licence
from .picture import PICTURE, draw_widths

TEMPLATE = Path(__file__).parents[1] / "assets" / "model_card.md.jinja"
REQUIRED = ("library_name", "tags")
_TASKS = {SEGMENTER: "image-segmentation", TOWER: "image-feature-extraction", RESNET: "image-feature-extraction"}
_KINDS = {
    SEGMENTER: "A CLIP that segments images by any names it is given",
    TOWER: "The vision tower of a CLIP",
    RESNET: "The ResNet image encoder of a CLIP",
    HOST: "A model that carries a pruned CLIP vision tower",
}
_TRAINING_FREE = ("CLIPModel", "SparseCLIPModel", "DenseCLIPForSegmentation")
_TRAINING_FREE += ("ElasticCLIPModel", "ElasticCLIPForSegmentation")
# What a template leaves behind where something was not filled in.
_UNFILLED = ("{{", "}}", "{%", "[More Information Needed]", "TODO", "None |", "| None", "Undefined")


def build_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    evaluations: Sequence[str | Path] = (),
    latency: str | Path | None = None,
    base: str | Path | None = None,
    base_model: str | None = None,
    base_licence: str | Licence | None = None,
    datasets: Sequence[str] = (),
) -> ModelCard:
    """Write the model card of a folder from its reports: no figure is computed anew, what is missing is left out.

    Args:
        folder: Of the model, as pruning, transfer or fine-tuning wrote it.
        repo_id: Where it shall be published; the snippets then name it.
        evaluations: JSON files of `hf-opentrans evaluate` on this folder; rows of other models in them are shown for
            comparison.
        latency: JSON file of `hf-opentrans benchmark latency` with this folder among its models.
        base: Folder of the dense model: for its licence and its size on disk. Known for "clip-scenes".
        base_model: Its name on the Hub, where the folder's own record is none.
        base_licence: Licence of the base weights, as the Hub names it. Defaults to what the base's own card says;
            where that is unknown too, the card says so and names none.
        datasets: Ids on the Hub of the data that the weights have seen.

    Raises:
        FileNotFoundError: If a folder or a file is missing.
        ValueError: If a file is damaged, its figures are of another model, or the licence cannot be one.
    """
    options: dict[str, Any] = {"evaluations": evaluations, "latency": latency, "base": base, "datasets": datasets}
    options |= {"base_model": base_model, "base_licence": base_licence}
    evidence = Evidence.read(folder, repo_id, **options)
    facts = facts_of(evidence, cast("Any", options))
    card = fill_card(facts, PICTURE if has_picture(facts) else None)
    validate_card(card, citations=facts.citations, documents=evidence.documents)
    return card


def fill_card(facts: CardFacts, picture: str | None = None, command: str | None = None) -> ModelCard:
    """Put facts into the template.

    Args:
        facts: Of `collect_facts`.
        picture: Name of the picture of the widths beside the card; None where there is none.
        command: What was typed to write it.
    """
    card = ModelCard.from_template(
        card_metadata(facts),
        template_path=str(TEMPLATE),
        facts=facts,
        picture=picture,
        intro=_intro(facts),
        limits=_limits(facts),
        licence=_licence(facts),
        command=None if command is None else short_command(command),
    )
    return cast("ModelCard", card)


def card_metadata(facts: CardFacts) -> ModelCardData:
    """Return the metadata at the head of the card; unknown keys are left out."""
    tags = ["hf_opentrans", "clip", "open-vocabulary-segmentation"]
    tags += ["zero-shot-image-segmentation"] if facts.kind == SEGMENTER else []
    tags += ["pruned"] if facts.pruning is not None or facts.kind == HOST else []
    licence = {} if facts.licence is None else facts.licence.to_dict()
    options: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": _TASKS.get(facts.kind), "tags": tags}
    options |= {"base_model": facts.base_id, "datasets": list(facts.datasets) or None}
    options |= {"metrics": ["mean_iou"] if facts.evaluations is not None else None}
    return ModelCardData(**licence, **{key: value for key, value in options.items() if value is not None})


def validate_card(
    card: ModelCard,
    folder: str | Path | None = None,
    *,
    citations: Sequence[Citation] | None = None,
    documents: Mapping[str, Any] | None = None,
) -> None:
    """Check a card without the network: metadata, placeholders, pictures, and the source of every number.

    Args:
        card: The card.
        folder: That the card lies in, to look for its pictures; None: not looked for.
        citations: Sources of its numbers; None: not checked.
        documents: That these were read from, to read them again.

    Raises:
        ValueError: If something is wrong; lists all of it.
    """
    text = str(card)
    problems = [f"the metadata lack {key}" for key in REQUIRED if not card.data.to_dict().get(key)]
    try:
        yaml.safe_load(card.data.to_yaml())
    except yaml.YAMLError as err:
        problems.append(f"the metadata are no YAML ({err})")
    problems += [f"{mark!r} was not filled in" for mark in _UNFILLED if mark in card.text]
    if folder is not None:
        pictures = [part.split(")")[0] for part in text.split("![")[1:] for part in part.split("](")[1:2]]
        local = [name for name in pictures if "://" not in name]
        problems += [f"the picture {name!r} is not there" for name in local if not (Path(folder) / name).is_file()]
    if citations is not None:
        problems += [f"the number {number} has no source" for number in uncited_numbers(text, citations)]
        read = documents or {}
        problems += [f"{c.text!r} is not what {c.source} says" for c in citations if read and c.render(read) != c.text]
    if problems:
        raise ValueError(
            f"The card is not valid: {'; '.join(dict.fromkeys(problems))}. A card is complete and every number in it "
            "has a source. Correct it."
        )


def write_card(evidence: Evidence, facts: CardFacts, path: str | Path, command: str | None = None) -> ModelCard:
    """Write a card as a file, with the picture of the widths beside it where one can be drawn; checked before.

    Args:
        evidence: The documents.
        facts: What they say.
        path: Of the Markdown file; an older one is replaced.
        command: What was typed to write it; it is named in a comment.

    Raises:
        ValueError: If the card is not valid.
    """
    target = Path(path)
    picture = PICTURE if has_picture(facts) else None
    card = fill_card(facts, picture, command)
    validate_card(card, citations=facts.citations, documents=evidence.documents)
    target.parent.mkdir(parents=True, exist_ok=True)
    if picture is not None:
        draw_widths(PruningReport.load(evidence.folder), target.parent / picture)
    write_text(target, str(card))
    return card


def has_picture(facts: CardFacts) -> bool:
    """Tell whether `draw_widths` can draw a model: its layers are in a report, and matplotlib is installed."""
    if facts.pruning is None or facts.widths is None or facts.widths[0][0] != "layer":
        return False
    try:
        require("demo", "matplotlib")
    except ImportError:
        return False
    return True


def _intro(facts: CardFacts) -> str:
    base = f"`{facts.base}`" if facts.base else "its dense model"
    revision = f" (revision `{facts.base_revision}`)" if facts.base_revision else ""
    if facts.pruning is None:
        return f"{_KINDS[facts.kind]}" + (f", made of {base}{revision}." if facts.base else ".")
    pruning = facts.pruning
    if facts.budgets is not None:
        return (
            f"{_KINDS[facts.kind]}: {base}{revision} at several budgets in one file, {pruning['largest']} down to "
            f"{pruning['smallest']} of the multiply-accumulates of its {pruning['tower']}, pruned in one shot from "
            f"{pruning['images']} unlabelled images. Load one budget alone, or all and switch while it runs."
        )
    trained = " It was trained afterwards." if facts.training is not None else ""
    return (
        f"{_KINDS[facts.kind]}: {base}{revision} with {pruning['macs']} of the multiply-accumulates of its "
        f"{pruning['tower']}, pruned in one shot from {pruning['images']} unlabelled images.{trained}"
    )


def _limits(facts: CardFacts) -> list[str]:
    limits = [f"It knows what {'`' + facts.base + '`' if facts.base else 'its base'} knows, and has its biases."]
    if facts.pruning is not None:
        limits.append("Multiply-accumulates are not time: how much faster it is depends on the machine.")
        if facts.training is None:
            limits.append("It was pruned and refitted, not fine-tuned.")
    if facts.budgets is not None:
        limits.append("Only the listed budgets can be set, nothing between them.")
        limits.append("From the Hub its file comes whole; loading one budget then reads only what it needs.")
    if facts.kind == SEGMENTER and facts.class_name in _TRAINING_FREE:
        limits.append("Segmentation is training-free: as fine as the patches, and as good as the patch tokens.")
    if facts.kind == SEGMENTER and facts.evaluations is None:
        limits.append("Its segmentation was not measured on a benchmark.")
    return [*limits, *facts.notes]


def _licence(facts: CardFacts) -> str:
    code = "" if facts.kind == HOST else " The Python files are part of hf_opentrans, under the Apache licence."
    base = f"`{facts.base}`" if facts.base else "the base model"
    if facts.licence is None:
        return (
            f"The weights derive from those of {base}, whose licence applies to them; it is not recorded here. Look "
            f"it up before you use them.{code}"
        )
    name = facts.licence.name or facts.licence.identifier
    link = f" ([text]({facts.licence.link}))" if facts.licence.link else ""
    text = f" Its text is in `{facts.licence_file}`." if facts.licence_file else ""
    return (
        f"The weights derive from those of {base}, which are under `{name}`{link}: the same licence applies to "
        f"them.{text}{code}"
    )
