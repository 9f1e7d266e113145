"""What a run is asked before it begins, and how its log counts."""

import json
from pathlib import Path

import pytest
from helpers import command
from roco_tree import make_roco

import main


@pytest.fixture(scope="module")
def roco(tmp_path_factory):
    return make_roco(tmp_path_factory.mktemp("roco"))


def test_an_estimate_measures_these_flags_and_writes_nothing(roco, tmp_path, capsys):
    out = tmp_path / "out"
    found = main.main(command(roco, out, "--estimate", "--epochs", "5"))
    assert not out.exists() and found["steps"] == 15  # 3 an epoch
    args = main.get_args_parser().parse_args(command(roco, out))
    model, _ = main.build_model(args)
    each = 12 * sum(parameter.numel() for parameter in model.parameters())  # weights and two averages of 4 bytes
    assert found["disk_gb"] == pytest.approx(4 * each / 1e9)
    # One of three steps is measured, of 8 pairs: what it took, times fifteen.
    assert found["hours"] == pytest.approx(15 * 8 / found["samples_per_second"] / 3600)
    assert found["memory_gib"] > 0 and "estimate from 1 steps" in capsys.readouterr().out


def test_a_forgotten_dataset_is_asked_for(tmp_path):
    args = main.get_args_parser().parse_args(["--root", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="say by --dataset what it is: roco, "):
        main.build_reader(args, "train", "all")


def test_the_log_counts_epochs_from_one_and_names_only_flags_that_were_given(roco, tmp_path):
    main.main(command(roco, tmp_path))
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("epoch ")] == [
        f"epoch {epoch}/2 [{step}/3]" for epoch in (1, 2) for step in (1, 2, 3)
    ]
    [said] = [line for line in lines if line.startswith("settings: ")]
    assert "--epochs 2" in said and "--eps" not in said and "settings.json" in said
    args = json.loads((tmp_path / "settings.json").read_text())["args"]
    assert Path(args["root"]).is_absolute() and Path(args["output_dir"]) == tmp_path
