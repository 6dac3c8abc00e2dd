"""Published methods against their formulas, written a second time with numpy."""

import copy
import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModelWithProjection

from hf_opentrans.pruning.allocation import TOLERANCE
from hf_opentrans.pruning.baselines import (
    Scores,
    allocate_baseline,
    baseline_menus,
    coordinate_maps,
    score_layer,
    zero_smallest,
)
from hf_opentrans.pruning.plan import PruningConfig
from hf_opentrans.pruning.prune import make_budget
from hf_opentrans.pruning.statistics import CovarianceStatistics
from hf_opentrans.pruning.surgery import HeadMaps, to_sparse
from hf_opentrans.pruning.tower import Tower

STATISTICAL = ("vbp", "flap", "corp", "corp-refit")
WEIGHTS_ONLY = ("random", "magnitude", "magnitude-compensated")
HEADS, NEURONS, LAYERS = 4, 64, 3


@pytest.fixture(scope="module")
def dense(tiny_clip_config):
    torch.manual_seed(0)
    return to_sparse(CLIPVisionModelWithProjection(tiny_clip_config().vision_config)).requires_grad_(False)


@pytest.fixture(scope="module")
def tower(dense):
    return Tower.of(dense)


@pytest.fixture
def own_tower(dense):
    """Return a copy whose weights a test may change."""
    return Tower.of(copy.deepcopy(dense))


def make_rows(width, seed, count=90):
    """Return rows of correlated columns with means and scales of their own."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) / width**0.5
    return (rows * rng.uniform(0.2, 2, width) + rng.normal(size=width)).astype(np.float32)


def gather(rows):
    """Return statistics of the rows, split into two parts as calibration does."""
    parts = (CovarianceStatistics(rows.shape[1]), CovarianceStatistics(rows.shape[1]))
    parts[0].update(torch.from_numpy(rows[:60]))
    parts[1].update(torch.from_numpy(rows[60:]))
    return parts


@functools.cache
def rows_of_layer(layer):
    widths = {"heads": 32, "neurons": NEURONS, "queries": 32, "keys": 32}
    return {kind: make_rows(width, 10 * layer + i) for i, (kind, width) in enumerate(widths.items())}


def scores_of(tower, config):
    found = []
    for layer in range(len(tower.layers)):
        statistics = {kind: gather(rows) for kind, rows in rows_of_layer(layer).items()}
        found += score_layer(tower, layer, statistics if config.method in STATISTICAL else {}, config)
    return found


def weights_of(tower, layer):
    block = tower.layers[layer]
    modules = {name: getattr(block.self_attn, f"{name}_proj") for name in ("q", "k", "v", "out")}
    modules |= {"fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
    return {name: module.weight.detach().double().numpy() for name, module in modules.items()}


def expected_scores(tower, layer, kind, method):
    """Return the formula of the module's table."""
    weights, rows = weights_of(tower, layer), {k: r.astype(float) for k, r in rows_of_layer(layer).items()}
    if method.startswith("magnitude"):
        if kind == "neurons":
            return [np.linalg.norm([*weights["fc1"][i], *weights["fc2"][:, i]]) for i in range(NEURONS)]
        parts = [np.split(weights[name], HEADS) for name in ("q", "k", "v")] + [np.split(weights["out"].T, HEADS)]
        return [np.linalg.norm(np.concatenate([part[h].ravel() for part in parts])) for h in range(HEADS)]
    inputs, outgoing = rows[kind], weights["fc2" if kind == "neurons" else "out"]
    if method == "vbp":
        return inputs.var(axis=0)
    if method == "flap":
        single = inputs.var(axis=0) * np.linalg.norm(outgoing, axis=0) ** 2
        return single if kind == "neurons" else [part.sum() for part in np.split(single, HEADS)]
    return (inputs**2).mean(axis=0) * (inputs > 0).mean(axis=0)


CASES = [
    *itertools.product(("magnitude", "magnitude-compensated", "flap"), ("heads", "neurons")),
    *itertools.product(("vbp", "corp", "corp-refit"), ("neurons",)),
]


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_scores_and_orders_follow_the_formula(tower, method, kind):
    config = PruningConfig(method=method)
    scores = scores_of(tower, config)
    assert [(s.layer, s.kind) for s in scores] == list(itertools.product(range(LAYERS), ("heads", "neurons")))
    menus = baseline_menus(tower, scores, config)
    for layer in range(LAYERS):
        index = 2 * layer + (kind == "neurons")
        expected = np.array(expected_scores(tower, layer, kind, method))
        units = scores[index].units.numpy()
        if method.startswith("magnitude"):
            units = np.sqrt(units)  # the order of squared norms is that of norms
        np.testing.assert_allclose(units, expected, rtol=1e-4)
        assert list(menus[index].order) == np.argsort(expected).tolist()


@pytest.mark.parametrize("method", ["corp", "corp-refit"])
def test_corp_ranks_query_key_coordinates_by_both_energies(tower, method):
    for score in scores_of(tower, PruningConfig(method=method)):
        if score.kind == "neurons":
            assert score.dims is None
            continue
        rows = {k: r.astype(float) for k, r in rows_of_layer(score.layer).items()}
        expected = (rows["queries"] ** 2).mean(0) * (rows["keys"] ** 2).mean(0)
        assert score.dims is not None
        np.testing.assert_allclose(score.dims.numpy(), expected.reshape(HEADS, 8), rtol=1e-4)


def test_random_orders_are_seeded_and_differ_by_seed_layer_and_kind(tower):
    def orders(seed):
        config = PruningConfig(method="random", seed=seed)
        torch.rand(seed + 3)  # the global generator has no say
        return [menu.order for menu in baseline_menus(tower, scores_of(tower, config), config)]

    assert orders(0) == orders(0)
    assert orders(0) != orders(1)
    neurons = [order for seed in range(3) for order in orders(seed)[1::2]]
    assert len(set(neurons)) == 9
    assert all(sorted(order) == list(range(NEURONS)) for order in neurons)
    scores = scores_of(tower, PruningConfig(method="random"))
    values = torch.cat([score.units for score in scores])
    assert len(values.unique()) == len(values)


def test_flap_thresholds_are_z_scores_of_each_sublayer(tower):
    config = PruningConfig(method="flap", round_neurons=1, min_neurons=0.0)
    for menu in baseline_menus(tower, scores_of(tower, config), config):
        scores = np.sort(expected_scores(tower, menu.layer, menu.kind, "flap"))
        z = (scores - scores.mean()) / scores.std(ddof=1)
        dense = len(scores)
        assert menu.sizes[0].error < z[0]
        for size in menu.sizes[1:]:
            assert size.error == pytest.approx(z[dense - size.units - 1], rel=1e-3)  # the largest that is gone


def test_vbp_thresholds_are_the_variances_themselves(tower):
    config = PruningConfig(method="vbp", round_neurons=8)
    for menu in baseline_menus(tower, scores_of(tower, config), config)[1::2]:
        variances = np.sort(expected_scores(tower, menu.layer, "neurons", "vbp"))
        assert [size.units for size in menu.sizes] == [64, 56, 48, 40, 32, 24, 16, 8]
        for size in menu.sizes[1:]:
            assert size.error == pytest.approx(variances[NEURONS - size.units - 1], rel=1e-4)


@pytest.mark.parametrize("method", ["magnitude", "corp"])
def test_thresholds_of_uniform_methods_are_removed_shares(tower, method):
    config = PruningConfig(method=method, protect_last_attention=False)
    for menu in baseline_menus(tower, scores_of(tower, config), config):
        for size in menu.sizes:
            assert size.error == pytest.approx(
                1
                - (size.qk_head_dim / 8 if method == "corp" and menu.kind == "heads" else size.units / len(menu.order))
            )


@pytest.mark.parametrize("method", [*STATISTICAL, *WEIGHTS_ONLY])
@pytest.mark.parametrize("protect", [True, False])
def test_sizes_respect_roundings_floors_and_what_the_method_touches(tower, method, protect):
    config = PruningConfig(
        method=method, min_heads=2, min_neurons=0.4, round_neurons=6, round_head_dim=3, protect_last_attention=protect
    )
    for menu in baseline_menus(tower, scores_of(tower, config), config):
        units = [size.units for size in menu.sizes]
        if menu.kind == "neurons":
            assert units == [64, 60, 54, 48, 42, 36, 30]  # 0.4 * 64 = 25.6, rounded up to a multiple of 6
            continue
        is_protected = protect and menu.layer == LAYERS - 1
        shapes = {(size.qk_head_dim, size.v_head_dim) for size in menu.sizes}
        if method.startswith("corp"):
            assert units == [4] * (1 if is_protected else 3)
            assert shapes == ({(8, 8)} if is_protected else {(8, 8), (6, 8), (3, 8)})
        else:
            assert units == ([4] if is_protected or method == "vbp" else [4, 3, 2])
            assert shapes == {(8, 8)}


# --- how the budget is spread --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*STATISTICAL, *WEIGHTS_ONLY])
@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("keep", [0.9, 0.75, 0.6])
def test_the_budget_is_met_from_below(tower, method, unit, keep):
    config = PruningConfig(method=method, keep=keep, unit=unit, protect_last_attention=False)
    try:
        budget = make_budget(tower, config)
    except ValueError:
        assert method == "vbp"  # neurons alone cannot reach the smallest budget
        return
    menus = baseline_menus(tower, scores_of(tower, config), config)
    sizes = allocate_baseline(menus, budget, config)
    assert all(size in menu.sizes for menu, size in zip(menus, sizes, strict=True))
    assert keep - TOLERANCE <= budget.share(menus, sizes) <= keep + 1e-8


@pytest.mark.parametrize("keep", [0.95, 0.8, 0.7])
def test_vbp_removes_the_smallest_variances_of_all_layers(tower, keep):
    config = PruningConfig(method="vbp", keep=keep, round_neurons=1)
    budget = make_budget(tower, config)
    menus = baseline_menus(tower, scores_of(tower, config), config)
    sizes = allocate_baseline(menus, budget, config)
    floor = 7  # a tenth of 64, rounded up
    candidates = []
    for layer in range(LAYERS):
        variances = expected_scores(tower, layer, "neurons", "vbp")
        ranked = np.argsort(variances)[: NEURONS - floor]
        candidates += [(variances[i], layer, int(i)) for i in ranked]
    price = budget.cost.mlp(1)
    count = int(np.ceil((1 - keep) * budget.dense / price - 1e-6))
    expected = {(layer, unit) for _, layer, unit in sorted(candidates)[:count]}
    gone = set()
    for menu, size in zip(menus, sizes, strict=True):
        if menu.kind == "neurons":
            gone |= {(menu.layer, unit) for unit in set(menu.order) - set(menu.kept(size))}
    assert gone == expected
    assert len({size.units for menu, size in zip(menus, sizes, strict=True) if menu.kind == "neurons"}) > 1


@pytest.mark.parametrize("keep", [0.9, 0.75, 0.6])
def test_flap_cuts_all_sublayers_at_one_z_score(tower, keep):
    """What goes lies below the first threshold that meets the budget; only what the rest pays for comes back."""
    config = PruningConfig(method="flap", keep=keep, round_neurons=1, protect_last_attention=False)
    budget = make_budget(tower, config)
    menus = baseline_menus(tower, scores_of(tower, config), config)
    sizes = allocate_baseline(menus, budget, config)
    ranked = {}
    for menu in menus:
        scores = np.array(expected_scores(tower, menu.layer, menu.kind, "flap"))
        z = (scores - scores.mean()) / scores.std(ddof=1)
        removable = len(z) - (1 if menu.kind == "heads" else 7)
        ranked[menu.layer, menu.kind] = np.sort(z)[:removable]
    prices = {"heads": budget.cost.attention(1, 8, 8), "neurons": budget.cost.mlp(1)}

    def removed(threshold):
        return {key: int((z <= threshold + 1e-6).sum()) for key, z in ranked.items()}

    def saved(counts):
        return sum(count * prices[kind] for (_, kind), count in counts.items())

    to_save = (1 - keep) * budget.dense
    thresholds = np.sort(np.concatenate(list(ranked.values())))
    limit = removed(next(t for t in thresholds if saved(removed(t)) >= to_save - 1e-6))
    counts = {(m.layer, m.kind): len(m.order) - s.units for m, s in zip(menus, sizes, strict=True)}
    assert all(counts[key] <= limit[key] for key in counts)
    assert to_save - 1e-3 <= saved(counts)
    assert all(saved(counts) - prices[kind] < to_save for (_, kind), count in counts.items() if count)
    if saved(limit) < to_save + prices["neurons"]:
        assert counts == limit


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_uniform_methods_keep_the_same_share_everywhere(tower, method, share):
    """A budget that one share of all sublayers spends exactly gives every one of them that share."""
    config = PruningConfig(method=method, protect_last_attention=False)
    dense = make_budget(tower, config)
    keep = (dense.cost.fixed() + share * (dense.dense - dense.cost.fixed())) / dense.dense
    config = replace(config, keep=keep)
    menus = baseline_menus(tower, scores_of(tower, config), config)
    sizes = allocate_baseline(menus, make_budget(tower, config), config)
    assert [size.units / len(menu.order) for menu, size in zip(menus, sizes, strict=True)] == [share] * 6


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_corp_keeps_the_same_share_of_neurons_and_query_key_coordinates(tower, share):
    config = PruningConfig(method="corp", protect_last_attention=True)
    cost = make_budget(tower, config)
    qk, neurons = int(8 * share), int(64 * share)
    spent = cost.cost.fixed() + 2 * cost.cost.attention(4, qk, 8) + cost.cost.attention(4, 8, 8)
    config = replace(config, keep=(spent + 3 * cost.cost.mlp(neurons)) / cost.dense)
    menus = baseline_menus(tower, scores_of(tower, config), config)
    sizes = allocate_baseline(menus, make_budget(tower, config), config)
    assert [size.units for size in sizes] == [4, neurons] * 3
    assert [size.qk_head_dim for size in sizes[::2]] == [qk, qk, 8]


@pytest.mark.parametrize("keep", [0.8, 0.7, 0.6])
def test_uniform_methods_keep_the_common_share_at_least(tower, keep):
    """The rest of the budget may enlarge sublayers beyond the common share, and never makes one smaller."""
    config = PruningConfig(method="magnitude", keep=keep)
    budget = make_budget(tower, config)
    menus = baseline_menus(tower, scores_of(tower, config), config)
    sizes = allocate_baseline(menus, budget, config)
    widths = [[size.units for size in menu.sizes] for menu in menus]

    def common(share):
        return [min((w for w in all_ if w / all_[0] >= share - 1e-9), default=all_[0]) for all_ in widths]

    def spent(units):
        heads = sum(budget.cost.attention(n, 8, 8) for n in units[::2])
        return budget.cost.fixed() + heads + sum(budget.cost.mlp(n) for n in units[1::2])

    shares = sorted({w / all_[0] for all_ in widths for w in all_}, reverse=True)
    expected = next(common(s) for s in shares if spent(common(s)) <= budget.dense * keep + 1e-3)
    assert all(size.units >= least for size, least in zip(sizes, expected, strict=True))


def test_what_a_method_cannot_reach_raises(tower):
    config = PruningConfig(method="vbp", keep=0.8)
    budget = make_budget(tower, config)
    menus = baseline_menus(tower, scores_of(tower, config), config)
    message = r"method='vbp' cannot meet keep=0\.3 of the macs within 0\.02 .*lower floor, or a smaller round_neurons"
    with pytest.raises(ValueError, match=message):
        allocate_baseline(menus, replace(budget, keep=0.3), config)
    coarse = [replace(menu, sizes=(menu.sizes[0], menu.sizes[-1])) for menu in menus]
    with pytest.raises(ValueError, match="cannot meet"):
        allocate_baseline(coarse, replace(budget, keep=0.97), config)


# --- coordinate maps -----------------------------------------------------------------------------------------------


def logits(queries, keys, maps=None):
    """Return attention logits of shape `(heads, tokens, tokens)` less their mean over keys, which softmax ignores."""
    queries, keys = (torch.from_numpy(r).double().unflatten(1, (HEADS, 8)).transpose(0, 1) for r in (queries, keys))
    if maps is not None:
        queries, keys = queries @ maps.query.mT, keys @ maps.key.mT
    products = queries @ keys.mT
    return products - products.mean(-1, keepdim=True)


def fit_maps(tower, queries, keys, width, *, ridge=1e-3, dims=None):
    statistics = {"queries": gather(queries), "keys": gather(keys)}
    scores = Scores(0, "heads", torch.zeros(HEADS), dims)
    return coordinate_maps(tower, 0, scores, statistics, width, ridge)


def dropped(dims, width):
    """Return maps that only select the strongest coordinates."""
    chosen = dims.argsort(descending=True)[:, :width].sort().values
    select = torch.eye(8, dtype=torch.float64)[chosen]
    return HeadMaps(query=select, key=select)


def energies(queries, keys):
    dims = (queries.astype(float) ** 2).mean(0) * (keys.astype(float) ** 2).mean(0)
    return torch.from_numpy(dims).reshape(HEADS, 8)


def test_full_width_changes_nothing(tower):
    queries, keys = make_rows(32, 1), make_rows(32, 2)
    maps = fit_maps(tower, queries, keys, 8, dims=energies(queries, keys))
    assert maps.query is not None
    assert maps.query.shape == (HEADS, 8, 8)
    assert maps.value is None
    assert maps.output is None
    torch.testing.assert_close(logits(queries, keys, maps), logits(queries, keys))


@pytest.mark.parametrize("width", [3, 5, 7])
def test_lost_coordinates_that_follow_from_kept_ones_cost_nothing(tower, width):
    """Queries depend linearly on the kept ones; keys up to a constant, which softmax never sees."""
    rng = np.random.default_rng(width)
    queries, keys = (make_rows(32, seed).reshape(-1, HEADS, 8).astype(float) for seed in (3, 4))
    dims, kept_by_head = torch.zeros(HEADS, 8, dtype=torch.float64), []
    for head in range(HEADS):
        kept = np.sort(rng.permutation(8)[:width])
        gone = np.setdiff1d(np.arange(8), kept)
        queries[:, head, gone] = queries[:, head, kept] @ rng.normal(size=(width, 8 - width))
        keys[:, head, gone] = keys[:, head, kept] @ rng.normal(size=(width, 8 - width)) + rng.normal(size=8 - width)
        dims[head, kept] = 1 + torch.rand(width, dtype=torch.float64)
        kept_by_head.append(kept)
    queries, keys = (rows.reshape(-1, 32).astype(np.float32) for rows in (queries, keys))
    maps = fit_maps(tower, queries, keys, width, ridge=1e-9, dims=dims)
    assert maps.query is not None
    assert maps.key is not None
    for head, kept in enumerate(kept_by_head):
        assert maps.key[head].nonzero().tolist() == [[i, int(column)] for i, column in enumerate(kept)]
        assert maps.query[head].any(0).nonzero().flatten().tolist() == kept.tolist()
    expected = logits(queries, keys)
    assert (logits(queries, keys, maps) - expected).norm() / expected.norm() < 1e-3
    assert (logits(queries, keys, dropped(dims, width)) - expected).norm() / expected.norm() > 0.1


@pytest.mark.parametrize("width", [2, 4, 6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_fit_beats_dropping(tower, width, seed):
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(2, 200, 12))  # shared by all coordinates, and noise of their own
    queries, keys = (x @ rng.normal(size=(12, 32)) / 3 + 0.3 * rng.normal(size=(200, 32)) for x in latent)
    queries, keys = queries.astype(np.float32), keys.astype(np.float32)
    dims = energies(queries, keys)
    expected = logits(queries, keys)
    fitted = logits(queries, keys, fit_maps(tower, queries, keys, width, dims=dims)) - expected
    plain = logits(queries, keys, dropped(dims, width)) - expected
    assert (fitted.square().sum((1, 2)) <= plain.square().sum((1, 2))).all()
    assert fitted.norm() < 0.99 * plain.norm()


def test_the_form_is_the_least_squares_solution(tower):
    """Against a brute-force regression of all logits on all products of kept coordinates."""
    queries, keys = make_rows(32, 5, 40), make_rows(32, 6, 40)
    dims = energies(queries, keys)
    statistics = {"queries": gather(queries), "keys": gather(keys)}
    maps = coordinate_maps(tower, 0, Scores(0, "heads", torch.zeros(HEADS), dims), statistics, 3, ridge=1e-9)
    assert maps.query is not None
    for head in range(HEADS):
        kept = np.sort(np.argsort(-dims[head].numpy())[:3])
        q, k = (r.reshape(-1, HEADS, 8)[:, head].astype(float) for r in (queries, keys))
        k = k - k.mean(0)
        products = np.einsum("ia,jb->ijab", q[:, kept], k[:, kept]).reshape(-1, 9)
        form = np.linalg.lstsq(products, (q @ k.T).ravel(), rcond=None)[0].reshape(3, 3)
        np.testing.assert_allclose(maps.query[head][:, kept].numpy(), form.T, rtol=1e-3, atol=1e-4)


def test_without_scores_the_energy_of_the_queries_chooses(tower):
    queries, keys = make_rows(32, 7), make_rows(32, 8)
    maps = fit_maps(tower, queries, keys, 3)
    assert maps.key is not None
    energy = (queries.astype(float) ** 2).mean(0).reshape(HEADS, 8)
    for head in range(HEADS):
        expected = np.sort(np.argsort(-energy[head])[:3]).tolist()
        assert maps.key[head].nonzero()[:, 1].tolist() == expected


# --- single weights ------------------------------------------------------------------------------------------------


def matrices_of(tower):
    names = [n for n, _ in tower.vision.encoder.named_parameters() if n.endswith("weight") and "norm" not in n]
    return {name: dict(tower.vision.encoder.named_parameters())[name] for name in names}


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("keep", [0.9, 0.6, 0.35])
def test_the_smallest_weights_of_all_layers_become_zero(own_tower, unit, keep):
    config = PruningConfig(method="imp", unit=unit, keep=keep)
    budget = make_budget(own_tower, config)
    before = {name: weight.clone() for name, weight in matrices_of(own_tower).items()}
    others = {n: p.clone() for n, p in own_tower.vision.named_parameters() if n.removeprefix("encoder.") not in before}
    assert len(before) == 6 * LAYERS
    zeros = zero_smallest(own_tower, budget)
    after = matrices_of(own_tower)
    price = 17 if unit == "macs" else 1  # every weight is used by 17 tokens, and stored once
    assert zeros == int(np.ceil((1 - keep) * budget.dense / price - 1e-6))
    gone = torch.cat([before[name][weight == 0].abs() for name, weight in after.items()])
    kept = torch.cat([before[name][weight != 0].abs() for name, weight in after.items()])
    assert len(gone) == zeros
    assert gone.max() < kept.min()
    assert all(torch.equal(weight[weight != 0], before[name][weight != 0]) for name, weight in after.items())
    assert len({round(float((weight == 0).float().mean()), 3) for weight in after.values()}) > 1  # no equal shares
    parameters = dict(own_tower.vision.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in others.items())


def test_keep_one_sets_nothing_to_zero(own_tower):
    before = {name: weight.clone() for name, weight in matrices_of(own_tower).items()}
    assert zero_smallest(own_tower, make_budget(own_tower, PruningConfig(method="imp", keep=1.0))) == 0
    assert all(torch.equal(weight, before[name]) for name, weight in matrices_of(own_tower).items())


def test_zeros_save_no_latency(own_tower):
    budget = replace(make_budget(own_tower, PruningConfig(method="imp")), unit="latency")
    with pytest.raises(
        ValueError, match=r"method='imp' only sets weights to zero.*no latency.*unit='macs' or 'params'"
    ):
        zero_smallest(own_tower, budget)


@pytest.mark.parametrize("unit", ["macs", "params"])
def test_a_budget_below_what_no_weight_at_all_costs_raises(own_tower, unit):
    budget = make_budget(own_tower, PruningConfig(method="imp", unit=unit, keep=0.01))
    before = {name: weight.clone() for name, weight in matrices_of(own_tower).items()}
    with pytest.raises(ValueError, match=rf"keep=0\.01 of the {unit} is below what method='imp' can reach") as caught:
        zero_smallest(own_tower, budget)
    assert all(torch.equal(weight, before[name]) for name, weight in matrices_of(own_tower).items())
    count = sum(weight.numel() for weight in before.values())
    lowest = 1 - count * (17 if unit == "macs" else 1) / budget.dense
    advice = float(str(caught.value).split("Raise keep to ")[1].split()[0])
    assert advice == pytest.approx(lowest, abs=1.1e-3)
    assert zero_smallest(own_tower, replace(budget, keep=lowest + 1e-12)) == count  # every single one
