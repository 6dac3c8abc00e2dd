"""Names, aliases, templates and text embeddings."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from hf_opentrans import Vocabulary
from hf_opentrans.models import vocabulary as vocabulary_module
from hf_opentrans.models.prompt_templates import PROMPT_TEMPLATES
from hf_opentrans.models.vocabulary import BACKGROUND_PRESETS, BACKGROUND_WORDS, background_class


def test_names_and_aliases():
    vocabulary = Vocabulary(["cat", "sofa; couch", ["dog", "puppy", "hound"]])
    assert vocabulary.names == ("cat", "sofa", "dog")
    assert vocabulary.queries == ("cat", "sofa", "couch", "dog", "puppy", "hound")
    assert vocabulary.query_to_class.tolist() == [0, 1, 1, 2, 2, 2]


def test_parse_reads_the_form_of_the_command_line():
    vocabulary = Vocabulary.parse(" cat ; dog, puppy;  traffic   light; ", templates="plain")
    assert vocabulary.classes == (("cat",), ("dog", "puppy"), ("traffic light",))
    assert vocabulary.templates == ("{}",)
    assert vocabulary == Vocabulary([["cat"], ["dog", "puppy"], "traffic light"], templates="plain")


def test_an_alias_that_repeats_counts_once():
    assert Vocabulary(["cat; kitten; cat"]).queries == ("cat", "kitten")


@pytest.mark.parametrize("text", ["", " ", ";", "cat;;dog", "cat, ;dog", ";cat"])
def test_empty_names_are_refused(text):
    with pytest.raises(ValueError, match=r"of the labels has an empty name. Every class and alias needs"):
        Vocabulary.parse(text)


def test_no_class_is_refused():
    with pytest.raises(ValueError, match=r"The vocabulary has no class. It needs at least one"):
        Vocabulary([])
    with pytest.raises(ValueError, match="Class 2 of the labels has an empty name"):
        Vocabulary(["cat", []])


@pytest.mark.parametrize("classes", [["cat", "dog", "cat"], ["cat", "Cat"], ["cat; kitten", " cat "]])
def test_duplicate_labels_are_refused(classes):
    with pytest.raises(ValueError, match=r"The label '\s?[Cc]at' occurs twice. Class names must be unique"):
        Vocabulary(classes)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match=r"The classes are one string, 'cat; dog'.*Vocabulary\.parse"):
        Vocabulary("cat; dog")
    with pytest.raises(TypeError, match=r"Class 2 holds 3. Names must be strings"):
        Vocabulary(["cat", ["dog", 3]])  # pyright: ignore[reportArgumentType]


def test_background_is_one_more_class_of_many_words():
    vocabulary = Vocabulary(["cat", "wall"], background="words26")
    assert vocabulary.names == ("cat", "wall", "background")
    assert len(BACKGROUND_WORDS) == 26
    # A word that the user asks for is not background; "background" itself is not asked when words stand for it.
    assert vocabulary.queries == ("cat", "wall", *(word for word in BACKGROUND_WORDS if word != "wall"))
    assert vocabulary.query_to_class.tolist() == [0, 1, *[2] * 25]
    assert Vocabulary(["cat"], background="sky; road").queries == ("cat", "sky", "road")
    assert Vocabulary(["cat"], background=["sky"]).query_to_class.tolist() == [0, 1]
    assert Vocabulary(["cat", "sky"], background=["sky"]).queries == ("cat", "sky", "background")


def test_background_presets():
    assert {name: len(words) for name, words in BACKGROUND_PRESETS.items()} == {
        "words26": 26,
        "words17": 17,
        "background": 1,
    }
    assert set(BACKGROUND_PRESETS["words17"]) < set(BACKGROUND_WORDS)
    assert Vocabulary(["cat"], background="words17").queries[1:] == BACKGROUND_PRESETS["words17"]
    literal = Vocabulary(["cat"], background="background")
    assert literal.queries == ("cat", "background")
    assert literal == Vocabulary(["cat", "background"])
    assert background_class("hill; Sky", [["sky"], ["cat"]]) == ("background", "hill")


def test_background_that_is_a_class_already_is_refused():
    with pytest.raises(ValueError, match="'background' occurs twice"):
        Vocabulary(["cat", "background"], background="words26")


def test_template_lists_have_their_published_lengths():
    lengths = {name: len(templates) for name, templates in PROMPT_TEMPLATES.items()}
    assert lengths == {"plain": 1, "photo": 1, "vild14": 14, "imagenet80": 80}
    for templates in PROMPT_TEMPLATES.values():
        assert len(set(templates)) == len(templates)
        assert all(template.count("{}") == 1 for template in templates)


def test_templates_of_ones_own():
    assert Vocabulary(["cat"], templates="a {} here").templates == ("a {} here",)
    assert Vocabulary(["cat"], templates=["a {}", "the {}"]).templates == ("a {}", "the {}")
    with pytest.raises(ValueError, match=r"no prompt templates named 'imagenet'. Known names: plain, photo"):
        Vocabulary(["cat"], templates="imagenet")
    for wrong in ([], ["a {} and {}"], ["a {}", "nothing"]):
        with pytest.raises(ValueError, match=r"are not usable. Each needs exactly one {} for the name"):
            Vocabulary(["cat"], templates=wrong)


def test_encoding_averages_unit_embeddings_over_templates():
    vectors = {
        "a cat": [3.0, 4.0],
        "the cat": [0.0, 2.0],
        "a dog": [5.0, 0.0],
        "the dog": [1.0, 0.0],
    }
    vocabulary = Vocabulary(["cat", "dog"], templates=["a {}", "the {}"])
    encoded = vocabulary.encode(lambda texts: torch.tensor([vectors[text] for text in texts]), batch_size=3)
    # cat: mean of (0.6, 0.8) and (0, 1) is (0.3, 0.9), of length sqrt(0.9). dog: (1, 0).
    expected = torch.tensor([[0.3, 0.9], [1.0, 0.0]]) / torch.tensor([[0.9**0.5], [1.0]])
    assert encoded.text_embeddings is not None
    torch.testing.assert_close(encoded.text_embeddings, expected)
    assert vocabulary.text_embeddings is None
    assert encoded == vocabulary  # embeddings are a cache, not identity


def test_encoding_keeps_the_background():
    vocabulary = Vocabulary(["cat"], background=["sky", "road"], templates="plain")
    encoded = vocabulary.encode(lambda texts: torch.eye(3)[: len(texts)])
    assert encoded.names == ("cat", "background")
    assert encoded.queries == ("cat", "sky", "road")


def test_merging_averages_the_names_of_a_class():
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.6, 0.8], [0.0, 0.0, 1.0]])
    names = ["cat; kitten", "dog"]
    vocabulary = Vocabulary(names, background=["sky"], templates="plain")
    encoded = vocabulary.encode(lambda texts: rows[: len(texts)])
    merged = encoded.merged()
    # cat: (1, 0, 0) and (0, 1, 0) have the mean direction (1, 1, 0) / sqrt(2).
    expected = torch.tensor([[0.5**0.5, 0.5**0.5, 0.0], [0.0, 0.6, 0.8], [0.0, 0.0, 1.0]])
    assert merged.text_embeddings is not None
    torch.testing.assert_close(merged.text_embeddings, expected)
    assert merged.queries == merged.names == ("cat", "dog", "background")
    assert merged.query_to_class.tolist() == [0, 1, 2]
    assert merged.classes == encoded.classes  # which class is seen in training is told by all names
    assert merged != encoded
    assert len(encoded.queries) == 4
    again = merged.merged()
    assert again.text_embeddings is not None
    torch.testing.assert_close(again.text_embeddings, expected)
    # Merged before it is encoded, as `segment` does: the same.
    late = vocabulary.merged().encode(lambda texts: rows[: len(texts)])
    assert late.text_embeddings is not None
    torch.testing.assert_close(late.text_embeddings, expected)
    assert late.fingerprint == merged.fingerprint != encoded.fingerprint
    assert vocabulary.merged().text_embeddings is None


def test_the_fingerprint_depends_on_names_and_templates():
    vocabularies = [
        Vocabulary(["cat", "dog"]),
        Vocabulary(["dog", "cat"]),
        Vocabulary(["cat; dog"]),
        Vocabulary(["cat", "dog"], templates="plain"),
        Vocabulary(["cat", "dog"], background="words26"),
    ]
    assert len({vocabulary.fingerprint for vocabulary in vocabularies}) == len(vocabularies)
    assert Vocabulary(["cat", "dog"]).fingerprint == Vocabulary.parse("cat;dog").fingerprint


@pytest.mark.parametrize(
    "vocabulary",
    [
        Vocabulary(["cat", "sofa; couch"], templates="vild14"),
        Vocabulary(["cat", "wall"], templates="plain", background="words26"),
        Vocabulary(["cat"], background="background"),
        Vocabulary(["background"]),
        Vocabulary(["background; sky", "cat"]),
        Vocabulary(["sky", "background; sky"]),  # as nobody would write it, and it stays as it is
        Vocabulary(["cat; kitten", "dog"], background=["sky"]).merged(),
        Vocabulary(["chaise longue", "\u732b", 'a "quoted" name']),
    ],
    ids=lambda vocabulary: vocabulary.names[0],
)
def test_a_saved_vocabulary_comes_back(tmp_path, vocabulary):
    path = vocabulary.save_pretrained(tmp_path / "new")
    again = Vocabulary.from_pretrained(tmp_path / "new")
    assert again == vocabulary
    assert again.fingerprint == vocabulary.fingerprint
    assert again.queries == vocabulary.queries
    assert again.text_embeddings is None
    assert [entry.name for entry in path.parent.iterdir()] == ["vocabulary.json"]
    assert Vocabulary.find(tmp_path) is None


def test_the_file_can_be_read_and_edited(tmp_path):
    path = Vocabulary(["cat", "sofa; couch"], templates="plain", background=["sky"]).save_pretrained(tmp_path)
    values = json.loads(path.read_text())
    assert values["names"] == [["cat"], ["sofa", "couch"]]
    assert values["background"] == ["sky"]
    assert values["templates"] == ["{}"]
    path.write_text(json.dumps({**values, "names": ["dog", "sofa; couch"], "background": "words17"}))
    expected = Vocabulary(["dog", "sofa; couch"], templates="plain", background="words17")
    assert Vocabulary.from_pretrained(tmp_path) == expected


def encoded():
    vocabulary = Vocabulary(["cat", "dog; puppy"]).encode(lambda texts: torch.eye(3)[: len(texts)])
    return replace(vocabulary, encoder="some text tower")


def test_embeddings_are_saved_with_what_made_them(tmp_path):
    encoded().save_pretrained(tmp_path)
    again = Vocabulary.from_pretrained(tmp_path)
    assert again.text_embeddings is not None
    assert torch.equal(again.text_embeddings, torch.eye(3))
    assert again.encoder == "some text tower"
    # Other names have other embeddings, and no others are kept.
    path = tmp_path / "vocabulary.json"
    path.write_text(path.read_text().replace("puppy", "hound"))
    assert Vocabulary.from_pretrained(tmp_path).queries == ("cat", "dog", "hound")
    assert Vocabulary.from_pretrained(tmp_path).text_embeddings is None
    Vocabulary(["cat"]).save_pretrained(tmp_path)
    assert not (tmp_path / "vocabulary.safetensors").exists()
    replace(encoded(), encoder=None).save_pretrained(tmp_path)  # nobody could tell whose they are
    assert not (tmp_path / "vocabulary.safetensors").exists()


def test_no_or_a_damaged_vocabulary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no vocabulary\.json in .*Write it with"):
        Vocabulary.from_pretrained(tmp_path)
    path = encoded().save_pretrained(tmp_path)
    good = json.loads(path.read_text())
    for wrong, message in (
        ("{", r"is not valid JSON .*Save or download"),
        (b"\xff\xfe{", r"is not valid JSON .*Save or download"),
        ("[]", r"is no vocabulary that this version reads. It must say"),
        (json.dumps({**good, "version": 2}), r"is no vocabulary that this version reads"),
        (json.dumps({**good, "names": "cat"}), r"is no valid vocabulary: The classes are one string"),
        (json.dumps({**good, "names": ["cat", "cat"]}), r"is no valid vocabulary: The label 'cat' occurs twice"),
        (json.dumps({**good, "names": [["cat"], [3]]}), r"is no valid vocabulary: Class 2 holds 3"),
        (json.dumps({name: value for name, value in good.items() if name != "merged"}), "'merged'. It needs names"),
    ):
        path.write_bytes(wrong if isinstance(wrong, bytes) else wrong.encode())
        with pytest.raises(ValueError, match=message):
            Vocabulary.find(tmp_path)
    path.write_text(json.dumps(good))
    weights = tmp_path / "vocabulary.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"vocabulary\.safetensors' is damaged\. .*Save or download"):
        Vocabulary.find(tmp_path)
    weights.write_bytes(pickle.dumps({"text_embeddings": 1}))
    with pytest.raises(ValueError, match=r"vocabulary\.safetensors' is damaged"):
        Vocabulary.find(tmp_path)
    save_file({"text_embeddings": torch.eye(2)}, weights)
    with pytest.raises(ValueError, match=r"embeddings of shape \(2, 2\). There must be one row for each of the 3"):
        Vocabulary.find(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"names embeddings, and vocabulary\.safetensors is missing"):
        Vocabulary.find(tmp_path)


def test_an_absurdly_large_file_is_not_read(tmp_path, monkeypatch):
    Vocabulary(["cat"]).save_pretrained(tmp_path)
    monkeypatch.setattr(vocabulary_module, "_MAX_FILE_BYTES", 10)
    with pytest.raises(ValueError, match=r"is larger than 10 bytes. No vocabulary is"):
        Vocabulary.find(tmp_path)
