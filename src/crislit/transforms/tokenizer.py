"""Sentences to the token ids of CLIP."""

import functools
import re
from collections.abc import Callable, Sequence

from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

BRACKETS = re.compile("<(start_of_text|end_of_text)>", re.IGNORECASE)
"""open_clip encodes these as [SOS] and [EOS] wherever they occur; in a sentence they are text.

OpenAI's tokenizer, and with it the released code, does so with ``<|startoftext|>`` and
``<|endoftext|>``, which are text for open_clip.
"""
PLAIN_TEXT = re.compile("[ -%'-~]*")
"""Printable ASCII without ampersands: CLIP's cleaning only changes its white space and capitals."""
MAX_CHARACTERS = 2048
"""Longest sentence in characters; the rest is dropped. Far more than CLIP's context can hold, but
few enough that a single huge word does not take minutes to encode."""
MAX_RAW_CHARACTERS = 16 * MAX_CHARACTERS
"""Longest sentence before cleaning, which shortens HTML entities and is slow on long text."""


def tokenize(sentences: Sequence[str], max_words: int = 17) -> Tensor:
    """Encode sentences with CLIP's byte pair encoding, between [SOS] and [EOS], padded with 0.

    Args:
        sentences: Any text. CLIP's cleaning applies (HTML entities, white space, lower case).
        max_words: L, maximum number of tokens per sentence, [SOS] and [EOS] included: 17 for
            RefCOCO and RefCOCO+, 22 for G-Ref (section 4.2). Longer sentences are truncated, and
            still end in [EOS].

    Returns:
        (number of sentences, L) long. The padding follows [EOS]. Within a sentence, id 0 is a "!"
        that is not merged with what follows, as in "!%"; a plain "!" has id 256.

    Raises:
        ValueError: If ``max_words`` is less than 3.
        TypeError: If ``sentences`` is a single string.
    """
    if max_words < 3:
        raise ValueError(f"max_words must be at least 3 ([SOS], a word, [EOS]), got {max_words}")
    if isinstance(sentences, str):
        raise TypeError(f"expected a list of sentences, got one string; write [{sentences!r}]")
    tokens: Tensor = _clip_tokenizer()(list(sentences), context_length=max_words)
    return tokens


def truncated_words(sentence: str, max_words: int) -> str:
    """Return the end of a sentence that ``tokenize`` drops at ``max_words`` tokens, if any."""
    return split_at_limit(sentence, max_words)[1].lstrip()


def split_at_limit(sentence: str, max_words: int) -> tuple[str, str]:
    """Divide a sentence, after CLIP's cleaning, into what ``tokenize`` keeps and drops.

    The limit may lie inside a word. A character of which only some bytes are kept is dropped.
    """
    tokenizer = _clip_tokenizer()
    cleaned, room = str(tokenizer.clean_fn(sentence)), max_words - 2
    if len(tokenizer.encode(sentence)) <= room:
        return cleaned, ""
    for word in tokenizer.pat.finditer(cleaned):
        tokens = tokenizer.encode(word.group())
        if len(tokens) > room:
            symbols = "".join(tokenizer.decoder[token] for token in tokens[:room])
            kept = bytes(tokenizer.byte_decoder[symbol] for symbol in symbols)
            end = word.start() + len(kept.decode(errors="ignore"))
            return cleaned[:end], cleaned[end:]
        room -= len(tokens)
    raise AssertionError("the words of a sentence have as many tokens as the sentence")


def has_words(sentence: str) -> bool:
    """Return whether CLIP's cleaning leaves any text of a sentence."""
    return bool(_clip_tokenizer().clean_fn(sentence).strip())


@functools.cache
def _clip_tokenizer() -> SimpleTokenizer:
    """Return CLIP's tokenizer, cleaning sentences by ``_clean``. Built on first use."""
    tokenizer = SimpleTokenizer()
    tokenizer.clean_fn = functools.partial(_clean, tokenizer.clean_fn)
    return tokenizer


def _clean(clip_clean: Callable[[str], str], text: str) -> str:
    """Apply CLIP's cleaning, limit the length, and break up [SOS] and [EOS] that were typed."""
    if PLAIN_TEXT.fullmatch(text):
        # Same result, without the slow repair of broken encodings.
        cleaned = " ".join(text.split()).lower()
    else:
        if len(text) > MAX_RAW_CHARACTERS:
            text = re.sub(r"\s+", " ", text).strip()[:MAX_RAW_CHARACTERS]
        cleaned = clip_clean(text)
    return BRACKETS.sub(r"< \1 >", cleaned[:MAX_CHARACTERS])
