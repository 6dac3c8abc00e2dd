"""Latency tables: prices that never fall with width, exact for the dense tower, refused where they do not belong."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_opentrans.pruning import latency
from hf_opentrans.pruning.latency import SCHEMA, LatencyGrid, LatencyTable, measure_latency_table
from hf_opentrans.pruning.latency_timing import device_of, shape_of
from hf_opentrans.pruning.macs import CostModel
from hf_opentrans.pruning.plan import LayerPlan, PruningPlan
from hf_opentrans.pruning.surgery import slice_model, to_sparse
from hf_opentrans.pruning.tower import Tower

SMALL = LatencyGrid(heads=(0, 2, 4), qk_head_dims=(4, 8), v_head_dims=(4, 8), neurons=(0, 32, 64))
FINE = LatencyGrid(heads=(0, 1, 2, 4), qk_head_dims=(2, 4, 8), v_head_dims=(2, 4, 8), neurons=(0, 16, 32, 64))
SHAPE = {"layers": 3, "heads": 4, "head_dim": 8}
WHERE = {"device": {}, "shape": SHAPE, "resolution": 32, "batch_size": 1}


def assembled(grid=FINE, times=None, fixed_ms=1.0, dense_ms=10.0, where=WHERE):
    """Build a table without a clock; by default time grows with the multiplications."""
    cost = {p: 1.0 + p[1] * max(p[2] + p[3], 1) for p in grid.points}
    return LatencyTable.from_measured(times or cost, grid=grid, fixed_ms=fixed_ms, dense_ms=dense_ms, **where)


def dense_sum(table):
    heads, width, neurons = table.grid.heads[-1], table.grid.qk_head_dims[-1], table.grid.neurons[-1]
    return table.fixed() + table.shape["layers"] * (table.attention(heads, width, width) + table.mlp(neurons))


@pytest.fixture
def steady(monkeypatch):
    """Run what is timed, but by a clock of its own: on a busy machine the tower without layers may take longest."""
    ticks = itertools.count(100, -1)
    monkeypatch.setattr(latency, "milliseconds", lambda run, device: (run(), float(max(next(ticks), 1)))[1])


@pytest.fixture
def table(tiny_clip, steady):
    return measure_latency_table(tiny_clip, rounds=1, warmup=0, grid=SMALL)


def test_measured_table(tiny_clip, table):
    cost: CostModel = table
    assert cost.fixed() == table.fixed_ms > 0
    assert dense_sum(table) == pytest.approx(table.dense_ms)
    assert table.scale > 0
    assert (table.resolution, table.batch_size) == (32, 1)
    assert table.shape["layers"] == 3
    table.check(tiny_clip, batch_size=1)
    table.check(Tower.of(to_sparse(tiny_clip)), 32)


@pytest.mark.parametrize("resolution", [None, 48])
def test_measuring_leaves_model_and_generator_alone(tiny_clip, steady, resolution):
    before = {name: value.clone() for name, value in tiny_clip.state_dict().items()}
    state, seen = torch.get_rng_state(), []
    table = measure_latency_table(
        tiny_clip.vision_model,
        rounds=1,
        warmup=0,
        resolution=resolution,
        batch_size=2,
        grid=SMALL,
        on_point=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (len(SMALL.points) + 2,) * 2
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in tiny_clip.state_dict().items())
    table.check(tiny_clip, resolution, 2)


def test_pruned_model_has_the_table_of_its_dense_one(tiny_clip, table):
    plan = PruningPlan((LayerPlan((0, 2), tuple(range(8))), LayerPlan((), ()), LayerPlan((1,), tuple(range(64)))))
    pruned = slice_model(tiny_clip, plan)
    table.check(pruned)
    assert LatencyGrid.of(Tower.of(pruned).vision.config) == LatencyGrid.of(tiny_clip.config.vision_config)


def test_real_clock(make_tiny_clip):
    deep = make_tiny_clip(num_hidden_layers=12)
    plan = PruningPlan((LayerPlan((0, 2), tuple(range(8))), LayerPlan((), ()), *[LayerPlan((1,), (3,))] * 10))
    table = measure_latency_table(slice_model(deep, plan), rounds=5, warmup=2, grid=SMALL)
    table.check(deep)
    assert dense_sum(table) == pytest.approx(table.dense_ms)


def test_usual_grid(tiny_clip_config):
    config = tiny_clip_config(hidden_size=768, num_attention_heads=12, intermediate_size=3072).vision_config
    grid = LatencyGrid.of(config)
    assert grid.heads == (0, 1, 3, 6, 9, 12)
    assert grid.qk_head_dims == grid.v_head_dims == (8, 16, 32, 48, 64)
    assert grid.neurons == tuple(range(0, 3073, 384))
    assert len(grid.points) == len(set(grid.points)) == 1 + 5 * 5 * 5 + 9
    narrow = LatencyGrid.of(tiny_clip_config(hidden_size=4, intermediate_size=3).vision_config)
    assert narrow == LatencyGrid((0, 1, 2, 3, 4), (1,), (1,), (0, 1, 2, 3))


def test_table_of_a_single_width_per_head():
    grid = LatencyGrid((0, 4), (1,), (1,), (0, 64))
    table = assembled(grid)
    assert table.attention(0, 1, 1) < table.attention(2, 1, 1) < table.attention(4, 1, 1)


def test_grid_points_are_exact_and_those_between_interpolated():
    table = assembled()
    for h, q, v in itertools.product(*map(range, (4, 3, 3))):
        widths = FINE.heads[h], FINE.qk_head_dims[q], FINE.v_head_dims[v]
        assert table.attention(*widths) == pytest.approx(table.attention_ms[h][q][v])
    assert table.attention(0, 0, 0) == table.attention(0, 8, 8) == table.attention_ms[0][0][0]
    assert table.mlp(24) == pytest.approx((table.mlp(16) + table.mlp(32)) / 2)
    assert table.attention(3, 8, 8) == pytest.approx((table.attention(2, 8, 8) + table.attention(4, 8, 8)) / 2)
    assert table.attention(4, 6, 8) == pytest.approx((table.attention(4, 4, 8) + table.attention(4, 8, 8)) / 2)
    assert table.attention(4, 1, 1) == table.attention(4, 2, 2)  # below the grid


def test_equal_widths_are_not_mixed_with_unequal_ones():
    slow = {p: 1.0 + p[1] * max(p[2], p[3]) * (1.5 if p[2] != p[3] else 1) for p in FINE.points}
    table = assembled(times=slow)
    between = table.attention(4, 6, 6)
    assert between == pytest.approx((table.attention(4, 4, 4) + table.attention(4, 8, 8)) / 2)
    assert between < table.attention(4, 4, 8)


def test_noise_cannot_make_a_smaller_layer_dearer():
    times = {p: 1.0 + p[1] * max(p[2] + p[3], 1) for p in FINE.points} | {("mlp", 16, 0, 0): 1e3}
    table = assembled(times=times | {("attention", 1, 2, 2): 1e3})
    assert table.mlp(64) == table.mlp(32) == table.mlp(16) > table.mlp(0)
    assert table.attention(4, 8, 8) == table.attention(1, 2, 2) > table.attention(0, 0, 0)
    assert dense_sum(table) == pytest.approx(table.dense_ms)


times = st.lists(st.floats(0.001, 100), min_size=len(FINE.points), max_size=len(FINE.points))
width = st.integers(1, 8)


@settings(max_examples=60, deadline=None)
@given(times, st.tuples(st.integers(0, 4), width, width), st.tuples(st.integers(0, 4), width, width))
def test_cost_never_falls_when_a_width_grows(times, one, other):
    table = assembled(times=dict(zip(FINE.points, times, strict=True)))
    smaller, larger = (tuple(map(pick, one, other)) for pick in (min, max))
    slack = 1e-9 * table.dense_ms
    assert 0 <= table.attention(*smaller) <= table.attention(*larger) + slack
    curve = np.array([table.mlp(neurons) for neurons in range(65)])
    assert (np.diff(curve) >= -slack).all()
    assert dense_sum(table) == pytest.approx(table.dense_ms)


def test_saved_table_comes_back(tmp_path, table):
    path = tmp_path / "new" / "table.json"
    table.save(path)
    assert LatencyTable.load(path) == table
    assert json.loads(path.read_text())["schema"] == SCHEMA
    replace(table, batch_size=7).save(path)
    assert LatencyTable.load(path).batch_size == 7
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


def without(name):
    return lambda values: {key: value for key, value in values.items() if key != name}


def changed(name, value):
    return lambda values: values | {name: value}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda values: [], "schema None"),
        (changed("schema", 99), "schema 99"),
        (without("grid"), "damaged"),
        (without("mlp_ms"), "damaged"),
        (without("scale"), "damaged"),
        (changed("extra", 1), "damaged"),
        (changed("grid", []), "damaged"),
        (changed("shape", 3), "damaged"),
        (changed("fixed_ms", None), "fixed_ms"),
        (changed("fixed_ms", "fast"), "damaged"),
        (changed("dense_ms", -1.0), "dense_ms"),
        (changed("mlp_ms", [1.0, 2.0]), "mlp_ms"),
        (changed("mlp_ms", [1.0, 3.0, 2.0]), "mlp_ms"),
        (changed("mlp_ms", [1.0, math.nan, 2.0]), "mlp_ms"),
        (changed("mlp_ms", [1.0, [2.0], 2.0]), "damaged"),
        (changed("attention_ms", [[[1.0]]]), "attention_ms"),
    ],
)
def test_damaged_values_are_refused(tmp_path, table, damage, message):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(damage(table.to_dict())))
    with pytest.raises(ValueError, match=f"{message}.*latency-table MODEL"):
        LatencyTable.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"schema": 1'])
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "table.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"no valid JSON.*latency-table MODEL"):
        LatencyTable.load(path)


def test_absent_file(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(FileNotFoundError, match=r"There is no latency table.*latency-table MODEL"):
            LatencyTable.load(path)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("device", "processor", "Z80"),
        ("device", "accelerator", "H9000"),
        ("device", "threads", 77),
        ("device", "torch", "2.999.0"),
        ("device", "dtype", "float16"),
        ("shape", "hidden_size", 48),
        ("shape", "layers", 12),
        ("shape", "heads", 2),
        ("shape", "head_dim", 16),
        ("shape", "intermediate_size", 65),
        ("shape", "patch_size", 16),
        ("shape", "hidden_act", "relu"),
        ("shape", "attention", "eager"),
    ],
)
def test_every_mismatch_is_refused(tiny_clip, part, name, value):
    vision = tiny_clip.vision_model
    here = {"device": device_of(vision), "shape": shape_of(vision)}
    assembled(where=WHERE | here).check(tiny_clip)
    other = assembled(where=WHERE | here | {part: here[part] | {name: value}})
    with pytest.raises(ValueError, match=rf"another {name} \(.*holds only.*latency-table MODEL") as refused:
        other.check(tiny_clip)
    assert repr(value) in str(refused.value) or "2.999" in str(refused.value)


def test_mismatches_of_input_and_precision(tiny_clip):
    vision = tiny_clip.vision_model
    table = assembled(where=WHERE | {"device": device_of(vision), "shape": shape_of(vision)})
    patch = replace(table, device=table.device | {"torch": ".".join([*torch.__version__.split(".")[:2], "99"])})
    patch.check(tiny_clip, 32, 1)
    with pytest.raises(ValueError, match=r"resolution \(32, here 48\)"):
        table.check(tiny_clip, 48)
    with pytest.raises(ValueError, match=r"batch_size \(1, here 8\)"):
        table.check(tiny_clip, batch_size=8)
    with pytest.raises(ValueError, match=r"dtype \('float32', here 'bfloat16'\)"):
        table.check(tiny_clip.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.mlp(65), "neurons is 65"),
        (lambda t: t.mlp(-1), "neurons is -1"),
        (lambda t: t.attention(5, 8, 8), "heads is 5"),
        (lambda t: t.attention(4, 9, 8), "qk_head_dim is 9"),
        (lambda t: t.attention(4, 8, 9), "v_head_dim is 9"),
    ],
)
def test_widths_outside_the_table(call, message):
    with pytest.raises(ValueError, match=f"{message}. The latency table covers"):
        call(assembled())


@pytest.mark.parametrize(
    "wrong", [{"heads": (1, 2)}, {"neurons": (0,)}, {"qk_head_dims": (0, 8)}, {"v_head_dims": (8, 4)}]
)
def test_bad_grids(wrong):
    with pytest.raises(ValueError, match=f"The grid has {next(iter(wrong))}="):
        replace(SMALL, **wrong)


@pytest.mark.parametrize(
    "wrong", [{"resolution": 7}, {"batch_size": 0}, {"rounds": 0}, {"warmup": -1}, {"rounds": 1.5}]
)
def test_bad_arguments(tiny_clip, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is "):
        measure_latency_table(tiny_clip, **{"rounds": 1, "grid": SMALL, **wrong})


def test_foreign_models_grids_and_clocks(tiny_clip):
    with pytest.raises(TypeError, match="The model is a Linear"):
        measure_latency_table(torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="The grid's neurons end at 60"):
        measure_latency_table(tiny_clip, grid=replace(SMALL, neurons=(0, 60)))
    with pytest.raises(RuntimeError, match="Measure again"):
        assembled(fixed_ms=2.0, dense_ms=1.0)
