"""The metric for `evaluate`: the same numbers, counted at once; with evaluate itself where it is installed."""

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_opentrans.benchmark_metric import histogram_scores
from hf_opentrans.data.metric_loading import METRICS_FOLDER, MeanIoUStream, load_metric

IGNORED = 255
MODULE = "hf_opentrans.data.evaluate_metrics.mean_iou.mean_iou"


class StandIn:
    """What evaluate.Metric does with its subclasses at construction, for where evaluate is not installed."""

    def __init__(self, config_name=None, *, num_process=1, process_id=0, cache_dir=None, **kwargs):
        self.info, self.num_process = self._info(), num_process
        for name in ("compute", "add_batch", "add"):  # evaluate copies them and appends to their docstrings
            method = getattr(self, name)
            copy = types.FunctionType(
                method.__code__, method.__globals__, name, method.__defaults__, method.__closure__
            )
            copy.__kwdefaults__ = method.__kwdefaults__
            setattr(self, name, types.MethodType(copy, self))
            getattr(self, name).__func__.__doc__ += self.info.inputs_description

    def _info(self):
        raise NotImplementedError


@pytest.fixture
def load(monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    if importlib.util.find_spec("evaluate") is None:
        module = types.ModuleType("evaluate")
        vars(module).update(Metric=StandIn, MetricInfo=types.SimpleNamespace)
        monkeypatch.setitem(sys.modules, "evaluate", module)
        monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield lambda **options: load_metric("mean_iou", cache_dir=str(tmp_path), **options)
    sys.modules.pop(MODULE, None)


@st.composite
def map_pairs(draw: st.DrawFn) -> tuple[int, list[tuple[np.ndarray, np.ndarray]]]:
    classes = draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pairs = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        prediction, target = rng.integers(0, classes, (2, *shape))
        target[rng.random(shape) < 0.3] = IGNORED
        prediction[rng.random(shape) < 0.1] = IGNORED
        pairs.append((prediction, target))
    pairs[0][1][0, 0] = 0
    return classes, pairs


def assert_same(found, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-12, rtol=0, err_msg=name)


@given(map_pairs())
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_equals_the_formula_of_evaluate(drawn):
    classes, pairs = drawn
    stream = MeanIoUStream(classes, IGNORED)
    for prediction, target in pairs:  # maps of different sizes
        stream.add([prediction.astype(np.uint8)], [torch.tensor(target)])
    assert stream.maps == len(pairs)
    assert_same(stream.compute(), histogram_scores(pairs, classes))
    assert stream.maps == 0


def test_golden_of_evaluate(load):
    # The example in the documentation of evaluate's mean_iou, with the results printed there.
    predictions = [[[1, 2], [3, 4], [5, 255]], [[2, 7], [9, 2], [3, 6]], [[2, 2, 3], [8, 2, 4], [3, 255, 2]]]
    references = [[[0, 3], [5, 4], [6, 255]], [[1, 7], [9, 2], [3, 6]], [[1, 2, 2], [8, 2, 1], [3, 255, 1]]]
    found = load(num_labels=10).compute(predictions=predictions, references=references)
    assert found["mean_iou"] == pytest.approx(0.4775)
    assert found["mean_accuracy"] == pytest.approx(0.5916666666666666)
    assert found["overall_accuracy"] == pytest.approx(0.5263157894736842)
    assert found["per_category_iou"] == pytest.approx([0, 0, 0.375, 0.4, 0.5, 0, 0.5, 1, 1, 1])
    assert found["per_category_accuracy"] == pytest.approx([0, 0, 0.75, 2 / 3, 1, 0, 0.5, 1, 1, 1])
    later = load().compute(predictions=predictions, references=references, num_labels=10, ignore_index=255)
    assert_same(later, found)


def test_batches_and_single_maps_are_counted_at_once(load):
    generator = torch.Generator().manual_seed(0)
    predictions, references = torch.randint(0, 3, (2, 6, 4, 5), generator=generator)
    whole, parts = load(num_labels=3), load(num_labels=3)
    whole.add_batch(predictions=predictions, references=references)
    parts.add_batch(predictions=list(predictions[:3].numpy()), references=list(references[:3]))
    parts.add(prediction=predictions[3].tolist(), reference=references[3])
    parts.add(prediction=Image.fromarray(predictions[4].byte().numpy()), reference=references[4].numpy())
    assert (len(whole), len(parts)) == (6, 5)
    parts.add(prediction=predictions[5], reference=references[5])
    assert_same(parts.compute(), whole.compute())
    assert len(whole) == 0
    assert "Maps of class ids" in whole.compute.__doc__
    with pytest.raises(RuntimeError, match="0 labelled pixels"):
        whole.compute()


def test_loads_by_its_path(monkeypatch, tmp_path):
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path), raising=False)
    metric = evaluate.load(str(METRICS_FOLDER / "mean_iou"), num_labels=2, cache_dir=str(tmp_path))
    metric.add_batch(predictions=[np.array([0, 1])], references=[np.array([1, 1])])
    assert metric.compute()["mean_iou"] == 0.25
    assert not list(tmp_path.rglob("*.arrow"))


def test_the_folder_can_be_loaded_by_its_path():
    # evaluate looks for a file that is named as its folder, and reads one import per line.
    script = METRICS_FOLDER / "mean_iou" / "mean_iou.py"
    assert script.is_file()
    assert not any("," in line for line in script.read_text().splitlines() if line.startswith("import "))


def test_reduced_labels_are_safe_above_254_classes():
    # 0 is no class, 256 is class 255: not the value that a byte wraps to.
    stream = MeanIoUStream(300, -1, reduce_labels=True)
    stream.add([np.array([5, 0, 255, 299])], [np.array([0, 1, 256, 300])])
    scores = stream.compute()
    assert scores["per_category_iou"][[0, 255, 299]].tolist() == [1, 1, 1]
    assert (scores["overall_accuracy"], scores["mean_iou"]) == (1, 1)
    bytes_ = MeanIoUStream(2, 255, reduce_labels=True)
    bytes_.add([np.array([0, 1, 1], np.uint8)], [np.array([1, 0, 255], np.uint8)])
    assert bytes_.compute()["overall_accuracy"] == 1


def test_nan_and_absent_classes():
    for stream, expected in ((MeanIoUStream(3), 0.25), (MeanIoUStream(3, absent="ignore"), 0.5)):
        stream.add([np.array([0, 1])], [np.array([0, 0])])
        found = stream.compute(nan_to_num=-1, label_map=None)
        assert found["mean_iou"] == expected
        assert found["per_category_iou"][2] == -1


def test_errors(load):
    maps = [np.array([0, 1])]
    with pytest.raises(ValueError, match=r"`name` is 'dice'.*\['mean_iou'\]"):
        load_metric("dice")
    with pytest.raises(ValueError, match="`num_labels` is not known yet"):
        load().add_batch(predictions=maps, references=maps)
    with pytest.raises(ValueError, match="`num_labels` is not known"):
        load().compute()
    metric = load(num_labels=2)
    with pytest.raises(ValueError, match="There are 1 predictions and 2 references"):
        metric.add_batch(predictions=maps, references=maps * 2)
    with pytest.raises(ValueError, match="There are None predictions"):
        metric.add_batch(references=maps)
    with pytest.raises(TypeError, match=r"inputs \['weights'\]"):
        metric.add_batch(predictions=maps, references=maps, weights=maps)
    with pytest.raises(ValueError, match="which is also a class id"):
        load(num_labels=2, ignore_index=1)
    metric.add_batch(predictions=maps, references=maps)
    with pytest.raises(ValueError, match=r"told {'num_labels': 3}, but 1 maps were counted with {'num_labels': 2}"):
        metric.compute(num_labels=3)
    with pytest.raises(TypeError, match=r"options \['label_map'\]"):
        metric.compute(label_map={0: 1})
    assert metric.compute(num_labels=2)["mean_iou"] == 1
    with pytest.raises(RuntimeError, match="`num_process` is 2 and there is no process group"):
        MeanIoUStream(2).compute(maps, maps, processes=2)


def test_without_evaluate_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match=r"`evaluate` is needed.*hf_opentrans\[train\]"):
        load_metric(num_labels=2)
