"""Shared by the scripts: command lines, precision, checkpoints, schedule, reproducibility, logging."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import pathlib
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import distributed
from transforms import as_size

HERE = Path(__file__).resolve().parent
log = logging.getLogger("medslip")

# ---------------------------------------------------------------------------------------------------------------------
# Command lines
# ---------------------------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with each flag's default and the description's own line breaks."""


def positive_int(text: str) -> int:
    """For argparse: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


class ImageSize(argparse.Action):
    """`--image-size 224`, a square, or `--image-size 1520 912`, height and width: transforms.Size."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs):
        super().__init__(option_strings, dest, nargs="+", type=positive_int, metavar=("H", "W"), **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            setattr(namespace, self.dest, as_size(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error


# What belongs to a run's place and moment and not to what it does.
_NOT_REPLAYED = {
    "config", "output_dir", "resume", "start_epoch", "evaluate", "rank", "world_size", "local_rank", "dist_url", "gpu",
    "dist_backend", "dist_timeout", "debug",
}  # fmt: skip


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        default="",
        type=str,
        metavar="SETTINGS.JSON",
        help="start with another run's settings; flags on the command line win, and its folder, checkpoint and devices "
        "are not taken",
    )


def parse_with_config(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The command line over the settings of --config, a settings.json that a run has written.

    Raises:
        FileNotFoundError, ValueError: no such file; not a run's settings; settings that this script does not know.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default="")
    path = first.parse_known_args(argv)[0].config
    if path:
        try:
            settings = json.loads(Path(path).read_text(encoding="utf8"))["args"]
            given = {name: value for name, value in settings.items() if name not in _NOT_REPLAYED}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--config {path} is no settings.json of a run: {error!r}") from error
        known = {action.dest for action in parser._actions}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"--config {path} is of another script or version: no flag for {', '.join(unknown)}")
        parser.set_defaults(**given)
    return parser.parse_args(argv)


class UsageError(ValueError):
    """Flags that do not go together; the exit code is argparse's for bad usage, 2."""


def run_script(main: Callable[[], object]) -> None:
    """Call a script's main as the command line does, and leave with its exit code.

    What the user can mend (our own errors about data, files and flags) is one line, `error: ...`, with exit code 1, or
    2 for bad usage, from one rank alone. Anything else is a fault of the code and keeps its traceback, as does
    everything with --debug. A run that a signal has stopped leaves with 128 + the signal's number, as a shell expects:
    what follows it after `&&` then does not start on a half-trained model.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        result = main()
    except (ValueError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        if "--debug" in sys.argv or not (isinstance(error, OSError) or _raised_here(error)):
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
            print(f"error: {text or type(error).__name__}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    stopped_by = result.get("stopped_by") if isinstance(result, dict) else None
    if stopped_by:
        sys.exit(128 + signal.Signals[stopped_by])


def _raised_here(error: BaseException) -> bool:
    """Whether this project's code raised the error on purpose, rather than a library that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(HERE) and "raise" in (frames[-1].line or "raise")


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # that ask a run to stop


class StopRequest:
    """Remembers one of SIGNALS, so that the loop can checkpoint and leave between two steps."""

    AGAIN = 2.0  # s, before which a second Ctrl-C is the same one: torchrun passes on what its group has got already

    def __init__(self):
        self.name = ""
        self.since = 0.0
        self.previous = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            try:
                self.previous[number] = signal.signal(number, self._remember)
            except ValueError:  # not in the main thread: signals belong to whoever runs us
                break
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        if self.name and number == signal.SIGINT and time.monotonic() - self.since > self.AGAIN:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        if not self.name:
            self.name, self.since = signal.Signals(number).name, time.monotonic()


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
        blocks = [m for m in tower.modules() if type(m).__name__ in distributed.TRANSFORMER_BLOCKS]
        alike = len({str(block) for block in blocks}) == 1  # the text holds shapes and drop rates
        for module in blocks if alike else [tower]:
            module.compile(**options)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class _Float64:
    """For numpy.dtype in a checkpoint: double precision and nothing else."""

    def __init__(self, code: str, *flags: bool):
        if code != "f8":
            raise ValueError(f"a numpy number of type {code!r}")
        self.order = "<"

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "="):
            raise ValueError(f"a numpy number of byte order {state[1]!r}")
        self.order = state[1]


def _scalar(dtype: _Float64, data: bytes) -> float:
    return struct.unpack(f"{dtype.order}d", data)[0]


# What the published SLIP checkpoints hold beside tensors and plain values. SLIP's own training left its learning rate
# as a numpy.float64, whose module has another name from numpy 2 on; it becomes a plain number.
_PUBLISHED_TYPES: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    (_Float64, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]


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
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(state: dict, path: str | Path) -> None:
    """Write tensors and plain values so that a kill at any moment leaves either the old file or the new one."""
    atomic_write(path, lambda file: torch.save(state, file))


def load_checkpoint(path: str | Path, mmap: bool = False) -> dict:
    """Read a checkpoint of ours or a published SLIP file onto the CPU without running any code it might carry.

    Args:
        mmap: map tensors into memory instead of reading them, where only the plain values are of interest.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: torn, foreign, or holding types other than tensors and plain values (named in the message).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with torch.serialization.safe_globals(_PUBLISHED_TYPES):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # the restricted unpickler raises any kind on bytes that are no checkpoint
        why = _why_unreadable(path, error)
        raise ValueError(f"{path} is not a readable checkpoint: {why}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state


def _why_unreadable(path: Path, error: Exception) -> str:
    """What a file is, as far as its first bytes tell, or the refused type without torch's advice to trust it."""
    with open(path, "rb") as file:
        start = file.read(512)
    kinds = {
        b"\xff\xd8\xff": "a JPEG image",
        b"\x89PNG": "a PNG image",
        b"\x1f\x8b": "a gzip archive",
        b"%PDF": "a PDF",
    }
    if not start:
        return "the file is empty"
    for mark, kind in kinds.items():
        if start.startswith(mark):
            return f"it is {kind}"
    if start.lstrip()[:1] in (b"{", b"<") or b"git-lfs" in start:
        return f"it is text that begins {start.lstrip()[:40]!r}, perhaps a failed download"
    if named := re.search(r"(?:GLOBAL|type|global) (\S+) (?:was not|is not|that)", str(error)):
        return f"it holds {named[1]}, which is neither a tensor nor a plain value and would be code to run"
    return (str(error) or type(error).__name__).splitlines()[0]


def training_progress(state: dict, path: str | Path) -> dict[str, Any]:
    """How far a checkpoint's weights were trained and whether their run was finished; {} where it does not say."""
    args = state.get("args")
    epochs = args.get("epochs") if isinstance(args, dict) else None
    if "step_in_epoch" not in state or not epochs:
        return {}
    progress = {"epoch": state["epoch"], "epochs": epochs, "finished": not unfinished(state, path)}
    return progress | ({"step": state["step"]} if "step" in state else {})


def unfinished(state: dict, path: str | Path) -> str:
    """What to say of a training checkpoint whose run has not reached its end; "" for one that has, or is no run's.

    The best checkpoint of a run is of an earlier epoch; whether the run was finished says the newest one beside it.
    """
    path = Path(path)
    newest = path.with_name("checkpoint.pt")
    if path.name == "checkpoint_best.pt" and newest.is_file():
        with suppress(ValueError):
            state = load_checkpoint(newest, mmap=True)
    args = state.get("args")
    epochs = args.get("epochs") if isinstance(args, dict) else None
    if "step_in_epoch" not in state or not epochs or state["epoch"] >= epochs:
        return ""
    step = f", step {state['step']} of {state['steps_per_epoch'] * epochs}" if "steps_per_epoch" in state else ""
    return f"unfinished: epoch {state['epoch']} of {epochs}{step}"


def strip_wrappers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameter names without what DistributedDataParallel, torch.compile and Lightning put before them."""
    out = {}
    for key, value in state_dict.items():
        key = key.replace("_orig_mod.", "")  # also inside, where towers were compiled one by one
        while key.startswith("module."):
            key = key.removeprefix("module.")
        out[key] = value
    if out and all(key.startswith("model.") for key in out):  # Lightning's module holds the model
        out = {key.removeprefix("model."): value for key, value in out.items()}
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


def find_training_checkpoint(output_dir: Path, notify: Callable[[str], object] = log.info) -> dict | None:
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
            notify(f"warning: {error}")
            continue
        notify(f"resuming from {path}")
        return state
    if candidates or (output_dir / "checkpoint.pt").exists():
        raise ValueError(f"no checkpoint in {output_dir} can be read; move them away to start afresh")
    return None


def differences(theirs: dict, ours: dict) -> list[str]:
    """What the settings of two runs do not share. What a checkpoint does not record is taken to agree."""
    theirs = {**ours, **theirs}
    return [f"{k}: {theirs[k]!r} there, {ours.get(k)!r} now" for k in sorted(theirs) if theirs[k] != ours.get(k)]


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
        if distributed.is_sharded(model) and not isinstance(parameter, DTensor):
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


class _Lines(logging.Formatter):
    """The message alone; a warning or an error says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return level + super().format(record)


class _Terminal(logging.Handler):
    """Lines on standard output that do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)


@contextmanager
def start_logging(output_dir: str | Path | None = None, is_main: bool = True) -> Iterator[None]:
    """Inside the block the lines of the logger `medslip` go to the terminal and, with `output_dir`, to its log.txt.

    Ranks other than the main one say nothing short of an error, so callers never ask who they are.
    """
    level, handlers = log.level, []
    log.setLevel(logging.INFO if is_main else logging.ERROR)
    if is_main:
        if not any(isinstance(handler, _Terminal) for handler in log.handlers):  # a script may call another's main
            handlers.append(_Terminal())
        if output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(Path(output_dir) / "log.txt", encoding="utf8", delay=True)
            if file.baseFilename not in {getattr(handler, "baseFilename", "") for handler in log.handlers}:
                handlers.append(file)
    for handler in handlers:
        handler.setFormatter(_Lines())
        log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(level)
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


class MetricWriter:
    """Records for programs: log.jsonl, TensorBoard and, on request, Weights & Biases.

    The files are opened with the first row, so that a run which ends before leaves them alone. Ranks other than the
    main one hold a writer that does nothing.
    """

    def __init__(self, output_dir: Path, enabled: bool = True, wandb: bool = False, settings: dict | None = None):
        self.enabled = enabled
        self._sinks: list[Callable[[dict, int], object]] = []
        self._output_dir, self._settings = output_dir, settings
        self._wandb: Any = None
        self._board: Any = None
        self._rows: TextIO | None = None
        if enabled and wandb:
            try:
                import wandb as wandb_module
            except ImportError as error:
                raise ValueError("--wandb needs the wandb package: pip install wandb") from error
            self._wandb = wandb_module

    def row(self, kind: str, step: int, values: dict) -> None:
        """One record: `kind` is train, epoch or test, `step` the number of updates so far."""
        if not self.enabled:
            return
        rows = self._rows or self._open()
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        rows.write(json.dumps(record, allow_nan=False) + "\n")
        for sink in self._sinks:
            sink({f"{kind}/{k}": v for k, v in values.items()}, step)

    def _open(self) -> TextIO:
        from torch.utils.tensorboard import SummaryWriter

        self._output_dir.mkdir(parents=True, exist_ok=True)
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
        return self._rows

    def close(self) -> None:
        for file in (self._board, self._rows):
            if file is not None:
                file.close()
        self.enabled = False


QUIET_SECONDS = 10  # without a line, at most, where there is no terminal


class Progress(tqdm):
    """tqdm's bar on a terminal; elsewhere a log line every ten seconds."""

    def __init__(self, *args: Any, **options: Any):
        self.as_lines = not sys.stderr.isatty()
        quiet = {"mininterval": QUIET_SECONDS, "leave": False} if self.as_lines else {}
        super().__init__(*args, **{**options, **quiet})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.as_lines:
            super().display(msg, pos)
        elif self.n and time.time() - self.start_t >= QUIET_SECONDS:
            of = f" of {self.total:,}" if self.total else ""
            log.info(f"{self.desc.removesuffix(': ')}: {self.n:,}{of}{self.unit if self.unit.strip() != 'it' else ''}")


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def write_json(path: str | Path, value: object) -> None:
    text = json.dumps(value, indent=2, default=str) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))
