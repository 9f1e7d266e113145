"""A training step of CLIP beside open_clip's, on the same weights, images and captions.

    python benchmarks/bench_peers.py                                  on a GPU CLIP_VITB16, on a CPU CLIP_VITS16
    python benchmarks/bench_peers.py --models CLIP_VITB16 MEDCLIP_VIT --batch-size 8

Ours is main.update as training calls it, from 8-bit views on; and once more with padding computed like any other token,
which on a GPU is what it does anyway. open_clip has its own model, read from what export.py writes, its own loss, and
PyTorch's AdamW; it gets normalised floats and captions of 77 tokens, as its loader and its tokenizer give them. It is
left out for MedCLIP's towers, which it does not have. In float32 on a CPU, in bf16 on a GPU; captions have the lengths
of ROCO's. Before anything is timed, the losses and the gradients of the token embedding and of the temperature are
compared. Runs alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bench_step
import common
import torch
import torch.nn.functional as F
from torch import Tensor

import export
from models import MODELS
from runtime.command_line import positive_int
from towers import padding

EQUAL = 1e-4  # of float32's rounding in a whole backward pass, relative
DEFAULTS = {"cuda": ("CLIP_VITB16", 128, 10), "cpu": ("CLIP_VITS16", 16, 1)}  # model, batch, steps a run


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name, config in MODELS.items() if config.objective == "clip" and name != "CLIP"]
    parser.add_argument("--models", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--batch-size", type=positive_int)
    parser.add_argument("--runs", type=positive_int, default=5, help="timed runs of each; the median is printed")
    parser.add_argument("--steps", type=positive_int, help="steps in a run (default: 10, on a CPU 1)")
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU although there is a GPU")
    return parser


class OpenClip:
    """Its model, loss and optimizer, as its training puts them together, with our model's weights."""

    def __init__(self, ours: Any, device: torch.device):
        import open_clip

        with tempfile.TemporaryDirectory() as folder:
            checkpoint, model = Path(folder, "checkpoint.pt"), ours.model
            common.write_checkpoint(model, ours.tokenizer, checkpoint)
            export.export([checkpoint], "open-clip", Path(folder, "theirs"))
            with contextlib.chdir(Path(folder, "theirs")):  # from where its configuration names the image tower
                self.model: Any = open_clip.create_model("local-dir:.").to(device).train()
        self.ours, self.device, self.loss = model, device, open_clip.ClipLoss()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1)

    def inputs(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """What its loader gives: normalised floats, and as many tokens as its context has."""
        pixels = self.ours.preprocess.normalise(batch["image"])
        missing = self.ours.config["context_length"] - batch["text"].shape[1]
        return [pixels.contiguous(), F.pad(batch["text"], (0, missing))]

    def backward(self, inputs: list[Tensor]) -> Tensor:
        """The loss, with gradients left on the model."""
        image, text = (x.to(self.device, non_blocking=True) for x in inputs)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.loss(*self.model(image, text))
        loss.backward()
        return loss.detach()

    def step(self, inputs: list[Tensor]) -> None:
        self.optimizer.zero_grad()
        self.backward(inputs)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))

    def end_of_interval(self) -> None:
        """It reads its loss at each log line, too."""


class Padded:
    """Our step, which computes with padding."""

    def __init__(self, ours: bench_step.Ours):
        self.ours = ours
        self.end_of_interval = ours.end_of_interval

    def step(self, batch: dict[str, Tensor]) -> None:
        with patch.object(padding, "WORTH", 0):
            self.ours.step(batch)


def compare(ours: bench_step.Ours, theirs: OpenClip, batch: dict[str, Tensor], inputs: list[Tensor]) -> float:
    """The largest relative difference of loss and gradients, of which two are looked at."""
    losses = [ours.backward(batch), theirs.backward(inputs)]
    of_tokens = theirs.model.text.token_embedding if hasattr(theirs.model, "text") else theirs.model.token_embedding
    pairs = [
        losses, [ours.model.token_embedding.weight.grad, of_tokens.weight.grad],
        [ours.model.logit_scale.grad, theirs.model.logit_scale.grad],
    ]  # fmt: skip
    ours.model.zero_grad()
    return max(common.distance(mine, other.double()) for mine, other in pairs)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = get_args_parser().parse_args(argv)
    device = common.choose_device(args.cpu)
    default, batch_size, steps = DEFAULTS[device.type]
    batch_size, steps, rows = args.batch_size or batch_size, args.steps or steps, []
    print(common.describe(device, args.runs, "open_clip_torch"), f"of {steps} steps", flush=True)
    for name in args.models or [default]:
        ours: Any = bench_step.Ours(bench_step.training_flags(name, []), device)
        batch = bench_step.make_batch(ours, batch_size, device)
        methods: dict[str, tuple[Any, Any]] = {"ours": (ours, batch), "ours, padded": (Padded(ours), batch)}
        difference = math.nan
        if name.startswith("CLIP_"):
            theirs = OpenClip(ours, device)
            methods["open_clip"] = theirs, theirs.inputs(batch)
            difference = compare(ours, theirs, batch, methods["open_clip"][1])
            if device.type == "cpu" and not difference < EQUAL:
                raise RuntimeError(f"{name} and open_clip's differ by {difference:.1e}")
        for method, inputs in methods.values():
            bench_step.time_run(method, inputs, 1 if device.type == "cpu" else 3, device)
        seconds: dict[str, list[float]] = {key: [] for key in methods}
        for _ in range(args.runs):
            for key, (method, inputs) in methods.items():
                seconds[key].append(bench_step.time_run(method, inputs, steps, device))
        row = {key: common.median(values) for key, values in seconds.items()}
        tokens = int((batch["text"] != 0).sum()) / batch_size
        print(f"{name}, batch {batch_size}, {tokens:.1f} tokens a caption in the mean"
              + (f"; open_clip's gradients differ by {difference:.1e}" if "open_clip" in row else ""))  # fmt: skip
        for key, found in row.items():
            print(f"{key:>14} {found:8.3f} s a step, {found / row['ours']:.2f} times ours", flush=True)
        rows.append({"model": name, "difference": difference, "tokens": tokens, **row})
    return rows


if __name__ == "__main__":
    main()
