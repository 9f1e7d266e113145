"""The nearest vectors of a bank, exactly and in bounded memory."""

from __future__ import annotations

import numpy as np

from evaluation.products import product, widened

QUERIES, VECTORS = 256, 4096  # that are compared at a time, in 4 MiB
FEW = 1024  # vectors that the first bound is taken from


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (n, d) at length 1; one of zeros stays."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def nearest(queries: np.ndarray, bank: np.ndarray, k: int, cosines: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The k vectors of a bank with the largest product with each query; of equal ones the first in the bank.

    A block of products is looked through once, for what is larger than the k-th largest so far: after the first blocks
    hardly anything is, so that the time is that of the products.

    Args:
        queries: (Q, d), and bank (n, d), of length 1 where products are to be cosines.
        cosines: both are brought to length 1, block by block.

    Returns:
        their numbers and products, each (Q, k), or (Q, n) of a smaller bank, largest first.

    Raises:
        ValueError: a vector with what is no finite number.
    """
    k = min(k, len(bank))
    numbers, products = np.zeros((len(queries), k), np.int64), np.full((len(queries), k), -np.inf, np.float32)
    if not k:
        return numbers, products
    _check(queries)
    for start in range(0, len(queries), QUERIES):
        own = slice(start, start + QUERIES)
        n = len(queries[own])
        part = widened(np.ascontiguousarray((unit(queries[own]) if cosines else queries[own]).T, np.float32))  # (d, q)
        least = np.full(part.shape[1], np.inf, np.float32)  # (q,): from here on a product counts
        least[:n] = -np.inf
        for first in range(0, len(bank), VECTORS):
            vectors = bank[first : first + VECTORS].astype(np.float32, copy=False)
            block = product(unit(vectors) if cosines else vectors, part)  # (b, q)
            if not np.isfinite(block[:, 0]).all():  # as is what a vector without finite numbers multiplies
                _check(vectors)
            if first == 0 and k < len(block):  # a bound from a few, for a partition is slow
                few = block[: max(k, FEW)].copy()
                few.partition(len(few) - k, axis=0)
                least[:n] = few[len(few) - k, :n]
            places = np.flatnonzero(block >= least)
            if len(places):
                _merge(numbers[own], products[own], places // len(least) + first, places % len(least),
                       block.ravel()[places])  # fmt: skip
                # What comes later in the bank has to be larger; until there are k, anything will do.
                largest = products[own, -1]
                least[:n] = np.where(largest == -np.inf, largest, np.nextafter(largest, np.float32(np.inf)))
    return numbers, products


def _check(vectors: np.ndarray) -> None:
    """ValueError for a vector with what is no finite number: it would be nearest to nothing, unnoticed."""
    if not np.isfinite(vectors.sum(dtype=np.float64)):  # which one such number is enough for
        raise ValueError("some vectors hold what is no finite number, so that nothing is nearest to them")


def _merge(numbers: np.ndarray, products: np.ndarray, number: np.ndarray, query: np.ndarray, product: np.ndarray):
    """Put finds (m,), `number` of the bank with `query`, among the k largest (q, k) of the queries that have any."""
    k, touched = products.shape[1], np.unique(query)
    query = np.concatenate([np.repeat(touched, k), query])
    number = np.concatenate([numbers[touched].ravel(), number])
    product = np.concatenate([products[touched].ravel(), product])
    order = np.lexsort((number, -product, query))  # by query, then the largest, then the first in the bank
    best = order[np.searchsorted(query[order], touched)[:, None] + np.arange(k)]  # (touched, k)
    numbers[touched], products[touched] = number[best], product[best]
