"""Vocabularies on disk."""

import json
from dataclasses import replace

import pytest
import torch

from hf_opentrans import Vocabulary
from hf_opentrans.deploy import read_vocabulary
from hf_opentrans.deploy.vocabularies import (
    check_encoder,
    load_vocabulary,
    vocabulary_from_dict,
    vocabulary_to_dict,
)


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


def test_embeddings_belong_to_a_text_tower(tmp_path):
    vocabulary = encoded(["cat", "sofa; couch"], background="words17")
    check_encoder(vocabulary, "abc")  # made by the user: nobody can tell
    vocabulary = replace(vocabulary, encoder="abc")
    path = vocabulary.save_pretrained(tmp_path / "names")
    for given in (path, path.parent):
        again = load_vocabulary(given)
        assert again == vocabulary
        assert again.text_embeddings is not None
        torch.testing.assert_close(again.text_embeddings, vocabulary.text_embeddings)
        check_encoder(again, "abc")
        for other in ("def", None):
            with pytest.raises(ValueError, match="made with another model: its text tower has the fingerprint abc"):
                check_encoder(again, other)
    check_encoder(Vocabulary(["cat"]), "def")
    with pytest.raises(FileNotFoundError, match=r"There is no vocabulary\.json in .*none"):
        load_vocabulary(tmp_path / "none")


def test_names_are_read_from_text_and_files(tmp_path):
    expected = (("cat",), ("sofa", "couch"))
    (tmp_path / "names.json").write_text(json.dumps(["cat", ["sofa", "couch"]]))
    (tmp_path / "joined.json").write_text(json.dumps(["cat", "sofa; couch"]))
    (tmp_path / "names.txt").write_text("cat\n\nsofa, couch\n")
    Vocabulary(["cat", "sofa; couch"]).save_pretrained(tmp_path / "saved")
    names = ["names.json", "joined.json", "names.txt", "saved", "saved/vocabulary.json"]
    for text in ("cat; sofa, couch", *(str(tmp_path / name) for name in names)):
        found = read_vocabulary(text, templates="photo")
        assert found.classes == expected, text
    for text, message in (("none.json", "There is no vocabulary file 'none.json'"), ("x/y.TXT", "There is no")):
        with pytest.raises(FileNotFoundError, match=message):
            read_vocabulary(text, templates="photo")
    (tmp_path / "bad.json").write_text("[")
    (tmp_path / "map.json").write_text('{"cat": 1}')
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt' is not UTF-8 .* Save it in that encoding"):
        read_vocabulary(str(tmp_path / "latin.txt"), templates="photo")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_vocabulary(str(tmp_path / "bad.json"), templates="photo")
    with pytest.raises(TypeError, match="holds a dict"):
        read_vocabulary(str(tmp_path / "map.json"), templates="photo")
