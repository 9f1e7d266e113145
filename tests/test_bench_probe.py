"""bench_probe.py in miniature: both methods on the same images, and what it reports. No time is asserted."""

from __future__ import annotations

import json

import bench_probe as bench
import cbis_tree
import pytest

from evaluation import downstream
from preparation.cbis_tables import make_cbis


def test_both_methods_find_the_same_on_cbis(tmp_path, capsys):
    """The crops' brightness follows the pathology: both methods must see it, and agree within their intervals."""
    cbis_tree.make_small_cbis(tmp_path)
    make_cbis(tmp_path)
    flags = ["--sets", "cbis_mass", "--root", str(tmp_path), "--arch", "test_resnet", "--size", "32", "--fits", "1"]
    (row,) = bench.main([*flags, "--epochs", "30", "--batch-size", "16"])
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == {k: v for k, v in row.items() if k != "text"}
    assert (row["epochs"], row["penalties"], row["same_again"]) == (30, 30, True)
    for method in ("published", "cached"):
        assert row["metrics"][method]["auroc"]["value"] > 0.9, method
    for name in bench.SHOWN:
        ours, theirs = row["metrics"]["cached"][name], row["metrics"]["published"][name]
        assert row["difference"][name]["value"] == pytest.approx(ours["value"] - theirs["value"])
    gain = row["difference"]["auroc"]
    assert gain["why"] if gain["low"] is None else gain["low"] <= 0 <= gain["high"]
    assert row["seconds_cached"]["all"] == pytest.approx(sum(row["seconds_cached"][k] for k in ("features", "head")))
    for ratio, kind in (("ratio", "all"), ("ratio_cpu", "cpu")):
        assert row[ratio] == pytest.approx(row["seconds_published"][kind] / row["seconds_cached"][kind])
    assert set(row["seconds_fit"]) == {"one_fit", "sweep", "one_fit_scikit_learn"}


def test_every_image_passes_the_tower_in_every_epoch_of_the_published_method(monkeypatch):
    """1,437 labelled digits an epoch and 360 test digits once; the cached method sees each of the 1,797 once."""
    opened, seen = [], {"published": [], "cached": []}
    image = downstream.ImageArray.image
    monkeypatch.setattr(downstream.ImageArray, "image", lambda *args: opened.append(1) or image(*args))

    def counting(method):
        def call(*args):
            before = len(opened)
            result = method(*args)
            seen[method.__name__].append(len(opened) - before)
            return result

        return call

    for name in seen:
        monkeypatch.setattr(bench, name, counting(getattr(bench, name)))
    (row,) = bench.main(["--sets", "digits", "--arch", "test_resnet", "--size", "32", "--epochs", "2", "--fits", "1"])
    assert seen == {"published": [2 * 1437 + 360], "cached": [1797, 0]}
    assert sum(row["samples"].values()) == 1797 and row["samples"]["test"] == 360


def test_cbis_without_a_root_says_where_one_comes_from():
    with pytest.raises(ValueError, match="cbis_calc needs --root: `python make_dataset.py demo"):
        bench.open_set("cbis_calc", None, bench.Preprocess(size=32), seed=0)
