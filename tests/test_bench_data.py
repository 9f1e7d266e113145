import bench_data
import pytest


@pytest.mark.slow
def test_the_input_benchmark_compares_methods_that_draw_from_one_distribution(monkeypatch):
    monkeypatch.setattr(bench_data.torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(bench_data, "keep_freed_memory", lambda: None)  # of this process
    out = bench_data.main(["--samples", "1", "--draws", "120", "--images", "1"])
    assert set(out["rows"]) == set(bench_data.KINDS)
    methods = bench_data.all_methods()
    assert set(bench_data.METHODS) <= set(methods) and all(set(row) == set(methods) for row in out["rows"].values())
    data = bench_data.files("photo 640x480", 1, 90, 0)[0][0]
    for name in set(methods) & set(bench_data.PEERS):
        assert [sorted(view.shape) for view in methods[name](data, None)] == [[3, 224, 224]] * 3
    assert all(row["published"]["ratio"] == 1 for row in out["rows"].values())
    assert all(p["ours"] > 1e-3 and p["control"] > 1e-3 for p in out["p"].values())
    assert 0.5 < out["shrunk_energy"]["ssl"] < out["shrunk_energy"]["train"] < 1


def test_its_comparison_can_tell_views_without_colour_operations(monkeypatch):
    monkeypatch.setattr(bench_data, "apply_colour", lambda pixels, colour: pixels)
    data = bench_data.files("photo 640x480", 1, 90, 0, grain=25.0)[0][0]
    assert bench_data.compare(data, 120, 0)["ours"] < 1e-6
