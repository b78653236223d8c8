"""CLIP's tokenizer: published numbers, a small vocabulary, captions and vocabularies that do not fit."""

import gzip

import numpy as np
import pytest

from bdjax.errors import InputError
from bdjax.vision_language import prompts, tokenizer
from bdjax.vision_language.tokenizer import Tokenizer, learn_merges, open_tokenizer, split_words

CAT = [("c", "a"), ("ca", "t</w>"), ("o", "f</w>")]
"""Merges for "cat" and "of"."""


def test_the_vocabulary_is_numbered_as_openai_numbers_it():
    # of the first 512 tokens the bytes "!" to "~" come first; a byte at the end of a word is 256 further
    tokens = Tokenizer(tuple(CAT), 8)
    assert tokens.encode("a") == [
        320
    ]  # as every published example of CLIP: "a photo of a cat" is 320 1125 539 320 2368
    assert tokens.encode("!") == [256] and tokens.encode("~") == [93 + 256]
    assert tokens.encode("Cat of") == [512 + 1, 512 + 2]
    assert tokens.encode("cats") == [512, 83, 82 + 256]
    assert tokens(["a cat"]).tolist() == [[515, 320, 513, 516, 0, 0, 0, 0]]


def test_merges_are_applied_by_rank_and_to_every_occurrence():
    ranks = {("b", "c"): 0, ("a", "b"): 1, ("a", "bc"): 2}
    assert tokenizer.merged(["a", "b", "c", "a", "b", "c"], ranks) == ["abc", "abc"]
    assert tokenizer.merged(["a", "a", "a"], {("a", "a"): 0}) == ["aa", "a"]
    assert tokenizer.merged(["x"], ranks) == ["x"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("don't stop", ["don", "'t", "stop"]),
        ("it's 2026!?", ["it", "'s", "2", "0", "2", "6", "!?"]),
        ("!'s", ["!'", "s"]),
        ("Zürich 東京", ["zürich", "東京"]),
        ("r&amp;amp;d\t x²", ["r", "&", "d", "x", "²"]),
    ],
)
def test_words_are_split_as_clip_splits_them(text, words):
    assert list(split_words(tokenizer.clean(text))) == words


def test_learned_merges_join_the_most_frequent_neighbours_first():
    captions = ["the cat", "the cat", "the dog"]
    merges = learn_merges(captions, 4)
    assert merges[:2] == (("h", "e</w>"), ("t", "he</w>"))
    assert len(Tokenizer(merges, 8).encode("the cat")) < len(Tokenizer((), 12).encode("the cat"))
    assert len(learn_merges(["ab"], 50)) == 1


@pytest.mark.parametrize("packed", [True, False])
def test_a_file_of_merges_is_read_plain_and_compressed(packed, tmp_path):
    text = '"bpe.txt#version: 0.2\n' + "\n".join(" ".join(pair) for pair in CAT) + "\n"
    file = tmp_path / "v.txt"
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert open_tokenizer(file, 517, 9).merges == tuple(CAT)
    with pytest.raises(InputError, match="holds 3 merges, so 517 tokens; the model has 520"):
        open_tokenizer(file, 520, 9)
    with pytest.raises(InputError, match="holds 3 merges"):
        open_tokenizer(file, 516, 9)


def test_a_model_with_words_needs_a_vocabulary(monkeypatch):
    monkeypatch.setattr(tokenizer, "_packaged", lambda: None)
    assert open_tokenizer(None, 514, 9).vocabulary == 514
    with pytest.raises(InputError, match="has 49408 tokens and no vocabulary was given"):
        open_tokenizer(None, 49408, 77)


@pytest.mark.parametrize("content", [b"", b"one two three\n", b"\x1f\x8bnot gzip", b"\xff\xfe"])
def test_other_files_are_no_vocabulary(content, tmp_path):
    (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(InputError, match="v.txt is no"):
        tokenizer.read_merges(tmp_path / "v.txt")


def test_captions_that_do_not_fit_are_refused_or_cut():
    with pytest.raises(InputError, match=r"caption 1 .* has 6 tokens with start and end; the model takes 5"):
        Tokenizer((), 5)(["abc", "abcd"])
    with pytest.raises(InputError, match="caption 0 is ' ': it has no word"):
        Tokenizer((), 5)([" "])
    cut = Tokenizer((), 5, "cut")(["abcd"])
    assert cut.tolist() == [[512, 64, 65, 66, 513]]


def test_templates_are_clips():
    assert len(set(prompts.CIFAR)) == 18 and "a blurry photo of the {}." in prompts.CIFAR
    assert prompts.fill("a photo of a {}.", "polar_bear") == "a photo of a polar bear."
    captions = prompts.random_captions(("cat", "dog"), np.array([1, 0]), ("the {}",), np.random.default_rng(0))
    assert captions == ("the dog", "the cat")


def test_a_file_of_templates_needs_one_place_for_the_class(tmp_path):
    (tmp_path / "t.txt").write_text("a {}.\n\nthe {}.\n")
    assert prompts.templates(str(tmp_path / "t.txt")) == ("a {}.", "the {}.")
    (tmp_path / "t.txt").write_text("a cat.\n")
    with pytest.raises(InputError, match="'a cat.' is no template"):
        prompts.templates(str(tmp_path / "t.txt"))
