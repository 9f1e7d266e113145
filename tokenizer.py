"""Captions to token ids, one tokenizer for each kind of text tower.

Every tokenizer is called as `tok(texts, context_length=None)` and returns a LongTensor (n, L),
two-dimensional also for a single text, padded after the last real token (with id 0, or the tokenizer's
`pad_id` where it has one). A text that is too long loses its tail, never its end token: the text towers
read the position of that token, or everything up to it.
"""

from __future__ import annotations

import functools
import gzip
import html
import string
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import ftfy
import numpy as np
import regex
import torch

CONTEXT_LENGTH = 77  # CLIP's, and MedCLIP's cut for captions
BPE_PATH = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")  # CLIP's merges, from open_clip_torch


class Tokenizer(Protocol):
    """What training and evaluation ask of a tokenizer."""

    kind: str  # key of TOKENIZERS
    context_length: int  # tokens of a row at most, special ones included

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        ...

    def spec(self) -> dict[str, Any]:
        """Plain values from which `create_tokenizer` makes it again."""
        ...

    def length(self, text: str) -> int:
        """Tokens of a text that nothing is cut from, special ones included."""
        ...

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> torch.Tensor:
        """n texts to token ids (n, L)."""
        ...


def _pad(rows: Sequence[Sequence[int]], length: int, pad_id: int = 0) -> torch.Tensor:
    tokens = torch.full((len(rows), length), pad_id, dtype=torch.long)  # (n, L)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.as_tensor(ids, dtype=torch.long)
    return tokens


def _length(row: np.ndarray, pad_id: int) -> int:
    """Of a row of ids without its padding."""
    real = np.flatnonzero(row != pad_id)
    return int(real[-1]) + 1 if len(real) else 0


class TokenizedTexts:
    """The ids of n texts without their padding; `tokens[numbers]` are those of some (B, L), L being the same for all.

    One long text makes a tensor of all of them long; here it makes only its own row and its batch long. The length
    stays that of all together: a text tower that averages over padding then sees the same in every batch.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]):
        self.rows: list[np.ndarray] = []
        self.pad_id = getattr(tokenizer, "pad_id", 0)
        self.width = 0  # L, that of all texts tokenized at once
        for start in range(0, len(texts), 256):
            ids = tokenizer(list(texts[start : start + 256])).numpy()  # (256, l)
            self.width = max(self.width, ids.shape[1])
            self.rows += [row[: _length(row, self.pad_id)].astype(np.int32) for row in ids]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, numbers: torch.Tensor) -> torch.Tensor:
        return _pad([self.rows[number] for number in numbers.tolist()], self.width, self.pad_id)


def _check_length(length: int, longest: int | None = None) -> None:
    if length < 2 or (longest is not None and length > longest):
        limit = f"between 2 and {longest}" if longest else "at least 2"
        raise ValueError(f"the context length must be {limit} (start and end token included), not {length}")


# ------------------------------------------------------------------------------------------ CLIP's byte pairs
# A word is a run of letters, one digit, or a run of other signs; English clitics are split off first.
_WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
_N_MERGES = 49152 - 256 - 2  # the table on disk is longer; CLIP uses this many
_CACHE_WORDS = 65536


def _byte_letters() -> list[str]:
    """A printable letter for each byte: itself where Latin-1 prints it, else from code point 256."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def clean_text(text: str) -> str:
    """CLIP's cleaning: mojibake, HTML entities (twice, for `&amp;lt;`), white space, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text).strip().lower()


@functools.cache
def _merges(path: str | Path) -> tuple[list[str], dict[str, int], dict[tuple[str, ...], int]]:
    """CLIP's tokens in their order, the id of each, and the rank of each pair that is merged.

    Read once: a tenth of a second that every tokenizer of the process shares.
    """
    with gzip.open(path, "rt", encoding="utf-8") as table:
        next(table)  # a version line
        merges = [tuple(line.split()) for line, _ in zip(table, range(_N_MERGES), strict=False)]
    # CLIP numbers the letters in the order of their code points among the printable, then the spare ones.
    letters = sorted(_byte_letters(), key=lambda letter: (ord(letter) > 255, ord(letter)))
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return tokens, {token: i for i, token in enumerate(tokens)}, {pair: i for i, pair in enumerate(merges)}


class SimpleTokenizer:
    """CLIP's byte-level BPE (Radford et al. 2021, section 2.4) with its 49,408 tokens.

    `tok(texts)` gives (n, context_length) ids: start, the text's tokens, end, zeros.
    """

    kind = "clip-bpe"

    def __init__(self, bpe_path: str | Path = BPE_PATH, context_length: int = CONTEXT_LENGTH):
        _check_length(context_length)
        self.context_length = context_length
        self._letters = _byte_letters()
        self._byte_of = {letter: byte for byte, letter in enumerate(self._letters)}
        self.tokens, self.ids, self.rank = _merges(bpe_path)
        self.start, self.end = self.ids["<|startoftext|>"], self.ids["<|endoftext|>"]
        self._cache = {token: [self.ids[token]] for token in self.tokens[-2:]}

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return len(self.tokens)

    def spec(self) -> dict:
        """Plain values from which `create_tokenizer` makes it again."""
        return {"kind": self.kind, "context_length": self.context_length}

    def _word_ids(self, word: str) -> list[int]:
        """Merge the pair of lowest rank, everywhere in the word, until no pair is in the table."""
        if word in self._cache:
            return self._cache[word]
        letters = [self._letters[byte] for byte in word.encode("utf-8")]
        parts = [*letters[:-1], letters[-1] + "</w>"]
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self.rank.get(pair, _N_MERGES))
            if best not in self.rank:
                break
            merged, i = [], 0
            while i < len(parts):
                step = 2 if tuple(parts[i : i + 2]) == best else 1
                merged.append("".join(parts[i : i + step]))
                i += step
            parts = merged
        if len(self._cache) >= _CACHE_WORDS:  # bounded: 15 million captions hold many words that never return
            self._cache = {token: [self.ids[token]] for token in self.tokens[-2:]}
        ids = self._cache[word] = [self.ids[part] for part in parts]
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no start, end or padding, any length."""
        return [i for word in _WORD.findall(clean_text(text)) for i in self._word_ids(word)]

    def length(self, text: str) -> int:
        """Tokens of a text that nothing is cut from, start and end included."""
        return len(self.encode(text)) + 2

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, a space after each word."""
        text = "".join(self.tokens[int(i)] for i in ids)
        raw = bytearray(self._byte_of[letter] for letter in text)
        return raw.decode("utf-8", errors="replace").replace("</w>", " ")

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> torch.Tensor:
        """n texts to ids (n, context_length): start, the text, end, zeros."""
        length = self.context_length if context_length is None else context_length
        _check_length(length)
        texts = [texts] if isinstance(texts, str) else texts
        rows = [[self.start, *self.encode(text)[: length - 2], self.end] for text in texts]
        return _pad(rows, length)


# ------------------------------------------------------------------------------------- those of other libraries
CLEANS: dict[str, Callable[[str], str]] = {  # what open_clip does to a caption before its tokenizer
    "none": lambda text: text,
    "whitespace": lambda text: _unescaped(text),
    "lower": lambda text: _unescaped(text).lower(),
    "canonicalize": lambda text: _without_punctuation(_unescaped(text)),
}


def _unescaped(text: str) -> str:
    """Without mojibake, HTML entities (twice, for `&amp;lt;`) and needless white space."""
    return regex.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def _without_punctuation(text: str) -> str:
    """SigLIP's form (big_vision): underscores are spaces, other ASCII punctuation goes, lower case."""
    text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation)).lower()
    return regex.sub(r"\s+", " ", text).strip()


class LibraryTokenizer:
    """Any tokenizer that the tokenizers library holds, from the text of its `tokenizer.json`.

    Args:
        definition: that text; it names no file and no address.
        context_length: tokens at most, special ones included; a longer caption loses its tail, never its end token.
        pad_id: fills the rows.
        pad_to: longest, the longest row, or context, the whole length, as SigLIP reads captions.
        pad_side: right or left, of the ids.
        clean: of CLEANS.
    """

    kind = "library"
    longest: int | None = None  # that a context may be

    def __init__(
        self, definition: str, context_length: int, pad_id: int = 0, pad_to: str = "longest", pad_side: str = "right",
        clean: str = "none",
    ):  # fmt: skip
        from tokenizers import Tokenizer

        choices = {"pad_to": ("longest", "context"), "pad_side": ("right", "left"), "clean": tuple(CLEANS)}
        for name, value in {"pad_to": pad_to, "pad_side": pad_side, "clean": clean}.items():
            if value not in choices[name]:
                raise ValueError(f"a tokenizer's {name} is one of {', '.join(choices[name])}, not {value!r}")
        try:
            self._backend = Tokenizer.from_str(definition)
        except Exception as error:  # the library has no kind of its own
            raise ValueError(f"the definition of the tokenizer cannot be read: {error}") from error
        _check_length(context_length, self.longest)
        self._backend.no_padding()
        self.definition, self.context_length = definition, context_length
        self.pad_id, self.pad_to, self.pad_side, self.clean = pad_id, pad_to, pad_side, clean

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return self._backend.get_vocab_size()

    def spec(self) -> dict:
        """Plain values from which `create_tokenizer` makes it again."""
        names = ("kind", "definition", "context_length", "pad_id", "pad_to", "pad_side", "clean")
        return {name: getattr(self, name) for name in names}

    def length(self, text: str) -> int:
        """Tokens of a text that nothing is cut from, special ones included."""
        self._backend.no_truncation()
        return len(self._backend.encode(CLEANS[self.clean](text)).ids)

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> torch.Tensor:
        """n texts to ids (n, L) with the special tokens of the library."""
        length = self.context_length if context_length is None else context_length
        _check_length(length, self.longest)
        self._backend.enable_truncation(length)
        texts = [texts] if isinstance(texts, str) else texts
        clean = CLEANS[self.clean]
        # One text at a time: the library's batch call starts threads, which a forked worker does not have.
        rows = [self._backend.encode(clean(text)).ids for text in texts]
        width = length if self.pad_to == "context" else max(map(len, rows), default=2)
        if self.pad_side == "left":
            rows = [[self.pad_id] * (width - len(row)) + row for row in rows]
        return _pad(rows, width, self.pad_id)


# --------------------------------------------------------------------------------------------- BERT WordPiece
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def read_vocab(path: str | Path) -> list[str]:
    """The tokens of a BERT `vocab.txt`: one a line, the line number is the id."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no WordPiece vocabulary at {path} (a vocab.txt, one token a line)")
    # Split at "\n" only: a cased vocabulary may hold other signs that Unicode takes for line ends.
    lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    tokens = [line.removesuffix("\r") for line in lines]
    return tokens[:-1] if tokens[-1] == "" else tokens


class WordPieceTokenizer(LibraryTokenizer):
    """BERT's WordPiece (Devlin et al. 2019), transformers' own, over a given vocabulary; reads nothing but that.

    Text is lower-cased and stripped of accents, by default although Bio_ClinicalBERT's vocabulary is cased: its own
    tokenizer does so, and MedCLIP's weights have seen nothing else. `tok(texts)` gives (n, L) ids: [CLS], the
    pieces, [SEP], zeros, with L the longest row, at most context_length, which is at most 512.
    """

    kind = "bert-wordpiece"
    longest = 512  # BERT's position embeddings

    def __init__(self, vocab: str | Path | list[str], context_length: int = CONTEXT_LENGTH, lowercase: bool = True):
        from transformers import BertTokenizer  # takes a second to import, and only BERT's text tower needs it

        source = "the vocabulary" if isinstance(vocab, list) else str(vocab)
        self.vocab = list(vocab) if isinstance(vocab, list) else read_vocab(vocab)
        self.lowercase = lowercase
        ids = {token: i for i, token in enumerate(self.vocab)}
        if len(ids) < len(self.vocab):
            twice = next(token for i, token in enumerate(self.vocab) if ids[token] != i)
            raise ValueError(f"{source} holds the token {twice!r} more than once")
        missing = [token for token in _SPECIAL if token not in ids]
        if missing:
            raise ValueError(f"{source} is no BERT vocabulary: it lacks {', '.join(missing)}")
        if ids["[PAD]"] != 0:
            raise ValueError(f"{source} has [PAD] as id {ids['[PAD]']}, where the text towers expect 0")
        theirs = BertTokenizer(vocab=ids, do_lower_case=lowercase)
        super().__init__(theirs.backend_tokenizer.to_str(), context_length)

    def spec(self) -> dict:
        """Plain values, the vocabulary among them, from which `create_tokenizer` makes it again."""
        case = {} if self.lowercase else {"lowercase": False}
        return {"kind": self.kind, "context_length": self.context_length, "vocab": self.vocab, **case}


# --------------------------------------------------------------------------------------------------- registry
AnyTokenizer = SimpleTokenizer | LibraryTokenizer
TOKENIZERS: dict[str, Any] = {cls.kind: cls for cls in (SimpleTokenizer, WordPieceTokenizer, LibraryTokenizer)}
_SETTINGS = {  # of a tokenizer in a checkpoint, with their types
    SimpleTokenizer.kind: {"context_length": int},
    WordPieceTokenizer.kind: {"context_length": int, "vocab": list, "lowercase": bool},
    LibraryTokenizer.kind: {
        "definition": str,
        "context_length": int,
        "pad_id": int,
        "pad_to": str,
        "pad_side": str,
        "clean": str,
    },
}


def create_tokenizer(spec: dict) -> AnyTokenizer:
    """The tokenizer that `tok.spec()` described, from the plain values that a checkpoint stores.

    Raises:
        ValueError: another kind or setting; a vocabulary that is no list of tokens. A checkpoint comes from anywhere,
            and a path in it would have this machine's files read.
    """
    kind = spec.get("kind")
    if kind not in TOKENIZERS:
        raise ValueError(f"unknown tokenizer {kind!r}; choose from {', '.join(TOKENIZERS)}")
    given = {key: value for key, value in spec.items() if key != "kind"}
    types = _SETTINGS[kind]
    if wrong := [key for key, value in given.items() if not isinstance(value, types.get(key, ()))]:
        raise ValueError(f"the tokenizer {kind} has no such setting {wrong[0]}: {str(given[wrong[0]])[:80]!r}")
    if not all(isinstance(token, str) for token in given.get("vocab", [])):
        raise ValueError(f"the vocabulary of the tokenizer {kind} holds what is no text")
    return TOKENIZERS[kind](**given)
