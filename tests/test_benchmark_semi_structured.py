"""`benchmark semi-structured`: rows, going on, the table, what is refused."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from hf_opentrans.benchmark_semi_structured import VARIANTS, SemiStructuredRow
from hf_opentrans.benchmark_tables import result_table
from hf_opentrans.cli import app
from hf_opentrans.cli._common import repeat_options

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration images give:UserWarning")


def _benchmark(*arguments):
    return CliRunner().invoke(app, repeat_options(["benchmark", "semi-structured", *map(str, arguments)]))


@pytest.fixture
def data(write_segmentation_folder, tiny_images):
    """Return a folder of three images whose left half is sky and right half is wall."""

    def mask(image, index):
        classes = np.zeros((image.height, image.width), dtype=np.uint8)
        classes[:, image.width // 2 :] = 1
        return classes

    return write_segmentation_folder({"val": tiny_images[:3]}, mask, {"id_to_name": {"0": "sky", "1": "wall"}})


def test_every_variant_is_measured_and_a_file_goes_on(tiny_clip_folder, images, data, tmp_path):
    figures = tmp_path / "figures.json"
    arguments = ["--models", tiny_clip_folder, "--images", images, "--segmentation", data, "--json", figures]
    run = _benchmark(*arguments)
    assert run.exit_code == 0, run.output
    values = json.loads(figures.read_text())
    rows = [SemiStructuredRow(**row) for row in values["rows"]]
    assert [(row.sparsity, tuple(row.structures)) for row in rows] == list(VARIANTS)
    plain, ours, mlp, by_size, at_random = rows
    assert plain.patch_token_cosine == pytest.approx(1)
    assert plain.seconds is None
    assert (ours.zeros, ours.fit_images, ours.images) == (0.5, 6, 3)
    assert mlp.zeros == 0.25  # half of the weights are of attention
    assert by_size.fit_images == 0
    assert max(by_size.patch_token_cosine, at_random.patch_token_cosine) < 1
    assert 0 <= at_random.mean_iou <= 1
    values["rows"][1]["mean_iou"] = 0.125  # a row that is there is not measured again
    values["rows"].pop()
    figures.write_text(json.dumps(values))
    again = _benchmark(*arguments)
    assert again.exit_code == 0, again.output
    after = json.loads(figures.read_text())["rows"]
    assert len(after) == len(VARIANTS)
    assert after[1]["mean_iou"] == 0.125
    assert after[-1]["mean_iou"] == at_random.mean_iou  # the same draw
    table = result_table(json.loads(figures.read_text()))
    assert "| 2:4, ours | attention, mlp | 50% |" in table
    assert "| 12.5% |" in table
    assert "Ours was fitted on 6 other images" in table
    assert "Speed is not measured here" in table


def test_what_is_refused(tiny_clip_folder, images, data, tmp_path):
    run = _benchmark("--models", "none", "--images", images, "--segmentation", data, "--num-images", 0)
    assert run.exit_code == 2
    assert "num_images is 0" in run.output
    figures = tmp_path / "figures.json"
    figures.write_text('{"rows": 3}')
    run = _benchmark("--models", tiny_clip_folder, "--images", images, "--segmentation", data, "--json", figures)
    assert run.exit_code == 2
    assert "is no result of `benchmark semi-structured`" in " ".join(run.output.split())
