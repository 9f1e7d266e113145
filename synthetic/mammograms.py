"""Mammogram-like images of a phantom patient: calcifications and masses after their BI-RADS descriptors, in a breast.

A breast is one fixed scene in millimetres and a `Frame` is a window on it, so a lesion's crop and the full view
show the same tissue at different pixel sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from synthetic.phantoms import GEOMETRY, GRAIN, SIDES, TISSUE, VIEWS, Finding, Patient
from synthetic.scene import Frame, deposit, logistic, power_law, to_uint8, turn

FULL_MM = (160.0, 128.0)  # height, width of the film that a full view shows

# ---------------------------------------------------------------------------------------------------------------------
# Calcifications: every grain is a set of points with an area and an opacity
# ---------------------------------------------------------------------------------------------------------------------

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
    """Bent rods, k marks each; places (n, 2), the rest (n,), bends as fractions of the length."""
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
    start, length, widths, angle = (np.concatenate(pair) for pair in zip(trunks, twigs, strict=True))
    points, area = rods(rng, start, length, widths, angle, rng.uniform(-0.1, 0.1, n + int(fork.sum())))
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


# ---------------------------------------------------------------------------------------------------------------------
# Masses
# ---------------------------------------------------------------------------------------------------------------------

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


# ---------------------------------------------------------------------------------------------------------------------
# The breast
# ---------------------------------------------------------------------------------------------------------------------


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
    across = finding.upper if view == "MLO" else finding.outer  # both point to the top of the film
    return middle - across * half * math.sqrt(0.8**2 - finding.depth**2), finding.depth * patient.depth


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
