"""The main job in miniature, on SYNTHETIC data: at most five minutes on two CPU cores, no download.

    python demo.py

Draws a world of mammogram-like phantoms with captions (synthetic/), fine-tunes a small image tower on its
ROCO part with the SLIP objective (main.py), and probes the tower on its CBIS-DDSM part (main_linear.py),
beside the same tower untrained, and writes a report. The numbers show that the pipeline runs and learns; they say
nothing about patients. Run again with the same settings, it keeps what is there and repeats only the probe.
"""

from __future__ import annotations

import argparse
import logging
import signal
import time
from pathlib import Path

from runtime.command_line import Parser, run_script
from runtime.logs import progress, start_logging

log = logging.getLogger("medslip")

NOTICE = "SYNTHETIC data: these numbers say nothing about patients."
OBJECTIVES = ("slip", "clip", "simclr")
# A ResNet with one block a stage, 0.3 million parameters, beside a text tower of two narrow layers: in short
# trials with one seed it learned faster than a ConvNeXt of that size. Batches of 64 give the more updates.
TOWERS = (
    "--vision-tower",
    "resnet18",
    "--image-size",
    "64",
    "--context-length",
    "40",
    "--ssl-mlp-dim",
    "512",
    "--ssl-emb-dim",
    "128",
    "--override",
    "vision.layers=(1,1,1,1)",
    "vision.channels=(16,32,64,128)",
    "embed_dim=128",
    "text_width=64",
    "text_heads=2",
    "text_layers=2",
)
RECIPE = ("--caption-filter", "mammo", "--batch-size", "64", "--lr", "2e-3", "--wd", "0.1")


def get_args_parser() -> argparse.ArgumentParser:
    """The demo's flags; each has a default that takes minutes on two cores."""
    parser = Parser("demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output-dir",
        default="./demo_output",
        type=str,
        help="phantoms, checkpoints and results go here (default: ./demo_output)",
    )
    parser.add_argument(
        "--seed", default=0, type=int, help="of the phantoms, the training and the untrained tower (default: 0)"
    )
    parser.add_argument(
        "--objective",
        default="slip",
        choices=OBJECTIVES,
        help="clip and simclr train on one half of SLIP's loss, to compare (default: slip)",
    )
    parser.add_argument(
        "--pairs", default=6000, type=int, help="training pairs to draw; fewer for a quicker look (default: 6000)"
    )
    parser.add_argument(
        "--epochs", default=10, type=int, help="of fine-tuning, about 16 s each on two cores (default: 10)"
    )
    return parser


class Steps:
    """Prints a heading for each of the demo's steps, with the time since the start."""

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.monotonic()

    def __call__(self, what: str) -> None:
        """Print the next step's heading."""
        self.done += 1
        minutes, seconds = divmod(round(time.monotonic() - self.start), 60)
        log.info(f"\n=== {self.done}/{self.total}  {what}  [{minutes}:{seconds:02d}] ===")


def fine_tune(args: argparse.Namespace, world: Path, output_dir: Path) -> Path:
    """Train on the ROCO part; returns the checkpoint. A finished run is kept, a broken-off one continued."""
    import main

    done = main.main(
        [
            "--dataset",
            "roco",
            "--root",
            str(world / "roco"),
            "--model",
            f"{args.objective.upper()}_VITT16",
            *TOWERS,
            *RECIPE,
            "--epochs",
            str(args.epochs),
            "--eval-freq",
            str(args.epochs),
            "--workers",
            "1",
            "--keep-last",
            "1",
            "--seed",
            str(args.seed),
            "--output-dir",
            str(output_dir),
        ]
    )
    if signal_name := done.get("stopped_by"):
        raise SystemExit(128 + signal.Signals[signal_name])  # the same command goes on from here
    return output_dir / "checkpoint_best.pt"  # validated once, after the last epoch: the last weights


def probe(args: argparse.Namespace, world: Path, kind: str, checkpoint: Path, output_dir: Path) -> dict[str, dict]:
    """Probe the untrained and the trained tower on one abnormality type; returns the results of both."""
    import main_linear

    common = [
        "--dataset",
        f"cbis_{kind}",
        "--root",
        str(world / "cbis"),
        "--pretrained",
        str(checkpoint),
        "--workers",
        "2",
        "--seed",
        str(args.seed),
    ]
    before, after = output_dir / f"{kind}_untrained", output_dir / f"{kind}_trained"
    untrained = main_linear.main([*common, "--untrained", "--output-dir", str(before)])
    baseline = str(before / "predictions.csv")
    return {
        "untrained": untrained,
        "trained": main_linear.main([*common, "--baseline", baseline, "--output-dir", str(after)]),
    }


def summary(args: argparse.Namespace, results: dict[str, dict[str, dict]]) -> str:
    """The rows of the published tables for both towers, and what training has added, as Markdown."""
    from evaluation.metrics import MALIGNANT, METRICS, Difference, Interval, headings

    lines = [f"**{NOTICE}** Percent, with 95% intervals over resampled patients."]
    for kind, pair in results.items():
        title = {"calc": "Calcification", "mass": "Mass"}[kind]
        lines += [
            "",
            f"| {title} | {' | '.join(headings(METRICS, MALIGNANT).values())} |",
            "| --- |" + " --- |" * len(METRICS),
        ]
        for name in ("untrained", "trained"):
            cells = (Interval.of(pair[name]["metrics"][metric]).percent() for metric in METRICS)
            label = "untrained" if name == "untrained" else f"trained ({args.objective.upper()})"
            lines.append(f"| {label} | {' | '.join(cells)} |")
        gain = Difference.of(pair["trained"]["difference"]["auroc"])
        lines += ["", f"{title}: AUROC, trained minus untrained, paired over patients: {gain.percent()}"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, dict[str, dict]]:
    """Run the demo; returns {"calc" | "mass": {"untrained" | "trained": the results of main_linear.py}}."""
    args = get_args_parser().parse_args(argv)

    with start_logging():
        return run_demo(args)


def run_demo(args: argparse.Namespace) -> dict[str, dict[str, dict]]:
    """The five steps; returns what `main` does."""
    import make_dataset
    import make_report
    import utils
    from synthetic.world import make_demo

    out = Path(args.output_dir)
    world, run = out / f"phantoms_seed{args.seed}", out / f"{args.objective}_seed{args.seed}"
    step = Steps(5)
    log.info(NOTICE)
    step(f"drawing SYNTHETIC phantoms into {world}")
    make_demo(world, seed=args.seed, pairs=args.pairs, progress=progress)
    make_dataset.main(["cbis", "--root", str(world / "cbis")])
    step(f"fine-tuning with the {args.objective.upper()} objective on the ROCO part, {args.epochs} epochs")
    checkpoint = fine_tune(args, world, run / "training")
    results = {}
    for kind, title in (("calc", "calcifications"), ("mass", "masses")):
        step(f"probing {title} of the CBIS-DDSM part, untrained and trained")
        results[kind] = probe(args, world, kind, checkpoint, run / "probe")

    step("writing the report")
    text = summary(args, results)
    utils.write_json(run / "results.json", {"synthetic": True, "args": vars(args), **results})
    utils.atomic_write(run / "results.md", lambda file: file.write(f"{text}\n".encode()))
    make_report.main([str(run), "--output-dir", str(run / "report"), "--title", f"MedSLIP demo, seed {args.seed}"])
    log.info(f"\n{text}\n")
    log.info(
        f"phantoms     {world} (README.txt says what is where)\ntraining     {run / 'training'}\n"
        f"probe        {run / 'probe'}\nthese rows   {run / 'results.md'} and results.json\n"
        f"the report   {run / 'report' / 'report.html'}"
    )
    log.info(f"{(time.monotonic() - step.start) / 60:.1f} minutes. {NOTICE}")
    return results


if __name__ == "__main__":
    run_script(main)
