"""Several processes as one: who this process is, collectives, BatchNorm over all rows, and models split over processes.

Everything that differs between one process, DistributedDataParallel and FSDP2 is behind this door: the scripts call the
same functions in all three cases.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

log = logging.getLogger("medslip")

# ---------------------------------------------------------------------------------------------------------------------
# Processes and devices
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """This process among its peers, and the device it computes on."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    precision: str = "fp32"  # of PRECISIONS: what matrix products and convolutions are computed in

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        """Mixed precision inside the block: weights stay in float32, and so does what needs it."""
        if PRECISIONS[self.precision] is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=PRECISIONS[self.precision])

    def scaler(self) -> torch.amp.GradScaler:
        """fp16's gradients are scaled, or the small ones would be lost; for the others it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")


ONEDNN = "fp32-onednn"  # float32 whose linear layers oneDNN multiplies on a CPU
PRECISIONS = {"fp32": torch.float32, ONEDNN: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def wanted_precision(args: argparse.Namespace) -> str:
    """--precision, or fp32 for --disable-amp, its published name.

    Raises:
        ValueError: both, and they disagree.
    """
    wanted = getattr(args, "precision", "auto")
    if not getattr(args, "disable_amp", False):
        return wanted
    if wanted not in ("auto", "fp32"):
        raise ValueError(f"--disable-amp means --precision fp32, so --precision {wanted} cannot stand beside it")
    return "fp32"


def resolve_precision(wanted: str, device: torch.device) -> str:
    """Which of PRECISIONS `wanted` is on this device. auto is bf16 on a GPU that has it, else fp16, and on a CPU
    float32 by the faster library; a GPU has one for float32.

    Raises:
        ValueError: the device has no units for it, so that it would be slower than float32 and not only less exact.
    """
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if wanted == "bf16" and not bf16:
            raise ValueError(f"--precision bf16: {torch.cuda.get_device_name(device)} has no bf16 units; take fp16")
        return {"auto": "bf16" if bf16 else "fp16", ONEDNN: "fp32"}.get(wanted, wanted)
    if wanted == "fp16":
        raise ValueError("--precision fp16 is for GPUs; a CPU takes fp32, or bf16 where it has units for that")
    if wanted == "bf16" and not cpu_has_bf16():
        raise ValueError(
            "--precision bf16: this CPU has no bf16 units (/proc/cpuinfo names neither avx512_bf16 nor amx_bf16 nor "
            "bf16), so it would be slower than float32; take fp32"
        )
    if wanted == ONEDNN and not onednn_is_there():
        raise ValueError(f"--precision {ONEDNN}: this build of torch has no oneDNN for the CPU; take fp32")
    return (ONEDNN if onednn_pays() else "fp32") if wanted == "auto" else wanted


def own_precision(own: str, device: torch.device) -> str:
    """What a run was computed in where this device has it, else what auto is here, with a warning."""
    try:
        return resolve_precision(own, device)
    except ValueError as error:
        log.warning(
            f"the run was computed in {own}, which this machine does not have ({error}): last digits may differ"
        )
        return resolve_precision("auto", device)


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 numbers itself (x86: AVX512-BF16 or AMX; Arm: BF16), as Linux names it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return re.search(r"^(?:flags|Features)\s*:.*\b(?:avx512_bf16|amx_bf16|bf16)\b", text, re.MULTILINE) is not None


# Seen are 1.0, 1.1 and 1.8 to 2.1 times the speed: the threshold lies between, so that a machine decides the same each
# time.
FASTER = 1.4


def onednn_is_there() -> bool:
    """Whether this torch has it for CPUs."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of float32 tensors on a CPU by oneDNN: x (..., i) and weight (o, i) to (..., o), without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def onednn_pays() -> bool:
    """Whether oneDNN is there, FASTER times as fast as what torch asks (MKL on x86), and as exact as float32.

    On AMD's Zen 5 it is twice as fast, on Zen 4 a tenth faster and on Zen 3 not at all; its errors are up to 2.2 times
    MKL's (benchmarks/bench_products.py).
    """
    if not onednn_is_there():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((512, 512), (1024, 512)))
    ways: dict[Callable[[Tensor, Tensor], Tensor], list[float]] = {F.linear: [], onednn_linear: []}
    threads = torch.get_num_threads()
    # By one thread's own time: where several wait for each other, what else runs here made it 0.4 to 7 times.
    torch.set_num_threads(1)
    try:
        for _ in range(7):
            for way, seconds in ways.items():
                start = time.thread_time()
                way(x, weight)
                seconds.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    usual, ours = (min(seconds) for seconds in ways.values())
    exact = x.double() @ weight.double().T
    usual_error, error = ((way(x, weight) - exact).norm().item() for way in ways)
    return usual > FASTER * ours and error < 4 * usual_error


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes_of_node(processes: Processes) -> int:
    """How many processes share this one's cores; the launcher says it, else all of them."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", processes.world_size)))


def init_distributed(args: argparse.Namespace) -> Processes:
    """Join the processes that a launcher started, or stay alone; the only place that decides on rank and device.

    A launcher is recognised by RANK and WORLD_SIZE in the environment (torchrun sets them), so a plain command inside a
    Slurm shell stays a single process.
    """
    rank = int(os.environ.get("RANK") or args.rank)
    world_size = int(os.environ.get("WORLD_SIZE") or args.world_size)
    local_rank = int(os.environ.get("LOCAL_RANK") or args.local_rank)
    use_gpu = torch.cuda.is_available() and args.gpu != -1
    if args.gpu is not None and args.gpu >= 0 and not use_gpu:
        raise ValueError(f"--gpu {args.gpu}: no GPU is available on this machine; use --gpu -1 for the CPU")
    device = torch.device("cuda", args.gpu if args.gpu is not None else local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"GPU {device.index} does not exist: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    precision = resolve_precision(wanted_precision(args), device)
    if world_size > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=args.dist_timeout)
        store, rank, world_size = next(dist.rendezvous(args.dist_url, rank, world_size, timeout=timeout))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun on one node may keep its store over a restart, with the dead processes' addresses in it.
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        if precision in ("fp32", ONEDNN):  # which machines, and moments of one, may see differently
            if rank == 0:
                store.set("precision", precision)
            precision = store.get("precision").decode()
        dist.init_process_group(
            args.dist_backend if use_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    return Processes(rank, world_size, local_rank, device, precision)


def leave_distributed(processes: Processes) -> None:
    """Leave the process group, where there is one."""
    if processes.world_size > 1 and dist.is_initialized():
        _release_group()


def _release_group() -> None:
    # A gloo group that outlives this call inside a DistributedDataParallel dies with that, under the interpreter's
    # lock, for which one of the group's own threads may be waiting: with torch 2.11 most processes then never ended.
    gc.collect()
    dist.destroy_process_group()


@contextmanager
def ending_together(processes: Processes) -> Iterator[None]:
    """Leave the process group after the block; where a rank fails in it, all end, and the main one names the failure.

    The rank that failed raises its own error. The others find their connections broken (or are ended by the launcher)
    and exit without a traceback about sockets.
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
        from_elsewhere = lost or first != mine
        if processes.is_main and from_elsewhere:
            log.error(f"all ranks end: {first}")
        traceback.clear_frames(error.__traceback__)  # what they hold must not outlive the group
        _break_connections(processes, store)
        if from_elsewhere:
            said = processes.is_main or store is not None  # without a store the main rank is no longer there to say it
            raise SystemExit(1 if said else f"error: rank {processes.rank} ends: {first}") from None
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


def _break_connections(processes: Processes, store: dist.Store | None) -> None:
    """Make the other ranks fail too, and keep the store for a moment in which they can read why.

    With NCCL leaving the group may itself wait for the lost rank; there the launcher ends the others.
    """
    if dist.get_backend() != "gloo":
        return
    _release_group()
    end = time.monotonic() + 5
    with suppress(RuntimeError):  # the store may go meanwhile
        informed = store.add("informed", 1) if store else processes.world_size
        while store and processes.is_main and informed < processes.world_size and time.monotonic() < end:
            time.sleep(0.05)
            informed = store.add("informed", 0)


# ---------------------------------------------------------------------------------------------------------------------
# Collectives
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def main_process_first(processes: Processes) -> Iterator[None]:
    """The main process runs the block before the others, which then find what it has written."""
    if processes.world_size > 1 and not processes.is_main:
        dist.barrier()
    yield
    if processes.world_size > 1 and processes.is_main:
        dist.barrier()


def gather_objects(processes: Processes, obj: object) -> list:
    """What each rank passes in, in rank order, on every rank."""
    if processes.world_size == 1:
        return [obj]
    out: list[Any] = [None] * processes.world_size
    dist.all_gather_object(out, obj)
    return out


def world_size() -> int:
    """Processes of the default group; 1 outside of one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place in the default group; 0 outside of one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _AllReduce(torch.autograd.Function):
    """Sum over the processes. Every rank's output holds every rank's input, so gradients are summed as well."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _AllReduce.apply(grad)


class _AllGather(torch.autograd.Function):
    """(B, ...) of each process to (N*B, ...) on every process; a row's gradient is the sum over the ranks' losses."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # A reduce-scatter would send half as much, but gloo has none, and embeddings are small beside gradients.
        return _AllReduce.apply(grad).chunk(world_size())[rank()]


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of `x` over the processes, differentiable."""
    return _AllReduce.apply(x)


def gather_batch(x: Tensor, with_grad: bool = True) -> Tensor:
    """Concatenate `x` (B, ...) of all ranks along the batch, in rank order: (N*B, ...).

    Args:
        with_grad: let gradients flow back into every rank's part (summed over the ranks). Without it the result is a
            constant, the rank's own part included.
    """
    if world_size() == 1:
        return x
    return _AllGather.apply(x if with_grad else x.detach())


# ---------------------------------------------------------------------------------------------------------------------
# BatchNorm over all processes
# ---------------------------------------------------------------------------------------------------------------------


class CollectiveBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the batches of all processes, for devices that torch's SyncBatchNorm refuses (the CPU).

    Statistics travel through differentiable collectives, so outputs, gradients and running statistics are those of one
    process that holds all rows (Ioffe and Szegedy 2015, algorithm 1, over the global batch).
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected (B, C, ...), got {x.dim()} dimensions")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) of this process, normalised by the mean and variance over all processes."""
        self._check_input_dim(x)
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        axes = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        # Two passes: the mean first, then the squares of what is centred, which keeps small variances exact.
        count = sum_over_processes(x.new_tensor(x.numel() / x.shape[1]))
        mean = sum_over_processes(x.sum(axes)) / count  # (C,)
        centred = x - mean.view(shape)
        var = sum_over_processes(centred.square().sum(axes)) / count  # (C,), biased as in the normalisation
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                weight = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                self.running_mean += weight * (mean - self.running_mean)
                # Running statistics hold the unbiased variance.
                self.running_var += weight * (var * count / (count - 1) - self.running_var)
        x = centred * (var + self.eps).rsqrt().view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x


def synchronise_batchnorm(model: nn.Module, processes: Processes) -> nn.Module:
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
    norms: list[Any] = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(m.momentum, m.num_batches_tracked.clone()) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm, (momentum, count) in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(count)


# ---------------------------------------------------------------------------------------------------------------------
# Models on several processes: a copy on each (DistributedDataParallel), or split over them (PyTorch's FSDP2)
# ---------------------------------------------------------------------------------------------------------------------

# Gathered and freed one at a time: the transformer blocks of timm, of CLIP's text tower, of BERT and of Swin.
TRANSFORMER_BLOCKS = ("Block", "TextBlock", "BertLayer", "SwinLayer")
_SHARDED_BLOCKS = (*TRANSFORMER_BLOCKS, "ConvNeXtBlock", "Bottleneck")


def shard(model: nn.Module, processes: Processes) -> nn.Module:
    """Split parameters, gradients and optimizer state over the processes.

    Scalars (`logit_scale`, `logit_bias`) cannot be split and stay whole on every rank; their gradients are averaged by
    hand.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    for module in list(model.modules()):
        if type(module).__name__ in _SHARDED_BLOCKS:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p.ndim == 0})
    for name in ("encode_image", "encode_text"):
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    return model


def replicate(model: nn.Module, processes: Processes) -> nn.Module:
    """The wrapper that averages gradients over the processes during the backward pass; one process needs none."""
    if processes.world_size == 1:
        return model
    # Each rank keeps its own BatchNorm buffers, which `synchronise_batchnorm` has made equal. torch 2.13 renamed this.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    devices = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, **options)


@contextmanager
def gradient_exchange(called: nn.Module, last: bool) -> Iterator[None]:
    """Backward passes of accumulated micro-batches inside the block; processes exchange gradients in the last alone."""
    if is_sharded(called):
        called.set_requires_gradient_sync(last)
        yield
    elif isinstance(called, DistributedDataParallel) and not last:
        with called.no_sync():
            yield
    else:
        yield


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Whole parameters on every rank inside the block, so that ranks may do different numbers of forward passes."""
    parts = [m for m in model.modules() if is_sharded(m)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def is_sharded(module: nn.Module) -> TypeGuard[Any]:
    """Whether `shard` has split the module over the processes."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a second to import, and without it nothing is split
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_split(tensor: Tensor) -> TypeGuard[Any]:
    """Whether this process holds only its part of a tensor that `shard` has split."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def average_gradients(parameters: Iterable[nn.Parameter], processes: Processes) -> None:
    """The mean of every gradient over the processes, as DistributedDataParallel forms it."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if processes.world_size > 1 and grads:
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad) / processes.world_size)


def average_whole_gradients(model: nn.Module, processes: Processes) -> None:
    """In a sharded model, average the gradients of what stays whole on every rank; elsewhere there is nothing to do."""
    if is_sharded(model):
        average_gradients((p for p in model.parameters() if p.ndim == 0), processes)


def gradients_finite(model: nn.Module) -> Tensor:
    """Whether every gradient is finite, as a tensor () on the device: nothing waits for it here."""
    norms = []
    for kind in (True, False):  # sharded gradients and whole ones have no norm together
        grads = [p.grad for p in model.parameters() if p.grad is not None and is_split(p.grad) == kind]
        if grads:
            norm = torch.nn.utils.get_total_norm(grads)
            norms.append(norm.full_tensor() if is_split(norm) else norm)
    return torch.isfinite(torch.stack(norms)).all()


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """State of model and optimizer as whole tensors; of a sharded model on the main process only, and all call this."""
    if not is_sharded(model):
        return model.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint import state_dict

    whole = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return state_dict.get_state_dict(model, optimizer, options=whole)


def load_training_state(model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict, state: dict) -> None:
    """The reverse of `training_state`, on every rank."""
    if not is_sharded(model):
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint import state_dict

    whole = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state_dict.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=whole)
