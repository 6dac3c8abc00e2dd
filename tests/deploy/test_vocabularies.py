"""Vocabularies on disk."""

import json

import pytest
import torch
from torch.nn.functional import normalize

from hf_opentrans import Vocabulary
from hf_opentrans.deploy import load_vocabulary, read_vocabulary, save_vocabulary
from hf_opentrans.deploy.vocabularies import vocabulary_from_dict, vocabulary_to_dict


def encoded(names, **options) -> Vocabulary:
    return Vocabulary(names, **options).encode(lambda texts: torch.randn(len(texts), 8))


@pytest.mark.parametrize("background", [None, "words17", "background"])
@pytest.mark.parametrize("is_merged", [False, True])
def test_a_vocabulary_survives_its_dictionary(background, is_merged):
    vocabulary = Vocabulary(["cat", "sofa; couch"], templates="vild14", background=background)
    vocabulary = vocabulary.merged() if is_merged else vocabulary
    again = vocabulary_from_dict(json.loads(json.dumps(vocabulary_to_dict(vocabulary))))
    assert again == vocabulary
    assert again.queries == vocabulary.queries
    assert again.fingerprint == vocabulary.fingerprint
    with pytest.raises(ValueError, match=r"lacks \['templates'\]"):
        vocabulary_from_dict({"classes": ["cat"], "is_merged": False})


def test_an_encoded_vocabulary_belongs_to_a_text_tower(tmp_path):
    path = tmp_path / "more" / "names.safetensors"
    vocabulary = encoded(["cat", "sofa; couch"], background="words17")
    save_vocabulary(vocabulary, path, text_fingerprint="abc")
    again, made_by = load_vocabulary(path, text_fingerprint="abc")
    assert (again, made_by) == (vocabulary, "abc")
    torch.testing.assert_close(again.text_embeddings, vocabulary.text_embeddings)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="made with another model: its text tower has the fingerprint abc"):
        load_vocabulary(path, text_fingerprint="def")


def test_bad_vocabulary_files(tmp_path):
    with pytest.raises(ValueError, match="not encoded"):
        save_vocabulary(Vocabulary(["cat"]), tmp_path / "a.safetensors", text_fingerprint="a")
    with pytest.raises(ValueError, match="must end in"):
        save_vocabulary(encoded(["cat"]), tmp_path / "a.bin", text_fingerprint="a")
    with pytest.raises(FileNotFoundError, match="There is no vocabulary file"):
        load_vocabulary(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is no encoded vocabulary"):
        load_vocabulary(tmp_path / "b.safetensors")
    wrong = encoded(["cat", "dog"])
    object.__setattr__(wrong, "text_embeddings", normalize(torch.randn(3, 8), dim=-1))
    save_vocabulary(wrong, tmp_path / "c.safetensors", text_fingerprint="a")
    with pytest.raises(ValueError, match="3 embeddings for 2 names"):
        load_vocabulary(tmp_path / "c.safetensors")


def test_names_are_read_from_text_and_files(tmp_path):
    expected = (("cat",), ("sofa", "couch"))
    (tmp_path / "names.json").write_text(json.dumps(["cat", ["sofa", "couch"]]))
    (tmp_path / "joined.json").write_text(json.dumps(["cat", "sofa; couch"]))
    (tmp_path / "names.txt").write_text("cat\n\nsofa, couch\n")
    save_vocabulary(encoded(["cat", "sofa; couch"]), tmp_path / "names.safetensors", text_fingerprint="a")
    names = ["names.json", "joined.json", "names.txt", "names.safetensors"]
    for text in ("cat; sofa, couch", *(str(tmp_path / name) for name in names)):
        found = read_vocabulary(text, templates="photo")
        assert found.classes == expected, text
    for text, message in (("none.json", "There is no vocabulary file 'none.json'"), ("x/y.TXT", "There is no")):
        with pytest.raises(FileNotFoundError, match=message):
            read_vocabulary(text, templates="photo")
    (tmp_path / "bad.json").write_text("[")
    (tmp_path / "map.json").write_text('{"cat": 1}')
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_vocabulary(str(tmp_path / "bad.json"), templates="photo")
    with pytest.raises(TypeError, match="holds a dict"):
        read_vocabulary(str(tmp_path / "map.json"), templates="photo")
