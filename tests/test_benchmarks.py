"""Benchmarks on tiny settings: that they run, compare equal things, and count what they say. Never how fast."""

import sys

import bench_step
import numpy as np
import pytest
import torch
from helpers import load_script

import distributed
from inputs import sources

SMALL = [
    "--image-size",
    "64",
    "--ssl-mlp-dim",
    "16",
    "--ssl-emb-dim",
    "8",
    "--override",
    "text_width=32",
    "text_heads=2",
    "text_layers=2",
]
VIT = ["vision.patch_size=16", "vision.embed_dim=32", "vision.depth=2", "vision.num_heads=2"]
SWIN = ["vision.embed_dim=12", "vision.depths=[1,1]", "vision.num_heads=[2,2]"]
CASES = [("SLIP_VITT16", VIT), ("MEDSLIP_VIT", SWIN), ("MEDSLIP_RESNET", [])]


def steps(name, extra):
    flags, device = bench_step.training_flags(name, [*SMALL, *extra]), torch.device("cpu")
    return bench_step.Ours(flags, device), bench_step.Plain(flags, device)


@pytest.mark.parametrize("name, extra", [*CASES[:2], pytest.param(*CASES[2], marks=pytest.mark.slow)])
def test_the_two_steps_compute_the_same(name, extra):
    ours, plain = steps(name, extra)
    assert bench_step.compare(ours, plain, 8)[0] < (1e-3 if name == "MEDSLIP_RESNET" else bench_step.EQUAL)
    # Transformers computes some softmaxes in float32 whatever it is given.
    assert max(bench_step.compare(ours, plain, 8, torch.float64)) < 1e-7
    with torch.no_grad():
        plain.model.image_projection[0, 0] += 1
    batch = bench_step.make_batch(plain, 8)
    with bench_step.without_dropout(ours, plain):
        assert abs(ours.backward(batch) - plain.backward(batch)) > 1e-4  # equality above was no accident


def test_the_plain_step_has_no_fused_attention(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("scaled_dot_product_attention was called")

    for name, extra in CASES:
        ours, plain = steps(name, extra)
        with monkeypatch.context() as m:
            m.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
            plain.step(bench_step.make_batch(plain, 4))
            with pytest.raises(AssertionError, match="was called"):
                ours.step(bench_step.make_batch(ours, 4))


def test_flops_are_those_of_the_formulas():
    """A forward pass and two of its size back, except that nothing flows back to the images."""
    _, plain = steps("SLIP_VITT16", VIT)
    B, tokens, width, dim, head, out = 6, 17, 32, 256, 16, 8
    patches = 3 * 16 * width * 3 * 16 * 16  # 3 views of 16 patches of 3 x 16 x 16
    block = 12 * width**2 + 2 * width * tokens  # qkv, projection and MLP; scores and their use
    vision = 3 * 2 * tokens * block
    text = 2 * 77 * (12 * 32**2 + 2 * 32 * 77)
    heads = width * dim + 32 * dim + 2 * (width * head + head * head + head * out)
    loss = B * B * dim + (2 * B) ** 2 * out  # images with captions; all views with all views
    expected = 6 * B * (vision + text + heads) + 4 * B * patches + 6 * loss
    assert bench_step.count_flops(plain, B) == expected


@pytest.mark.slow
def test_a_whole_benchmark(capsys):
    (row,) = bench_step.main(
        ["--cpu", "--models", "SLIP_VITT16", "--batch-size", "8", "--runs", "2", "--steps", "1", *SMALL, *VIT]
    )
    assert row["differences"]["float32"][0] < bench_step.EQUAL and max(row["differences"]["float64"]) < 1e-9
    assert row["ours_tokens"] <= row["plain_tokens"] == 77
    for key in ("ours", "plain"):
        assert row[f"{key}_seconds"] > 0 and row[f"{key}_matrix_peak"] > 0 and row[f"{key}_peak"] > 2**20
    out = capsys.readouterr().out
    assert "times as fast" in out and "commit" in out
    with pytest.raises(ValueError, match="--memory-limit"):
        bench_step.main(["--cpu", "--largest-batch"])
    with pytest.raises(SystemExit):
        bench_step.main(["--cpu", "--no-such-flag"])


def test_the_matrix_peak_is_of_the_faster_library(monkeypatch):
    """In float32, on a CPU: for bf16 there is one."""
    monkeypatch.setitem(bench_step.SQUARE, "cpu", 64)
    seconds = {distributed.onednn_linear: 0.5, torch.nn.functional.linear: 1.0}
    monkeypatch.setattr(bench_step, "fastest_product", lambda way, a, b: seconds[way])
    peaks = [bench_step.matrix_peak(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert peaks == [4 * 64**3, 2 * 64**3]


def test_the_benchmark_of_smaller_dicom_files():
    pytest.importorskip("imagecodecs")
    rows = load_script("benchmarks/bench_shrink.py").main(
        ["--size", "300", "240", "--runs", "1", "--kinds", "raw", "--short-side", "60"]
    )
    assert set(rows) == {"raw, whole", "raw, 60", "raw, 60, cropped"}
    assert rows["raw, 60"]["KB"] < rows["raw, 60, cropped"]["KB"] < rows["raw, whole"]["KB"] / 10


def test_the_benchmark_of_products(capsys):
    rest = [*SMALL, *VIT]
    rows = load_script("benchmarks/bench_products.py").main(
        ["--models", "SLIP_VITT16", "--batch-size", "4", "--runs", "1", *rest]
    )
    row = rows["SLIP_VITT16"]
    assert all(found["MKL"][1] < 1e-6 and found["MKL"][0] > 0 for found in row["products"].values())
    assert (
        0 < row["gradients"]["MKL"] < 1e-2 and 0 < row["features"]["MKL"] < 1e-5
    )  # one digit of rounding, not of bf16
    assert all(seconds > 0 for key in ("pass_seconds", "step_seconds") for seconds in row[key].values())
    assert (
        "68x128x32" in capsys.readouterr().out
    )  # 4 images of 17 tokens, from the MLP's inner width back to the tower's


@pytest.mark.slow
def test_the_largest_batch_within_a_limit():
    rest = ["--grad-checkpointing", *SMALL, *VIT]
    results = {}
    for limit in (0.05, 0.2, 0.4):
        args = bench_step.get_args_parser().parse_args(["--cpu", "--memory-limit", str(limit)])
        results[limit] = bench_step.largest_batch("SLIP_VITT16", 32, args, rest)
    assert results[0.05] == {} and 32 <= results[0.2]["largest_batch"] < results[0.4]["largest_batch"]
    assert results[0.4]["largest_batch_peak"] <= 0.4 * 2**30


def test_the_memory_benchmark_reads_what_it_says():
    bench = load_script("benchmarks/bench_memory.py")
    lengths = bench.caption_lengths(200_000, seed=3)
    assert lengths.min() >= 3 and lengths.max() <= 2045
    assert lengths.mean() == pytest.approx(137, abs=4) and np.median(lengths) == pytest.approx(114, abs=2)
    assert np.mean(lengths > 370) == pytest.approx(0.03, abs=0.003)
    if sys.platform == "linux":
        result = bench.main(["--rows", "5000", "--workers", "2"])
        assert result["text_bytes"] == 5000 * 30 + bench.caption_lengths(5000, 0).sum()
        assert result["rows"] == 5000 and len(result["pss_workers"]) == 2
        assert result["pss_bytes"] == result["pss_parent"] + sum(result["pss_workers"]) > result["text_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("part, size, methods", [
    ("intervals", "300", ["ours", "NumPy", "scikit-learn"]),
    ("search", "7x900x16", ["ours", "NumPy"]),
    ("table", "300x20", ["ours", "csv"]),
    ("logistic", "200x20x3x3", ["ours", "scikit-learn"]),
])  # fmt: skip
def test_the_numeric_benchmark_compares_equal_answers(part, size, methods, monkeypatch):
    bench = load_script("benchmarks/bench_numeric.py")
    if part == "search":
        monkeypatch.delitem(bench.PARTS[part].methods, "faiss")  # which need not be installed
    rows = bench.main([part, "--sizes", size, "--runs", "1"])
    assert [row["method"] for row in rows] == methods and all(row["seconds"] > 0 for row in rows)
    answers = [bench.one(part, method, size)["answer"] for method in methods[:2]]
    assert len(answers[0]) == len(answers[1]) > 1


@pytest.mark.slow
def test_the_yfcc_benchmark_makes_the_lists_it_reports(tmp_path):
    result = load_script("benchmarks/bench_yfcc.py").main(["--folder", str(tmp_path), "--gigabytes", "0.001"])
    assert result["rows"] > 1000 and result["table_gb"] == pytest.approx(0.001, rel=0.01)
    rows = sources.read_list(tmp_path / "yfcc15m.pkl")
    assert 0.1 * result["rows"] < len(rows) < 0.2 * result["rows"]
    assert rows[0][1:] == (
        "Sunset over the bay, evening",
        "We walked along the shore for two hours and saw nothing but \u00e9normous gulls. More at ",
    )
