"""A 12-bit mammogram of 4,000 x 3,000 pixels, from its DICOM file to a view of 512 pixels, beside other decoders.

    pip install -r benchmarks/requirements.txt
    python benchmarks/bench_dicom.py                five kinds of files; two minutes

The image is drawn: a breast of several textures with noise, on a dark ground with less of it, and a window. Methods
take turns, file by file, on one thread; the memory is the peak over the start of a fresh process that reads one file.

    ours        read_image and the evaluation view: pydicom, and imagecodecs where it decodes
    pydicom     the same without imagecodecs: pydicom's decoders, pylibjpeg's where they are installed
    dicomsdl, SimpleITK     their stored values, then what ours does with them

Before anything is timed, the views of all methods are compared: they are equal, or the method is left out by name.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from PIL import Image

from inputs import codecs
from inputs.depth import levels_of, window_to_8bit
from inputs.images import read_image
from inputs.transforms import Preprocess, eval_view
from runtime.memory import keep_freed_memory

WINDOW = 2048.0, 2400.0
KINDS = {  # transfer syntax, and imagecodecs' encoder
    "raw": ("1.2.840.10008.1.2.1", None),
    "JPEG Lossless": ("1.2.840.10008.1.2.4.70", "ljpeg_encode"),
    "JPEG-LS": ("1.2.840.10008.1.2.4.80", "jpegls_encode"),
    "HTJ2K": ("1.2.840.10008.1.2.4.201", "htj2k_encode"),
    "RLE": ("1.2.840.10008.1.2.5", "rle"),
}
VIEW = eval_view(Preprocess(512))


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="timed turns of each method")
    parser.add_argument("--size", type=int, nargs=2, default=(4000, 3000), help="rows and columns")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "FILE"), help=argparse.SUPPRESS)  # a fresh process
    return parser


def mammogram(rows: int, columns: int) -> np.ndarray:
    """Drawn values of 12 bits, (rows, columns) uint16."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    breast = (x / (0.75 * columns)) ** 2 + ((y - rows / 2) / (0.45 * rows)) ** 2 < 1
    values = 1800 + rng.normal(0, 12, (rows, columns)).astype(np.float32)
    for scale, strength in ((300, 300), (60, 150), (12, 60)):
        small = rng.normal(0, strength, (rows // scale + 3, columns // scale + 3)).astype(np.float32)
        values += np.asarray(Image.fromarray(small).resize((columns, rows), Image.Resampling.BICUBIC))
    return np.where(breast, values, rng.normal(30, 3, (rows, columns))).clip(0, 4095).astype(np.uint16)


def write(path: Path, values: np.ndarray, syntax: str, encoder: str | None) -> None:
    """A digital mammogram for presentation, with its window."""
    import imagecodecs
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID, DigitalMammographyXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = DigitalMammographyXRayImageStorageForPresentation, generate_uid()
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.WindowCenter, dataset.WindowWidth = (str(int(value)) for value in WINDOW)
    dataset.PixelData = values.tobytes()
    if encoder == "rle":
        dataset.compress(syntax)
    elif encoder:
        options = {"bitspersample": 12} if encoder == "ljpeg_encode" else {}
        dataset.file_meta.TransferSyntaxUID = UID(syntax)
        dataset.PixelData = encapsulate([getattr(imagecodecs, encoder)(values, **options)])
        dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=True)


def ours(path: str) -> torch.Tensor:
    return VIEW(read_image(path, grey=True), None)


def without_imagecodecs(path: str) -> torch.Tensor:
    found, codecs.CODECS = codecs.CODECS, {}
    try:
        return ours(path)
    finally:
        codecs.CODECS = found


def view_of(values: np.ndarray) -> torch.Tensor:
    """Stored values (H, W) as ours shows them."""
    levels = levels_of(values)
    assert levels is not None
    return VIEW(Image.fromarray(levels.spread(levels.range, window_to_8bit(levels.range, *WINDOW))), None)


def by_dicomsdl(path: str) -> torch.Tensor:
    dicomsdl: Any = import_module("dicomsdl")
    return view_of(dicomsdl.open(path).pixelData(storedvalue=True))


def by_simpleitk(path: str) -> torch.Tensor:
    import SimpleITK  # pyright: ignore[reportMissingImports]

    return view_of(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))[0])


METHODS: dict[str, Callable[[str], torch.Tensor]] = {
    "ours": ours, "pydicom": without_imagecodecs, "dicomsdl": by_dicomsdl, "SimpleITK": by_simpleitk,
}  # fmt: skip


def in_a_fresh_process(method: str, path: Path) -> float:
    """MiB over the start that one reading takes."""
    command = [sys.executable, __file__, "--one", method, str(path)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(path: Path, runs: int) -> dict[str, dict[str, float]]:
    """Milliseconds of CPU time (median) and MiB of each method that reads the file as ours does."""
    expected, able = ours(str(path)), {}
    for name, method in METHODS.items():
        try:
            same = torch.equal(method(str(path)), expected)
        except Exception as error:  # of any kind: a kind of file that a peer does not read, or the peer is absent
            print(f"  {name}: {str(error).splitlines()[0][:100]}")
            continue
        if same:
            able[name] = method
        else:
            print(f"  {name}: another view, left out")
    seconds: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(runs):
        for name, method in able.items():
            start = time.process_time()
            method(str(path))
            seconds[name].append(time.process_time() - start)
    return {name: {"ms": 1000 * common.median(values), "MiB": in_a_fresh_process(name, path)}
            for name, values in seconds.items()}  # fmt: skip


def main(argv: list[str] | None = None) -> dict:
    args = get_args_parser().parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()  # as every script does, and the workers of its loader
    if args.one:
        method, path = args.one
        before = common.memory_now(torch.device("cpu"))
        METHODS[method](path)
        print((common.peak_memory(torch.device("cpu")) - before) / 2**20)
        return {}
    peers = ("pydicom", "imagecodecs", "pylibjpeg", "dicomsdl", "SimpleITK")
    print(common.describe(torch.device("cpu"), args.runs, *peers), "of CPU time")
    values, out = mammogram(*args.size), {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, (syntax, encoder) in KINDS.items():
            path = Path(folder) / "a.dcm"
            write(path, values, syntax, encoder)
            out[kind] = rows = measure(path, args.runs)
            print(
                f"{kind:14}" + "".join(f"  {n} {r['ms']:.0f} ms, {r['MiB']:.0f} MiB" for n, r in rows.items()),
                flush=True,
            )
    return out


if __name__ == "__main__":
    main()
