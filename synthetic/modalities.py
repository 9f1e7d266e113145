"""X-ray-, CT- and MR-like images with captions, which give the caption filters something to filter."""

from __future__ import annotations

import math

import numpy as np

from synthetic.phantoms import pick
from synthetic.scene import blur, logistic, to_uint8


class Canvas:
    """A square image in coordinates -1 to 1 (y down), painted over with soft-edged shapes."""

    def __init__(self, size: int, off: np.ndarray):
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
        """Blend `value` in by `cover` (H, W), 0 to 1."""
        self.image = self.image + cover * (value - self.image)


def chest_xray(rng: np.random.Generator, canvas: Canvas) -> str:
    """Draw a chest radiograph; returns its finding in words."""
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
        y, radius = rng.uniform(-0.4, 0.2), rng.uniform(0.07, 0.12)
        canvas.ellipse(y, 0.5 * side, radius, radius, 0.65, soft=0.2)
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
    """Draw a radiograph of a long bone; returns its finding in words."""
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
    """Draw a slice of the abdomen; returns its finding in words."""
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
    """Draw a slice of the head; returns its finding in words."""
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
        b, a = rng.uniform(0.1, 0.2, 2)
        canvas.ellipse(y, 0.35 * side, b, a, 0.78, soft=0.2)
        return f"a hyperdense haematoma in the {where} hemisphere"
    if finding == "infarct":
        canvas.ellipse(y, 0.42 * side, 0.26, 0.18, 0.34, soft=0.4)
        return f"a hypodense area in the {where} cerebral hemisphere"
    return "dilated lateral ventricles" if finding == "ventricles" else "no abnormal density"


def brain_mr(rng: np.random.Generator, canvas: Canvas) -> str:
    """Draw a slice of the brain; returns its finding in words."""
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
    """Draw a slice of the spine; returns its finding in words."""
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


OTHER_IMAGES = (  # weight, draw, how captions name the image
    (3, chest_xray, ("Chest x-ray", "Posteroanterior chest radiograph", "Plain chest radiograph", "CXR")),
    (2, bone_xray, ("Plain radiograph", "Anteroposterior X-ray", "AP radiograph of the limb", "X-ray image")),
    (2, abdomen_ct, ("Axial CT of the abdomen", "Enhanced computed tomography", "Abdominal CT scan")),
    (2, head_ct, ("Axial CT of the head", "Non-contrast brain CT", "Cranial computed tomography")),
    (2, brain_mr, ("Axial MRI of the brain", "Brain magnetic resonance imaging", "Axial MR image")),
    (1, spine_mr, ("Sagittal MRI of the spine", "Sagittal magnetic resonance image", "Spinal MR image")),
)


def draw_other(rng: np.random.Generator, size: int) -> tuple[np.ndarray, str]:
    """An image of another modality, uint8 (size, size), and its caption."""
    weights = np.array([weight for weight, _, _ in OTHER_IMAGES], dtype=np.float64)
    _, draw, names = OTHER_IMAGES[rng.choice(len(OTHER_IMAGES), p=weights / weights.sum())]
    canvas = Canvas(size, off=rng.uniform(-0.08, 0.08, 2))  # patients lie a little off centre
    found = draw(rng, canvas)
    mottle = blur(rng.standard_normal((size, size)), 1.2)
    image = canvas.image * (1.0 + 0.12 * mottle) + 0.012 * rng.standard_normal((size, size))
    links = (" showing {}.", " demonstrates {}.", ": {}.", " reveals {}.", " shows {}.")
    return to_uint8(rng.uniform(0.85, 1.1) * image), pick(rng, names) + pick(rng, links).format(found)
