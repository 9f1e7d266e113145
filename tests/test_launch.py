"""Starting main.py the ways users do: plainly, also inside a Slurm shell, and with torchrun; and how ranks end."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from distributed_helpers import free_port, run_ranks
from helpers import DROPOUT, ROOT, assert_same_run, command, environment, wait_for
from roco_tree import make_roco

import distributed
import main
from runtime import checkpoints


@pytest.fixture(scope="module")
def roco(tmp_path_factory):
    return make_roco(tmp_path_factory.mktemp("roco"))


def ranks_pids(marker: str) -> dict[int, int]:
    """Process ids by rank of the main.py processes whose command line holds `marker`."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().split(b"\0")
            if marker.encode() in line and b"main.py" in [Path(os.fsdecode(a)).name.encode() for a in line[1:3]]:
                variables = dict(v.split(b"=", 1) for v in (folder / "environ").read_bytes().split(b"\0") if b"=" in v)
                found[int(variables[b"RANK"])] = int(folder.name)
        except (OSError, KeyError):
            continue  # it has ended, or is torchrun itself
    return found


def steps_saved(output_dir: Path) -> int:
    return max((int(p.stem.removeprefix("checkpoint_step")) for p in output_dir.glob("checkpoint_step*.pt")), default=0)


def test_plain_python_inside_a_slurm_shell_is_one_process(roco, tmp_path):
    """srun --pty bash leaves these behind; the published code took them for a launcher and waited for peers."""
    shell = dict(
        SLURM_JOB_ID="77",
        SLURM_PROCID="0",
        SLURM_NTASKS="8",
        SLURM_LOCALID="0",
        SLURM_NNODES="2",
        SLURM_JOB_NODELIST="n[1-2]",
        SLURM_NODEID="0",
        SLURM_STEP_ID="0",
    )
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", *command(roco, tmp_path, "--epochs", "1", "--gpu", "-1")],
        env=environment(**shell),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "settings.json").read_text())["derived"]["world_size"] == 1


def _train_rank(rank, world, argv):
    main.main(argv)


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_worker_and_resumes_by_itself(roco, tmp_path):
    argv = [
        *DROPOUT,
        "--batch-size",
        "4",
        "--epochs",
        "12",
        "--eval-freq",
        "12",
        "--save-every-minutes",
        "0",
        "--gpu",
        "-1",
    ]
    run_ranks(_train_rank, 2, command(roco, tmp_path / "unbroken", *argv))
    out = tmp_path / "elastic"
    # With a port torchrun keeps its store over the restart, and the first start's addresses in it.
    torchrun = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--max-restarts=1",
            f"--master-port={free_port()}",
            ROOT / "main.py",
            *command(roco, out, *argv),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: steps_saved(out) >= 4 or torchrun.poll() is not None, 120, "training")
        os.kill(ranks_pids(str(out))[1], signal.SIGKILL)
        output, _ = torchrun.communicate(timeout=180)
    finally:
        torchrun.terminate()
    assert torchrun.returncode == 0, output
    log = (out / "log.txt").read_text()
    assert "rank 0 has lost another rank" in log and re.search(r"resuming from .*checkpoint_step\d+\.pt", log)
    assert_same_run(tmp_path / "unbroken", out)


@pytest.mark.slow
def test_torchrun_asked_to_end_leaves_a_checkpoint(roco, tmp_path):
    argv = ["--batch-size", "4", "--epochs", "400", "--gpu", "-1", "--save-every-minutes", "1000"]
    torchrun = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            ROOT / "main.py",
            *command(roco, tmp_path, *argv),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: steps_saved(tmp_path) >= 3 or torchrun.poll() is not None, 120, "an epoch")
        torchrun.send_signal(signal.SIGTERM)
        output, _ = torchrun.communicate(timeout=60)
    finally:
        torchrun.kill()
    stopped = re.search(
        r"stopped by SIGTERM: checkpoint written in epoch (\d+), step (\d+)", (tmp_path / "log.txt").read_text()
    )
    assert stopped, output
    state = checkpoints.load_checkpoint(tmp_path / "checkpoint.pt")
    assert (state["epoch"] + 1, state["step_in_epoch"]) == tuple(map(int, stopped.groups()))


# --- the end of one rank is the end of all ---------------------------------------------------------------------------


def _rank_of_three(rank, port, folder, what):
    """Rank 1 fails as `what` says while the others wait for it in a collective; each writes down how it ended."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="3")
    limit = ["--gpu", "-1", "--dist-timeout", "20"]  # s; three ranks on a busy machine may need ten to meet
    processes = distributed.init_distributed(main.get_args_parser().parse_args(limit))
    said = []
    logging.getLogger("medslip").handlers = [handler := logging.Handler()]
    handler.emit = lambda record: said.append(record.getMessage())
    try:
        with distributed.ending_together(processes):
            distributed.gather_objects(processes, "all are there")
            if rank == 1 and what == "raises":
                raise ValueError("image 7.jpg is broken")
            if rank == 1 and what == "hangs":
                time.sleep(26)
            if rank == 1 and what == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            distributed.gather_objects(processes, "one is missing")
            ended = "went on"
    except (ValueError, SystemExit) as error:
        ended = f"{type(error).__name__}: {error}"
    Path(folder, f"rank{rank}").write_text("\n".join([ended, *said]))


@pytest.mark.parametrize("what", ["raises", "is killed", pytest.param("hangs", marks=pytest.mark.slow)])
def test_one_rank_failing_ends_all_with_one_message(tmp_path, what):
    ranks = mp.start_processes(
        _rank_of_three, (free_port(), str(tmp_path), what), nprocs=3, join=False, start_method="fork"
    ).processes
    for process in ranks:
        process.join(60)
    assert [p.exitcode for p in ranks] == [0, -signal.SIGKILL if what == "is killed" else 0, 0]
    ended, said = (tmp_path / "rank0").read_text().splitlines()
    assert ended == "SystemExit: 1" and (tmp_path / "rank2").read_text() == "SystemExit: 1"
    message = said.removeprefix("all ranks end: ")
    if what == "raises":
        assert message == "rank 1 failed: ValueError: image 7.jpg is broken"
        assert (tmp_path / "rank1").read_text().startswith("ValueError: image 7.jpg is broken")
    else:
        assert re.match("rank [02] has lost another rank", message)
