"""A small tree in ROCO v1's layout, with images whose content goes with their caption."""

from pathlib import Path

import numpy as np
from PIL import Image

KINDS = {
    "Mammogram showing a round mass": 40,
    "Chest radiograph, posteroanterior view": 100,
    "Axial CT of the abdomen": 160,
    "Sagittal MRI of the knee": 220,
}


def make_roco(root: Path, train: int = 24, validation: int = 8, size: int = 40) -> Path:
    rng = np.random.default_rng(0)
    number = 0
    for split, n in (("train", train), ("validation", validation), ("test", 4)):
        folder = root / split / "radiology"
        (folder / "images").mkdir(parents=True)
        lines = []
        for i in range(n):
            number += 1
            text, grey = list(KINDS.items())[i % len(KINDS)]
            pixels = np.clip(grey + rng.normal(0, 20, (size, size + 8)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).convert("RGB").save(folder / "images" / f"ROCO_{number:05d}.jpg")
            lines.append(f"ROCO_{number:05d}\t {text}, case {number}.\n")
        (folder / "captions.txt").write_text("".join(lines), encoding="utf8")
    return root
