"""The nearest vectors of a bank, against the whole matrix sorted, and the products behind them, by either library."""

import tracemalloc

import numpy as np
import pytest

import distributed
from evaluation import nearest as neighbours
from evaluation import products


@pytest.fixture(autouse=True, params=["NumPy", "oneDNN"])
def library(request, monkeypatch):
    """Which multiplies, whatever the size and machine: true for oneDNN, and its calls."""
    if request.param == "oneDNN" and not distributed.onednn_is_there():
        pytest.skip("a torch without oneDNN")
    asked = []
    monkeypatch.setattr(products, "WORTH_ASKING", 0)
    monkeypatch.setattr(products, "onednn_pays", lambda: request.param == "oneDNN")
    monkeypatch.setattr(products, "onednn_linear", lambda *a: asked.append(a) or distributed.onednn_linear(*a))
    return request.param == "oneDNN", asked


def test_products_are_those_of_float64_for_any_layout(library):
    rng = np.random.default_rng(3)
    for n, d, k in ((1, 1, 1), (300, 40, 3), (70, 513, 130)):
        a, b = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(d, k)).astype(np.float32)
        exact = a.astype(np.float64) @ b.astype(np.float64)
        for left in (a, np.asfortranarray(a)):
            for right in (b, np.asfortranarray(b)):
                found = products.product(left, right)
                assert found.dtype == np.float32 and np.linalg.norm(found - exact) < 1e-6 * np.linalg.norm(exact)
    by_onednn, asked = library
    assert len(asked) == 12 * by_onednn


def test_other_numbers_are_numpys(library):
    a, b = np.arange(12.0).reshape(3, 4), np.ones((4, 2), np.float32)
    assert np.array_equal(products.product(a, b), a @ b) and not library[1]


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
