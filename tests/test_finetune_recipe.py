"""The search for a fine-tuning recipe sees no test lesion until its choice is made."""

import json
import sys

import cbis_tree
from helpers import ROOT
from model_helpers import write_checkpoint

from inputs import cbis
from preparation.cbis_tables import make_cbis

sys.path.insert(0, str(ROOT / "benchmarks"))
import finetune_recipe  # noqa: E402


def test_the_inner_table_holds_training_patients_alone(tmp_path):
    root = tmp_path / "cbis"
    cbis_tree.make_small_cbis(root)
    make_cbis(root)
    inner = finetune_recipe.inner_table(root, "calc", tmp_path / "inner")
    rows, official = (cbis.read_lesions(folder / "calc.csv") for folder in (inner, root))
    by_split = {name: {row["lesion"] for row in official if row["split"] == name} for name in cbis.CBIS_SPLITS}
    found = {name: {row["lesion"] for row in rows if row["split"] == name} for name in cbis.CBIS_SPLITS}
    assert found["test"] == by_split["val"] and found["train"] | found["val"] == by_split["train"]
    patients = {name: {row["patient"] for row in rows if row["split"] == name} for name in cbis.CBIS_SPLITS}
    assert not patients["train"] & patients["val"] and not patients["train"] & patients["test"]
    assert all((inner / row["crop"]).is_file() for row in rows)


def test_the_best_on_validation_goes_on_and_the_test_table_is_read_once(tmp_path, monkeypatch, capsys):
    root = tmp_path / "cbis"
    cbis_tree.make_small_cbis(root)
    make_cbis(root)
    monkeypatch.setattr(finetune_recipe, "CHOICES", {"lr": ("1e-2",)})
    weights = write_checkpoint(tmp_path / "weights.pt", "vit")
    report = finetune_recipe.main([
        "--root", str(root), "--finetune", str(weights), "--epochs", "1", "-j", "0", "--batch_size", "8",
        "--output-dir", str(tmp_path / "out"),
    ])  # fmt: skip
    settings = [entry["setting"] for entry in report["tried"]]
    assert [(s["lr"], s["epochs"]) for s in settings][:2] == [("1e-3", "1"), ("1e-2", "1")] and len(settings) == 3
    best = max(report["tried"], key=lambda entry: entry["auroc"]["value"])
    assert report["chosen"] == best["setting"]
    readings = list((tmp_path / "out").rglob("test_readings.jsonl"))
    official = [path for path in readings if path.parent.name == "chosen"]
    assert len(official) == 1 and len(official[0].read_text().splitlines()) == 1
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["chosen"] == best["setting"]
    assert "chosen: python beit_finetuning/run_class_finetuning.py" in capsys.readouterr().out
