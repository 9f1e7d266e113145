"""Vectors of three libraries are compared before bench_features.py times them, and one that differs is noticed."""

import bench_features
import pytest
import torch

pytestmark = pytest.mark.slow


def test_features_are_those_of_the_other_libraries(monkeypatch):
    pytest.importorskip("open_clip")
    monkeypatch.setattr(bench_features, "keep_freed_memory", lambda: None)  # of this process
    argv = ["--runs", "1", "--model", "CLIP_VITT16", "--batch-size", "2"]
    found = bench_features.main(argv)
    assert set(found) == {"ours", "open_clip", "onnxruntime", "ours, linear layers alone"}

    def others(name, folder, _real=bench_features.methods):
        ways, tower = _real(name, folder)
        return {**ways, "open_clip": lambda pixels: -ways["open_clip"](pixels)}, tower

    monkeypatch.setattr(bench_features, "methods", others)
    with pytest.raises(RuntimeError, match="CLIP_VITT16: the vectors of open_clip differ by"):
        bench_features.main(argv)


def test_the_products_are_each_linear_layer_once_on_what_comes_into_it(monkeypatch):
    tower = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 2))
    pixels, given, linear = torch.randn(3, 4), [], torch.nn.functional.linear
    run = bench_features.products(tower, pixels)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *how: given.append(x) or linear(x, *how))
    run(pixels)
    assert len(given) == 2 and torch.equal(given[0], pixels) and torch.equal(given[1], tower[:2](pixels))
