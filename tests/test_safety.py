"""Damaged, foreign and hostile checkpoints: one clear error, no code run, no memory filled."""

import json
import pickle
import resource
import shutil
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel, CLIPModel

from hf_opentrans import (
    CATSegForSegmentation,
    CLIPResNetVisionConfig,
    CLIPResNetVisionModel,
    DeepLabV3PlusForSegmentation,
    DenseCLIPForSegmentation,
    FCCLIPForSegmentation,
    GKCForSegmentation,
    OpenVocabularyProcessor,
    SparseCLIPVisionModel,
)
from hf_opentrans._safety import MOST_CONFIG_BYTES, StoredTensor, check_foreign_layers, read_headers
from hf_opentrans.loading import load_any, load_clip, load_clip_resnet, load_dense_clip, load_segmenter
from hf_opentrans.pruning import to_sparse

LOADERS = pytest.mark.parametrize("load", [load_clip, load_segmenter])
EVERY_LOADER = pytest.mark.parametrize("load", [load_clip, load_segmenter, load_dense_clip, load_any])
ALLOWANCE = 1 << 30  # address space beyond what the process has
HUGE = 10**9


@pytest.fixture(autouse=True)
def _little_memory():
    """Give every test of this file one GiB of address space beyond what is there."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ALLOWANCE, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def canary(tmp_path):
    """Return (path that no code may write, module source that would, pickle that would)."""
    path = tmp_path / "canary"
    source = (
        f"from pathlib import Path\nPath({str(path)!r}).write_text('run')\nclass Model: pass\nclass Config: pass\n"
    )
    return path, source, pickle.dumps(Hostile(str(path)))


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (Path(self.path), "run")


def weights(folder):
    return folder / "model.safetensors"


def change(folder, *keys, value, name="config.json"):
    """Put a value into a JSON file of a folder."""
    values = json.loads((folder / name).read_text(encoding="utf-8"))
    part = values
    for key in keys[:-1]:
        part = part.setdefault(key, {})
    part[keys[-1]] = value
    (folder / name).write_text(json.dumps(values), encoding="utf-8")


@contextmanager
def refused(message: str, kind: type[Exception] = ValueError):
    with pytest.raises(kind, match=message) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    assert text.count(". ") >= 1, text  # value, rule, fix


VISION, TEXT = "vision_config", "text_config"
ABSURD = [
    ((VISION, "intermediate_size"), HUGE, "The vision tower has intermediate_size=1000000000. It must be at most"),
    ((VISION, "hidden_size"), HUGE, "hidden_size=1000000000. It must be at most"),
    ((VISION, "num_hidden_layers"), 10**6, "num_hidden_layers=1000000. It must be at most"),
    ((VISION, "num_hidden_layers"), -1, "num_hidden_layers=-1. It must be at least 0"),
    ((VISION, "num_attention_heads"), -4, "num_attention_heads=-4. It must be at least 0"),
    ((VISION, "head_dim"), HUGE, "head_dim=1000000000. It must be at most"),
    ((VISION, "head_dim"), 0, "head_dim=0. It must be at least 1"),
    ((VISION, "image_size"), HUGE, "image_size=1000000000. It must be at most"),
    ((VISION, "image_size"), 2**14, "must make a grid of 1 to"),
    ((VISION, "image_size"), [32, 32], r"image_size=\[32, 32\]. It must be a whole number"),
    ((VISION, "image_size"), None, "image_size=None and patch_size=8. They must make a grid"),
    ((VISION, "patch_size"), 0, "patch_size=0. It must be at least 1"),
    ((VISION, "num_channels"), HUGE, "num_channels=1000000000. It must be at most"),
    ((VISION, "projection_dim"), HUGE, "projection_dim=1000000000. It must be at most"),
    ((VISION, "intermediate_size"), 64.0, "expected int, got float"),
    ((VISION, "intermediate_size"), "64", "expected int, got str"),
    ((VISION, "intermediate_size"), True, "expected int, got bool"),
    ((VISION, "num_hidden_layers"), [3], "expected int, got list"),
    ((VISION, "layer_norm_eps"), float("nan"), "layer_norm_eps=nan. It must be a number in"),
    ((VISION, "attention_dropout"), 7, "attention_dropout=7. It must be a number in"),
    ((VISION, "hidden_act"), "evil", "hidden_act='evil'. transformers has no such activation"),
    ((VISION, "per_layer_config"), [1, 2], "per_layer_config is a list. It must map"),
    ((VISION, "per_layer_config"), {"7": {}}, r"has the layer '7'. Each must be there once, in \[0, 3\)"),
    ((VISION, "per_layer_config"), {"1": {}, "01": {}}, "has the layer '01'. Each must be there once"),
    ((VISION, "per_layer_config"), {"one": {}}, "has the key 'one'. Keys are indices"),
    ((VISION, "per_layer_config"), {"0": [3]}, r"Layer 0 is \[3\]. It must hold what differs there"),
    ((VISION, "per_layer_config"), {"0": {"intermediate_size": HUGE}}, "Layer 0 has intermediate_size=1000000000"),
    (
        (VISION, "per_layer_config"),
        {"0": {"intermediate_size": 1.5}},
        "Layer 0 has intermediate_size=1.5. It must be a",
    ),
    (
        (VISION, "per_layer_config"),
        {"0": {"num_attention_heads": True}},
        "num_attention_heads=True. It must be a whole",
    ),
    ((VISION, "per_layer_config"), {"0": {"v_head_dim": None}}, "v_head_dim=None. It must be a whole number"),
    ((VISION, "per_layer_config"), {"0": {"hidden_size": 8}}, "Layer 0 has 'hidden_size'. Layers can differ in"),
    ((VISION, "per_layer_config"), {"0": {"skip": "mlp"}}, "Layer 0 has skip='mlp'. It must be a list of names"),
    ((VISION, "per_layer_config"), {"0": {"masked_heads": ["a"]}}, "masked_heads=.*It must be a list of indices"),
    ((VISION, "per_layer_config"), {str(i): {} for i in range(2000)}, "has 2000 entries, and the model 3 layers"),
    ((TEXT, "vocab_size"), 10**12, "The text tower has vocab_size=1000000000000. It must be at most"),
    ((TEXT, "num_hidden_layers"), HUGE, "The text tower has num_hidden_layers=1000000000. It must be at most"),
    ((TEXT, "num_attention_heads"), 0, "The text tower has num_attention_heads=0. It must be at least 1"),
    ((TEXT, "max_position_embeddings"), HUGE, "max_position_embeddings=1000000000. It must be at most"),
    ((TEXT, "per_layer_config"), {"0": {}}, "The text tower has per_layer_config. Only layers of the vision tower"),
    (("text_config_dict", "num_hidden_layers"), HUGE, "The text tower has num_hidden_layers=1000000000"),
    (("vision_config_dict", "num_hidden_layers"), HUGE, "The vision tower has num_hidden_layers=1000000000"),
    (("projection_dim",), HUGE, "The model has projection_dim=1000000000. It must be at most"),
    (("segmentation_logit_scale",), float("nan"), "segmentation_logit_scale=nan. It must be a number in"),
]


@pytest.mark.parametrize(("keys", "value", "message"), ABSURD)
def test_absurd_configurations(tiny_clip_folder, keys, value, message):
    change(tiny_clip_folder, *keys, value=value)
    with refused(message):
        load_clip(tiny_clip_folder)
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        DenseCLIPForSegmentation.from_pretrained(tiny_clip_folder)
    if keys[0] == VISION:
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            SparseCLIPVisionModel.from_pretrained(tiny_clip_folder)


@LOADERS
@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ((VISION, "intermediate_size"), 2**20, r"do not have the shapes.*is \(64, 32\) and not \(1048576, 32\), and"),
        ((VISION, "hidden_size"), 2**12, "do not have the shapes"),
        ((VISION, "image_size"), 2**13, "do not have the shapes"),
        ((VISION, "num_hidden_layers"), 50, "lacks 752 of the weights"),
        ((VISION, "num_hidden_layers"), 2, "holds 16 weights that .* has no place for, among them"),
        ((TEXT, "vocab_size"), 2**24, r"do not have the shapes.*is \(538, 32\) and not \(16777216, 32\)"),
    ],
)
def test_sizes_that_are_not_those_of_the_weights(tiny_clip_folder, load, keys, value, message):
    change(tiny_clip_folder, *keys, value=value)
    with refused(message):
        load(tiny_clip_folder)


def test_sizes_that_are_only_absurd_together(tiny_clip_folder):
    for name, value in (("hidden_size", 2**16), ("intermediate_size", 2**20), ("num_hidden_layers", 1000)):
        change(tiny_clip_folder, VISION, name, value=value)
    with refused("The vision tower has [0-9,]* parameters by its sizes. It may have"):
        load_clip(tiny_clip_folder)


@LOADERS
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid"),
        (b"[]", "it holds no JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"model_type": ' + b"9" * 5000 + b"}", "is not valid"),
        (b'{"model_type": ["clip"]}', "has a model_type that is no name"),
        (b'{"model_type": "clip", "architectures": "CLIPModel"}', "has architectures that are no list of names"),
        (b'{"model_type": "clip", "dtype": "load"}', "has dtype='load'. PyTorch has no such type"),
        (b'{"model_type": "clip", "vision_config": [], "text_config": {}}', "cannot be used|holds a model of type"),
        (b'{"model_type": "clip", "attn_implementation": "some/kernel"}', "asks for the kernel 'some/kernel'"),
        (b'{"model_type": "clip", "quantization_config": {"quant_method": "awq"}}', "are quantized"),
        (b'{"model_type": "clip", "transformers_weights": "../x.safetensors"}', "names other files"),
        (b'{"model_type": "clip", "configuration_files": ["config.4.0.0.json"]}', "names other files"),
    ],
)
def test_config_files(tiny_clip_folder, load, content, message):
    (tiny_clip_folder / "config.json").write_bytes(content)
    with refused(message):
        load(tiny_clip_folder)


@LOADERS
def test_a_config_of_many_megabytes_is_not_read(tiny_clip_folder, load):
    with (tiny_clip_folder / "config.json").open("wb") as opened:
        opened.truncate(400 * MOST_CONFIG_BYTES)  # a file with a hole: no disk space
    with refused(r"config.json' has 1,600 MiB. Such a file has at most 4 MiB"):
        load(tiny_clip_folder)


@LOADERS
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "The processor in .* cannot be used"),
        ("tokenizer.json", b"{}", "The processor in .* cannot be used"),
        ("tokenizer_config.json", b"[1]", r"tokenizer_config.json' is not valid: it holds no JSON object"),
        ("preprocessor_config.json", b"\xff", r"processor_config.json' is not valid"),
    ],
)
def test_processor_files(tiny_clip_folder, load, name, content, message):
    (tiny_clip_folder / name).write_bytes(content)
    with refused(message):
        load(tiny_clip_folder)


def test_pictures_of_any_size_are_not_made(tiny_clip_folder):
    change(tiny_clip_folder, "crop_size", "height", value=HUGE, name="preprocessor_config.json")
    with refused(r"has crop_size=.*1000000000.*Sides must lie in \[1, 16384\]"):
        load_clip(tiny_clip_folder)


def header(content):
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(values, rest):
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + rest


def overlapping(content):
    values, rest = header(content)
    first, second = [name for name in values if name != "__metadata__"][:2]
    values[second]["data_offsets"] = values[first]["data_offsets"]
    return with_header(values, rest)


def outside(content):
    values, rest = header(content)
    next(value for name, value in values.items() if name != "__metadata__")["data_offsets"] = [0, 2**62]
    return with_header(values, rest)


def absurd_shape(content):
    values, rest = header(content)
    next(value for name, value in values.items() if name != "__metadata__")["shape"] = [2**40, 2**40]
    return with_header(values, rest)


@LOADERS
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:5],
        lambda content: content[: len(content) // 2],
        lambda content: struct.pack("<Q", 2**63) + content[8:],
        lambda content: struct.pack("<Q", 2**64 - 1) + content[8:],
        lambda content: bytes(len(content)),
        lambda content: struct.pack("<Q", 2) + b"[]" + content,
        overlapping,
        outside,
        absurd_shape,
    ],
    ids=["empty", "short", "half", "length", "longest", "zeros", "list", "overlapping", "outside", "shape"],
)
def test_damaged_weights(tiny_clip_folder, load, damage):
    weights(tiny_clip_folder).write_bytes(damage(weights(tiny_clip_folder).read_bytes()))
    with refused("are damaged or cut short"):
        load(tiny_clip_folder)


def rewrite(folder, edit):
    tensors = load_file(weights(folder))
    edit(tensors)
    save_file(tensors, weights(folder), metadata={"format": "pt"})


BIAS = "vision_model.encoder.layers.1.mlp.fc2.bias"


@LOADERS
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({BIAS: t[BIAS] * float("nan")}), f"'{BIAS}' has values that are NaN"),
        (lambda t: t.update({BIAS: t[BIAS].long()}), rf"not all floating-point numbers: {BIAS} \(I64\)"),
        (lambda t: t.pop(BIAS), f"lacks 1 of the weights that .* needs, among them {BIAS}"),
        (
            lambda t: t.update({"classifier.weight": torch.ones(3)}),
            "holds 1 weights that .* has no place for.*classifier",
        ),
        (lambda t: t.update({BIAS: t[BIAS][:-1].clone()}), r"do not have the shapes.*is \(31,\) and not \(32,\)"),
    ],
    ids=["nan", "integers", "missing", "extra", "shape"],
)
def test_wrong_tensors(tiny_clip_folder, load, edit, message):
    rewrite(tiny_clip_folder, edit)
    with refused(message):
        load(tiny_clip_folder)


@EVERY_LOADER
def test_a_pickle_in_the_place_of_weights_is_not_opened(tiny_clip_folder, load, canary):
    path, _, hostile = canary
    weights(tiny_clip_folder).write_bytes(hostile)
    with refused("are damaged or cut short"):
        load(tiny_clip_folder)
    assert not path.exists()


@LOADERS
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_a_folder_of_pickles_is_refused(tiny_clip_folder, load, canary, name):
    path, _, hostile = canary
    weights(tiny_clip_folder).unlink()
    (tiny_clip_folder / name).write_bytes(hostile)
    with refused(rf"holds its weights as a pickle, {name}. Reading a pickle can run any program.*save_pretrained"):
        load(tiny_clip_folder)
    assert not path.exists()


@EVERY_LOADER
def test_a_pickle_beside_the_weights_is_ignored(tiny_clip_folder, load, canary):
    path, _, hostile = canary
    (tiny_clip_folder / "pytorch_model.bin").write_bytes(hostile)
    load(tiny_clip_folder)
    assert not path.exists()


def test_a_pickled_adapter_is_refused(tiny_clip_folder, canary):
    path, _, hostile = canary
    (tiny_clip_folder / "adapter_config.json").write_text("{}")
    (tiny_clip_folder / "adapter_model.bin").write_bytes(hostile)
    with refused("holds an adapter as a pickle"):
        load_clip(tiny_clip_folder)
    assert not path.exists()


def test_a_distributed_checkpoint_is_refused(tiny_clip_folder):
    weights(tiny_clip_folder).rename(tiny_clip_folder / "shard-00001-model-00001-of-00001.safetensors")
    with refused("holds a distributed checkpoint. It would be read in place of"):
        load_clip(tiny_clip_folder)


@LOADERS
@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_code_of_a_folder_is_not_run(tiny_clip_folder, load, canary, where):
    path, source, _ = canary
    (tiny_clip_folder / "canary.py").write_text(source)
    if not (tiny_clip_folder / where).exists():
        (tiny_clip_folder / where).write_text("{}")
    classes = {f"Auto{name}": "canary.Model" for name in ("Model", "Processor", "ImageProcessor", "Config")}
    classes |= {"AutoModelForSemanticSegmentation": "canary.Model", "AutoTokenizer": ["canary.Model", None]}
    change(tiny_clip_folder, "auto_map", value=classes, name=where)
    load(tiny_clip_folder)  # our own classes are enough
    AutoModel.from_pretrained(tiny_clip_folder)
    assert not path.exists()


@EVERY_LOADER
def test_a_model_that_needs_its_own_code_is_refused(tiny_clip_folder, load, canary):
    path, source, _ = canary
    (tiny_clip_folder / "canary.py").write_text(source)
    change(tiny_clip_folder, "model_type", value="no_such_model")
    change(tiny_clip_folder, "architectures", value=["NoSuchModel"])
    change(tiny_clip_folder, "auto_map", value={"AutoModel": "canary.Model", "AutoConfig": "canary.Config"})
    with refused("holds a model of type 'no_such_model'"):
        load(tiny_clip_folder)
    assert not path.exists()


@pytest.mark.parametrize("name", ["set_seed", "AutoTokenizer", "__builtins__", "no such"])
def test_architectures_that_are_no_models(tmp_path, name):
    BertModel(small_bert()).save_pretrained(tmp_path)
    change(tmp_path, "architectures", value=[name])
    assert type(load_any(tmp_path)) is BertModel  # by its type


def small_bert():
    return BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=30)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", HUGE, "has num_hidden_layers=1000000000, and its files hold"),
        ("intermediate_size", HUGE, "states a model of [0-9,]* parameters, and its files hold"),
        ("vocab_size", 2**40, "states a model of|cannot be used"),
        ("hidden_size", "8", "cannot be used: .*expected int, got str"),
        ("num_hidden_layers", 2, "lacks 16 of the weights that BertModel needs"),
    ],
)
def test_foreign_models(tmp_path, key, value, message):
    BertModel(small_bert()).save_pretrained(tmp_path)
    change(tmp_path, key, value=value)
    with refused(message):
        load_any(tmp_path)


def test_layers_are_counted_in_every_part():
    values = {"encoder": {"depths": [2, 5000]}}
    with pytest.raises(ValueError, match=r"has depths=\[2, 5000\], and its files hold 40 tensors"):
        check_foreign_layers(values, 40, "folder")
    check_foreign_layers(values, 5000, "folder")


def shards(folder, model):
    weights(folder).unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    return folder / "model.safetensors.index.json"


@LOADERS
@pytest.mark.parametrize(
    ("edit", "message", "kind"),
    [
        (
            lambda v: v["weight_map"].update(x="../../x.safetensors"),
            r"names '../../x.safetensors'. Shards are",
            ValueError,
        ),
        (lambda v: v["weight_map"].update(x="/etc/passwd"), "names '/etc/passwd'. Shards are", ValueError),
        (lambda v: v["weight_map"].update(x="evil.bin"), "names 'evil.bin'. Shards are", ValueError),
        (lambda v: v["weight_map"].update(x=5), "names '5'. Shards are", ValueError),
        (lambda v: v["weight_map"].update(x="y.safetensors"), "names 1 files that are not there", FileNotFoundError),
        (lambda v: v.pop("weight_map"), "has no weight_map and metadata", ValueError),
        (lambda v: v.pop("metadata"), "has no weight_map and metadata", ValueError),
        (lambda v: v.update(weight_map=[]), "has no weight_map and metadata", ValueError),
    ],
)
def test_indices(tiny_clip_folder, tiny_clip, load, edit, message, kind):
    path = shards(tiny_clip_folder, tiny_clip)
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    with refused(message, kind):
        load(tiny_clip_folder)


@LOADERS
def test_a_missing_shard(tiny_clip_folder, tiny_clip, load):
    shards(tiny_clip_folder, tiny_clip)
    load(tiny_clip_folder)
    max(tiny_clip_folder.glob("model-*.safetensors")).unlink()
    with refused("names 1 files that are not there", FileNotFoundError):
        load(tiny_clip_folder)


def test_headers_are_read_without_values(tiny_clip_folder):
    stored = read_headers([weights(tiny_clip_folder)])
    assert stored[BIAS] == StoredTensor((32,), "F32")
    assert stored[BIAS].numel == 32
    assert stored["logit_scale"].numel == 1


QUERIES = {"hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 1, "feedforward_dim": 16, "num_queries": 4}
SMALL = {
    DeepLabV3PlusForSegmentation: {"decoder_channels": 8, "skip_channels": 4},
    CATSegForSegmentation: {"cost_channels": 16},
}
SMALL |= {FCCLIPForSegmentation: QUERIES, GKCForSegmentation: QUERIES}


@pytest.fixture(scope="module")
def segmenters(tmp_path_factory, tiny_clip_config, tiny_tokenizer, tiny_image_processor):
    """Return a folder with one small segmenter of every kind."""
    folder = tmp_path_factory.mktemp("segmenters")
    clip = to_sparse(CLIPModel(tiny_clip_config()))
    for kind, options in SMALL.items():
        for part in (kind.from_clip(clip, **options), OpenVocabularyProcessor(tiny_image_processor, tiny_tokenizer)):
            part.save_pretrained(folder / kind.__name__)
    return folder


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        (DeepLabV3PlusForSegmentation, "decoder_channels", HUGE, "decoder_channels=1000000000. It must be"),
        (DeepLabV3PlusForSegmentation, "atrous_rates", [1] * 1000, "the number of atrous_rates=1000"),
        (DeepLabV3PlusForSegmentation, "classifier_scale", float("nan"), "classifier_scale is nan"),
        (CATSegForSegmentation, "aggregation_blocks", HUGE, "aggregation_blocks=1000000000"),
        (CATSegForSegmentation, "guidance_channels", 2**14, "do not have the shapes"),
        (FCCLIPForSegmentation, "encoder_layers", HUGE, "encoder_layers=1000000000. It must be"),
        (FCCLIPForSegmentation, "class_weight", float("nan"), "class_weight=nan. It must be a"),
        (GKCForSegmentation, "num_queries", HUGE, "num_queries=1000000000. It must be at most"),
        (GKCForSegmentation, "num_queries", 2**16, "do not have the shapes"),
        (GKCForSegmentation, "max_regions", HUGE, "max_regions=1000000000. It must be at most"),
    ],
)
def test_segmenters(tmp_path, segmenters, kind, key, value, message):
    shutil.copytree(segmenters / kind.__name__, tmp_path / "saved")
    change(tmp_path / "saved", key, value=value)
    with refused(message):
        load_segmenter(tmp_path / "saved")


@pytest.mark.parametrize("kind", SMALL)
def test_segmenters_as_they_are_saved(segmenters, kind):
    assert type(load_segmenter(segmenters / kind.__name__)[0]) is kind


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("width", HUGE, "The ResNet has width=1000000000. It must be at most"),
        ("depths", [1, 1, 1, HUGE], "The ResNet has depths=1000000000. It must be at most"),
        ("num_attention_heads", 0, "num_attention_heads=0. It must be at least 1"),
        ("image_size", HUGE, "image_size=1000000000. It must be at most"),
        ("projection_dim", 2**16, "do not have the shapes"),
        ("inner_channels", [[1, 1]] * 1000, "inner_channels has 1000 entries. It must have two numbers"),
        ("depths", "3463", "cannot be used: .*depths"),
    ],
)
def test_resnets(tmp_path, key, value, message):
    config = CLIPResNetVisionConfig(
        depths=[1, 1, 1, 1], width=8, num_attention_heads=2, projection_dim=8, image_size=32
    )
    CLIPResNetVisionModel(config).save_pretrained(tmp_path)
    loaded = load_clip_resnet(tmp_path)
    assert loaded is not None
    assert loaded.disk_dtype == torch.float32
    change(tmp_path, key, value=value)
    with refused(message):
        load_clip_resnet(tmp_path)
