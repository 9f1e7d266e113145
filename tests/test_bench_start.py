import bench_start
import pytest


@pytest.mark.slow
def test_first_answers_are_those_of_the_other_libraries():
    pytest.importorskip("open_clip")
    found = bench_start.main(["--runs", "1", "--model", "CLIP_VITT16"])
    assert max(found["apart"].values()) < 1e-5 and found["predict.py zero-shot"]["s"] > 0
