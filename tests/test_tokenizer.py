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
from crislit.data.tokenizer import has_words, tokenize

SOS, EOS = 49406, 49407
LONG = "person standing at the very far end of the table next to the woman who is wearing a bright yellow rain coat"


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
    whole = tokenize([LONG], 77)[0].tolist()
    assert whole.index(EOS) > 22
    (ids,) = tokenize([LONG], max_words).tolist()
    assert ids == [*whole[: max_words - 1], EOS]


def test_a_sentence_that_just_fits_is_not_cut() -> None:
    four_words = tokenize(["the left red dog"], 77)[0].tolist()
    assert four_words.index(EOS) == 5
    assert tokenize(["the left red dog"], 6)[0].tolist() == four_words[:6]


@pytest.mark.parametrize("unclean", ["The  DOG &amp; cat", "the dog &amp;amp; cat", "\tthe dog\n & cat ", "THE DOG & CAT"])
def test_clips_cleaning_applies(unclean: str) -> None:
    assert torch.equal(tokenize([unclean]), tokenize(["the dog & cat"]))


def test_an_empty_sentence_is_its_two_brackets() -> None:
    assert tokenize(["", "  "], 5).tolist() == [[SOS, EOS, 0, 0, 0]] * 2


def test_no_sentence_gives_no_row() -> None:
    ids = tokenize([], 17)
    assert ids.shape == (0, 17)
    assert ids.dtype == torch.long


def test_sentences_do_not_depend_on_their_neighbours() -> None:
    sentences = ["kid", LONG, "", "left"]
    alone = torch.cat([tokenize([sentence]) for sentence in sentences])
    assert torch.equal(tokenize(sentences), alone)
    assert torch.equal(tokenize(tuple(sentences)), alone)


def test_a_bare_string_is_a_type_error_that_says_what_to_write() -> None:
    with pytest.raises(TypeError, match=r"write \['the dog'\]"):
        tokenize("the dog")


@pytest.mark.parametrize("max_words", [2, 1, 0, -1])
@pytest.mark.parametrize("sentences", [["the dog"], []])
def test_room_for_less_than_one_word_is_a_value_error(sentences: list[str], max_words: int) -> None:
    with pytest.raises(ValueError, match=f"max_words must be at least 3 .* got {max_words}"):
        tokenize(sentences, max_words)


def test_the_package_offers_the_same_function() -> None:
    assert crislit.tokenize is tokenize


@pytest.mark.parametrize(
    "typed", ["<|endoftext|>", "<end_of_text>", "<START_OF_TEXT>", "&lt;end_of_text&gt;", "a <end_of_text> dog <start_of_text>"]
)
def test_brackets_that_are_typed_are_text(typed: str) -> None:
    (ids,) = tokenize([typed], 40).tolist()
    assert (ids.count(SOS), ids.count(EOS)) == (1, 1)
    assert ids.index(EOS) > 4, "its letters are tokens"


def test_a_word_without_end_is_cut_before_it_takes_minutes() -> None:
    word = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=10**6))
    start = time.process_time()
    assert tokenize([word], 17).shape == (1, 17)
    assert time.process_time() - start < 5


@given(sentence=st.text(max_size=60), max_words=st.integers(3, 25))
@settings(deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_becomes_one_bracketed_row(sentence: str, max_words: int) -> None:
    (ids,) = tokenize([sentence], max_words).tolist()
    assert len(ids) == max_words
    assert ids[0] == SOS
    end = ids.index(EOS)
    assert max(ids) == EOS, "which is how the text encoder finds it"
    assert SOS not in ids[1:]
    assert not any(ids[end + 1 :])


FIRST_USE = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from crislit.data.tokenizer import tokenize
together = Barrier(8)
def first(_):
    together.wait()
    return tokenize(["a <end_of_text> b"], 17).tolist()
with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(first, range(8)))
assert all(one == tokenize(["a <end_of_text> b"], 17).tolist() for one in found)
assert found[0][0].count(49407) == 1
"""


def test_threads_that_use_it_first_all_get_the_same() -> None:
    subprocess.run([sys.executable, "-c", FIRST_USE], check=True)


@pytest.mark.parametrize("sentence", ["", " ", "&nbsp;", "\n\t"])
def test_what_leaves_no_token_has_no_words(sentence: str) -> None:
    assert not has_words(sentence)
    assert has_words("the man in red")


@pytest.fixture(scope="module")
def reference() -> SimpleTokenizer:
    return SimpleTokenizer()


@settings(deadline=None, database=None, derandomize=True, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(sentence=st.text(st.sampled_from(string.printable), max_size=40))
def test_a_plain_sentence_is_cleaned_as_clip_cleans_it(reference: SimpleTokenizer, sentence: str) -> None:
    assert torch.equal(tokenize([sentence], 22), reference([sentence], context_length=22))
