"""`dlcm data verify` decodes: a source whose tokenizer changed texts is found, whoever built it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers

from dlcm_lightning.cli import main
from dlcm_lightning.data.inspection import texts as module
from dlcm_lightning.data.inspection.texts import Texts
from dlcm_lightning.data.preprocessing.build import tokenize_documents
from dlcm_lightning.data.preprocessing.documents import SPLITS
from dlcm_lightning.data.preprocessing.writer import ShardWriter, finish_split
from dlcm_lightning.data.source import Source
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from tests.synthetic import make_texts

TEXTS = ["plain", "x² 10⁹ ½", "ﬁne naïve", "twice", "twice"]


def build(root: Path, tokenizer: Tokenizer, library: tokenizers.Tokenizer, texts: list[str]) -> None:
    """What earlier versions wrote: any library's ids, the md5 and the bytes of the text as it was read, format 2."""
    for split in SPLITS:
        writer = ShardWriter(root / "s" / split, vocab_size=tokenizer.vocab_size, block_tokens=12)
        for text in texts:
            ids = [0, *library.encode(text, add_special_tokens=False).ids, 1]
            writer.write(np.array(ids), hashlib.md5(text.encode()).digest(), len(text.encode()))
        finish_split(root / "s" / split, writer.close(), source="s", domain="d", split=split,
                     tokenizer=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size)
        path = root / "s" / split / "manifest.json"
        found = json.loads(path.read_text())
        for name in ("lossless", "validation_share"):
            del found[name]
        path.write_text(json.dumps({**found, "format": 2}))


def test_a_source_of_a_tokenizer_with_a_normalizer_is_found(tokenizer: Tokenizer, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    build(tmp_path, tokenizer, library, TEXTS)
    assert main(["data", "verify", str(tmp_path)]) == 0, "nothing is wrong so far"
    capsys.readouterr()
    library.normalizer = normalizers.NFKC()
    build(tmp_path / "other", tokenizer, library, TEXTS)
    tokenizer.save(tmp_path / "other")  # whose tokenizer.json is good now
    assert main(["data", "verify", str(tmp_path / "other")]) == 2
    said = capsys.readouterr()
    assert said.out.count("document 1 is not the text that it was made of: the tokenizer changed it") == 2
    assert "2 damages" in said.err
    (tmp_path / "other" / "tokenizer.json").write_text(library.to_str())
    assert main(["data", "verify", str(tmp_path / "other")]) == 2
    assert "its normalizer (NFKC) changes texts" in (said := capsys.readouterr().err)
    assert "whatever was built with it is to be built again" in said


def test_a_control_token_out_of_a_text_is_found(tokenizer: Tokenizer, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    build(tmp_path, tokenizer, library, ["plain", "a </s> b"])  # the library finds it in the text
    assert main(["data", "verify", str(tmp_path)]) == 2
    assert capsys.readouterr().out.count("document 1 is not the text") == 2


@pytest.mark.parametrize("piece", [1, 3, 50, 2**18])
def test_sound_sources_pass_in_pieces_of_any_length(tokenizer: Tokenizer, tmp_path: Path, piece: int,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_TOKENS", piece)
    texts = [*make_texts("english", 60), *make_texts("chinese", 40), *make_texts("english", 9)]
    built = tokenize_documents(texts, tokenizer, tmp_path / "s", source="s", domain="d", validation_share=0.3,
                               shard_bytes=900, block_tokens=150)
    assert built.duplicates == 9 and built.train.lossless and built.train.validation_share == 0.3
    checker = Texts(tokenizer)
    for split in SPLITS:
        source = Source(tmp_path / "s" / split, tokenizer)
        for number in range(len(source.manifest.shards)):
            checker.check(source, number)
    source = Source(tmp_path / "s" / "train", tokenizer)
    path = tmp_path / "s" / "train" / source.manifest.shards[1].name
    at, _, _, _ = source.shard(1).index[-1]
    content = bytearray(path.read_bytes())
    content[at + 4:at + 6], content[at + 6:at + 8] = content[at + 6:at + 8], content[at + 4:at + 6]
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not the text that it was made of"):
        checker.check(Source(tmp_path / "s" / "train", tokenizer), 1)
