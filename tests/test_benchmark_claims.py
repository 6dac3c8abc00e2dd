"""Claims: the paper's figures beside ours, paired over seeds."""

import json
from pathlib import Path

import pytest

from hf_opentrans.benchmark_claims import claim_text

RESULTS = Path(__file__).resolve().parents[1] / "model_cards" / "results"
PAPER = {"source": "A paper.", "rows": [{"setting": "COCO", "scores": {"dense": 50.0, "obs": 45.5}, "cost": "half"}]}
TRANSFER = {
    "framework": "dense-clip",
    "trained": "",
    "pixel_accuracy": 0.9,
    "macs": 0,
    "params": 0,
    "training_macs": 0,
}


def lines_of(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def write(folder, rows, **settings):
    values = {"rows": rows, "settings": {"model": "some/clip", "dataset": "d/scenes"} | settings}
    (folder / "study.json").write_text(json.dumps(values), encoding="utf-8")
    return {"claim": "c", "kind": "pruning", "paper": PAPER, "measured": ["study.json"]}


def transfer_rows(ours, random):
    found = [
        TRANSFER | {"method": "dense", "keep": 1.0, "seed": s, "seen": 0.5, "unseen": 0.25, "tower_macs": 100}
        for s in (0, 1)
    ]
    for method, scores in (("obs", ours), ("random", random)):
        for seed, score in scores.items():
            row = {"method": method, "keep": 0.5, "seed": seed, "seen": score, "unseen": score / 2, "tower_macs": 40}
            found.append(TRANSFER | row)
    return found


def test_means_and_paired_differences(tmp_path):
    claim = write(tmp_path, transfer_rows({0: 0.4, 1: 0.6}, {1: 0.5, 0: 0.2}))
    header, _, paper, seen, unseen = lines_of(claim_text(claim, tmp_path))
    assert header[:5] == ["measured by", "setting", "dense", "subnetwork", "random"]
    assert paper == ["paper", "COCO", "50.0", "45.5", "-", "-", "half"]
    # 0.2 and 0.1 apart: the interval of two seeds is wide.
    assert seen[:6] == [
        "ours",
        "dense-clip, clip on scenes: mIoU, seen names",
        "50.0",
        "50.0",
        "35.0",
        "+15.0 (-48.5 to +78.5)",
    ]
    assert seen[6] == "40% of the tower's MACs, really removed"
    assert unseen[2:5] == ["25.0", "25.0", "17.5"]


def test_a_clear_difference_is_marked(tmp_path):
    claim = write(tmp_path, transfer_rows({0: 0.5, 1: 0.61}, {0: 0.2, 1: 0.3}))
    assert lines_of(claim_text(claim, tmp_path))[3][5].endswith("*")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("claim-*.json")), ids=lambda path: path.stem)
def test_published_claims_name_their_sources(path):
    values = json.loads(path.read_text(encoding="utf-8"))
    text = claim_text(values, RESULTS)
    assert "CVPR 2024" in text
    sources = {line[0] for line in lines_of(text)[2:]}
    assert sources == {"paper", "ours"}
    assert all(f"results/{name}" in text for name in values["measured"])


def test_unknown_kinds_and_studies_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`kind` is 'magic'"):
        claim_text({"kind": "magic"}, tmp_path)
    claim = write(tmp_path, [{"ms_before": 3}])
    with pytest.raises(ValueError, match="is no result of `benchmark pruning`"):
        claim_text(claim, tmp_path)
