"""Captions without the padding behind them, so that little is computed for it.

ROCO's have 32 of CLIP's 77 tokens in the mean. On a CPU alone: a GPU would have to be waited for, to say how many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import distributed

WORTH = 0.9  # of the padded batch is left at most, or it is computed as it is
GROUPS = 4  # of `by_length`; with eight the gradients of the weights are added up too often


def lengths_are_known(tokens: Tensor) -> bool:
    """Whether what is computed may hang on the numbers in `tokens`."""
    return tokens.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


@dataclass(frozen=True)
class Packing:
    """Captions of different lengths one after the other, without the padding behind them.

    Whatever sees each token by itself, which is all but the attention, then computes nothing for padding.
    """

    places: Tensor  # (N,) where the tokens stand among the B * L of a padded batch, then others that nothing reads
    tokens: int  # N but for those
    shape: tuple[int, int]  # B, L

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, D) to (N, D)."""
        return x.flatten(0, 1).index_select(0, self.places)

    def pad(self, x: Tensor) -> Tensor:
        """(N, D) to (B, L, D), zeros as padding."""
        padded = x.new_zeros(self.shape[0] * self.shape[1], x.shape[1])
        places, x = self.places[: self.tokens], x[: self.tokens]
        return padded.index_copy_(0, places, x).view(*self.shape, x.shape[1])


def packing_of(ends: Tensor, length: int) -> Packing | None:
    """How captions that end at `ends` (B,) are packed, where that saves a tenth; `length` is the padded batch's."""
    if not lengths_are_known(ends):
        return None
    tokens = int(ends.sum()) + len(ends)
    rows = _rounded(tokens)
    if rows > WORTH * length * len(ends):
        return None
    places = (torch.arange(length, device=ends.device) <= ends[:, None]).flatten().nonzero()[:, 0]  # (B, L) to (N,)
    return Packing(torch.cat([places, places[:1].expand(rows - tokens)]), tokens, (len(ends), length))


def _rounded(rows: int) -> int:
    """Up to a number of five binary digits and zeros, by a fiftieth in the mean and a sixteenth at most.

    Libraries keep what they prepare for each number of rows: oneDNN held 3 GB after 240 batches, each of another.
    """
    step = 1 << max(0, rows.bit_length() - 5)
    return -(-rows // step) * step


def by_length(encode: Callable[[Tensor], Tensor], tokens: Tensor, real: Tensor, tower: nn.Module) -> Tensor:
    """What `encode` gives for tokens (B, L), called for groups of rows of nearly one length, cut to their longest.

    For a `tower` that is not ours to pack. `real` (B, L) says which tokens are no padding.
    """
    # Asking for the number of rows would fix it in a graph. Processes that share a split tower must call it alike.
    if not lengths_are_known(tokens) or not len(tokens) or any(map(distributed.is_sharded, tower.modules())):
        return encode(tokens)
    lengths = (real * torch.arange(1, tokens.shape[1] + 1, device=real.device)).amax(1).clamp(min=1)  # (B,)
    groups = lengths.argsort().chunk(max(1, min(GROUPS, len(tokens) // 4)))
    # In fours, so that few shapes come up, as `_rounded` has it.
    longest = [min(-(-int(lengths[rows].max()) // 4) * 4, tokens.shape[1]) for rows in groups]
    if sum(len(rows) * length for rows, length in zip(groups, longest, strict=True)) > WORTH * tokens.numel():
        return encode(tokens)
    found = [encode(tokens[rows, :length]) for rows, length in zip(groups, longest, strict=True)]
    return torch.cat(found)[torch.cat(groups).argsort()]
