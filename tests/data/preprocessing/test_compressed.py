"""Compressed streams: read whole, in bounded pieces; damage comes at its place, after everything that is before it."""

from __future__ import annotations

import gzip
import io
import random
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import zstandard

from dlcm_lightning.data.preprocessing import compressed
from dlcm_lightning.data.preprocessing.compressed import DAMAGED, decompressed
from dlcm_lightning.data.preprocessing.formats import read_texts
from dlcm_lightning.errors import DataError

ZSTANDARD = zstandard.ZstdCompressor(write_checksum=True)
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "x.gz": gzip.compress, "x.zst": ZSTANDARD.compress,
    "two.gz": lambda content: gzip.compress(content[:999]) + gzip.compress(content[999:]) + bytes(1000),
    "two.zst": lambda content: ZSTANDARD.compress(content[:999]) + ZSTANDARD.compress(content[999:])}


def opened(name: str, packed: bytes) -> io.BufferedIOBase:
    return decompressed(name, io.BytesIO(packed), lambda: nullcontext(io.BytesIO(packed)))  # type: ignore


def lines(count: int) -> list[bytes]:
    chance = random.Random(1)
    return [b'{"text": "%d %s"}\n' % (number, chance.randbytes(chance.randrange(40)).hex().encode())
            for number in range(count)]


@pytest.mark.parametrize("name", PACKERS)
def test_what_was_packed_comes_back(name: str) -> None:
    for content in (b"", b"x", b"".join(lines(20_000)), bytes(10_000_000)):
        assert opened(name, PACKERS[name](content)).read() == content


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("seed", range(8))
def test_everything_before_a_damage_is_read_and_then_the_line_is_named(tmp_path: Path, name: str, seed: int) -> None:
    packed = bytearray(PACKERS[name](b"".join(lines(6000))))
    at = random.Random(seed).randrange(len(packed) // 4, len(packed) - 1100)
    packed[at:at + 40] = bytes(byte ^ 0x5A for byte in packed[at:at + 40])
    sure = before(name, bytes(packed[:at]))
    stream, got = opened(name, bytes(packed)), b""
    with pytest.raises(DAMAGED):
        while piece := stream.read1(1 << 20):  # type: ignore[attr-defined]
            got += piece
    assert got.startswith(sure)
    path = tmp_path / f"a.jsonl.{name.split('.')[1]}"
    path.write_bytes(packed)
    count = 0
    with pytest.raises(DataError, match=r"line \d+: ") as caught:
        for _ in read_texts(path, "text"):
            count += 1
    line = int(str(caught.value).split("line ")[1].split(":")[0])
    assert sure.count(b"\n") <= count == line - 1


def before(name: str, packed: bytes) -> bytes:
    """What the library makes of the beginning of a file, byte by byte."""
    found, decoder = b"", None
    for byte in packed:
        if decoder is None:
            decoder = zlib.decompressobj(31) if name.endswith("gz") else zstandard.ZstdDecompressor().decompressobj()
        found += decoder.decompress(bytes([byte]))
        decoder = None if decoder.eof else decoder
    return found


def test_a_gigabyte_of_blanks_in_a_kilobyte_does_not_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    packed = zstandard.ZstdCompressor(level=3).compress(bytes(256 * 1024**2))
    real = compressed._Decoded._next

    def measured(self: compressed._Decoded) -> bool:
        nonlocal largest
        found = real(self)
        largest = max(largest, len(self._decoded))
        return found

    monkeypatch.setattr(compressed._Decoded, "_next", measured)
    stream = opened("x.zst", packed)
    assert sum(map(len, iter(lambda: stream.read(1 << 20), b""))) == 256 * 1024**2
    assert largest <= 64 * 1024**2
