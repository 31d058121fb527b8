"""Near duplicates against the exact Jaccard index, computed here from the sets themselves."""

import random

import pytest

from anima.inspection.near_duplicates import STRETCH, NearDuplicates, normalised


def _jaccard(a: str, b: str) -> float:
    left, right = ({text[i : i + STRETCH] for i in range(max(1, len(text) - STRETCH + 1))} for text in (a, b))
    return len(left & right) / len(left | right)


def test_what_is_compared() -> None:
    assert normalised("  Ab\n\tC ") == "ab c"


@pytest.mark.parametrize("alphabet", ["abcdefghij klm", "一二三四五六七八九十，。"])
def test_estimates_are_near_the_index(alphabet: str) -> None:
    generator = random.Random(1)
    base = "".join(generator.choices(alphabet, k=400))
    search = NearDuplicates(0.5)
    assert search.find_and_add(0, base) == []
    for key, changes in enumerate((0, 5, 15), start=1):
        letters = list(base)
        for place in generator.sample(range(len(letters)), changes):
            letters[place] = "x"
        text = "".join(letters)
        found = dict(search.find_and_add(key, text))
        assert found[0] == pytest.approx(_jaccard(base, text), abs=0.15)


def test_different_texts_are_no_duplicates() -> None:
    generator = random.Random(2)
    search = NearDuplicates(0.8)
    texts = ["".join(generator.choices("abcdefghijklmnop ", k=200)) for _ in range(50)]
    assert [search.find_and_add(key, text) for key, text in enumerate(texts)] == [[]] * 50
    assert search.find_and_add(99, texts[7])[0] == (7, 1.0)


def test_short_texts() -> None:
    search = NearDuplicates(0.8)
    for key, text in enumerate(("", "a", "b", "ab")):
        assert search.find_and_add(key, text) == []
    assert search.find_and_add(9, "a") == [(1, 1.0)]


def test_only_texts_above_the_limit_count() -> None:
    """Candidates of the index are below it at times; 12 changes of 400 letters leave an index of about 0.74."""
    generator = random.Random(3)
    search = NearDuplicates(0.8)
    for key in range(0, 60, 2):
        letters = generator.choices("abcdefghij klm", k=400)
        search.find_and_add(key, "".join(letters))
        for place in generator.sample(range(400), 12):
            letters[place] = "x"
        assert all(share >= 0.8 for _, share in search.find_and_add(key + 1, "".join(letters)))


def test_half_a_character_is_compared_like_any_other() -> None:
    search = NearDuplicates(0.8)
    text = "an answer \ud83d of several words"
    assert search.find_and_add(0, text) == []
    assert search.find_and_add(1, text) == [(0, 1.0)]


def test_a_similarity_of_one_finds_only_the_same_stretches() -> None:
    search = NearDuplicates(1.0)
    letters = "abcdefghij" * 30
    assert search.find_and_add(0, letters) == []
    assert search.find_and_add(1, letters + "abcde") == [(0, 1.0)]
    assert search.find_and_add(2, letters + "xyz") == []
