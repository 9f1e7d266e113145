"""Saliency: scores by hand, maps of known models, the mask's place in the view, and the report's section."""

from functools import partial

import cbis_tree
import numpy as np
import pytest
import torch
from model_helpers import write_checkpoint
from PIL import Image
from torch import nn

import main_linear
import make_report
from beit_finetuning.views import EvalView
from evaluation import saliency
from evaluation.features import Backbone, load_backbone
from evaluation.heads import Linear
from inputs.transforms import Preprocess, eval_view, linear_eval_view
from preparation.cbis_tables import make_cbis
from reporting import lesions

pytest.importorskip("captum")


@pytest.mark.parametrize("size", [(300, 500), (640, 200), (90, 90), (33, 47)])
@pytest.mark.parametrize("prepare", ["slip", "medclip", "cover", "squash", "fit"])
@pytest.mark.parametrize("view_of", [eval_view, lambda p: partial(linear_eval_view, p), EvalView])
def test_a_place_of_a_view_is_found_in_the_image(view_of, prepare, size):
    """A bright square in the image, wherever the view has brought it, is led back to where it was."""
    preprocess = Preprocess(size=(96, 64), prepare=prepare, **({"fill": 128} if prepare == "fit" else {}))
    view, (width, height) = view_of(preprocess), size
    x, y, half = width // 2 + min(size) // 12, height // 2 - min(size) // 12, max(3, min(size) // 24)
    dark = np.zeros((height, width, 3), np.uint8)
    bright = dark.copy()
    bright[y - half : y + half, x - half : x + half] = 255
    seen = (view(Image.fromarray(bright), None) - view(Image.fromarray(dark), None)).mean(0).numpy().clip(0)
    rows, columns = np.indices(seen.shape) + 0.5
    (ax, bx), (ay, by) = saliency.source_of(view, size)
    found = ax * (columns * seen).sum() / seen.sum() + bx, ay * (rows * seen).sum() / seen.sum() + by
    assert np.allclose(found, (x, y), atol=1.0), (found, (x, y))
    heat, inside = saliency.on_image(seen, view, Image.fromarray(bright), size)
    assert heat.shape == inside.shape == (height, width) and heat[y, x] > 0.5 * heat.max()
    cut = prepare in ("slip", "cover")  # of an image of other proportions than the view's
    assert inside.all() == (not cut) or inside.mean() > 0.8


def test_the_picture_of_a_map_has_the_images_own_proportions_beside_the_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 100, 3), dtype=np.uint8))
    view, heat = eval_view(Preprocess(size=64)), np.zeros((64, 64), np.float32)
    heat[16, 48] = 1.0  # the upper right quarter of the centre, which is all that the view sees
    page = np.asarray(saliency.beside_original(image, heat, view, "malignant: 83.1%", side=400), dtype=int)
    original, marked = page[64:464, 8:208], page[64:464, 224:424]
    expected = np.asarray(image.resize((200, 400), Image.Resampling.BICUBIC), dtype=int)
    assert np.array_equal(original, expected)
    red = marked[..., 0] - marked[..., 2]
    place = np.unravel_index(red.argmax(), red.shape)
    assert np.allclose(place, (100 + 200 * 16.5 / 64, 200 * 48.5 / 64), atol=4)
    assert marked[:90].mean() < 0.5 * marked[110:290].mean()  # what was cut off is dark
    named, other = (saliency.beside_original(image, heat, view, name, side=400) for name in ("benign", "malignant"))
    assert np.any(np.asarray(named)[:30] != np.asarray(other)[:30])  # the class stands there
    bar = page[64:464, 440:458]
    assert bar[0, 0, 0] - bar[0, 0, 2] > 100 and np.ptp(bar[-1, 0]) < 4


def test_scores_by_hand():
    heat = np.array([[0.0, 0.5], [0.25, 0.25]])
    mask = np.array([[False, True], [True, False]])
    assert saliency.pointing(heat, mask) == 1 and saliency.pointing(heat, ~mask) == 0
    assert saliency.energy_inside(heat, mask) == 0.75
    assert saliency.energy_inside(0 * heat, mask) == 0.5 and saliency.pointing(0 * heat, mask) == 0.5


class Bright(nn.Module):
    """A ResNet whose last stage passes the image's brightness on, and whose feature is its mean."""

    def __init__(self):
        super().__init__()
        self.layer4 = nn.Sequential(nn.AvgPool2d(4))

    def forward(self, images):
        return self.layer4(images).mean((2, 3))


def test_grad_cam_of_a_model_that_sums_brightness_is_the_brightness():
    tower = Bright()
    model = nn.Module()
    model.visual = tower
    backbone = Backbone(tower, model, Preprocess(), "backbone", "bright")
    head = Linear(np.zeros(3), np.ones(3), np.array([[0, 0, 1.0]] * 3), np.zeros(3))
    images = torch.rand(2, 3, 32, 32)
    heat = saliency.Explainer(backbone, head, 2)(images.clone())
    small = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)
    expected = torch.nn.functional.interpolate(small, (32, 32), mode="bilinear")[:, 0]
    expected = expected / expected.sum((1, 2), keepdim=True)
    assert np.allclose(heat, expected.numpy(), atol=1e-6)
    other = Linear(np.zeros(3), np.ones(3), np.array([[0, 0, -1.0]] * 3), np.zeros(3))
    assert saliency.Explainer(backbone, other, 2)(images.clone()).max() == 0  # darkness speaks for it, no place does


def test_a_map_says_what_each_place_adds_beside_the_average_image():
    """Of a model whose feature is the mean brightness: where the image is darker or brighter than the average one."""
    tower, model = Bright(), nn.Module()
    model.visual = tower
    backbone = Backbone(tower, model, Preprocess(), "backbone", "bright")
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    small = torch.nn.functional.avg_pool2d(images.sum(1, keepdim=True), 4)
    for sign in (1, -1):  # the negative weight's score is below zero in every place, the map is not empty
        head = Linear(np.full(3, 0.5), np.full(3, 2.0), np.array([[0, 0, sign]] * 3), np.zeros(3))
        expected = torch.relu(sign * (small - 1.5))
        expected = torch.nn.functional.interpolate(expected, (32, 32), mode="bilinear")[:, 0]
        heat = saliency.Explainer(backbone, head, 2)(images)
        assert np.allclose(heat, expected / expected.sum(), atol=1e-6)


@pytest.mark.parametrize(
    "tower, size, kind",
    [
        ("vit_tiny_patch16_224", 64, "tokens"),
        pytest.param("swin_tiny_patch4_window7_224", 224, "channels_last", marks=pytest.mark.slow),
        ("resnet18", 64, "convolution"),
        ("convnext_atto", 64, "convolution"),
        ("tf_efficientnet_lite0", 64, "convolution"),
    ],
)
def test_each_kind_of_tower_has_a_map_over_the_whole_view(tower, size, kind):
    backbone = load_backbone("", arch=tower, size=size)
    width = backbone.width()
    rng = np.random.default_rng(0)
    head = Linear(np.zeros(width), np.ones(width), rng.random((width, 3)), np.zeros(3))
    explainer = saliency.Explainer(backbone, head, 2)
    assert explainer.layer.kind == kind
    heat = explainer(torch.rand(3, 3, size, size))
    assert heat.shape == (3, size, size) and (heat >= 0).all()
    assert all(total == pytest.approx(1, abs=1e-4) or total == 0 for total in heat.sum((1, 2))) and heat.sum() > 0


def test_a_tower_without_places_is_refused():
    with pytest.raises(ValueError, match="no layer that saliency knows"):
        saliency.spatial_layer(nn.Linear(3, 3))


@pytest.mark.parametrize("prepare, mask_size", [
    ("slip", (120, 200)), ("slip", (121, 198)), ("medclip", (121, 198)),
    pytest.param("medclip", (120, 200), marks=pytest.mark.slow),
])  # fmt: skip
def test_the_outline_lies_in_the_view_where_the_lesion_does(tmp_path, mask_size, prepare):
    """A bright square in a black mammogram, whose mask has other dimensions by some pixels."""
    full, mask = np.zeros((200, 120), np.uint8), np.zeros(mask_size[::-1], np.uint8)
    full[80:120, 40:80] = 200
    mask[80:120, 40:80] = 255
    Image.fromarray(full).save(tmp_path / "full.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    backbone = load_backbone("", model="MEDSLIP_RESNET" if prepare == "medclip" else None, arch="resnet18", size=96)
    found = saliency.view_and_mask({"full": "full.png", "mask": "mask.png"}, tmp_path, backbone)
    assert found is not None
    view, inside = found
    bright = view.mean(0).numpy()
    bright = bright > (bright.min() + bright.max()) / 2
    overlap = (bright & inside).sum() / (bright | inside).sum()
    assert overlap > 0.85
    assert saliency.view_and_mask({"full": "none.png", "mask": "mask.png"}, tmp_path, backbone) is None


def test_maps_that_all_point_inside_are_no_certainty():
    heat = np.zeros((8, 8))
    heat[4, 4] = 1
    explained = [saliency.Explained(f"L{i}", f"P{i // 2}", heat, heat > 0, heat, heat) for i in range(8)]
    found = saliency.score_maps(explained, resamples=50)
    assert (found["pointing"]["low"], found["pointing"]["high"]) == (pytest.approx(0.025 ** (1 / 4)), 1)  # 4 patients
    assert found["empty"]["low"] == 0 and found["empty"]["high"] == pytest.approx(1 - 0.025 ** (1 / 4))
    assert found["energy_inside"] == {"value": 1, "low": None, "high": None, "why": "the resamples do not vary"}
    assert saliency.score_maps(explained[:2])["empty"]["why"] == "one patient"


def test_intervals_are_over_patients_and_the_report_shows_them(tmp_path):
    root = tmp_path / "cbis"
    cbis_tree.make_small_cbis(root)
    make_cbis(root)
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pt", "vit")
    run = tmp_path / "runs" / "calc"
    main_linear.main([
        "--dataset", "cbis_calc", "--root", str(root), "--pretrained", str(checkpoint), "-j", "0", "--resamples", "50",
        "--output-dir", str(run),
    ])  # fmt: skip
    page = make_report.main([str(run), "--output-dir", str(tmp_path / "report"), "--saliency", "5"])
    found = page["sections"][0]["saliency"]
    assert found["why"] == "" and found["lesions"] == 5
    assert [len(group["images"]) for group in found["plates"]] == [6, 5, 5]
    scores = dict(found["scores"])
    assert set(scores) == set(lesions.SALIENCY.values())
    html = (tmp_path / "report" / "report.html").read_text()
    assert scores["Energy inside the outline"] in html
    (run / "predictions.csv").unlink()  # what prevents the maps is told, the page is made
    page = make_report.main([str(run), "--output-dir", str(tmp_path / "report"), "--saliency", "5"])
    assert "predictions.csv" in page["sections"][0]["saliency"]["why"]
    (run / "head.safetensors").unlink()
    page = make_report.main([str(run), "--output-dir", str(tmp_path / "report"), "--saliency", "5"])
    assert "head.safetensors" in page["sections"][0]["saliency"]["why"]
