"""Samples per CPU second of one core: SLIP's input pipeline as published, ours, and other libraries'.

    pip install -r benchmarks/requirements.txt            for other libraries, left out by name where they are not
    python benchmarks/bench_data.py                       three kinds of images; about ten minutes
    python benchmarks/bench_data.py --samples 20 --draws 0

A sample is one JPEG from memory to three views of 224 pixels: one crop for image and text, two with SLIP's colour
operations. The methods take turns, sample by sample, in one process on one thread:

    published   Pillow, torchvision's first transforms, float32 out (Mu et al. 2021, section 3.2, and its code)
    all on CPU  what a worker of main.py does when it trains on a CPU, by simplejpeg where that is installed; uint8 out
    all on CPU, torch alone  the same views with the accelerator's code for colours, in batches of one
    crops only  what it does when it trains on a GPU, where the colours of the batch are changed; uint8 out
    torchvision v2          its second transforms, antialiased, on 8 bits; uint8 out
    albumentationsx         OpenCV's decoder and bilinear resizing, which is not antialiased; uint8 out
    albumentationsx, area   simplejpeg's decoder and OpenCV's averages over areas, which are; uint8 out
    kornia                  Pillow's decoder, crops without antialiasing; float32 out
    DALI                    its decoder and views on a CPU, antialiased, a pipeline of one image at a time; uint8 out

In the row `shrunk` ours reads the copy that make_dataset.py shrink --short-side 448 writes, the published method the
original. Before anything is timed, statistics of many views of the first two methods are compared by
Kolmogorov-Smirnov tests, beside the published method with itself; on smooth and on grainy images, because a blur that
is only nearly Pillow's shows on the latter.
"""

from __future__ import annotations

import argparse
import importlib
import io
import time
from collections.abc import Callable
from typing import Any

import common  # first: it finds the modules below
import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image, ImageFilter
from scipy.stats import ks_2samp
from torch import Tensor

from inputs.colour import Colours, apply_colour, apply_colour_batch
from inputs.images import _simplejpeg, decode_image, decode_pixels
from inputs.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess, ssl_pixels, train_pixels
from preparation.shrink import encode, shrink
from runtime.memory import keep_freed_memory

PREPROCESS = Preprocess(224)
KINDS = {  # width, height, colour or grey, short side of the shrunk copy
    "photo 640x480": (640, 480, "RGB", None),
    "photo 1024x1024": (1024, 1024, "RGB", None),
    "photo 1024x1024, shrunk": (1024, 1024, "RGB", 448),
    "radiograph 720x600": (720, 600, "L", None),
    "radiograph 720x600 stored in colour": (720, 600, "L as RGB", None),
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=300, help="timed samples of each kind and method")
    parser.add_argument("--draws", type=int, default=1500, help="views in each Kolmogorov-Smirnov test; 0: none")
    parser.add_argument("--images", type=int, default=12, help="different images of each kind")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG files")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def synthetic(width: int, height: int, grain: float, rng: np.random.Generator) -> Image.Image:
    """Smooth shapes of several scales in colour, edges, and `grain` levels of noise."""
    out = np.full((height, width, 3), 128.0)
    for scale, strength in ((160, 40), (40, 25), (10, 12)):
        for channel in range(3):
            small = rng.normal(0, strength, (height // scale + 3, width // scale + 3)).astype(np.float32)
            grown = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
            out[..., channel] += np.asarray(grown)
    y, x = np.mgrid[:height, :width]
    for _ in range(8):
        radius = rng.uniform(0.03, 0.2) * width
        disc = (x - rng.uniform(0, width)) ** 2 + (y - rng.uniform(0, height)) ** 2 < radius**2
        out[disc] += rng.normal(0, 30, 3)
    out += rng.normal(0, grain, (height, width, 1))
    return Image.fromarray(out.clip(0, 255).astype(np.uint8))


def files(kind: str, n: int, quality: int, seed: int, grain: float = 4.0) -> list[tuple[bytes, bytes]]:
    """n images: the JPEG as it came, which the published method reads, and the file that ours reads."""
    width, height, colour, short_side = KINDS[kind]
    rng, out = np.random.default_rng(seed), []
    for _ in range(n):
        img = synthetic(width, height, grain, rng)
        if colour != "RGB":
            img = img.convert("L")
        if colour == "L as RGB":
            img = img.convert("RGB")
        buffer = io.BytesIO()
        img.save(buffer, "JPEG", quality=quality)
        whole = buffer.getvalue()
        small = shrink(decode_image(whole, "a sample"), short_side) if short_side else None
        out.append((whole, encode(small, "JPEG") if small else whole))
    return out


# ------------------------------------------------------------------------------------------------ methods
def blur(img: Image.Image) -> Image.Image:
    return img.filter(ImageFilter.GaussianBlur(radius=np.random.uniform(0.1, 2.0)))


NORMALIZE = [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
TRAIN: Any = T.Compose([T.RandomResizedCrop(224, scale=(0.5, 1.0)), *NORMALIZE])
SSL: Any = T.Compose(
    [
        T.RandomResizedCrop(224, scale=(0.08, 1.0)),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.RandomApply([blur], p=0.5),
        T.RandomHorizontalFlip(),
        *NORMALIZE,
    ]
)


def published(data: bytes, _rng: np.random.Generator) -> list[Tensor]:
    img = Image.open(io.BytesIO(data)).convert("RGB")
    return [TRAIN(img), SSL(img), SSL(img)]


def crops_only(data: bytes, rng: np.random.Generator) -> list:
    pixels = PREPROCESS.pixels(decode_pixels(data, "a sample"))
    return [
        train_pixels(PREPROCESS, pixels, rng),
        ssl_pixels(PREPROCESS, pixels, rng),
        ssl_pixels(PREPROCESS, pixels, rng),
    ]


def all_on_cpu(data: bytes, rng: np.random.Generator) -> list[Tensor]:
    first, *crops = crops_only(data, rng)
    return [first, *(torch.from_numpy(apply_colour(crop.numpy(), colour).copy()) for crop, colour in crops)]


def one_implementation(data: bytes, rng: np.random.Generator) -> list[Tensor]:
    """`all on CPU` without NumPy: each view as a batch of one goes through what the accelerator runs."""
    first, *crops = crops_only(data, rng)
    return [
        first,
        *(apply_colour_batch(crop.expand(3, -1, -1)[None], Colours.of([colour]))[0] for crop, colour in crops),
    ]


METHODS: dict[str, Callable] = {
    "published": published,
    "all on CPU": all_on_cpu,
    "all on CPU, torch alone": one_implementation,
    "crops only": crops_only,
}


def torchvision_v2() -> Callable:
    """SLIP's views by torchvision's second transforms."""
    import torchvision.transforms.v2 as V

    jitter, blurred = V.ColorJitter(0.4, 0.4, 0.4, 0.1), V.GaussianBlur(9, (0.1, 2.0))
    ssl: Any = V.Compose([
        V.RandomResizedCrop(224, scale=(0.08, 1.0), antialias=True), V.RandomApply([jitter], p=0.8),
        V.RandomGrayscale(p=0.2), V.RandomApply([blurred], p=0.5), V.RandomHorizontalFlip(),
    ])  # fmt: skip
    train: Any = V.RandomResizedCrop(224, scale=(0.5, 1.0), antialias=True)

    def views(data: bytes, _rng: np.random.Generator) -> list[Tensor]:
        img = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
        return [train(img), ssl(img), ssl(img)]

    return views


def albumentations(area: bool) -> Callable:
    """SLIP's views by albumentationsx, with its fastest resizing or with one that averages."""
    import albumentations as A  # pyright: ignore[reportMissingImports]
    import cv2  # pyright: ignore[reportMissingImports]
    import simplejpeg  # pyright: ignore[reportMissingImports]

    cv2.setNumThreads(1)
    how: Any = {"area_for_downscale": "image"} if area else {}
    jitter = [(0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1)]
    ssl = A.Compose([
        A.RandomResizedCrop((224, 224), scale=(0.08, 1.0), **how), A.ColorJitter(*jitter, p=0.8),
        A.ToGray(p=0.2), A.GaussianBlur(sigma_range=(0.1, 2.0), p=0.5), A.HorizontalFlip(p=0.5),
    ])  # fmt: skip
    train = A.Compose([A.RandomResizedCrop((224, 224), scale=(0.5, 1.0), **how)])

    def views(data: bytes, _rng: np.random.Generator) -> list[np.ndarray]:
        if area:
            img = simplejpeg.decode_jpeg(data, "RGB")
        else:
            img = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        return [t(image=img)["image"] for t in (train, ssl, ssl)]

    return views


def kornia() -> Callable:
    """SLIP's views by kornia, which takes floats."""
    import kornia.augmentation as K  # pyright: ignore[reportMissingImports]

    ssl = torch.nn.Sequential(
        K.RandomResizedCrop((224, 224), scale=(0.08, 1.0)), K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2), K.RandomGaussianBlur((9, 9), (0.1, 2.0), p=0.5), K.RandomHorizontalFlip(),
    )  # fmt: skip
    train = K.RandomResizedCrop((224, 224), scale=(0.5, 1.0))

    def views(data: bytes, _rng: np.random.Generator) -> list[Tensor]:
        img = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
        img = img.float().div_(255)[None]
        return [train(img)[0], ssl(img)[0], ssl(img)[0]]

    return views


def dali() -> Callable:
    """SLIP's views by DALI without a GPU."""
    library: Any = importlib.import_module("nvidia.dali")
    fn, types = library.fn, library.types

    def uniform(low: float, high: float) -> Any:
        return fn.random.uniform(range=(low, high))

    def chance(probability: float) -> Any:
        return fn.random.coin_flip(probability=probability, dtype=types.BOOL)

    def ssl(img: Any) -> Any:
        view = fn.random_resized_crop(img, size=(224, 224), random_area=(0.08, 1.0))
        if chance(0.8):
            view = fn.color_twist(view, brightness=uniform(0.6, 1.4), contrast=uniform(0.6, 1.4),
                                  saturation=uniform(0.6, 1.4), hue=uniform(-36, 36))  # fmt: skip
        if chance(0.2):
            view = fn.hsv(view, saturation=0.0)
        if chance(0.5):
            view = fn.gaussian_blur(view, sigma=uniform(0.1, 2.0), window_size=9)
        return fn.flip(view, horizontal=fn.random.coin_flip())

    @library.pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, enable_conditionals=True)
    def three_views() -> Any:
        img = fn.decoders.image(fn.external_source(name="jpeg", no_copy=True), output_type=types.RGB)
        return fn.random_resized_crop(img, size=(224, 224), random_area=(0.5, 1.0)), ssl(img), ssl(img)

    pipeline = three_views()
    pipeline.build()

    def views(data: bytes, _rng: np.random.Generator) -> list[np.ndarray]:
        pipeline.feed_input("jpeg", [np.frombuffer(data, np.uint8)])
        return [view.as_array()[0] for view in pipeline.run()]

    return views


PEERS = {
    "torchvision v2": torchvision_v2,
    "albumentationsx": lambda: albumentations(False),
    "albumentationsx, area": lambda: albumentations(True),
    "kornia": kornia,
    "DALI": dali,
}


def all_methods() -> dict[str, Callable]:
    """With the other libraries that are there."""
    found = dict(METHODS)
    for name, make in PEERS.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return found


# ------------------------------------------------------------------------------------------------- checks
def statistics(view: Tensor) -> list[float]:
    """Of one normalised view: mean and std of each channel, high-frequency energy, tilt."""
    grey = view.mean(0)
    tilt = torch.linspace(-1, 1, view.shape[-1])
    return [
        *view.mean((1, 2)).tolist(),
        *view.std((1, 2)).tolist(),
        grey.diff(dim=0).square().mean().item(),
        grey.diff(n=2, dim=1).square().mean().item(),
        (grey * tilt).mean().item(),
    ]


def p_value(a: np.ndarray, b: np.ndarray) -> float:
    result: Any = ks_2samp(a, b, method="asymp")
    return result.pvalue


def compare(data: bytes, draws: int, seed: int) -> dict[str, float]:
    """Least p-value over the statistics: the published SSL view with itself, and with ours, for one image."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    img, pixels = Image.open(io.BytesIO(data)).convert("RGB"), PREPROCESS.pixels(decode_pixels(data, "a sample"))

    def ours(i: int) -> Tensor:
        crop, colour = ssl_pixels(PREPROCESS, pixels, np.random.default_rng((seed, i)))
        return PREPROCESS.normalise(torch.from_numpy(apply_colour(crop.numpy(), colour).copy()))

    first, again = (np.array([statistics(SSL(img)) for _ in range(draws)]) for _ in range(2))
    mine = np.array([statistics(ours(i)) for i in range(draws)])
    return {
        name: min(p_value(a, b) for a, b in zip(first.T, other.T, strict=True))
        for name, other in (("control", again), ("ours", mine))
    }


def shrunk_difference(n: int, quality: int, seed: int) -> dict[str, float]:
    """What training on a shrunk copy changes: high-frequency energy of each kind of view, relative to the original."""
    energy = {"train": [0.0, 0.0], "ssl": [0.0, 0.0]}
    for pair in files("photo 1024x1024, shrunk", n, quality, seed):
        for which, data in enumerate(pair):
            rng = np.random.default_rng(seed)  # the same parts of both
            for _ in range(20):
                first, (second, _colour), _third = crops_only(data, rng)
                energy["train"][which] += PREPROCESS.normalise(first).diff(dim=1).square().mean().item()
                energy["ssl"][which] += PREPROCESS.normalise(second).diff(dim=1).square().mean().item()
    return {name: small / whole for name, (whole, small) in energy.items()}


def measure(methods: dict[str, Callable], data: list[tuple[bytes, bytes]], samples: int, seed: int) -> dict[str, float]:
    """CPU seconds a sample of each method, as the mean over `samples` turns."""
    seconds: dict[str, list] = {name: [] for name in methods}
    for i in range(-3, samples):  # the first turns are for warming up
        for name, method in methods.items():
            whole, read = data[i % len(data)]
            rng = np.random.default_rng((seed, i + 3))
            start = time.process_time()
            method(read if name in METHODS and method is not published else whole, rng)
            if i >= 0:
                seconds[name].append(time.process_time() - start)
    return {name: float(np.mean(values)) for name, values in seconds.items()}


def main(argv: list[str] | None = None) -> dict:
    args = get_args_parser().parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()  # as every script does, and the workers of its loader
    decoder = "simplejpeg" if _simplejpeg() else "Pillow"
    peers = ("pillow", "simplejpeg", "albumentationsx", "opencv-python-headless", "kornia", "nvidia-dali-cuda130")
    where = common.describe(torch.device("cpu"), args.samples, *peers).replace("runs, median", "samples, mean")
    print(f"{where}; ours decodes by {decoder}")
    out: dict = {"rows": {}, "p": {}}
    if args.draws:
        for title, grain in (("smooth", 0.0), ("grainy", 25.0)):
            p = compare(files("photo 640x480", 1, args.quality, args.seed, grain)[0][0], args.draws, args.seed)
            out["p"][title] = p
            print(
                f"{title} image, {args.draws} SSL views, least p of nine statistics: published with itself "
                f"{p['control']:.3f}, with ours {p['ours']:.3f}"
            )
    out["shrunk_energy"] = shrunk_difference(args.images, args.quality, args.seed)
    print(
        "high-frequency energy of views of a shrunk copy, relative to the original: "
        + ", ".join(f"{name} {value:.2f}" for name, value in out["shrunk_energy"].items())
    )
    methods = all_methods()
    print(f"{'samples per CPU second':<36} " + " ".join(f"{name:>24}" for name in methods))
    for kind in KINDS:
        seconds = measure(methods, files(kind, args.images, args.quality, args.seed), args.samples, args.seed)
        out["rows"][kind] = {
            name: {"per_second": 1 / s, "ratio": seconds["published"] / s} for name, s in seconds.items()
        }
        print(
            f"{kind:<36} "
            + " ".join(f"{row['per_second']:16.1f} {row['ratio']:6.2f}x" for row in out["rows"][kind].values()),
            flush=True,
        )
    return out


if __name__ == "__main__":
    main()
