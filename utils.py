"""Shared by the scripts: processes and devices, checkpoints, schedule, reproducibility, logging."""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

# Renamed in torch 2.15; their successors are not in 2.11, which is supported too.
warnings.filterwarnings("ignore", r".*(broadcast_buffers|torch\.distributed\.nn\.functional)", FutureWarning)

# ---------------------------------------------------------------------------------------------------------------------
# Processes and devices
# ---------------------------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with each flag's default and the description's own line breaks."""


def positive_int(text: str) -> int:
    """For argparse: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


@dataclass(frozen=True)
class Distributed:
    """This process among its peers, and the device it computes on."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_distributed_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes and device")
    group.add_argument(
        "--world-size", default=1, type=int, help="number of processes; torchrun and submitit set it, so leave it alone"
    )
    group.add_argument("--rank", default=0, type=int, help="rank of this process; set by the launcher")
    group.add_argument(
        "--local_rank",
        "--local-rank",
        default=0,
        type=int,
        help="rank of this process on its node; set by the launcher",
    )
    group.add_argument(
        "--dist-url",
        default="env://",
        type=str,
        help="rendezvous; env:// reads MASTER_ADDR and MASTER_PORT, which torchrun sets",
    )
    group.add_argument("--dist-backend", default="nccl", type=str, help="nccl on GPUs; on the CPU gloo is always used")
    group.add_argument(
        "--dist-timeout",
        default=600,
        type=float,
        metavar="SECONDS",
        help="a collective that hangs longer than this ends the run",
    )
    group.add_argument(
        "--gpu",
        default=None,
        type=int,
        help="index of the GPU to use; by default the local rank's. -1 computes on the CPU",
    )


def init_distributed(args: argparse.Namespace) -> Distributed:
    """Join the processes that a launcher started, or stay alone; the only place that decides on rank and device.

    A launcher is recognised by RANK and WORLD_SIZE in the environment (torchrun sets them), so a plain command inside a
    Slurm shell stays a single process.
    """
    rank = int(os.environ.get("RANK", args.rank))
    world_size = int(os.environ.get("WORLD_SIZE", args.world_size))
    local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    use_gpu = torch.cuda.is_available() and args.gpu != -1
    if args.gpu is not None and args.gpu >= 0 and not use_gpu:
        raise ValueError(f"--gpu {args.gpu}: no GPU is available on this machine; use --gpu -1 for the CPU")
    device = torch.device("cuda", args.gpu if args.gpu is not None else local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"GPU {device.index} does not exist: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=args.dist_timeout)
        store, rank, world_size = next(dist.rendezvous(args.dist_url, rank, world_size, timeout=timeout))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun on one node may keep its store over a restart, with the dead processes' addresses in it.
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(
            args.dist_backend if use_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    return Distributed(rank, world_size, local_rank, device)


def leave_distributed(processes: Distributed) -> None:
    if processes.world_size > 1 and dist.is_initialized():
        _release_group()


def _release_group() -> None:
    # A gloo group that outlives this call inside a DistributedDataParallel dies with that, under the interpreter's
    # lock, for which one of the group's own threads may be waiting: with torch 2.11 most processes then never ended.
    gc.collect()
    dist.destroy_process_group()


@contextmanager
def ending_together(processes: Distributed, say: Callable[[str], None] = print) -> Iterator[None]:
    """Leave the process group after the block; where a rank fails in it, all end, and each names the first failure.

    The rank that failed raises its own error. The others find their connections broken (or are ended by the launcher)
    and exit with one line instead of a traceback about sockets. `say` is told that line.
    """
    try:
        yield
    except Exception as error:
        if processes.world_size == 1 or not dist.is_initialized():
            raise
        lost = isinstance(error, RuntimeError) and re.search("gloo|nccl", str(error), re.IGNORECASE)
        mine = f"rank {processes.rank} failed: {type(error).__name__}: {error}"
        if lost:
            mine = (
                f"rank {processes.rank} has lost another rank, which was killed or hangs (--dist-timeout is how "
                f"long it may): {str(error).partition('. ')[0]}"
            )
        first, store = _first_failure(mine)
        say(f"all ranks end: {first}")
        traceback.clear_frames(error.__traceback__)  # what they hold must not outlive the group
        _break_connections(processes, store)
        if lost or first != mine:
            raise SystemExit(f"rank {processes.rank} ends: {first}") from None
        raise
    leave_distributed(processes)


def _first_failure(mine: str) -> tuple[str, dist.Store | None]:
    """The message of the rank that came here first, which may be this one with `mine`, and where they are kept."""
    store = dist.distributed_c10d._get_default_store()
    try:
        # Sets the key where it is absent, and returns what it then holds.
        return store.compare_set("first failure", "", mine).decode(), store
    except RuntimeError:
        return "the process that kept the rendezvous, usually rank 0, has ended; see its log", None


def _break_connections(processes: Distributed, store: dist.Store | None) -> None:
    """Make the other ranks fail too, and keep the store for a moment in which they can read why.

    With NCCL leaving the group may itself wait for the lost rank; there the launcher ends the others.
    """
    if dist.get_backend() != "gloo":
        return
    _release_group()
    end = time.monotonic() + 5
    with suppress(RuntimeError):  # the store may go meanwhile
        informed = store.add("informed", 1) if store else processes.world_size
        while processes.is_main and informed < processes.world_size and time.monotonic() < end:
            time.sleep(0.05)
            informed = store.add("informed", 0)


@contextmanager
def main_process_first(processes: Distributed) -> Iterator[None]:
    """The main process runs the block before the others, which then find what it has written."""
    if processes.world_size > 1 and not processes.is_main:
        dist.barrier()
    yield
    if processes.world_size > 1 and processes.is_main:
        dist.barrier()


def gather_objects(processes: Distributed, obj: object) -> list:
    """What each rank passes in, in rank order, on every rank."""
    if processes.world_size == 1:
        return [obj]
    out = [None] * processes.world_size
    dist.all_gather_object(out, obj)
    return out


class CollectiveBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the batches of all processes, for devices that torch's SyncBatchNorm refuses (the CPU).

    Statistics travel through differentiable collectives, so outputs, gradients and running statistics are those of one
    process that holds all rows (Ioffe and Szegedy 2015, algorithm 1, over the global batch).
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected (B, C, ...), got {x.dim()} dimensions")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        axes = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = dist_nn.all_reduce(x.new_tensor(x.numel() / x.shape[1]))
        mean = dist_nn.all_reduce(x.sum(axes)) / count  # (C,)
        centred = x - mean.view(shape)
        var = dist_nn.all_reduce(centred.square().sum(axes)) / count  # (C,), biased as in the normalisation
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                weight = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                self.running_mean += weight * (mean - self.running_mean)
                self.running_var += weight * (var * count / (count - 1) - self.running_var)
        x = centred * (var + self.eps).rsqrt().view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x


def synchronise_batchnorm(model: nn.Module, processes: Distributed) -> nn.Module:
    """Replace every BatchNorm by one whose statistics span all processes; parameters and names stay the same."""
    if processes.world_size == 1:
        return model
    if processes.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                new = CollectiveBatchNorm(
                    child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
                )
                new._parameters, new._buffers, new.training = child._parameters, child._buffers, child.training
                setattr(module, name, new)
    return model


@contextmanager
def batchnorm_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Training-mode forward passes inside the block leave BatchNorm's running statistics as they are."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(m.momentum, m.num_batches_tracked.clone()) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm, (momentum, count) in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(count)


def average_gradients(parameters: Iterable[nn.Parameter], processes: Distributed) -> None:
    """The mean of every gradient over the processes, as DistributedDataParallel forms it."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if processes.world_size > 1 and grads:
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad) / processes.world_size)


def gradients_finite(model: nn.Module) -> Tensor:
    """Whether every gradient is finite, as a tensor () on the device: nothing waits for it here."""
    norms = []
    for kind in (True, False):  # sharded gradients and whole ones have no norm together
        grads = [p.grad for p in model.parameters() if p.grad is not None and isinstance(p.grad, DTensor) == kind]
        if grads:
            norm = torch.nn.utils.get_total_norm(grads)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return torch.isfinite(torch.stack(norms)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Models larger than one GPU: PyTorch's fully sharded data parallelism (FSDP2)
# ---------------------------------------------------------------------------------------------------------------------

# Gathered and freed one at a time: the transformer blocks of timm, of CLIP's text tower, of BERT and of Swin.
_TRANSFORMER_BLOCKS = ("Block", "TextBlock", "BertLayer", "SwinLayer")
_SHARDED_BLOCKS = (*_TRANSFORMER_BLOCKS, "ConvNeXtBlock", "Bottleneck")


def shard(model: nn.Module, processes: Distributed) -> nn.Module:
    """Split parameters, gradients and optimizer state over the processes.

    `logit_scale`, a scalar that cannot be split, stays whole on every rank; its gradient is averaged by hand.
    """
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    for module in list(model.modules()):
        if type(module).__name__ in _SHARDED_BLOCKS:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p.ndim == 0})
    for name in ("encode_image", "encode_text"):
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    return model


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Whole parameters on every rank inside the block, so that ranks may do different numbers of forward passes."""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """State of model and optimizer as whole tensors; of a sharded model on the main process only, and all call this."""
    if is_sharded(model):
        return (get_model_state_dict(model, options=_WHOLE), get_optimizer_state_dict(model, optimizer, options=_WHOLE))
    return model.state_dict(), optimizer.state_dict()


def load_training_state(model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict, state: dict) -> None:
    """The reverse of `training_state`, on every rank."""
    if is_sharded(model):
        set_model_state_dict(model, weights, options=_WHOLE)
        set_optimizer_state_dict(model, optimizer, state, options=_WHOLE)
    else:
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)


def autocast_of(
    device: torch.device, disabled: bool = False
) -> tuple[Callable[[], AbstractContextManager], torch.amp.GradScaler]:
    """Context and gradient scaler for mixed precision: bf16 where the GPU has it, else fp16; float32 on the CPU."""
    if disabled or device.type != "cuda":
        return nullcontext, torch.amp.GradScaler(device.type, enabled=False)
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return lambda: torch.autocast(device.type, dtype=dtype), scaler


# ---------------------------------------------------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------------------------------------------------


def compilation_pays(device: torch.device) -> bool:
    """Whether torch.compile is worth its start: on GPUs that Triton supports, where it and a C compiler are there."""
    compilers = (os.environ.get("CC") or "cc", "gcc", "clang")
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (7, 0)
        and importlib.util.find_spec("triton") is not None
        and any(map(shutil.which, compilers))
    )


def compile_towers(model: nn.Module, **options) -> None:
    """Have torch compile the towers at their first call, in place: parameters keep their names.

    Where a transformer's blocks are alike they are compiled once for all of them, which starts much sooner than the
    whole tower; a tower whose blocks differ, a Swin or a ResNet, is compiled as a whole.

    Args:
        options: of torch.compile.
    """
    for tower in filter(None, (getattr(model, name, None) for name in ("visual", "transformer", "bert"))):
        blocks = [m for m in tower.modules() if type(m).__name__ in _TRANSFORMER_BLOCKS]
        alike = len({str(block) for block in blocks}) == 1  # the text holds shapes and drop rates
        for module in blocks if alike else [tower]:
            module.compile(**options)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------

# What the published SLIP checkpoints hold beside tensors and plain values.
_PUBLISHED_TYPES = [argparse.Namespace, pathlib.PosixPath]
_WRAPPERS = ("module.", "_orig_mod.")


def atomic_write(path: str | Path, write: Callable) -> None:
    """Call `write(file)` on a temporary file, then rename it to `path`: readers see the old file or the whole new one.

    Raises:
        OSError: naming `path` when the disk is full; the file that was there stays intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        raise OSError(f"could not write {path}: {error}; what was there before is intact") from error
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself reaches the disk
    finally:
        os.close(directory)


def weights_sha256(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of weights, in order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_checkpoint(state: dict, path: str | Path) -> None:
    """Write tensors and plain values so that a kill at any moment leaves either the old file or the new one."""
    atomic_write(path, lambda file: torch.save(state, file))


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of ours or a published SLIP file onto the CPU without running any code it might carry.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: torn, foreign, or holding types other than tensors and plain values (named in the message).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with torch.serialization.safe_globals(_PUBLISHED_TYPES):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted unpickler raises any kind on bytes that are no checkpoint
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state


def strip_wrappers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameter names without what DistributedDataParallel and torch.compile put before them."""
    out = {}
    for key, value in state_dict.items():
        while key.startswith(_WRAPPERS):
            key = key.split(".", 1)[1]
        out[key] = value
    return out


def _numbered(output_dir: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    found = output_dir.glob("checkpoint_step*.pt")
    return sorted((p for p in found if re.fullmatch(r"checkpoint_step\d+\.pt", p.name)), reverse=True)


def save_training_checkpoint(state: dict, output_dir: Path, step: int, is_best: bool, keep_last: int) -> None:
    """Write the run's state after `step` updates and drop all but the newest `keep_last` such files.

    `checkpoint.pt` is another name of the newest, `checkpoint_best.pt` of the best so far.
    """
    for torn in output_dir.glob(".checkpoint*.tmp"):  # left by a kill in the middle of a write
        torn.unlink()
    # The best first: a kill after it repeats the epoch, which makes the same one again.
    names = ["checkpoint_best.pt"] * is_best + [f"checkpoint_step{step:08d}.pt", "checkpoint.pt"]
    path = output_dir / names[0]
    save_checkpoint(state, path)
    for name in names[1:]:
        link = output_dir / f".{name}.{os.getpid()}.tmp"
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
        os.replace(link, output_dir / name)
    for old in _numbered(output_dir)[keep_last:]:
        old.unlink()


def find_training_checkpoint(output_dir: Path, log=print) -> dict | None:
    """The newest readable checkpoint of a run, or None where the run has none.

    A torn file is reported by name and the one before it used.

    Raises:
        ValueError: there are checkpoints and none can be read: a fresh start would overwrite them.
    """
    candidates = _numbered(output_dir)
    for path in candidates or [p for p in [output_dir / "checkpoint.pt"] if p.exists()]:
        try:
            state = load_checkpoint(path)
        except ValueError as error:
            log(f"warning: {error}")
            continue
        log(f"resuming from {path}")
        return state
    if candidates or (output_dir / "checkpoint.pt").exists():
        raise ValueError(f"no checkpoint in {output_dir} can be read; move them away to start afresh")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Schedule and parameter groups
# ---------------------------------------------------------------------------------------------------------------------


def cosine_lr(step: int, total: int, base: float, final: float, warmup: int = 0, start: float = 0.0) -> float:
    """Value at `step` of a linear warm-up from `start` to `base` over `warmup` steps, then half a cosine to `final`.

    Defined for every step: 0 before the first, `final` kept after the last (Loshchilov and Hutter 2017, equation 5,
    without restarts).
    """
    if step < warmup:
        return start + (base - start) * max(step, 0) / max(warmup - 1, 1)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def cosine_scheduler(
    base_value: float,
    final_value: float,
    epochs: int,
    niter_per_ep: int,
    warmup_epochs: int = 0,
    start_warmup_value: float = 0,
) -> np.ndarray:
    """The whole schedule as an array of epochs * niter_per_ep values, as SLIP's users import it."""
    total, warmup = epochs * niter_per_ep, warmup_epochs * niter_per_ep
    return np.array([cosine_lr(i, total, base_value, final_value, warmup, start_warmup_value) for i in range(total)])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two optimizer groups: weights decay; vectors, scalars, biases and tables of biases do not.

    The split is that of the published SLIP models. Each group carries its `name` and its parameters' `names`.
    """
    members: dict[str, list] = {"decay": [], "no decay": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.rsplit(".", 1)[-1] in ("bias", "relative_position_bias_table")
        title = "no decay" if parameter.ndim < 2 or is_bias else "decay"
        if is_sharded(model) and not isinstance(parameter, DTensor):
            title += ", whole"  # an optimizer cannot update sharded and whole parameters together
        members.setdefault(title, []).append((name, parameter))
    return [
        {
            "name": title,
            "names": [n for n, _ in group],
            "params": [p for _, p in group],
            "weight_decay": weight_decay if title.startswith("decay") else 0.0,
        }
        for title, group in members.items()
    ]


def describe_groups(groups: list[dict]) -> str:
    return "; ".join(
        f"{g['name']} {g['weight_decay']:g}: {len(g['params'])} tensors, "
        f"{sum(p.numel() for p in g['params']):,} parameters"
        for g in groups
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reproducibility
# ---------------------------------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict:
    """Every generator that this process draws from, as tensors and plain values."""
    version, words, gauss = random.getstate()
    state = {"python": [version, list(words), gauss], "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def versions() -> dict[str, str]:
    """What a result depends on beside its settings."""
    import timm
    import torchvision

    here = Path(__file__).parent
    try:
        sha = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        sha = "unknown"
    return {
        "commit": sha,
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "timm": str(timm.__version__),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Logging
# ---------------------------------------------------------------------------------------------------------------------


class Logger:
    """Everything a run says: lines to a person (screen and log.txt), rows to programs (log.jsonl, TensorBoard, wandb).

    The files of rows are opened with the first row, so that a run which ends before leaves log.txt alone. Ranks other
    than the main one hold a logger that does nothing, so callers never ask who they are.
    """

    def __init__(self, output_dir: Path, enabled: bool = True, wandb: bool = False, settings: dict | None = None):
        self.enabled = enabled
        self._sinks = []
        if not enabled:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        self._text = open(output_dir / "log.txt", "a", buffering=1, encoding="utf8")
        self._output_dir, self._settings = output_dir, settings
        self._wandb = self._board = self._rows = None
        if wandb:
            try:
                import wandb as wandb_module
            except ImportError as error:
                raise ValueError("--wandb needs the wandb package: pip install wandb") from error
            self._wandb = wandb_module

    def line(self, text: str) -> None:
        """One readable line."""
        if self.enabled:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stdout)  # does not tear a progress bar
            sys.stdout.flush()
            self._text.write(text + "\n")

    def row(self, kind: str, step: int, values: dict) -> None:
        """One record: `kind` is train or validation, `step` the number of updates so far."""
        if self.enabled:
            if self._rows is None:
                self._open_rows()
            values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
            self._rows.write(json.dumps(record, allow_nan=False) + "\n")
            for sink in self._sinks:
                sink({f"{kind}/{k}": v for k, v in values.items()}, step)

    def _open_rows(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._rows = open(self._output_dir / "log.jsonl", "a", buffering=1, encoding="utf8")
        self._board = board = SummaryWriter(str(self._output_dir / "tensorboard"))
        self._sinks.append(
            lambda row, step: [board.add_scalar(k, v, step) for k, v in row.items() if isinstance(v, (int, float))]
        )
        if self._wandb is not None:
            folder = self._output_dir.resolve()
            run = self._wandb.init(
                project="medslip",
                config=self._settings,
                dir=str(folder),
                resume="allow",
                name=folder.name,
                id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
            )
            self._sinks.append(lambda row, step: run.log(row, step=step))

    def close(self) -> None:
        if self.enabled:
            for file in (self._board, self._text, self._rows):
                if file is not None:
                    file.close()
            self.enabled = False


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def write_json(path: str | Path, value: object) -> None:
    text = json.dumps(value, indent=2, default=str) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))
