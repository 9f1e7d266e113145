"""Sentences of reports: where one ends, and which are drawn. tests/test_studies.py resumes and divides runs of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import command
from source_tree import PREPROCESS, save_jpeg
from test_tokenizer import VOCAB

import main
from datasets import Collate, ContrastiveDataset, create_reader
from inputs.columns import PairColumns
from inputs.reader import number_of
from inputs.sentences import draw_sentences, joined, sentences
from tokenizer import SimpleTokenizer, WordPieceTokenizer

REPORT = (
    "The heart is normal in size. No pleural effusion or pneumothorax. There is a 1.2 cm nodule in the upper lobe, cf. "
    "series 3. Dr. Smith was informed. Compared to e.g. the CT of 5.3.2019, approx. 2 mm larger (see Fig. 2)."
)


def test_a_stop_ends_a_sentence_where_it_does():
    assert sentences(REPORT) == [
        "The heart is normal in size.",
        "No pleural effusion or pneumothorax.",
        "There is a 1.2 cm nodule in the upper lobe, cf. series 3.",
        "Dr. Smith was informed.",
        "Compared to e.g. the CT of 5.3.2019, approx. 2 mm larger (see Fig. 2).",
    ]
    assert sentences("1. No mass.\n2. BI-RADS 2.  3) Screening in a year") == [
        "1. No mass.",
        "2. BI-RADS 2.",
        "3) Screening in a year",
    ]
    assert sentences('lungs clear. is it (new?) "old." unchanged!') == [
        "lungs clear.",
        "is it (new?)",
        '"old."',
        "unchanged!",
    ]
    assert sentences("no stop") == ["no stop"] and sentences("  ") == []
    for text in (REPORT, "a.b. c", "x. . y ... z", "St. post. Normal."):
        assert " ".join(sentences(text)) == " ".join(text.split())


def test_sections_are_joined_in_their_order():
    assert joined([" Clear lungs\n", "nan", "IMPRESSION:", "", "Normal"]) == "Clear lungs. IMPRESSION: Normal"
    assert joined(["Normal.", "NA"]) == "Normal." and joined(["", "None"]) == ""


def words(text: str) -> int:
    return len(text.split())


def test_what_fits_stays_and_more_is_drawn_up_to_the_context():
    rng = np.random.default_rng(0)
    assert draw_sentences("A b.\n C d.", words, 4, rng) == "A b.\n C d."
    parts = [f"s{i} {'w ' * (i % 4)}end." for i in range(9)]
    seen = set()
    for _ in range(300):
        drawn = sentences(draw_sentences(" ".join(parts), words, 12, rng))
        places = [parts.index(part) for part in drawn]
        assert places == sorted(set(places)) and 0 < words(" ".join(drawn)) <= 12
        assert 12 - words(" ".join(drawn)) < 5  # the next one, of five words at most, did not fit
        seen.add(tuple(places))
    assert len(seen) > 50
    assert draw_sentences("one two three. four five six.", words, 2, rng) in ("one two three.", "four five six.")


def test_each_sentence_is_as_likely():
    """Of ten sentences of a length, four fit: each is drawn four times in ten."""
    rng, counts, rounds = np.random.default_rng(1), np.zeros(10), 4000
    text = " ".join(f"sentence {i}." for i in range(10))
    for _ in range(rounds):
        for part in sentences(draw_sentences(text, words, 9, rng)):
            counts[int(part[9:-1])] += 1
    assert counts.sum() == 4 * rounds
    assert np.abs(counts / rounds - 0.4).max() < 4 * (0.4 * 0.6 / rounds) ** 0.5  # four standard errors


@pytest.mark.parametrize("tokenizer", [SimpleTokenizer(), WordPieceTokenizer(VOCAB)], ids=["clip", "bert"])
def test_a_text_is_as_long_as_its_row_of_ids(tokenizer):
    for text in ("", "mass", REPORT, "µ-calcification &amp; mass.  " * 9):
        rows = tokenizer([text], context_length=500)
        assert tokenizer.length(text) == int((rows != 0).sum()) < 500
        assert tokenizer([REPORT]).shape[1] <= tokenizer.context_length  # and cuts as before


def report(i: int, n: int = 8) -> str:
    return " ".join(f"Finding {i} {k} is stable." for k in range(n))


@pytest.fixture
def reports(tmp_path):
    """16 training and 8 validation pairs of two sections, together longer than 24 tokens; two reports are the same."""
    rows = ["image,findings,impression,split"]
    for i in range(24):
        save_jpeg(tmp_path / f"{i}.jpg", 10 * i)
        of = 4 if i == 9 else i
        rows.append(f"{i}.jpg,{report(of)},Impression {of} normal,{'train' if i < 16 else 'val'}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def reader_of(folder: Path):
    return create_reader("csv", folder, "pairs.csv", named=PairColumns(captions=("findings", "impression")))


def test_a_sample_is_drawn_from_seed_epoch_and_index(reports):
    reader, tokenizer = reader_of(reports), SimpleTokenizer(context_length=24)
    inputs = ("image", "text", "view1", "view2")
    plain = ContrastiveDataset(reader, inputs, PREPROCESS, seed=3)
    drawn = ContrastiveDataset(reader, inputs, PREPROCESS, seed=3, sentences=tokenizer, identities=True)
    again = ContrastiveDataset(reader, ("text",), PREPROCESS, seed=3, sentences=tokenizer)
    texts = {epoch: [drawn[epoch, i]["text"] for i in range(16)] for epoch in range(3)}
    for epoch, of_epoch in texts.items():
        for i, text in enumerate(of_epoch):
            parts, whole = sentences(text), sentences(reader.captions(i)[0])
            assert parts == [part for part in whole if part in parts] and len(parts) < len(whole)
            assert tokenizer.length(text) <= 24 and again[epoch, i]["text"] == text
    assert all(len({of_epoch[i] for of_epoch in texts.values()}) > 1 for i in (0, 5, 15))
    sample = drawn[1, 4]
    assert sample["identities"][1] == number_of(sample["text"].encode())  # what the batch holds, not the whole report
    for name in ("image", "view1", "view2"):  # --sentences moves no view
        assert torch.equal(sample[name], plain[1, 4][name])
    assert plain[1, 4]["text"] == reader.captions(4)[0] == f"{report(4)} Impression 4 normal"
    batch = Collate(tokenizer)([drawn[0, i] for i in range(16)])
    assert (batch["text"].argmax(1) == torch.tensor([tokenizer.length(text) - 1 for text in texts[0]])).all()  # the end


def argv_of(folder: Path, out: Path, *extra: str) -> list[str]:
    argv = command(folder, out, *extra)
    argv[argv.index("--dataset") + 1] = "csv"
    columns = ["--metadata", "pairs.csv", "--caption-columns", "findings", "impression"]
    return [*argv, *columns, "--sentences", "--mask-duplicates"]


def test_validation_reads_reports_whole_and_in_order(reports, tmp_path, monkeypatch):
    seen, embed = [], main.embed_pairs

    def watched(*arguments):
        found = embed(*arguments)
        seen.append(found[2])
        return found

    monkeypatch.setattr(main, "embed_pairs", watched)
    main.main(argv_of(reports, tmp_path / "out"))
    assert seen == [[f"{report(i)} Impression {i} normal" for i in range(16, 24)]] * 2
