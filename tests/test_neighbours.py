"""The nearest vectors of a bank, against the whole matrix sorted."""

import tracemalloc

import numpy as np
import pytest

from evaluation import neighbours


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
