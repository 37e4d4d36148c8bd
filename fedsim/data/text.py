"""Sentences as token ids, some of them masked: the training set of a masked language model (Devlin et al. 2019).

A sequence is [CLS] words [SEP] [PAD] …, ids are int64 (N, L). What a model is given has `MASKED` of the words replaced by [MASK];
what it shall predict are the words that stood there, and IGNORED everywhere else. Which words are masked is drawn once, from the
seed and the sentence's place, so whoever scores an attack recomputes the very batch.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fedsim.data import grammar
from fedsim.data.images import fingerprint
from fedsim.seeding import generator, seed_of
from fedsim.training import IGNORED

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
PAD, CLS, SEP, MASK, UNK = range(len(SPECIAL))
LENGTH = 16
VOCABULARY = 400  # tokens, the special ones counted
MASKED = 0.15
_TOKEN = re.compile(r"\w+|[^\w\s]")

# Three sentences to show recoveries of: every word is one of the grammar's.
DEMO = (
    "the nurse secretly deleted our report because the doctor paid her .",
    "last friday , my lawyer transferred her secret fortune outside the bank .",
    "did you know who borrowed the confidential diagnosis in this library ?",
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id: the special ones first, then words in lower case and punctuation marks."""

    tokens: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.tokens[: len(SPECIAL)] != SPECIAL:
            raise ValueError(f"a vocabulary begins with {' '.join(SPECIAL)}, got {' '.join(self.tokens[: len(SPECIAL)])}")

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, sentences: Sequence[str], size: int = VOCABULARY) -> "Vocabulary":
        """The special tokens and the most frequent words of `sentences`, `size` tokens at most."""
        counts = Counter(word for sentence in sentences for word in words_of(sentence))
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls((*SPECIAL, *ordered[: size - len(SPECIAL)]))

    def encode(self, sentences: Sequence[str], length: int = LENGTH) -> Tensor:
        """Ids (N, length); words beyond the length are cut off, words not in the vocabulary are [UNK]."""
        ids = torch.full((len(sentences), length), PAD)
        for row, sentence in zip(ids, sentences, strict=True):
            words = [self._places.get(word, UNK) for word in words_of(sentence)][: length - 2]
            row[: len(words) + 2] = torch.tensor([CLS, *words, SEP])
        return ids

    def decode(self, ids: Tensor) -> str:
        """The text of one sequence (L,), tokens separated by spaces; [PAD], [CLS] and [SEP] are left out."""
        return " ".join(self.tokens[i] for i in ids.tolist() if i not in (PAD, CLS, SEP))

    @cached_property
    def _places(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}


def words_of(sentence: str) -> list[str]:
    """Words and punctuation marks in lower case."""
    return _TOKEN.findall(sentence.lower())


def is_word(ids: Tensor) -> Tensor:
    """Where `ids` hold something a person wrote: all but [PAD], [CLS] and [SEP]."""
    return (ids != PAD) & (ids != CLS) & (ids != SEP)


def masked(ids: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and labels (N, L) of sequences (N, L): `MASKED` of each one's words, one at least, are hidden behind [MASK]."""
    wanted = (MASKED * is_word(ids).sum(1)).round().clamp(min=1)
    order = torch.where(is_word(ids), torch.rand(ids.shape, generator=rng), 2).argsort(1).argsort(1)
    hidden = (order < wanted[:, None]) & is_word(ids)
    return torch.where(hidden, MASK, ids), torch.where(hidden, ids, IGNORED)


def filled(inputs: Tensor, labels: Tensor) -> Tensor:
    """The sequences (N, L) with the predicted words put back in their places."""
    return torch.where(labels == IGNORED, inputs, labels)


@dataclass(frozen=True, eq=False)
class Sentences:
    """One split of a corpus.

    inputs   (N, L) ids as the model is given them
    targets  (N, L) the words behind the masks, IGNORED elsewhere
    labels   (N,) topics, which partitions go by
    """

    inputs: Tensor
    targets: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        for name, ids in (("inputs", self.inputs), ("targets", self.targets)):
            if ids.dtype != torch.int64 or ids.dim() != 2 or ids.shape != self.inputs.shape:
                raise ValueError(f"{name} must be int64 {tuple(self.inputs.shape)}, got {ids.dtype} {tuple(ids.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.inputs.shape[:1]:
            raise ValueError(f"labels must be int64 ({len(self.inputs)},), got {self.labels.dtype} {tuple(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Sentences({len(self)} of {self.inputs.shape[1]} tokens)"

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (B, L) each, at the places `index` (B,)."""
        return self.inputs[index], self.targets[index]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All sentences in order, `size` at a time; the last batch may be smaller."""
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        yield from zip(self.inputs.split(size), self.targets.split(size), strict=True)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and test sentences over one vocabulary. To a model, an input is L tokens and a class is a token."""

    name: str
    train: Sentences
    test: Sentences
    classes: tuple[str, ...]
    vocabulary: Vocabulary

    mean = std = None  # tokens are not normalised

    def __repr__(self) -> str:
        return f"Corpus({self.name!r}, train={self.train}, test={self.test}, {len(self.vocabulary)} tokens)"

    @property
    def image_shape(self) -> tuple[int]:
        """(L,), the shape of one input."""
        return (self.train.inputs.shape[1],)

    @property
    def num_classes(self) -> int:
        """V, the number of tokens."""
        return len(self.vocabulary)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the training sentences in their order."""
        return fingerprint(self.train.inputs, self.train.targets)

    @cached_property
    def typical(self) -> Tensor:
        """(L,) the most frequent token at each position: what an attacker who knows only the corpus would write."""
        return filled(self.train.inputs, self.train.targets).mode(0).values


def drawn(train_size: int, test_size: int, seed: int) -> Corpus:
    """A corpus of sentences that the grammar draws; the topic of each is drawn too."""
    vocabulary = Vocabulary((*SPECIAL, *grammar.words()))
    topics = tuple(grammar.TOPICS)

    def split(name: str, size: int) -> Sentences:
        rng = random.Random(seed_of(seed, "text", name, grammar.VERSION))
        labels = [rng.randrange(len(topics)) for _ in range(size)]
        sentences = [grammar.sentence(topics[label], rng) for label in labels]
        return _sentences(vocabulary.encode(sentences), torch.tensor(labels), seed, name)

    return Corpus("text", split("train", train_size), split("test", test_size), topics, vocabulary)


def read(path: Path, train_size: int | None, test_size: int | None, seed: int) -> Corpus:
    """A corpus of one's own: a text file with one sentence on each line. There is one topic.

    The lines are shuffled and a tenth of them held back for testing, unless sizes say otherwise; the vocabulary is that of the
    training lines.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if words_of(line)]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read sentences from {path}: {error}") from None
    # A sentence in both splits would be a test that was trained on; what differs in what is cut off, or in capitals, is one.
    lines = list({tuple(words_of(line)[: LENGTH - 2]): line for line in reversed(lines)}.values())[::-1]
    test_size = test_size or max(1, len(lines) // 10)
    train_size = train_size or max(1, len(lines) - test_size)
    if train_size + test_size > len(lines):
        raise ValueError(
            f"{path} has {len(lines)} different sentences, one on each line: too few for data.train_size={train_size} "
            f"and data.test_size={test_size}"
        )
    order = torch.randperm(len(lines), generator=generator(seed, "subset", "text")).tolist()
    train, test = ([lines[i] for i in part] for part in (order[:train_size], order[train_size : train_size + test_size]))
    vocabulary = Vocabulary.of(train)

    def split(name: str, part: list[str]) -> Sentences:
        return _sentences(vocabulary.encode(part), torch.zeros(len(part), dtype=torch.int64), seed, name)

    return Corpus("text", split("train", train), split("test", test), (path.stem,), vocabulary)


def _sentences(ids: Tensor, labels: Tensor, seed: int, name: str) -> Sentences:
    return Sentences(*masked(ids, generator(seed, "mask", name)), labels)
