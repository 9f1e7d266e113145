"""The Slurm launcher: its settings and decisions anywhere, its jobs on a real Slurm of two nodes (tests/slurm/up).

Without Slurm on the machine the latter are skipped; REQUIRE_SLURM=1 installs it and makes a skip a failure.
"""

import contextlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import cbis_tree
import helpers
import pytest
import torch
from distributed_helpers import run_ranks
from helpers import DROPOUT, TINY, assert_same_run, weights
from model_helpers import write_checkpoint
from roco_tree import make_roco
from submitit.core.utils import UncompletedJobError

import distributed
import main
import make_tables
import run_with_submitit
import run_with_submitit_linear
from beit_finetuning import run_class_finetuning
from evaluation.predictions import Predictions
from preparation import cbis_tables
from reporting import steps
from runtime import checkpoints
from synthetic import world

HERE = Path(__file__).parent / "slurm"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")


wait_for = partial(helpers.wait_for, every=0.2)  # each look asks Slurm


# --- anywhere --------------------------------------------------------------------------------------------------------


def dry_run(capsys, *argv, launcher=run_with_submitit) -> tuple[set[str], list[str], str]:
    """(#SBATCH options, the scripts' command lines, the whole text) of --dry-run."""
    assert launcher.main([*argv, "--dry-run"]) == []
    text = capsys.readouterr().out
    lines = text.splitlines()
    return (
        {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")},
        [line[2:] for line in lines if line.startswith("# main")],
        text,
    )


def test_slurm_published_command_asks_for_the_published_job(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options, commands, text = dry_run(
        capsys, "--root", "/path/to/yfcc100m", "--model", "SLIP_VITB16", "--lr", "3e-3", "--wd", "0.1"
    )
    assert {
        "nodes=8",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "time=2800",
        "mem=320GB",
        "cpus-per-task=10",
        "signal=USR2@120",
        "requeue",
    } <= options
    assert not any(o.startswith(("partition", "account", "constraint", "qos", "comment", "array")) for o in options)
    folder = f"{tmp_path}/jobs/%j"
    assert commands == [
        f"main.py --root /path/to/yfcc100m --model SLIP_VITB16 --lr 3e-3 --wd 0.1 --output-dir {folder}"
    ]
    assert "--kill-on-bad-exit=1" in text and "--cpus-per-task=10 " in text.split("srun")[1]
    assert not (tmp_path / "jobs").exists()


def test_slurm_flags_reach_sbatch_and_the_others_the_script(capsys):
    options, commands, _ = dry_run(
        capsys,
        "--ngpus",
        "2",
        "--nodes",
        "3",
        "--job_dir",
        "/shared/%j/x",
        "--partition",
        "learn",
        "--account",
        "me",
        "--qos",
        "q",
        "--constraint",
        "a100",
        "--use_volta32",
        "--comment",
        "a deadline",
        "--mem",
        "20",
        "--cpus",
        "5",
        "--seeds",
        "1",
        "2",
        "--override",
        "text_layers=2",
        "embed_dim=16",
        "--gpu",
        "-1",
        "--signal_delay",
        "60",
        "--output-dir",
        "/runs/slip",
        "-j",
        "4",
    )
    assert {
        "nodes=3",
        "ntasks-per-node=2",
        "mem=40GB",
        "cpus-per-task=5",
        "partition=learn",
        "account=me",
        "qos=q",
        "constraint='volta32gb&a100'",
        "comment='a deadline'",
        "array=0-1%2",
        "signal=USR2@60",
        "output=/shared/%A_%a/x/%A_%a_0_log.out",
    } <= options
    assert not any(o.startswith("gpus") for o in options)  # --gpu -1: the job computes on processors
    rest = "--override text_layers=2 embed_dim=16 --gpu -1 --output-dir /runs/slip -j 4"
    assert commands == [f"main.py {rest} --seed {seed} --output-dir /runs/slip/seed{seed}" for seed in (1, 2)]


def test_slurm_linear_launcher_has_its_own_defaults(capsys):
    options, commands, _ = dry_run(
        capsys, "--pretrained", "checkpoint.pt", "--arch", "vit_base_patch16_224", launcher=run_with_submitit_linear
    )
    assert {"nodes=1", "ntasks-per-node=8", "time=1800"} <= options
    assert commands[0].startswith("main_linear.py --pretrained checkpoint.pt --arch vit_base_patch16_224 --output-dir")


@pytest.mark.parametrize("wrong", [["--learning-rat", "1"], ["--model", "SLIP_VITB17"], ["--part", "high"]])
def test_slurm_wrong_flags_are_refused_before_the_queue(wrong, capsys):
    with pytest.raises(SystemExit):
        run_with_submitit.main([*wrong, "--dry-run"])
    said = capsys.readouterr().err
    assert wrong[0] in said and said.count("\n") == 1


def fake_env(**changes):
    values = dict(
        USR_SIG="USR2",
        cluster="slurm",
        job_id="12_3",
        raw_job_id="15",
        global_rank=5,
        local_rank=1,
        num_tasks=8,
        num_nodes=2,
        hostnames=["gpu07", "gpu09"],
    )
    return SimpleNamespace(**values | changes)


def test_slurm_rank_environment_is_what_torchrun_would_set():
    env = run_with_submitit.rank_environment(fake_env())
    port = int(env.pop("MASTER_PORT"))
    assert 1024 < port < 32768  # neither privileged nor one that Linux hands out
    assert env == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu07"}
    assert int(run_with_submitit.rank_environment(fake_env(raw_job_id="16"))["MASTER_PORT"]) != port


@pytest.mark.parametrize(
    ("shown", "signal_name", "goes_on"),
    [
        ("JobState=RUNNING PreemptTime=None", "SIGUSR2", True),  # the warning before the time limit
        ("JobState=RUNNING PreemptTime=2026-01-01T00:00:00", "SIGUSR2", True),
        (
            "JobState=RUNNING PreemptTime=2026-01-01T00:00:00",
            "SIGTERM",
            True,
        ),  # clusters that preempt without the warning
        ("JobState=RUNNING PreemptTime=None", "SIGTERM", False),  # somebody asked it to stop
        ("JobState=CANCELLED PreemptTime=None", "SIGTERM", False),  # requeueing would bring it back
        ("JobState=COMPLETING PreemptTime=None", "SIGUSR2", False),
        ("JobState=PENDING PreemptTime=None", "SIGTERM", False),  # requeued by Slurm or an administrator
    ],
)
def test_slurm_decides_on_requeueing(tmp_path, monkeypatch, shown, signal_name, goes_on):
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\n[ "$4" = 12_3 ] && echo "JobId=12 {shown} Reason=None"\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    decision, why = run_with_submitit.after_stop(fake_env(), signal_name)
    assert decision == goes_on and why


def test_slurm_plain_command_inside_an_allocation_stays_one_process(tmp_path, monkeypatch):
    for key, value in dict(
        SLURM_JOB_ID="7",
        SLURM_PROCID="1",
        SLURM_NTASKS="4",
        SLURM_LOCALID="1",
        SLURM_NNODES="2",
        SLURM_JOB_NODELIST="n[1-2]",
        SLURM_STEP_ID="0",
    ).items():
        monkeypatch.setenv(key, value)
    args = main.get_args_parser().parse_args(["--gpu", "-1", "--precision", "fp32"])
    assert distributed.init_distributed(args) == distributed.Processes(0, 1, 0, torch.device("cpu"))


def test_slurm_warning_is_heeded_by_the_rank_and_not_by_its_loader_workers():
    """Slurm signals every process of a step; a forked worker would store and requeue the job a second time."""
    heeded = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heeded.append(os.getpid()))
    try:
        requeue = run_with_submitit.guard_requeue(fake_env())
        worker = multiprocessing.get_context("fork").Process(
            target=lambda: (os.kill(os.getpid(), signal.SIGUSR2), os._exit(len(heeded)))
        )
        worker.start()
        worker.join(30)
        assert worker.exitcode == 0
        os.kill(os.getpid(), signal.SIGUSR2)
        assert heeded == [os.getpid()]
        requeue()
        assert len(heeded) == 2 and signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.fixture
def local_stub(tmp_path, monkeypatch):
    """Starts a local job of two ranks in tmp_path; its outcome, when it comes. Nothing of it is left afterwards."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.syspath_prepend(HERE)

    def start(*argv) -> Future:
        argv = ["--local", "--ngpus", "2", "--gpu", "-1", "--job_dir", str(tmp_path), *argv]
        outcome = Future()

        def run():
            try:
                outcome.set_result(run_with_submitit.submit("stub", argv))
            except Exception as error:
                outcome.set_exception(error)

        Thread(target=run, daemon=True).start()
        return outcome

    yield start
    for pid in [p for controller in controllers(tmp_path) for p in [*children(controller), controller]]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def controllers(folder: Path) -> list[int]:
    """A local job's id is the process id of what looks after its ranks."""
    return [int(path.name.split("_")[0]) for path in folder.glob("*_submitted.pkl")]


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(p) for p in path.read_text().split()] if path.exists() else []


def signal_ranks(job_dir: Path, output_dir: Path, number: int) -> None:
    """Signal both ranks once they wait for it."""
    wait_for(lambda: (output_dir / "ready0").exists() and (output_dir / "ready1").exists(), 60, "two ranks")
    for pid in children(controllers(job_dir)[0]):
        os.kill(pid, number)


def test_slurm_local_job_stopped_by_the_warning_starts_again(tmp_path, local_stub):
    job = local_stub("--wait", "--seeds", "3")
    signal_ranks(tmp_path, tmp_path / "seed3", signal.SIGUSR2)
    (job,) = job.result(60)
    assert [(r["RANK"], r["LOCAL_RANK"], r["WORLD_SIZE"], r["seed"]) for r in job.results()] == [
        ("0", "0", "2", 3),
        ("1", "1", "2", 3),
    ]  # and not the error that rank 1 left in the first start
    assert "continues from the checkpoint" in (tmp_path / "seed3" / "log.txt").read_text()


def test_slurm_local_job_asked_to_stop_stays_stopped(tmp_path, local_stub):
    job = local_stub("--wait")
    signal_ranks(tmp_path, tmp_path, signal.SIGTERM)
    with pytest.raises(UncompletedJobError, match="asked to stop by SIGTERM"):
        job.result(60)
    assert f"submitted again with --output-dir {tmp_path}" in (tmp_path / "log.txt").read_text()


# --- on a real Slurm -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Slurm of two nodes in the environment of this process, and nothing of it afterwards."""
    required = os.environ.get("REQUIRE_SLURM") == "1"
    if not required and not all(shutil.which(p, path=os.environ["PATH"] + ":/usr/sbin") for p in PROGRAMS):
        pytest.skip(f"Slurm is not installed ({', '.join(PROGRAMS)}); REQUIRE_SLURM=1 as root installs it")
    folder = Path(tempfile.mkdtemp(prefix="medslip-slurm-", dir="/tmp"))  # pytest's own folders are closed to munge
    up = subprocess.run([HERE / "up", folder], capture_output=True, text=True, timeout=600)
    try:
        if up.returncode:
            (pytest.fail if required else pytest.skip)(f"tests/slurm/up failed: {up.stderr[-2000:]}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            patch.setenv("PATH", f"{HERE / 'bin'}:{os.environ['PATH']}")
            patch.setenv("PYTHONPATH", str(HERE))
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.syspath_prepend(HERE)
            yield folder
    finally:
        if (folder / "slurm.conf").exists():
            subprocess.run([HERE / "down", folder], timeout=60, check=True)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def roco(tmp_path_factory):
    return make_roco(tmp_path_factory.mktemp("roco"))


def command(roco, *extra) -> list[str]:
    return [
        "--dataset",
        "roco",
        "--root",
        str(roco),
        "--model",
        "SLIP_VITT16",
        "-j",
        "0",
        "--lr",
        "1e-3",
        "--print-freq",
        "1",
        "--gpu",
        "-1",
        *TINY,
        *DROPOUT,
        *extra,
    ]


def submit(script: str, folder: Path, *argv):
    (job,) = run_with_submitit.submit(script, ["--job_dir", str(folder), *argv])
    return job


def shown(job) -> dict[str, str]:
    text = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job.job_id], capture_output=True, text=True, check=True
    ).stdout
    return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)


def wait_for_end(job, seconds: float) -> str:
    """The job's last state. Asked of Slurm and not of submitit: there a rank's result may come before a requeue."""
    wait_for(
        lambda: shown(job)["JobState"] in ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL"),
        seconds,
        f"an end of job {job.job_id}",
    )
    return shown(job)["JobState"]


def logged(folder: Path) -> str:
    return (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""


def logs(folder: Path) -> str:
    """Everything that a job said, shown when a test fails."""
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(folder.glob("*_log.*")))


@pytest.mark.slow
def test_slurm_gives_gpus_ranks_and_seeds(cluster, tmp_path):
    folder = tmp_path / "%j"
    jobs = run_with_submitit.submit(
        "stub",
        ["--ngpus", "2", "--nodes", "2", "--seeds", "5", "6", "--mem", "1", "--cpus", "1", "--job_dir", str(folder)],
    )
    for job, seed in zip(jobs, (5, 6), strict=True):
        assert wait_for_end(job, 60) == "COMPLETED"
        ranks = job.results()
        assert [(r["RANK"], r["LOCAL_RANK"]) for r in ranks] == [("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")]
        assert all(len(r["CUDA_VISIBLE_DEVICES"].split(",")) == 2 for r in ranks)  # the local rank chooses
        assert {(r["MASTER_ADDR"], r["WORLD_SIZE"], r["seed"]) for r in ranks} == {("n1", "4", seed)}
        assert {r["output_dir"] for r in ranks} == {f"{tmp_path}/{job.job_id}/seed{seed}"}
    assert len({job.results()[0]["MASTER_PORT"] for job in jobs}) == 2


@pytest.mark.slow
def test_slurm_result_of_an_earlier_start_is_forgotten(cluster, tmp_path):
    job = submit("stub", tmp_path, "--ngpus", "2", "--nodes", "1", "--mem", "1", "--cpus", "1", "--wait")
    wait_for(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists(), 60, "two ranks")
    subprocess.run(["scancel", "--signal=USR2", job.job_id], check=True)
    wait_for(lambda: shown(job)["Restarts"] == "1", 60, "a requeue")
    assert wait_for_end(job, 90) == "COMPLETED", logs(tmp_path)
    assert [r["RANK"] for r in job.results()] == ["0", "1"]


@pytest.mark.slow
def test_slurm_two_nodes_equal_one_process(cluster, roco, tmp_path):
    sgd_like = ["--eps", "1e-2", "--epochs", "2"]  # AdamW divides rounding noise by itself where gradients vanish
    plain = ["--override", *TINY[TINY.index("--override") + 1 :]]  # no dropout, which draws per rank
    job = submit(
        "main",
        tmp_path / "four",
        *command(roco, "--batch-size", "2", *sgd_like, *plain),
        "--nodes",
        "2",
        "--ngpus",
        "2",
        "--timeout",
        "10",
    )
    main.main([*command(roco, "--batch-size", "8", *sgd_like, *plain), "--output-dir", str(tmp_path / "one")])
    assert wait_for_end(job, 240) == "COMPLETED", logs(tmp_path / "four")
    assert [r["epoch"] for r in job.results()] == [1] * 4
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    assert one.keys() == four.keys()
    for key in one:
        torch.testing.assert_close(four[key], one[key], rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")
    settings = json.loads((tmp_path / "four" / "settings.json").read_text())
    assert settings["derived"]["world_size"] == 4 and "4 task(s) on n1, n2" in logged(tmp_path / "four")


@pytest.mark.slow
def test_slurm_fine_tuning_on_two_nodes_equals_one_process(cluster, tmp_path):
    """Lesions end to end through the fine-tuning launcher's script: the same predictions as one process makes."""
    root = tmp_path / "cbis"
    cbis_tree.make_small_cbis(root)
    cbis_tables.make_cbis(root)
    checkpoint = write_checkpoint(tmp_path / "weights.pt", "vit")
    plain = ["--aa=", "--reprob", "0", "--drop_path", "0", "--opt_eps", "1e-2", "--epochs", "2", "--warmup_epochs", "1"]
    flags = [
        "--data_set",
        "cbis_mass",
        "--data_path",
        str(root),
        "--finetune",
        str(checkpoint),
        "-j",
        "0",
        "--gpu",
        "-1",
    ]
    flags += [*plain, "--lr", "1e-3", "--resamples", "50"]
    slurm = ["--nodes", "2", "--ngpus", "1", "--timeout", "10"]
    job = submit(
        "beit_finetuning.run_class_finetuning", tmp_path / "two", *flags, "--batch_size", "4", *slurm
    )  # fmt: skip
    run_class_finetuning.main([*flags, "--batch_size", "8", "--output_dir", str(tmp_path / "one")])
    assert wait_for_end(job, 240) == "COMPLETED", logs(tmp_path / "two")
    one, two = (Predictions.read(tmp_path / name / "predictions.csv") for name in ("one", "two"))
    assert [row["lesion"] for row in one.rows] == [row["lesion"] for row in two.rows]
    assert abs(one.prob - two.prob).max() < 1e-3
    assert "2 task(s) on n1, n2" in logged(tmp_path / "two")


@pytest.mark.slow
def test_slurm_trains_the_rows_of_the_tables(cluster, tmp_path, monkeypatch):
    """--submit: jobs that wait or run are not sent again; when they have ended the same command makes the tables."""
    lesions = {kind: {"train": 60, "test": 40} for kind in ("calc", "mass")}
    world.make_demo(tmp_path / "world", seed=0, pairs=60, lesions=lesions, workers=1)
    flags = f"--dataset roco --root {{roco}} --model SLIP_VITT16 --epochs 1 --batch-size 16 --gpu -1 {shlex.join(TINY)}"
    rows = {"train": flags, "probe": "--resamples 30", "rows": [{"name": "ViT", "train": ""}]}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    argv = ["--roco", str(tmp_path / "world" / "roco"), "--cbis", str(tmp_path / "world" / "cbis"), "--workers", "0"]
    argv += ["--rows", str(tmp_path / "rows.json"), "--output-dir", str(tmp_path / "out"), "--resamples", "50"]
    argv += ["--seeds", "0", "1", "--submit=--nodes 1 --ngpus 1 --mem 1 --cpus 1 --timeout 10"]
    drain = ["scontrol", "update", "nodename=n1,n2", "reason=test"]
    subprocess.run([*drain, "state=drain"], check=True)  # what is sent now waits
    assert make_tables.main(argv) == {}
    folders = [tmp_path / "out" / "runs" / "vit" / f"seed{seed}" / "training" for seed in (0, 1)]
    jobs = [SimpleNamespace(job_id=(folder / steps.JOB).read_text().strip()) for folder in folders]
    assert make_tables.main(argv) == {}
    assert [(folder / steps.JOB).read_text().strip() for folder in folders] == [job.job_id for job in jobs]
    subprocess.run([*drain, "state=resume"], check=True)
    for job in jobs:
        assert wait_for_end(job, 240) == "COMPLETED", logs(tmp_path / "out" / "jobs" / job.job_id)
    result = make_tables.main(argv)
    assert [row["seeds"] for row in result["tables"]["calc"]["rows"] if row["kind"] == "measured"] == [[0, 1]]
    assert json.loads((folders[0] / "settings.json").read_text())["args"]["seed"] == 0


LONG = ["--epochs", "25", "--eval-freq", "25", "--batch-size", "4", "--save-every-minutes", "1000"]
TWO_NODES = ["--nodes", "2", "--ngpus", "1"]


def _train_rank(rank, world, argv):
    main.main(argv)


@pytest.fixture(scope="module")
def unbroken(roco, tmp_path_factory):
    """The run of LONG on two processes that nothing interrupts."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_ranks(_train_rank, 2, [*command(roco, *LONG), "--output-dir", str(folder)])
    return folder


def steps_done(folder: Path) -> list[tuple[int, int]]:
    """(epochs done, step in the next) at each point where a run stopped or went on."""
    found = re.findall(r"(?:written|continuing) in epoch (\d+)(?: of \d+)?, step (\d+)", logged(folder))
    return [(int(epoch) - 1, int(step)) for epoch, step in found]


@pytest.mark.slow
def test_slurm_time_out_requeues_and_continues_exactly(cluster, roco, unbroken, tmp_path):
    # Slurm sends the warning up to 30 s early, here between 25 and 55 s into the first start.
    job = submit("paced", tmp_path, *command(roco, *LONG), *TWO_NODES, "--timeout", "1", "--signal-delay", "5")
    wait_for(lambda: shown(job)["Restarts"] != "0", 120, "a requeue")
    assert wait_for_end(job, 180) == "COMPLETED", logs(tmp_path)
    stopped, continued = steps_done(tmp_path)[:2]
    assert stopped == continued and stopped > (0, 0)
    story = logged(tmp_path)
    assert "stopped by SIGUSR2" in story and "its time limit is near" in story and "start 2: 2 task(s)" in story
    assert [r["epoch"] for r in job.results()] == [24, 24]
    assert_same_run(unbroken, tmp_path)


@pytest.mark.slow
def test_slurm_preempted_job_returns_and_continues_exactly(cluster, roco, unbroken, tmp_path):
    job = submit("paced", tmp_path, *command(roco, *LONG), *TWO_NODES, "--timeout", "30")
    wait_for(lambda: re.search(r"epoch 2/\d+ \[1/3\]", logged(tmp_path)), 90, "training")
    urgent = subprocess.run(
        [
            "sbatch",
            "--parsable",
            "--partition=high",
            "--nodes=2",
            "--exclusive",
            "--output=/dev/null",
            "--wrap",
            "sleep 3",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    wait_for(lambda: shown(job)["Restarts"] != "0", 90, "a requeue")
    assert wait_for_end(job, 180) == "COMPLETED", logs(tmp_path)
    assert shown(SimpleNamespace(job_id=urgent))["JobState"] == "COMPLETED"
    stopped, continued = steps_done(tmp_path)[:2]
    assert stopped == continued and stopped >= (1, 1)
    assert "preemption" in logged(tmp_path)
    assert_same_run(unbroken, tmp_path)


@pytest.mark.slow
def test_slurm_cancelled_job_leaves_a_checkpoint_and_stays_cancelled(cluster, roco, tmp_path):
    job = submit("paced", tmp_path, *command(roco, *LONG), *TWO_NODES, "--timeout", "30")
    wait_for(lambda: re.search(r"epoch 2/\d+ \[1/3\]", logged(tmp_path)), 90, "training")
    subprocess.run(["scancel", job.job_id], check=True)
    assert wait_for_end(job, 60) == "CANCELLED", logs(tmp_path)
    (stopped,) = steps_done(tmp_path)
    assert stopped >= (1, 1) and "stopped by SIGTERM" in logged(tmp_path)
    state = checkpoints.load_checkpoint(tmp_path / "checkpoint.pt")
    assert (state["epoch"], state["step_in_epoch"]) == stopped
    with pytest.raises(UncompletedJobError):
        job.results()
    time.sleep(5)
    assert shown(job)["JobState"] == "CANCELLED" and shown(job)["Restarts"] == "0"


@pytest.mark.slow
def test_slurm_rank_that_dies_ends_the_job_with_one_message(cluster, roco, tmp_path):
    job = submit("paced", tmp_path, *command(roco, *LONG), *TWO_NODES, "--timeout", "30")
    wait_for(lambda: re.search(r"epoch 2/\d+ \[1/3\]", logged(tmp_path)), 90, "training")
    os.kill(int((tmp_path / "rank1.pid").read_text()), signal.SIGKILL)
    assert wait_for_end(job, 60) == "FAILED", logs(tmp_path)
    assert "rank 0 has lost another rank" in logged(tmp_path)
    assert "Traceback" not in (tmp_path / f"{job.job_id}_0_log.err").read_text()
    with pytest.raises(UncompletedJobError):
        job.results()
