"""Contrastive losses: CLIP, SimCLR and their sum, SLIP.

Each loss maps the dictionary that a model's forward returns to a dictionary of metrics whose `loss` is to be minimised.
Everything is computed in float32 (float64 stays float64), also under autocast.

Over N processes each rank scores its own rows against the columns of all ranks. The columns are gathered with gradient,
so the mean of the ranks' gradients, which is what DistributedDataParallel forms, equals the gradient of one process
that holds the whole global batch.
"""
from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor, nn


def gather_batch(x: Tensor, with_grad: bool = True) -> Tensor:
    """Concatenate `x` (B, D) of all ranks along the batch, in rank order: (N*B, D).

    Args:
        with_grad: let gradients flow back into every rank's part (summed over the ranks). Without it the result is a
            constant, the rank's own part included.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    if with_grad:
        return torch.cat(dist_nn.all_gather(x.contiguous()))
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _unit(x: Tensor) -> Tensor:
    """Rows of x (B, D) at length 1, in at least float32."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return 100 * (logits.argmax(-1) == labels).float().mean()


class CLIPLoss(nn.Module):
    """Symmetric image-text contrast (Radford et al. 2021, section 2.3 and figure 3).

    Reads `image_embed` (B, D), `text_embed` (B, D) and `logit_scale` (), the inverse temperature (already
    exponentiated). Returns `loss`, `clip_loss` and `clip_acc`, the share of this rank's pictures, in percent, whose own
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
            image, text = _unit(outputs["image_embed"]), _unit(outputs["text_embed"])  # (B, D) each
            scale = outputs["logit_scale"].to(image.dtype)
            all_image = gather_batch(image, self.gather_with_grad)  # (N*B, D)
            all_text = gather_batch(text, self.gather_with_grad)  # (N*B, D)
            labels = torch.arange(len(image), device=image.device) + len(image) * _rank()
            image_logits = scale * image @ all_text.T  # (B, N*B)
            text_logits = scale * text @ all_image.T  # (B, N*B)
            loss = (F.cross_entropy(image_logits, labels) + F.cross_entropy(text_logits, labels)) / 2
            return {"loss": loss, "clip_loss": loss, "clip_acc": _accuracy(image_logits, labels)}


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
            a, b = _unit(outputs["aug1_embed"]), _unit(outputs["aug2_embed"])  # (B, D) each
            all_a, all_b = gather_batch(a), gather_batch(b)  # (N*B, D) each
            rows = torch.arange(len(a), device=a.device)
            labels = rows + len(a) * _rank()
            logits_a = self._logits(a, all_b, all_a, rows, labels)  # (B, 2*N*B)
            logits_b = self._logits(b, all_a, all_b, rows, labels)  # (B, 2*N*B)
            loss = (F.cross_entropy(logits_a, labels) + F.cross_entropy(logits_b, labels)) / 2
            return {"loss": loss, "ssl_loss": loss, "ssl_acc": _accuracy(logits_a, labels)}

    def _logits(self, query: Tensor, other: Tensor, same: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        """Similarities to the other views, then to the views of the same kind, where a view never meets itself."""
        same_logits = query @ same.T
        same_logits[rows, labels] = -torch.inf
        return torch.cat([query @ other.T, same_logits], dim=1) / self.temperature


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
