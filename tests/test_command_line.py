"""Exit codes and messages: what the user can mend is one line, a fault of the code keeps its traceback."""

import importlib.util
import sys

import pytest

from runtime import command_line

CODE = "def fail():\n    raise ValueError('{0} said so')\n"


def module_at(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CODE.format(path.stem))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("place", ["script.py", "inputs/reader.py"])
def test_our_own_error_is_one_line(tmp_path, monkeypatch, capsys, place):
    monkeypatch.setattr(command_line, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as left:
        command_line.run_script(module_at(tmp_path / place).fail)
    assert left.value.code == 1 and capsys.readouterr().err == f"error: {(tmp_path / place).stem} said so\n"


def test_an_error_of_the_system_names_the_file_and_no_number(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit):
        command_line.run_script(lambda: open(tmp_path))
    assert capsys.readouterr().err == f"error: Is a directory: '{tmp_path}'\n"


@pytest.mark.parametrize("place", [".venv/lib/python3.11/site-packages/numpy/core.py", "../elsewhere.py"])
def test_a_librarys_error_keeps_its_traceback_wherever_the_environment_lies(tmp_path, monkeypatch, place):
    checkout = tmp_path / "checkout"
    monkeypatch.setattr(command_line, "HERE", checkout)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(ValueError, match="said so"):
        command_line.run_script(module_at((checkout / place).resolve()).fail)


def test_a_fault_within_a_line_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    (tmp_path / "ours.py").write_text("def fail():\n    int('seven')\n")
    spec = importlib.util.spec_from_file_location("ours", tmp_path / "ours.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match="seven"):
        command_line.run_script(module.fail)
