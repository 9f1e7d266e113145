"""Saliency: scores by hand, maps of known models, the mask's place in the view, and the report's section."""

import cbis_tree
import numpy as np
import pytest
import torch
from model_helpers import write_checkpoint
from PIL import Image
from torch import nn

import main_linear
import make_report
from evaluation import saliency
from evaluation.features import Backbone, load_backbone
from evaluation.heads import Linear
from inputs.transforms import Preprocess
from preparation.cbis_tables import make_cbis
from reporting import lesions

pytest.importorskip("captum")


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
        ("swin_tiny_patch4_window7_224", 224, "channels_last"),
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


@pytest.mark.parametrize("mask_size", [(120, 200), (121, 198)])
@pytest.mark.parametrize("prepare", ["slip", "medclip"])
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
