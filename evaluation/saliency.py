"""Where a probe's malignant score comes from, on whole mammograms, against the radiologist's outline.

Maps come from captum: Grad-CAM (Selvaraju et al. 2017) at the last convolutional layer, gradient times activation at
the last layer of a Swin tower and before the last attention of a ViT. Where the tower's feature is the mean over the
layer's places, the map says what each place adds to the score beside the average training image. Maps are scored by the
pointing game (Zhang et al. 2018: is the highest value inside the outline?) and by the fraction of their energy inside
it, against what a flat map would score. A map that hardly changes when the tower's weights are drawn anew (Adebayo et
al. 2018) shows the image, not the model: the same scores of such a tower stand beside.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import models
from evaluation import metrics
from evaluation.features import Backbone
from evaluation.heads import Linear
from evaluation.probe import fitted_probe
from evaluation.resamples import Drawn, effective_number
from inputs import cbis
from inputs.images import UnreadableImage, read_image

INSIDE = 0.5  # of a mask's pixel that the view has mixed from inside and outside


@dataclass(frozen=True)
class Explained:
    """One lesion: the view (H, W) from 0 to 1, the outline as a mask (H, W), and maps (H, W) that sum to 1."""

    lesion: str
    patient: str
    view: np.ndarray
    mask: np.ndarray
    heat: np.ndarray
    heat_random: np.ndarray  # of the tower with weights drawn anew

    @property
    def chance(self) -> float:
        """The outline's fraction of the view: what a flat map scores."""
        return float(self.mask.mean())


class Explainer:
    """Saliency of one class of a probe: images (B, 3, H, W) to maps (B, H, W), each of them of sum 1 (0 if empty).

    A fine-tuned classifier is a backbone whose features are its logits, under `identity_head`.
    """

    def __init__(self, backbone: Backbone, head: Linear, target: int):
        self.backbone, self.target = backbone, target
        keys = ("mean", "scale", "weight", "bias")
        device = next(backbone.model.parameters(), torch.empty(0)).device
        self.head = {key: torch.as_tensor(getattr(head, key), dtype=torch.float32, device=device) for key in keys}
        tower: Any = getattr(backbone.model, "visual", backbone.model)
        self.layer = spatial_layer(tower)

    def score(self, images: Tensor) -> Tensor:
        """The class's logit (B,)."""
        features = self.backbone.encode(images)  # (B, d)
        logits = (features - self.head["mean"]) / self.head["scale"] @ self.head["weight"]  # (B, k)
        return logits[:, self.target] + self.head["bias"][self.target]

    def __call__(self, images: Tensor) -> np.ndarray:
        """Images (B, 3, H, W) to maps (B, H, W); ImportError without captum."""
        try:
            from captum.attr import LayerGradCam, LayerGradientXActivation
        except ImportError as error:
            raise ImportError("saliency needs captum: pip install captum") from error
        images = images.detach().clone().requires_grad_()
        if self.layer.kind == "convolution":
            heat: Any = LayerGradCam(self.score, self.layer.module).attribute(images)  # (B, 1, h, w)
        else:
            product: Any = LayerGradientXActivation(self.score, self.layer.module).attribute(images)
            heat = self.layer.grid(product, images.shape[-2:])[:, None]
        heat = F.relu(self.beside_the_average(heat.detach(), images))
        heat = F.interpolate(heat, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        total = heat.sum((1, 2), keepdim=True)
        return (heat / total.clamp(min=1e-12)).cpu().numpy()

    @torch.no_grad()
    def beside_the_average(self, heat: Tensor, images: Tensor) -> Tensor:
        """Maps (B, 1, h, w) less what each place of the average training image adds, where that is known.

        That is where a map adds up to the weights times the features, because these are means over the places. Else
        many a map would be empty: the score of an image may be below zero in all places and still above the average.
        """
        weight = self.head["weight"][:, self.target] / self.head["scale"]  # (d,)
        whole, added = self.backbone.encode(images) @ weight, heat.sum((1, 2, 3))  # (B,)
        if not torch.allclose(whole, added, rtol=1e-3, atol=1e-4 * float(whole.abs().max())):
            return heat
        return heat - self.head["mean"] @ weight / heat[0].numel()


def identity_head(classes: int) -> Linear:
    """Logits as they are."""
    zeros, ones = np.zeros(classes, np.float32), np.ones(classes, np.float32)
    return Linear(zeros, ones, np.eye(classes, dtype=np.float32), zeros)


@dataclass(frozen=True)
class SpatialLayer:
    """A layer whose output still has places, and how these lie in it."""

    module: nn.Module
    kind: str  # convolution (B, C, h, w), channels_last (B, h, w, C) or tokens (B, n + h * w, C)
    prefix: int = 0  # tokens that are no place

    def grid(self, product: Tensor, shape: Sequence[int]) -> Tensor:
        """Gradient times activation, summed over channels: (B, h, w), of the proportions of an image (H, W)."""
        heat = product.sum(-1)
        if self.kind == "channels_last":
            return heat
        heat = heat[:, self.prefix :]
        places, wanted = heat.shape[1], math.log(shape[0] / shape[1])
        heights = [h for h in range(1, places + 1) if places % h == 0]
        height = min(heights, key=lambda h: abs(math.log(h * h / places) - wanted))
        return heat.reshape(-1, height, places // height)


def spatial_layer(tower: nn.Module) -> SpatialLayer:
    """The layer of a tower that is explained; ValueError for one of another kind."""
    named: dict[str, Any] = dict(tower.named_modules())
    blocks = [name for name in named if name.split(".")[-2:-1] == ["blocks"] and hasattr(named[name], "attn")]
    prefix = next((module.num_prefix_tokens for module in named.values() if hasattr(module, "num_prefix_tokens")), None)
    if blocks and prefix is not None:
        return SpatialLayer(named[blocks[-1]].norm1, "tokens", int(prefix))
    if "conv_head" in named and isinstance(named.get("bn2"), nn.Module):  # timm's EfficientNets
        return SpatialLayer(named["bn2"], "convolution")
    if "layers" in named and isinstance(named.get("norm"), nn.LayerNorm):  # timm's Swin, over (B, h, w, C)
        return SpatialLayer(named["norm"], "channels_last")
    if "encoder.layers" in named and "layernorm" in named:  # Hugging Face's Swin, whose feature is the mean of these
        return SpatialLayer(named["layernorm"], "tokens")
    for stages, kind in (("layers", "channels_last"), ("layer4", "convolution"), ("stages", "convolution"),
                         ("blocks", "convolution")):  # fmt: skip
        found = [module for name, module in named.items() if name.split(".")[-1] == stages]
        if found and isinstance(found[-1], nn.Sequential):
            return SpatialLayer(found[-1] if kind == "convolution" else found[-1][-1], kind)
    raise ValueError(f"{type(tower).__name__} has no layer that saliency knows: a ViT, Swin, ResNet or ConvNeXt has")


def explain(
    lesions: Sequence[dict[str, str]], root: Path, backbone: Backbone, head: Linear, seed: int = 0, batch: int = 8
) -> list[Explained]:
    """Maps of the lesions that have a full image and a mask; unreadable ones are left out."""
    target = cbis.CBIS_CLASSES.index(metrics.MALIGNANT)
    fresh = models.rebuilt(backbone.model, seed + 1).eval().requires_grad_(False)
    encode = fresh.encode_image if backbone.features == "projection" else fresh.visual
    random = Backbone(encode, fresh, backbone.preprocess, backbone.features, "drawn anew")
    # The average image's features are known of the model alone; they change no gradient.
    of_random = replace(head, mean=np.zeros_like(head.mean))
    explainers = Explainer(backbone, head, target), Explainer(random, of_random, target)
    views = [(row, *found) for row in lesions if (found := view_and_mask(row, root, backbone)) is not None]
    explained = []
    for start in range(0, len(views), batch):
        part = views[start : start + batch]
        images = torch.stack([view for _, view, _ in part])
        heats = [explainer(images.clone()) for explainer in explainers]
        for i, (row, view, mask) in enumerate(part):
            heat, heat_random = heats[0][i], heats[1][i]
            explained.append(Explained(row["lesion"], row["patient"], grey_view(view), mask, heat, heat_random))
    return explained


def view_and_mask(row: dict[str, str], root: Path, backbone: Backbone) -> tuple[Tensor, np.ndarray] | None:
    """The model's view (3, H, W) of the full mammogram and the outline as it lies in that view (H, W).

    The mask's file differs from the mammogram's by some pixels in places: it is first brought to its size, then through
    the same view. Where padding surrounds the image, the mask has none there.
    """
    from inputs.transforms import eval_view

    if not row.get("full") or not row.get("mask"):
        return None
    try:
        full, mask = read_image(root / row["full"]), read_image(root / row["mask"])
    except (UnreadableImage, FileNotFoundError):
        return None
    mask = mask.resize(full.size, Image.Resampling.NEAREST)
    view = eval_view(backbone.preprocess)
    black, white = (view(Image.new("RGB", full.size, colour), None) for colour in ("black", "white"))
    span = (white - black).abs().amax(0)  # 0 in padding
    inside = ((view(mask, None) - black).abs().amax(0) / span.clamp(min=1e-6) > INSIDE) & (span > 1e-3)
    return (view(full, None), inside.numpy()) if inside.any() else None


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def pointing(heat: np.ndarray, mask: np.ndarray) -> float:
    """1 where the highest value lies inside; several highest ones count by their fraction."""
    highest = heat == heat.max()
    return float(mask[highest].mean())


def energy_inside(heat: np.ndarray, mask: np.ndarray) -> float:
    """The fraction of a map inside the mask; the mask's own where the map is empty."""
    total = heat.sum()
    return float(heat[mask].sum() / total) if total > 0 else float(mask.mean())


PROPORTIONS = ("pointing", "pointing_random_weights", "empty")  # of maps, each yes or no


def score_maps(explained: Sequence[Explained], resamples: int = 2000, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Means over lesions with 95% intervals over resampled patients; ValueError where there is no lesion.

    pointing and energy of the model, of the tower drawn anew, and of chance; energy above chance, paired; the rank
    correlation of the model's maps with those of the tower drawn anew; and the fraction of maps that are empty, which
    score as chance.
    """
    if not explained:
        raise ValueError("no lesion has a full image and a mask that can be read")
    values: dict[str, list[float]] = {
        "pointing": [pointing(e.heat, e.mask) for e in explained],
        "pointing_random_weights": [pointing(e.heat_random, e.mask) for e in explained],
        "energy_inside": [energy_inside(e.heat, e.mask) for e in explained],
        "energy_inside_random_weights": [energy_inside(e.heat_random, e.mask) for e in explained],
        "chance": [e.chance for e in explained],
        "empty": [float(e.heat.max() <= 0) for e in explained],
        "rank_correlation_with_random_weights": [_correlation(e.heat, e.heat_random) for e in explained],
    }
    values["pointing_minus_chance"] = (np.array(values["pointing"]) - values["chance"]).tolist()
    values["energy_minus_chance"] = (np.array(values["energy_inside"]) - values["chance"]).tolist()
    names, place = np.unique([e.patient for e in explained], return_inverse=True)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)[:, place]  # (R, n)
    found = {}
    for name, each in values.items():
        draws = weights @ np.array(each) / weights.sum(1)
        of = effective_number(place) if name in PROPORTIONS else 0.0
        drawn = Drawn(float(np.mean(each)), draws, of, "one patient" if len(names) == 1 else "")
        found[name] = drawn.interval().plain()
    return found


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    from scipy.stats import spearmanr

    found: Any = spearmanr(a[::4, ::4].ravel(), b[::4, ::4].ravel())
    return float(found.statistic)


def grey_view(view: Tensor) -> np.ndarray:
    """A normalised view (3, H, W) as grey from 0 to 1, (H, W), over its own range."""
    grey = view.mean(0).numpy()
    return (grey - grey.min()) / max(float(np.ptp(grey)), 1e-12)


def overlay(view: np.ndarray, heat: np.ndarray, mask: np.ndarray | None = None) -> Image.Image:
    """A view (H, W) from 0 to 1 with its map (H, W) in red and an outline in cyan."""
    grey = np.repeat((255 * view[..., None]).astype(np.float32), 3, axis=2)
    heat = heat / max(float(heat.max()), 1e-12)
    share = MAP_SHARE * heat[..., None]
    shown = grey * (1 - share) + np.array(MAP_COLOUR, dtype=np.float32) * share
    if mask is not None:
        inner = mask.copy()
        inner[1:-1, 1:-1] = mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:] & mask[1:-1, 1:-1]
        shown[mask & ~inner] = (60, 220, 255)
    return Image.fromarray(shown.clip(0, 255).astype(np.uint8))


MAP_COLOUR, MAP_SHARE = (255.0, 60.0, 20.0), 0.6  # of the map's highest value; how much of it covers the image there


def source_of(view: Any, size: tuple[int, int]) -> np.ndarray:
    """Where a view's places lie in the image: (2, 2), rows x and y, source = row[0] * place + row[1], both in pixels.

    A view may resize, squash, pad and cut, but neither turn nor bend. Ramps from black to white are sent through it:
    what is left of one at a place says from where in the image the place comes.

    Args:
        view: an image to (3, H, W).
        size: of the image, width and height.
    """
    width, height = size
    black, white = (view(Image.new("RGB", size, colour), None).mean(0).numpy() for colour in ("black", "white"))
    span = white - black  # 0 in padding
    found = np.zeros((2, 2))
    seen = np.abs(span) > 1e-3
    for axis, length in ((0, width), (1, height)):
        number = seen.sum(axis)
        places = np.flatnonzero(number)  # columns for x, rows for y
        start, stop = 0.0, float(length)
        for _ in range(2):  # the second ramp is over what the view keeps: 256 levels of all are coarse there
            ramp = ((np.arange(length) + 0.5 - start) / (stop - start)).clip(0, 1)
            grey = np.rint(255 * ramp).astype(np.uint8)
            grey = np.tile(grey, (height, 1)) if axis == 0 else np.tile(grey[:, None], (1, width))
            part = view(Image.fromarray(grey).convert("RGB"), None).mean(0).numpy() - black
            part = np.where(seen, part, 0.0).sum(axis)[places] / np.where(seen, span, 0.0).sum(axis)[places]
            inner = (part > 0.02) & (part < 0.98)  # a resize bends a ramp at its ends
            if inner.sum() < 2 or np.ptp(part[inner]) == 0:  # one place, or one pixel, knows no scale: the whole length
                found[axis] = length / len(places), -places[0] * length / len(places)
                break
            scale, offset = np.polyfit(places[inner] + 0.5, part[inner], 1)
            found[axis] = scale * (stop - start), offset * (stop - start) + start
            ends = found[axis, 0] * np.array([places[0], places[-1] + 1.0]) + found[axis, 1]
            start, stop = ends.clip(0, length) + np.array([-1.0, 1.0])
    return found


def on_image(heat: np.ndarray, view: Any, image: Image.Image, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A view's map (H, W) where it lies in the image, at `size` (w, h): (h, w), and which of it the view saw (h, w)."""
    (ax, bx), (ay, by) = source_of(view, image.size)
    sx, sy = image.width / size[0], image.height / size[1]
    place = (sx / ax, 0, -bx / ax, 0, sy / ay, -by / ay)  # from a pixel of the result to one of the view
    shown = Image.fromarray(heat.astype(np.float32)).transform(
        size, Image.Transform.AFFINE, place, Image.Resampling.BILINEAR
    )
    x, y = (np.arange(size[0]) + 0.5) * place[0] + place[2], (np.arange(size[1]) + 0.5) * place[4] + place[5]
    seen = ((0 <= y) & (y <= heat.shape[0]))[:, None] & ((0 <= x) & (x <= heat.shape[1]))
    return np.asarray(shown) * seen, seen


def beside_original(image: Image.Image, heat: np.ndarray, view: Any, title: str, side: int = 512) -> Image.Image:
    """The image, it with its map (H, W) of the view in the same proportions, and the scale; `title` says of what class.

    What the view cut off is dark, with a frame around what it saw.
    """
    import matplotlib  # for its font: a third of a second that only who wants maps should wait

    scale = side / max(image.size)
    width, height = (max(1, round(scale * length)) for length in image.size)
    shown = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    heat, seen = on_image(heat, view, image, (width, height))
    grey = np.asarray(shown.convert("L"), np.float32) / 255
    marked = overlay(np.where(seen, grey, 0.35 * grey), heat)
    gap, head, bar = 16, 64, 18
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 15)
    note = "Outside the frame: cut off, not seen by the model" if not seen.all() else ""
    texts = [title, "red: what speaks for it; scale: share of this map's highest value", note]
    wide = max(2 * width + 3 * gap + 70, *(round(font.getlength(text)) + gap for text in texts))
    page = Image.new("RGB", (wide, height + head + gap + 20 * bool(note)), "white")
    draw = ImageDraw.Draw(page)
    for i, text in enumerate(texts[:2]):
        draw.text((gap // 2, 8 + 26 * i), text, "black", font)
    if note:
        draw.text((gap // 2, head + height + 10), note, "black", font)
    left = gap // 2 + width + gap
    page.paste(shown, (gap // 2, head))
    page.paste(marked, (left, head))
    if note:
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        draw.rectangle((left + int(columns[0]), head + int(rows[0]), left + int(columns[-1]), head + int(rows[-1])),
                       outline="white")  # fmt: skip
    ramp = np.repeat(np.linspace(1, 0, height, dtype=np.float32)[:, None], bar, 1)  # over a mid grey
    page.paste(overlay(np.full_like(ramp, 0.5), ramp), (left + width + gap, head))
    for place, text in ((0.0, "100%"), (0.5, "50%"), (1.0, "0%")):
        draw.text((left + width + gap + bar + 4, head + place * (height - 18)), text, "black", font)
    return page


def plate(explained: Explained, side: int = 220) -> str:
    """The view with its map and the outline, `side` pixels high, as a data URI."""
    img = overlay(explained.view, explained.heat, explained.mask)
    img = img.resize((round(side * img.width / img.height), side), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    img.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def explain_run(
    folder: Path, rows: Sequence[dict[str, str]], root: Path, most: int, named: Sequence[str] = ()
) -> tuple[list[Explained], list[Explained]]:
    """Maps by the probe in `folder`; ValueError where it kept no head.

    Returns:
        up to `most` cancers of the test table, drawn by lot; and the lesions in `named`, in their order.
    """
    if not (folder / "head.safetensors").is_file():
        raise ValueError(f"{folder} has no head.safetensors: probe again")
    probe = fitted_probe(folder)
    head, backbone = probe.heads[0], probe.backbone
    cancers = [row for row in rows if row["split"] == "test" and row["pathology"] == metrics.MALIGNANT]
    order = np.random.default_rng(0).permutation(len(cancers))[:most]
    drawn = [cancers[i] for i in sorted(order)]
    by_name = {row["lesion"]: row for row in cancers}
    also = [by_name[name] for name in named if name in by_name]
    found = {e.lesion: e for e in explain([*drawn, *(row for row in also if row not in drawn)], root, backbone, head)}
    sample, others = ([found[row["lesion"]] for row in part if row["lesion"] in found] for part in (drawn, also))
    return sample, others
