"""The commands `prune-elastic` and `autotune`: what they write and what they say."""

import json

from typer.testing import CliRunner

import hf_opentrans.cli.elastic  # noqa: F401 (registers its commands)
from hf_opentrans.cli import app
from hf_opentrans.models.modeling_elastic_clip import ElasticCLIPModel
from hf_opentrans.pruning.elastic_report import ElasticReport


def run(*arguments):
    """Return exit code, standard output and the error on one line."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())


def test_a_model_is_pruned_and_tuned(tmp_path, tiny_clip_folder, images):
    output, target = tmp_path / "elastic", tmp_path / "figures.json"
    options = ["--images", images, "--output", output, "--budgets", "0.6,0.8", "--json", target]
    code, out, error = run("prune-elastic", tiny_clip_folder, *options)
    assert code == 0, error
    assert "calibration images give" in error  # the warning, in one line
    report = ElasticReport.load(output)
    assert [entry.budget for entry in report.budgets] == [0.8, 0.6]
    assert f"{report.size_ratio:.2f} times the largest tower" in out
    assert f"{report.budgets[1].cosine_patches:.4f}" in out
    assert json.loads(target.read_text())["report"] == json.loads(json.dumps(report.to_dict()))
    assert ElasticCLIPModel.from_pretrained(output).budgets == (0.8, 0.6)
    tuned = tmp_path / "tuned.json"
    options = ["--max-latency-ms", 1e6, "--resolutions", "32,40", "--repeats", 1, "--images", images, "--json", tuned]
    code, out, error = run("autotune", output, *options)
    assert code == 0, error
    assert "budget 0.8 at 40 pixels, slide" in out
    assert json.loads(tuned.read_text())["settings"]["resolution"] == 40
    code, _, error = run("autotune", output, "--max-latency-ms", 1e-6, "--repeats", 1)
    assert (code, "No setting takes 1e-06 ms or less" in error) == (1, True)


def test_mistakes_end_in_one_sentence(tmp_path, tiny_clip_folder, images):
    options = ["--images", images, "--output", tmp_path / "new"]
    code, _, error = run("prune-elastic", tiny_clip_folder, *options, "--budgets", "0.6,many")
    assert (code, "--budgets is '0.6,many'. It must be numbers" in error) == (2, True)
    code, _, error = run("prune-elastic", tiny_clip_folder, *options, "--budgets", "0.6,1.5")
    assert (code, "They must be shares in (0, 1]" in error) == (2, True)
    code, _, error = run("autotune", tiny_clip_folder, "--max-latency-ms", 5)
    assert (code, "holds a model of type 'clip'" in error) == (1, True)
    assert not (tmp_path / "new").exists()
