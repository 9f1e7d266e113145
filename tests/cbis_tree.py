"""CBIS-DDSM in its published layouts with tiny images: the four case tables, the series folders, the lists.

Images are named so that neither order nor prefix helps: in half of the series the mask comes first.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("BENIGN", "BENIGN_WITHOUT_CALLBACK", "MALIGNANT")
DESCRIPTIONS = {"crop": "cropped images", "full": "full mammogram images", "mask": "ROI mask images"}
TABLES = {
    (kind, split): f"{kind}_case_description_{split}_set.csv"
    for kind in ("calc", "mass")
    for split in ("train", "test")
}
DESCRIPTORS = {"calc": ("calc type", "calc distribution"), "mass": ("mass shape", "mass margins")}
# Column that carries a line break before its closing quote in every published row.
BROKEN_PATH = {"calc": "cropped image file path", "mass": "ROI mask file path"}


def write_case_table(root: Path, kind: str, split: str, lesions: list[tuple], apart: int = 0) -> Path:
    """Lesions are (patient, side, view, abnormality, pathology); the last `apart` keep crop and mask apart."""
    density = "breast density" if kind == "calc" else "breast_density"
    header = [
        "patient_id",
        density,
        "left or right breast",
        "image view",
        "abnormality id",
        "abnormality type",
    ]
    header += [*DESCRIPTORS[kind], "assessment", "pathology", "subtlety"]
    header += ["image file path", "cropped image file path", "ROI mask file path"]
    lines = [",".join(header)]
    for number, (patient, side, view, abnormality, pathology) in enumerate(lesions):
        case = f"{kind.capitalize()}-{'Training' if split == 'train' else 'Test'}_{patient}_{side}_{view}"
        uid = f"1.3.6.1.4.1.9590.100.1.2.{7 if kind == 'calc' else 8}{split == 'test':d}{number:06d}"
        mask_uid = f"{uid}4" if number >= len(lesions) - apart else f"{uid}3"
        view_uid = f"1.3.6.{lesions.index((patient, side, view, 1, pathology))}{uid[-8:-6]}"
        paths = {
            "image file path": f"{case}/{view_uid}1/{view_uid}2/000000.dcm",
            "cropped image file path": f"{case}_{abnormality}/{uid}2/{uid}3/000001.dcm",
            "ROI mask file path": f"{case}_{abnormality}/{uid}2/{mask_uid}/000000.dcm",
        }
        paths[BROKEN_PATH[kind]] = f'"{paths[BROKEN_PATH[kind]]}\n"'
        cells = [
            patient,
            "0",
            side,
            view,
            str(abnormality),
            kind,
            "N/A",
            "N/A",
            "4",
            pathology,
            "3",
            *paths.values(),
        ]
        lines.append(",".join(cells))
    path = root / "csv" / TABLES[kind, split]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\r\n".join(lines) + "\r\n").encode())
    return path


def make_lesions(patients: int, first: int = 1) -> list[tuple]:
    """Two views a patient, every third patient with a second abnormality; the three pathologies in turn."""
    rows = []
    for number in range(patients):
        side, pathology = ("LEFT", "RIGHT")[number % 2], CLASSES[number % 3]
        for view in ("CC", "MLO"):
            for abnormality in range(1, 2 + (number % 3 == 0)):
                rows.append((f"P_{first + number:05d}", side, view, abnormality, pathology))
    return rows


def read_case_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return [{k: v.strip() for k, v in row.items()} for row in csv.DictReader(file)]


def crop_image(rng: np.random.Generator, label: int = 0, size: int = 24) -> np.ndarray:
    """Grey noise whose brightness tells the class, so that a probe has something to find."""
    return rng.normal(60 + 50 * label, 25, (size, size)).clip(0, 255).astype(np.uint8)


def mask_image(rng: np.random.Generator, size: int = 48) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    x, y = rng.integers(4, size - 20, 2)
    mask[y : y + 16, x : x + 16] = 255
    return mask


def write_images(
    root: Path,
    save: Callable[[Path, np.ndarray, str], None],
    folder: Callable[[str, str, str], Path],
    file_name: str,
) -> dict[Path, str]:
    """An image for each path of the case tables; returns path relative to the root -> description.

    `folder(case, study, series)` places a series, `file_name` formats the number within its folder.
    """
    written, done = {}, set()
    for (kind, split), name in TABLES.items():
        for number, row in enumerate(read_case_table(root / "csv" / name)):
            rng = np.random.default_rng((len(kind + split), number))
            images = {
                "full": ("image file path", mask_image(rng) // 2 + 60),
                "crop": ("cropped image file path", crop_image(rng, CLASSES.index(row["pathology"]))),
                "mask": ("ROI mask file path", mask_image(rng)),
            }
            for image in ("full", "crop", "mask") if number % 2 else ("full", "mask", "crop"):
                column, pixels = images[image]
                case, study, series, _ = row[column].split("/")
                if (series, image) in done:  # lesions of one view share its full image
                    continue
                done.add((series, image))
                target = root / folder(case, study, series)
                target.mkdir(parents=True, exist_ok=True)
                target /= file_name.format(len(list(target.iterdir())) + 1)
                save(target, pixels, DESCRIPTIONS[image])
                written[target.relative_to(root)] = DESCRIPTIONS[image]
    return written


def make_jpeg_edition(root: Path, undescribed: float = 0.2) -> dict[Path, str]:
    """jpeg/ and csv/dicom_info.csv under a root that holds the case tables; returns path -> description.

    A share of the rows has no SeriesDescription, as hundreds of the published ones.
    """

    def save(path: Path, pixels: np.ndarray, description: str) -> None:
        Image.fromarray(pixels).save(path, quality=90)

    written = write_images(root, save, lambda case, study, series: Path("jpeg", series), "1-{:03d}.jpg")
    rng = np.random.default_rng(0)
    with open(root / "csv" / "dicom_info.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_path", "image_path", "PatientID", "SeriesDescription", "SeriesInstanceUID"])
        for path, description in written.items():
            shown = "" if rng.random() < undescribed else description
            dicom = f"CBIS-DDSM/dicom/{path.parts[1]}/{path.stem}.dcm"
            writer.writerow([dicom, f"CBIS-DDSM/{path.as_posix()}", "", shown, path.parts[1]])
    return written


def make_dicom_edition(root: Path, by_uid: bool = True) -> dict[Path, str]:
    """CBIS-DDSM/<case>/<study>/<series>/1-1.dcm (16 bit) and metadata.csv; returns path -> description.

    Newer downloads name study and series folders by date and description (`by_uid` False), which leaves
    metadata.csv as the only link; it describes a series once, whatever it holds.
    """

    def folder(case: str, study: str, series: str) -> Path:
        names = (study, series) if by_uid else (f"08-29-2017-DDSM-NA-{study[-5:]}", f"1.000000-NA-{series[-9:]}")
        folders[series] = Path("CBIS-DDSM", case, *names)
        return folders[series]

    folders: dict[str, Path] = {}
    written = write_images(root, save_dicom, folder, "1-{}.dcm")
    with open(root / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Series UID", "Collection", "Series Description", "Number of Images", "File Location"])
        for series, path in folders.items():
            writer.writerow([series, "CBIS-DDSM", "ROI mask images", 1, ".\\" + str(path).replace("/", "\\")])
    return written


def save_dicom(path: Path, pixels: np.ndarray, description: str) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.SeriesDescription = description
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "MONOCHROME2", 1
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    dataset.PixelData = (pixels.astype(np.uint16) * 257).tobytes()
    dataset.save_as(path, enforce_file_format=True)


def copy_published_tables(root: Path, source: Path) -> None:
    """The real case tables into the JPEG edition's place."""
    (root / "csv").mkdir(parents=True, exist_ok=True)
    for name in TABLES.values():
        shutil.copy(source / name, root / "csv" / name)


def make_small_cbis(root: Path, train: int = 40, test: int = 20) -> dict[Path, str]:
    """All four tables and the JPEG edition: `train` and `test` patients of each type, none in two tables."""
    for i, kind in enumerate(("calc", "mass")):
        write_case_table(root, kind, "train", make_lesions(train, 1 + 2000 * i), apart=3)
        write_case_table(root, kind, "test", make_lesions(test, 1001 + 2000 * i), apart=1)
    return make_jpeg_edition(root)
