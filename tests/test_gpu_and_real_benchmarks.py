"""benchmarks/on_gpu.py at tiny sizes on a CPU; benchmarks/real_radiology.py on drawn sets in the real ones' layouts."""

import csv
import json
from collections import Counter
from datetime import datetime
from pathlib import Path

import numpy as np
import on_gpu
import pytest
import quick_start
import real_radiology
import timm
import torch
from PIL import Image

pytestmark = pytest.mark.slow


def test_rows_are_measured_each_by_itself_and_kept(tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    monkeypatch.setitem(on_gpu.LIMITS, "input", 0.01)
    argv = [
        "--cpu",
        "--output",
        str(out),
        "--only",
        "tests",
        "colours",
        "features:MEDSLIP_VIT",
        "input",
        "--limit",
        "3",
    ]
    rows = on_gpu.main(argv)["rows"]
    assert "skipped" in rows["tests"]["summary"] or "passed" in rows["tests"]["summary"]
    assert rows["colours"]["views_that_differ"] == 0 and rows["features:MEDSLIP_VIT"]["fp32_images_per_second"] > 0
    assert rows["input"]["failed"].startswith("ran past")
    text = out.with_suffix(".md").read_text()
    assert all(f"| {name} |" in text for name in argv[4:8]) and "FAILED" in text
    monkeypatch.setitem(on_gpu.LIMITS, "input", 90)
    again = on_gpu.main(argv)["rows"]  # only what failed is measured again
    assert again["colours"] == rows["colours"] and 0 <= again["input"]["waiting_for_data"] <= 1
    with pytest.raises(ValueError, match="unknown row 'colors'; choose from tests"):
        on_gpu.main(["--cpu", "--only", "colors"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--cpu"):
            on_gpu.main([])


def picture(path, rng, bright):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(rng.normal(90 + 70 * bright, 25, (48, 56)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def world(root):
    """Two dozen images of each set, in the layouts that real_radiology.py names."""
    rng, number = np.random.default_rng(0), 0
    for split, n in (("train", 18), ("validation", 9)):
        folder = root / "covid_roco" / split / "radiology"
        rows, lines = [], []
        for i in range(n):
            number += 1
            finding = "COVID-19" if i % 2 else "Pneumonia"
            picture(folder / "images" / f"ROCO_{number:05d}.jpg", rng, i % 2)
            rows.append({"id": f"ROCO_{number:05d}", "modality": "CT" if i % 5 == 4 else "X-ray", "finding": finding,
                         "group": f"g{number}", "source": "drawn"})  # fmt: skip
            lines.append(f"ROCO_{number:05d}\t {finding} of patient {number}.\n")
        (folder / "captions.txt").write_text("".join(lines))
        with open(folder / "sources.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    lines = ["path,label,split,group,width,height"]
    for i in range(45):
        name, split = ("benign", "malignant", "normal")[i % 3], "test" if i % 9 < 3 else "train"
        picture(root / "busi" / split / f"{i}.jpg", rng, i % 3 / 2)
        lines.append(f"{split}/{i}.jpg,{name},{split},{i},56,48")
    film = Image.fromarray(rng.integers(0, 256, (24, 28), dtype=np.uint8)).resize((56, 48), 3)
    film.save(root / "busi" / "test" / "0.jpg")
    lines[2] = "train/1.jpg,malignant,train,1,56,48"
    (root / "busi" / "test" / "1.jpg").unlink()
    film.save(root / "busi" / "train" / "1.jpg", quality=70)  # in another group by the table, in training
    (root / "busi" / "table.csv").write_text("\n".join(lines) + "\n")
    lines = ["image,label,split,group"]
    for i in range(30):
        name = ("bacteria", "virus", "normal")[i % 3]
        picture(root / "pneumonia" / "images" / f"{i}.jpg", rng, i % 3 / 2)
        lines.append(f"images/{i}.jpg,{name},{'test' if i % 5 == 4 else 'train'},{i}")
    (root / "pneumonia" / "table.csv").write_text("\n".join(lines) + "\n")
    for i in range(20):
        picture(root / "real_pairs" / "images" / f"cat{i}.png", rng, 0.5)
    captions = "".join(f"cat{i}\t A cat, number {i}.\n" for i in range(20))
    (root / "real_pairs" / "captions.txt").write_text(captions)
    return root


def test_rows_are_trained_probed_and_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(real_radiology, "subprocess", quick_start.Quick)
    torch.manual_seed(0)
    torch.save(timm.create_model(real_radiology.TOWER).state_dict(), tmp_path / "tower.pt")
    argv = ["--data", str(world(tmp_path / "data")), "--vision-weights", str(tmp_path / "tower.pt"), "-j", "0"]
    argv += ["--output-dir", str(tmp_path / "out"), "--image-size", "32", "--epochs", "1", "--batch-size", "4"]
    names = {"untrained", "ImageNet", "ImageNet, 224 pixels", "held", "held, best epoch", "held, blend 0.5"}
    names |= {"CLIP, held", "SIMCLR, held", real_radiology.CONTROL, real_radiology.OWN, "held, mean of 2"}
    labelled = {"SLIP, captions from labels", "CLIP, captions from labels"}
    argv += ["--seeds", "0", "1", "--resamples", "50", "--jobs", "2", "--rows", *sorted(names | labelled)]
    report = real_radiology.main(argv)
    sets = {"BUSI", "pneumonia"}
    assert set(report["table"]) == sets | {"BUSI, split", "pneumonia, split", "BUSI, zero-shot", "finding"}
    for dataset in sets:
        assert set(report["table"][dataset]) == names
        assert set(report["table"][f"{dataset}, split"]) == names | labelled
    assert set(report["table"]["finding"]) == names - {real_radiology.CONTROL, real_radiology.OWN}
    for rows in report["table"].values():
        for name, cells in rows.items():
            value = cells["auroc"]
            if value["low"] is None:  # on so few images an AUROC may be the same in every resample
                assert value["why"]
            else:
                assert value["low"] <= value["value"] <= value["high"]
            if name != "ImageNet" and "ImageNet" in rows:
                gain = cells["auroc minus ImageNet"]
                assert gain["value"] == pytest.approx(value["value"] - rows["ImageNet"]["auroc"]["value"])
    out = tmp_path / "out"
    # Every ultrasound is predicted once, and none was in the captions that labels became. A copy is in one group.
    with open(out / "busi.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["group"] == rows[1]["group"] and rows[0]["split"] == rows[1]["split"] == "train"
    with open(out / "rows" / "held" / "0" / "busi" / "folds.csv", newline="") as file:
        assert sorted(row["image"] for row in csv.DictReader(file)) == sorted(row["image"] for row in rows)
    captions = (out / "roco_labelled" / "train" / "radiology" / "captions.txt").read_text().splitlines()
    assert len(captions) == sum(row["split"] == "train" for row in rows) and "breast" in captions[0]
    # No caption and no image of a tested group is in what its tower was trained on.
    for k in range(real_radiology.FOLDS):
        trained = (out / f"roco_without_{k}" / "train" / "radiology" / "captions.txt").read_text()
        with open(out / f"finding_{k}.csv", newline="") as file:
            tested = [row["image"] for row in csv.DictReader(file) if row["split"] == "test"]
        assert tested and not any(image.split("/")[1].split(".")[0] in trained for image in tested)
    # The primary comparison was named before a row was trained, is the difference of its rows, and is not corrected.
    first = out / "rows" / "held" / "0" / "whole" / "tower.pt"
    assert datetime.fromisoformat(report["primary"]["named"]).timestamp() < first.stat().st_mtime
    compared = {(c["set"], c["row"], c["minus"]): c for c in report["comparisons"]}
    cell, rows = compared["BUSI", "held", "CLIP, held"], report["table"]["BUSI"]
    assert cell["value"] == pytest.approx(rows["held"]["auroc"]["value"] - rows["CLIP, held"]["auroc"]["value"])
    corrected = [key for key, c in compared.items() if "holm" in c]
    assert ("BUSI", "held", "CLIP, held") not in corrected and ("pneumonia", "held", "CLIP, held") in corrected
    assert [c["seeds"] for c in compared.values() if c["row"] == "held, mean of 2"] == [[1, 2]] * 3
    with pytest.raises(ValueError, match="names another primary comparison"):
        real_radiology.name_primary(out / "report.json", [0])
    # What is not medical is as much as what is; children's radiographs are those of one origin.
    captions = (out / "control" / "train" / "radiology" / "captions.txt").read_text().splitlines()
    assert len(captions) == 18 and all("A cat" in line for line in captions)
    assert len((out / "own" / "train" / "radiology" / "captions.txt").read_text().splitlines()) == 18
    with open(out / "pneumonia.csv", newline="") as file:
        assert Counter(row["label"] for row in csv.DictReader(file)) == {"bacteria": 10, "virus": 10}
    mean = torch.load(out / "rows" / "held, mean of 2" / "0" / "whole" / "tower.pt", weights_only=True)["state_dict"]
    seeds = [out / "rows" / "held" / str(seed) / "whole" / "tower.pt" for seed in (0, 1)]
    seeds = [torch.load(path, weights_only=True)["state_dict"] for path in seeds]
    for name, value in mean.items():
        torch.testing.assert_close(value, (seeds[0][name] + seeds[1][name]) / 2 if value.is_floating_point() else value)
    # The blend lies half-way between the start and the end.
    start = torch.load(tmp_path / "tower.pt", weights_only=True)["conv_stem.weight"]
    towers = [out / "rows" / name / "0" / "whole" / "tower.pt" for name in ("held", "held, blend 0.5")]
    states = (torch.load(tower, weights_only=True)["state_dict"] for tower in towers)
    end, blend = (state["visual.conv_stem.weight"] for state in states)
    torch.testing.assert_close(blend, (start + end) / 2)
    before = (out / "rows" / "held" / "0" / "done.json").read_bytes()
    assert json.loads(json.dumps(real_radiology.main(argv)["table"])) == json.loads(json.dumps(report["table"]))
    assert (out / "rows" / "held" / "0" / "done.json").read_bytes() == before
    assert "| held |" in (out / "report.md").read_text()


def test_own_images_are_as_many_of_each_set():
    files = {"busi": [Path(f"b{i}") for i in range(5)], "pneumonia": [Path(f"p{i}") for i in range(4)]}
    chosen = real_radiology.own(files, 7, seed=0)
    assert Counter(str(path)[0] for path, _ in chosen) == {"b": 3, "p": 4}
    assert len(set(chosen)) == 7 and {text for _, text in chosen} == set(real_radiology.KINDS.values())
    every = real_radiology.own(files, None, seed=0)
    assert sorted(path.name for path, _ in every) == sorted(path.name for paths in files.values() for path in paths)
    with pytest.raises(ValueError, match="pneumonia has 4 training images, and 5 are taken"):
        real_radiology.own(files, 10, seed=0)


def test_own_images_are_of_the_training_parts(tmp_path, monkeypatch):
    written, data, out = {}, world(tmp_path / "data"), tmp_path / "out"
    monkeypatch.setattr(real_radiology, "write_pairs", lambda root, pairs, *_: written.update({root.name: pairs}))
    real_radiology.prepare(data, out, 32)
    train = set()
    for name in ("busi", "pneumonia"):
        with open(out / f"{name}.csv", newline="") as file:
            train |= {data / name / row["image"] for row in csv.DictReader(file) if row["split"] == "train"}
    own = {path for path, _ in written["own"]}
    assert len(own) == 18 and own <= train and all(path.is_file() for path in own)
    assert len({caption for _, caption in written["own"]}) == 18  # no caption is another's
    assert {path for path, _ in written["all_own"]} == train and {path for path, _ in written["both"]} == own


def test_own_images_stand_beside_the_captioned_ones(tmp_path):
    data, out = world(tmp_path / "data"), tmp_path / "out"
    real_radiology.prepare(data, out, 32)
    captions = {
        name: dict(
            line.split("\t ", 1)
            for line in (out / name / "train" / "radiology" / "captions.txt").read_text("utf8").splitlines()
        )
        for name in ("roco", "both")
    }
    assert captions["roco"].items() < captions["both"].items()
    beside = {key: text for key, text in captions["both"].items() if key not in captions["roco"]}
    assert len(beside) == 18 and set(beside.values()) == set(real_radiology.KINDS.values())
    assert all((out / "both" / "train" / "radiology" / "images" / f"{key}.jpg").is_file() for key in captions["both"])


def test_a_training_that_a_signal_has_stopped_is_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(real_radiology.training, "main", lambda argv: {"stopped_by": "SIGTERM"})
    argv = ["--data", "data", "--vision-weights", "tower.pt", "--output-dir", str(tmp_path)]
    args = real_radiology.get_args_parser().parse_args(argv)
    with pytest.raises(SystemExit) as left:
        real_radiology.tower_of(args, real_radiology.FINAL["held"], 0, tmp_path, tmp_path / "whole")
    assert left.value.code == 128 + 15 and not (tmp_path / "whole" / "tower.pt").exists()


@pytest.mark.parametrize("micro, way", [(1, "micro"), (2, "full")])
def test_micro_batches_of_a_step_are_negatives_of_each_other(tmp_path, micro, way):
    argv = ["--data", "data", "--vision-weights", "tower.pt", "--batch-size", "32", "--update-freq", str(micro)]
    args, row = real_radiology.get_args_parser().parse_args(argv), real_radiology.FINAL["held"]
    flags = real_radiology.flags_of(args, row, 0, tmp_path, tmp_path)
    given = real_radiology.training.get_args_parser().parse_args(flags)
    assert (given.batch_size, given.update_freq, given.accum_negatives) == (32, micro, way)


def test_the_mean_of_the_last_epochs_leaves_out_what_a_signal_wrote(tmp_path, monkeypatch):
    def train(flags):
        folder = Path(flags[flags.index("--output-dir") + 1])
        assert int(flags[flags.index("--keep-last") + 1]) >= 3  # two epochs, and one file of a signal
        for step in (9, 14, 18, 27):
            weights = {"w": torch.full((2,), float(step)), "seen": torch.tensor(step)}
            state = {"state_dict": weights, "step": step, "model": {}, "preprocess": {}, "tokenizer": None}
            torch.save(state, folder / f"checkpoint_step{step:08d}.pt")
            torch.save(state, folder / "checkpoint.pt")
        return {}

    monkeypatch.setattr(real_radiology.training, "main", train)
    argv = ["--data", str(tmp_path), "--vision-weights", "x", "--output-dir", str(tmp_path), "--epochs", "3"]
    args, row = real_radiology.get_args_parser().parse_args(argv), real_radiology.Row("SLIP", last=2)
    file = real_radiology.tower_of(args, row, 0, tmp_path, tmp_path / "whole")
    state = torch.load(file, weights_only=True)
    assert state["state_dict"]["w"].tolist() == [22.5, 22.5] and state["state_dict"]["seen"] == 27
    assert [path.name for path in file.parent.iterdir()] == ["tower.pt"]
