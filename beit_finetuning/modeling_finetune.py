"""The networks that are fine-tuned: BEiT's vision transformer, and a classifier over any image tower of this project.

    create_beit("beit_base_patch16_224", num_classes=1000, use_abs_pos_emb=True, use_rel_pos_bias=False,
                use_mean_pooling=False, init_values=0)           the seed's ViT-Base: a published SLIP tower fits
    create_tower("vit_base_patch16_224", num_classes=10)         a timm tower with fresh weights
    tower_classifier(models.load_pretrained(path).model, num_classes=3)   MedCLIP, MedSLIP, any run of ours

The names beit_* are those of BEiT's fine-tuning code. timm has models of the same names that are other networks
(no absolute positions, no key bias), so these names never reach timm.
"""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, calculate_drop_path_rates, trunc_normal_
from timm.models.beit import gen_relative_position_index
from torch import Tensor, nn

import models
from inputs.sizes import Size, height_width, size_text
from inputs.transforms import Preprocess
from towers.library import is_library_tower
from towers.weights import load_weights, resize_position_embeddings

# ViT-Small as in MoCo v3: 12 heads, where timm and DeiT have 6.
BEIT_MODELS = {
    "beit_small_patch16_224": dict(embed_dim=384, depth=12, num_heads=12),
    "beit_base_patch16_224": dict(embed_dim=768, depth=12, num_heads=12),
    "beit_large_patch16_224": dict(embed_dim=1024, depth=24, num_heads=16),
}


# ---------------------------------------------------------------------------------------------------------------------
# BEiT's vision transformer
# ---------------------------------------------------------------------------------------------------------------------


class RelativePositionBias(nn.Module):
    """A learned bias for each head and each offset between two patches (Bao et al. 2021, appendix A).

    The table has a row for each of (2h - 1)(2w - 1) offsets and three more: class token to patch, patch to class
    token, class token to itself. It starts at zero, so that a fresh table changes nothing.
    """

    def __init__(self, grid: tuple[int, int], heads: int):
        super().__init__()
        _add_table(self, grid, heads)

    def forward(self) -> Tensor:
        """The bias of every pair of tokens: (heads, N, N) with N = 1 + h * w."""
        return _bias(self)


def _add_table(module: nn.Module, grid: tuple[int, int], heads: int) -> None:
    """Table and index on `module` itself, where the published files keep them."""
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    module.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
    module.register_buffer("relative_position_index", gen_relative_position_index(grid))


def _bias(module: Any) -> Tensor:
    return module.relative_position_bias_table[module.relative_position_index].permute(2, 0, 1)


class Attention(nn.Module):
    """Multi-head self-attention, with a table of relative positions of its own where `grid` is given."""

    def __init__(self, dim: int, heads: int, grid: tuple[int, int] | None, drop: float, attn_drop: float):
        super().__init__()
        self.heads, self.attn_drop, self.relative = heads, attn_drop, grid is not None
        if grid is not None:
            _add_table(self, grid, heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor, shared_bias: Tensor | None) -> Tensor:
        """Tokens (B, N, D) to the same shape; `shared_bias` (heads, N, N) is added to the scores."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        bias = shared_bias
        if self.relative:
            own = _bias(self).to(q.dtype)  # (heads, N, N)
            bias = own if bias is None else bias + own
        drop = self.attn_drop if self.training else 0.0
        if x.device.type == "cpu":
            # The published order of operations: a key's bias has no gradient but rounding, which Adam blows up to full
            # steps, so that only the same rounding gives the same trajectory.
            scores = (q * (D // self.heads) ** -0.5) @ k.transpose(-2, -1)  # (B, heads, N, N)
            x = F.dropout((scores if bias is None else scores + bias).softmax(dim=-1), drop) @ v
        else:
            mask = None if bias is None else bias[None]
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, D)))


class Block(nn.Module):
    """Pre-norm transformer block; `gamma_1` and `gamma_2` scale its branches (layer scale, Touvron et al. 2021)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int] | None,
        mlp_ratio: float,
        init_values: float,
        drop: float,
        attn_drop: float,
        drop_path: float,
    ):
        super().__init__()
        self.gamma_1 = self.gamma_2 = None
        if init_values > 0:
            self.gamma_1 = nn.Parameter(torch.full((dim,), float(init_values)))
            self.gamma_2 = nn.Parameter(torch.full((dim,), float(init_values)))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, grid, drop, attn_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)

    def forward(self, x: Tensor, shared_bias: Tensor | None = None) -> Tensor:  # (B, N, D)
        """Tokens (B, N, D) to the same shape; `shared_bias` as for the attention."""
        y = self.attn(self.norm1(x), shared_bias)
        x = x + self.drop_path(y if self.gamma_1 is None else self.gamma_1 * y)
        y = self.mlp(self.norm2(x))
        return x + self.drop_path(y if self.gamma_2 is None else self.gamma_2 * y)


class Beit(nn.Module):
    """BEiT's vision transformer for classification; parameter names and figures are those of its published code.

    Args:
        img_size: of the images, a side or (height, width), multiples of `patch_size`, all in pixels.
        num_classes: outputs of the head; 0 for features alone.
        use_abs_pos_emb: one learned vector for each position, added to the patches (as in SLIP's towers).
        use_rel_pos_bias: a table of relative positions in each block.
        use_shared_rel_pos_bias: one table for all blocks (BEiT's pre-training).
        use_mean_pooling: the head reads the mean over the patches through `fc_norm`; else the class token after `norm`.
        init_values: start of layer scale; 0 for none.
        drop, attn_drop, drop_path: rates; `drop_path` (stochastic depth) grows linearly from 0 in the first block.
        init_scale: factor on the head's fresh weights, so that the first predictions are near uniform.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        use_abs_pos_emb: bool = False,
        use_rel_pos_bias: bool = True,
        use_shared_rel_pos_bias: bool = False,
        use_mean_pooling: bool = True,
        init_values: float = 0.1,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        init_scale: float = 0.001,
    ):
        super().__init__()
        if any(side < patch_size or side % patch_size for side in height_width(img_size)):
            raise ValueError(
                f"images of {size_text(img_size)} pixels are no multiple of the patches of {patch_size} pixels"
            )
        self.num_classes, self.embed_dim, self.num_heads = num_classes, embed_dim, num_heads
        self.use_mean_pooling = use_mean_pooling
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim=embed_dim)
        grid = self.patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        tokens = 1 + self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim)) if use_abs_pos_emb else None
        self.pos_drop = nn.Dropout(drop)
        self.rel_pos_bias = RelativePositionBias(grid, num_heads) if use_shared_rel_pos_bias else None
        own_grid = grid if use_rel_pos_bias else None
        rates: Any = calculate_drop_path_rates(drop_path, depth)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, own_grid, mlp_ratio, init_values, drop, attn_drop, rate) for rate in rates
        )
        self.norm = nn.Identity() if use_mean_pooling else nn.LayerNorm(embed_dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6) if use_mean_pooling else None
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self._initialise(init_scale)

    def _initialise(self, init_scale: float) -> None:
        """Normal, std 0.02, biases zero; the patch projection keeps torch's own start, as in the published code."""
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            block: Any
            for i, block in enumerate(self.blocks, start=1):
                for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
                    weight.div_(math.sqrt(2 * i))  # the residual stream grows with the depth (BEiT, section 2.5)
            if isinstance(self.head, nn.Linear):
                self.head.weight.mul_(init_scale)

    num_prefix_tokens = 1  # the class token; timm's name for it

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's protocol: which parameters make up the stem and each block. All others belong with the head."""
        return dict(stem=r"^cls_token|^pos_embed|^patch_embed", blocks=r"^blocks\.(\d+)")

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to what the head reads, (B, embed_dim)."""
        x = self.patch_embed(x)  # (B, h * w, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, N, D)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = self.pos_drop(x)
        shared_bias = None if self.rel_pos_bias is None else self.rel_pos_bias().to(x.dtype)
        for block in self.blocks:
            x = block(x, shared_bias)
        x = self.norm(x)
        return x[:, 0] if self.fc_norm is None else self.fc_norm(x[:, 1:].mean(1))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        return self.head(self.forward_features(x))


def create_beit(name: str, **settings) -> Beit:
    """One of BEIT_MODELS with fresh weights; `settings` are arguments of Beit, among them `img_size`.

    Raises:
        ValueError: unknown name; the message lists the valid ones.
    """
    if name not in BEIT_MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(BEIT_MODELS)}")
    return Beit(**{**BEIT_MODELS[name], **settings})


# ---------------------------------------------------------------------------------------------------------------------
# A classifier over any image tower
# ---------------------------------------------------------------------------------------------------------------------


class TowerClassifier(nn.Module):
    """An image tower and one linear layer over its features, trained together.

    Args:
        visual: image tower, (B, 3, H, W) to (B, feature_dim).
        preprocess: how images are prepared for the tower; its normalisation stays the tower's own.
        tower: what towers.build.build_image_tower made `visual` from: vision_tower, vision_kwargs and image_size.
        freeze_batchnorm: BatchNorm keeps the running statistics of pre-training and goes on learning its scale and
            shift. Fine-tuning's batches on one process are small and may be mixed (mixup, cutmix), so that statistics
            gathered from them would fit neither pre-training's images nor the clean ones of evaluation.
    """

    def __init__(
        self,
        visual: nn.Module,
        feature_dim: int,
        num_classes: int,
        preprocess: Preprocess,
        tower: dict[str, Any],
        init_scale: float = 0.001,
        freeze_batchnorm: bool = True,
    ):
        super().__init__()
        self.visual, self.preprocess, self.freeze_batchnorm = visual, preprocess, freeze_batchnorm
        self.num_classes, self.tower = num_classes, tower
        self.head = nn.Linear(feature_dim, num_classes)
        trunc_normal_(self.head.weight, std=0.02 * init_scale)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> TowerClassifier:
        """The mode of all but a BatchNorm whose statistics are held."""
        super().train(mode)
        if self.freeze_batchnorm:
            for module in self.visual.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        return self.head(self.visual(x))


def tower_classifier(
    model: models.ImageModel,
    num_classes: int,
    *,
    image_size: Size | None = None,
    drop_path: float | None = None,
    init_scale: float = 0.001,
    freeze_batchnorm: bool = True,
) -> TowerClassifier:
    """The image tower of a model of models.py with its weights, under a fresh head.

    Args:
        model: from models.create_model or models.load_pretrained.
        image_size: in pixels, a side or (height, width), where it is not the model's own; a ViT's position embeddings
            are resampled.
        drop_path: stochastic depth of the last block; None keeps the tower's own. A tower that has none (ResNet-50 of
            MedCLIP) takes only None or 0.

    Raises:
        ValueError: the tower takes no such size or rate.
    """
    tower = tower_settings(model, image_size, drop_path)
    size = tower["image_size"]
    # A SimCLR model around the tower, with the smallest of heads: no text tower is built for nothing.
    rebuilt = models.create_model("SIMCLR_VITB16", **tower, ssl_mlp_dim=1, ssl_emb_dim=1)
    weights = {k: v for k, v in model.state_dict().items() if k.startswith("visual.")}
    weights = resize_position_embeddings(weights, rebuilt.visual, model.config["image_size"])
    load_weights(rebuilt, weights, f"{model.name} at {size_text(size)} pixels", other_head=True)
    preprocess = model.preprocess.at(size)
    return TowerClassifier(
        rebuilt.visual, rebuilt.feature_dim, num_classes, preprocess, tower, init_scale, freeze_batchnorm
    )


def tower_settings(model: models.ImageModel, image_size: Size | None, drop_path: float | None) -> dict[str, Any]:
    """What a model's tower is built from at this size and depth: vision_tower, vision_kwargs and image_size.

    Arguments and errors as those of `tower_classifier`.
    """
    config = model.config
    settings: dict[str, Any] = dict(config["vision_kwargs"])
    if drop_path is not None and config["vision_tower"] == "medclip-resnet50":
        if drop_path > 0:
            raise ValueError(f"medclip-resnet50 has no stochastic depth: --drop_path 0, not {drop_path:g}")
    elif drop_path is not None and is_library_tower(config["vision_tower"]):
        if "drop_path_rate" in settings:
            settings["drop_path_rate"] = drop_path
        elif drop_path > 0:
            raise ValueError(f"{config['vision_tower']} has no stochastic depth: --drop_path 0, not {drop_path:g}")
    elif drop_path is not None:
        settings["drop_path_rate"] = drop_path
    size = image_size or config["image_size"]
    return {"vision_tower": config["vision_tower"], "vision_kwargs": settings, "image_size": size}


def create_tower(name: str, num_classes: int, image_size: Size = 224, **options) -> TowerClassifier:
    """A classifier with fresh weights over the tower of one of models.MODELS, or over any tower of timm.

    Args:
        options: drop_path, init_scale, freeze_batchnorm of `tower_classifier`.

    Raises:
        ValueError: neither this project nor timm knows `name`.
    """
    if name in models.MODELS:
        settings = models.MODELS[name]
        tower = dict(vision_tower=settings.vision_tower, vision_kwargs=settings.vision_kwargs)
    elif timm.is_model(name):
        tower = dict(vision_tower=name, vision_kwargs={})
    else:
        raise ValueError(
            f"unknown model {name!r}: choose one of {', '.join([*BEIT_MODELS, *models.MODELS])}, or a timm model"
        )
    model = models.create_model("SIMCLR_VITB16", image_size=image_size, ssl_mlp_dim=1, ssl_emb_dim=1, **tower)
    return tower_classifier(model, num_classes, **options)
