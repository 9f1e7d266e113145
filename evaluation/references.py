"""Rows that stand above a table's models: guessing, the commonest class, the crop's size, and the radiologist.

The radiologist is logistic regression on what the case tables of CBIS-DDSM say of a lesion, fitted as a probe is: on
the official training table, its penalty chosen on the validation patients. No image is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.heads import Samples, fit_logistic
from evaluation.predictions import CBIS, Predictions, Scheme, macro_auroc
from evaluation.subgroups import crop_area
from inputs.cbis import CBIS_CLASSES, CBIS_DESCRIPTORS, CROP_SIZE

GUESSES = 20  # rows of guesses, averaged as seeds are
_DESCRIPTORS = (*CBIS_DESCRIPTORS["calc"], *CBIS_DESCRIPTORS["mass"])
RADIOLOGIST = {
    "Radiologist: BI-RADS assessment": ("assessment",),
    "Radiologist: descriptors": _DESCRIPTORS,
    "Radiologist: assessment, descriptors, density, subtlety": ("assessment", *_DESCRIPTORS, "density", "subtlety"),
}
CROP_AREA = "Crop size alone"


def guesses(
    test: Sequence[dict[str, str]], scheme: Scheme, counts: np.ndarray, seed: int = 0
) -> dict[str, list[Predictions]]:
    """Chance, GUESSES times, and the commonest class of the training samples, of which `counts` (k,) has each class's.

    What is said of a labelled set's test rows by looking at none of them.
    """
    rng, rows, k = np.random.default_rng(seed), list(test), len(scheme.classes)
    always = np.tile(counts / counts.sum(), (len(rows), 1))
    return {
        "Chance": [Predictions(rows, rng.dirichlet(np.ones(k), len(rows)), scheme) for _ in range(GUESSES)],
        f"Always {scheme.classes[int(counts.argmax())]}": [Predictions(rows, always, scheme)],
    }


def reference_rows(rows: Sequence[dict[str, str]], seed: int = 0) -> dict[str, list[Predictions] | str]:
    """Each reference's predictions for the test rows of a lesion table, or why it has none.

    Guessing is a list of GUESSES predictions, the others lists of one.
    """
    split = {name: [row for row in rows if row["split"] == name] for name in ("train", "val", "test")}
    labels = {name: np.array([CBIS_CLASSES.index(row["pathology"]) for row in part]) for name, part in split.items()}
    test, k = split["test"], len(CBIS_CLASSES)
    counts = np.bincount(np.concatenate([labels["train"], labels["val"]]), minlength=k)
    found: dict[str, list[Predictions] | str] = {**guesses(test, CBIS, counts, seed)}

    def fitted(encode) -> list[Predictions]:
        train, val = (Samples(encode(split[name]), labels[name], split[name]) for name in ("train", "val"))
        return [Predictions(test, fit_logistic(train, val, k, macro_auroc).probabilities(encode(test)))]

    if all(crop_area(row) for row in rows):
        found[CROP_AREA] = fitted(_sizes)
    else:
        found[CROP_AREA] = f"the table does not say {' and '.join(CROP_SIZE)} of every lesion: make_dataset.py cbis"
    known = [*split["train"], *split["val"]]
    for name, columns in RADIOLOGIST.items():
        used = [column for column in columns if len({row.get(column, "") for row in known}) > 1]
        if lacking := [c for c in ("assessment", "subtlety") if c in columns and c not in used]:
            found[name] = f"the table does not say {' and '.join(lacking)}"
        elif not used:
            found[name] = f"the table does not say {', '.join(columns)}"
        else:
            found[name] = fitted(Descriptors(known, used))
    return found


class Descriptors:
    """Rows of a table to 0/1 features (n, d): one for each word of each column, `ROUND-OVAL` being two words.

    The words are the training rows'; one that only a test row has is no feature.
    """

    def __init__(self, rows: Sequence[dict[str, str]], columns: Sequence[str]):
        self.words = [
            (column, word) for column in columns for word in sorted({w for row in rows for w in row[column].split("-")})
        ]

    def __call__(self, rows: Sequence[dict[str, str]]) -> np.ndarray:
        """Rows (n) of a table to features (n, d)."""
        return np.array(
            [[word in row[column].split("-") for column, word in self.words] for row in rows], dtype=np.float64
        ).reshape(len(rows), len(self.words))


def _sizes(rows: Sequence[dict[str, str]]) -> np.ndarray:
    """Logarithms of a crop's width, height and area, and their squares: (n, 6). A size may matter either way."""
    logs = np.log([[float(row[name]) for name in CROP_SIZE] for row in rows])  # (n, 2)
    x = np.column_stack([logs, logs.sum(1)])
    return np.column_stack([x, np.square(x)])
