"""Freed memory is kept by a script's process: counted are the pages that the kernel has to hand out again."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import numpy as np
from runtime import memory
from runtime.command_line import run_script

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (64, 40, 90):
        np.ones(megabytes << 17)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if __name__ == "__main__":
    print(faults(), faults())
    run_script(lambda: print(faults(), faults(), memory.keep_freed_memory()))
"""


def run(tmp_path, **env):
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**{k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}, **env}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env={**env, "PYTHONPATH": os.getcwd()}, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_a_script_keeps_what_it_has_freed(tmp_path):
    _, before, _, after, kept = run(tmp_path)
    if kept == "False":
        pytest.skip("another C library")
    assert int(before) > 50  # new memory each time, in pages of 2 MiB at the most
    assert int(after) < 0.1 * int(before)


@pytest.mark.parametrize("variable", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}])
def test_who_has_told_malloc_what_to_do_is_left_alone(variable, tmp_path):
    assert run(tmp_path, **variable)[-1] == "False"


@pytest.mark.slow
def test_a_step_takes_no_new_memory():
    import bench_allocator

    # Which freed blocks fit what comes next depends on where the process was placed: the heap may still grow once or
    # twice, by 16,000 pages in all, after its first two steps, and never by as much in each.
    found = bench_allocator.main("--models SLIP_VITT16 --batch-size 2 --runs 1 --steps 10".split())["SLIP_VITT16"]
    assert found["kept"]["pages"] < 0.1 * found["glibc's own"]["pages"]
