"""CLIPSeg with one image pass for all prompts: the stock answer, bit for bit."""

from typing import Any

import pytest
import torch
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from hf_opentrans.models.clipseg_prompts import clipseg_logits


@pytest.fixture
def model() -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    text = {**sizes, "vocab_size": 50, "eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 1}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    options: dict[str, Any] = {"reduce_dim": 8, "extract_layers": [0, 2], "decoder_num_attention_heads": 2}
    config = CLIPSegConfig(text_config=text, vision_config=vision, projection_dim=16, **options)
    return CLIPSegForImageSegmentation(config).eval()


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize(("prompts", "per_pass"), [(1, 16), (5, 16), (5, 2), (5, 1)])
def test_shared_pass_equals_one_pass_per_prompt(model, size, prompts, per_pass):
    pixels = torch.randn(2, 3, size, size)
    ids = torch.cat(
        [torch.full((prompts, 1), 48), torch.randint(2, 47, (prompts, 3)), torch.full((prompts, 1), 49)], 1
    )
    mask = torch.ones_like(ids)
    found = clipseg_logits(model, pixels, ids, mask, prompts_per_pass=per_pass)
    assert found.shape == (2, prompts, size, size)
    with torch.no_grad():
        for image, answers in zip(pixels, found, strict=True):
            stock = model(ids, image.expand(prompts, -1, -1, -1), attention_mask=mask).logits
            # Matrix products of other batch sizes round otherwise.
            torch.testing.assert_close(answers, stock.reshape(answers.shape), atol=2e-5, rtol=0)


def test_one_prompt_at_a_time_is_the_stock_answer_bit_for_bit(model):
    pixels, ids = torch.randn(1, 3, 32, 32), torch.tensor([[48, 3, 49], [48, 7, 49]])
    found = clipseg_logits(model, pixels, ids, prompts_per_pass=1)[0]
    with torch.no_grad():
        prompts = model.get_conditional_embeddings(2, input_ids=ids)
        for answer, prompt in zip(found, prompts, strict=True):
            stock = model(pixel_values=pixels, conditional_embeddings=prompt[None]).logits
            assert torch.equal(answer, stock.reshape(answer.shape))


def test_the_image_goes_through_the_tower_once(model):
    passes = []
    model.clip.vision_model.register_forward_hook(lambda *_: passes.append(1))
    clipseg_logits(model, torch.randn(1, 3, 32, 32), torch.tensor([[48, i, 49] for i in range(2, 12)]))
    assert passes == [1]


def test_nothing_to_ask_is_refused(model):
    with pytest.raises(ValueError, match=r"input_ids has the shape \(0, 3\). At least one row is needed"):
        clipseg_logits(model, torch.randn(1, 3, 32, 32), torch.zeros(0, 3, dtype=torch.long))
