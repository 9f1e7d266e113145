import json
import pickle
import string
import subprocess
import sys
import tracemalloc
import unicodedata
from pathlib import Path

import pytest
import torch
import transformers
from helpers import ROOT

from tokenizer import SimpleTokenizer, TokenizedTexts, WordPieceTokenizer, clean_text, create_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def bpe() -> SimpleTokenizer:
    return SimpleTokenizer()


# ------------------------------------------------------------------------------------------ CLIP's byte pairs
@pytest.mark.parametrize("i", range(len(GOLDEN["texts"])))
def test_bpe_equals_the_published_tokenizer(bpe, i):
    text = GOLDEN["texts"][i]
    assert clean_text(text) == GOLDEN["cleaned"][i]
    assert bpe.encode(text) == GOLDEN["encode"][i]
    assert bpe.decode(GOLDEN["encode"][i]) == GOLDEN["decode"][i]


def test_bpe_rows_are_start_text_end_zeros(bpe):
    ids = GOLDEN["encode"][GOLDEN["texts"].index("itap of a cat.")]
    row = bpe("itap of a cat.")
    assert row.dtype == torch.long
    assert row.tolist() == [[GOLDEN["sot"], *ids, GOLDEN["eot"], *[0] * (75 - len(ids))]]
    assert bpe.vocab_size == GOLDEN["vocab_size"]


def test_one_text_and_a_list_of_one_are_the_same_matrix(bpe):
    assert bpe("a").shape == (1, 77)
    assert bpe(["a", "b"]).shape == (2, 77)
    assert bpe([]).shape == (0, 77)
    assert torch.equal(bpe("a"), bpe(["a"]))


@pytest.mark.parametrize("length", [2, 5, 77])
def test_a_long_caption_keeps_its_end_token(bpe, length):
    texts = ["mass " * 300, "calcification " * 300]
    rows = bpe(texts, context_length=length)
    assert rows.shape == (2, length)
    assert rows[:, -1].tolist() == [bpe.end] * 2
    for row, text in zip(rows, texts, strict=True):
        assert row[1:-1].tolist() == bpe.encode(text)[: length - 2]


def test_a_caption_that_just_fits_is_whole(bpe):
    ids = bpe.encode("a b c d")
    assert bpe("a b c d", context_length=len(ids) + 2).tolist() == [[bpe.start, *ids, bpe.end]]


def test_the_cache_of_words_changes_no_ids_when_it_is_full(bpe, monkeypatch):
    monkeypatch.setattr("tokenizer._CACHE_WORDS", 4)
    small = SimpleTokenizer()
    texts = GOLDEN["texts"] + ["<|endoftext|> mass"]
    assert [small.encode(text) for text in texts] == [bpe.encode(text) for text in texts]
    assert len(small._cache) <= 4


# --------------------------------------------------------------------------------------------- BERT WordPiece
WORDS = "x ray the mass cyst show shows chest of resume left , . - ( ) 中".split()
SUFFIXES = ["##ray", "##s", "##ing", "##graph", "##ic"]
SIGNS = string.ascii_lowercase + string.digits
SPECIAL = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB = list(
    dict.fromkeys([*SPECIAL, *WORDS, *SIGNS, *string.punctuation, *SUFFIXES, *("##" + sign for sign in SIGNS)])
)
TEXTS = [
    "Chest X-ray shows the MASS.",
    "résumé, RÉSUMÉ  cystic;graph",
    "radiographs (left)\tof\nchest",
    "中x中",
    "a\u0000b\u00adc\ufffd d\u200be",  # control signs vanish
    "ΣΑΣ unknown ☃ sign",
    "y" * 100 + " " + "z" * 101,
    "",
    "   ",
    "don't 3.5x2 cm — “quoted”",
]


def reference_wordpiece(text: str, vocab: list[str]) -> list[int]:
    """Devlin et al.'s two stages, after their description: basic splitting, then greedy longest match."""
    ids = {token: i for i, token in enumerate(vocab)}
    words, word = [], ""
    for sign in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(sign)
        punctuation = category.startswith("P") or sign in string.punctuation
        if category == "Mn" or (category.startswith("C") and sign not in "\t\n\r") or sign == "\ufffd":
            continue
        if sign.isspace() or punctuation or "\u4e00" <= sign <= "\u9fff":
            words += [word] if word else []
            words += [] if sign.isspace() else [sign]
            word = ""
        else:
            word += sign
    pieces = []
    words += [word] if word else []
    for word in words:
        found, start = [], 0
        while start < len(word) and len(word) <= 100:
            ends = (e for e in range(len(word), start, -1) if ("##" if start else "") + word[start:e] in ids)
            end = next(ends, None)
            if end is None:
                break
            found.append(ids[("##" if start else "") + word[start:end]])
            start = end
        pieces += found if start == len(word) else [ids["[UNK]"]]
    return pieces


@pytest.fixture(scope="module")
def wordpiece() -> WordPieceTokenizer:
    return WordPieceTokenizer(VOCAB)


@pytest.mark.parametrize("text", TEXTS)
def test_wordpiece_equals_a_second_implementation(wordpiece, text):
    cls, sep = VOCAB.index("[CLS]"), VOCAB.index("[SEP]")
    assert wordpiece(text, context_length=512).tolist() == [[cls, *reference_wordpiece(text, VOCAB), sep]]


def test_wordpiece_equals_a_folder_of_transformers(wordpiece, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf8")
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, "[MASK] and [SEP] in a caption", "mass " * 200]
    for text in texts:
        assert wordpiece(text).tolist() == [theirs(text, truncation=True, max_length=77)["input_ids"]]


def test_a_worker_process_reads_captions_without_transformers(wordpiece, tmp_path):
    """Which takes a second to import in each."""
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(wordpiece))
    code = "import pickle, sys; sys.modules['transformers'] = None; "
    code += "print(pickle.load(open(sys.argv[1], 'rb'))('chest mass').tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tokenizer.pkl")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(wordpiece("chest mass").tolist()), done.stderr


def test_wordpiece_pads_to_the_longest_row_and_keeps_sep(wordpiece):
    rows = wordpiece(["mass", "left chest mass", "mass " * 600])
    assert rows.shape == (3, 77)
    cls, sep, mass = (VOCAB.index(token) for token in ("[CLS]", "[SEP]", "mass"))
    assert rows[0].tolist() == [cls, mass, sep] + [0] * 74
    assert rows[2].tolist() == [cls] + [mass] * 75 + [sep]
    assert wordpiece(["mass", "left mass"]).shape == (2, 4)
    assert wordpiece("mass " * 600, context_length=512).shape == (1, 512)
    assert wordpiece([]).shape[0] == 0


def test_wordpiece_reads_vocab_txt_line_by_line(tmp_path):
    path = tmp_path / "vocab.txt"
    tokens = [*SPECIAL, "a", "\u2028", "b\x85"]  # signs that Python's splitlines would split at
    path.write_bytes("\r\n".join(tokens).encode() + b"\r\n")
    assert WordPieceTokenizer(path).vocab == tokens


@pytest.mark.parametrize(
    "vocab, message",
    [
        (["[PAD]", "[UNK]", "[CLS]", "[MASK]"], r"lacks \[SEP\]"),
        ([*VOCAB, "mass"], "'mass' more than once"),
        (["mass", *[token for token in VOCAB if token != "mass"]], r"\[PAD\] as id 1"),
    ],
)
def test_a_list_that_is_no_bert_vocabulary_is_refused(vocab, message):
    with pytest.raises(ValueError, match=message):
        WordPieceTokenizer(vocab)


def test_an_absent_vocabulary_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        WordPieceTokenizer(tmp_path / "nowhere.txt")


# ------------------------------------------------------------------------------------------------- both kinds
@pytest.fixture(params=["clip-bpe", "bert-wordpiece"])
def either(request, bpe, wordpiece):
    return {"clip-bpe": bpe, "bert-wordpiece": wordpiece}[request.param]


def test_a_tokenizer_comes_back_from_its_spec_and_from_pickle(either):
    spec = json.loads(json.dumps(either.spec()))
    for other in (create_tokenizer(spec), pickle.loads(pickle.dumps(either))):
        assert torch.equal(other(TEXTS), either(TEXTS))
        assert other.spec() == either.spec()


def test_the_spec_keeps_the_context_length(bpe):
    assert create_tokenizer({"kind": "clip-bpe", "context_length": 12})("a").shape == (1, 12)


@pytest.mark.parametrize("length", [0, 1, -3, 513])
def test_impossible_context_lengths_are_refused(either, length):
    if length > 500 and either.kind == "clip-bpe":
        assert either("a", context_length=length).shape == (1, length)
    else:
        with pytest.raises(ValueError, match=str(length)):
            either("a", context_length=length)


def test_unknown_kinds_list_the_choices():
    with pytest.raises(ValueError, match="'sentencepiece'.*clip-bpe, bert-wordpiece"):
        create_tokenizer({"kind": "sentencepiece"})


@pytest.mark.parametrize("setting", [
    {"kind": "bert-wordpiece", "vocab": "vocab.txt"},
    {"kind": "bert-wordpiece", "vocab": [1, 2]},
    {"kind": "clip-bpe", "bpe_path": "merges.gz"},
    {"kind": "clip-bpe", "context_length": "77"},
])  # fmt: skip
def test_a_stored_tokenizer_names_no_file(setting, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    with pytest.raises(ValueError, match="has no such setting|holds what is no text"):
        create_tokenizer(setting)


# ------------------------------------------------------------------------------------------ many texts
@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_some_of_many_texts_are_the_rows_of_all_at_once(kind, request):
    tokenizer = request.getfixturevalue(kind)
    texts = [" ".join(["chest"] * n) for n in (3, 0, 40, 1, 7)] * 60  # more than are tokenized at a time
    tokens, whole = TokenizedTexts(tokenizer, texts), tokenizer(texts)
    numbers = torch.tensor([299, 0, 4, 2, 256])
    assert len(tokens) == 300 and torch.equal(tokens[numbers], whole[numbers])


def test_one_long_text_does_not_make_the_others_long():
    wordpiece, peaks = WordPieceTokenizer(VOCAB, context_length=512), []
    for n in (2000, 4000):
        texts = ["chest " * 600, *["chest"] * (n - 1)]
        tracemalloc.start()
        tokens = TokenizedTexts(wordpiece, texts)
        assert tokens[torch.arange(4)].shape == (4, 512)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 3e6 and peaks[1] - peaks[0] < 2000 * 512  # ids of 8 bytes, padded, have 16 MB in the second
