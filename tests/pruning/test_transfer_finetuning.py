"""Spectral fine-tuning of hosts with a transferred tower: the loss falls, only the marked layers change."""

from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss
from transformers import GitConfig, GitForCausalLM, OwlViTConfig, OwlViTForObjectDetection

from hf_opentrans import (
    PruningConfig,
    SpectralConfig,
    get_peft_model,
    load_transferred,
    prune_model,
    save_transferred,
)

pytest.importorskip("peft")
# PEFT asks the model for it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# The layers that there are to choose from.
CHOICE = {"detector": r"owlvit\.vision_model\..*", "captioner": r"git\..*"}
IDS = torch.tensor([[3, 4, 5], [3, 9, 5]])  # of two names, or of two captions
PATCHES = 16
STEPS = 12


def host_of(name, clip):
    """Return a detector or a captioner with the weights of `clip` in its tower."""
    values = clip.config.to_dict()
    vision = values["vision_config"]
    if name == "detector":
        text = {**values["text_config"], "projection_dim": 32}
        model: Any = OwlViTForObjectDetection(OwlViTConfig(text_config=text, vision_config=vision, projection_dim=32))
        tower = model.owlvit.vision_model
    else:
        sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
        model = GitForCausalLM(GitConfig(vision_config=vision, **sizes))
        tower = model.git.image_encoder.vision_model
    weights = clip.vision_model.state_dict()
    if name == "detector":
        weights = {key.replace("pre_layrnorm", "pre_layernorm"): value for key, value in weights.items()}
    tower.load_state_dict(weights)
    return model.eval()


@pytest.fixture
def transferred(tiny_clip, tiny_images, request):
    """Return a host that carries the tower pruned to 60 % of its multiply-accumulates."""
    subnetwork = prune_model(tiny_clip, tiny_images * 5, PruningConfig(keep=0.6, method="magnitude")).subnetwork
    result = subnetwork.apply_to(host_of(request.param, tiny_clip))
    assert result.report.params < result.report.dense_params
    return result.model


def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def loss_of(name, model):
    """Return the loss on fixed targets.

    OWL-ViT returns none: every image has one object of each name, matched by hand to the patches 3 and 12.
    """
    if name == "captioner":
        return model(input_ids=IDS, pixel_values=pixels(), labels=IDS).loss
    outputs = model(input_ids=IDS.repeat(2, 1), pixel_values=pixels())
    places = torch.tensor([3, 12])
    is_there = torch.zeros(2, PATCHES, 2)
    is_there[:, places, torch.arange(2)] = 1
    boxes = torch.tensor([[0.25, 0.25, 0.2, 0.3], [0.7, 0.6, 0.4, 0.2]]).expand(2, -1, -1)
    named = binary_cross_entropy_with_logits(outputs.logits, is_there)
    return named + l1_loss(outputs.pred_boxes[:, places], boxes)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize(("name", "transferred"), [(name, name) for name in CHOICE], indirect=["transferred"])
def test_marked_layers_learn_and_the_rest_stays(transferred, name, mode, tmp_path):
    before = {key: value.clone() for key, value in transferred.state_dict().items()}
    options: dict[str, Any] = {"lora": {"r": 4, "lora_alpha": 8}} if mode == "lora" else {}
    config = SpectralConfig(rule="alpha", fraction=0.5, target_modules=CHOICE[name], mode=mode, **options)
    marked = config.select(transferred)
    assert marked.names
    assert marked.frozen
    model: Any = get_peft_model(transferred, config, selection=marked)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3 if mode == "full" else 2e-2, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(name, model)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.99 * losses[0]
    tuned = model.merge_and_unload()
    after = tuned.state_dict()
    assert after.keys() == before.keys()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert {key.rpartition(".")[0] for key in changed} == set(marked.names)
    with torch.no_grad():
        final = loss_of(name, tuned)
        assert float(final) < losses[0]
        save_transferred(tuned, tmp_path / "tuned")
        again = load_transferred(tmp_path / "tuned")
        assert all(torch.equal(value, after[key]) for key, value in again.state_dict().items())
        torch.testing.assert_close(loss_of(name, again), final)
