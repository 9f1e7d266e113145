"""The nearest vectors of a bank, against the whole matrix sorted."""

import tracemalloc

import numpy as np
import pytest

from evaluation import nearest as neighbours


@pytest.mark.parametrize("k", [1, 7, 100])
def test_nearest_equal_the_whole_matrix_sorted_and_ties_go_to_the_first(monkeypatch, k):
    monkeypatch.setattr(neighbours, "QUERIES", 4)
    monkeypatch.setattr(neighbours, "VECTORS", 10)
    rng = np.random.default_rng(0)
    queries, bank = (rng.integers(-1, 2, (n, 3)).astype(np.float32) for n in (9, 53))  # few values: many ties
    numbers, products = neighbours.nearest(queries, bank, k)
    whole = queries @ bank.T
    order = np.argsort(-whole, axis=1, kind="stable")[:, :k]
    assert np.array_equal(numbers, order) and np.array_equal(products, np.take_along_axis(whole, order, 1))


def test_a_search_holds_no_more_for_a_larger_bank(monkeypatch):
    monkeypatch.setattr(neighbours, "VECTORS", 4096)
    rng = np.random.default_rng(0)
    queries, peaks = rng.normal(size=(100, 4)).astype(np.float32), []
    for n in (20_000, 80_000):
        bank = rng.normal(size=(n, 4)).astype(np.float32)
        tracemalloc.start()
        neighbours.nearest(queries, bank, 5)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 4 * 64 * 4096 * 4  # the whole matrix of the larger bank has 32 MB


def test_cosines_are_products_of_unit_vectors_and_no_number_is_refused(monkeypatch):
    monkeypatch.setattr(neighbours, "VECTORS", 8)
    rng = np.random.default_rng(1)
    queries, bank = (rng.normal(size=(n, 5)).astype(np.float32) for n in (6, 30))
    bank[4] = 0
    numbers, cosines = neighbours.nearest(queries, 3 * bank, 40, cosines=True)
    whole = queries @ bank.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(bank, axis=1).clip(1e-9)
    assert numbers.shape == (6, 30) and np.allclose(cosines, -np.sort(-whole, axis=1), atol=1e-6)
    assert np.array_equal(np.sort(numbers, axis=1), np.tile(np.arange(30), (6, 1)))
    assert neighbours.nearest(queries, bank[:0], 5)[0].shape == (6, 0)
    for place in (0, 20):
        broken = bank.copy()
        broken[place] = np.nan
        for k in (3, 30):  # of few that are asked for it would not be among them
            with pytest.raises(ValueError, match="no finite number"):
                neighbours.nearest(queries, broken, k)
    queries[2, 1] = np.inf
    with pytest.raises(ValueError, match="no finite number"):
        neighbours.nearest(queries, bank, 3)
