"""Export of segmenters and vision towers to ONNX, OpenVINO and torch.export, checked against the model every time."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_opentrans._files import check_output_folder, write_folder, write_json
from hf_opentrans._fingerprints import model_fingerprint
from hf_opentrans._optional import require
from hf_opentrans.deploy.mask_query_graph import (
    MaskQueriesGraph,
    dynamic_sizes,
    ensemble_of,
    parity_inputs,
)
from hf_opentrans.deploy.onnx_runtime import write_onnx
from hf_opentrans.deploy.openvino_runtime import convert_openvino, import_openvino, write_openvino
from hf_opentrans.deploy.parity import (
    PICTURES,
    Limits,
    Parity,
    check_parity,
    compare,
    limits_of,
    measure_parity,
    parity_images,
)
from hf_opentrans.deploy.quantization import compress_openvino_weights, quantize_onnx_dynamic, quantize_onnx_static
from hf_opentrans.deploy.record import (
    EXPORT_FILE,
    MODEL_STEM,
    SUFFIXES,
    TEXT_STEM,
    ExportRecord,
    list_files,
)
from hf_opentrans.deploy.sessions import PRECISIONS, Session, open_session
from hf_opentrans.deploy.tracing import Traced, require_torch, trace
from hf_opentrans.deploy.vocabularies import check_encoder, vocabulary_to_dict
from hf_opentrans.deploy.wrappers import PIXELS, TEXT, Exportable, SegmenterGraph, TextGraph, TowerGraph
from hf_opentrans.loading import TOWER_TYPES, load_clip, load_segmenter, resolve_model
from hf_opentrans.models.configuration_sparse_clip import SEGMENTATION_MODES
from hf_opentrans.models.image_loading import center_crop
from hf_opentrans.models.modeling_dense_clip import DenseCLIPForSegmentation
from hf_opentrans.models.modeling_mask_query_base import MaskQueriesModel
from hf_opentrans.models.modeling_open_vocabulary import OpenVocabularyModel
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPVisionModel, SparseCLIPVisionModelWithProjection
from hf_opentrans.models.vocabulary import Vocabulary
from hf_opentrans.pruning.calibration import list_images

# Names whose embeddings the parity check uses where the vocabulary is not fixed.
PARITY_NAMES = ("cat", "dog", "person", "car", "tree", "sky", "grass", "building", "chair", "water")
MOST_CALIBRATION_IMAGES = 128
_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "nncf"),
    "torch-export": (),
}


@dataclass(frozen=True)
class ExportConfig:
    """How to export.

    Args:
        format: "onnx", "openvino" or "torch-export".
        precision: Of the format, see `PRECISIONS`; the text tower stays in fp32, it runs once per vocabulary.
        resolution: Side of the images in pixels, or `(height, width)`; multiples of the patch size. Defaults to the
            processor's resolution.
        mode: How the last block of a training-free segmenter is read. Defaults to the model's own.

    Raises:
        ValueError: If a choice is unknown, or the format has no such precision.
    """

    format: str = "onnx"
    precision: str = "fp32"
    resolution: int | tuple[int, int] | None = None
    mode: str | None = None

    def __post_init__(self) -> None:
        if self.format not in PRECISIONS:
            raise ValueError(f"format is {self.format!r}. It must be one of {', '.join(PRECISIONS)}.")
        if self.precision not in PRECISIONS[self.format]:
            raise ValueError(
                f"precision is {self.precision!r}. {self.format} has {', '.join(PRECISIONS[self.format])}. Choose one "
                "of them, or another format."
            )
        if self.mode is not None and self.mode not in SEGMENTATION_MODES:
            raise ValueError(f"mode is {self.mode!r}. It must be one of {', '.join(SEGMENTATION_MODES)}.")

    def image_size(self, default: int, patch: int) -> tuple[int, int]:
        """Return `(height, width)` in pixels.

        Raises:
            ValueError: If it is no multiple of the patch size.
        """
        wanted = self.resolution
        if wanted is None:
            wanted = max(1, round(default / patch)) * patch
        height, width = wanted if isinstance(wanted, tuple) else (wanted, wanted)
        if height < patch or width < patch or height % patch or width % patch:
            near = "x".join(str(max(1, round(side / patch)) * patch) for side in (height, width))
            raise ValueError(
                f"The resolution is {height}x{width}. Both sides must be multiples of the patch size {patch}. Use "
                f"{near}, for example."
            )
        return height, width


def load_exportable(name: str | Path, *, budget: float | None = None) -> tuple[PreTrainedModel, Any]:
    """Load what can be exported with its processor: a vision tower of its own, or any segmenter.

    Args:
        name: A folder, a Hub id, or "clip-scenes".
        budget: Of a checkpoint of several budgets the one to load, as a plain pruned model. Defaults to all of them,
            with the largest set; `extract` makes a plain model of that.

    Raises:
        FileNotFoundError: If there is no such folder or model.
        ValueError: If it is of another type, it has no such budget, or its files are damaged.
    """
    path = resolve_model(name)
    try:
        values, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError):
        values = {}  # what is wrong is said below
    if values.get("model_type") in TOWER_TYPES:
        loaded = load_clip(path, budget=budget)
        return loaded.model, loaded.image_processor
    return load_segmenter(path, budget=budget)


def check_exportable(
    model: Any, processor: Any, config: ExportConfig, vocabulary: Vocabulary | None = None
) -> tuple[int, int]:
    """Refuse what cannot be exported before any work, and return `(height, width)` of the images in pixels.

    Args:
        model: See `export_model`, as all others.
        processor: Gives the size where `config` names none.
        config: How to export.
        vocabulary: Names to build in.

    Raises:
        TypeError: If the model is none that can be exported.
        ValueError: If its state, the resolution, the mode or the vocabulary does not fit.
    """
    known = (OpenVocabularyModel, SparseCLIPVisionModel, SparseCLIPVisionModelWithProjection)
    if not isinstance(model, known):
        raise TypeError(
            f"Got a {type(model).__name__}. Segmenters of this package and CLIP vision towers can be exported. "
            "Load it with load_exportable."
        )
    if model.training or model.dtype != torch.float32 or model.device.type != "cpu":
        state = f"{'training' if model.training else 'evaluation'} mode, {model.dtype}, on {model.device}"
        raise ValueError(
            f"The model is in {state}. It must be in evaluation mode, in float32, on the CPU. Call "
            "model.eval().float().cpu()."
        )
    if config.mode is not None and not isinstance(model, DenseCLIPForSegmentation):
        raise ValueError(
            f"mode is {config.mode!r}, and the model is a {type(model).__name__}. Only a training-free segmenter has "
            "a choice. Leave it out."
        )
    if vocabulary is not None:
        if not isinstance(model, OpenVocabularyModel):
            raise ValueError(f"A vocabulary is given, and a {type(model).__name__} reads no text. Leave it out.")
        check_encoder(vocabulary, model.text_fingerprint())
    vision = _vision_config(model)
    image_processor = getattr(processor, "image_processor", processor)
    return config.image_size(_default_side(image_processor, vision), vision.patch_size)


@torch.no_grad()
def export_model(
    model: PreTrainedModel,
    processor: Any,
    output: str | Path,
    config: ExportConfig | None = None,
    *,
    vocabulary: Vocabulary | None = None,
    calibration: Any = None,
    source: str | None = None,
    on_stage: Callable[[str], object] = str,
) -> ExportRecord:
    """Write a model in another format, together with the result of a comparison with the original.

    Args:
        model: A segmenter of this package or a vision tower, in evaluation mode, in float32, on the CPU; not changed.
        processor: `OpenVocabularyProcessor`, or of a vision tower its image processor.
        output: Folder: absent, empty, or an earlier export, which is replaced.
        config: How to export.
        vocabulary: Names to build in; the text tower is left out. None makes text embeddings an input of segmenters.
        calibration: Unlabelled images for "int8-static": a folder, a dataset or a list.
        source: Name of the model for the record. Defaults to what it was loaded from.
        on_stage: Called with what is done next.

    Raises:
        ImportError: If a package of the format is missing; names the extra.
        TypeError: If the model is none that can be exported.
        ValueError: If the resolution, the mode, the vocabulary or the images do not fit.
        RuntimeError: If the model cannot be traced or written, or what was written is not the model; then the output
            folder stays as it was.
    """
    config = config or ExportConfig()
    size = check_exportable(model, processor, config, vocabulary)
    _require_packages(config)
    check_output_folder(output, marker=EXPORT_FILE)
    images = _calibration_images(config, calibration)
    job = _Job.of(model, processor, config, vocabulary, source, size)
    on_stage("tracing")
    traced = job.trace()
    text = job.trace_text()
    with write_folder(output, marker=EXPORT_FILE) as folder:
        on_stage(f"writing {config.format}")
        job.write(traced, folder, images)
        if text is not None:
            _write_graph(text, folder, TEXT_STEM, config.format)
        job.save_processor(folder)
        on_stage("comparing with the model")
        session = job.open(folder, traced)
        parity = job.parity(session, folder, images)
        record = job.record(traced, session, parity, list_files(folder))
        write_json(folder / EXPORT_FILE, record.to_dict())
    return record


@dataclass(frozen=True)
class _Job:
    """One export: what is traced, with which inputs."""

    config: ExportConfig
    model: PreTrainedModel
    image_processor: Any
    tokenizer: Any
    graph: Exportable
    size: tuple[int, int]
    vocabulary: Vocabulary | None
    text: tuple[dict[str, torch.Tensor], ...]  # two examples of the inputs beside images, where text is an input
    source: str

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        processor: Any,
        config: ExportConfig,
        vocabulary: Vocabulary | None,
        source: str | None,
        size: tuple[int, int],
    ) -> "_Job":
        image_processor = getattr(processor, "image_processor", processor)
        tokenizer = getattr(processor, "tokenizer", None)
        example = torch.zeros(2, 3, *size)
        text: tuple[dict[str, torch.Tensor], ...] = ()
        if isinstance(model, OpenVocabularyModel):
            if vocabulary is None:
                text = _example_text(model, tokenizer)
            elif vocabulary.text_embeddings is None:
                vocabulary = model.encode_vocabulary(vocabulary, tokenizer)
            options = {"mode": config.mode} if config.mode is not None else {}
            graph: Exportable
            if isinstance(model, MaskQueriesModel):
                graph = MaskQueriesGraph(model, example, vocabulary)
            else:
                graph = SegmenterGraph(model, vocabulary, example, options)
        else:
            graph = TowerGraph(model, example)
        name = source or str(model.config.name_or_path or type(model).__name__)
        return cls(config, model, image_processor, tokenizer, graph.eval(), size, vocabulary, text, _short(name))

    def trace(self) -> Traced:
        example = {PIXELS: torch.randn(2, 3, *self.size, generator=torch.Generator().manual_seed(0))}
        dynamic: dict[str, dict[int, Any]] = {PIXELS: {0: torch.export.Dim("batch", min=1)}}
        if self.text:
            example |= self.text[0]
            dynamic |= dynamic_sizes(self.text[0])
        return trace(self.graph, example, dynamic)

    def trace_text(self) -> Traced | None:
        if not self.text or not isinstance(self.model, OpenVocabularyModel):
            return None
        tokens = self.tokenizer(["a cat", "two dogs"], padding=True, return_tensors="pt")
        example = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        longest = self.model.text_model.config.max_position_embeddings
        sizes = {0: torch.export.Dim("texts", min=1), 1: torch.export.Dim("length", min=2, max=longest)}
        return trace(TextGraph(self.model).eval(), example, dict.fromkeys(example, sizes))

    def write(self, traced: Traced, folder: Path, images: list[Any]) -> None:
        precision = self.config.precision
        path = folder / (MODEL_STEM + SUFFIXES[self.config.format])
        if precision in ("int8-dynamic", "int8-static"):
            plain = folder / "plain.onnx"
            write_onnx(traced, plain)
            if precision == "int8-dynamic":
                quantize_onnx_dynamic(plain, path)
            else:
                quantize_onnx_static(plain, path, [self._feeds(pixels[None]) for pixels in self.prepare(images)])
            for left in folder.glob("plain.onnx*"):
                left.unlink()
        else:
            _write_graph(traced, folder, MODEL_STEM, self.config.format, compress="int8" in precision)

    def save_processor(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)
        if self.text:
            self.tokenizer.save_pretrained(folder)

    def prepare(self, images: list[Any]) -> list[torch.Tensor]:
        """Return pixel values of images, each `(3, height, width)`: the middle of the image."""
        height, width = self.size
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        crops = (center_crop(image, self.image_processor, side) for image in images)
        return [crop[:, top : top + height, left : left + width].contiguous() for crop in crops]

    def open(self, folder: Path, traced: Traced) -> Session:
        return open_session(
            folder / (MODEL_STEM + SUFFIXES[self.config.format]),
            file_format=self.config.format,
            precision=self.config.precision,
            outputs=traced.outputs,
        )

    def parity(self, session: Session, folder: Path, images: list[Any]) -> dict[str, Parity]:
        inputs = parity_images(self.size)
        if len(images) > len(inputs[PICTURES]):  # real ones say more
            inputs[PICTURES] = torch.stack(self.prepare(images[-len(inputs[PICTURES]) :]))
        found = measure_parity(self._reference, session.run, inputs, self.text)
        check_parity(found, self.config.precision)
        if self.text:
            found["text"] = self._text_parity(folder)
            check_parity({"text": found["text"]}, "fp32")
        return found

    def _text_parity(self, folder: Path) -> Parity:
        session = open_session(
            folder / (TEXT_STEM + SUFFIXES[self.config.format]),
            file_format=self.config.format,
            precision="fp32",
            outputs=TextGraph.output_names,
        )
        graph = TextGraph(cast("OpenVocabularyModel", self.model)).eval()
        pairs = []
        for texts in (["cat"], [f"a photo of a {name}." for name in PARITY_NAMES]):
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
            inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            pairs.append((graph.named(*inputs.values()), session.run(inputs)))
        return compare(pairs)

    def _reference(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.graph.named(*inputs.values())

    def _feeds(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {PIXELS: pixels, **(self.text[1] if self.text else {})}

    def record(
        self, traced: Traced, session: Session, parity: dict[str, Parity], files: dict[str, dict[str, Any]]
    ) -> ExportRecord:
        model, is_segmenter = self.model, isinstance(self.model, OpenVocabularyModel)
        limits: Limits = limits_of(self.config.precision)
        return ExportRecord(
            format=self.config.format,
            precision=self.config.precision,
            model_class=type(model).__name__,
            source=self.source,
            fingerprint=model_fingerprint(model),
            text_fingerprint=model.text_fingerprint() if isinstance(model, OpenVocabularyModel) else None,
            text_dim=cast("Any", model.config).projection_dim if is_segmenter else None,
            mode=(self.config.mode or cast("Any", model.config).segmentation_mode) if is_segmenter else None,
            image_size=self.size,
            patch_size=_vision_config(model).patch_size,
            templates=cast("Any", model.config).segmentation_templates if is_segmenter else "",
            vocabulary=None if self.vocabulary is None else vocabulary_to_dict(self.vocabulary),
            ensemble=None if self.vocabulary is not None else ensemble_of(model),
            inputs=traced.inputs,
            outputs=traced.outputs,
            folded=tuple(self._folded(traced)),
            computed_in=session.computes_in,
            parity={
                "limits": {"max_relative": limits.difference, "cosine": limits.cosine, "agreement": limits.agreement},
                **{kind: found.to_dict() for kind, found in parity.items()},
            },
            versions=_versions(self.config.format),
            files=files,
        )

    def _folded(self, traced: Traced) -> list[str]:
        """Say what the graph no longer computes or holds."""
        vision = _vision_config(self.model)
        patch, native = vision.patch_size, vision.image_size // vision.patch_size
        grid = self.size[0] // patch, self.size[1] // patch
        said = []
        if grid != (native, native):
            said.append(f"positions interpolated from {native}x{native} to {grid[0]}x{grid[1]} patches")
        if isinstance(self.model, OpenVocabularyModel):
            if (self.config.mode or cast("Any", self.model.config).segmentation_mode) == "naclip":
                said.append(f"neighbour bias of {grid[0] * grid[1] + 1} tokens")
            if self.vocabulary is not None:
                said.append(f"vocabulary of {len(self.vocabulary.queries)} names; text tower left out")
        if traced.emptied:
            said.append(f"{traced.emptied} MLPs without neurons replaced by their bias")
        said.append(f"{traced.folded} constants in all, {traced.folded_bytes / 1024:,.0f} KiB")
        return said


def _require_packages(config: ExportConfig) -> None:
    """Say what is missing before anything is done."""
    require_torch()
    if config.format == "onnx":
        require("onnx", "onnx", "onnxscript", "onnxruntime")
    elif config.format == "openvino":
        import_openvino(*(["nncf"] if "int8" in config.precision else []))


def _calibration_images(config: ExportConfig, calibration: Any) -> list[Any]:
    if (config.precision == "int8-static") != (calibration is not None):
        given = "no calibration images" if calibration is None else "calibration images"
        raise ValueError(
            f"There are {given} and the precision is {config.precision}. int8-static measures ranges on images, and "
            "no other precision reads any. Give both or neither."
        )
    return [] if calibration is None else list_images(calibration)[:MOST_CALIBRATION_IMAGES]


def _write_graph(traced: Traced, folder: Path, stem: str, file_format: str, *, compress: bool = False) -> None:
    path = folder / (stem + SUFFIXES[file_format])
    if file_format == "onnx":
        write_onnx(traced, path)
    elif file_format == "openvino":
        model = convert_openvino(traced)
        write_openvino(compress_openvino_weights(model) if compress else model, path)
    else:
        torch.export.save(traced.program, path)


def _example_text(model: OpenVocabularyModel, tokenizer: Any) -> tuple[dict[str, torch.Tensor], ...]:
    """Return two examples of the inputs beside images."""
    names = Vocabulary(PARITY_NAMES, templates=cast("Any", model.config).segmentation_templates)
    text = cast("torch.Tensor", model.encode_vocabulary(names, tokenizer).text_embeddings)
    if isinstance(model, MaskQueriesModel):
        return parity_inputs(model, text)
    return {TEXT: text[: len(text) // 2]}, {TEXT: text}


def _vision_config(model: Any) -> Any:
    return model.vision_model.config if hasattr(model, "vision_model") else model.config


def _default_side(image_processor: Any, vision: Any) -> int:
    size = getattr(image_processor, "size", None) or {}
    sides = [side for side in (size.get("shortest_edge"), size.get("height"), size.get("width")) if side]
    return min(sides) if sides else vision.image_size


def _short(name: str) -> str:
    """Return a Hub id as it is, and of a folder the last part: paths are nobody's business."""
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
    return name if is_hub_id else Path(name).name


def _versions(file_format: str) -> dict[str, str]:
    names = ("hf_opentrans", "torch", "transformers", *_PACKAGES[file_format])
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except ImportError:  # nncf, where nothing is compressed
            continue
    return found
