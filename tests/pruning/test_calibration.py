"""Calibration images of every kind, and the statistics that one walk over the layers gathers."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil

from hf_opentrans.pruning.calibration import (
    CLASS_TOKEN_SHARE,
    list_images,
    load_calibration,
    token_weights,
    walk_layers,
)
from hf_opentrans.pruning.plan import PruningConfig
from hf_opentrans.pruning.statistics import CovarianceStatistics
from hf_opentrans.pruning.surgery import to_sparse
from hf_opentrans.pruning.tower import Tower

CONFIG = PruningConfig(batch_size=4)


@pytest.fixture
def tower(tiny_clip):
    return Tower.of(to_sparse(tiny_clip).requires_grad_(False))


def make_images(count, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, size=(count, 5, 6, 3), dtype=np.uint8)
    return [Image.fromarray(picture).resize((48, 40), Image.Resampling.BICUBIC) for picture in coarse]


def load(images, tower, config=CONFIG, **options):
    """Load few images: the note that they are few is not what these tests are about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Fewer than 10 tokens per input")
        return load_calibration(images, config, tower, **options)


def pixels_of(calibration):
    return torch.cat([*calibration.held_out, *calibration.fit])


def test_folder_is_searched_recursively_and_other_files_are_left_alone(tmp_path, tower):
    images = make_images(8)
    (tmp_path / "a" / "b").mkdir(parents=True)
    for index, image in enumerate(images):
        folder = tmp_path if index < 3 else (tmp_path / "a" if index < 6 else tmp_path / "a" / "b")
        image.save(folder / f"{index}{('.png', '.PNG', '.bmp')[index % 3]}")
    (tmp_path / "a" / "notes.txt").write_text("no image", encoding="utf-8")
    (tmp_path / "a.png").mkdir()
    found = list_images(str(tmp_path))
    assert sorted(path.stem for path in found) == [str(index) for index in range(8)]
    calibration = load(tmp_path, tower)
    assert calibration.num_images == 8
    expected = load(images, tower)
    key = lambda pixels: sorted(float(image.sum()) for image in pixels_of(pixels))  # noqa: E731
    assert key(calibration) == pytest.approx(key(expected))


def test_masks_of_a_segmentation_folder_are_no_calibration_images(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        make_images(1)[0].save(tmp_path / name / "0.png")
    (tmp_path / "classes.json").write_text("{}", encoding="utf-8")
    assert list_images(tmp_path) == [tmp_path / "images" / "0.png"]


@pytest.mark.parametrize("content", [b"no image at all", None])
def test_unreadable_image_is_named(tmp_path, tower, content):
    for index, image in enumerate(make_images(8)):
        image.save(tmp_path / f"{index}.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes((tmp_path / "0.png").read_bytes()[:300] if content is None else content)
    with pytest.raises(ValueError, match=r"broken\.png"):
        load(tmp_path, tower)


@pytest.mark.parametrize("images", [[], (), iter([])])
def test_no_images_raise(images):
    with pytest.raises(ValueError, match="0 calibration images"):
        list_images(images)


def test_wrong_sources_raise(tmp_path):
    with pytest.raises(ValueError, match=r"holds 0 images \(\.jpg"):
        list_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        list_images(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        list_images(tmp_path / "file")
    with pytest.raises(TypeError, match="images is int"):
        list_images(3)


def test_datasets_are_read_through_their_image_column(tower):
    datasets = pytest.importorskip("datasets")
    images = make_images(8)
    features = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"label": list(range(8)), "picture": images}, features=features)
    assert torch.equal(pixels_of(load(dataset, tower)), pixels_of(load(images, tower)))
    with pytest.raises(ValueError, match=r"\['label'\], none of type Image"):
        list_images(dataset.remove_columns("picture"))


def test_streamed_datasets_are_read_too(tower):
    datasets = pytest.importorskip("datasets")
    images = make_images(8)
    features = datasets.Features({"picture": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"picture": images}, features=features).to_iterable_dataset()
    assert torch.equal(pixels_of(load(dataset, tower)), pixels_of(load(images, tower)))


def test_iterables_of_any_image_kind_work(tmp_path, tower):
    images = make_images(8)
    expected = pixels_of(load(images, tower))
    assert torch.equal(pixels_of(load((image for image in images), tower)), expected)
    assert torch.equal(pixels_of(load(np.stack([np.asarray(image) for image in images]), tower)), expected)
    assert torch.equal(pixels_of(load([{"image": image, "label": 0} for image in images], tower)), expected)
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    paths = [str(tmp_path / f"{index}.png") for index in range(8)]
    assert torch.equal(pixels_of(load(paths, tower)), expected)


def test_draw_depends_on_the_seed_alone(tower):
    images = make_images(20)
    first, again, other = (load(images, tower, PruningConfig(num_images=8, seed=seed)) for seed in (0, 0, 1))
    assert first.num_images == other.num_images == 8
    assert torch.equal(pixels_of(first), pixels_of(again))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_fingerprint_follows_the_content(tower):
    images = make_images(8)
    before = load(images, tower).fingerprint
    images[3] = Image.new("RGB", (48, 40), "red")
    assert load(images, tower).fingerprint != before
    assert len(before) == 64


def test_held_out_images_are_no_fit_images(tower):
    calibration = load(make_images(20), tower, PruningConfig(batch_size=4, held_out=0.3))
    fit, held_out = (torch.cat(part) for part in (calibration.fit, calibration.held_out))
    assert (len(fit), len(held_out)) == (14, 6)
    assert max(len(batch) for batch in calibration.fit) == 4
    assert not any(torch.equal(a, b) for a in fit for b in held_out)


def test_one_image_is_counted_once(tower):
    calibration = load(make_images(1), tower, PruningConfig(resolution=96))
    assert calibration.num_images == 1
    assert sum(map(len, calibration.fit)) == sum(map(len, calibration.held_out)) == 1


def test_unusual_images_work(tower):
    rng = np.random.default_rng(0)
    images = [
        Image.new("L", (40, 40), 90),
        Image.new("RGBA", (40, 30), (10, 200, 30, 128)),
        Image.fromarray(rng.integers(0, 65536, size=(33, 47), dtype=np.uint16)),
        Image.new("RGB", (10_000, 20), "blue"),
        Image.new("RGB", (20, 10_000), "blue"),
        Image.new("RGB", (1, 1), "green"),
        Image.new("P", (50, 50)),
        Image.new("1", (50, 50)),
    ]
    pixels = pixels_of(load(images, tower))
    assert pixels.shape == (8, 3, 32, 32)
    assert torch.isfinite(pixels).all()


def test_resolution_becomes_a_multiple_of_the_patch_size(tower):
    calibration = load(make_images(8), tower, PruningConfig(resolution=45))
    assert pixels_of(calibration).shape[-2:] == (40, 40)


def test_image_processor_decides_mean_and_deviation(tower):
    images = make_images(8)
    plain = CLIPImageProcessorPil(image_mean=[0.0] * 3, image_std=[1.0] * 3)
    pixels = pixels_of(load(images, tower, image_processor=plain))
    assert 0 <= pixels.min() <= pixels.max() <= 1
    usual = CLIPImageProcessorPil()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (usual.image_mean, usual.image_std))
    torch.testing.assert_close(pixels_of(load(images, tower)), (pixels - mean) / std)


def test_too_few_tokens_raise_and_few_warn(tower):
    # The widest layer has 64 inputs, an image of 32 pixels 17 tokens: 65 tokens are the least, 640 are enough.
    with pytest.raises(
        ValueError, match=r"3 calibration images give 51 tokens.*64 inputs.*at least 65. Give 4 images"
    ):
        load_calibration(make_images(3), CONFIG, tower)
    with pytest.warns(UserWarning, match="37 calibration images give 629 tokens.*Use 38 images") as caught:
        calibration = load_calibration(make_images(37), CONFIG, tower)
    assert calibration.warnings == (str(caught[0].message),)
    assert load_calibration(make_images(38), CONFIG, tower).warnings == ()


def test_progress_is_reported_once_an_image(tower):
    calls = []
    load(make_images(8), tower, PruningConfig(num_images=6), on_image=lambda: calls.append(1))
    assert len(calls) == 6


def observed(tower):
    """Return the modules whose inputs ("heads", "neurons") or outputs ("queries", "keys") are gathered."""
    found = {(*key, "in"): module for key, module in tower.consumers.items()}
    for index, layer in enumerate(tower.layers):
        found |= {(index, "queries", "out"): layer.self_attn.q_proj, (index, "keys", "out"): layer.self_attn.k_proj}
    return found


def rows_of_full_forward(tower, pixels):
    """Record what every consumer reads, and queries and keys, in one ordinary forward pass of all images."""
    seen = {}

    def hook(_module, inputs, output, key):
        seen[key[:2]] = (inputs[0] if key[2] == "in" else output).double()

    handles = [m.register_forward_hook(partial(hook, key=key)) for key, m in observed(tower).items()]
    tower.vision(pixels)
    for handle in handles:
        handle.remove()
    return seen


def reference_weights(rows):
    """Weigh the tokens of one batch, from the definition."""
    rows = rows.double().numpy()
    weights = np.ones(rows.shape[:2])
    weights[:, 0] = (rows.shape[1] - 1) / 9  # a tenth for the class token, nine tenths for the patches
    distances = np.linalg.norm(rows - rows.mean((0, 1)), axis=-1)
    limit = np.quantile(distances, 0.999)
    return (weights * np.where(distances > limit, (limit / distances) ** 2, 1.0)).ravel()


def test_walk_gathers_the_statistics_of_a_full_forward_pass(tower):
    calibration = load(make_images(20), tower)
    parts_of_images = (calibration.fit, calibration.held_out)
    expected = [rows_of_full_forward(tower, torch.cat(part)) for part in parts_of_images]
    visited = []
    for layer, found in walk_layers(tower, calibration):
        visited.append(layer)
        assert set(found) == {"heads", "neurons", "queries", "keys"}
        for kind, parts in found.items():
            for statistics, rows_by_key, batches in zip(parts, expected, parts_of_images, strict=True):
                rows = rows_by_key[layer, kind]
                weights = np.concatenate([reference_weights(b) for b in rows.split([len(x) for x in batches])])
                flat = rows.flatten(0, 1).numpy()
                mean = np.average(flat, axis=0, weights=weights)
                covariance = np.cov(flat.T, bias=True, aweights=weights)
                np.testing.assert_allclose(statistics.mean.numpy(), mean, rtol=1e-4, atol=1e-6)
                np.testing.assert_allclose(statistics.covariance.numpy(), covariance, rtol=1e-3, atol=1e-6)
                assert statistics.rows == len(flat)
                assert statistics.weight == pytest.approx(weights.sum(), rel=1e-5)
    assert visited == [0, 1, 2]


def test_class_token_has_a_tenth_of_the_weight():
    rows = torch.randn(500, 17, 3).clamp(-1, 1)
    weights = token_weights(rows).view(500, 17)
    assert CLASS_TOKEN_SHARE == 0.1
    shares = weights / weights.sum(1, keepdim=True)
    assert float(shares[:, 0].median()) == pytest.approx(0.1, rel=1e-5)
    assert float(shares[:, 1:].median()) == pytest.approx(0.9 / 16, rel=1e-5)


def test_one_token_in_a_thousand_is_weighed_down_to_the_quantile():
    rows = torch.randn(40, 50, 4)
    rows[3, 7], rows[9, 20] = 1e3, -4e3
    weights = token_weights(rows)
    np.testing.assert_allclose(weights.numpy(), reference_weights(rows), rtol=5e-2)  # a quantile in fp32
    grid = weights.view(40, 50)
    assert (grid[:, 1:] < 1).sum() == 2
    assert 0 < float(grid[9, 20]) < float(grid[3, 7]) < 1
    moments = CovarianceStatistics(4)
    moments.update(rows.flatten(0, 1), weights)
    plain = CovarianceStatistics(4)
    plain.update(rows.flatten(0, 1))
    assert float(moments.moment.trace()) < 0.6 * float(plain.moment.trace())


@settings(max_examples=25, deadline=None)
@given(
    batch_size=st.integers(1, 5),
    tokens=st.integers(2, 30),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 10**6),
)
def test_weights_follow_the_definition_at_any_shape_and_scale(batch_size, tokens, scale, seed):
    rows = scale * torch.randn(batch_size, tokens, 3, generator=torch.Generator().manual_seed(seed))
    np.testing.assert_allclose(token_weights(rows).numpy(), reference_weights(rows), rtol=1e-3)


def test_walk_gathers_only_what_is_wanted_and_leaves_no_hooks(tower):
    calibration, batches = load(make_images(8), tower), []
    found = dict(walk_layers(tower, calibration, lambda: batches.append(1), {"neurons", "keys"}))
    assert {layer: set(kinds) for layer, kinds in found.items()} == {layer: {"neurons", "keys"} for layer in range(3)}
    assert len(batches) == 3 * (len(calibration.fit) + len(calibration.held_out))
    for module in observed(tower).values():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [("neurons", {"neurons"}), ("queries", {"queries", "keys"}), ("keys", {"keys"}), ("heads", {"heads", "neurons"})],
)
@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_activations_that_are_not_finite_raise(tower, kind, kinds, value):
    layer = tower.layers[1]
    modules = {
        "neurons": layer.mlp.fc1,
        "queries": layer.self_attn.q_proj,
        "keys": layer.self_attn.k_proj,
        "heads": layer.self_attn.v_proj,
    }
    with torch.no_grad():
        modules[kind].weight.fill_(value)
    with pytest.raises(ValueError, match=f"before the {kind} of layer 1 are not finite"):
        list(walk_layers(tower, load(make_images(8), tower), kinds=kinds))


def test_tokens_that_are_all_alike_keep_their_weight(tower):
    weights = token_weights(torch.zeros(2, 5, 3)).view(2, 5)
    assert bool((weights > 0).all())
    with torch.no_grad():
        tower.layers[1].mlp.fc1.weight.zero_()
        tower.layers[1].mlp.fc1.bias.zero_()
    found = dict(walk_layers(tower, load(make_images(8), tower)))
    assert float(found[1]["neurons"][0].covariance.abs().max()) == 0.0
