"""Checkpoints: torn ones are named, older and published ones read, wrappers taken off."""

import os

import numpy as np
import pytest
import torch

from evaluation import linear_sgd
from runtime import checkpoints
from towers.files import read_pretrained


def test_torn_checkpoint_is_named_and_the_one_before_it_used(tmp_path):
    for step in (5, 10, 15):
        checkpoints.save_training_checkpoint({"step": step}, tmp_path, step, is_best=step == 5, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "checkpoint_best.pt",
        "checkpoint_step00000010.pt",
        "checkpoint_step00000015.pt",
    ]
    assert checkpoints.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 15
    assert checkpoints.load_checkpoint(tmp_path / "checkpoint_best.pt")["step"] == 5
    newest = tmp_path / "checkpoint_step00000015.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    said = []
    assert checkpoints.find_training_checkpoint(tmp_path, said.append)["step"] == 10
    assert "checkpoint_step00000015.pt" in said[0]
    (tmp_path / "checkpoint_step00000010.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoints.find_training_checkpoint(tmp_path, said.append)
    assert checkpoints.find_training_checkpoint(tmp_path / "new", said.append) is None


@pytest.mark.parametrize("files", [checkpoints.TRAINING, linear_sgd.FILES], ids=["main.py", "main_linear.py"])
def test_a_kill_between_the_files_of_a_save_never_loses_the_best(tmp_path, monkeypatch, files):
    """With the numbered file there, the run would go on behind it and never write this best again."""
    replace = os.replace
    for moment in range(4):
        folder, left = tmp_path / str(moment), moment
        folder.mkdir()
        checkpoints.save_training_checkpoint({"step": 1}, folder, 1, is_best=True, keep_last=2, files=files)

        def killed(source, target):
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", killed)
        try:
            checkpoints.save_training_checkpoint({"step": 2}, folder, 2, is_best=True, keep_last=2, files=files)
        except KeyboardInterrupt:
            assert moment < 3
        monkeypatch.setattr(os, "replace", replace)
        best = checkpoints.load_checkpoint(folder / files.best)["step"]
        newest = checkpoints.find_training_checkpoint(folder, files=files)["step"]
        assert (best, newest) == ((1, 1), (2, 1), (2, 2), (2, 2))[moment]
        assert checkpoints.load_checkpoint(folder / files.newest)["step"] == (2 if moment == 3 else 1)


def test_settings_that_differ_are_named_and_one_that_was_not_recorded_agrees():
    assert checkpoints.differences({"lr": 1}, {"lr": 1, "later": 2}) == []
    assert checkpoints.differences({"lr": 1, "wd": 3}, {"lr": 2, "wd": 3}) == ["lr: 1 there, 2 now"]
    assert checkpoints.differences({"lr": 1, "gone": 3}, {"lr": 1}) == ["gone: 3 there, None now"]


def test_learning_rates_of_numpy_are_read_and_other_numbers_refused(tmp_path):
    """SLIP's own training leaves them in its optimizer's state, under the module's old name or its new one."""
    torch.save({"lr": np.float64(0.00075)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pt").read_bytes()
    names = (b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert any(name in data for name in names)
    for name in names:
        (tmp_path / "b.pt").write_bytes(data.replace(names[0], name).replace(names[1], name))
        state = checkpoints.load_checkpoint(tmp_path / "b.pt")
        assert state == {"lr": 0.00075} and type(state["lr"]) is float
    for value in (np.float32(1), np.array([1.0])):
        torch.save({"lr": value}, tmp_path / "c.pt")
        with pytest.raises(ValueError, match="c.pt is not a readable checkpoint"):
            checkpoints.load_checkpoint(tmp_path / "c.pt")


def test_wrappers_are_taken_off_parameter_names_wherever_they_stand():
    for name in (
        "module.a.b",
        "module.module.a.b",
        "_orig_mod.a.b",
        "module._orig_mod.a.b",
        "a._orig_mod.b",
        "model.a.b",
    ):
        assert list(checkpoints.strip_wrappers({name: torch.zeros(1)})) == ["a.b"]
    assert list(checkpoints.strip_wrappers(dict.fromkeys(("model.a", "b"), torch.zeros(1)))) == ["model.a", "b"]


def test_text_and_a_file_that_was_cut_off_are_said_to_be_that(tmp_path):
    path = tmp_path / "c.pt"
    checkpoints.save_checkpoint({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="its end is missing"):
        checkpoints.load_checkpoint(path)
    for text in ("not a checkpoint\n", "Überschrift " * 99):
        path.write_text(text, encoding="utf8")
        with pytest.raises(ValueError, match="it is text that begins"):
            checkpoints.load_checkpoint(path)


def test_what_is_no_file_of_weights_is_said_to_be_what_it_is(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError, match="empty folder"):
        read_pretrained(tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").touch()
    with pytest.raises(ValueError, match="name its weights, .*run/checkpoint.pt"):
        read_pretrained(tmp_path / "run")
    bare = tmp_path / "timm.pth"
    torch.save({"cls_token": torch.zeros(1), "blocks.0.norm1.weight": torch.zeros(1)}, bare)
    with pytest.raises(ValueError, match="--vision-tower NAME --vision-weights FILE"):
        read_pretrained(bare)
