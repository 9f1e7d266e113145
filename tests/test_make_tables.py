"""make_tables.py: the whole on a small drawn world with two towers, what it skips and repeats, and what it refuses."""

import json
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import quick_start
import twins
from helpers import ROOT, TINY
from model_helpers import write_checkpoint
from page_helpers import BROWSER, check_layout
from sklearn.metrics import roc_auc_score

import make_report
import make_tables
import models
from evaluation.predictions import Predictions
from reporting import plan as reporting_plan
from reporting import steps
from runtime import command_line
from synthetic import world

RESNET = "--vision-tower resnet18 --image-size 32 --context-length 24 --ssl-mlp-dim 32 --ssl-emb-dim 16 --override \
vision.layers=(1,1,1,1) vision.channels=(8,16,16,16) embed_dim=16 text_width=32 text_layers=1 text_heads=2"
ROWS = {
    "train": "--dataset roco --root {roco} --model SLIP_VITT16 --epochs 1 --batch-size 16 --disable-amp",
    "probe": "--resamples 60",
    "primary": ["calc", "ViT (mammo)"],
    "rows": [
        {"name": "ViT untrained", "train": shlex.join(TINY), "probe": "--untrained"},
        {"name": "ViT (mammo)", "train": f"--caption-filter mammo {shlex.join(TINY)}", "baseline": "ViT untrained"},
        {"name": "ResNet (all)", "train": RESNET, "baseline": "ViT untrained"},
    ],
    "published": {"calc": {"Somebody": {"auroc": 80.1, "f1": 60}}},
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    lesions = {"calc": {"train": 80, "test": 60}, "mass": {"train": 100, "test": 60}}
    world.make_demo(root, seed=0, pairs=120, lesions=lesions, workers=1)
    return root


def write_rows(folder, rows=ROWS):
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def command(drawn, folder, *flags, rows=ROWS):
    return [
        "--roco", str(drawn / "roco"), "--cbis", str(drawn / "cbis"), "--rows", str(write_rows(folder, rows)),
        "--output-dir", str(folder / "out"), "--workers", "0", "--resamples", "100", *flags,
    ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick_steps():
    """The steps start quickly, but those of a make_tables.py that is a process itself."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(steps, "subprocess", quick_start.Quick)
        yield


@pytest.fixture(scope="module")
def made(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    return folder, make_tables.main(command(drawn, folder, "--seeds", "0", "1"))


@pytest.mark.slow
def test_both_tables_hold_every_row_with_its_seeds(made):
    folder, result = made
    assert result == json.loads((folder / "out" / "tables.json").read_text())
    assert result["synthetic"] and [step["status"] for step in result["steps"]] == ["done"] * (1 + 3 * 2 * 3)
    for kind, table in result["tables"].items():
        rows = {row["name"]: row for row in table["rows"]}
        assert {"ViT untrained", "ViT (mammo)", "ResNet (all)", "Chance", "Crop size alone"} <= set(rows), kind
        assert "Radiologist: BI-RADS assessment" in rows
        for name in ("ViT untrained", "ViT (mammo)", "ResNet (all)"):
            row = rows[name]
            assert row["seeds"] == [0, 1] and not row["leaves_out"] and len(row["metrics"]["auroc"]["values"]) == 2
            files = [Predictions.read(folder / "out" / path / "predictions.csv") for path in row["files"]]
            each = [roc_auc_score(p.labels, p.prob, multi_class="ovr") for p in files]
            assert row["metrics"]["auroc"]["value"] == pytest.approx(np.mean(each))
            assert set(row["detection"]) and set(row["units"]) == {"breast", "patient"} and row["subgroups"]
    text = (folder / "out" / "tables.md").read_text()
    assert "SYNTHETIC" in text and "| Somebody (as published) | 80.1 | 60 | – |" in text


@pytest.mark.slow
def test_comparisons_are_paired_corrected_and_the_primary_one_is_not(made):
    _, result = made
    calc, mass = (result["tables"][kind]["comparisons"] for kind in ("calc", "mass"))
    assert [entry["primary"] for entry in calc] == [True, False] and "p_holm" not in calc[0]
    assert calc[1]["family"] == 1 and calc[1]["p_holm"] == calc[1]["difference"]["auroc"]["p_value"]
    assert [entry["family"] for entry in mass] == [2, 2]
    smaller = min(entry["difference"]["auroc"]["p_value"] for entry in mass)
    assert min(entry["p_holm"] for entry in mass) == pytest.approx(min(1, 2 * smaller))
    assert result["primary"]["after_results"] is False
    rows = {row["name"]: row["metrics"]["auroc"]["value"] for row in result["tables"]["mass"]["rows"]}
    for entry in mass:
        value = entry["difference"]["auroc"]["value"]
        assert value == pytest.approx(rows[entry["row"]] - rows[entry["baseline"]])


@pytest.mark.slow
def test_what_is_done_is_skipped_and_what_is_lost_is_made_again(drawn, made):
    folder, result = made
    out = folder / "out"
    (out / "runs" / "resnet_all" / "seed1" / "mass" / "results.json").unlink()
    stamp = (out / "runs" / "resnet_all" / "seed1" / "training" / "checkpoint_best.pt").stat().st_mtime_ns
    again = make_tables.main(command(drawn, folder, "--seeds", "0", "1", "--primary", "mass", "ResNet (all)"))
    ran = [step["name"] for step in again["steps"] if step["status"] == "done"]
    assert ran == ["ResNet (all), seed 1: mass"]
    assert (out / "runs" / "resnet_all" / "seed1" / "training" / "checkpoint_best.pt").stat().st_mtime_ns == stamp
    assert again["tables"]["mass"]["rows"][-1]["metrics"] == result["tables"]["mass"]["rows"][-1]["metrics"]
    assert again["primary"]["after_results"] is True  # named when results were there, and the table says so
    assert "AFTER results were there" in (out / "tables.md").read_text()


@pytest.mark.slow
def test_killed_again_and_again_it_makes_the_same_predictions(drawn, made, tmp_path):
    """SIGKILL to make_tables.py alone: its step writes a checkpoint and ends, and the next start waits for it."""
    argv = [sys.executable, "make_tables.py", *command(drawn, tmp_path, "--seeds", "0")]
    rng = random.Random(0)
    for _ in range(2):
        job = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(8, 20))
        job.kill()
        assert job.wait() == -signal.SIGKILL
    subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    runs = tmp_path / "out" / "runs"
    found = {path.relative_to(runs): path.read_bytes() for path in runs.rglob("predictions.csv")}
    assert len(found) == 3 * 2
    assert all((made[0] / "out" / "runs" / name).read_bytes() == data for name, data in found.items())


@pytest.mark.slow
def test_a_failed_row_does_not_stop_the_others(drawn, tmp_path):
    """A learning rate at which the loss is no number."""
    bad = {**ROWS["rows"][2], "name": "Diverges", "train": f"--lr 1e30 --warmup-epochs 0 --print-freq 1 {RESNET}"}
    rows = {**ROWS, "primary": None, "rows": [bad | {"baseline": "ViT untrained"}, ROWS["rows"][0]]}
    with pytest.raises(RuntimeError, match=r"Diverges, seed 0: train: FAILED with code 1"):
        make_tables.main(command(drawn, tmp_path, "--seeds", "0", rows=rows))
    result = json.loads((tmp_path / "out" / "tables.json").read_text())
    assert result["tables"]["calc"]["absent"]["Diverges"] == "no seed has results"
    row = next(row for row in result["tables"]["calc"]["rows"] if row["name"] == "ViT untrained")
    assert row["leaves_out"] and "not another training" in (tmp_path / "out" / "tables.md").read_text()


@pytest.mark.slow
def test_a_row_that_is_fine_tuned_end_to_end_stands_beside_its_probe(drawn, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "tower.pt", "batchnorm")
    rows = {
        "probe": "--resamples 60",
        "finetune": "--epochs 1 --warmup_epochs 0 --batch_size 16 --drop_path 0 --resamples 60 -j 0 --gpu -1",
        "primary": ["mass", "Fine-tuned"],
        "rows": [
            {"name": "Probe", "weights": str(checkpoint)},
            {"name": "Fine-tuned", "weights": str(checkpoint), "finetune": "--lr 1e-3", "baseline": "Probe"},
        ],
    }
    result = make_tables.main(command(drawn, tmp_path, "--seeds", "0", "1", rows=rows))
    for kind, table in result["tables"].items():
        probe, tuned = (row for row in table["rows"] if row["kind"] == "measured")
        assert probe["seeds"] == [0] and tuned["seeds"] == [0, 1]
        found = [Predictions.read(tmp_path / "out" / path / "predictions.csv") for path in tuned["files"]]
        assert abs(found[0].prob - found[1].prob).max() > 1e-4  # the seeds are two trainings
        each = [roc_auc_score(p.labels, p.prob, multi_class="ovr") for p in found]
        assert tuned["metrics"]["auroc"]["value"] == pytest.approx(np.mean(each))
        assert set(tuned["detection"]) and tuned["subgroups"] and tuned["units"]["breast"]["number"]
        (entry,) = table["comparisons"]
        assert (entry["row"], entry["baseline"]) == ("Fine-tuned", "Probe") and entry["primary"] is (kind == "mass")
    again = make_tables.main(command(drawn, tmp_path, "--seeds", "0", "1", rows=rows))
    assert {step["status"] for step in again["steps"]} == {"done before"}


def test_dry_run_prints_the_commands_and_runs_none(drawn, tmp_path, capsys):
    assert make_tables.main(command(drawn, tmp_path, "--seeds", "0", "1", "2", "--dry-run")) == {}
    printed = capsys.readouterr().out
    assert printed.count("main.py --dataset roco") == 9 and printed.count("main_linear.py --dataset cbis_calc") == 9
    assert not (tmp_path / "out" / "runs").exists()
    make_tables.main(command(drawn, tmp_path, "--seeds", "0", "--dry-run", "--submit=--partition gpu --nodes 1"))
    assert "run_with_submitit.py --dataset roco" in (printed := capsys.readouterr().out)
    assert "--partition gpu --nodes 1" in printed


def test_a_name_of_a_library_stays_a_name(drawn, tmp_path, capsys, monkeypatch):
    folder, read = twins.timm_tower(tmp_path / "tower"), models.load_pretrained
    monkeypatch.setattr(models, "load_pretrained", lambda path: read(folder if path == "timm:test_vit" else path))
    rows = {"rows": [{"name": "Frozen", "weights": "timm:test_vit"}, {"name": "Folder", "weights": str(folder)}]}
    make_tables.main(command(drawn, tmp_path, "--dry-run", rows=rows))
    printed = capsys.readouterr().out
    assert printed.count("--pretrained timm:test_vit") == 2 and printed.count(f"--pretrained {folder}") == 2


@pytest.mark.slow
def test_frozen_models_of_other_libraries_stand_beside_one_that_is_trained_from_one(drawn, tmp_path):
    pair, tower = twins.clip(tmp_path / "clip"), twins.vision("dinov2", tmp_path / "dinov2")
    start = f"--model SLIP --init {pair} --ssl-mlp-dim 16 --ssl-emb-dim 8"
    rows = {
        "train": "--dataset roco --root {roco} --epochs 1 --batch-size 16 --disable-amp", "probe": "--resamples 60",
        "rows": [{"name": "CLIP (frozen)", "weights": str(pair)}, {"name": "DINOv2 (frozen)", "weights": str(tower)},
                 {"name": "SLIP from it", "train": start, "baseline": "CLIP (frozen)"}],
    }  # fmt: skip
    found = make_tables.main(command(drawn, tmp_path, "--seeds", "0", "1", rows=rows))
    for table in found["tables"].values():
        by_name = {row["name"]: row for row in table["rows"]}
        assert [len(by_name[row["name"]]["seeds"]) for row in rows["rows"]] == [1, 1, 2]
        (compared,) = table["comparisons"]
        assert (compared["row"], compared["baseline"]) == ("SLIP from it", "CLIP (frozen)")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": [{"name": "A", "weight": "x"}]}, "unknown weight; choose from"),
        ({"rows": [{"name": "A", "train": "--no-such-flag 1"}]}, "no flag --no-such-flag"),
        ({"rows": [{"name": "A", "train": "--model NO"}]}, "does not take its flags"),
        ({"rows": [{"name": "A", "probe": "--no-such-flag 1"}]}, "main_linear.py has no flag --no-such-flag"),
        ({"rows": [{"name": "A", "probe": "--protocol best"}]}, "main_linear.py does not take its flags"),
        ({"rows": [{"name": "A", "finetune": "--learning 1"}]}, "run_class_finetuning.py has no flag --learning"),
        ({"rows": [{"name": "A", "train": "--caption-filter zzzz"}]}, "row 'A'"),
        ({"rows": [{"name": "A", "train": "--batch-size 5000 " + RESNET}]}, "fewer than --batch-size 5000"),
        ({"rows": [{"name": "A", "weights": "{medclip_vit}"}]}, "--medclip-vit"),
        ({"rows": [{"name": "A", "weights": "{nothing}"}]}, "is no place; choose from roco"),
        ({"rows": [{"name": "A"}, {"name": "A"}]}, "two rows are called 'A'"),
        ({"rows": [{"name": "A", "baseline": "B"}]}, "its baseline 'B' is no row"),
        ({"rows": [{"name": "A+B"}, {"name": "a (b)"}]}, "'A.B' and 'a .b.' would share the folder runs/a_b"),
        ({"primary": ["calc", "B"]}, "choose one of calc, mass and of"),
        ({"rows": [{"name": "A", "weights": "/no/such/file.pt"}]}, "/no/such/file.pt"),
    ],
)
def test_what_would_fail_later_is_refused_first(drawn, tmp_path, change, message):
    rows = {**ROWS, "primary": None, **change}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_tables.main(command(drawn, tmp_path, rows=rows))
    assert not (tmp_path / "out" / "runs").exists()


def test_a_rows_name_is_one_folder(tmp_path):
    for name, slug in (("ViT (mammo + x-ray)", "vit_mammo_x_ray"), ("../x", "x"), ("日本", "日本"), ("..", "_~")):
        row = reporting_plan.PlannedRow(name)
        assert row.slug.startswith(slug) and (tmp_path / row.slug).parent == tmp_path and row.slug not in ("", "..")


def test_the_default_rows_are_the_eight_of_both_tables():
    places = dict.fromkeys(reporting_plan.INPUTS, "/some/path")
    plan = reporting_plan.read_plan(Path(make_tables.__file__).with_name("table_rows.json"), places, None)
    assert len(plan.rows) == 8 and sum(row.train is not None for row in plan.rows) == 6
    assert [len(plan.published[kind]) for kind in ("calc", "mass")] == [11, 11]
    parser = make_tables.training.get_args_parser()
    for row in plan.rows:
        if row.train:
            args = parser.parse_args(shlex.split(row.train))
            assert args.mask_duplicates and args.lr == 5e-5 and args.medclip_weights == "/some/path"
    with pytest.raises(command_line.UsageError, match="--bert-vocab, --medclip-resnet, --medclip-vit"):
        reporting_plan.read_plan(
            Path(make_tables.__file__).with_name("table_rows.json"), {"roco": "r", "cbis": "c"}, None
        )


def test_a_world_without_readme_is_not_called_synthetic(tmp_path, drawn):
    assert world.is_synthetic(drawn / "cbis") and not world.is_synthetic(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_of_tables_with_two_seeds_lays_out(made, tmp_path):
    folder, _ = made
    page = make_report.main([str(folder / "out"), "--output-dir", str(tmp_path / "report")])
    assert all(section["samples"]["models"][-1] == "ResNet (all)" for section in page["sections"])
    assert "First seed of each row" in page["sections"][0]["samples"]["about"]
    check_layout(tmp_path / "report" / "report.html", tmp_path / "seen")
