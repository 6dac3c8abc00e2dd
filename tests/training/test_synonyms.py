"""Names of classes in training: means, draws that can be repeated, all of them; and their way into the trainer."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("accelerate")

from torch.nn.functional import normalize
from transformers import TrainingArguments

from hf_opentrans import DeepLabV3PlusForSegmentation, SparseCLIPModel, Vocabulary
from hf_opentrans.training import FinetuneConfig, SegmentationTrainer, SynonymSampler
from hf_opentrans.training.finetune import class_embeddings

NAMES = ["sofa; couch; settee", "cat", "sky; heaven"]


@pytest.fixture
def vocabulary():
    embeddings = normalize(torch.randn(6, 16, generator=torch.Generator().manual_seed(3)), dim=-1)
    return replace(Vocabulary(NAMES), text_embeddings=embeddings)


def test_the_mean_by_hand(vocabulary):
    e = vocabulary.text_embeddings
    expected = torch.stack([part.sum(0) / part.sum(0).norm() for part in (e[:3], e[3:4], e[4:])])
    sampler = SynonymSampler(vocabulary)
    torch.testing.assert_close(sampler.mean(), expected)
    assert torch.equal(sampler.inputs(1, 2)["text_embeddings"], sampler.inputs()["text_embeddings"])
    assert torch.equal(sampler.inputs()["text_embeddings"], sampler.mean())


def test_one_name_of_each_class_is_drawn_all_as_often(vocabulary):
    sampler = SynonymSampler(vocabulary, "random")
    draws = torch.tensor([sampler.draw(0, step) for step in range(600)])
    for column, names in enumerate(([0, 1, 2], [3], [4, 5])):
        counts = torch.bincount(draws[:, column], minlength=6)
        assert counts.nonzero()[:, 0].tolist() == names
        assert float((counts[names] / 600 - 1 / len(names)).abs().max()) < 0.08
    # Classes are drawn on their own: all six combinations occur.
    assert len({tuple(draw) for draw in draws.tolist()}) == 6
    found = sampler.inputs(0, 5)["text_embeddings"]
    assert torch.equal(found, vocabulary.text_embeddings[sampler.draw(0, 5)])


def test_a_draw_belongs_to_its_seed(vocabulary):
    sampler = SynonymSampler(vocabulary, "random")
    first = [sampler.draw(7, step) for step in range(20)]
    torch.manual_seed(99)
    assert [sampler.draw(7, step) for step in range(20)] == first
    assert [sampler.draw(8, step) for step in range(20)] != first
    with pytest.raises(ValueError, match=r"There is no seed. A draw needs one"):
        sampler.inputs()


def test_all_names_are_given_as_the_vocabulary(vocabulary):
    assert SynonymSampler(vocabulary, "max").inputs() == {"vocabulary": vocabulary}


def test_impossible_samplers_are_refused(vocabulary):
    with pytest.raises(ValueError, match=r"mode is 'best'. It must be one of mean, random, max"):
        SynonymSampler(vocabulary, "best")
    with pytest.raises(ValueError, match=r"The vocabulary has no text embeddings. It must be encoded first"):
        SynonymSampler(Vocabulary(NAMES))
    with pytest.raises(ValueError, match=r"synonyms is 'max'. It must be one of mean, random"):
        FinetuneConfig(synonyms="max")


# In the trainer


@pytest.fixture
def make_model(tiny_clip_folder):
    def make():
        clip = SparseCLIPModel.from_pretrained(tiny_clip_folder)
        torch.manual_seed(0)
        return DeepLabV3PlusForSegmentation.from_clip(clip, decoder_channels=8, skip_channels=8, atrous_rates=[1])

    return make


def samples():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(6, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 3, (6, 8, 8), generator=generator)
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]


@pytest.fixture
def make_trainer(tmp_path, make_model, vocabulary):
    def make(name, mode="random"):
        args = TrainingArguments(
            str(tmp_path / name),
            max_steps=4,
            per_device_train_batch_size=2,
            save_steps=2,
            seed=5,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        sampler, data = SynonymSampler(vocabulary, mode), samples()
        text = SynonymSampler(vocabulary).mean()
        return SegmentationTrainer(
            make_model(),
            args,
            text_embeddings=text,
            synonyms=sampler,
            train_dataset=data,  # pyright: ignore[reportArgumentType]
            eval_dataset=data,  # pyright: ignore[reportArgumentType]
        )

    return make


def texts_of(trainer):
    """Return the list that the text embeddings of all later calls of the model are put into."""
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["text_embeddings"]), with_kwargs=True
    )
    return seen


def test_every_step_has_its_own_names_and_scores_have_the_mean(make_trainer, vocabulary):
    trainer = make_trainer("run")
    seen = texts_of(trainer)
    trainer.train()
    expected = [SynonymSampler(vocabulary, "random").inputs(5, step)["text_embeddings"] for step in range(4)]
    assert len(seen) == 4
    assert all(torch.equal(*pair) for pair in zip(seen, expected, strict=True))
    assert any(not torch.equal(seen[0], other) for other in seen)
    seen.clear()
    trainer.evaluate()
    assert seen
    assert all(torch.equal(text, SynonymSampler(vocabulary).mean()) for text in seen)


def test_a_resumed_run_draws_the_same_names(tmp_path, make_trainer):
    whole = make_trainer("whole")
    whole.train()
    torch.manual_seed(77)
    rest = make_trainer("rest")
    seen = texts_of(rest)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert len(seen) == 2
    left, right = whole.model.state_dict(), rest.model.state_dict()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    other = make_trainer("other", "mean")
    other.train()
    assert any(not torch.equal(value, left[name]) for name, value in other.model.state_dict().items())


def test_class_embeddings_are_means_over_names(tiny_clip_folder, tiny_tokenizer, make_model):
    model = make_model()
    found = class_embeddings(model, ("sofa; couch", "cat"), tiny_tokenizer)
    encoded = model.encode_vocabulary(Vocabulary(["sofa", "couch", "cat"]), tiny_tokenizer).text_embeddings
    expected = torch.stack([normalize(encoded[0] + encoded[1], dim=0), encoded[2]])
    torch.testing.assert_close(found, expected)
