"""torch.hub.load on a checkout, as another project calls it: from elsewhere, in a process of its own."""

import inspect
import subprocess
import sys

import evaluation_helpers
import numpy as np
import pytest
from helpers import ROOT, environment
from PIL import Image

import hubconf
import models

CALLS = """
import sys
import numpy as np
import torch
model = torch.hub.load(sys.argv[1], "medslip", "checkpoint.pt", source="local")
found = {
    "images": model.embed_images(["a.png"]),
    "captions": model.embed_captions(["a mammogram", "a chest"]),
    "shares": model.zero_shot(["a.png"], ["benign", "malignant"], ["a {} mass"]),
}
np.savez("found.npz", **found)
"""


@pytest.fixture
def project(tmp_path):
    """Another project's folder, with an image and weights."""
    evaluation_helpers.write_checkpoint(tmp_path / "checkpoint.pt")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path


def load_there(project, *before):
    command = [sys.executable, "-c", "\n".join([*before, CALLS]), str(ROOT)]
    return subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True)


def test_it_gives_what_load_pretrained_gives(project):
    done = load_there(project)
    assert done.returncode == 0, done.stderr
    found = np.load(project / "found.npz")
    model = models.load_pretrained(project / "checkpoint.pt")
    np.testing.assert_array_equal(found["images"], model.embed_images([str(project / "a.png")]))
    np.testing.assert_array_equal(found["captions"], model.embed_captions(["a mammogram", "a chest"]))
    shares = model.zero_shot([str(project / "a.png")], ["benign", "malignant"], ["a {} mass"])
    np.testing.assert_array_equal(found["shares"], shares)


def test_a_module_of_the_same_name_is_one_clear_error(project):
    (project / "models.py").write_text("")
    done = load_there(project, "import models")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: MedSLIP's models.py is hidden by ")


def test_its_options_are_those_of_load_pretrained():
    """Named in the docstring, which torch.hub.help shows."""
    names = [name for name in inspect.signature(models.load_pretrained).parameters if name != "path"]
    assert f"options: {', '.join(names)}." in inspect.getdoc(hubconf.medslip)
