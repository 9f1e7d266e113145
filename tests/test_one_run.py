"""Two runs in one folder: the second is refused by name and writes nothing, and a crash frees the folder."""

import errno
import json
import os
import signal
import subprocess
import sys

import cbis_tree
import pytest
from distributed_helpers import run_ranks
from helpers import ROOT, environment, wait_for

import distributed
import eval_zeroshot
import main
import main_linear
import make_tables
from beit_finetuning import run_class_finetuning
from preparation.cbis_tables import make_cbis
from runtime import one_run

HOLD = """
import sys, time
from runtime import one_run
one_run.BEAT = 0.2
if "--no-locks" in sys.argv:
    def refuse(*_):
        raise OSError(37, "no locks available")
    one_run.fcntl.flock = refuse
with one_run.one_run(sys.argv[1]):
    if "--child" in sys.argv:  # as a loader process, which outlives its parent for a while
        import multiprocessing
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        print(child.pid, flush=True)
    print("here", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold(request):
    """Start a process that holds a folder; it is there when the call returns."""
    started = []

    def start(folder, *flags):
        command = [sys.executable, "-c", HOLD, str(folder), *flags]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
        started.append(process)
        lines = []
        while not lines or lines[-1] != "here":
            lines.append(process.stdout.readline().strip())
        process.said = lines
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_the_second_is_refused_by_host_process_and_command(tmp_path, hold):
    holder = hold(tmp_path / "run", "--some-flag")
    before = sorted((tmp_path / "run").iterdir())
    with pytest.raises(one_run.FolderInUse, match=f"process {holder.pid} on .*, since 20.*--some-flag"):
        with one_run.one_run(tmp_path / "run"):
            pass
    assert sorted((tmp_path / "run").iterdir()) == before
    with one_run.one_run(tmp_path / "another"):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_a_crash_frees_the_folder_though_a_loader_process_lives_on(tmp_path, hold, number):
    holder = hold(tmp_path, "--child")
    holder.send_signal(number)
    holder.wait()
    child = int(holder.said[0])
    try:
        os.kill(child, 0)  # it is there
        with one_run.one_run(tmp_path):
            assert json.loads((tmp_path / one_run.LOCK).read_text())["process"] == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)
    assert not (tmp_path / one_run.LOCK).exists()


def test_without_locks_signs_of_life_count(tmp_path, hold, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    holder = hold(tmp_path, "--no-locks")
    monkeypatch.setattr(one_run, "BEAT", 0.2)
    monkeypatch.setattr(one_run.fcntl, "flock", refuse)
    with pytest.raises(one_run.FolderInUse, match=f"process {holder.pid} on"):
        with one_run.one_run(tmp_path):
            pass
    holder.kill()
    holder.wait()
    with one_run.one_run(tmp_path):  # no sign for three beats
        first = (tmp_path / one_run.LOCK).read_text()
        wait_for(lambda: (tmp_path / one_run.LOCK).read_text() not in (first, ""), 20, "a sign of life")
    assert not (tmp_path / one_run.LOCK).exists()


def test_a_refused_command_leaves_no_folder_that_it_made(tmp_path):
    for name in ("made", "found"):
        (tmp_path / "found").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="flags"), one_run.one_run(tmp_path / name):
            raise ValueError("flags")
    assert [path.name for path in tmp_path.iterdir()] == ["found"]


def test_a_command_that_calls_anothers_main_has_the_folder_once(tmp_path):
    with one_run.one_run(tmp_path):
        with one_run.one_run(tmp_path):
            pass
        assert (tmp_path / one_run.LOCK).exists()
    assert not (tmp_path / one_run.LOCK).exists()


def refused_together(rank, world, folder):
    with pytest.raises(one_run.FolderInUse, match="is in use by process"):
        with one_run.one_run(folder, distributed.Processes(rank, world)):
            raise AssertionError("entered")


def test_all_ranks_are_refused(tmp_path, hold):
    hold(tmp_path)
    run_ranks(refused_together, 2, tmp_path)


def test_every_command_that_writes_a_run_is_refused_and_writes_nothing(tmp_path, hold):
    run, cbis, rows = tmp_path / "run", tmp_path / "cbis", tmp_path / "rows.json"
    hold(run)
    cbis_tree.make_small_cbis(cbis)
    make_cbis(cbis)
    rows.write_text(json.dumps({"rows": [{"name": "untrained"}]}))
    commands = {
        main.main: ["--root", str(tmp_path), "--output-dir"],
        main_linear.main: ["--dataset", "digits", "--output-dir"],
        eval_zeroshot.main: ["--resume", "absent.pt", "--output-dir"],
        run_class_finetuning.main: ["--data_set", "digits", "--finetune", "absent.pt", "--output_dir"],
        make_tables.main: ["--rows", str(rows), "--cbis", str(cbis), "--output-dir"],
    }
    before = {path: path.read_bytes() for path in run.rglob("*")}
    for command, flags in commands.items():
        with pytest.raises(one_run.FolderInUse, match="is in use by process"):
            command([*flags, str(run)])
        assert {path: path.read_bytes() for path in run.rglob("*")} == before


PARSERS = {"training": main, "linear": main_linear, "finetuned": run_class_finetuning}


@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize("theirs", PARSERS)
def test_another_kind_of_run_gets_a_folder_of_its_own_inside(tmp_path, monkeypatch, capsys, kind, theirs):
    """All kinds have ./ by default; the command writes where the first statement under its lock is told to."""

    def stop(folder, *_):
        raise RuntimeError(f"would write to {folder}")

    settings = json.dumps({"args": vars(PARSERS[theirs].get_args_parser().parse_args([]))}, default=str)
    (tmp_path / "settings.json").write_text(settings)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PARSERS[kind], "one_run", stop)
    for _ in range(2):  # the second time it finds its own
        expected = "." if kind == theirs else kind
        with pytest.raises(RuntimeError, match=rf"would write to {expected}/?$"):
            PARSERS[kind].main([])
        assert ("stays as it is" in capsys.readouterr().out) == (kind != theirs)
        (tmp_path / kind).mkdir(exist_ok=True)
        own = vars(PARSERS[kind].get_args_parser().parse_args([]))
        (tmp_path / kind / "settings.json").write_text(json.dumps({"args": own}, default=str))
    assert (tmp_path / "settings.json").read_text() == settings
    (tmp_path / kind / "settings.json").write_text('{"editor": 1}')
    (tmp_path / "settings.json").write_text('{"editor": 1}')
    with pytest.raises(ValueError, match="choose another --output-dir"):
        PARSERS[kind].main([])


def test_a_longer_name_of_an_earlier_holder_does_not_show(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["\N{GRINNING FACE}" * 300])
    lock = one_run._Lock(tmp_path)
    os.close(one_run._held.pop(lock.path))  # a crash: the file stays
    monkeypatch.setattr(sys, "argv", ["main.py"])
    with one_run.one_run(tmp_path):
        assert json.loads((tmp_path / one_run.LOCK).read_text())["command"] == "main.py"
