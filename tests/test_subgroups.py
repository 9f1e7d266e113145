"""Lesions by breast and patient, and in parts, against what scikit-learn says of the same lesions."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from test_predictions import table

from evaluation import predictions, subgroups
from evaluation.resamples import Bootstrap


def test_units_are_the_mean_over_their_lesions_with_the_gravest_pathology():
    test = table(60)
    for unit, key in (("patient", ("patient",)), ("breast", ("patient", "side"))):
        merged = subgroups.by_unit(test, unit)
        keys = [tuple(row[name] for name in key) for row in test.rows]
        assert len(merged.rows) == len(set(keys))
        for row, prob in zip(merged.rows, merged.prob, strict=True):
            own = [i for i, k in enumerate(keys) if k == tuple(row[name] for name in key)]
            assert np.allclose(prob, test.prob[own].mean(0))
            pathologies = {test.rows[i]["pathology"] for i in own}
            gravest = next(name for name in ("MALIGNANT", "BENIGN", "BENIGN_WITHOUT_CALLBACK") if name in pathologies)
            assert row["pathology"] == gravest


def test_subgroups_are_complete_and_have_their_own_scores():
    test = table()
    found = subgroups.score_subgroups(test, Bootstrap(50))
    by = {name: [part for part in found if part["by"] == name] for name in predictions.CBIS.subgroups}
    assert by["assessment"] == []  # the table does not say it
    for name in ("density", "view", "side", "size", "subtlety"):
        assert sum(part["lesions"] for part in by[name]) == 240, name
    assert [part["value"] for part in by["size"]] == ["small", "medium", "large"]
    assert [part["lesions"] for part in by["size"]] == [80, 80, 80]
    part = next(part for part in by["density"] if part["value"] == "2")
    index = [i for i, row in enumerate(test.rows) if row["density"] == "2"]
    own = test[np.array(index)]
    assert part["auroc"]["value"] == pytest.approx(roc_auc_score(own.labels, own.prob, multi_class="ovr"))
    assert part["auroc_malignant"]["value"] == pytest.approx(roc_auc_score(own.labels == 2, own.prob[:, 2]))


def test_subgroups_of_several_seeds_have_their_mean_and_a_wider_interval():
    first = table()
    rng = np.random.default_rng(5)
    noisy = [first.prob * rng.uniform(0.2, 3, first.prob.shape) for _ in range(2)]
    others = [predictions.Predictions(first.rows, p / p.sum(1, keepdims=True)) for p in noisy]
    together = subgroups.score_subgroups(first, Bootstrap(200), others=others)
    each = [subgroups.score_subgroups(found, Bootstrap(200)) for found in (first, *others)]
    assert [(part["by"], part["value"], part["lesions"]) for part in together] == [
        (part["by"], part["value"], part["lesions"]) for part in each[0]
    ]
    for i, part in enumerate(together):
        for name in ("auroc", "auroc_malignant"):
            values = [found[i][name]["value"] for found in each]
            assert part[name]["value"] == pytest.approx(np.mean(values))
            least = part[name]["high"] - part[name]["low"]
            assert part[name]["high"] == 1 or least > 2 * 1.96 * np.std(values, ddof=1) / np.sqrt(3)


def test_a_crop_on_a_bound_is_of_the_larger_part():
    def part(width, height):
        return subgroups.subgroup_of({"crop_width": width, "crop_height": height}, "size", [100.0, 200.0])

    assert [part("9", "11"), part("10", "10"), part("10", "19"), part("10", "20")] == [
        "small", "medium", "medium", "large"
    ]  # fmt: skip
    assert part("", "10") == part("10", "") == ""
