#!/usr/bin/env bash
# On a CPU a bf16 linear layer of torch keeps about a MiB for every number of rows that it has seen: oneDNN, which
# multiplies there, prepares each shape and holds on to it. 300 batches of as many rows leave a process as it was, 300 of
# different ones add some 290 MiB for one layer of 512 x 2048, whose weights are 4 MiB; after 1,400 it was 1,010, and the
# next 1,400 added 300 more. Captions without their padding come in another number of tokens in each batch. Numbers of
# rows that are rounded up to a few add nothing. ONEDNN_PRIMITIVE_CACHE_CAPACITY=0 left two fifths of the 290.
#
# Seen with torch 2.14.1 on Python 3.11, an AMD EPYC of Zen 5; CPUs without AVX512-BF16 were not tried.
set -euo pipefail
grep -q avx512_bf16 /proc/cpuinfo || { echo "this CPU has no AVX512-BF16: nothing is said of it"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import random
import resource

import torch

print("torch", torch.__version__)
random.seed(0)
layer = torch.nn.Linear(512, 2048).requires_grad_(False)
rows = torch.randn(2500, 512)


def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def added(numbers):
    with torch.autocast("cpu", torch.bfloat16):
        layer(rows)
        before = held()
        for number in numbers:
            layer(rows[:number])
    return held() - before


same = added([2500] * 300)
different = added(random.sample(range(500, 2500), 300))
rounded = added([random.choice(range(640, 2500, 320)) for _ in range(300)])
print(f"300 batches of one number of rows add {same:.0f} MiB, of 300 numbers {different:.0f}, of six {rounded:.0f}")
assert same < 60 and rounded < 60 and different > 150, "this has changed"
PYTHON
