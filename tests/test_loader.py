"""Loader processes: whom signals reach, what is said of one that dies, and that a stopped run loses nothing."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DROPOUT, ROOT, assert_same_run, command, environment, wait_for
from model_helpers import write_checkpoint
from PIL import Image
from quick_start import Script
from roco_tree import make_roco
from torch.utils.data import Dataset

import distributed
import main
import utils
from inputs import loader
from inputs.images import UnreadableImage
from runtime import checkpoints, signals

CPU = torch.device("cpu")


class Slow(Dataset):
    def __init__(self, n: int, seconds: float, corrupt: int = -1):
        self.n, self.seconds, self.corrupt = n, seconds, corrupt

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i == self.corrupt:
            raise UnreadableImage(f"cannot decode the image {i}.jpg")
        time.sleep(self.seconds)
        return i


EARLIER: set[int] = set()  # children that tests before have left, such as a persistent loader not yet collected


@pytest.fixture(autouse=True)
def children_of_others():
    EARLIER.clear()
    EARLIER.update(process.pid for process in multiprocessing.active_children())


def workers() -> list[int]:
    """Process ids of the loader processes that this test has started."""
    pids = [process.pid for process in multiprocessing.active_children() if process.pid not in EARLIER]
    assert pids
    return pids


def test_workers_leave_signals_to_their_parent():
    source = loader.make_loader(Slow(12, 0.05), workers=2, device=CPU)
    seen, hit = [], 0
    with signals.StopRequest() as stop:
        for batch in loader.batches(source):
            seen += batch.tolist()
            for pid in workers():
                for number in signals.SIGNALS:
                    os.kill(pid, number)
                    hit += 1
        assert not stop.name and hit >= 2 * len(signals.SIGNALS)
        os.kill(os.getpid(), signal.SIGTERM)  # and the parent still hears its own
        assert stop.name == "SIGTERM"
    assert seen == list(range(12))


def test_a_worker_that_dies_is_named():
    source = loader.make_loader(Slow(400, 0.05), workers=2, device=CPU)
    with pytest.raises(loader.LoaderFailed, match=r"a loader process has died: \d+ by SIGKILL.*fewer --workers"):
        for i, _ in enumerate(loader.batches(source)):
            if i == 2:
                os.kill(workers()[0], signal.SIGKILL)


@pytest.mark.slow
def test_no_batch_is_waited_for_without_limit(monkeypatch):
    monkeypatch.setattr(loader, "POLL_SECONDS", 1)
    source = loader.make_loader(Slow(2, 60), workers=1, device=CPU)
    with pytest.raises(loader.LoaderFailed, match=r"no batch came for [123] s from 1 loader processes"):
        next(loader.batches(source, limit=0.5))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_about_data_comes_as_it_is(workers):
    source = loader.make_loader(Slow(6, 0, corrupt=3), workers=workers, device=CPU)
    with pytest.raises(UnreadableImage, match=r"^cannot decode the image 3.jpg$"):
        list(loader.batches(source))


def test_full_shared_memory_is_named(monkeypatch, tmp_path):
    usage = type("Usage", (), {"total": 64 * 2**20, "free": 2**10, "used": 0})
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: usage)
    source = loader.make_loader(Slow(40, 0.05), workers=1, device=CPU)
    with pytest.raises(loader.LoaderFailed, match=r"shared memory is full: /dev/shm has 0.0 of 64.0 MiB.*--workers 0"):
        for _ in loader.batches(source):
            os.kill(workers()[0], signal.SIGKILL)


def test_workers_never_outnumber_the_cores(monkeypatch):
    monkeypatch.setattr(distributed, "cores", lambda: 2)
    assert loader.loader_processes(10, distributed.Processes()) == 2
    assert loader.loader_processes(1, distributed.Processes()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_whose_worker_dies_keeps_the_last_whole_step(tmp_path, monkeypatch):
    """The checkpoint is that of an unbroken run at this step, and the run continues to the same end."""
    roco = make_roco(tmp_path / "roco")
    frequent = ("--batch-size", "4", "--save-every-minutes", "1000")
    main.main(command(roco, tmp_path / "whole", *DROPOUT, *frequent))
    batches, read = loader.batches, []

    def dying(source, **options):
        for batch in batches(source, **options):
            training = hasattr(source.batch_sampler, "set_epoch")
            read.extend([1] * training)
            if training and len(read) == 9:  # the third of the second epoch
                raise loader.LoaderFailed("a loader process has died: 1 by SIGKILL")
            yield batch

    with monkeypatch.context() as m:
        m.setattr(loader, "batches", dying)
        with pytest.raises(loader.LoaderFailed, match="has died"):
            main.main(command(roco, tmp_path / "parts", *DROPOUT, *frequent))
    state = checkpoints.load_checkpoint(tmp_path / "parts" / "checkpoint.pt")
    assert (state["epoch"], state["step_in_epoch"]) == (1, 2)
    assert "checkpoint of the last whole step written" in (tmp_path / "parts" / "log.txt").read_text()
    main.main(command(roco, tmp_path / "parts", *DROPOUT, *frequent))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def started(argv: list, said: Path):
    """A command in a process group of its own, its output in a file; torchrun as it is, our scripts quickly."""
    with open(said, "w") as file:
        options = {"env": environment(), "stdout": file, "stderr": subprocess.STDOUT, "process_group": 0}
        return (subprocess.Popen if argv[0] == "-m" else Script)([sys.executable, *map(str, argv)], **options)


def finished(argv: list, said: Path) -> None:
    assert started(argv, said).wait(300) == 0, said.read_text()


def signalled(argv: list, number: int, seconds: float, ready, said: Path) -> int:
    """The exit code of a command whose whole group gets a signal, so many seconds after it is ready."""
    process = started(argv, said)
    end = time.monotonic() + 120
    while process.poll() is None and not ready() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(seconds)
    if process.poll() is None:
        os.killpg(process.pid, number)
    process.wait(120)
    output = said.read_text()
    if argv[0] != "-m":  # torchrun has exit codes of its own
        assert process.returncode in (0, 128 + number), output
    assert "Traceback" not in output.split("stopped by")[0], output
    return process.returncode


def lines_of(log) -> int:
    return log.read_text().count("\nepoch ") if log.exists() else 0


def more_lines(log, before: int) -> bool:
    return lines_of(log) > before


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [[], ["-m", "torch.distributed.run", "--nproc_per_node=2"]], ids=["alone", "torchrun"]
)
def test_signals_to_the_whole_group_lose_nothing(tmp_path, launcher):
    """Random signals at random moments, 20 in a row: the run goes on from its last step each time."""
    roco = make_roco(tmp_path / "roco", train=64)
    common = [*DROPOUT, "--batch-size", "4", "--epochs", "30", "-j", "2", "--eval-freq", "100", "--gpu", "-1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def argv(folder) -> list:
        return [*launcher, ROOT / "main.py", *command(roco, folder, *common)]

    finished(argv(whole), tmp_path / "said")
    rng, log, stopped = random.Random(0), parts / "log.txt", 0
    for _ in range(20 if not launcher else 6):
        before = lines_of(log)
        number = rng.choice(signals.SIGNALS if not launcher else (signal.SIGTERM, signal.SIGINT))
        code = signalled(argv(parts), number, rng.random() * 0.5, partial(more_lines, log, before), tmp_path / "said")
        stopped += code != 0
        if "this run is finished" in log.read_text():
            break
    assert stopped >= (10 if not launcher else 3)
    finished(argv(parts), tmp_path / "said")
    assert_same_run(whole, parts)
    steps = [line.split("[")[1].split("/")[0] for line in log.read_text().splitlines() if line.startswith("epoch ")]
    assert len(steps) <= 30 * (64 // 4 // (2 if launcher else 1)) + stopped + 1  # no step was done twice


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGKILL])
@pytest.mark.parametrize("passed_on", [True, False], ids=["handled", "not handled"])
def test_a_signal_to_torchrun_alone_loses_nothing(tmp_path, number, passed_on):
    """torchrun dies of one that it is not told to handle; its ranks checkpoint all the same, and none is left."""
    handled = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"] * passed_on
    roco, out = make_roco(tmp_path / "roco", train=64), tmp_path / "run"
    extra = [*DROPOUT, "--batch-size", "4", "--epochs", "30", "-j", "0", "--eval-freq", "100", "--gpu", "-1"]
    argv = [sys.executable, *TORCHRUN, *handled, str(ROOT / "main.py"), *command(roco, out, *extra)]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(argv, env=environment(), stdout=said, stderr=subprocess.STDOUT)
        wait_for(lambda: lines_of(out / "log.txt"), 120, "a step")
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        process.send_signal(number)
        code = process.wait(60)
    wait_for(lambda: not any(Path(f"/proc/{rank}/cmdline").exists() for rank in ranks), 60, "the ranks' end")
    assert len(ranks) == 2 and code == (1 if passed_on and number != signal.SIGKILL else -number)
    assert re.search(r"stopped by SIG(TERM|USR1|USR2): checkpoint written", (out / "log.txt").read_text())
    assert checkpoints.load_checkpoint(out / "checkpoint.pt")["step"] > 0


@pytest.mark.slow
def test_a_terminal_that_is_closed_loses_nothing(tmp_path):
    roco, out = make_roco(tmp_path / "roco", train=64), tmp_path / "run"
    extra = [*DROPOUT, "--batch-size", "4", "--epochs", "30", "-j", "2", "--eval-freq", "100", "--gpu", "-1"]
    argv = [sys.executable, str(ROOT / "main.py"), *command(roco, out, *extra)]
    pid, terminal = os.forkpty()
    if pid == 0:
        os.execvpe(argv[0], argv, environment())
    os.set_blocking(terminal, False)

    def started() -> bool:
        with suppress(BlockingIOError):
            os.read(terminal, 1 << 16)
        return lines_of(out / "log.txt") > 0

    wait_for(started, 120, "a step")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert "stopped by SIGHUP: checkpoint written" in (out / "log.txt").read_text()
    assert checkpoints.load_checkpoint(out / "checkpoint.pt")["step"] > 0


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """Arguments of a linear run on drawn images by its output folder; the unbroken run's."""
    folder, rng = tmp_path_factory.mktemp("linear"), np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 4)):
        for label in ("a", "b"):
            (folder / "set" / split / label).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(
                    folder / f"set/{split}/{label}/{i}.png"
                )
    utils.write_json(
        folder / "catalog.json",
        {"mine": {"path": str(folder / "set"), "type": "imagefolder", "train": "train", "test": "val"}},
    )
    checkpoint = write_checkpoint(folder / "weights.pt", "vit")

    def argv(output: Path) -> list:
        common = ["--catalog", folder / "catalog.json", "--dataset", "mine", "--pretrained", checkpoint]
        run = ["--epochs", "60", "--eval-freq", "100", "-b", "4", "-p", "1", "-j", "2", "--gpu", "-1"]
        return [ROOT / "main_linear.py", *common, *run, "--output-dir", output]

    finished(argv(folder / "whole"), folder / "said")
    return argv, folder / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("number", signals.SIGNALS)
def test_signals_to_the_group_of_a_linear_run_lose_nothing(tmp_path, linear, number):
    argv, whole = linear
    parts, said = tmp_path / "parts", tmp_path / "said"
    assert signalled(argv(parts), number, 0.2, (parts / "log.jsonl").exists, said) == 128 + number
    finished(argv(parts), said)
    first, second = (
        checkpoints.load_checkpoint(folder / "linear_checkpoint.pt")["state_dict"] for folder in (whole, parts)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
