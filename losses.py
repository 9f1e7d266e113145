"""Contrastive losses: CLIP, SigLIP, SimCLR, and SLIP, the sum of SimCLR and one of the others.

First the formulas, each as its paper writes it, over the whole matrix of logits of one process: to be read, and for
tests and benchmarks to compare with. Then the modules that training uses: the same numbers from contrast.py, tile by
tile, on any number of processes. Each maps the dictionary that a model's forward returns to a dictionary of metrics
whose `loss` is to be minimised. Everything is computed in float32 (float64 stays float64), also under autocast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributed
from contrast import contrast_pairs, contrast_rows, contrast_sigmoid

# ---------------------------------------------------------------------------------------------------------------------
# The formulas
# ---------------------------------------------------------------------------------------------------------------------


def clip_loss(image: Tensor, text: Tensor, scale: Tensor | float, duplicates: Tensor | None = None) -> Tensor:
    """Symmetric image-text contrast (Radford et al. 2021, figure 3).

    Args:
        image, text: embeddings (B, D); row i of both is one pair.
        scale: inverse temperature.
        duplicates: (B, B), where pairs are not each other's negatives; the diagonal is ignored.
    """
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T  # (B, B)
    if duplicates is not None:
        others = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(duplicates & others, -torch.inf)
    labels = torch.arange(len(logits), device=logits.device)  # (B,): the diagonal
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def siglip_loss(
    image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float, duplicates: Tensor | None = None
) -> Tensor:
    """Of every image and text, whether they are a pair (Zhai et al. 2023, algorithm 1), summed and divided by B.

    Args:
        image, text: embeddings (B, D); row i of both is one pair.
        scale, bias: of the logits.
        duplicates: (B, B), where pairs are not each other's negatives; the diagonal is ignored.
    """
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T + bias  # (B, B)
    pairs = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    terms = -F.logsigmoid(torch.where(pairs, logits, -logits))  # (B, B): of labels 1 and -1
    if duplicates is not None:
        terms = terms.masked_fill(duplicates & ~pairs, 0)
    return terms.sum() / len(logits)


def simclr_loss(aug1: Tensor, aug2: Tensor, temperature: float = 0.1, same_study: Tensor | None = None) -> Tensor:
    """NT-Xent (Chen et al. 2020, equation 1): among the 2*B - 1 other views find the one of the same image.

    Args:
        aug1, aug2: embeddings (B, D) of two views of each image, or of two images of a study (Azizi et al. 2021).
        same_study: (B, B), where no view of the one is a negative of any view of the other; the diagonal is ignored.
    """
    z = F.normalize(torch.cat([aug1, aug2]), dim=-1)  # (2*B, D)
    logits = z @ z.T / temperature  # (2*B, 2*B)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    left_out = own if same_study is None else own | same_study.tile(2, 2) & ~own.roll(len(aug1), 1)
    logits = logits.masked_fill(left_out, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(aug1)))


def slip_loss(
    image: Tensor,
    text: Tensor,
    aug1: Tensor,
    aug2: Tensor,
    scale: Tensor | float,
    ssl_scale: float = 1.0,
    temperature: float = 0.1,
) -> Tensor:
    """The sum of both (Mu et al. 2021, section 3 and algorithm 1)."""
    return clip_loss(image, text, scale) + ssl_scale * simclr_loss(aug1, aug2, temperature)


# ---------------------------------------------------------------------------------------------------------------------
# The losses of training
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossSettings:
    """What the command line says about losses; an objective takes what it has a use for."""

    ssl_scale: float = 1.0  # weight of the SimCLR loss beside another
    ssl_temp: float = 0.1  # softmax temperature of the SimCLR loss
    gather_with_grad: bool = True
    mask_duplicates: bool = False
    mask_studies: bool = False


class CLIPLoss(nn.Module):
    """`clip_loss` over the batches of all processes.

    Reads `image_embed` (B, D), `text_embed` (B, D) and `logit_scale` (), the inverse temperature (already
    exponentiated). Returns `loss`, `clip_loss` and `clip_acc`, the percentage of this rank's images whose own caption
    scores highest. The mean of the ranks' gradients, which is what DistributedDataParallel forms, equals the gradient
    of one process that holds the whole global batch.

    Args:
        gather_with_grad: False reproduces the published multi-GPU runs of SLIP, where the other side of each comparison
            was a constant on more than one process: about half of the gradient is missing there.
        mask_duplicates: pairs that share an image or a caption are not each other's negatives. They are told by
            `identities` (B, 2), whole numbers that stand for the image and for the caption.
    """

    def __init__(self, gather_with_grad: bool = True, mask_duplicates: bool = False):
        super().__init__()
        self.gather_with_grad = gather_with_grad
        self.mask_duplicates = mask_duplicates

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings (B, D) of both sides to the metrics that the class names."""
        with torch.autocast(outputs["image_embed"].device.type, enabled=False):
            image, text = outputs["image_embed"], outputs["text_embed"]  # (B, D) each
            scale = outputs["logit_scale"]
            identities = outputs["identities"] if self.mask_duplicates else None
            first = 0
            if distributed.world_size() == 1:
                loss, match = contrast_pairs(image, text, scale, identities=identities)
            else:
                image, text, first = _unit(image), _unit(text), len(image) * distributed.rank()
                all_image, all_text = (  # (N*B, D) each
                    distributed.gather_batch(x, self.gather_with_grad) for x in (image, text)
                )
                masks = _masks(identities)
                image_loss, match = contrast_rows(image, all_text, scale, first_own=first, **masks)  # (), (B,)
                text_loss, _ = contrast_rows(text, all_image, scale, first_own=first, **masks)
                loss = (image_loss + text_loss) / 2
            return {"loss": loss, "clip_loss": loss, "clip_acc": _percent_found(match, first)}


class SigLIPLoss(nn.Module):
    """`siglip_loss` over the batches of all processes: what is summed is divided by the global batch.

    Reads `image_embed` (B, D), `text_embed` (B, D), `logit_scale` () (already exponentiated) and `logit_bias` ().
    Returns `loss`, `siglip_loss` and `siglip_acc`, the percentage of this rank's images whose own caption scores
    highest. Captions are gathered with gradient, which is the only one they get: here an image is compared with
    captions, and no caption with images.

    Args:
        mask_duplicates: as of `CLIPLoss`.
    """

    def __init__(self, mask_duplicates: bool = False):
        super().__init__()
        self.mask_duplicates = mask_duplicates

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings (B, D) of both sides to the metrics that the class names."""
        with torch.autocast(outputs["image_embed"].device.type, enabled=False):
            image, text = _unit(outputs["image_embed"]), _unit(outputs["text_embed"])  # (B, D) each
            first = len(image) * distributed.rank()
            loss, match = contrast_sigmoid(
                image,
                distributed.gather_batch(text),  # (N*B, D)
                outputs["logit_scale"],
                outputs["logit_bias"],
                first_own=first,
                **_masks(outputs["identities"] if self.mask_duplicates else None),
            )
            return {"loss": loss, "siglip_loss": loss, "siglip_acc": _percent_found(match, first)}


class SIMCLRLoss(nn.Module):
    """`simclr_loss` over the batches of all processes: every view is told apart from the 2*N*B - 2 others.

    Reads `aug1_embed` and `aug2_embed`, (B, D) each. Returns `loss`, `ssl_loss` and `ssl_acc`, the percentage of this
    rank's first views that find their second view.

    Args:
        temperature: softmax temperature on cosine similarity.
        mask_studies: the views of images of one study are not each other's negatives. They are told by `studies`
            (B, 1), a whole number that stands for the study.
    """

    def __init__(self, temperature: float = 0.1, mask_studies: bool = False):
        super().__init__()
        self.temperature = temperature
        self.mask_studies = mask_studies

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings (B, D) of both views to the metrics that the class names."""
        with torch.autocast(outputs["aug1_embed"].device.type, enabled=False):
            a, b = outputs["aug1_embed"], outputs["aug2_embed"]  # (B, D) each
            # Filled on the device: a copy of a number from the host would wait for it.
            scale = a.new_full((), 1 / self.temperature, dtype=torch.promote_types(a.dtype, torch.float32))
            studies = outputs["studies"] if self.mask_studies else None
            first = 0
            if distributed.world_size() == 1:
                loss, match = contrast_pairs(
                    a, b, scale, within=True, largest_logit=1 / self.temperature, identities=studies
                )
            else:
                a, b, first = _unit(a), _unit(b), len(a) * distributed.rank()
                all_a, all_b = distributed.gather_batch(a), distributed.gather_batch(b)  # (N*B, D) each
                # The columns are all second views, then all first ones, among which a row meets itself.
                places: dict[str, Any] = {"first_own": first, "first_excluded": len(all_b) + first}
                if studies is not None:
                    columns = distributed.gather_batch(studies, with_grad=False).tile(2, 1)  # (2*N*B, 1)
                    places |= {"row_identities": studies, "column_identities": columns}
                loss_a, match = contrast_rows(a, torch.cat([all_b, all_a]), scale, **places)
                loss_b, _ = contrast_rows(b, torch.cat([all_a, all_b]), scale, **places)
                loss = (loss_a + loss_b) / 2
            return {"loss": loss, "ssl_loss": loss, "ssl_acc": _percent_found(match, first)}


class SLIPLoss(nn.Module):
    """An image-text loss plus `ssl_scale` times a self-supervised one (Mu et al. 2021, section 3 and algorithm 1)."""

    def __init__(self, pair_loss: nn.Module, ssl_loss: nn.Module, ssl_scale: float = 1.0):
        super().__init__()
        self.pair_loss = pair_loss
        self.ssl_loss = ssl_loss
        self.ssl_scale = ssl_scale

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What both losses read to the metrics of both, and `loss`, their weighted sum."""
        pair, ssl = self.pair_loss(outputs), self.ssl_loss(outputs)
        return {**pair, **ssl, "loss": pair["loss"] + self.ssl_scale * ssl["loss"]}


def _masks(identities: Tensor | None) -> dict[str, Any]:
    """What tells the duplicates of this rank's rows, and of the gathered columns; nothing where none is given."""
    if identities is None:
        return {}
    columns = distributed.gather_batch(identities, with_grad=False)  # (N*B, G)
    return {"row_identities": identities, "column_identities": columns}


def _unit(x: Tensor) -> Tensor:
    """Rows of x (B, D) at length 1, in at least float32."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def _percent_found(match: Tensor, first_own: int) -> Tensor:
    """The percentage () of rows whose best match (B,) is their own column, `first_own` + i."""
    own = torch.arange(first_own, first_own + len(match), device=match.device)
    return 100 * (match == own).float().mean()
