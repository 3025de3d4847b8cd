"""Whole words that set clusters apart."""

import numpy as np

from cbtm_pipeline.clustering import words

TEXTS = [
    *["Haskell's types; a haskell program, x1 askell" for _ in range(15)],
    *["The Amazon flows. AMAZON river, naïve 日本語 boats" for _ in range(15)],
]


def test_terms_are_whole_words_of_the_texts() -> None:
    found = words.distinctive(TEXTS, np.arange(30) // 15, 2, 5)
    assert found[0][0] == "haskell" and found[1][0] == "amazon"
    known = {word.casefold() for text in TEXTS for word in text.replace("'", " ").replace(";", " ").split()}
    assert all(word.isalpha() and len(word) >= 3 for some in found for word in some)
    assert {"naïve", "日本語"} <= set(words.distinctive(TEXTS, np.arange(30) // 15, 2, 9)[1])
    assert set(found[0]) <= {"haskell", "types", "program", "askell"} and "the" not in found[0], known


def test_texts_without_words_have_none() -> None:
    assert words.distinctive(["1 2 3", "== ?"], np.array([0, 1]), 3, 5) == [[], [], []]


def test_other_terms_fill_up_but_no_part_of_a_word() -> None:
    assert words.filled(["haskell"], ["askell", "==", "  x"], 3) == ["haskell", "==", "  x"]
    assert words.filled(["a", "b"], ["c"], 2) == ["a", "b"]


def test_a_part_of_a_word_is_completed_from_the_texts() -> None:
    texts = ["Flour and sour flour.", "An hour of flour"]
    assert words.completed(["our", "hour", "zzz", "lour"], texts) == ["flour", "hour", "zzz"]
