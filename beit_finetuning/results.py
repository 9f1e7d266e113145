"""What a fine-tuned network says of its set: while it trains, and in results.json at the end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from beit_finetuning.sets import Sets
from beit_finetuning.views import EvalView
from evaluation import downstream, metrics, predictions, subgroups
from evaluation.features import Loading, each_once
from evaluation.predictions import CBIS, Predictions
from evaluation.resamples import Bootstrap
from evaluation.run_folder import count_reading
from runtime.checkpoints import load_checkpoint
from towers import lora

log = logging.getLogger("medslip")


@dataclass(frozen=True)
class Evaluation:
    """The sets of a run, and how their images reach a network without chance."""

    sets: Sets
    view: EvalView
    loading: Loading

    def logits(self, model: nn.Module, images: downstream.Downstream, title: str) -> tuple[np.ndarray, np.ndarray]:
        """Logits (n, k) in float32 and the numbers (n,) of their images, each once on any number of processes."""

        def compute(numbers: Tensor, batch: Tensor, targets: Tensor) -> list[Tensor]:
            return [self.loading.encode(model, batch)]

        seen = downstream.with_transform(images, self.view)
        numbers, logits = each_once(model, seen, compute, self.loading, title)
        return logits.numpy(), numbers.numpy()

    def validation_score(self, model: nn.Module) -> float:
        """Macro AUROC on the validation split, which chooses the epoch."""
        labels, prob = self.held_out(model)
        return predictions.macro_auroc(labels, prob, CBIS.without(self.sets.unlearnt))

    def held_out(self, model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        """Labels (n,) and probabilities (n, k) of the validation split."""
        assert self.sets.val is not None
        logits, kept = self.logits(model, self.sets.val, "validation")
        return self.sets.val.labels[kept], probabilities(logits)

    def test_scores(self, model: nn.Module) -> metrics.Scores:
        """All metrics of the set, as fractions."""
        return self.scores_of(*self.logits(model, self.sets.test, "test"))

    def scores_of(self, logits: np.ndarray, kept: np.ndarray) -> metrics.Scores:
        """The same from logits (n, k) of the test images `kept` (n,)."""
        test = self.sets.test
        skipped = {"samples_skipped": len(test) - len(kept)} if len(kept) < len(test) else {}
        scores = metrics.score_outputs(test.labels[kept], logits, self.sets.metric, self.sets.unlearnt)
        return {**scores, **skipped}


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of logits (n, k), in float64."""
    return torch.from_numpy(logits).double().softmax(-1).numpy()


@dataclass(frozen=True)
class Finished:
    """A run whose epochs are done, as results.json is made from it."""

    model: nn.Module  # the bare network
    average: nn.Module | None  # its moving average
    name: str  # for people
    dataset: str
    output_dir: Path
    settings: dict[str, Any]  # of the run, as its checkpoints have them
    compared: dict[str, Any]  # what a comparison with another run's predictions should find the same, or name
    start: str  # the weights it started from
    baselines: Sequence[str]
    bootstrap: Bootstrap


def report(run: Finished, evaluation: Evaluation) -> dict[str, Any]:
    """The results: of the last epoch, or of the best on the validation split where there is one."""
    results = {"model": run.name, "dataset": run.dataset, "protocol": "fine-tuning", "settings": run.settings}
    if evaluation.sets.unlearnt:
        results["unlearnt"] = [str(evaluation.sets.classes[c]) for c in evaluation.sets.unlearnt]
    of_split = report_last if evaluation.sets.val is None else report_lesions
    return results | of_split(run, evaluation)


def report_last(run: Finished, evaluation: Evaluation) -> dict[str, Any]:
    """The last epoch on the test split; where its rows are known, predictions.csv, intervals and differences."""
    test = evaluation.sets.test
    logits, kept = evaluation.logits(run.model, test, "test")
    scores = evaluation.scores_of(logits, kept)
    results: dict[str, Any] = {"unit": "fraction", **scores}
    if test.scheme is not None:
        scheme = test.scheme.without(evaluation.sets.unlearnt)
        found = Predictions([test.rows[i] for i in kept], probabilities(logits), scheme)
        if evaluation.loading.processes.is_main:
            found.write(run.output_dir / "predictions.csv")
        results |= subgroups.report_set(found, None, run.baselines, run.compared, run.bootstrap)
        title = f"{run.dataset}, fine-tuned end to end"
        log.info("\n".join(predictions.describe_measured(results, title)))
    epochs = run.settings["epochs"]
    log.info(f"{run.dataset}: {metrics.shown_score(scores)} after {epochs} epoch{'s' * (epochs != 1)}")
    if run.average is not None:
        results["ema"] = average = evaluation.test_scores(run.average)
        log.info(f"{run.dataset}, averaged weights: {metrics.shown_score(average)}")
    return results


def report_lesions(run: Finished, evaluation: Evaluation) -> dict[str, Any]:
    """CBIS-DDSM's test table, read once, with the weights that the validation split chose."""
    sets, is_main = evaluation.sets, evaluation.loading.processes.is_main
    best = load_checkpoint(run.output_dir / "checkpoint_best.pt")
    run.model.load_state_dict(lora.restored(best))
    held_out = evaluation.held_out(run.model)
    # The test table is read here for the first time.
    readings = count_reading(run.output_dir, run.compared) if is_main else 0
    logits, kept = evaluation.logits(run.model, sets.test, "test")
    scheme = CBIS.without(sets.unlearnt)
    found = Predictions([sets.lesions["test"][i] for i in kept], probabilities(logits), scheme)
    epochs = run.settings["epochs"]
    results: dict[str, Any] = {
        "image_kind": run.compared["image_kind"],
        "chosen": {"epoch": best["epoch"], "epochs": epochs, "class_weights": run.settings["class_weights"]},
        "validation": best["best"],
        "validation_score": "auroc",
        "settings": {**run.settings, **run.compared},
        "weights": {"path": run.start},
        "test_readings": readings,
        "lesions": {split: len(rows) for split, rows in sets.lesions.items()} | {"test": len(kept)},
        "lesions_skipped": {**sets.absent, "test": sets.absent["test"] + len(sets.test) - len(kept)},
    }
    results |= subgroups.report_set(found, held_out, run.baselines, run.compared, run.bootstrap)
    if run.average is not None:
        run.average.load_state_dict(lora.restored(best, "_ema"))
        averaged, _ = evaluation.logits(run.average, sets.test, "test, averaged weights")
        average = Predictions(found.rows, probabilities(averaged), scheme)
        results["ema"] = predictions.score_predictions(average, average.resamples(run.bootstrap))
    if is_main:
        found.write(run.output_dir / "predictions.csv")
        how = f"fine-tuned end to end, epoch {best['epoch']} of {epochs}"
        named = {"model": run.name, "dataset": run.dataset, **results}
        log.info(predictions.describe_results(named, how))
    return results
