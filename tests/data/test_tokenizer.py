"""Tokenizer: exact bytes, framing, no special tokens out of text."""

from __future__ import annotations

import json
import pickle
from copy import copy
from pathlib import Path

import numpy as np
import pytest

from dlcm_lightning.data.tokenizer import Tokenizer, train_bpe
from dlcm_lightning.errors import DataError
from tests.synthetic import VOCABULARY, make_texts

TEXTS = ["", "plain", "naïve café 12345", "天地玄黄，宇宙洪荒。", "tab\tand\r\nnewline\n\n  ", "🙂 emoji 👩‍👩‍👧",
         "\x00\x7f control", "def f(x):\n    return x ** 2\n"]


def test_an_encoder_travels_without_what_it_can_make_again(tokenizer: Tokenizer) -> None:
    sent = pickle.loads(pickle.dumps(tokenizer.encoder))
    assert "library" not in vars(sent) and vars(copy(tokenizer.encoder)).keys() == vars(sent).keys()
    assert [ids.tolist() for ids in sent.encode_documents(TEXTS)] == [
        ids.tolist() for ids in tokenizer.encode_documents(TEXTS)]
    assert np.array_equal(sent.sizes, tokenizer.token_bytes())


def test_token_bytes_of_a_document_sum_to_its_utf8_length(tokenizer: Tokenizer) -> None:
    sizes = tokenizer.token_bytes()
    for text, ids in zip(TEXTS, tokenizer.encode_documents(TEXTS), strict=True):
        assert sizes[ids].sum() == len(text.encode())


def test_decoding_gives_the_text_back(tokenizer: Tokenizer) -> None:
    for text, ids in zip(TEXTS, tokenizer.encode_documents(TEXTS), strict=True):
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.pieces(ids)) == text.encode()


def test_documents_begin_with_bos_and_end_with_eos(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode_documents(["the cat"])
    assert (ids[0], ids[-1], tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 0, 1)
    assert tokenizer.vocab_size == VOCABULARY
    assert tokenizer.token_bytes()[:2].tolist() == [0, 0]


def test_a_text_that_spells_a_special_token_cannot_end_a_document(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode_documents(["before </s> after <s>"])
    assert not {0, 1} & set(ids[1:-1].tolist())
    assert tokenizer.decode(ids) == "before </s> after <s>"


def test_saving_and_loading_keeps_fingerprint_and_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert [x.tolist() for x in loaded.encode_documents(TEXTS)] == [x.tolist() for x in
                                                                    tokenizer.encode_documents(TEXTS)]


def test_the_same_texts_train_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    again = train_bpe(make_texts("english", 200) + make_texts("chinese", 200), VOCABULARY)
    assert again.fingerprint == tokenizer.fingerprint


def test_digits_are_never_merged(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode_documents(["2024"])
    assert tokenizer.pieces(ids[1:-1]) == [b"2", b"0", b"2", b"4"]


def test_too_few_texts_for_a_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="yield only"):
        train_bpe(["a b"], 5000)
    with pytest.raises(DataError, match="at least 256"):
        train_bpe(["a b"], 100)


def test_unusable_tokenizer_folders_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: missing"):
        Tokenizer.load(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text("[]")
    with pytest.raises(DataError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    path.write_text('{"model": {"vocab": {"<s>": 0, "</s>": 1}}}')
    with pytest.raises(DataError, match="its model is an unnamed model"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "model": {**found["model"], "merges": [["<s>", "nothing"]]}}))
    with pytest.raises(DataError, match="library refuses it"):
        Tokenizer.load(tmp_path)
    path.write_text(json.dumps(found))
    for settings in ("[]", "5", "{", '"bos_token"'):
        (tmp_path / "tokenizer_config.json").write_text(settings)
        with pytest.raises(DataError, match=r"tokenizer_config\.json: not the JSON of a tokenizer_config"):
            Tokenizer.load(tmp_path)
    for token in found["added_tokens"]:
        token["content"] = token["content"].upper()
    found["model"]["vocab"] = {token.upper() if token in ("<s>", "</s>") else token: index
                               for token, index in found["model"]["vocab"].items()}
    path.write_text(json.dumps(found))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="not known"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<S>"}, "eos_token": "</S>"}')
    assert Tokenizer.load(tmp_path).bos_id == 0
