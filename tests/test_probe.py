"""What is kept of a fitted layer, and the fractions of the labels; whole runs are in test_main_linear.py."""

from types import SimpleNamespace

import numpy as np
import pytest

import main_linear
from distributed import Processes
from evaluation.features import Loading
from evaluation.heads import Choice, Linear, load_heads
from evaluation.probe import Fitting, Fractions, Probe
from inputs.transforms import Preprocess


def probe_in(folder, rank=0) -> Probe:
    tower = SimpleNamespace(features="backbone", preprocess=Preprocess(size=32), source={"pretrained": "a.pt"})
    loading = Loading(processes=Processes(rank=rank, world_size=2))
    return Probe("own", tower, loading, folder, {"weights_sha256": "ab12"}, {})


def layers(number: int) -> list[Linear]:
    rng = np.random.default_rng(number)
    return [Linear(*(rng.normal(size=size) for size in (3, 3, (3, 2), 2))) for _ in range(number)]


@pytest.mark.parametrize("number", [1, 3])
def test_the_first_layer_knows_the_training_images_and_all_are_kept(tmp_path, number):
    heads, features = layers(number), np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    probe_in(tmp_path).keep_heads(heads, features, ("a", "b"), findings=["mass"])
    kept, about = load_heads(tmp_path / "head.safetensors")
    assert [one.bias.tolist() for one in kept] == [head.bias.tolist() for head in heads]
    assert kept[0].distance(features) == pytest.approx(heads[0].knowing(features).distance(features))
    assert all(one.distance(features) is None for one in kept[1:])
    assert about == {
        "classes": ["a", "b"], "features": "backbone", "preprocess": Preprocess(size=32).to_dict(),
        "weights_sha256": "ab12", "tower": {"pretrained": "a.pt"}, "operating_point": None, "precision": "fp32",
        "findings": ["mass"], "heads": number,
    }  # fmt: skip


def test_without_features_there_is_no_distance_and_without_classes_none_are_named(tmp_path):
    probe_in(tmp_path).keep_heads(layers(1), None, None)
    (kept,), about = load_heads(tmp_path / "head.safetensors")
    assert kept.axes is None and about["classes"] is None


def test_nothing_is_kept_of_no_layer_and_by_no_other_process(tmp_path):
    probe_in(tmp_path).keep_heads([], None, None)
    probe_in(tmp_path, rank=1).keep_heads(layers(1), None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_fraction_is_above_0_and_at_most_1():
    assert Fractions([0.01, 1]).wanted == [0.01, 1]
    for wrong in (0, -0.5, 1.01, 2):
        with pytest.raises(ValueError, match=f"--fraction {wrong}: .*above 0 and at most 1"):
            Fractions([0.5, wrong])


def test_what_nobody_asks_for_is_what_the_command_line_does_by_itself():
    args = main_linear.get_args_parser().parse_args([])
    assert Fitting() == Fitting(args.protocol, args.class_weights, args.folds, seed=0)
    assert Choice(np.mean) == Choice(np.mean, args.class_weights, None, args.folds, "patient", seed=0)
    assert Fractions() == Fractions(args.fraction or (), args.fraction_seeds)
