"""A small synthetic radiology world on disk, in the layouts of ROCO v1 and of CBIS-DDSM's JPEG edition.

Mammogram-like phantoms carry calcifications and masses drawn after BI-RADS descriptors; x-ray-, CT- and MR-
like images give the caption filters something to filter. Everything here is SYNTHETIC: it exists so that
the whole pipeline can be run and tested without a download, and its numbers say nothing about patients.

A patient is a number; anatomy and findings follow from (seed, number). A breast is one fixed scene in
millimetres and a `Frame` is a window on it, so a lesion's crop and the full view show the same tissue at
different pixel sizes. Pathology depends on a finding's descriptors alone (the rates in `CALCIFICATIONS` and
`MASSES`) and is drawn only for the CBIS tables: images and captions are made without knowing it.
"""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

VERSION = 1  # raise when the same seed gives other images or captions
SIDES, VIEWS = ("LEFT", "RIGHT"), ("CC", "MLO")
ROCO_SPLITS = {"train": 1.0, "validation": 0.1, "test": 0.1}  # share of `pairs`; ROCO v1 itself is 8 : 1 : 1
# Row counts of the published case tables.
LESIONS = {"calc": {"train": 1546, "test": 326}, "mass": {"train": 1318, "test": 378}}
FULL_MM = (160.0, 128.0)  # height, width of the film that a full view shows

# One stream of random numbers for each purpose, so that a change in one leaves the others alone.
ANATOMY, FINDING, GEOMETRY, TISSUE, GRAIN, CAPTION, PATHOLOGY, TABLE, OTHER = range(9)


def stream(seed: int, purpose: int, *path: int) -> np.random.Generator:
    """The random numbers of one purpose for one thing, for example (seed, CAPTION, patient)."""
    return np.random.default_rng((seed, purpose, *path))


# ------------------------------------------------------------------------------------------------------------
# Descriptors and what they mean for pathology
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Appearance:
    """A pair of CBIS-DDSM descriptors, how common it is and what it turns out to be.

    `first` and `second` are calc type and distribution, or mass shape and margins, spelt as in the tables.
    `malignant` is P(MALIGNANT); `unrecalled` is P(BENIGN_WITHOUT_CALLBACK | not malignant).
    """

    first: str
    second: str
    share: float
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
# microlobulated and ill-defined about 0.5, spiculated 0.9. Shares are loosely those of the CBIS-DDSM tables.
CALCIFICATIONS = (  #   type                     distribution          share  malignant  unrecalled
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
MASSES = (  #           shape                       margins            share  malignant  unrecalled
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
        return stream(self.seed, purpose, self.number, *path)


@dataclass(frozen=True)
class Finding:
    """One lesion of a patient, seen in both views. It holds descriptors and geometry, never a pathology."""

    kind: str  # calc | mass
    index: int  # which finding of the patient: seeds its geometry
    appearance: Appearance
    subtlety: int  # 1 (subtle) to 5 (obvious), as in the case tables
    extent: float  # mm: diameter of a mass, of a cluster, or length of a line
    depth: float  # place as shares of the breast: chest wall to nipple,
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
    rng = patient.stream(FINDING, index)
    table = APPEARANCES[kind]
    shares = np.array([a.share for a in table], dtype=np.float64)
    appearance = table[rng.choice(len(table), p=shares / shares.sum())]
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


# ------------------------------------------------------------------------------------------------------------
# Drawing: a scene in millimetres seen through a frame
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """A window on a scene: `shape` (H, W) pixels of size `mm`, upper left corner `top`, `left` in mm."""

    shape: tuple[int, int]
    mm: float
    top: float = 0.0
    left: float = 0.0

    @cached_property
    def y(self) -> np.ndarray:  # (H, 1) pixel centres, mm
        return (self.top + self.mm * (np.arange(self.shape[0]) + 0.5))[:, None]

    @cached_property
    def x(self) -> np.ndarray:  # (1, W)
        return (self.left + self.mm * (np.arange(self.shape[1]) + 0.5))[None, :]


def logistic(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


@lru_cache(maxsize=256)
def spline_weights(n: int, mm: float, start: float, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Cubic B-spline weights (n, m) of n pixel centres, `mm` apart, on the lattice points (m,) in reach."""
    u = (start + mm * (np.arange(n) + 0.5)) / spacing
    cell = np.floor(u).astype(int)
    t = u - cell
    s = 1 - t
    taps = np.stack([s**3, 3 * t**3 - 6 * t**2 + 4, 3 * s**3 - 6 * s**2 + 4, t**3], axis=1) / 6
    lattice = np.arange(cell[0] - 1, cell[-1] + 3)
    weights = np.zeros((n, len(lattice)))
    weights[np.arange(n)[:, None], (cell - cell[0])[:, None] + np.arange(4)] = taps
    return weights, lattice


def power_law(tile: np.ndarray, frame: Frame, longest: float) -> np.ndarray:
    """A random field (H, W) of about unit variance whose power falls as 1 / f^3, as that of breast tissue.

    (Burgess, Jacobson and Judy, Medical Physics 28, 2001.) Octaves of smooth noise over lattices of `longest`
    mm, half of it, and so on down to the pixel. The lattice values come from `tile` (n, n), repeated and
    shifted from octave to octave, so that every frame sees the same field.
    """
    field, spacing, octave = np.zeros(frame.shape), longest, 0
    while spacing >= max(2 * frame.mm, 0.2):
        wy, rows = spline_weights(frame.shape[0], frame.mm, frame.top, spacing)
        wx, columns = spline_weights(frame.shape[1], frame.mm, frame.left, spacing)
        values = tile[np.ix_((rows + 17 * octave) % len(tile), (columns + 29 * octave) % len(tile))]
        # Power 1 / f^3 in two dimensions: the variance of an octave is proportional to its wavelength.
        field += math.sqrt(spacing / longest) * (wy @ values @ wx.T)
        spacing, octave = spacing / 2, octave + 1
    # The spline divides std by 2.09; the octaves' variances 1 + 1/2 + 1/4 ... add up to 2.
    return field * (2.09 / math.sqrt(2.0))


@lru_cache(maxsize=32)
def gaussian_response(shape: tuple[int, int], sigma: float) -> np.ndarray:
    """Fourier response (H, W // 2 + 1) of a Gaussian blur of `sigma` pixels."""
    fy, fx = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :]
    return np.exp(-2.0 * (math.pi * sigma) ** 2 * (fy**2 + fx**2))


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return np.fft.irfft2(np.fft.rfft2(image) * gaussian_response(image.shape, sigma), s=image.shape)


def deposit(points: np.ndarray, amounts: np.ndarray, frame: Frame) -> np.ndarray:
    """Spread amounts (n,), mm^2, at points (n, 2) of (y, x), mm, over pixels (H, W); blur as film does."""
    height, width = frame.shape
    v = (points - (frame.top, frame.left)) / frame.mm - 0.5  # pixel units
    cell = np.floor(v).astype(int)
    near = ((cell >= 0) & (cell < (height - 1, width - 1))).all(axis=1)
    cell, part, amounts = cell[near], (v - cell)[near], amounts[near] / frame.mm**2
    canvas = np.zeros(height * width)
    for dy in (0, 1):
        for dx in (0, 1):  # bilinear: each point reaches four pixels
            share = np.abs(1 - dy - part[:, 0]) * np.abs(1 - dx - part[:, 1])
            pixel = (cell[:, 0] + dy) * width + cell[:, 1] + dx
            canvas += np.bincount(pixel, amounts * share, height * width)
    return blur(canvas.reshape(height, width), round(max(0.6, 0.08 / frame.mm), 2))


def turn(points: np.ndarray, angle: np.ndarray | float) -> np.ndarray:
    """Rotate points (..., 2) of (y, x) by an angle that broadcasts over them."""
    c, s = np.cos(angle), np.sin(angle)
    y, x = points[..., 0], points[..., 1]
    return np.stack([c * y + s * x, c * x - s * y], axis=-1)


# ------------------------------------------------------------------------------------------------------------
# Calcifications: every grain is a set of points with an area and an opacity
# ------------------------------------------------------------------------------------------------------------

GRAINS = {  # type: number of grains (lowest, highest), diameter in mm (lowest, highest)
    "PLEOMORPHIC": ((8, 26), (0.25, 0.8)),
    "FINE_LINEAR_BRANCHING": ((4, 10), (0.15, 0.3)),
    "AMORPHOUS": ((18, 45), (0.25, 0.5)),
    "PUNCTATE": ((6, 22), (0.25, 0.5)),
    "ROUND_AND_REGULAR": ((4, 12), (0.6, 1.2)),
    "LUCENT_CENTER": ((1, 4), (1.5, 3.5)),
    "VASCULAR": ((1, 1), (1.6, 2.6)),
    "COARSE": ((1, 2), (3.0, 7.0)),
    "LARGE_RODLIKE": ((4, 9), (0.5, 1.0)),
}
Marks = tuple[np.ndarray, np.ndarray]  # points (n, 2) of (y, x) in mm, and an area (n,) in mm^2 for each


def scatter(rng: np.random.Generator, distribution: str, n: int, extent: float, axis: float) -> np.ndarray:
    """Places (n, 2) of grains around the lesion's middle, mm; `axis` is the angle towards the nipple."""
    along, across = rng.uniform(-0.5, 0.5, n), rng.uniform(-1.0, 1.0, n)
    if distribution == "LINEAR":
        bend = rng.uniform(-0.15, 0.15) * extent
        places = np.stack([0.6 * across + bend * (4 * along**2 - 0.5), extent * along], axis=1)
    elif distribution == "SEGMENTAL":  # a wedge with its tip towards the nipple
        places = np.stack([across * (0.5 - along) * 0.3 * extent, extent * along], axis=1)
    elif distribution == "CLUSTERED":
        places = extent * np.clip(rng.normal(0.0, 0.22, (n, 2)), -0.5, 0.5)
    else:  # REGIONAL, DIFFUSELY_SCATTERED and single findings: evenly over a field
        places = extent * np.stack([0.5 * across, along], axis=1)
    return turn(places - places.mean(axis=0), axis)


def disc(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Radius and angle (n,) of points spread evenly over the unit disc (a sunflower's seeds)."""
    i = np.arange(n)
    return np.sqrt((i + 0.5) / n), i * math.pi * (3.0 - math.sqrt(5.0))


def rods(
    rng: np.random.Generator,
    places: np.ndarray,
    lengths: np.ndarray,
    widths: np.ndarray,
    angles: np.ndarray,
    bends: np.ndarray,
) -> Marks:
    """Bent rods, k marks each; places (n, 2), the rest (n,), bends as shares of the length."""
    k = 4 * math.ceil(lengths.max() / 0.12)
    t = np.linspace(-0.5, 0.5, k)
    across = rng.uniform(-0.5, 0.5, (len(places), k)) * widths[:, None]
    across = across + (bends * lengths)[:, None] * (4 * t**2 - 0.5)
    points = turn(np.stack([across, t * lengths[:, None]], axis=-1), angles[:, None])  # (n, k, 2)
    return (points + places[:, None]).reshape(-1, 2), np.repeat(lengths * widths / k, k)


def vessel_walls(rng: np.random.Generator, extent: float, width: float) -> Marks:
    """The two calcified walls of an artery, parallel and broken in places."""
    angle, ones = rng.uniform(0, math.pi), np.ones(2)
    walls = turn(np.array([[-0.5 * width, 0.0], [0.5 * width, 0.0]]), angle)
    points, area = rods(rng, walls, extent * ones, 0.45 * ones, angle * ones, rng.uniform(-0.15, 0.15) * ones)
    whole = np.sin(points @ rng.normal(0.0, 2.5, 2) + rng.uniform(0, 6)) > -0.5
    return points[whole], 1.2 * area[whole]


def branches(rng: np.random.Generator, places: np.ndarray, widths: np.ndarray, axis: float) -> Marks:
    """Casts of ducts: thin bent rods along the duct, most of them forked at an acute angle."""
    n = len(places)
    angle, length, reach = axis + rng.normal(0.0, 0.35, n), rng.uniform(1.2, 3.5, n), rng.uniform(0.8, 2.0, n)
    ahead = angle + rng.choice((-1, 1), n) * rng.uniform(0.5, 1.0, n)
    tip = places + turn(np.stack([np.zeros(n), 0.5 * length], axis=1), angle)
    start = tip + turn(np.stack([np.zeros(n), 0.5 * reach], axis=1), ahead)
    fork = rng.random(n) < 0.7
    trunks, twigs = (places, length, widths, angle), (start[fork], reach[fork], widths[fork], ahead[fork])
    both = [np.concatenate(pair) for pair in zip(trunks, twigs, strict=True)]
    points, area = rods(rng, *both, rng.uniform(-0.1, 0.1, n + int(fork.sum())))
    uneven = np.repeat(rng.uniform(0.2, 1.8, len(area) // 4), 4)  # as casts are along their length
    return points, area * uneven


def grains(rng: np.random.Generator, finding: Finding, axis: float) -> Marks:
    """The grains of a lesion, mm from its middle; areas are multiplied by the optical depth."""
    form, distribution = finding.appearance.first, finding.appearance.second
    (fewest, most), (smallest, largest) = GRAINS[form]
    n = int(rng.integers(fewest, most + 1)) * (2 if distribution in ("SEGMENTAL", "REGIONAL") else 1)
    places = scatter(rng, distribution, n, finding.extent, axis)
    size = rng.uniform(smallest, largest, n)
    if form == "VASCULAR":
        return vessel_walls(rng, finding.extent, size[0])
    if form == "FINE_LINEAR_BRANCHING":
        return branches(rng, places, size, axis)
    if form == "LARGE_RODLIKE":
        length, angle = rng.uniform(3.0, 8.0, n), axis + rng.normal(0.0, 0.3, n)
        points, area = rods(rng, places, length, size, angle, rng.uniform(-0.05, 0.05, n))
        return points, 1.6 * area

    k = int(np.clip((size.max() / 0.1) ** 2, 12, 2500))
    radius, angle = disc(k)
    radius, stretch, opacity = np.tile(radius, (n, 1)), np.ones((n, 1)), np.clip(2.0 * size, 0.5, 1.6)
    phase = rng.uniform(0, 2 * math.pi, (n, 1))
    if form == "PLEOMORPHIC":  # each grain has its own jagged outline and elongation
        radius *= 1.0 + 0.45 * np.sin(rng.integers(2, 5, (n, 1)) * angle + phase)
        stretch = rng.uniform(1.0, 1.5, (n, 1))
    elif form == "COARSE":  # popcorn
        radius *= 1.0 + 0.12 * np.sin(rng.integers(5, 9, (n, 1)) * angle + phase)
    elif form == "LUCENT_CENTER":
        radius = np.sqrt(0.45 + 0.55 * radius**2)
    elif form == "AMORPHOUS":  # too small and hazy to show a shape
        radius, opacity = 1.3 * radius, 0.4 * opacity
    outline = np.stack([np.sin(angle) * radius / stretch, np.cos(angle) * radius * stretch], axis=-1)
    points = turn(0.5 * size[:, None, None] * outline, rng.uniform(0, math.pi, (n, 1)))  # (n, k, 2)
    return (points + places[:, None]).reshape(-1, 2), np.repeat(opacity * math.pi * (0.5 * size) ** 2 / k, k)


# ------------------------------------------------------------------------------------------------------------
# Masses
# ------------------------------------------------------------------------------------------------------------


EDGES = {  # width of the soft edge, in half extents; 0.3 where the tables name no margins
    "CIRCUMSCRIBED": 0.04,
    "OBSCURED": 0.04,
    "MICROLOBULATED": 0.06,
    "ILL_DEFINED": 0.22,
    "SPICULATED": 0.14,
}
FAINT = {"ARCHITECTURAL_DISTORTION": 0.3, "FOCAL_ASYMMETRIC_DENSITY": 0.6, "ASYMMETRIC_BREAST_TISSUE": 0.5}


def mass_outline(rng: np.random.Generator, finding: Finding, angle: np.ndarray) -> np.ndarray:
    """Radius of a mass in units of half its extent, at every angle (H, W)."""
    shape, margins = finding.appearance.first, finding.appearance.second
    flat = rng.uniform(*{"ROUND": (0.92, 1.0), "IRREGULAR": (0.7, 1.0)}.get(shape, (0.58, 0.8)))
    tilt = rng.uniform(0, math.pi)
    outline = flat / np.sqrt((flat * np.cos(angle - tilt)) ** 2 + np.sin(angle - tilt) ** 2)  # an ellipse
    waves = []  # (lobes around the mass, relative height)
    if shape == "LOBULATED":
        waves += [(int(rng.integers(2, 5)), 0.13), (int(rng.integers(3, 6)), 0.07)]
    if shape == "IRREGULAR" or shape in FAINT:
        waves += [(k, 0.18 / (k - 1) ** 0.7) for k in range(2, 8)]
    for lobes, height in waves:
        wave = np.cos(lobes * angle + rng.uniform(0, 2 * math.pi))
        outline = outline * (1.0 + height * rng.uniform(0.6, 1.2) * wave)
    if margins == "MICROLOBULATED":  # small round bumps with sharp clefts between them
        outline = outline * (0.88 + 0.16 * np.abs(np.cos(0.5 * rng.integers(9, 15) * (angle - tilt))))
    return np.maximum(outline, 0.25)


def spicules(rng: np.random.Generator, radius: float, reach: float) -> Marks:
    """Thin tapering strands that radiate from a mass, mm from its middle."""
    n, t = int(rng.integers(12, 26)), np.linspace(0.0, 1.0, 60)
    angle = np.linspace(0, 2 * math.pi, n, endpoint=False) + rng.normal(0.0, 0.18, n)
    length = radius * reach * rng.uniform(0.5, 1.3, n)
    along = 0.7 * radius + length[:, None] * t  # (n, 60)
    swing = angle[:, None] + rng.normal(0.0, 0.2, (n, 1)) * t
    width = rng.uniform(0.4, 0.9, (n, 1)) * (1.0 - 0.8 * t)
    points = np.stack([np.sin(swing) * along, np.cos(swing) * along], axis=-1)
    return points.reshape(-1, 2), (width * length[:, None] / 60).ravel()


def mass_shadow(rng: np.random.Generator, finding: Finding, frame: Frame, middle: tuple) -> np.ndarray:
    """Added brightness (H, W), about 0 to 1, of a mass with its margins."""
    shape, margins = finding.appearance.first, finding.appearance.second
    radius = 0.5 * finding.extent
    dy, dx = frame.y - middle[0], frame.x - middle[1]
    distance, angle = np.hypot(dy, dx), np.arctan2(dy, dx)
    inside = 1.0 - distance / (radius * mass_outline(rng, finding, angle))  # 1 inside, 0 on the outline
    soft = np.full(frame.shape, EDGES.get(margins, 0.3))
    if margins == "OBSCURED":  # part of the outline is lost in overlying tissue
        soft += 0.4 * logistic(6.0 * (np.cos(angle - rng.uniform(0, 2 * math.pi)) - 0.1))
    thickness = np.sqrt(np.clip(inside * (2.0 - inside), 0.0, 1.0))  # as that of a ball
    body = FAINT.get(shape, 1.0) * logistic(inside / soft * 2.0) * (0.55 + 0.45 * thickness)
    if shape == "LYMPH_NODE":  # fatty hilum: a lucent notch on one side
        notch = rng.uniform(0, 2 * math.pi)
        off = np.hypot(dy - 0.45 * radius * math.sin(notch), dx - 0.45 * radius * math.cos(notch))
        body = body * (1.0 - 0.75 * logistic(8.0 * (1.0 - off / (0.42 * radius))))
    if margins == "SPICULATED" or shape == "ARCHITECTURAL_DISTORTION":
        core = 0.3 * radius if shape == "ARCHITECTURAL_DISTORTION" else radius
        points, area = spicules(rng, core, 2.2 if core < radius else 1.0)
        body = np.maximum(body, 0.6 * -np.expm1(-1.4 * deposit(points + middle, area, frame)))
    return body


# ------------------------------------------------------------------------------------------------------------
# The breast
# ------------------------------------------------------------------------------------------------------------


def breast_depth(patient: Patient, view: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """1 amid the chest wall (x = 0), 0 on the skin, negative outside; y (H, 1) and x (1, W) in mm."""
    middle, half = breast_middle(patient, view)
    above = 1.3 * middle if view == "MLO" else half  # the oblique view reaches past the film into the axilla
    v = (y - middle) / np.where(y < middle, above, half)
    nipple = 4.0 * np.exp(-(((y - middle) / 4.0) ** 2))
    return 1.0 - (np.abs(v) ** 2.3 + np.abs(x / (patient.depth + nipple)) ** 2.1) ** (1 / 2.2)


def breast_middle(patient: Patient, view: str) -> tuple[float, float]:
    """Height of the nipple on the film and half the height of the breast, mm."""
    return (92.0, patient.half) if view == "MLO" else (0.5 * FULL_MM[0], patient.half)


def lesion_middle(patient: Patient, view: str, finding: Finding) -> tuple[float, float]:
    """(y, x) of a lesion on the film, mm, inside the breast: CC shows outer or inner, MLO upper or lower."""
    middle, half = breast_middle(patient, view)
    share = finding.upper if view == "MLO" else finding.outer  # both point to the top of the film
    return middle - share * half * math.sqrt(0.8**2 - finding.depth**2), finding.depth * patient.depth


def vessels(rng: np.random.Generator, patient: Patient, view: str, frame: Frame) -> np.ndarray:
    """Two to four vessels (H, W), 0 to 1, from the chest wall towards the nipple."""
    middle, half = breast_middle(patient, view)
    t = frame.x / (0.85 * patient.depth)  # (1, W) 0 on the chest wall, 1 near the nipple
    shadow = np.zeros(frame.shape)
    for _ in range(rng.integers(2, 5)):
        start, width, waves, phase = rng.uniform((-0.8, 0.5, 3, 0), (0.8, 1.1, 8, 6))
        line = middle + start * half * (1.0 - 0.7 * t) + 3.0 * np.sin(waves * t + phase)
        thin = width * np.clip(1.0 - 0.6 * t, 0.2, 1.0)
        shadow = np.maximum(shadow, np.exp(-(((frame.y - line) / thin) ** 2)) * logistic(20.0 * (1.0 - t)))
    return shadow


def draw_mammogram(patient: Patient, side: str, view: str, findings: Iterable[Finding], frame: Frame) -> np.ndarray:
    """One view of one breast, uint8 (H, W), with its chest wall on the side that it is named after.

    The frame is that of a left breast; a right one is drawn in it and mirrored.
    """
    which = (SIDES.index(side), VIEWS.index(view))
    rng = patient.stream(TISSUE, *which)
    tiles = rng.standard_normal((2, 64, 64))
    middle, half = breast_middle(patient, view)
    depth = breast_depth(patient, view, frame.y, frame.x)
    # Compression keeps the thickness even up to the outer third; the skin shows as a thin line.
    thickness = np.sqrt(np.clip(depth / 0.3, 0.0, 1.0))
    skin = 0.10 * np.exp(-(((depth - 0.01) / 0.012) ** 2))

    field = power_law(tiles[0], frame, 32.0)
    central = 1.0 - np.hypot((frame.x / patient.depth - 0.55) / 0.5, (frame.y - middle) / (0.7 * half))
    gland = logistic(2.5 * (field + 1.6 * central + (-2.4, -1.3, -0.3, 0.8)[patient.density - 1]))
    # Ligaments: the zero lines of a second field.
    strands = np.exp(-((power_law(tiles[1], frame, 16.0) / 0.12) ** 2))
    image = 0.22 + 0.05 * field + (0.24 + 0.03 * field) * gland + 0.05 * strands
    image += 0.07 * vessels(rng, patient, view, frame)

    for finding in findings:
        y, x = lesion_middle(patient, view, finding)
        shape = patient.stream(GEOMETRY, *which, finding.index)
        strength = 0.5 + 0.1 * finding.subtlety
        if finding.kind == "mass":
            image = image + 0.38 * strength * mass_shadow(shape, finding, frame, (y, x))
        else:
            axis = math.atan2(middle - y, patient.depth - x)
            points, amounts = grains(shape, finding, axis)
            image = image - 0.75 * strength * np.expm1(-deposit(points + (y, x), amounts, frame))

    image = image * thickness + skin
    if view == "MLO":
        width, length = patient.pectoral
        muscle = 1.0 - (np.maximum(frame.x / width, 0.0) ** 1.15 + np.maximum(frame.y / length, 0.0) ** 1.15)
        image = image + 0.30 * logistic(25.0 * muscle) * (depth > 0)
    grain = patient.stream(GRAIN, *which, round(1000 * frame.mm))
    image = grain.uniform(0.9, 1.1) * image + grain.uniform(-0.02, 0.02) * (depth > 0) + 0.03
    image = to_uint8(image + 0.013 * grain.standard_normal(frame.shape))
    return image[:, ::-1] if side == "RIGHT" else image


def to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(255.0 * image), 0, 255).astype(np.uint8)


def full_frame(size: int) -> Frame:
    """The whole film: (5/4 size, size) pixels."""
    return Frame((round(size * FULL_MM[0] / FULL_MM[1]), size), FULL_MM[1] / size)


def crop_frame(patient: Patient, view: str, finding: Finding, size: int) -> Frame:
    """A square of (size, size) pixels around a lesion, moved to lie on the film."""
    y, x = lesion_middle(patient, view, finding)
    margin = 1.25 if finding.kind == "calc" else 1.8
    span = max(12.0, margin * finding.extent)
    return Frame((size, size), span / size, max(0.0, y - 0.5 * span), max(0.0, x - 0.5 * span))


def roi_mask(patient: Patient, side: str, view: str, finding: Finding, frame: Frame) -> np.ndarray:
    """The annotated region as uint8 (H, W), 255 inside: a disc a little larger than the lesion."""
    y, x = lesion_middle(patient, view, finding)
    inside = np.hypot(frame.y - y, frame.x - x) <= max(0.6 * finding.extent, frame.mm)
    mask = np.where(inside, 255, 0).astype(np.uint8)
    return mask[:, ::-1] if side == "RIGHT" else mask


# ------------------------------------------------------------------------------------------------------------
# X-ray-, CT- and MR-like images
# ------------------------------------------------------------------------------------------------------------


class Canvas:
    """A square image in coordinates -1 to 1 (y down), painted over with soft-edged shapes."""

    def __init__(self, size: int, off: tuple[float, float]):
        position = (np.arange(size) + 0.5) / size * 2.0 - 1.0
        self.y, self.x = position[:, None] - off[0], position[None, :] - off[1]
        self.image = np.full((size, size), 0.02)

    def ellipse(
        self, y: float, x: float, b: float, a: float, value: float, tilt: float = 0.0, soft: float = 0.06
    ) -> None:
        """Paint an ellipse of half height b and half width a, turned by `tilt` radians."""
        dy, dx = self.y - y, self.x - x
        v, u = math.cos(tilt) * dy - math.sin(tilt) * dx, math.sin(tilt) * dy + math.cos(tilt) * dx
        self.paint(logistic((1.0 - np.hypot(v / b, u / a)) * 2.0 / soft), value)

    def paint(self, cover: np.ndarray, value: float) -> None:
        self.image = self.image + cover * (value - self.image)


def chest_xray(rng: np.random.Generator, canvas: Canvas) -> str:
    finding = rng.choice(("clear", "nodule", "effusion", "consolidation", "cardiomegaly"))
    side = int(rng.choice((-1, 1)))  # -1: left of the image, the patient's right
    canvas.ellipse(0.5, 0.0, 1.5, 0.95, 0.55, soft=0.1)
    for lung in (-1, 1):
        canvas.ellipse(-0.05, 0.42 * lung, 0.68, rng.uniform(0.28, 0.34), 0.16, tilt=0.12 * lung, soft=0.15)
    ribs = np.cos(2 * math.pi * (5.0 * (canvas.y + 0.25 * np.abs(canvas.x)) + rng.random())) > 0.55
    canvas.image = canvas.image + 0.08 * ribs * (np.abs(canvas.y) < 0.8) * (np.abs(canvas.x) < 0.85)
    heart = rng.uniform(0.52, 0.6) if finding == "cardiomegaly" else rng.uniform(0.26, 0.34)
    canvas.ellipse(0.32, 0.12, 0.36, heart, 0.72, tilt=-0.4, soft=0.2)
    canvas.ellipse(0.0, 0.0, 1.3, 0.11, 0.78, soft=0.4)
    where = f"{'right' if side < 0 else 'left'} "
    if finding == "nodule":
        canvas.ellipse(rng.uniform(-0.4, 0.2), 0.5 * side, *[rng.uniform(0.07, 0.12)] * 2, 0.65, soft=0.2)
        return f"a solitary nodule in the {where}lung"
    if finding == "effusion":
        level = rng.uniform(0.1, 0.35)
        within = (side * canvas.x > 0.1) & (np.abs(canvas.x) < 0.8)
        canvas.paint(logistic(20 * (canvas.y - level)) * within, 0.7)
        return f"a {where}pleural effusion"
    if finding == "consolidation":
        canvas.ellipse(rng.uniform(-0.4, 0.3), 0.45 * side, 0.3, 0.24, 0.6, tilt=rng.uniform(0, 3), soft=0.6)
        return f"consolidation in the {where}lung"
    return "clear lungs and a normal heart size" if finding == "clear" else "an enlarged cardiac silhouette"


def bone_xray(rng: np.random.Generator, canvas: Canvas) -> str:
    bones = (("radius", "ulna"), ("tibia", "fibula"))[rng.integers(2)]
    canvas.paint(logistic(25 * (0.62 - np.abs(canvas.x) + 0.05 * np.sin(2 * canvas.y))), 0.32)
    lean, broken = rng.uniform(-0.08, 0.08), int(rng.integers(-1, 2))  # -1: none is broken
    level, slip = rng.uniform(-0.4, 0.4), rng.uniform(0.05, 0.12)
    for bone, (x, width) in enumerate(((-0.22, 0.15), (0.24, 0.10))):
        shaft = x + lean * canvas.y + 0.03 * np.sin(3 * canvas.y)
        if bone == broken:
            shaft = shaft + slip * (canvas.y > level + 0.3 * canvas.x)
        across = np.abs(canvas.x - shaft) / (width * (1.0 + 0.5 * canvas.y**4))
        canvas.paint(logistic(25 * (1.0 - across)), 0.62)
        canvas.paint(logistic(25 * (0.62 - across)), 0.5)  # the marrow lets more through than the cortex
        if bone == broken:
            canvas.paint(np.exp(-(((canvas.y - level - 0.3 * canvas.x) / 0.03) ** 2)) * (across < 1.1), 0.3)
    if broken < 0:
        return f"an intact {bones[0]} and {bones[1]}"
    return f"a displaced fracture of the {bones[broken]} shaft"


def abdomen_ct(rng: np.random.Generator, canvas: Canvas) -> str:
    finding = rng.choice(("normal", "liver", "cyst", "ascites"))
    canvas.ellipse(0.0, 0.0, 0.72, 0.93, 0.28)
    canvas.ellipse(0.0, 0.0, 0.64, 0.85, 0.22 if finding != "ascites" else 0.4)
    canvas.ellipse(-0.08, -0.42, 0.42, 0.36, 0.56, tilt=0.3)  # liver, on the left of the image
    canvas.ellipse(-0.05, 0.6, 0.24, 0.15, 0.58, tilt=-0.3)  # spleen
    canvas.ellipse(-0.25, 0.2, 0.2, 0.26, rng.uniform(0.3, 0.5))  # stomach
    for side in (-1, 1):
        canvas.ellipse(0.25, 0.4 * side, 0.16, 0.11, 0.64, tilt=0.3 * side)  # kidneys
    canvas.ellipse(0.12, 0.05, 0.07, 0.07, 0.68)  # aorta
    canvas.ellipse(0.38, 0.0, 0.16, 0.15, 0.92)
    canvas.ellipse(0.42, 0.0, 0.05, 0.06, 0.45)  # vertebra and its canal
    if finding == "liver":
        y, x, b, a = rng.uniform((-0.25, -0.55, 0.08, 0.08), (0.1, -0.3, 0.16, 0.16))
        canvas.ellipse(y, x, b, a, 0.36, soft=0.2)
        return "a hypodense lesion in the liver"
    if finding == "cyst":
        side = int(rng.choice((-1, 1)))
        canvas.ellipse(0.25, 0.52 * side, 0.12, 0.12, 0.32)
        return f"a simple cyst of the {'right' if side < 0 else 'left'} kidney"
    return "free fluid around the liver and spleen" if finding == "ascites" else "normal abdominal organs"


def head_ct(rng: np.random.Generator, canvas: Canvas) -> str:
    finding = rng.choice(("normal", "haematoma", "infarct", "ventricles"))
    canvas.ellipse(0.0, 0.0, 0.92, 0.76, 0.3)
    canvas.ellipse(0.0, 0.0, 0.87, 0.71, 0.97)
    canvas.ellipse(0.0, 0.0, 0.78, 0.62, 0.46)
    wide = 0.17 if finding == "ventricles" else 0.08
    for side in (-1, 1):
        canvas.ellipse(-0.05, 0.15 * side, 0.3, wide, 0.22, tilt=0.25 * side, soft=0.15)
    side, y = int(rng.choice((-1, 1))), rng.uniform(-0.35, 0.35)
    where = "right" if side < 0 else "left"
    if finding == "haematoma":
        canvas.ellipse(y, 0.35 * side, *rng.uniform(0.1, 0.2, 2), 0.78, soft=0.2)
        return f"a hyperdense haematoma in the {where} hemisphere"
    if finding == "infarct":
        canvas.ellipse(y, 0.42 * side, 0.26, 0.18, 0.34, soft=0.4)
        return f"a hypodense area in the {where} cerebral hemisphere"
    return "dilated lateral ventricles" if finding == "ventricles" else "no abnormal density"


def brain_mr(rng: np.random.Generator, canvas: Canvas) -> str:
    weighting = rng.choice(("T1", "T2", "FLAIR"))
    signal = {"T1": (0.12, 0.38, 0.52), "T2": (0.95, 0.55, 0.4), "FLAIR": (0.1, 0.5, 0.42)}
    fluid, grey, white = signal[str(weighting)]
    canvas.ellipse(0.0, 0.0, 0.92, 0.76, 0.7 if weighting == "T1" else 0.45)  # scalp
    canvas.ellipse(0.0, 0.0, 0.86, 0.7, 0.06)  # skull gives no signal
    canvas.ellipse(0.0, 0.0, 0.8, 0.64, fluid)
    canvas.ellipse(0.0, 0.0, 0.76, 0.61, grey)
    folds = 0.1 * np.cos(14 * np.arctan2(canvas.y, canvas.x) + rng.uniform(0, 6))
    canvas.paint(logistic(20 * (0.82 + folds - np.hypot(canvas.y / 0.76, canvas.x / 0.61))), white)
    for side in (-1, 1):
        canvas.ellipse(-0.05, 0.14 * side, 0.3, 0.08, fluid, tilt=0.25 * side, soft=0.15)
    if rng.random() < 0.4:
        return f"no focal abnormality ({weighting}-weighted)"
    side, radius = int(rng.choice((-1, 1))), rng.uniform(0.07, 0.17)
    bright = 0.22 if weighting == "T1" else 0.9
    canvas.ellipse(rng.uniform(-0.35, 0.35), 0.36 * side, radius, radius, bright, soft=0.25)
    return f"a focal lesion of the {'right' if side < 0 else 'left'} hemisphere ({weighting}-weighted)"


def spine_mr(rng: np.random.Generator, canvas: Canvas) -> str:
    weighting = rng.choice(("T1", "T2"))
    bone, disc_value, fluid = (0.6, 0.35, 0.15) if weighting == "T1" else (0.45, 0.7, 0.95)
    canvas.paint(logistic(12 * (0.85 - np.abs(canvas.x))), 0.28)
    bend, pitch = rng.uniform(0.1, 0.25), 0.34
    column = -0.1 + bend * np.cos(1.5 * canvas.y)
    level, phase = int(rng.integers(0, 4)), rng.uniform(-0.1, 0.1)
    bulge = bool(rng.random() < 0.5)
    canvas.paint(logistic(30 * (0.11 - np.abs(canvas.x - column - 0.36))), fluid)
    canvas.paint(logistic(40 * (0.045 - np.abs(canvas.x - column - 0.36))), 0.5)  # cord
    canvas.paint(logistic(30 * (0.24 - np.abs(canvas.x - column))), disc_value)
    step = np.mod((canvas.y - phase) / pitch, 1.0)
    vertebrae = logistic(30 * (0.38 - np.abs(step - 0.5)))
    canvas.paint(logistic(30 * (0.24 - np.abs(canvas.x - column))) * vertebrae, bone)
    if bulge:
        y = phase + pitch * (level - 1)
        x = -0.1 + bend * math.cos(1.5 * y)
        canvas.ellipse(y, x + 0.05, 0.05, 0.3, 0.22, soft=0.2)
        return f"a bulging disc that narrows the spinal canal ({weighting}-weighted)"
    return f"normal alignment of the vertebrae ({weighting}-weighted)"


OTHER_IMAGES = (  # share, draw, how captions name the image
    (3, chest_xray, ("Chest x-ray", "Posteroanterior chest radiograph", "Plain chest radiograph", "CXR")),
    (2, bone_xray, ("Plain radiograph", "Anteroposterior X-ray", "AP radiograph of the limb", "X-ray image")),
    (2, abdomen_ct, ("Axial CT of the abdomen", "Enhanced computed tomography", "Abdominal CT scan")),
    (2, head_ct, ("Axial CT of the head", "Non-contrast brain CT", "Cranial computed tomography")),
    (2, brain_mr, ("Axial MRI of the brain", "Brain magnetic resonance imaging", "Axial MR image")),
    (1, spine_mr, ("Sagittal MRI of the spine", "Sagittal magnetic resonance image", "Spinal MR image")),
)


def draw_other(rng: np.random.Generator, size: int) -> tuple[np.ndarray, str]:
    """An image of another modality, uint8 (size, size), and its caption."""
    shares = np.array([share for share, _, _ in OTHER_IMAGES], dtype=np.float64)
    _, draw, names = OTHER_IMAGES[rng.choice(len(OTHER_IMAGES), p=shares / shares.sum())]
    canvas = Canvas(size, off=rng.uniform(-0.08, 0.08, 2))  # patients lie a little off centre
    found = draw(rng, canvas)
    mottle = blur(rng.standard_normal((size, size)), 1.2)
    image = canvas.image * (1.0 + 0.12 * mottle) + 0.012 * rng.standard_normal((size, size))
    links = (" showing {}.", " demonstrates {}.", ": {}.", " reveals {}.", " shows {}.")
    return to_uint8(rng.uniform(0.85, 1.1) * image), pick(rng, names) + pick(rng, links).format(found)


# ------------------------------------------------------------------------------------------------------------
# Captions of mammograms. They name what is seen, never what it turned out to be or how it was assessed.
# ------------------------------------------------------------------------------------------------------------

WORDS = {  # descriptor -> ways to say it
    "PLEOMORPHIC": (
        "fine pleomorphic calcifications",
        "pleomorphic microcalcifications",
        "microcalcifications of varying size and shape",
        "heterogeneous, irregularly shaped calcifications",
    ),
    "FINE_LINEAR_BRANCHING": (
        "fine linear branching calcifications",
        "branching, casting-type calcifications",
        "thin linear and branching microcalcifications",
        "fine-linear microcalcifications with branches",
    ),
    "AMORPHOUS": ("amorphous calcifications", "faint, hazy calcifications", "indistinct amorphous microcalcifications"),
    "PUNCTATE": ("punctate calcifications", "punctate microcalcifications", "tiny round calcifications"),
    "ROUND_AND_REGULAR": ("round, regular calcifications", "smooth round calcifications", "round calcifications"),
    "LUCENT_CENTER": (
        "lucent-centered calcifications",
        "ring-like calcifications with lucent centers",
        "smooth calcifications with a radiolucent center",
    ),
    "VASCULAR": (
        "vascular calcifications",
        "arterial calcifications with parallel tracks",
        "tram-track vascular calcifications",
    ),
    "COARSE": ("coarse calcifications", "large popcorn-like calcifications", "coarse, dense calcifications"),
    "LARGE_RODLIKE": ("large rod-like calcifications", "thick, smooth rod-shaped calcifications"),
    "CLUSTERED": ("in a cluster", "grouped", "tightly clustered"),
    "LINEAR": ("in a linear distribution", "arranged in a line", "along a line"),
    "SEGMENTAL": ("in a segmental distribution", "segmentally distributed", "filling a segment"),
    "REGIONAL": ("in a regional distribution", "over a large region"),
    "DIFFUSELY_SCATTERED": ("diffusely scattered", "scattered throughout", "in a diffuse distribution"),
    "OVAL": ("oval", "ovoid", "oval-shaped"),
    "ROUND": ("round", "rounded"),
    "LOBULATED": ("lobulated", "gently lobulated", "lobular"),
    "IRREGULAR": ("irregular", "irregularly shaped"),
    "CIRCUMSCRIBED": ("circumscribed", "well-defined", "sharply marginated", "well-circumscribed"),
    "OBSCURED": ("partly obscured", "partially obscured"),
    "MICROLOBULATED": ("microlobulated", "finely lobulated"),
    "ILL_DEFINED": ("ill-defined", "indistinct", "poorly defined"),
    "SPICULATED": ("spiculated", "stellate, spiculated"),
    "ARCHITECTURAL_DISTORTION": ("architectural distortion",),
    "LYMPH_NODE": ("an intramammary lymph node with a fatty hilum",),
    "FOCAL_ASYMMETRIC_DENSITY": ("a focal asymmetric density", "a focal asymmetry"),
    "ASYMMETRIC_BREAST_TISSUE": ("asymmetric breast tissue", "an area of asymmetric tissue"),
}
DENSITY_WORDS = (  # by density 1 to 4
    ("an almost entirely fatty breast", "predominantly fatty tissue"),
    ("scattered fibroglandular densities", "scattered areas of fibroglandular tissue"),
    ("heterogeneously dense parenchyma", "a heterogeneously dense breast"),
    ("extremely dense parenchyma", "an extremely dense breast"),
)
VIEW_WORDS = {
    "CC": ("craniocaudal", "CC", "cranio-caudal"),
    "MLO": ("mediolateral oblique", "MLO", "oblique"),
}
CLOSE_OPENINGS = (
    "Magnification mammogram",
    "Spot compression mammography",
    "Mammogram, magnified view,",
    "Magnified {view} mammogram",
    "Detail of a {side} breast mammogram",
    "Spot magnification view",
)
FULL_OPENINGS = (
    "Mammogram",
    "{side} mammogram",
    "{view} mammogram of the {side} breast",
    "Mammography of the {side} breast in {view} view",
    "{view} view of the {side} breast",
    "Mammographic image ({view} view)",
    "Screening mammogram, {side} {view} view,",
)


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def finding_phrase(rng: np.random.Generator, finding: Finding) -> str:
    """The finding in a radiologist's words, as a noun phrase."""
    shape, margins = finding.appearance.first, finding.appearance.second
    first, second = pick(rng, WORDS[shape]), pick(rng, WORDS.get(margins, ("",)))
    if finding.kind == "calc":
        leads = second in ("grouped", "tightly clustered", "diffusely scattered")
        return f"{second} {first}" if leads else f"{first} {second}".rstrip()
    if shape == "ARCHITECTURAL_DISTORTION":
        return f"{second} {first}"
    if shape == "LYMPH_NODE" or shape in FAINT:
        return first
    noun = pick(rng, ("mass", "mass", "lesion", "opacity", "nodule"))
    size = f" measuring {round(finding.extent)} mm" if rng.random() < 0.25 else ""
    forms = (f"{first} {noun} with {second} margins", f"{second} {first} {noun}", f"{first}, {second} {noun}")
    return article(pick(rng, forms)) + size


def place_phrase(rng: np.random.Generator, finding: Finding, side: str, view: str) -> str:
    """Where the finding lies, as far as the view tells; empty half of the time."""
    if view == "CC":
        half = "outer" if finding.outer > 0 else "inner"
    else:
        half = "upper" if finding.upper > 0 else "lower"
    return pick(rng, ("", "", f" in the {half} {side.lower()} breast", f" in the {half} half of the breast"))


def mammogram_caption(
    rng: np.random.Generator, patient: Patient, side: str, view: str, finding: Finding | None, close: bool
) -> str:
    """One caption for a full or a close view, with or without a finding."""
    opening = pick(rng, CLOSE_OPENINGS if close else FULL_OPENINGS)
    opening = opening.format(side=side.lower(), view=pick(rng, VIEW_WORDS[view]))
    start = opening[0].upper() + opening[1:]
    density = pick(rng, DENSITY_WORDS[patient.density - 1])
    if finding is None:
        return start + pick(rng, (" shows {}.", " with {} and no focal finding.", ": {}.")).format(density)
    what, where = finding_phrase(rng, finding), place_phrase(rng, finding, side, view)
    verb = pick(rng, ("shows", "demonstrates", "reveals", "showing", "with", "depicting"))
    style = rng.random()
    if style < 0.2:
        return f"{start} {verb} {what}{where or f' in {density}'}."
    if style < 0.3:
        return f"{start} {verb} {density}. There {'are' if 'calcifications' in what else 'is'} {what}{where}."
    if style < 0.4:
        lower = opening if opening[:2].isupper() else opening[0].lower() + opening[1:]
        return f"{what[0].upper()}{what[1:]}{where} ({lower.rstrip(',')})."
    return f"{start} {verb} {what}{where}{pick(rng, ('', '', '', ' (arrow)', ' (circle)'))}."


# ------------------------------------------------------------------------------------------------------------
# Layouts on disk
# ------------------------------------------------------------------------------------------------------------

README = """SYNTHETIC radiology world, drawn by phantoms.py. No real image, no patient.

roco/          image-caption pairs in the layout of ROCO v1
cbis/          case tables and images in the layout of CBIS-DDSM's JPEG edition;
               next: python make_dataset.py cbis --root cbis
patients.csv   which phantom patient is in which part and split; none is in two
demo.json      the settings that drew this folder, and counts

Pathology is drawn from the lesions' descriptors (the rates are in phantoms.py). Numbers measured here show
that the code runs and learns. They say nothing about patients.
"""
OTHER_SHARE = 0.25  # of the ROCO pairs are no mammograms;
NOTHING_SHARE = 0.06  # of the others this share shows no finding,
CLOSE_SHARE = 0.5  # and of those with a finding this share is a close view
SECOND_VIEW, SECOND_FINDING = 0.75, 0.12  # shares of CBIS patients seen in both views, with two findings
NO_DESCRIPTION = 0.05  # of the CBIS images have an empty SeriesDescription
APART = 0.03  # of the CBIS lesions have crop and mask in two series
ABNORMALITY = {"calc": "calcification", "mass": "mass"}
TABLES = (("calc", "train"), ("calc", "test"), ("mass", "train"), ("mass", "test"))
DICOM_COLUMNS = ("file_path", "image_path", "PatientID", "SeriesDescription", "SeriesInstanceUID")
PATIENT_COLUMNS = ("patient", "part", "split")
_WHERE = ("left or right breast", "image view", "abnormality id", "abnormality type")
_OUTCOME = ("assessment", "pathology", "subtlety")
_PATHS = ("image file path", "cropped image file path", "ROI mask file path")
CASE_COLUMNS = {  # the published headers; only calc writes `breast density` with a space
    "calc": ("patient_id", "breast density", *_WHERE, "calc type", "calc distribution", *_OUTCOME, *_PATHS),
    "mass": ("patient_id", "breast_density", *_WHERE, "mass shape", "mass margins", *_OUTCOME, *_PATHS),
}


# Odd numbers are patients of the ROCO part, even ones of the CBIS part: no phantom is in both.
def roco_number(split: str, index: int) -> int:
    return 2 * (len(ROCO_SPLITS) * index + list(ROCO_SPLITS).index(split)) + 1


def cbis_number(kind: str, split: str, index: int) -> int:
    return 2 * (len(TABLES) * index + TABLES.index((kind, split)) + 1)


def save(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).save(path, quality=95)


def roco_id(split: str, index: int) -> str:
    return f"ROCO_{(roco_number(split, index) + 1) // 2:05d}"


def roco_pair(seed: int, size: int, split: str, index: int) -> tuple[np.ndarray, str]:
    """Image and caption number `index` of a split of the ROCO part."""
    patient = make_patient(seed, roco_number(split, index))
    rng = patient.stream(CAPTION)
    if rng.random() < OTHER_SHARE:
        return draw_other(patient.stream(OTHER), size)
    side, view = pick(rng, SIDES), pick(rng, VIEWS)
    finding = make_finding(patient, 0, pick(rng, ("calc", "mass"))) if rng.random() >= NOTHING_SHARE else None
    close = finding is not None and rng.random() < CLOSE_SHARE
    frame = crop_frame(patient, view, finding, size) if close else full_frame(size)
    image = draw_mammogram(patient, side, view, [finding] if finding else [], frame)
    return image, mammogram_caption(rng, patient, side, view, finding, close)


def write_roco_pair(root: Path, seed: int, size: int, job: tuple[str, int]) -> str:
    """Write one image; returns its line of captions.txt."""
    image, caption = roco_pair(seed, size, *job)
    name = roco_id(*job)
    save(image, root / job[0] / "radiology" / "images" / f"{name}.jpg")
    return f"{name}\t {caption}\n"


@dataclass(frozen=True)
class Case:
    """A patient of the CBIS part: a row of the case table for each view and finding."""

    patient: Patient
    side: str
    views: tuple[str, ...]
    findings: tuple[Finding, ...]


def make_case(seed: int, kind: str, split: str, index: int) -> Case:
    patient = make_patient(seed, cbis_number(kind, split, index))
    rng = patient.stream(TABLE)
    views = VIEWS if rng.random() < SECOND_VIEW else (pick(rng, VIEWS),)
    findings = tuple(make_finding(patient, i, kind) for i in range(1 + (rng.random() < SECOND_FINDING)))
    return Case(patient, pick(rng, SIDES), views, findings)


def draw_assessment(rng: np.random.Generator, finding: Finding, pathology: str) -> int:
    """The assessment column: 2 where nobody was called back, else higher for descriptors that worry more."""
    rate = finding.appearance.malignant
    third, fifth = 0.35 * (1.0 - rate), 0.6 * rate**2
    drawn = int(rng.choice((0, 3, 4, 5), p=(0.05, third, 0.95 - third - fifth, fifth)))
    return 2 if pathology == "BENIGN_WITHOUT_CALLBACK" else drawn


class CaseWriter:
    """Writes the images of one CBIS patient and keeps what dicom_info.csv says of them in `images`."""

    def __init__(self, root: Path, rng: np.random.Generator):
        self.root, self.rng, self.images = root, rng, []

    def uid(self) -> str:
        """A UID under 2.25, the root for random ones (ITU-T X.667)."""
        return f"2.25.{int.from_bytes(self.rng.bytes(15), 'big') + 10**35}"

    def add(self, image: np.ndarray, series: str, title: str, description: str, number: int) -> None:
        path = f"jpeg/{series}/{self.rng.integers(1, 3)}-{number:03d}.jpg"
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        save(image, self.root / path)
        if self.rng.random() < NO_DESCRIPTION:
            description = ""
        dicom = f"CBIS-DDSM/dicom/{series}/1-{number:03d}.dcm"
        row = (dicom, f"CBIS-DDSM/{path}", title, description, series)
        self.images.append(dict(zip(DICOM_COLUMNS, row, strict=True)))

    def add_lesion(self, crop: np.ndarray, mask: np.ndarray, title: str) -> tuple[str, str]:
        """Crop and mask, most often in one series; returns their paths as the case tables write them.

        As in the published files neither the order nor the names tell which is which.
        """
        study, series = self.uid(), self.uid()
        mask_series = self.uid() if self.rng.random() < APART else series
        numbers = self.rng.choice(np.arange(1, 300), 2, replace=False)
        self.add(crop, series, title, "cropped images", numbers[0])
        self.add(mask, mask_series, title, "ROI mask images", numbers[1])
        first = self.rng.integers(2)
        folder = f"{title}/{study}"
        return f"{folder}/{series}/{first:06d}.dcm", f"{folder}/{mask_series}/{1 - first:06d}.dcm"


def write_case(root: Path, seed: int, size: int, job: tuple[str, str, int]) -> tuple[list[dict], list[dict]]:
    """Write the images of one patient; returns its rows of the case table and of dicom_info.csv."""
    kind, split, _ = job
    case = make_case(seed, *job)
    patient, side = case.patient, case.side
    rng = patient.stream(TABLE, 1)
    writer, name, film = CaseWriter(root, rng), f"P_{patient.number:05d}", full_frame(size)
    outcomes = []  # one for each finding, the same in both views
    for finding in case.findings:
        pathology = draw_pathology(patient, finding)
        outcomes.append((finding, pathology, draw_assessment(rng, finding, pathology)))
    rows = []
    for view in case.views:
        title = f"{kind.capitalize()}-{'Training' if split == 'train' else 'Test'}_{name}_{side}_{view}"
        series = writer.uid()
        full = draw_mammogram(patient, side, view, case.findings, film)
        writer.add(full, series, title, "full mammogram images", rng.integers(1, 300))
        full_path = f"{title}/{writer.uid()}/{series}/000000.dcm"
        for finding, pathology, assessment in outcomes:
            frame = crop_frame(patient, view, finding, size)
            crop = draw_mammogram(patient, side, view, case.findings, frame)
            mask = roi_mask(patient, side, view, finding, film)
            crop_path, mask_path = writer.add_lesion(crop, mask, f"{title}_{finding.index + 1}")
            if kind == "calc":  # the published tables carry a line break inside one path of every row
                crop_path += "\n"
            else:
                mask_path += "\n"
            row = (
                name,
                patient.density,
                side,
                view,
                finding.index + 1,
                ABNORMALITY[kind],
                finding.appearance.first,
                finding.appearance.second,
                assessment,
                pathology,
                finding.subtlety,
                full_path,
                crop_path,
                mask_path,
            )
            rows.append(dict(zip(CASE_COLUMNS[kind], row, strict=True)))
    return rows, writer.images


def plan_cases(seed: int, kind: str, split: str, lesions: int) -> list[tuple[str, str, int]]:
    """Jobs for the fewest patients that give at least `lesions` rows."""
    jobs, rows = [], 0
    while rows < lesions:
        case = make_case(seed, kind, split, len(jobs))
        jobs.append((kind, split, len(jobs)))
        rows += len(case.views) * len(case.findings)
    return jobs


def write_table(path: Path, columns: Iterable[str], rows: Iterable[dict], line_end: str = "\n") -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator=line_end)
        writer.writeheader()
        writer.writerows(rows)


def draw_all(
    root: Path, seed: int, size: int, pairs: list, cases: list, workers: int, progress: bool
) -> tuple[list[str], list[tuple[list[dict], list[dict]]]]:
    """Run the jobs of both parts; returns what write_roco_pair and write_case return, in the jobs' order."""
    bar = tqdm(total=len(pairs) + len(cases), desc="drawing SYNTHETIC phantoms", unit="patient", disable=not progress)
    pair, case = (
        partial(write, root / part, seed, size) for write, part in ((write_roco_pair, "roco"), (write_case, "cbis"))
    )

    def collect(results: Iterable) -> list:
        done = []
        for result in results:
            done.append(result)
            bar.update()
        return done

    with bar:
        if workers == 1:
            return collect(map(pair, pairs)), collect(map(case, cases))
        # Spawned, not forked: the caller may hold torch's threads.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            return collect(pool.map(pair, pairs, chunksize=64)), collect(pool.map(case, cases, chunksize=16))


def draw_world(root: Path, settings: dict, workers: int, progress: bool) -> dict[str, int]:
    """Draw both parts under an empty `root`; returns counts."""
    seed = settings["seed"]
    splits = {split: max(1, round(share * settings["pairs"])) for split, share in ROCO_SPLITS.items()}
    pairs = [(split, i) for split, n in splits.items() for i in range(n)]
    cases = [job for kind, split in TABLES for job in plan_cases(seed, kind, split, settings["lesions"][kind][split])]
    for split in splits:
        (root / "roco" / split / "radiology" / "images").mkdir(parents=True)
    tables = root / "cbis" / "csv"
    tables.mkdir(parents=True)
    lines, written = draw_all(root, seed, settings["size"], pairs, cases, workers, progress)

    counts = {f"ROCO {split} pairs": n for split, n in splits.items()}
    for split in splits:
        text = "".join(line for line, job in zip(lines, pairs, strict=True) if job[0] == split)
        (root / "roco" / split / "radiology" / "captions.txt").write_text(text, encoding="utf-8")
    for kind, split in TABLES:
        rows = [
            row for (found, _), job in zip(written, cases, strict=True) if job[:2] == (kind, split) for row in found
        ]
        write_table(tables / f"{kind}_case_description_{split}_set.csv", CASE_COLUMNS[kind], rows, "\r\n")
        counts[f"CBIS {kind} {split} lesions"] = len(rows)
    write_table(tables / "dicom_info.csv", DICOM_COLUMNS, [row for _, found in written for row in found])
    patients = [(f"P_{roco_number(*job):05d}", "roco", job[0]) for job in pairs]
    patients += [(f"P_{cbis_number(*job):05d}", f"cbis {job[0]}", job[1]) for job in cases]
    rows = [dict(zip(PATIENT_COLUMNS, patient, strict=True)) for patient in patients]
    write_table(root / "patients.csv", PATIENT_COLUMNS, rows)
    (root / "README.txt").write_text(README, encoding="utf-8")
    return counts


def make_demo(
    root: str | Path,
    seed: int = 0,
    pairs: int = 6000,
    lesions: dict[str, dict[str, int]] = LESIONS,
    size: int = 64,
    workers: int = 2,
    progress: bool = True,
) -> dict[str, int]:
    """Draw the SYNTHETIC world into `root`, or keep what an earlier call with the same settings drew there.

    Every image depends on (seed, part, split, index) alone, so `workers` changes nothing but the time.

    Args:
        root: folder that will hold roco/ and cbis/; absent, empty, or from a call with equal settings.
        pairs: training pairs of the ROCO part; validation and test get a tenth of it each.
        lesions: kind -> split -> rows of that case table, or a few more: a patient's rows stay together.
        size: pixels along the short side of every image; crops are square, full views 5/4 as high.
        workers: processes that draw.

    Returns:
        What was counted, for example {"ROCO train pairs": 6000, ..., "CBIS calc train lesions": 1546, ...}.

    Raises:
        ValueError: for a number below 1, a negative seed, or a root that holds something else.
    """
    root = Path(root)
    numbers = {"pairs": pairs, "size": size, "workers": workers, "seed + 1": seed + 1}
    numbers |= {f"lesions[{kind!r}][{split!r}]": lesions[kind][split] for kind, split in TABLES}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    settings = {"synthetic": True, "version": VERSION, "seed": seed, "pairs": pairs, "lesions": lesions, "size": size}
    manifest = root / "demo.json"
    if root.exists() and any(root.iterdir()):
        found = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
        if found.get("settings") != settings:
            what = f"was drawn with {found['settings']}, not {settings}" if found else "holds something else"
            raise ValueError(f"{root} {what}; name another folder or remove this one")
        print(f"keeping the SYNTHETIC phantoms in {root}")
        return found["counts"]

    unfinished = root.with_name(f".{root.name}.unfinished")  # renamed at the end: nothing half-drawn
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    counts = draw_world(unfinished, settings, workers, progress)
    text = json.dumps({"settings": settings, "counts": counts}, indent=2)
    (unfinished / manifest.name).write_text(text + "\n", encoding="utf-8")
    if root.exists():
        root.rmdir()
    os.replace(unfinished, root)
    print(f"SYNTHETIC phantoms in {root}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))
    return counts
