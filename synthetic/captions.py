"""Captions of mammograms. They name what is seen, never what it turned out to be or how it was assessed."""

from __future__ import annotations

import numpy as np

from synthetic.mammograms import FAINT
from synthetic.phantoms import Finding, Patient, pick

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


def article(phrase: str) -> str:
    """The phrase with its indefinite article."""
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
