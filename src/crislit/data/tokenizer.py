"""Sentences to CLIP's token ids."""

import re
import threading
from collections.abc import Callable, Sequence

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

BRACKETS = re.compile("<(start_of_text|end_of_text)>", re.IGNORECASE)
"""What open_clip takes for [SOS] and [EOS] wherever it is written; somebody's sentence cannot contain them."""

PLAIN = re.compile("[ -%'-~]*")
"""Printable ASCII without an ampersand, of which CLIP's cleaning keeps all but white space and capitals."""

LONGEST = 2048
"""Characters of a sentence that are read: many times what CLIP's context holds; a single word of more would take minutes."""
LONGEST_RAW = 16 * LONGEST
"""Characters before CLIP's cleaning, which shortens entities and takes seconds for much more."""

_tokenizer: SimpleTokenizer | None = None
_making = threading.Lock()


def tokenize(sentences: Sequence[str], max_words: int = 17) -> Tensor:
    """Turn sentences into ids of CLIP's byte pair encoding, bracketed by [SOS] and [EOS] and padded with 0.

    Args:
        sentences: Any text; CLIP's cleaning applies (HTML entities, white space, lower case).
        max_words: Tokens a sentence may have, [SOS] and [EOS] included: 17 for RefCOCO and RefCOCO+, 22 for G-Ref
            (section 4.2). Longer ones are cut, and keep [EOS].

    Returns:
        (number of sentences, max_words) long.

    Raises:
        ValueError: If not even one token of a sentence fits.
    """
    if max_words < 3:
        raise ValueError(f"max_words must be at least 3 ([SOS], a word, [EOS]), got {max_words}")
    if isinstance(sentences, str):
        raise TypeError(f"expected a list of sentences, got one string; write [{sentences!r}]")
    if not sentences:
        return torch.zeros(0, max_words, dtype=torch.long)
    tokens: Tensor = _clip_tokenizer()(list(sentences), context_length=max_words)
    return tokens


def cut_words(sentence: str, max_words: int) -> str:
    """Return the words that :func:`tokenize` leaves out, in whole or in part, of a sentence that is too long; else nothing."""
    tokenizer = _clip_tokenizer()
    if len(tokenizer.encode(sentence)) <= max_words - 2:
        return ""
    cleaned, count = tokenizer.clean_fn(sentence), 0
    for word in tokenizer.pat.finditer(cleaned):
        count += len(tokenizer.encode(word.group()))
        if count > max_words - 2:
            return str(cleaned[word.start() :])
    raise AssertionError


def has_words(sentence: str) -> bool:
    """Whether CLIP's cleaning leaves anything of a sentence for the network to read."""
    return bool(_clip_tokenizer().clean_fn(sentence).strip())


def _clip_tokenizer() -> SimpleTokenizer:
    global _tokenizer
    with _making:
        if _tokenizer is None:
            made = SimpleTokenizer()
            clean = made.clean_fn
            made.clean_fn = lambda text: BRACKETS.sub(r"< \1 >", _cleaned(text, clean)[:LONGEST])
            _tokenizer = made
    return _tokenizer


def _cleaned(text: str, clean: Callable[[str], str]) -> str:
    if PLAIN.fullmatch(text):  # repairing broken encodings takes as long as all the rest, and here is nothing to repair
        return " ".join(text.split()).lower()
    return clean(_shortened(text))


def _shortened(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()[:LONGEST_RAW] if len(text) > LONGEST_RAW else text
