"""Images of one study: which those are, that one is the other's second view, and that neither is a negative."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_helpers import run_ranks
from helpers import DROPOUT, assert_same_run, command, signal_after, slow, weights
from source_tree import PREPROCESS, save_jpeg

import losses
import main
from datasets import Collate, ContrastiveDataset, create_reader
from inputs.columns import PairColumns, Studies
from runtime.checkpoints import load_checkpoint

STUDY = PairColumns(study=True)
STUDIES = ["A", "A", "B", "", "B", "A", "nan", "C"]  # of the images 0.jpg to 7.jpg
MATES = [{1, 5}, {0, 5}, {4}, set(), {2}, {0, 1}, set(), set()]


def write_pairs(folder: Path, studies, header: str = "study", more=None) -> Path:
    """Images whose grey is ten times their number, in pairs.csv."""
    rows = [f"image,caption,{header}"]
    for i, study in enumerate(studies):
        save_jpeg(folder / f"{i}.jpg", 10 * i)
        rows.append(f"{i}.jpg,finding number {i},{study}")
    (folder / "pairs.csv").write_text("\n".join([*rows, *(more or [])]) + "\n")
    return folder


def reader_of(folder: Path, name: str = "pairs.csv", **arguments):
    return create_reader("csv", folder, name, val_fraction=0, named=STUDY, **arguments)


def mates(reader) -> list[set[int]]:
    return [set(reader.studies.others(i).tolist()) for i in range(len(reader))]


def test_a_study_is_what_the_column_says(tmp_path):
    reader = reader_of(write_pairs(tmp_path, STUDIES))
    assert mates(reader) == MATES and "5 of 8 images have another one of their study" in reader.log
    assert len(set(reader.studies.of.tolist())) == 5  # an image of no study is one by itself
    rows = [{"image": f"{i}.jpg", "caption": f"finding number {i}", "study": name or None}
            for i, name in enumerate(STUDIES)]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = reader_of(tmp_path, "pairs.jsonl")
    assert mates(lines) == MATES and lines.fingerprint() == reader.fingerprint()
    filtered = reader_of(tmp_path, caption_filter="[0124567]$")  # the image 3 is gone
    assert mates(filtered) == [{1, 4}, {0, 4}, {3}, {2}, {0, 1}, set(), set()]
    plain = create_reader("csv", tmp_path, "pairs.csv", val_fraction=0)
    assert plain.studies is None and plain.fingerprint() != reader.fingerprint()


def test_studies_of_two_patients_are_two(tmp_path):
    """Where each patient's are counted anew; one of no patient is by itself."""
    studies = ["P1,1", "P1,1", "P2,1", "P2,2", "P2,1", ",1", ",1"]
    reader = reader_of(write_pairs(tmp_path, studies, "Patient ID,StudyInstanceUID"))
    assert mates(reader) == [{1}, {0}, {4}, set(), {2}, set(), set()]


def test_others_of_many_studies_are_those_of_a_plain_search():
    of = np.random.default_rng(0).integers(-50, 50, 400)
    studies = Studies(of)
    for i in range(400):
        assert studies.others(i).tolist() == [k for k in range(400) if of[k] == of[i] and k != i]


def test_tables_that_do_not_do_are_refused(tmp_path):
    write_pairs(tmp_path, ["A", "A", "B"], more=["0.jpg,again,", "0.jpg,once more,B"])
    with pytest.raises(ValueError, match="line 6: the image 0.jpg is of the study 'B' here, and of 'A' in .*line 2"):
        reader_of(tmp_path)
    for studies, header, message in (
        ("ABC", "study", "pairs.csv: no study has two images"),
        ("AAA", "study", "pairs.csv: all images are of one study"),
        ("AAB", "exam", "has no column study or .*its columns: image, caption, exam"),
    ):
        with pytest.raises(ValueError, match=message):
            reader_of(write_pairs(tmp_path, studies, header))
    blank = reader_of(write_pairs(tmp_path, ["P1,1", "P1,1", ",1"], "patient,study"))
    assert "1 images have a study but no patient, which studies are told apart in" in " ".join(blank.log)
    with pytest.raises(ValueError, match="no study has two images.*3 images have a study but no patient"):
        reader_of(write_pairs(tmp_path, [",1", ",1", ",2"], "patient,study"))
    with pytest.raises(ValueError, match="--dataset csv; roco has its publisher's"):
        create_reader("roco", tmp_path, named=STUDY)


INPUTS = ("image", "text", "view1", "view2")


def number_of(view: torch.Tensor) -> int:
    """Of the image that a crop is of, whose grey is ten times its number."""
    return round(view.float().mean().item() / 10)


def test_the_second_view_is_of_another_image_of_the_study(tmp_path):
    """Known by its grey: each of the others about as often, and nothing else of the sample changes."""
    folder, same = write_pairs(tmp_path, STUDIES), dict(preprocess=PREPROCESS, seed=3, colour_later=True)
    ours = ContrastiveDataset(reader_of(folder), INPUTS, **same)
    plain = ContrastiveDataset(create_reader("csv", folder, "pairs.csv", val_fraction=0), INPUTS, **same)
    drawn: list[list[int]] = [[] for _ in STUDIES]
    for epoch in range(40):
        for i, others in enumerate(MATES):
            sample, other = ours[epoch, i], plain[epoch, i]
            assert all(torch.equal(sample[name], other[name]) for name in ("image", "view1"))
            assert sample["text"] == other["text"] and number_of(sample["view1"]) == number_of(other["view2"]) == i
            assert sample["view2_colour"] == other["view2_colour"]
            assert sample["studies"] == [int(ours.reader.studies.of[i])] and "studies" not in other
            drawn[i].append(number_of(sample["view2"]))
            assert drawn[i][-1] in (others or {i})
    assert [set(numbers) for numbers in drawn] == [others or {i} for i, others in enumerate(MATES)]
    assert 10 <= drawn[0].count(1) <= 30  # of 40 with a probability of a half: 3.2 standard deviations
    again = ContrastiveDataset(reader_of(folder), ("view1", "view2"), **same)[7, 0]
    assert set(again) == {"index", "studies", "view1", "view1_colour", "view2", "view2_colour"}
    assert number_of(again["view2"]) == drawn[0][7]  # SimCLR alone sees the same image
    assert "studies" not in ContrastiveDataset(reader_of(folder), ("image", "text"), **same)[0, 0]
    batch = Collate()(
        [ContrastiveDataset(reader_of(folder), ("view1", "view2"), PREPROCESS, 3)[0, i] for i in range(8)]
    )
    shared = batch["studies"] == batch["studies"].T
    assert shared.tolist() == [[k == i or k in others for k in range(8)] for i, others in enumerate(MATES)]


def test_an_image_of_the_study_that_cannot_be_read_is_named_and_another_taken(tmp_path):
    folder = write_pairs(tmp_path, STUDIES)
    for i in (1, 4):
        (folder / f"{i}.jpg").write_bytes(b"torn")
    bad = tmp_path / "bad.txt"
    same = dict(preprocess=PREPROCESS, seed=0, colour_later=True, bad_samples=bad, max_bad_fraction=0.5)
    samples = ContrastiveDataset(reader_of(folder), ("view1", "view2"), **same)
    assert {number_of(samples[epoch, 0]["view2"]) for epoch in range(20)} == {5}
    assert {number_of(samples[epoch, 2]["view2"]) for epoch in range(5)} == {2}  # its study has no other left
    assert {Path(line.split("\t")[0]).name for line in bad.read_text().splitlines()} == {"1.jpg", "4.jpg"}


def argv_of(folder: Path, out: Path, *extra: str, model: str = "SLIP_VITT16") -> list[str]:
    """With reports longer than the context too, so that one run shows both kinds of draws."""
    argv = command(folder, out, *extra, model=model)
    argv[argv.index("--dataset") + 1] = "csv"
    return [*argv, "--metadata", "pairs.csv", "--study-views", "--sentences", "--mask-duplicates"]


@pytest.fixture
def breasts(tmp_path):
    """16 images of ten studies, with long reports that the images of a study share."""
    studies = [f"S{i // 2 if i < 12 else i}" for i in range(16)]
    write_pairs(tmp_path, studies)
    rows = [
        f"{i}.jpg,{' '.join(f'Finding {study} {k} is stable.' for k in range(8))},{study}"
        for i, study in enumerate(studies)
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption,study,split", *(f"{row},train" for row in rows)]))
    return tmp_path


@pytest.mark.parametrize("accumulation", ["micro", "full"])
def test_training_has_the_loss_of_the_formula(breasts, accumulation, monkeypatch):
    seen, full = [], getattr(main, f"accumulate_{accumulation}")

    def watched(run, micro_batches, told):
        found = list(full(run, micro_batches, told))
        if not seen:
            with torch.no_grad():
                outputs = run.model(*(torch.cat(parts) for parts in zip(*micro_batches, strict=True)))
            studies = torch.cat([of_batch["studies"] for of_batch in told])
            embeddings, same = (outputs["aug1_embed"], outputs["aug2_embed"]), studies == studies.T
            expected = [float(losses.simclr_loss(*embeddings, 0.1, mask)) for mask in (same, None)]
            seen.append((found[0]["ssl_loss"].item(), *expected, int(same.sum())))
        return iter(found)

    monkeypatch.setattr(main, f"accumulate_{accumulation}", watched)
    size = ["--batch-size", "8", "--update-freq", "2"] if accumulation == "full" else ["--batch-size", "16"]
    main.main(argv_of(breasts, breasts / "out", "--epochs", "1", *size, "--accum-negatives", accumulation))
    got, masked, plain, pairs = seen[0]
    assert pairs == 28 and got == pytest.approx(masked, rel=1e-4) and abs(got - plain) > 1e-2


def test_a_run_of_studies_resumes_bit_for_bit_and_says_what_it_is(breasts, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    main.main(argv_of(breasts, whole, *DROPOUT))
    with monkeypatch.context() as m:
        m.setattr(main, "update", signal_after(main.update, 3, signal.SIGUSR2))
        main.main(argv_of(breasts, broken, *DROPOUT))
    state = load_checkpoint(broken / "checkpoint.pt")
    assert (state["epoch"], state["step_in_epoch"]) == (1, 1)
    main.main(argv_of(breasts, broken, *DROPOUT))
    assert_same_run(whole, broken)
    args = json.loads((whole / "settings.json").read_text())["args"]
    assert args["study_views"] is args["sentences"] is True
    for flag, name in (("--study-views", "study_views"), ("--sentences", "sentences")):
        with pytest.raises(ValueError, match=f"{name}: True there, False now"):
            main.main([x for x in argv_of(breasts, whole, *DROPOUT) if x != flag])
    table = breasts / "pairs.csv"
    table.write_text(table.read_text().replace(",S3,", ",S2,"))
    with pytest.raises(ValueError, match="settings differ.*images and captions"):  # other studies are other data
        main.main(argv_of(breasts, whole, *DROPOUT))


def _train_rank(rank, world, argv):
    main.main(argv)


@pytest.mark.parametrize("model", ["SLIP_VITT16", *slow("SIMCLR_VITT16")])
def test_two_processes_equal_one(breasts, tmp_path, model):
    """As tests/test_main.py compares them, with studies and sentences whose images lie on both processes."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--eps", "1e-2", "--epochs", "1"]
    main.main(argv_of(breasts, one, *flags, model=model))
    run_ranks(_train_rank, 2, argv_of(breasts, two, *flags, "--batch-size", "4", model=model))
    a, b = weights(one), weights(two)
    for key in a:
        atol = 3e-4 if "running_" in key else 2e-5
        torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=atol, msg=lambda m, k=key: f"{k}: {m}")


def test_an_objective_without_simclr_reads_no_other_image(breasts, tmp_path):
    """Rows of one table may share their flags: CLIP with --study-views is CLIP."""
    flags = ("--epochs", "1")
    main.main(argv_of(breasts, tmp_path / "a", *flags, model="CLIP_VITT16"))
    argv = [x for x in argv_of(breasts, tmp_path / "b", *flags, model="CLIP_VITT16") if x != "--study-views"]
    main.main(argv)
    assert_same_run(tmp_path / "a", tmp_path / "b")
