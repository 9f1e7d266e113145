"""SIGKILL at any moment: what is killed again and again ends with the files of the unbroken run."""

import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import quick_start
import torch
from distributed_helpers import free_port
from helpers import DROPOUT, ROOT, assert_same_run, command, environment
from model_helpers import write_checkpoint
from PIL import Image
from roco_tree import make_roco

import main
from runtime import checkpoints
from runtime.integrity import read_arrays

KILLS = 24  # every third while a checkpoint is being written
EPOCHS = 40  # of three steps: more than the kills leave time for


def _rank(rank: int, port: int, argv: list[str], log: str, writing) -> None:
    """One rank of the training. Where `writing` is given, a checkpoint takes 0.1 s to write and that flag is up."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)
    )
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    torch.set_num_threads(1)
    if writing is not None:
        checkpoints.atomic_write = slow_writes(checkpoints.atomic_write, writing)
    main.main(argv)


def slow_writes(atomic_write, writing):
    def slow_write(path, write):
        def in_parts(file):
            whole = io.BytesIO()
            write(whole)
            data = whole.getvalue()
            writing.value = Path(path).name.startswith("checkpoint_step")
            for part in range(10):
                file.write(data[part * len(data) // 10 : (part + 1) * len(data) // 10])
                file.flush()
                time.sleep(0.01)
            writing.value = 0

        atomic_write(path, in_parts)

    return slow_write


class Training:
    """Starts and kills the two ranks."""

    def __init__(self, argv: list[str], output_dir: Path):
        self.argv, self.output_dir, self.ranks = argv, output_dir, []

    def log(self, rank: int) -> str:
        return f"{self.output_dir}.rank{rank}.log"

    def ended(self, when: str) -> str:
        lines = [line for rank in range(2) for line in Path(self.log(rank)).read_text().splitlines()[-20:]]
        return "\n".join([f"the training ended {when}", *lines])

    def start(self, slow: bool = True) -> None:
        self.writing = quick_start.CONTEXT.Value("i", 0, lock=False) if slow else None
        port = free_port()
        self.ranks = [
            quick_start.process(_rank, (rank, port, self.argv, self.log(rank), self.writing), daemon=True)
            for rank in range(2)
        ]

    def wait_until(self, condition, what: str) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert all(p.is_alive() for p in self.ranks), self.ended(f"before {what}")
            assert time.monotonic() < end, f"a minute without {what}"
            time.sleep(0.002)

    def kill(self, victims: list[int]) -> None:
        """Kill these ranks; the other, if there is one, ends by itself."""
        for rank in victims:
            os.kill(self.ranks[rank].pid, signal.SIGKILL)
        for process in self.ranks:
            process.join(60)
            assert process.exitcode is not None, "a rank outlived its peer by a minute"
        assert all(self.ranks[rank].exitcode == -signal.SIGKILL for rank in victims)

    def finish(self) -> None:
        for process in self.ranks:
            process.join(300)
            assert process.exitcode == 0, self.ended("badly")

    def steps(self) -> int:
        """Of the newest checkpoint; 0 without one."""
        names = [p.stem for p in self.output_dir.glob("checkpoint_step*.pt")]
        return max((int(name.removeprefix("checkpoint_step")) for name in names), default=0)


def kill_once(training: Training, number: int, rng: random.Random) -> bool:
    """Let the training run for a while and kill it; whether that left a torn file."""
    before = training.steps()
    if number % 3 == 0:
        victims = rng.choice([[0], [0, 1]])
        training.wait_until(lambda: training.steps() > before, "a checkpoint")
        training.wait_until(lambda: training.writing.value, "a checkpoint being written")
        time.sleep(rng.uniform(0, 0.08))
    else:
        steps = rng.randint(0, 3)  # 0: while it starts, reads the last checkpoint, or makes its first steps
        # A rank whose peer dies before they have met waits for --dist-timeout; ending it is the launcher's work.
        victims = rng.choice([[0], [1], [0, 1]]) if steps else [0, 1]
        training.wait_until(lambda: training.steps() >= before + steps, "another step")
        time.sleep(rng.uniform(0, 0.3 if steps else 2))
    training.kill(victims)
    return any(training.output_dir.glob(".checkpoint_step*.tmp"))


@pytest.mark.slow
def test_killed_at_random_moments_it_resumes_to_the_unbroken_run(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # The fork server preloads this file before it is told of sys.path.
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    roco = make_roco(tmp_path / "roco")
    argv = [*DROPOUT, "--batch-size", "4", "--epochs", str(EPOCHS), "--eval-freq", str(EPOCHS), "--gpu", "-1"]
    unbroken = Training(command(roco, tmp_path / "unbroken", *argv), tmp_path / "unbroken")
    unbroken.start(slow=False)
    unbroken.finish()

    out = tmp_path / "killed"
    training = Training(command(roco, out, *argv, "--save-every-minutes", "0"), out)
    rng, torn, reached = random.Random(0), 0, [0]
    for number in range(KILLS):
        training.start()
        torn += kill_once(training, number, rng)
        reached.append(training.steps())
        if reached[-1]:  # the newest checkpoint can be read, whatever the moment
            assert checkpoints.find_training_checkpoint(out)["step"] == reached[-1]
    print(f"{KILLS} kills, {torn} of them in the middle of a write; steps reached: {reached}")
    assert torn >= 5
    assert reached == sorted(reached) and len(set(reached)) > KILLS // 2  # progress, and never backwards
    assert reached[-1] < 3 * EPOCHS

    training.start(slow=False)
    training.finish()
    assert_same_run(tmp_path / "unbroken", out)
    assert not list(out.glob(".*.tmp"))


def test_end_during_validation_costs_nothing_of_the_epoch(tmp_path, monkeypatch):
    """Validation may take longer than the warning before a time limit."""
    roco = make_roco(tmp_path / "roco")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert "stopped_by" not in main.main(command(roco, whole, *DROPOUT))

    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(main, "validate", killed)
        with pytest.raises(Killed):
            main.main(command(roco, broken, *DROPOUT))
    state = checkpoints.load_checkpoint(broken / "checkpoint.pt")
    assert (state["epoch"], state["step_in_epoch"]) == (0, 3)
    main.main(command(roco, broken, *DROPOUT))
    assert_same_run(whole, broken)


def images(folder: Path, n: int = 150) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (300, 300), "uint8")).save(folder / f"{i}.jpg")


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shrink", "unpack", "embed"])
def test_what_makes_files_ends_as_if_it_had_not_been_killed(tmp_path, name):
    """SIGKILL to the whole group and to the parent alone, in turn, at random moments of its start and of its work."""
    source, rng = tmp_path / "source", random.Random(name)
    images(source / "train_images" / "train")
    (source / "train_captions.csv").write_text("ID,Caption\n" + "".join(f"{i},caption {i}\n" for i in range(150)))
    model = write_checkpoint(tmp_path / "checkpoint.pt", "vit")

    def argv(output: Path) -> list[str]:
        if name == "embed":
            return [
                "predict.py",
                "embed",
                str(model),
                str(source),
                "--output",
                f"{output}/bank.npz",
                "--batch-size",
                "4",
            ]
        root = "--source" if name == "unpack" else "--root"
        return ["make_dataset.py", name, root, str(source), "--output", str(output), "--short-side", "60", "-j", "2"]

    def start(output: Path) -> subprocess.Popen:
        output.mkdir(exist_ok=True)
        command = [sys.executable, *argv(output)]
        return subprocess.Popen(command, cwd=ROOT, env=environment(), process_group=0, stderr=subprocess.PIPE)

    began = time.monotonic()
    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read().decode()
    seconds, kills = time.monotonic() - began, 0
    for _ in range(20):
        began, job = time.monotonic(), start(tmp_path / "killed")
        try:
            assert job.wait(rng.uniform(0.3, 1) * seconds) == 0, job.stderr.read().decode()
        except subprocess.TimeoutExpired:
            (os.killpg if kills % 2 else os.kill)(job.pid, signal.SIGKILL)
            kills += 1
        else:  # faster than before, when another test took its core: from the start again
            seconds = min(seconds, time.monotonic() - began)
            shutil.rmtree(tmp_path / "killed")
        job.wait()
        for path in (tmp_path / "killed").rglob("*.*"):  # whatever the moment, no half of a file has its name
            if path.suffix == ".jpg":
                Image.open(path).load()
            elif path.suffix == ".npz":
                read_arrays(path)
        if kills == 4:
            break
    assert kills == 4
    last = start(tmp_path / "killed")
    assert last.wait() == 0, last.stderr.read().decode()
    one, other = (written(tmp_path / folder) for folder in ("whole", "killed"))
    records = [key for key in one if key.startswith("parts/")]  # count what was there already
    assert [key for key in one if key not in records and other.get(key) != one[key]] == []
    assert all(key.endswith(".tmp") for key in set(other) - set(one))  # of the last minute
