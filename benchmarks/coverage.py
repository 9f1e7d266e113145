"""Do the intervals of make_tables.py cover the truth as often as they say? A simulation with a known answer.

    python benchmarks/coverage.py                       1,000 tables each with 1, 3 and 5 seeds, about 12 minutes
    python benchmarks/coverage.py --draws 200 --seeds 3

Tables shaped like CBIS-DDSM's mass test table: 378 lesions of some 200 patients, 35 to 39 in the rarest class, the
lesions of a patient alike in pathology and in how hard they are to read. A simulated row scores them; a training seed
moves how well it separates the classes, how willing it is to call a lesion malignant, and each lesion by itself. The
truth is the mean over seeds on a population of 600,000 patients. Printed is how often the 95% interval held it, and how
often two rows with the same truth were told apart at 5%.

With one seed the training's chance is left out of the truth as well: it is that seed's own population value, which is
all that one run's bootstrap speaks of. --silent-seed keeps it in, to show what a table of single runs leaves out.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import softmax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation import comparisons, metrics  # noqa: E402
from evaluation.resamples import Resamples  # noqa: E402
from evaluation.weighted import classification_metrics  # noqa: E402

CLASSES = ("BENIGN", "BENIGN_WITHOUT_CALLBACK", "MALIGNANT")
PRIOR = np.array([194, 37, 147]) / 378  # the official mass test table
PATIENTS, POPULATION, RAREST = 201, 600_000, 1


@dataclass(frozen=True)
class Table:
    labels: np.ndarray  # (n,)
    patients: np.ndarray  # (n,)
    signal: np.ndarray  # (n, k) what every training of a row sees alike


def draw_table(rng: np.random.Generator, patients: int) -> Table:
    """Lesions of patients who mostly have one pathology and share a difficulty; one to six lesions a patient."""
    lesions = rng.choice(np.arange(1, 7), patients, p=(0.36, 0.47, 0.09, 0.06, 0.01, 0.01))
    patient = np.repeat(np.arange(patients), lesions)
    own = rng.choice(len(PRIOR), patients, p=PRIOR)
    labels = np.where(rng.random(len(patient)) < 0.9, own[patient], rng.choice(len(PRIOR), len(patient), p=PRIOR))
    shared = rng.normal(0, 0.8, (patients, len(PRIOR)))[patient]
    return Table(labels, patient, shared + rng.normal(0, 0.8, shared.shape))


@dataclass(frozen=True)
class Training:
    """What a seed has decided: how far it separates each class, and how readily it names it."""

    gain: np.ndarray  # (k,)
    bias: np.ndarray  # (k,)

    def probabilities(self, table: Table, rng: np.random.Generator) -> np.ndarray:
        own = np.eye(len(PRIOR))[table.labels] * self.gain  # (n, k)
        return softmax(own + self.bias + table.signal + rng.normal(0, 0.4, own.shape), axis=1)


def train(rng: np.random.Generator, noise: float) -> Training:
    k = len(PRIOR)
    return Training(1.1 + noise * rng.normal(0, 0.35, k), np.log(PRIOR) + noise * rng.normal(0, 0.5, k))


def truth(rng: np.random.Generator, trainings: list[Training]) -> dict[str, float]:
    """Metrics on a population, the mean over trainings, each on its own part of it."""
    found = []
    for training in trainings:
        part = draw_table(rng, POPULATION // len(trainings))
        found.append(classification_metrics(part.labels, training.probabilities(part, rng), CLASSES))
    return {name: float(np.mean([f[name] for f in found])) for name in metrics.METRICS}


def simulate(seeds: int, draws: int, resamples: int, noise: float, silent: bool, first_seed: int = 0) -> dict:
    """Fraction of covered truths and of false differences for each metric."""
    rng = np.random.default_rng((first_seed, seeds))
    conditional = seeds == 1 and not silent
    covered, rejected = dict.fromkeys(metrics.METRICS, 0), dict.fromkeys(metrics.METRICS, 0)
    own = train(rng, noise)
    expected = truth(rng, [own] if conditional else [train(rng, noise) for _ in range(500)])
    for _ in range(draws):
        table = draw_table(rng, PATIENTS)
        while not 35 <= (table.labels == RAREST).sum() <= 39:
            table = draw_table(rng, PATIENTS)
        rows, drawn = [], Resamples(table.labels, table.patients.astype(str), CLASSES, number=resamples)
        for _ in range(2):
            trainings = [own] if conditional else [train(rng, noise) for _ in range(seeds)]
            rows.append(comparisons.draw_rows(drawn, [t.probabilities(table, rng) for t in trainings]))
        for name in metrics.METRICS:
            found = comparisons.interval(rows[0][name])
            compared = comparisons.difference(rows[0][name], rows[1][name])
            assert found.low is not None and found.high is not None and compared.p_value is not None
            covered[name] += found.low <= expected[name] <= found.high
            rejected[name] += compared.p_value <= 0.05
    return {
        "seeds": seeds,
        "draws": draws,
        "resamples": resamples,
        "training_noise": "left out" if conditional else noise,
        "coverage": {name: covered[name] / draws for name in covered},
        "false_differences": {name: rejected[name] / draws for name in rejected},
    }


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="simulated tables for each number of seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 3, 5], help="trainings of each row")
    parser.add_argument("--resamples", type=int, default=500, help="of the patients, in each table")
    parser.add_argument("--noise", type=float, default=1.0, help="how much a training seed moves; 0: not at all")
    parser.add_argument(
        "--silent-seed", action="store_true", help="one seed, and the truth over all seeds all the same"
    )
    args = parser.parse_args(argv)
    results = []
    for seeds in args.seeds:
        results.append(simulate(seeds, args.draws, args.resamples, args.noise, args.silent_seed))
        print(json.dumps(results[-1]), flush=True)
    return results


if __name__ == "__main__":
    main()
