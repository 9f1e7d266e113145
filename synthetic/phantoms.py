"""Phantom patients and their findings: what there is to draw, and how often it is malignant. SYNTHETIC.

A patient is a number; anatomy and findings follow from (seed, number). Pathology depends on a finding's
descriptors alone (the rates in `CALCIFICATIONS` and `MASSES`) and is drawn only for the CBIS tables: images and
captions are made without knowing it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIDES, VIEWS = ("LEFT", "RIGHT"), ("CC", "MLO")

# One stream of random numbers for each purpose, so that a change in one leaves the others alone.
ANATOMY, FINDING, GEOMETRY, TISSUE, GRAIN, CAPTION, PATHOLOGY, TABLE, OTHER = range(9)


def stream(seed: int, purpose: int, *path: int) -> np.random.Generator:
    """The random numbers of one purpose for one thing, for example (seed, CAPTION, patient)."""
    return np.random.default_rng((seed, purpose, *path))


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """One of the options, each as likely."""
    return options[rng.integers(len(options))]


# ---------------------------------------------------------------------------------------------------------------------
# Descriptors and what they mean for pathology
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Appearance:
    """A pair of CBIS-DDSM descriptors, how common it is and what it turns out to be.

    `first` and `second` are calc type and distribution, or mass shape and margins, spelt as in the tables;
    `weight` is how common the pair is beside the others.
    `malignant` is P(MALIGNANT); `unrecalled` is P(BENIGN_WITHOUT_CALLBACK | not malignant).
    """

    first: str
    second: str
    weight: float
    malignant: float
    unrecalled: float

    def probabilities(self) -> dict[str, float]:
        """P(class) for the three classes of the case tables."""
        rest = 1.0 - self.malignant
        return {
            "BENIGN": rest * (1.0 - self.unrecalled),
            "BENIGN_WITHOUT_CALLBACK": rest * self.unrecalled,
            "MALIGNANT": self.malignant,
        }


# Rates rounded, loosely after the positive predictive values of Liberman et al., AJR 171 (1998), Burnside et
# al., Radiology 242 (2007) and the BI-RADS atlas (5th edition): typically benign calcifications near 0,
# punctate and amorphous clusters 0.1 to 0.2, pleomorphic clusters 0.4, fine linear branching and linear or
# segmental distribution 0.65 to 0.85; circumscribed masses 0.1 or less, obscured a little above,
# microlobulated and ill-defined about 0.5, spiculated 0.9. Weights are loosely those of the CBIS-DDSM tables.
CALCIFICATIONS = (  #   type                     distribution         weight  malignant  unrecalled
    Appearance("PLEOMORPHIC", "CLUSTERED", 30, 0.40, 0.00),
    Appearance("PLEOMORPHIC", "SEGMENTAL", 6, 0.65, 0.00),
    Appearance("PLEOMORPHIC", "LINEAR", 4, 0.70, 0.00),
    Appearance("PLEOMORPHIC", "REGIONAL", 3, 0.45, 0.00),
    Appearance("FINE_LINEAR_BRANCHING", "CLUSTERED", 4, 0.75, 0.00),
    Appearance("FINE_LINEAR_BRANCHING", "LINEAR", 5, 0.80, 0.00),
    Appearance("FINE_LINEAR_BRANCHING", "SEGMENTAL", 4, 0.85, 0.00),
    Appearance("AMORPHOUS", "CLUSTERED", 8, 0.20, 0.00),
    Appearance("AMORPHOUS", "SEGMENTAL", 2, 0.35, 0.00),
    Appearance("AMORPHOUS", "REGIONAL", 2, 0.20, 0.05),
    Appearance("PUNCTATE", "CLUSTERED", 6, 0.10, 0.15),
    Appearance("PUNCTATE", "SEGMENTAL", 2, 0.25, 0.05),
    Appearance("PUNCTATE", "DIFFUSELY_SCATTERED", 4, 0.01, 0.85),
    Appearance("ROUND_AND_REGULAR", "REGIONAL", 3, 0.02, 0.80),
    Appearance("ROUND_AND_REGULAR", "DIFFUSELY_SCATTERED", 4, 0.01, 0.95),
    Appearance("LUCENT_CENTER", "NA", 9, 0.00, 0.98),
    Appearance("VASCULAR", "NA", 7, 0.00, 0.98),
    Appearance("COARSE", "NA", 4, 0.00, 0.92),
    Appearance("LARGE_RODLIKE", "DIFFUSELY_SCATTERED", 2, 0.00, 0.95),
)
MASSES = (  #           shape                       margins           weight  malignant  unrecalled
    Appearance("OVAL", "CIRCUMSCRIBED", 12, 0.05, 0.10),
    Appearance("ROUND", "CIRCUMSCRIBED", 6, 0.08, 0.10),
    Appearance("LOBULATED", "CIRCUMSCRIBED", 12, 0.10, 0.06),
    Appearance("OVAL", "OBSCURED", 9, 0.12, 0.04),
    Appearance("ROUND", "OBSCURED", 3, 0.12, 0.04),
    Appearance("LOBULATED", "OBSCURED", 6, 0.15, 0.04),
    Appearance("OVAL", "MICROLOBULATED", 4, 0.50, 0.05),
    Appearance("LOBULATED", "MICROLOBULATED", 5, 0.55, 0.05),
    Appearance("IRREGULAR", "MICROLOBULATED", 2, 0.75, 0.00),
    Appearance("OVAL", "ILL_DEFINED", 6, 0.45, 0.08),
    Appearance("ROUND", "ILL_DEFINED", 3, 0.45, 0.08),
    Appearance("LOBULATED", "ILL_DEFINED", 5, 0.50, 0.05),
    Appearance("IRREGULAR", "ILL_DEFINED", 13, 0.70, 0.03),
    Appearance("OVAL", "SPICULATED", 2, 0.90, 0.10),
    Appearance("ROUND", "SPICULATED", 2, 0.90, 0.10),
    Appearance("IRREGULAR", "SPICULATED", 19, 0.90, 0.10),
    Appearance("ARCHITECTURAL_DISTORTION", "SPICULATED", 5, 0.65, 0.25),
    Appearance("ARCHITECTURAL_DISTORTION", "ILL_DEFINED", 2, 0.50, 0.25),
    Appearance("LYMPH_NODE", "CIRCUMSCRIBED", 3, 0.00, 0.97),
    Appearance("FOCAL_ASYMMETRIC_DENSITY", "ILL_DEFINED", 2, 0.25, 0.40),
    Appearance("ASYMMETRIC_BREAST_TISSUE", "NA", 2, 0.15, 0.70),
)
APPEARANCES = {"calc": CALCIFICATIONS, "mass": MASSES}


@dataclass(frozen=True)
class Patient:
    """One phantom patient: `number` seeds everything else. Lengths in mm, density 1 (fatty) to 4 (dense)."""

    seed: int
    number: int
    density: int
    depth: float  # chest wall to nipple
    half: float  # half the height of the breast
    pectoral: tuple[float, float]  # width at the top edge, length along the chest wall (MLO)

    def stream(self, purpose: int, *path: int) -> np.random.Generator:
        """The patient's random numbers of one purpose."""
        return stream(self.seed, purpose, self.number, *path)


@dataclass(frozen=True)
class Finding:
    """One lesion of a patient, seen in both views. It holds descriptors and geometry, never a pathology."""

    kind: str  # calc | mass
    index: int  # which finding of the patient: seeds its geometry
    appearance: Appearance
    subtlety: int  # 1 (subtle) to 5 (obvious), as in the case tables
    extent: float  # mm: diameter of a mass, of a cluster, or length of a line
    depth: float  # place as fractions of the breast: chest wall to nipple,
    outer: float  # inner (-1) to outer (1), which CC shows,
    upper: float  # lower (-1) to upper (1), which MLO shows


# mm (lowest, highest), by distribution or else by type or shape; other masses are log-normal around 15 mm.
EXTENTS = {
    "CLUSTERED": (5, 14),
    "LINEAR": (12, 28),
    "SEGMENTAL": (18, 35),
    "REGIONAL": (22, 38),
    "DIFFUSELY_SCATTERED": (25, 40),
    "LUCENT_CENTER": (6, 16),
    "VASCULAR": (18, 32),
    "COARSE": (8, 16),
    "ARCHITECTURAL_DISTORTION": (18, 35),
    "LYMPH_NODE": (6, 13),
    "FOCAL_ASYMMETRIC_DENSITY": (15, 25),
    "ASYMMETRIC_BREAST_TISSUE": (22, 40),
}


def make_patient(seed: int, number: int) -> Patient:
    """The phantom patient of this number: the same for the same seed, whoever else there is."""
    rng = stream(seed, ANATOMY, number)
    return Patient(
        seed,
        number,
        density=int(rng.choice(4, p=(0.16, 0.38, 0.31, 0.15))) + 1,
        depth=float(rng.uniform(70, 110)),
        half=float(rng.uniform(48, 66)),
        pectoral=(float(rng.uniform(28, 48)), float(rng.uniform(60, 105))),
    )


def make_finding(patient: Patient, index: int, kind: str) -> Finding:
    """The patient's finding of this index, calc or mass, drawn by the rates of its descriptors."""
    rng = patient.stream(FINDING, index)
    table = APPEARANCES[kind]
    weights = np.array([a.weight for a in table], dtype=np.float64)
    appearance = table[rng.choice(len(table), p=weights / weights.sum())]
    span = EXTENTS.get(appearance.second) or EXTENTS.get(appearance.first)
    extent = rng.uniform(*span) if span else np.clip(15.0 * np.exp(0.35 * rng.standard_normal()), 7.0, 32.0)
    outer, upper = rng.uniform(0.1, 0.9, 2) * rng.choice((-1, 1), 2, p=(0.35, 0.65))  # most: upper, outer
    return Finding(
        kind,
        index,
        appearance,
        subtlety=int(rng.choice(5, p=(0.05, 0.13, 0.28, 0.27, 0.27))) + 1,
        extent=float(extent),
        depth=float(rng.uniform(0.3, 0.7)),
        outer=float(outer),
        upper=float(upper),
    )


def draw_pathology(patient: Patient, finding: Finding) -> str:
    """BENIGN, BENIGN_WITHOUT_CALLBACK or MALIGNANT, drawn from the rates of the finding's descriptors."""
    classes = finding.appearance.probabilities()
    return str(patient.stream(PATHOLOGY, finding.index).choice(list(classes), p=list(classes.values())))
