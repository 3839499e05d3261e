"""Sentences to CLIP's token ids."""

import json
import random
import string
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

import crislit
from crislit.transforms.tokenizer import has_words, tokenize

SOS, EOS = 49406, 49407
LONG = (
    "person standing at the very far end of the table next to the woman who is wearing a bright "
    "yellow rain coat"
)
# The same examples on every run, and no failure on a busy machine.
relaxed = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("max_words", [17, 22])
def test_token_ids_are_the_golden_ones(golden: Path, max_words: int) -> None:
    sentences = json.loads((golden / "preprocess.expressions.json").read_text())
    with np.load(golden / "preprocess.npz") as file:
        expected = torch.from_numpy(file[f"token_ids_{max_words}"])
    ids = tokenize(sentences, max_words)
    assert ids.dtype == torch.long
    assert torch.equal(ids, expected)


def test_padding_is_zero_after_the_end_of_the_sentence() -> None:
    (ids,) = tokenize(["kid"], 8).tolist()
    assert ids[0] == SOS
    assert ids[1] not in (0, SOS, EOS)
    assert ids[2:] == [EOS, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("max_words", range(3, 23))
def test_truncation_keeps_the_first_words_and_the_end_of_the_sentence(max_words: int) -> None:
    all_ids = tokenize([LONG], 77)[0].tolist()
    assert all_ids.index(EOS) > 22
    (ids,) = tokenize([LONG], max_words).tolist()
    assert ids == [*all_ids[: max_words - 1], EOS]


def test_a_sentence_that_just_fits_is_not_truncated() -> None:
    four_words = tokenize(["the left red dog"], 77)[0].tolist()
    assert four_words.index(EOS) == 5
    assert tokenize(["the left red dog"], 6)[0].tolist() == four_words[:6]


@pytest.mark.parametrize(
    "unclean",
    ["The  DOG &amp; cat", "the dog &amp;amp; cat", "\tthe dog\n & cat ", "THE DOG & CAT"],
)
def test_sentences_are_cleaned_as_in_clip(unclean: str) -> None:
    assert torch.equal(tokenize([unclean]), tokenize(["the dog & cat"]))


def test_an_empty_sentence_has_start_and_end_tokens_only() -> None:
    assert tokenize(["", "  "], 5).tolist() == [[SOS, EOS, 0, 0, 0]] * 2


def test_an_empty_list_gives_no_rows() -> None:
    ids = tokenize([], 17)
    assert ids.shape == (0, 17)
    assert ids.dtype == torch.long


def test_sentences_do_not_depend_on_each_other() -> None:
    sentences = ["kid", LONG, "", "left"]
    alone = torch.cat([tokenize([sentence]) for sentence in sentences])
    assert torch.equal(tokenize(sentences), alone)
    assert torch.equal(tokenize(tuple(sentences)), alone)


def test_a_bare_string_is_a_type_error_with_a_suggestion() -> None:
    with pytest.raises(TypeError, match=r"write \['the dog'\]"):
        tokenize("the dog")


@pytest.mark.parametrize("max_words", [2, 1, 0, -1])
@pytest.mark.parametrize("sentences", [["the dog"], []])
def test_room_for_less_than_one_word_is_a_value_error(sentences: list[str], max_words: int) -> None:
    with pytest.raises(ValueError, match=f"max_words must be at least 3 .* got {max_words}"):
        tokenize(sentences, max_words)


def test_the_package_exports_the_function() -> None:
    assert crislit.tokenize is tokenize


@pytest.mark.parametrize(
    "typed",
    [
        "<|endoftext|>",
        "<end_of_text>",
        "<START_OF_TEXT>",
        "&lt;end_of_text&gt;",
        "a <end_of_text> dog <start_of_text>",
    ],
)
def test_start_and_end_tokens_in_a_sentence_are_plain_text(typed: str) -> None:
    (ids,) = tokenize([typed], 40).tolist()
    assert (ids.count(SOS), ids.count(EOS)) == (1, 1)
    assert ids.index(EOS) > 4, "the letters are tokens"


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("!", [256]),
        ("a dog!", [320, 1929, 256]),
        ("hello! there", [3306, 256, 997]),
        ("!!!", [995]),
        ("dog!%", [1929, 0, 260]),
        ("![", [0, 314]),
    ],
)
def test_only_an_exclamation_mark_that_is_not_merged_has_the_id_of_the_padding(
    sentence: str, expected: list[int]
) -> None:
    (ids,) = tokenize([sentence], 17).tolist()
    assert ids[: len(expected) + 2] == [SOS, *expected, EOS]
    assert not any(ids[len(expected) + 2 :])


@pytest.mark.parametrize("name", ["endoftext", "startoftext"])
def test_the_special_tokens_of_the_released_code_are_text(name: str) -> None:
    """There, they are [EOS] and [SOS] wherever they are typed."""
    (ids,) = tokenize([f"dog <|{name}|> cat"], 30).tolist()
    assert (ids.count(SOS), ids.count(EOS)) == (1, 1)
    assert ids[ids.index(EOS) - 1] == tokenize(["cat"])[0, 1], "the words behind it count"


def test_a_word_of_a_million_letters_takes_no_minutes() -> None:
    word = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=10**6))
    start = time.process_time()
    assert tokenize([word], 17).shape == (1, 17)
    assert time.process_time() - start < 5


@given(sentence=st.text(max_size=60), max_words=st.integers(3, 25))
@settings(relaxed)
def test_any_text_gives_one_row_with_start_and_end(sentence: str, max_words: int) -> None:
    (ids,) = tokenize([sentence], max_words).tolist()
    assert len(ids) == max_words
    assert ids[0] == SOS
    end = ids.index(EOS)
    assert max(ids) == EOS, "the text encoder finds the end by the largest id"
    assert SOS not in ids[1:]
    assert not any(ids[end + 1 :])


FIRST_USE = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from crislit.transforms.tokenizer import tokenize
barrier = Barrier(8)
def first(_):
    barrier.wait()
    return tokenize(["a <end_of_text> b"], 17).tolist()
with ThreadPoolExecutor(8) as pool:
    results = list(pool.map(first, range(8)))
assert all(ids == tokenize(["a <end_of_text> b"], 17).tolist() for ids in results)
assert results[0][0].count(49407) == 1
"""


def test_the_first_use_by_several_threads_gives_all_the_same_ids() -> None:
    subprocess.run([sys.executable, "-c", FIRST_USE], check=True)


@pytest.mark.parametrize("sentence", ["", " ", "&nbsp;", "\n\t"])
def test_blank_sentences_have_no_words(sentence: str) -> None:
    assert not has_words(sentence)
    assert has_words("the man in red")


@pytest.fixture(scope="module")
def reference() -> SimpleTokenizer:
    return SimpleTokenizer()


@settings(relaxed, max_examples=300)
@given(sentence=st.text(st.sampled_from(string.printable), max_size=40))
def test_plain_sentences_are_cleaned_as_clip_cleans_them(
    reference: SimpleTokenizer, sentence: str
) -> None:
    assert torch.equal(tokenize([sentence], 22), reference([sentence], context_length=22))
