"""float32 matrix products on a CPU, by the faster of two libraries."""

from __future__ import annotations

import numpy as np
import torch

from distributed import onednn_linear, onednn_pays

WORTH_ASKING = 3 * 10**6  # multiplications, from which on oneDNN's call is worth its cost


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (n, d) @ b (d, k): by oneDNN where it is much faster on this machine, else by NumPy, as what is not float32."""
    if a.dtype == b.dtype == np.float32 and len(a) * b.size >= WORTH_ASKING and onednn_pays():
        return onednn_linear(torch.from_numpy(a), torch.from_numpy(b).T).numpy()
    return a @ b
