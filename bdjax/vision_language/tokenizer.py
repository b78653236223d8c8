"""CLIP's tokenizer: lower-cased words are split into bytes, which learned merges join to longer tokens.

The vocabulary is determined by the list of merges, as in OpenAI's implementation: 256 bytes, the same at the end of a
word, one token per merge, the start and the end of the text. OpenAI's list is the file bpe_simple_vocab_16e6.txt.gz of
the packages `clip` and `open_clip`, or merges.txt at Hugging Face; it is not part of bdjax. Without merges captions are
spelled in bytes, which needs no file.

The packages that have this tokenizer import PyTorch or a dozen others, and this one gives the same numbers. It differs
in two points: text is not repaired by ftfy, and the names of the start and the end token in a caption are plain text.
"""

import gzip
import html
import importlib.util
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from bdjax.errors import InputError
from bdjax.io.files import open_regular
from bdjax.text import visible

BYTES = 514
"""Tokens of a vocabulary without merges."""
OPENAI = 49408
"""Tokens of OpenAI's vocabulary, whose file holds more merges than that."""
_END_OF_WORD = "</w>"
_CONTRACTION = re.compile(r"'(?:s|t|re|ve|m|ll|d)")
_MAX_FILE = 64 << 20  # bytes of an unpacked vocabulary file
Merge = tuple[str, str]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with a fixed number of tokens per caption."""

    merges: tuple[Merge, ...]
    """Pairs of tokens that are joined, the most important first."""
    context: int
    """Tokens of a caption, with the start and the end token."""
    too_long: Literal["error", "cut"] = "error"
    """What is done with a caption of more tokens."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return BYTES + len(self.merges)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        letters = list(_letters().values())
        tokens = [*letters, *(letter + _END_OF_WORD for letter in letters), *("".join(pair) for pair in self.merges)]
        return {token: number for number, token in enumerate(tokens)}

    @cached_property
    def _ranks(self) -> dict[Merge, int]:
        return {pair: rank for rank, pair in enumerate(self.merges)}

    @cached_property
    def _words(self) -> dict[str, tuple[int, ...]]:
        return {}

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without start and end."""
        numbers: list[int] = []
        for word in split_words(clean(text)):
            if word not in self._words:
                spelled = [_letters()[byte] for byte in word.encode()]
                spelled[-1] += _END_OF_WORD
                self._words[word] = tuple(self._numbers[token] for token in merged(spelled, self._ranks))
            numbers += self._words[word]
        return numbers

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Return the tokens of captions, int32 [N, context], padded by zeros.

        Raises InputError for a caption without a word, and for one that is too long.
        """
        rows = np.zeros((len(captions), self.context), np.int32)
        for row, caption in enumerate(captions):
            tokens = self.encode(caption)
            if not tokens:
                raise InputError(f"caption {row} is {visible(caption)!r}: it has no word. Give every image a caption.")
            if len(tokens) > self.context - 2:
                if self.too_long == "error":
                    raise InputError(
                        f"caption {row} ({visible(caption)[:60]!r}...) has {len(tokens) + 2} tokens with start and "
                        f"end; the model takes {self.context}. Shorten it, or cut long captions (--too-long cut)."
                    )
                tokens = tokens[: self.context - 2]
            rows[row, : len(tokens) + 2] = [self.vocabulary - 2, *tokens, self.vocabulary - 1]
        return rows


def open_tokenizer(
    file: Path | None, vocabulary: int, context: int, too_long: Literal["error", "cut"] = "error"
) -> Tokenizer:
    """Return the tokenizer of a model.

    Args:
      file: file of merges, plain or compressed by gzip; None: no merges, or the file of an installed `open_clip` where
        the model has OpenAI's vocabulary.
      vocabulary: number of tokens of the model.
      context: tokens of a caption.
      too_long: what is done with a caption of more tokens.

    Returns:
      The tokenizer.

    Raises:
      InputError: when the vocabulary does not fit the model, or the file is damaged.
    """
    if file is None and vocabulary == OPENAI:
        file = _packaged()
    if file is None:
        if vocabulary != BYTES:
            raise InputError(
                f"the model has {vocabulary} tokens and no vocabulary was given; without one captions have {BYTES} "
                "tokens. Give the file of merges: --vocabulary bpe_simple_vocab_16e6.txt.gz (of OpenAI's clip or of "
                "open_clip_torch) or merges.txt."
            )
        return Tokenizer((), context, too_long)
    merges = read_merges(file)
    needed = vocabulary - BYTES
    if len(merges) < needed or (len(merges) > needed and vocabulary != OPENAI):
        raise InputError(
            f"{file} does not fit the model: it holds {len(merges)} merges, so {BYTES + len(merges)} tokens; the model "
            f"has {vocabulary}. Give the vocabulary that the model was trained with."
        )
    return Tokenizer(merges[:needed], context, too_long)


def read_merges(file: Path) -> tuple[Merge, ...]:
    """Read a file of merges: two tokens a line; lines that begin with # or hold #version are comments."""
    with open_regular(file, _MAX_FILE, "a vocabulary") as opened:
        content = opened.read()
    try:
        if content[:2] == b"\x1f\x8b":
            with gzip.open(file) as packed:
                content = packed.read(_MAX_FILE)
        lines = content.decode().split("\n")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{file} is no vocabulary ({visible(str(error))[:80]}). Give a file of merges.") from None
    pairs = [tuple(line.split()) for line in lines if line.strip() and "#version" not in line]
    wrong = next((pair for pair in pairs if len(pair) != 2), None)
    if wrong is not None or not pairs:
        raise InputError(
            f"{file} is no list of merges: {'it is empty' if wrong is None else f'a line holds {len(wrong)} words'}, "
            "where two tokens are expected. Give bpe_simple_vocab_16e6.txt.gz or merges.txt."
        )
    return tuple((first, second) for first, second in pairs)


def learn_merges(captions: Sequence[str], count: int) -> tuple[Merge, ...]:
    """Learn the merges of a small vocabulary: again and again the most frequent pair of neighbours is joined.

    Args:
      captions: texts.
      count: largest number of merges.

    Returns:
      The merges; fewer where every word is one token already.
    """
    words = Counter(word for caption in captions for word in split_words(clean(caption)))
    spelled: dict[str, list[str]] = {}
    for word in words:
        spelled[word] = [_letters()[byte] for byte in word.encode()]
        spelled[word][-1] += _END_OF_WORD
    merges: list[Merge] = []
    for _ in range(count):
        pairs: Counter[Merge] = Counter()
        for word, tokens in spelled.items():
            for pair in zip(tokens, tokens[1:], strict=False):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, tokens in spelled.items():
            spelled[word] = _join(tokens, best)
    return tuple(merges)


def clean(text: str) -> str:
    """Resolve HTML entities, join white space to single blanks, and convert to lower case."""
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def split_words(text: str) -> Iterator[str]:
    """Split a cleaned text as CLIP does: contractions, runs of letters, single digits, runs of other characters."""
    position = 0
    while position < len(text):
        contraction = _CONTRACTION.match(text, position)
        if contraction:
            end = contraction.end()
        else:
            end, kind = position + 1, _kind(text[position])
            while kind in "LO" and end < len(text) and _kind(text[end]) == kind:
                end += 1
        if not text[position].isspace():
            yield text[position:end]
        position = end


def merged(tokens: list[str], ranks: dict[Merge, int]) -> list[str]:
    """Join neighbours in the order of the merges.

    Args:
      tokens: the letters of a word.
      ranks: position of each merge in the list.

    Returns:
      The tokens of the word.
    """
    while len(tokens) > 1:
        rank, best = min((ranks.get(pair, len(ranks)), pair) for pair in zip(tokens, tokens[1:], strict=False))
        if rank == len(ranks):
            break
        tokens = _join(tokens, best)
    return tokens


def _join(tokens: list[str], pair: Merge) -> list[str]:
    """Join every occurrence of a pair, from left to right."""
    joined: list[str] = []
    for token in tokens:
        if joined and (joined[-1], token) == pair:
            joined[-1] += token
            # a token that was joined is not joined again in this pass
            joined.append("")
        else:
            joined.append(token)
    return [token for token in joined if token]


def _kind(character: str) -> str:
    """Class of a character: L letter, N number, S space, O other."""
    category = unicodedata.category(character)[0]
    return "S" if character.isspace() else category if category in "LN" else "O"


@lru_cache
def _letters() -> dict[int, str]:
    """A printable letter for each byte, in the order of OpenAI's vocabulary: printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _packaged() -> Path | None:
    """OpenAI's file in an installed `open_clip`, which is not imported."""
    spec = importlib.util.find_spec("open_clip")
    folders = spec.submodule_search_locations if spec is not None else None
    files = [Path(folder) / "bpe_simple_vocab_16e6.txt.gz" for folder in folders or ()]
    return next((file for file in files if file.is_file()), None)
