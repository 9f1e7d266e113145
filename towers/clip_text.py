"""CLIP's text tower: a causal transformer, read out at the end-of-text token."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from towers.padding import Packing, packing_of


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and what came before it.

    Parameter names are those of torch.nn.MultiheadAttention, which the published checkpoints were saved from.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Tokens (B, L, D), or packed (N, D), to the same shape."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3*D)
        if packing is not None:  # zeros stand behind a caption, where none of its tokens looks
            qkv = packing.pad(qkv)
        B, L, D = *qkv.shape[:2], x.shape[-1]
        q, k, v = qkv.view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, L, D/heads) each
        # Scores (B, heads, L, L) are never written out where the device has a fused kernel.
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, L, D/heads)
        x = x.transpose(1, 2).reshape(B, L, D)  # heads side by side again
        return self.out_proj(x if packing is None else packing.pack(x))


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU (Hendrycks and Gimpel 2016, section 2) that CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return x * torch.sigmoid(1.702 * x)


class TextBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = CausalSelfAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width))
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Tokens (B, L, D), or packed (N, D), to the same shape."""
        x = x + self.attn(self.ln_1(x), packing)
        return x + self.mlp(self.ln_2(x))


class TextTransformer(nn.Module):
    """Blocks one after the other; with `checkpointed` only their inputs are kept for the backward pass."""

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.resblocks = nn.Sequential(*(TextBlock(width, heads) for _ in range(layers)))
        self.checkpointed = False

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Tokens (B, L, D), or packed (N, D), to the same shape."""
        for block in self.resblocks:
            if self.checkpointed and self.training:
                x = checkpoint(block, x, packing, use_reentrant=False)
            else:
                x = block(x, packing)
        return x


@dataclass(frozen=True)
class CLIPText:
    """CLIP's causal text transformer (Radford et al. 2021, section 2.4), read out at the first end-of-text token."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    modules = ("token_embedding", "positional_embedding", "transformer", "ln_final")
    reads_padding = False  # attention is causal, and the read-out stands before the padding

    def attach(self, model: Any, embed_dim: int) -> None:
        """Register the tower's parameters on `model`, in the initial distributions of CLIP's published code."""
        model.positional_embedding = nn.Parameter(torch.empty(self.context_length, self.width))
        model.text_projection = nn.Parameter(torch.empty(self.width, embed_dim))
        model.transformer = TextTransformer(self.width, self.heads, self.layers)
        model.token_embedding = nn.Embedding(self.vocab_size, self.width)
        model.ln_final = nn.LayerNorm(self.width)
        nn.init.normal_(model.token_embedding.weight, std=0.02)
        nn.init.normal_(model.positional_embedding, std=0.01)
        nn.init.normal_(model.text_projection, std=self.width**-0.5)
        block: Any
        for block in model.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=self.width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=self.width**-0.5 * (2 * self.layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * self.width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=self.width**-0.5 * (2 * self.layers) ** -0.5)

    def checkpoint_gradients(self, model: Any) -> None:
        """Keep only the blocks' inputs for the backward pass."""
        model.transformer.checkpointed = True

    def encode(self, model: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Tokens (B, L), L at most the context, to embeddings (B, embed_dim). Causal, so it needs no mask."""
        if tokens.shape[1] > self.context_length:
            raise ValueError(f"captions of {tokens.shape[1]} tokens do not fit a context of {self.context_length}")
        x = model.token_embedding(tokens) + model.positional_embedding[: tokens.shape[1]]  # (B, L, D)
        ends = tokens.argmax(dim=-1)  # (B,): end-of-text has the highest id, and argmax returns its first place
        if packing := packing_of(ends, tokens.shape[1]):
            x = packing.pad(model.transformer(packing.pack(x), packing))
        else:
            x = model.transformer(x)
        x = model.ln_final(x[torch.arange(x.shape[0], device=x.device), ends])  # (B, D)
        return x @ model.text_projection  # (B, embed_dim)
