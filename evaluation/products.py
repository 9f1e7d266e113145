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
    least = ROWS[-1]
    if not a.dtype == b.dtype == np.float32 or len(a) < least or least * b.size < WORTH_ASKING or not onednn_pays():
        return a @ b
    weight, parts, done = torch.from_numpy(b).T, [], 0
    for rows in ROWS:
        while len(a) - done >= rows:
            parts.append(onednn_linear(torch.from_numpy(a[done : done + rows]), weight).numpy())
            done += rows
    if done < len(a):
        parts.append(a[done:] @ b)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def product_of_columns(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (n, k) transposed @ b (n, d): (k, d), as `product` multiplies."""
    least = ROWS[-1]
    if not a.dtype == b.dtype == np.float32 or len(a) < least or a[:least].size * b.shape[1] < WORTH_ASKING:
        return a.T @ b
    if not onednn_pays():
        return a.T @ b
    total, done = np.zeros((a.shape[1], b.shape[1]), np.float32), 0
    for rows in ROWS:
        while len(a) - done >= rows:
            own = slice(done, done + rows)
            total += onednn_linear(torch.from_numpy(a[own]).T, torch.from_numpy(b[own]).T).numpy()
            done += rows
    return total + a[done:].T @ b[done:]


def widened(columns: np.ndarray) -> np.ndarray:
    """(d, k) float32 with columns of zeros behind, where oneDNN multiplies: one of seven widths up to 256."""
    if not onednn_pays():
        return columns
    step = 16 if columns.shape[1] <= 64 else 64
    return np.pad(columns, ((0, 0), (0, -columns.shape[1] % step)))
