"""What is shown of a growing text is the text, whatever its tokens and stop strings."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dlcm_lightning.inference.text import TextStream

TOKENS = st.binary(max_size=4) | st.sampled_from(["é", "汉字", "ab", "abc", "🙂"]).map(str.encode)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(pieces=st.lists(TOKENS, max_size=12),
       stops=st.lists(st.sampled_from([b"ab", b"abc", "汉".encode(), b"b", b"\x00\x00"]), max_size=3))
def test_what_is_shown_adds_up_to_the_text(pieces: list[bytes], stops: list[bytes]) -> None:
    stream = TextStream(stops)
    shown = ""
    read = b""
    for number, piece in enumerate(pieces):
        shown += "".join(text for text, _ in stream.add(piece, number))
        read += piece
        if stream.stopped:
            break
    else:
        shown += "".join(text for text, _ in stream.close())
    ends = [read.index(stop) for stop in stops if stop in read]
    assert stream.stopped == bool(ends)
    expected = read[: min(ends)] if ends else read
    assert bytes(stream.content) == expected
    assert shown == stream.text == expected.decode("utf-8", "replace")


def test_a_cut_character_and_half_a_stop_string_are_held_back() -> None:
    stream = TextStream([b"END"])
    assert stream.add("é".encode()[:1], 0) == []
    assert stream.add("é".encode()[1:] + b"x", 1) == [("éx", 1)]
    assert stream.add(b"E", 2) == []
    assert stream.add(b"N", 2) == []
    assert stream.add(b"T", 3) == [("EN", 2), ("T", 3)]
    assert stream.add(b"yEND and more", 4) == [("y", 4)]
    assert stream.stopped and stream.text == "éxENTy"
