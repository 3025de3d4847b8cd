"""Text from tokens, shown as soon as it can be."""

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import made_server
from cbtm_pipeline.inference import decoding

TEXTS = ["ship anchor", "naïve 日本 café", "👩‍🚀 tide", " butter\n\nflour", "\ufffd", ""]


@cache
def tokenizer() -> Any:
    return made_server.tokenizer()


def whole(ids: list[int]) -> str:
    return tokenizer().decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("before", ["", "rose soil", "naïve"])
def test_pieces_add_up_to_the_text_and_no_character_is_torn(text: str, before: str) -> None:
    ids = tokenizer().encode(text)
    decoder = decoding.Decoder(tokenizer(), tokenizer().encode(before))
    pieces = [decoder.add(i) for i in ids]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + decoder.end() == text
    if text == "naïve 日本 café":
        assert "" in pieces, "a token within a character shows nothing yet"


@given(st.lists(st.integers(0, 319), max_size=40))
@settings(deadline=None)
def test_any_tokens_add_up_to_their_text(ids: list[int]) -> None:
    decoder = decoding.Decoder(tokenizer())
    found = "".join(decoder.add(i) for i in ids) + decoder.end()
    # bytes that form no character may be told apart differently, all else is the same
    assert found.replace("\ufffd", "") == whole(ids).replace("\ufffd", "")


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stops_cut_as_if_the_text_were_whole(text: str, stops: list[str], data: Any) -> None:
    finder, shown, rest = decoding.StopFinder(stops), "", text
    places = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(places)[1]] if places else text  # before the stop text that ends first
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        shown += finder.add(rest[:n])
        assert expected.startswith(shown), "nothing of a stop text is ever shown"
        rest = rest[n:]
    assert finder.found == bool(places)
    assert shown + finder.end() == expected


def test_text_that_can_be_no_stop_is_not_held_back() -> None:
    finder = decoding.StopFinder(["\nuser:"])
    assert [finder.add(text) for text in ("a", "\nus", "b", "\n", "user", ": c")] == [
        "a",
        "",
        "\nusb",
        "",
        "",
        "",
    ]
    assert finder.found


def test_names_of_tokens_are_text_or_bytes() -> None:
    ids = tokenizer().encode("日 é")
    names = [decoding.name(tokenizer(), i) for i in ids]
    assert names[:3] == ["bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5"] and " " in names
    assert b"".join(decoding.as_bytes(name) for name in names).decode() == "日 é"
    assert decoding.name(tokenizer(), 0) == "<|endoftext|>"
