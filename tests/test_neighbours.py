"""The nearest vectors of a bank, against the whole matrix sorted, and the products behind them, by either library."""

import tracemalloc

import numpy as np
import pytest

import distributed
from evaluation import nearest as neighbours
from evaluation import products


@pytest.fixture(autouse=True, params=["NumPy", "oneDNN"])
def library(request, monkeypatch):
    """Which multiplies, whatever the size and machine: true for oneDNN, and how many rows it was asked for."""
    if request.param == "oneDNN" and not distributed.onednn_is_there():
        pytest.skip("a torch without oneDNN")
    rows = []
    monkeypatch.setattr(products, "WORTH_ASKING", 0)
    monkeypatch.setattr(products, "ROWS", (32, 8))
    monkeypatch.setattr(products, "onednn_pays", lambda: request.param == "oneDNN")
    monkeypatch.setattr(products, "onednn_linear", lambda x, y: rows.append(len(x)) or distributed.onednn_linear(x, y))
    return request.param == "oneDNN", rows


@pytest.mark.parametrize("n, asked", [(1, []), (8, [8]), (75, [32, 32, 8]), (64, [32, 32])])
@pytest.mark.parametrize("d, k", [(1, 1), (40, 3), (513, 130)])
def test_products_are_those_of_float64_and_few_numbers_of_rows_are_asked_for(library, n, asked, d, k):
    rng, (by_onednn, rows) = np.random.default_rng(3), library
    a, b, c = (rng.normal(size=shape).astype(np.float32) for shape in ((n, d), (d, k), (n, k)))
    ways = [(products.product(x, y), a, b) for x, y in ((a, b), (np.asfortranarray(a), np.asfortranarray(b)))]
    assert rows == by_onednn * 2 * asked
    ways.append((products.product_of_columns(c, a), c.T, a))
    assert rows == by_onednn * (2 * asked + len(asked) * [k])
    for found, left, right in ways:
        exact = left.astype(np.float64) @ right.astype(np.float64)
        assert found.dtype == np.float32 and np.linalg.norm(found - exact) < 1e-6 * np.linalg.norm(exact)


def test_other_numbers_are_numpys(library):
    a, b = np.arange(48.0).reshape(12, 4), np.ones((4, 2), np.float32)
    assert np.array_equal(products.product(a, b), a @ b) and not library[1]
    assert np.array_equal(products.product_of_columns(a, a), a.T @ a) and not library[1]


def test_numbers_of_queries_are_few(library):
    widths = {products.widened(np.ones((3, n), np.float32)).shape[1] for n in range(1, 257)}
    assert widths == ({16, 32, 48, 64, 128, 192, 256} if library[0] else set(range(1, 257)))


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
    monkeypatch.setattr(products, "ROWS", (4096, 1024))
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
