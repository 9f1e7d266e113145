"""The contrast of losses.py computed exactly, tile by tile, on any number of processes.

losses.py opens with the formulas over whole matrices of logits. At batch 16,384 such a matrix takes a GiB, and autograd
keeps several. Here no more than a tile of TILE x TILE logits is ever held: each is reduced to a log-sum-exp for its
rows and computed again in the backward pass (the online softmax of Milakov and Gimelshein 2018, section 3). The result
is the same but for the order of the additions.

**The derivation.** Row i with unit vector q_i is compared with unit columns k_j, of which the one with index y_i is its
own, at inverse temperature s. With l_ij = s q_i.k_j, excluded columns at minus infinity, and N rows:

    L = 1/N sum_i (lse_i - l_iy)        lse_i = log sum_j exp(l_ij)
    p_ij = exp(l_ij - lse_i)            the softmax of row i
    dL/dl_ij = 1/N (p_ij - [j = y_i])
    dL/dq_i = s/N (sum_j p_ij k_j - k_y)
    dL/dk_j = s/N (sum_i p_ij q_i - sum over the i with y_i = j of q_i)
    dL/ds = 1/N sum_ij (p_ij - [j = y_i]) q_i.k_j = sum_i q_i.(dL/dq_i) / s

So the backward pass needs the vectors, s and one number a row: lse_i. An embedding e enters as q = e/|e|, and of a
gradient g at q only the part across it moves the direction: dL/de = (g - (q.g) q) / |e|.

On one process both sides are rows and columns at once, and each tile serves twice (`contrast_pairs`). On N processes
each rank has its own rows and the gathered columns of all (`contrast_rows`).

**The sigmoid loss** (Zhai et al. 2023, algorithm 1) judges each pair by itself. With x_ij = s q_i.k_j + b, and z_ij = 1
where j = y_i and else -1:

    L = -1/N sum_ij log sigmoid(z_ij x_ij)
    g_ij = dL/dx_ij = -1/N z_ij sigmoid(-z_ij x_ij)
    dL/dq_i = s sum_j g_ij k_j                        dL/dk_j = s sum_i g_ij q_i
    dL/ds = sum_i q_i.(dL/dq_i) / s                   dL/db = sum_ij g_ij

No row has to be known as a whole first, so one pass over the tiles finds loss and gradients, and the backward pass
computes nothing again (`contrast_sigmoid`). A tile's rows and columns share one term, so a rank's own rows against the
columns of all are all there is on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2048  # rows and columns of a tile: 16 MiB of float32 logits
# exp(x) for |x| below this neither overflows nor loses a term that float32 could see beside the others.
SAFE_EXPONENT = 40.0


def contrast_pairs(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    *,
    within: bool = False,
    largest_logit: float = torch.inf,
    identities: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both sides of one process's batch against each other.

    Args:
        a, b: embeddings (B, D) of any length; row i of a belongs to row i of b.
        scale: inverse temperature, a tensor ().
        within: contrast a row with the rows of its own side too, itself excepted (SimCLR); else with the other side
            alone (CLIP).
        largest_logit: the largest possible |logit| where it is known beforehand: small ones need one exponential a
            logit instead of two.
        identities: (B, G) whole numbers; two pairs that share one of them, in the same place, are not each other's
            negatives, with `within` on either side.

    Returns:
        the mean cross entropy over the 2*B rows (), and for each row of a the index of its best match in b (B,); with
        `within` an index of B or more says that the best match is row (index - B) of a.
    """
    loss, match = _PairContrast.apply(a, b, scale, within, largest_logit, identities)  # type: ignore[misc]
    return loss, match


def contrast_rows(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    *,
    first_own: int,
    first_excluded: int | None = None,
    row_identities: Tensor | None = None,
    column_identities: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """This rank's rows against the columns of all ranks.

    Args:
        rows (B, D), columns (M, D): unit vectors.
        scale: inverse temperature, a tensor ().
        first_own: row i belongs to column first_own + i.
        first_excluded: column first_excluded + i is row i itself and takes no part; None where there is none.
        row_identities (B, G), column_identities (M, G): as `identities` of `contrast_pairs`.

    Returns:
        the mean cross entropy over the rows (), and the index of each row's best match (B,).
    """
    loss, match = _RowContrast.apply(  # type: ignore[misc]
        rows, columns, scale, first_own, first_excluded, row_identities, column_identities
    )
    return loss, match


def contrast_sigmoid(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    first_own: int = 0,
    row_identities: Tensor | None = None,
    column_identities: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sigmoid loss of this rank's rows against the columns of all ranks.

    Args:
        rows (B, D), columns (M, D): unit vectors.
        scale, bias: of the logits, tensors ().
        first_own: row i belongs to column first_own + i.
        row_identities (B, G), column_identities (M, G): as `identities` of `contrast_pairs`.

    Returns:
        the sum over all rows and columns, divided by B (), and the index of each row's best match (B,).
    """
    loss, match = _SigmoidContrast.apply(  # type: ignore[misc]
        rows, columns, scale, bias, first_own, row_identities, column_identities
    )
    return loss, match


def _slices(start: int, stop: int) -> list[slice]:
    return [slice(i, min(i + TILE, stop)) for i in range(start, stop, TILE)]


def _exclude_duplicates(tile: Tensor, row_identities: Tensor, column_identities: Tensor, own: int) -> None:
    """Minus infinity where a row (r, G) and a column (c, G) share a group, but for the diagonal `own` of the pairs."""
    shared = (row_identities[:, None] == column_identities).any(-1)  # (r, c)
    shared.diagonal(own).fill_(False)  # empty where the diagonal passes the tile by
    tile.masked_fill_(shared, -torch.inf)


class _Best:
    """The best match of each row so far, over tiles that come one by one; of equals the first that came stays."""

    def __init__(self, n: int, like: Tensor):
        self.value = like.new_full((n,), -torch.inf)
        self.index = torch.zeros(n, dtype=torch.long, device=like.device)

    def update(self, rows: slice, tile: Tensor, first_column: int) -> None:
        value, where = tile.max(1)
        better = value > self.value[rows]
        self.value[rows] = torch.where(better, value, self.value[rows])
        self.index[rows] = torch.where(better, where + first_column, self.index[rows])


# ---------------------------------------------------------------------------------------------------------------------
# One process: a tile serves its rows and its columns
# ---------------------------------------------------------------------------------------------------------------------


class _PairContrast(torch.autograd.Function):
    """See `contrast_pairs`.

    The rows of a and b, brought to length 1, stand below each other in z (2*B, D), where row i belongs to row i + B.
    The similarity matrix of z is symmetric: a tile above its diagonal is computed once and serves its rows and, read
    the other way, its columns. z itself is computed again in the backward pass, so that nothing of the embeddings'
    size is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, within: bool, largest_logit: float, identities: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        z, _ = _PairContrast._stack(a, b)
        half = len(a)
        lse = z.new_full((len(z),), -torch.inf)
        best = _Best(half, z)
        for rows, columns in _PairContrast._tiles(half, within):
            tile = _PairContrast._logits(z, scale, rows, columns, identities)  # (r, c)
            if rows.start < half:
                best.update(rows, tile, columns.start)
            if columns.stop <= half and rows != columns:  # inside the first half a tile's columns are rows of it too
                best.update(columns, tile.T, rows.start)
            if largest_logit < SAFE_EXPONENT:
                # The same exponentials for the rows and for the columns: subtracting a common bound is safe here.
                weights = tile.sub_(largest_logit).exp_()
                lse[rows] = torch.logaddexp(lse[rows], weights.sum(1).log() + largest_logit)
                if rows != columns:
                    lse[columns] = torch.logaddexp(lse[columns], weights.sum(0).log() + largest_logit)
            else:
                lse[rows] = torch.logaddexp(lse[rows], tile.logsumexp(1))
                if rows != columns:
                    lse[columns] = torch.logaddexp(lse[columns], tile.logsumexp(0))
        positive = scale * (z[:half] * z[half:]).sum(1)  # (B,), of both rows of a pair
        ctx.save_for_backward(a, b, scale, lse, *([] if identities is None else [identities]))
        ctx.within, ctx.largest_logit = within, largest_logit
        match = (best.index - half) % len(z)  # rows of b from 0 on, then those of a
        ctx.mark_non_differentiable(match)
        return (lse.sum() - 2 * positive.sum()) / len(z), match

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
        a, b, scale, lse, *rest = ctx.saved_tensors
        identities = rest[0] if rest else None
        z, norm = _PairContrast._stack(a, b)
        half = len(a)
        dz = torch.zeros_like(z)  # in units of scale * grad / (2*B)
        factor = torch.exp(ctx.largest_logit - lse) if ctx.largest_logit < SAFE_EXPONENT else None
        for rows, columns in _PairContrast._tiles(half, ctx.within):
            tile = _PairContrast._logits(z, scale, rows, columns, identities)
            # p_ij of the tile's rows and, off the diagonal, that of its columns, added: z_i takes both as the sum over
            # its own row, and as a column of the other rows.
            if factor is not None:
                weights = tile.sub_(ctx.largest_logit).exp_()
                weights *= factor[rows, None] if rows == columns else factor[rows, None] + factor[columns]
            elif rows == columns:
                weights = tile.sub_(lse[rows, None]).exp_()
            else:
                weights = torch.exp(tile - lse[rows, None]).add_(tile.sub_(lse[columns]).exp_())
            dz[rows] += weights @ z[columns]  # (r, D)
            dz[columns] += weights.T @ z[rows]  # (c, D)
        # The pair's own logit stands in row i and, mirrored, in row i + B: each loses it twice.
        dz[:half] -= 2 * z[half:]
        dz[half:] -= 2 * z[:half]
        dz *= grad / len(z)
        radial = torch.linalg.vecdot(z, dz)[:, None]  # (2*B, 1)
        dscale = radial.sum() / 2 if ctx.needs_input_grad[2] else None  # z enters twice, as rows and as columns
        dz.addcmul_(z, radial, value=-1).mul_(scale / norm)  # to length 1 and back: what is radial has no effect
        return dz[:half], dz[half:], dscale, None, None, None

    @staticmethod
    def _stack(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Unit rows (2*B, D) in at least float32, and their lengths before (2*B, 1)."""
        z = torch.cat([x if x.dtype == torch.float64 else x.float() for x in (a, b)])  # (2*B, D)
        norm = torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_(min=1e-12)
        return z.div_(norm), norm

    @staticmethod
    def _logits(z: Tensor, scale: Tensor, rows: slice, columns: slice, identities: Tensor | None) -> Tensor:
        tile = scale * (z[rows] @ z[columns].T)  # (r, c)
        if rows == columns:
            tile.fill_diagonal_(-torch.inf)
        if identities is not None:
            both = torch.cat([identities, identities])  # (2*B, G), of the rows of z
            # Row i belongs to row i + B, which a tile within a half does not hold.
            _exclude_duplicates(tile, both[rows], both[columns], own=rows.start + len(z) // 2 - columns.start)
        return tile

    @staticmethod
    def _tiles(half: int, within: bool) -> Iterator[tuple[slice, slice]]:
        """Tiles that meet every pair once: first between the halves, then, with `within`, inside each."""
        first, second = _slices(0, half), _slices(half, 2 * half)
        yield from ((rows, columns) for rows in first for columns in second)
        if within:
            for part in (first, second):
                yield from ((rows, columns) for i, rows in enumerate(part) for columns in part[i:])


# ---------------------------------------------------------------------------------------------------------------------
# Several processes: own rows, gathered columns
# ---------------------------------------------------------------------------------------------------------------------


def _row_tiles(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    first_own: int,
    first_excluded: int | None,
    row_identities: Tensor | None,
    column_identities: Tensor | None,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Logits (r, c) by tiles, with their rows and columns; what takes no part is at minus infinity."""
    for r in _slices(0, len(rows)):
        for c in _slices(0, len(columns)):
            tile = scale * (rows[r] @ columns[c].T)  # (r, c)
            shift = r.start - c.start  # row i of the tile stands in row r.start + i, column j in c.start + j
            if first_excluded is not None:
                tile.diagonal(first_excluded + shift).fill_(-torch.inf)
            if row_identities is not None and column_identities is not None:
                _exclude_duplicates(tile, row_identities[r], column_identities[c], own=first_own + shift)
            yield r, c, tile


class _RowContrast(torch.autograd.Function):
    """See `contrast_rows`. A rank's gradient for the columns goes back to their ranks through the gathering itself."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        first_own: int,
        first_excluded: int | None,
        row_identities: Tensor | None,
        column_identities: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.first_own, ctx.places = first_own, (first_own, first_excluded, row_identities, column_identities)
        lse, best = rows.new_full((len(rows),), -torch.inf), _Best(len(rows), rows)
        # One pass over the tiles keeps a running logarithm of the sum of exponentials of each row.
        for r, c, tile in _row_tiles(rows, columns, scale, *ctx.places):
            best.update(r, tile, c.start)
            lse[r] = torch.logaddexp(lse[r], tile.logsumexp(1))
        positive = scale * (rows * columns[first_own : first_own + len(rows)]).sum(1)
        ctx.save_for_backward(rows, columns, scale, lse)
        ctx.mark_non_differentiable(best.index)
        return (lse - positive).mean(), best.index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
        rows, columns, scale, lse = ctx.saved_tensors
        own = slice(ctx.first_own, ctx.first_own + len(rows))
        drows = torch.zeros_like(rows)
        dcolumns = torch.zeros_like(columns) if ctx.needs_input_grad[1] else None
        for r, c, tile in _row_tiles(rows, columns, scale, *ctx.places):
            weights = tile.sub_(lse[r, None]).exp_()  # p_ij
            drows[r] += weights @ columns[c]  # (r, D)
            if dcolumns is not None:
                dcolumns[c] += weights.T @ rows[r]  # (c, D)
        # d loss / d logit_ij = (p_ij - [j is i's own]) / B: the second part, taken off once instead of in every tile.
        drows -= columns[own]
        drows *= grad / len(rows)
        if dcolumns is not None:
            dcolumns[own] -= rows
            dcolumns *= scale * grad / len(rows)
        dscale = (rows * drows).sum() if ctx.needs_input_grad[2] else None
        return drows.mul_(scale), dcolumns, dscale, None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# The sigmoid loss, on one process or several
# ---------------------------------------------------------------------------------------------------------------------


class _SigmoidContrast(torch.autograd.Function):
    """See `contrast_sigmoid`. A rank's gradient for the columns goes back to their ranks through the gathering."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        bias: Tensor,
        first_own: int,
        row_identities: Tensor | None,
        column_identities: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        places = (first_own, None, row_identities, column_identities)
        loss, dbias, best = rows.new_zeros(()), rows.new_zeros(()), _Best(len(rows), rows)
        drows, dcolumns = torch.zeros_like(rows), torch.zeros_like(columns)  # in units of scale / B
        for r, c, tile in _row_tiles(rows, columns, scale, *places):
            tile += bias
            best.update(r, tile, c.start)
            own = first_own + r.start - c.start
            tile.diagonal(own).neg_()  # -z_ij x_ij
            loss -= F.logsigmoid(-tile).sum()
            weights = tile.sigmoid_()
            weights.diagonal(own).neg_()  # B g_ij
            dbias += weights.sum()
            drows[r] += weights @ columns[c]  # (r, D)
            dcolumns[c] += weights.T @ rows[r]  # (c, D)
        n = len(rows)
        dscale = (rows * drows).sum() / n
        ctx.save_for_backward(drows.mul_(scale / n), dcolumns.mul_(scale / n), dscale, dbias / n)
        ctx.mark_non_differentiable(best.index)
        return loss / n, best.index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
        found = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)  # of the first four inputs
        return *(grad * value if needed else None for value, needed in found), None, None, None
