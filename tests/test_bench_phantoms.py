"""benchmarks/bench_phantoms.py on a few breasts: what it draws is known, and it trains, probes and goes on."""

import csv
import re

import bench_phantoms
import pytest
import torch

import main
import utils
from datasets import create_reader
from inputs.columns import PairColumns
from inputs.sentences import sentences
from synthetic.phantoms import draw_pathology, make_finding, make_patient


def test_the_two_views_of_a_breast_are_a_study(tmp_path):
    bench_phantoms.draw(tmp_path, 20)
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"][7:12] for row in rows] == [f"{i // 2:05d}" for i in range(40)]
    starts: list[bool] = []
    for i, row in enumerate(rows):
        patient = make_patient(0, i // 2)
        kind = ("calc", "mass")[i // 2 % 2]
        assert row["pathology"] == draw_pathology(patient, make_finding(patient, 0, kind))
        assert row["image"].endswith(("_CC.png", "_MLO.png")[i % 2])
        assert sorted(sentences(row["report"])) == sorted([*sentences(row["caption"]), *bench_phantoms.REST])
        starts.append(row["report"].startswith(row["caption"]))
    assert 0 < sum(starts) < len(rows)  # anywhere in a report
    reader = create_reader("csv", tmp_path, str(tmp_path / "table.csv"), named=PairColumns(study=True))
    assert len(reader) == 28  # of fourteen patients in twenty
    assert all(reader.studies.others(i).tolist() == [i ^ 1] for i in range(28))
    splits = {split: {row["patient"] for row in rows if row["split"] == split} for split in ("train", "val", "test")}
    assert [len(patients) for patients in splits.values()] == [14, 2, 4]
    with pytest.raises(ValueError, match="holds 20 breasts, not 10"):
        bench_phantoms.draw(tmp_path, 10)


@pytest.mark.parametrize("compared", bench_phantoms.COMPARISONS)
def test_rows_start_from_the_same_weights_and_differ_by_their_flags(compared):
    models, (first, second) = [], bench_phantoms.COMPARISONS[compared].rows.values()
    for flags in (first, second):
        utils.seed_everything(0)
        argv = ["--model", "SLIP_VITT16", *bench_phantoms.COMPARISONS[compared].tower, *flags]
        models.append(main.build_model(main.get_args_parser().parse_args(argv))[0])
    states = [model.state_dict() for model in models]
    assert set(first) < set(second) and states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    shares = [getattr(getattr(model.visual, "patch_drop", None), "prob", 0) for model in models]
    assert shares == [0, 0.5 if compared == "patches" else 0]


@pytest.mark.slow
def test_rows_are_trained_probed_and_kept(tmp_path, capsys):
    argv = ["studies", "--output-dir", str(tmp_path), "--breasts", "160", "--epochs", "1"]
    argv += ["--batch-size", "16", "-j", "0"]
    found = bench_phantoms.main([*argv, "--seeds", "0", "1"])
    assert all(len(seeds) == 2 for rows in found.values() for seeds in rows.values())
    assert {key for row in found["SLIP"].values() for seed in row for key in seed} == {"recall", "auroc"}
    assert {key for row in found["SIMCLR"].values() for seed in row for key in seed} == {"auroc"}
    text = capsys.readouterr().out
    assert "| SLIP, mean recall | " in text and "(SD over seeds " in text and "SYNTHETIC" in text
    gain = [b["auroc"] - a["auroc"] for a, b in zip(*found["SIMCLR"].values(), strict=True)]
    (line,) = [line for line in text.splitlines() if line.startswith("| SIMCLR, macro AUROC | ")]
    value, low, high = map(float, re.fullmatch(r".*\| (\S+) \((\S+) to (\S+)\) \|", line).groups())
    assert value == pytest.approx(50 * sum(gain), abs=0.051) and any(gain) and low < value < high
    assert (
        bench_phantoms.main([*argv, "--seeds", "1"])["SLIP"]["two images of a study"]
        == (found["SLIP"]["two images of a study"][1:])
    )
    with pytest.raises(ValueError, match="choose another --output-dir"):
        bench_phantoms.main([*argv, "--seeds", "1", "--epochs", "2"])
