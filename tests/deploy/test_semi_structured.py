"""2:4 models on GPUs: what is converted and what is refused. The product itself needs a GPU."""

from typing import Any

import pytest
import torch
from torch import nn

from hf_opentrans.deploy import semi_structured as ours
from hf_opentrans.deploy.semi_structured import to_semi_structured
from hf_opentrans.pruning.two_of_four import two_of_four


def _sparse(*shapes, dtype=torch.float16) -> Any:
    """Return linear layers of shapes `(outputs, inputs)` that are 2:4, and one that is not."""
    model: Any = nn.Sequential(*(nn.Linear(inputs, outputs) for outputs, inputs in shapes), nn.Linear(64, 64))
    with torch.no_grad():
        for linear in list(model)[:-1]:
            linear.weight.mul_(two_of_four(linear.weight.abs()))
    return model.to(dtype).eval()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Leave out the two steps that need a device; the converted weight is its negative."""
    monkeypatch.setattr(ours, "_check_device", lambda weight: None)
    monkeypatch.setattr(ours, "_convert", lambda weight: -weight)


def test_what_fits_is_converted_in_a_copy_and_the_rest_is_listed(as_on_a_gpu):
    model = _sparse((64, 128), (32, 64), (40, 64), (64, 32))
    before = [linear.weight.clone() for linear in model]
    result = to_semi_structured(model)
    assert result.converted == ("0", "1")
    assert result.left == {
        "2": "40 outputs and 64 inputs, not multiples of 32 and 64",
        "3": "64 outputs and 32 inputs, not multiples of 32 and 64",
    }
    converted: Any = result.model
    for index, (old, now) in enumerate(zip(before, converted, strict=True)):
        assert torch.equal(now.weight, -old if index < 2 else old)
        assert torch.equal(model[index].weight, old)


def test_other_precisions_are_told(as_on_a_gpu):
    with pytest.raises(ValueError, match=r"None of the 1 layers .* float32 weights.*in float16 or bfloat16"):
        to_semi_structured(_sparse((64, 128), dtype=torch.float32))


def test_a_model_without_such_zeros_is_refused():
    with pytest.raises(ValueError, match=r"None of the linear layers is 2:4.*hf-opentrans sparsify"):
        to_semi_structured(nn.Sequential(nn.Linear(64, 64)).eval())
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\)"):
        to_semi_structured(_sparse((64, 64)).train())
    with pytest.raises(TypeError, match="The model is a str"):
        to_semi_structured("clip-scenes")  # pyright: ignore[reportArgumentType]


def test_a_machine_that_cannot_skip_zeros_is_refused(monkeypatch):
    model = _sparse((64, 64))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"There is no CUDA device.*a processor multiplies them"):
        to_semi_structured(model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=r'The model is on cpu.*model.to\("cuda"\)'):
        to_semi_structured(model)


@pytest.mark.parametrize(("found", "is_new_enough"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_the_capability_decides(monkeypatch, found, is_new_enough):
    class OnGpu:
        is_cuda, device = True, "cuda:0"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    if is_new_enough:
        ours._check_device(OnGpu())  # pyright: ignore[reportArgumentType]
    else:
        with pytest.raises(RuntimeError, match=r"compute capability 7.5. Skipping 2:4 zeros needs 8.0"):
            ours._check_device(OnGpu())  # pyright: ignore[reportArgumentType]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_products_are_the_same_on_a_gpu(dtype):
    if torch.cuda.get_device_capability() < ours.CAPABILITY:
        pytest.skip("needs compute capability 8.0")
    model = _sparse((256, 128), (64, 256), dtype=dtype).cuda()
    result = to_semi_structured(model)
    assert result.converted == ("0", "1")
    inputs = torch.randn(2, 65, 128, dtype=dtype, device="cuda")
    with torch.inference_mode():
        expected, found = model(inputs).float(), result.model(inputs).float()
    assert float((expected - found).abs().max()) < 0.02 * float(expected.abs().max())
