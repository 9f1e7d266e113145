"""Tokenizers of transformers' folders as ours, which need neither folder nor package once a checkpoint holds them."""

from __future__ import annotations

import contextlib
import logging
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizer import CLEANS, LibraryTokenizer

log = logging.getLogger("medslip")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and reports that transformers prints; what is wrong is raised."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(theirs.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def there(auto: Any, folder: Path, lacks: str) -> Any:
    """What one of transformers' Auto classes makes of a folder, without its code; ValueError says what it lacks."""
    with quiet():
        try:
            return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of many kinds
            why = str(error).strip().splitlines()
            advice = ": pip install sentencepiece protobuf" if "SentencePiece" in str(error) else ""
            raise ValueError(f"{folder} {lacks} ({why[0] if why else type(error).__name__}){advice}") from error


def hf_tokenizer(
    folder: Path, longest: int, config: Any, whole: bool = False, causal: bool = False
) -> LibraryTokenizer:
    """The tokenizer that lies in a folder.

    Args:
        longest: tokens that the model has positions for.
        config: of the text model, whose padding has an id that its mask leaves out.
        whole: captions are padded to the whole length, and the padding is read (SigLIP).
        causal: what follows the end token is never read, so that zeros do.

    Raises:
        ValueError: none there; one that does more than the tokenizers library alone.
    """
    from transformers import AutoTokenizer

    if not _has_tokenizer(folder):  # transformers would make one of two words
        raise ValueError(f"{folder} holds no tokenizer: none of {', '.join(map(' with '.join, _TOKENIZERS))}")
    theirs = there(AutoTokenizer, folder, "holds no tokenizer")
    if whole and "attention_mask" in theirs.model_input_names:
        log.warning(f"{folder}: its tokenizer has a mask for padding, which SigLIP reads: here it is read")
    length = int(min(longest, theirs.model_max_length))
    own = theirs.pad_token_id or 0
    pad_id = 0 if causal else own if whole or config.pad_token_id is None else config.pad_token_id
    tokenizer = own_tokenizer(theirs, folder, length, pad_id, whole)
    words = tokenizer._backend.get_vocab_size(with_added_tokens=False)
    if words > config.vocab_size:
        raise ValueError(f"{folder} has embeddings of {config.vocab_size} tokens, its tokenizer has {words}")
    return tokenizer


_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("spiece.model",),
               ("sentencepiece.bpe.model",), ("tokenizer.model",))  # fmt: skip


def _has_tokenizer(folder: Path) -> bool:
    """Whether the words of one are there: without them transformers makes a tokenizer all the same."""
    return any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS)


SENTENCES = ["a mammogram of a malignant mass", "CT, axial: 3 cm lesion (left) -- S/P biopsy_2 & follow-up.", ""]


def own_tokenizer(theirs: Any, folder: Path, length: int, pad_id: int, whole: bool, clean: str = "none") -> Any:
    """A tokenizer of transformers as one of ours, compared on a few sentences.

    Args:
        clean: what the library does to a caption before its tokenizer.
    """
    before, backend = CLEANS[clean], getattr(theirs, "backend_tokenizer", None)
    if theirs.truncation_side != "right":
        raise ValueError(f"{folder}: its tokenizer cuts the beginning of a long caption, here the end is cut")
    if backend is None and type(theirs).__name__ == "SiglipTokenizer" and theirs.do_lower_case:
        backend = _siglip_backend(theirs)
    if backend is None:
        raise ValueError(f"{folder}: its tokenizer, a {type(theirs).__name__}, is none of the tokenizers library")
    pads = {"pad_to": "context" if whole else "longest", "pad_side": theirs.padding_side}
    ours = LibraryTokenizer(backend.to_str(), length, pad_id, **pads, clean=clean)
    for text in SENTENCES:
        expected = theirs(before(text), truncation=True, max_length=length)["input_ids"]
        got = [int(i) for i in ours(text)[0]]
        if (got[-len(expected) :] if theirs.padding_side == "left" else got[: len(expected)]) != expected:
            raise ValueError(
                f"{folder}: its tokenizer, a {type(theirs).__name__}, does more than its definition says: {text!r} is "
                f"{expected[:12]} there and {got[:12]} by it"
            )
    return ours


def _siglip_backend(theirs: Any) -> Any:
    """transformers' SiglipTokenizer, which runs sentencepiece, as one of the tokenizers library."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    messages: Any = sentencepiece_model_pb2  # whose classes are made when it is loaded
    proto = messages.ModelProto.FromString(theirs.sp_model.serialized_model_proto())
    backend: Any = Tokenizer(
        models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], proto.trainer_spec.unk_id,
                       proto.trainer_spec.byte_fallback)
    )  # fmt: skip
    charsmap = proto.normalizer_spec.precompiled_charsmap
    backend.normalizer = normalizers.Sequence([
        normalizers.Lowercase(), normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
        normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(),
        *([normalizers.Precompiled(charsmap)] if charsmap else []),
        normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip(),
    ])  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    end = theirs.eos_token
    backend.post_processor = processors.TemplateProcessing(f"$A {end}", special_tokens=[(end, theirs.eos_token_id)])
    return backend
