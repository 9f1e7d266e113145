"""float32 matrix products on a CPU, by the faster of two libraries.

oneDNN keeps memory for each number of rows and of columns that it meets (benchmarks/RESULTS.md), so it is asked for few
numbers of rows alone; of columns a caller has few, or brings them to few by `widened`.
"""

from __future__ import annotations

import numpy as np
import torch

from distributed import onednn_linear, onednn_pays

ROWS = 4096, 1024  # that it multiplies at a time
WORTH_ASKING = 2 * 10**6  # multiplications, from which on a call of oneDNN costs less than it saves


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (n, d) @ b (d, k): by oneDNN where it is much faster on this machine, else by NumPy, as what is not float32."""
    parts = _parts(a, b, b.size)
    if not parts:
        return a @ b
    found = [onednn_linear(torch.from_numpy(a[own]), torch.from_numpy(b).T).numpy() for own in parts]
    if (done := parts[-1].stop) < len(a):
        found.append(a[done:] @ b)
    return found[0] if len(found) == 1 else np.concatenate(found)


def product_of_columns(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (n, k) transposed @ b (n, d): (k, d), as `product` multiplies."""
    parts = _parts(a, b, a.shape[1] * b.shape[1])
    if not parts:
        return a.T @ b
    total = a[parts[-1].stop :].T @ b[parts[-1].stop :]
    for own in parts:
        total += onednn_linear(torch.from_numpy(a[own]).T, torch.from_numpy(b[own]).T).numpy()
    return total


def _parts(a: np.ndarray, b: np.ndarray, of_a_row: int) -> list[slice]:
    """The rows of `a` that oneDNN multiplies at a time, each of them so many times; what is behind them is NumPy's."""
    least = ROWS[-1]
    if not a.dtype == b.dtype == np.float32 or len(a) < least or least * of_a_row < WORTH_ASKING or not onednn_pays():
        return []
    parts, done = [], 0
    for rows in ROWS:
        while len(a) - done >= rows:
            parts.append(slice(done, done + rows))
            done += rows
    return parts


def widened(columns: np.ndarray) -> np.ndarray:
    """(d, k) float32 with columns of zeros behind, where oneDNN multiplies: one of seven widths up to 256."""
    if not onednn_pays():
        return columns
    step = 16 if columns.shape[1] <= 64 else 64
    return np.pad(columns, ((0, 0), (0, -columns.shape[1] % step)))
