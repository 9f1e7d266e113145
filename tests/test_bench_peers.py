"""The step beside open_clip's: both are given the same weights and captions, and one that differs is noticed."""

import bench_peers
import pytest
import torch

pytestmark = pytest.mark.slow


def test_both_steps_compute_the_same_before_they_are_timed(monkeypatch):
    argv = ["--cpu", "--models", "CLIP_VITT16", "--batch-size", "4", "--runs", "1"]
    (row,) = bench_peers.main(argv)
    assert row["difference"] < 1e-4 and row["ours"] > 0 and row["open_clip"] > 0 and 5 < row["tokens"] < 77

    def other_weights(self, *args, _real=bench_peers.OpenClip.__init__):
        _real(self, *args)
        with torch.no_grad():
            next(self.model.visual.parameters()).mul_(1.5)

    monkeypatch.setattr(bench_peers.OpenClip, "__init__", other_weights)
    with pytest.raises(RuntimeError, match="CLIP_VITT16 and open_clip's differ by"):
        bench_peers.main(argv)
