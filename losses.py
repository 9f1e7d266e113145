"""Contrastive losses: CLIP, SimCLR and their sum, SLIP.

Each loss maps the dictionary that a model's forward returns to a dictionary of metrics whose `loss` is to be minimised.
Everything is computed in float32 (float64 stays float64), also under autocast.

Over N processes each rank scores its own rows against the columns of all ranks. The columns are gathered with gradient,
so the mean of the ranks' gradients, which is what DistributedDataParallel forms, equals the gradient of one process
that holds the whole global batch.

No matrix of logits is ever held: they are computed tile by tile, reduced to one log-sum-exp for each row, and computed
again in the backward pass (the online softmax of Milakov and Gimelshein 2018, section 3). That is exact, and on one
process, where a tile serves its rows and its columns at once, it needs fewer multiplications than the full matrices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TILE = 2048  # rows and columns of a tile: 16 MiB of float32 logits
# exp(x) for |x| below this neither overflows nor loses a term that float32 could see beside the others.
SAFE_EXPONENT = 40.0


def gather_batch(x: Tensor, with_grad: bool = True) -> Tensor:
    """Concatenate `x` (B, D) of all ranks along the batch, in rank order: (N*B, D).

    Args:
        with_grad: let gradients flow back into every rank's part (summed over the ranks). Without it the result is a
            constant, the rank's own part included.
    """
    if _world_size() == 1:
        return x
    if with_grad:
        return torch.cat(dist_nn.all_gather(x.contiguous()))
    parts = [torch.empty_like(x) for _ in range(_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _unit(x: Tensor) -> Tensor:
    """Rows of x (B, D) at length 1, in at least float32."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Contrast, tile by tile
# ---------------------------------------------------------------------------------------------------------------------


def _slices(start: int, stop: int) -> list[slice]:
    return [slice(i, min(i + TILE, stop)) for i in range(start, stop, TILE)]


class _PairContrast(torch.autograd.Function):
    """Both sides of one process's batch against each other: the symmetric case.

    The rows of a and b, brought to length 1, stand below each other in z (2*B, D), where row i belongs to row i + B.
    The similarity matrix is symmetric, so each tile above the diagonal is computed once and serves its rows and its
    columns. z is computed again in the backward pass: nothing of the embeddings' size is kept.

    Args:
        a, b (B, D): embeddings of any length.
        scale: inverse temperature, a tensor ().
        across: contrast each row with the other half only (CLIP), else with every row but itself (SimCLR).
        limit: largest possible |logit| where it is known beforehand, for one exponential a logit instead of two.

    Returns:
        mean cross entropy over the 2*B rows (), and for the first B rows the index of the best match (B,).
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, scale: Tensor, across: bool, limit: float) -> tuple[Tensor, Tensor]:
        z, _ = _PairContrast._stack(a, b)
        half = len(a)
        lse = z.new_full((len(z),), -torch.inf)
        best, match = z.new_full((half,), -torch.inf), torch.zeros(half, dtype=torch.long, device=z.device)
        for rows, columns in _PairContrast._tiles(half, across):
            tile = scale * (z[rows] @ z[columns].T)  # (r, c)
            if rows == columns:
                tile.fill_diagonal_(-torch.inf)
            if rows.start < half:
                top, where = tile.max(1)
                better = top > best[rows]  # the first of equals stays, as with argmax
                best[rows] = torch.where(better, top, best[rows])
                match[rows] = torch.where(better, where + columns.start, match[rows])
            if limit < SAFE_EXPONENT:
                weights = tile.sub_(limit).exp_()
                lse[rows] = torch.logaddexp(lse[rows], weights.sum(1).log() + limit)
                if rows != columns:
                    lse[columns] = torch.logaddexp(lse[columns], weights.sum(0).log() + limit)
            else:
                lse[rows] = torch.logaddexp(lse[rows], tile.logsumexp(1))
                if rows != columns:
                    lse[columns] = torch.logaddexp(lse[columns], tile.logsumexp(0))
        positive = scale * (z[:half] * z[half:]).sum(1)  # (B,)
        ctx.save_for_backward(a, b, scale, lse)
        ctx.across, ctx.limit = across, limit
        ctx.mark_non_differentiable(match)
        return (lse.sum() - 2 * positive.sum()) / len(z), match

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple:
        a, b, scale, lse = ctx.saved_tensors
        z, norm = _PairContrast._stack(a, b)
        half = len(a)
        dz = torch.zeros_like(z)  # in units of scale * grad / (2*B)
        share = torch.exp(ctx.limit - lse) if ctx.limit < SAFE_EXPONENT else None
        for rows, columns in _PairContrast._tiles(half, ctx.across):
            tile = scale * (z[rows] @ z[columns].T)
            if rows == columns:
                tile.fill_diagonal_(-torch.inf)
            # The softmax over the tile's rows, and off the diagonal that over its columns.
            if share is not None:
                weights = tile.sub_(ctx.limit).exp_()
                weights *= share[rows, None] if rows == columns else share[rows, None] + share[columns]
            elif rows == columns:
                weights = tile.sub_(lse[rows, None]).exp_()
            else:
                weights = torch.exp(tile - lse[rows, None]).add_(tile.sub_(lse[columns]).exp_())
            dz[rows] += weights @ z[columns]
            dz[columns] += weights.T @ z[rows]
        dz[:half] -= 2 * z[half:]
        dz[half:] -= 2 * z[:half]
        dz *= grad / len(z)
        radial = torch.linalg.vecdot(z, dz)[:, None]  # (2*B, 1)
        dscale = radial.sum() / 2 if ctx.needs_input_grad[2] else None  # z enters twice, as rows and as columns
        dz.addcmul_(z, radial, value=-1).mul_(scale / norm)  # to length 1 and back: what is radial has no effect
        return dz[:half], dz[half:], dscale, None, None

    @staticmethod
    def _stack(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Unit rows (2*B, D) in at least float32, and their lengths before (2*B, 1)."""
        z = torch.cat([x if x.dtype == torch.float64 else x.float() for x in (a, b)])
        norm = torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_(min=1e-12)
        return z.div_(norm), norm

    @staticmethod
    def _tiles(half: int, across: bool) -> Iterator[tuple[slice, slice]]:
        """Tiles that meet every pair once: first between the halves, then, unless `across`, within each."""
        first, second = _slices(0, half), _slices(half, 2 * half)
        yield from ((rows, columns) for rows in first for columns in second)
        if not across:
            for part in (first, second):
                yield from ((rows, columns) for i, rows in enumerate(part) for columns in part[i:])


class _RowContrast(torch.autograd.Function):
    """This rank's rows against the columns of all ranks.

    Args:
        q (B, D), k (M, D): unit vectors; row i belongs to column `label` + i.
        scale: inverse temperature, a tensor ().
        excluded: column `excluded` + i is row i itself and takes no part; -1 for none.

    Returns:
        mean cross entropy (), and the index of the best match (B,).
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, scale: Tensor, label: int, excluded: int) -> tuple[Tensor, Tensor]:
        lse = q.new_full((len(q),), -torch.inf)
        best, match = torch.full_like(lse, -torch.inf), torch.zeros(len(q), dtype=torch.long, device=q.device)
        for rows, columns, tile in _RowContrast._tiles(q, k, scale, excluded):
            top, where = tile.max(1)
            better = top > best[rows]
            best[rows] = torch.where(better, top, best[rows])
            match[rows] = torch.where(better, where + columns.start, match[rows])
            lse[rows] = torch.logaddexp(lse[rows], tile.logsumexp(1))
        positive = scale * (q * k[label : label + len(q)]).sum(1)
        ctx.save_for_backward(q, k, scale, lse)
        ctx.label, ctx.excluded = label, excluded
        ctx.mark_non_differentiable(match)
        return (lse - positive).mean(), match

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple:
        q, k, scale, lse = ctx.saved_tensors
        own = slice(ctx.label, ctx.label + len(q))
        dq, dk = torch.zeros_like(q), torch.zeros_like(k) if ctx.needs_input_grad[1] else None
        for rows, columns, tile in _RowContrast._tiles(q, k, scale, ctx.excluded):
            weights = tile.sub_(lse[rows, None]).exp_()
            dq[rows] += weights @ k[columns]
            if dk is not None:
                dk[columns] += weights.T @ q[rows]
        dq -= k[own]
        dq *= grad / len(q)
        if dk is not None:
            dk[own] -= q
            dk *= scale * grad / len(q)
        dscale = (q * dq).sum() if ctx.needs_input_grad[2] else None
        return dq.mul_(scale), dk, dscale, None, None

    @staticmethod
    def _tiles(q: Tensor, k: Tensor, scale: Tensor, excluded: int) -> Iterator[tuple[slice, slice, Tensor]]:
        for rows in _slices(0, len(q)):
            for columns in _slices(0, len(k)):
                tile = scale * (q[rows] @ k[columns].T)  # (r, c)
                if excluded >= 0:  # row r meets itself in column r + shift of the tile
                    tile.diagonal(rows.start + excluded - columns.start).fill_(-torch.inf) if (
                        -len(tile) < rows.start + excluded - columns.start < tile.shape[1]
                    ) else None
                yield rows, columns, tile


class CLIPLoss(nn.Module):
    """Symmetric image-text contrast (Radford et al. 2021, section 2.3 and figure 3).

    Reads `image_embed` (B, D), `text_embed` (B, D) and `logit_scale` (), the inverse temperature (already
    exponentiated). Returns `loss`, `clip_loss` and `clip_acc`, the share of this rank's images, in percent, whose own
    caption scores highest.

    Args:
        gather_with_grad: False reproduces the published multi-GPU runs of SLIP, where the other side of each comparison
            was a constant on more than one process: about half of the gradient is missing there.
    """

    def __init__(self, gather_with_grad: bool = True):
        super().__init__()
        self.gather_with_grad = gather_with_grad

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast(outputs["image_embed"].device.type, enabled=False):
            image, text = outputs["image_embed"], outputs["text_embed"]  # (B, D) each
            scale = outputs["logit_scale"]
            if _world_size() == 1:
                loss, match = _PairContrast.apply(image, text, scale, True, torch.inf)
                correct = match == torch.arange(len(image), 2 * len(image), device=match.device)
            else:
                image, text, first = _unit(image), _unit(text), len(image) * _rank()
                all_image, all_text = (gather_batch(x, self.gather_with_grad) for x in (image, text))  # (N*B, D)
                image_loss, match = _RowContrast.apply(image, all_text, scale, first, -1)
                text_loss, _ = _RowContrast.apply(text, all_image, scale, first, -1)
                loss = (image_loss + text_loss) / 2
                correct = match == torch.arange(first, first + len(image), device=match.device)
            return {"loss": loss, "clip_loss": loss, "clip_acc": 100 * correct.float().mean()}


class SIMCLRLoss(nn.Module):
    """NT-Xent between two augmented views (Chen et al. 2020, section 2.1, equation 1).

    Reads `aug1_embed` and `aug2_embed`, (B, D) each. Every view is told apart from the 2*N*B - 2 other views. Returns
    `loss`, `ssl_loss` and `ssl_acc`, the share of this rank's first views, in percent, that find their second view.

    Args:
        temperature: softmax temperature on cosine similarity.
    """

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        self.temperature = temperature

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast(outputs["aug1_embed"].device.type, enabled=False):
            a, b = outputs["aug1_embed"], outputs["aug2_embed"]  # (B, D) each
            scale = a.new_tensor(1 / self.temperature, dtype=torch.promote_types(a.dtype, torch.float32))
            if _world_size() == 1:
                loss, match = _PairContrast.apply(a, b, scale, False, 1 / self.temperature)
                correct = match == torch.arange(len(a), 2 * len(a), device=match.device)
            else:
                a, b, first, total = _unit(a), _unit(b), len(a) * _rank(), len(a) * _world_size()
                all_a, all_b = gather_batch(a), gather_batch(b)  # (N*B, D) each
                loss_a, match = _RowContrast.apply(a, torch.cat([all_b, all_a]), scale, first, total + first)
                loss_b, _ = _RowContrast.apply(b, torch.cat([all_a, all_b]), scale, first, total + first)
                loss = (loss_a + loss_b) / 2
                correct = match == torch.arange(first, first + len(a), device=match.device)
            return {"loss": loss, "ssl_loss": loss, "ssl_acc": 100 * correct.float().mean()}


class SLIPLoss(nn.Module):
    """CLIP loss plus `ssl_scale` times a self-supervised loss (Mu et al. 2021, section 3 and algorithm 1)."""

    def __init__(self, ssl_loss: nn.Module, ssl_scale: float = 1.0, gather_with_grad: bool = True):
        super().__init__()
        self.clip_loss = CLIPLoss(gather_with_grad)
        self.ssl_loss = ssl_loss
        self.ssl_scale = ssl_scale

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        clip, ssl = self.clip_loss(outputs), self.ssl_loss(outputs)
        return {**clip, **ssl, "loss": clip["loss"] + self.ssl_scale * ssl["loss"]}
