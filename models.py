"""CLIP, SigLIP, SIMCLR and SLIP over any image tower and any text tower, and the table of named variants.

    create_model("SLIP_VITB16")                                  one of MODELS
    create_model("SLIP_VITT16", image_size=64, text_layers=2)    with any field of ModelConfig overridden

Towers come from towers/build.py, and losses from losses.py; what joins them to an objective is here.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit, softmax
from torch import Tensor, nn

import losses
import utils
from inputs.images import as_image
from inputs.sizes import Size, as_size, size_text
from inputs.transforms import Preprocess, eval_view
from runtime.checkpoints import strip_wrappers, training_progress, unfinished
from tokenizer import SimpleTokenizer, TokenizedTexts, Tokenizer, WordPieceTokenizer, create_tokenizer
from towers import sources
from towers.build import build_image_tower, build_text_tower, is_medclip_tower, preprocess_of, titled
from towers.files import is_medclip_state, read_pretrained
from towers.weights import load_weights, require_finite, resize_position_embeddings, unfilled

log = logging.getLogger("medslip")

LOGIT_SCALE_START = math.log(1 / 0.07)  # CLIP, section 2.5
LOGIT_SCALE_MAX = 4.6052  # ln(100): "clipped to prevent scaling the logits by more than 100"; the published value
SIGMOID_SCALE_START, SIGMOID_BIAS_START = math.log(10), -10.0  # Zhai et al. 2023, section 3.2


# ---------------------------------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------------------------------


def build_ssl_head(feature_dim: int, mlp_dim: int, emb_dim: int) -> nn.Sequential:
    """SimCLR's projection head d-mlp-mlp-emb with BatchNorm, as SLIP uses it (Mu et al. 2021, section 4.1)."""
    return nn.Sequential(
        OrderedDict(
            layer1=nn.Linear(feature_dim, mlp_dim),
            bn1=nn.BatchNorm1d(mlp_dim),
            relu1=nn.ReLU(inplace=True),
            layer2=nn.Linear(mlp_dim, mlp_dim),
            bn2=nn.BatchNorm1d(mlp_dim),
            relu2=nn.ReLU(inplace=True),
            layer3=nn.Linear(mlp_dim, emb_dim),
        )
    )


class ImageModel(nn.Module):
    """What the three models share: an image tower, and towers that can be held fixed.

    Args:
        name: of MODELS.
        config: all that determines the parameters; it says more than one class needs.

    Attributes:
        title: what people are told it is: the name, or where the image tower is another than that one's, the tower.
        config: the same as plain values, as checkpoints store it.
        objective: what it is trained for, of OBJECTIVES.
        preprocess: how its images are prepared; weights from elsewhere may bring a mean and deviation of their own.
        visual: the image tower, (B, 3, H, W) to (B, feature_dim).
    """

    text: Any

    def __init__(self, name: str, config: ModelConfig):
        super().__init__()
        self.name, self.config, self.objective = name, config.values(), objective_of(config)
        self.title = titled(name, config, MODELS.get(name))
        self.preprocess = preprocess_of(config.vision_tower, config.image_size)
        self.visual: Any
        if not config.vision_tower:
            raise ValueError(f"{name} takes its towers from another library's model: name it, as --init does")
        self.visual, self.feature_dim, projection = build_image_tower(
            config.vision_tower, config.vision_kwargs, config.image_size
        )  # fmt: skip
        self.attach_projection(projection)
        self.frozen: tuple[str, ...] = ()
        self.batchnorm_held = False
        # BatchNorm in a tower sees each view as a batch of its own; without it, one pass over all views is the same.
        self.joint_views = not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.visual.modules())

    def attach_projection(self, projection: nn.Module | None) -> None:
        """Keep the image tower's own projection to the space of captions, where the model has use for one."""

    def _views(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Features (B, d) of several views (B, 3, H, W) that share the image tower."""
        if self.joint_views:
            return self.visual(torch.cat(views)).chunk(len(views))  # (V*B, d) in one pass, then (B, d) each
        return tuple(self.visual(view) for view in views)  # (B, d) each

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The objective's inputs, in its order, to the dictionary of embeddings that its loss reads."""
        return self.heads(*self.towers(*inputs))

    def towers(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What does not mix the rows of a batch: image features (B, d) and text embeddings (B, embed_dim)."""
        raise NotImplementedError

    def heads(self, *features: Tensor) -> dict[str, Tensor]:
        """What does mix them, through BatchNorm: the embeddings of a batch from what `towers` returned."""
        raise NotImplementedError

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The attributes of which each tower consists: of `image` and, with captions, of `text`."""
        return {"image": ("visual",), **({"text": self.text.modules} if self.objective.text else {})}

    def freeze(self, tower: str) -> None:
        """Hold the `image` or the `text` tower fixed and in eval mode; its projection keeps learning."""
        if tower not in self.parts:
            raise ValueError(f"cannot freeze {tower!r}: this model has {list(self.parts)}")
        self.frozen += self.parts[tower]
        for name in self.parts[tower]:
            part = getattr(self, name).requires_grad_(False)
            if (own := getattr(part, "projection", None)) is not None:  # open_clip's text tower holds its own
                own.requires_grad_(True)
        self.train(self.training)

    def hold_batchnorm(self) -> int:
        """Let the image tower's BatchNorm keep the statistics it has, in training too; returns how many layers do.

        Their scales and shifts learn. A few hundred steps on another kind of images replace the statistics however low
        the learning rate, and with them what a pre-trained tower makes of every other kind.
        """
        self.batchnorm_held = True
        self.train(self.training)
        return len(self._norms())

    def _norms(self) -> list[nn.Module]:
        """The image tower's BatchNorm layers; asked each time, since several processes put others in their place."""
        return [m for m in self.visual.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def checkpoint_gradients(self) -> None:
        """Keep only the blocks' inputs of both towers for the backward pass (Chen et al. 2016, section 3)."""
        if self.joint_views:
            self.visual.set_grad_checkpointing()
        else:
            raise ValueError(
                "gradient checkpointing runs the image tower twice, and its BatchNorm would count each "
                "batch twice: choose a tower without BatchNorm"
            )
        if self.objective.text:
            self.text.checkpoint_gradients(self)

    def train(self, mode: bool = True) -> nn.Module:
        """The mode of all but what is held: frozen towers and BatchNorm stay in eval mode."""
        super().train(mode)
        for name in self.frozen:
            if isinstance(getattr(self, name), nn.Module):
                getattr(self, name).eval()
        for norm in self._norms() if self.batchnorm_held else ():
            norm.eval()
        return self


class CLIP(ImageModel):
    """Image-text contrast by a softmax (Radford et al. 2021), or by a sigmoid of each pair (Zhai et al. 2023).

    Attributes:
        logit_scale: logarithm of the inverse temperature ().
        logit_bias: of a sigmoid's logits (); None for a softmax, which would cancel it.
    """

    def __init__(self, name: str, config: ModelConfig):
        super().__init__(name, config)
        self.text = build_text_tower(
            config.text_tower, config.text_pooling, config.text_kwargs, context_length=config.context_length,
            vocab_size=config.vocab_size, width=config.text_width, heads=config.text_heads, layers=config.text_layers,
        )  # fmt: skip
        self.text.attach(self, config.embed_dim)
        sigmoid = self.objective.sigmoid
        self.logit_scale = nn.Parameter(torch.tensor(SIGMOID_SCALE_START if sigmoid else LOGIT_SCALE_START))
        self.logit_bias = nn.Parameter(torch.tensor(SIGMOID_BIAS_START)) if sigmoid else None

    def attach_projection(self, projection: nn.Module | None) -> None:
        """A library's own, or a matrix of fresh weights."""
        self.image_projection: Any = projection
        if projection is None:
            embed_dim = self.config["embed_dim"]
            self.image_projection = nn.Parameter(torch.empty(self.feature_dim, embed_dim))
            nn.init.normal_(self.image_projection, std=self.feature_dim**-0.5)

    def project(self, features: Tensor) -> Tensor:
        """Features (B, d) to embeddings (B, embed_dim)."""
        if isinstance(self.image_projection, nn.Module):
            return self.image_projection(features)
        return features @ self.image_projection

    def encode_image(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) to embeddings (B, embed_dim), not normalised."""
        return self.project(self.visual(image))

    def encode_text(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, L), zeros after the last one, to embeddings (B, embed_dim), not normalised.

        `attention_mask` (B, L) says which tokens are real where that is not every id up to the last non-zero one; only
        a BERT tower reads it.
        """
        return self.text.encode(self, tokens, attention_mask)

    def towers(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) and tokens (B, L) to features (B, d) and text embeddings (B, embed_dim)."""
        return self.visual(image), self.encode_text(text)  # (B, d), (B, embed_dim)

    def heads(self, features: Tensor, text_embed: Tensor) -> dict[str, Tensor]:
        """The same to embeddings of both sides (B, embed_dim), the inverse temperature () and a sigmoid's bias ()."""
        # A copy, since wrappers hang a hook on each output in each step, and a parameter would keep them all.
        bias = {} if self.logit_bias is None else {"logit_bias": self.logit_bias.clone()}  # ()
        return {
            "image_embed": self.project(features),  # (B, embed_dim)
            "text_embed": text_embed,  # (B, embed_dim)
            "logit_scale": self.logit_scale.exp(),  # ()
            **bias,
        }


class SIMCLR(ImageModel):
    """Contrast between two augmented views of an image (Chen et al. 2020)."""

    def __init__(self, name: str, config: ModelConfig):
        super().__init__(name, config)
        self.image_mlp = build_ssl_head(self.feature_dim, config.ssl_mlp_dim, config.ssl_emb_dim)

    def encode_image(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the tower's features (B, feature_dim)."""
        return self.visual(image)

    def towers(self, aug1: Tensor, aug2: Tensor) -> tuple[Tensor, ...]:
        """Two views (B, 3, H, W) to their features (B, d)."""
        return self._views(aug1, aug2)

    def heads(self, features1: Tensor, features2: Tensor) -> dict[str, Tensor]:
        # the head's BatchNorm sees each view as a batch of its own
        """The same through the projection head: (B, ssl_emb_dim) each."""
        return {"aug1_embed": self.image_mlp(features1), "aug2_embed": self.image_mlp(features2)}


class SLIP(CLIP):
    """CLIP and SimCLR with one image tower (Mu et al. 2021, algorithm 1): views of an image and its caption."""

    def __init__(self, name: str, config: ModelConfig):
        super().__init__(name, config)
        self.image_mlp = build_ssl_head(self.feature_dim, config.ssl_mlp_dim, config.ssl_emb_dim)

    def towers(self, image: Tensor, text: Tensor, *augs: Tensor) -> tuple[Tensor, ...]:
        """An image, its tokens and two views, or one beside it, to features (B, d), (B, embed_dim), features twice."""
        features, *others = self._views(image, *augs)  # (B, d) each
        features1, features2 = [features, *others][-2:]
        return features, self.encode_text(text), features1, features2

    def heads(self, features: Tensor, text_embed: Tensor, features1: Tensor, features2: Tensor) -> dict[str, Tensor]:
        # the SSL head's BatchNorm sees each view as a batch of its own
        """What CLIP returns, and the two views through the projection head (B, ssl_emb_dim)."""
        return super().heads(features, text_embed) | {
            "aug1_embed": self.image_mlp(features1),  # (B, ssl_emb_dim)
            "aug2_embed": self.image_mlp(features2),  # (B, ssl_emb_dim)
        }


# ---------------------------------------------------------------------------------------------------------------------
# Objectives
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """All that the scripts ask about a training objective. A new one is one entry of OBJECTIVES."""

    model: type[ImageModel]
    inputs: tuple[str, ...]  # what the model's forward takes, in its order: of datasets.ContrastiveDataset.INPUTS
    loss: Callable[[losses.LossSettings], nn.Module]  # maps what forward returns to a dictionary of metrics
    metrics: tuple[str, ...]  # keys of that dictionary, `loss` first
    validation: tuple[str, ...] = ()  # what can measure it on held-out data: retrieval, zero-shot
    sigmoid: bool = False  # whether its model judges each pair by itself, with a bias that learns and a free scale

    @property
    def text(self) -> bool:
        """Whether the model has a text side."""
        return "text" in self.inputs


OBJECTIVES = {
    "clip": Objective(
        model=CLIP,
        inputs=("image", "text"),
        loss=lambda s: losses.CLIPLoss(s.gather_with_grad, s.mask_duplicates),
        metrics=("loss", "clip_loss", "clip_acc"),
        validation=("retrieval", "zero-shot"),
    ),
    "simclr": Objective(
        model=SIMCLR,
        inputs=("view1", "view2"),
        loss=lambda s: losses.SIMCLRLoss(s.ssl_temp, s.mask_studies),
        metrics=("loss", "ssl_loss", "ssl_acc"),
    ),
    "slip": Objective(
        model=SLIP,
        inputs=("image", "text", "view1", "view2"),
        loss=lambda s: losses.SLIPLoss(
            losses.CLIPLoss(s.gather_with_grad, s.mask_duplicates),
            losses.SIMCLRLoss(s.ssl_temp, s.mask_studies),
            s.ssl_scale,
        ),
        metrics=("loss", "clip_loss", "ssl_loss", "clip_acc", "ssl_acc"),
        validation=("retrieval", "zero-shot"),
    ),
    "siglip": Objective(
        model=CLIP,
        inputs=("image", "text"),
        loss=lambda s: losses.SigLIPLoss(s.mask_duplicates),
        metrics=("loss", "siglip_loss", "siglip_acc"),
        validation=("retrieval", "zero-shot"),
        sigmoid=True,
    ),
    "sigslip": Objective(
        model=SLIP,
        inputs=("image", "text", "view1", "view2"),
        loss=lambda s: losses.SLIPLoss(
            losses.SigLIPLoss(s.mask_duplicates), losses.SIMCLRLoss(s.ssl_temp, s.mask_studies), s.ssl_scale
        ),
        metrics=("loss", "siglip_loss", "ssl_loss", "siglip_acc", "ssl_acc"),
        validation=("retrieval", "zero-shot"),
        sigmoid=True,
    ),
}


def objective_of(config: ModelConfig) -> Objective:
    """ValueError with the choices for an unknown one."""
    if config.objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {config.objective!r}: choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[config.objective]


# ---------------------------------------------------------------------------------------------------------------------
# The table of variants
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines a model's parameters, as plain values: a checkpoint stores it."""

    objective: str  # one of OBJECTIVES
    vision_tower: str  # a timm name, medclip-swin, medclip-resnet50, or a name of towers/library.py
    vision_kwargs: dict = field(default_factory=dict)  # passed on to the tower's constructor
    image_size: Size = 224  # pixels: the side, or height and width
    embed_dim: int = 512  # the space of images and captions
    text_tower: str = "clip"  # clip, bert, or a name of towers/library.py
    text_kwargs: dict = field(default_factory=dict)  # of such a one
    context_length: int = 77  # tokens
    vocab_size: int = 49408
    text_width: int = 512
    text_heads: int = 8
    text_layers: int = 12
    text_pooling: str = "masked"  # bert only: masked leaves padding out of the mean, medclip averages over it
    ssl_mlp_dim: int = 4096  # hidden width of the SimCLR head
    ssl_emb_dim: int = 256  # output width of the SimCLR head

    def values(self) -> dict[str, Any]:
        """All of it as a checkpoint stores it; what only another library's towers have is left out of the others."""
        return {name: value for name, value in asdict(self).items() if value or name != "text_kwargs"}


BERT_VOCABULARY = 28996  # tokens of Bio_ClinicalBERT, which MedCLIP's text tower was trained with
_TINY_TEXT: dict[str, Any] = dict(embed_dim=256, text_width=256, text_heads=4, text_layers=6)
_BERT_BASE: dict[str, Any] = dict(
    text_tower="bert", vocab_size=BERT_VOCABULARY, text_width=768, text_heads=12, text_layers=12
)
TOWERS: dict[str, dict[str, Any]] = {
    "VITT16": dict(vision_tower="vit_tiny_patch16_224", **_TINY_TEXT),
    "VITS16": dict(vision_tower="vit_small_patch16_224", vision_kwargs=dict(num_heads=12)),  # MoCo v3's ViT-S
    "VITB16": dict(vision_tower="vit_base_patch16_224"),
    "VITL16": dict(vision_tower="vit_large_patch16_224"),
}


def variants(objective: str) -> dict[str, ModelConfig]:
    """An objective with each of TOWERS, by name."""
    return {f"{objective.upper()}_{name}": ModelConfig(objective, **settings) for name, settings in TOWERS.items()}


MODELS: dict[str, ModelConfig] = {
    **{name: config for objective in OBJECTIVES for name, config in variants(objective).items()},
    "MEDCLIP_VIT": ModelConfig(objective="clip", vision_tower="medclip-swin", **_BERT_BASE),
    "MEDCLIP_RESNET": ModelConfig(objective="clip", vision_tower="medclip-resnet50", **_BERT_BASE),
    "MEDSLIP_VIT": ModelConfig(objective="slip", vision_tower="medclip-swin", **_BERT_BASE),
    "MEDSLIP_RESNET": ModelConfig(objective="slip", vision_tower="medclip-resnet50", **_BERT_BASE),
    # Whose towers are another library's, which brings the settings.
    **{name.upper(): ModelConfig(name, vision_tower="") for name in OBJECTIVES},
}


def is_medclip(config: dict) -> bool:
    """Whether both towers and the softmax are MedCLIP's, so that its weights fit."""
    softmax = not OBJECTIVES[config["objective"]].sigmoid
    return is_medclip_tower(config["vision_tower"]) and config["text_tower"] == "bert" and softmax


def resolve_config(name: str, **overrides) -> ModelConfig:
    """The settings of a named model with some fields of ModelConfig overridden.

    Raises:
        ValueError: unknown model or field, with the valid ones; a value of another kind.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    valid = {f.name for f in fields(ModelConfig)} - {"objective"}
    if unknown := sorted(set(overrides) - valid):
        raise ValueError(f"{name} has no setting {', '.join(unknown)}: choose from {', '.join(sorted(valid))}")
    for key, value in overrides.items():
        kind = ModelConfig.__annotations__[key]
        if kind == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}: {key} is a whole number from 1, not {value!r}")
        if kind in ("str", "dict") and not isinstance(value, {"str": str, "dict": dict}[kind]):
            raise ValueError(f"{name}: {key} is no {value!r}")
    if "vision_tower" in overrides and "vision_kwargs" not in overrides:
        overrides["vision_kwargs"] = {}  # the named model's settings belong to its own tower
    if "image_size" in overrides:
        overrides["image_size"] = as_size(overrides["image_size"])
    return replace(MODELS[name], **overrides)


def create_model(name: str, **overrides) -> ImageModel:
    """Build a model with fresh weights.

    Args:
        name: one of MODELS.
        overrides: fields of ModelConfig. Those that the objective has no use for are accepted and change nothing, so
            that one call serves all three (SLIP's constructors did the same).

    Raises:
        ValueError: unknown name, field or tower; the message lists the valid ones.
    """
    config = resolve_config(name, **overrides)
    return objective_of(config).model(name, config)


# models.SLIP_VITB16(ssl_mlp_dim=..., ssl_emb_dim=...) and its sisters, as SLIP's users import them.
globals().update({name: partial(create_model, name) for name in MODELS if name not in globals()})


# ---------------------------------------------------------------------------------------------------------------------
# Weights from files
# ---------------------------------------------------------------------------------------------------------------------


def rebuilt(model: Any, seed: int, **changes) -> Any:
    """A model of the same settings, but for `changes` (fields of ModelConfig), with fresh weights."""
    utils.seed_everything(seed)
    config = {key: value for key, value in model.config.items() if key != "objective"}
    fresh: Any = create_model(model.name, **{**config, **changes})
    fresh.preprocess = model.preprocess
    return fresh


def at_size(model: Any, size: Size) -> Any:
    """The same weights for images of another size (`resize_position_embeddings`), in the same mode."""
    resized = rebuilt(model, seed=0, image_size=size)
    weights = resize_position_embeddings(model.state_dict(), resized.visual, model.config["image_size"])
    load_weights(resized, weights, f"{model.name} at {size_text(size)} pixels")
    resized.preprocess = model.preprocess.at(size)
    return resized.train(model.training)


@dataclass
class Pretrained:
    """A model in eval mode with all that evaluating it takes."""

    model: ImageModel
    preprocess: Preprocess
    tokenizer: Tokenizer | None  # None: no text side, or MedCLIP's weights without --bert-vocab
    source: str  # what was loaded, for people
    training: dict[str, Any] = field(default_factory=dict)  # epoch, epochs, step and finished, of our checkpoints

    def embed_images(self, images: Sequence[Any], batch_size: int = 64) -> np.ndarray:
        """Unit vectors (n, d) of images: paths (DICOM too), Pillow images, or arrays (H, W) or (H, W, 3) of any depth.

        Of a model with captions in the space that it shares with them, else the tower's own features.
        """
        view, parts, encode = eval_view(self.preprocess), [], self.image_encoder()[0]
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                part = images[start : start + batch_size]
                batch = torch.stack([view(as_image(image), None) for image in part])  # (B, 3, H, W)
                features = F.normalize(encode(batch.to(device)).float(), dim=-1).cpu()  # (B, d)
                parts.append(require_finite(features).numpy())
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)

    def embed_captions(self, captions: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """Unit vectors (n, d) of captions; ValueError for a model that reads none."""
        model, tokenizer = self._reader()
        device, parts = next(self.model.parameters()).device, []
        tokens = TokenizedTexts(tokenizer, captions)
        batch_size = max(1, min(batch_size, IDS_AT_A_TIME // max(tokens.width, 1)))
        with torch.inference_mode():
            for start in range(0, len(tokens), batch_size):
                numbers = torch.arange(start, min(start + batch_size, len(tokens)))
                texts = F.normalize(model.encode_text(tokens[numbers].to(device)).float(), dim=-1)  # (B, d)
                parts.append(require_finite(texts.cpu(), "a caption"))
        return torch.cat(parts).numpy() if parts else np.zeros((0, 0), np.float32)  # (n, d)

    def zero_shot(
        self, images: Sequence[Any], labels: Sequence[str | Sequence[str]], templates: Sequence[str] = ("{}.",)
    ) -> np.ndarray:
        """Probabilities (n, k) of labels (an inner list for synonyms), each in every template, at the model's scale."""
        return self.label_probabilities(self.embed_images(images), labels, templates)

    def label_probabilities(
        self, vectors: np.ndarray, labels: Sequence[str | Sequence[str]], templates: Sequence[str] = ("{}.",)
    ) -> np.ndarray:
        """The same of images that are unit vectors (n, d) already."""
        from towers.prompts import zeroshot_classifier

        model, tokenizer = self._reader()
        device = next(self.model.parameters()).device
        classifier = zeroshot_classifier(model, tokenizer, labels, templates, device).cpu().numpy()  # (d, k)
        logits = float(model.logit_scale.detach().exp()) * (vectors @ classifier).astype(np.float64)  # (n, k)
        if model.logit_bias is not None:
            return expit(logits + float(model.logit_bias.detach()))
        return softmax(logits, axis=1)

    def image_encoder(self) -> tuple[Any, str]:
        """Images (B, 3, S, S) to features (B, d): where it shares a space with captions, and else the tower's own."""
        shared = bool(self.model.objective.text)
        return (self.model.encode_image, "projection") if shared else (self.model.visual, "backbone")

    def _reader(self) -> tuple[Any, Tokenizer]:
        if not self.model.objective.text:
            raise ValueError(f"{self.source} reads no captions")
        if self.tokenizer is None:
            raise ValueError(f"{self.source} needs bert_vocab, Bio_ClinicalBERT's vocab.txt, to read captions")
        return self.model, self.tokenizer


IDS_AT_A_TIME = 32_768  # of captions in one batch, padding counted: 64 of the longest that BERT reads


def load_pretrained(
    path: str | Path,
    *,
    model: str | None = None,
    bert_vocab: str | None = None,
    text_pooling: str | None = None,
    image_size: Size | None = None,
) -> Pretrained:
    """Load any weights this project reads, for evaluation.

    Args:
        path: a checkpoint of ours, a folder of export.py --to safetensors, a published SLIP file, MedCLIP's folder, zip
            or `pytorch_model.bin`, or a model of another library (towers/sources.py).
        model: name from MODELS, for a published file that does not say which model it holds.
        bert_vocab: `vocab.txt` of Bio_ClinicalBERT; only MedCLIP's own weights need it, and only to read text.
        text_pooling: masked or medclip; by default what the checkpoint says, and medclip for MedCLIP's own weights.
        image_size: pixels, where it is not the model's own: a side or (height, width); position embeddings follow.

    Raises:
        FileNotFoundError, ValueError: no such file; unreadable; not one of the three kinds; keys that do not fit.
    """
    if sources.library_of(path):
        return _from_library(sources.read_source(path), path, image_size)
    state = read_pretrained(path)
    pooling = {} if text_pooling is None else {"text_pooling": text_pooling}
    if is_medclip_state(state):
        loaded, tokenizer, kind = _from_medclip(state, path, bert_vocab, pooling)
    elif isinstance(state.get("model"), dict) and "config" in state["model"]:
        loaded, tokenizer, kind = _from_ours(state, path, pooling)
    elif "state_dict" in state:
        loaded, tokenizer, kind = _from_published(state, path, model)
    else:
        raise ValueError(
            f"{path} is neither a checkpoint of ours, nor a published SLIP file (no state_dict), nor "
            f"MedCLIP weights; its keys begin {list(state)[:5]}"
        )
    if image_size is not None and as_size(image_size) != loaded.preprocess.size:
        loaded = at_size(loaded, as_size(image_size))
    loaded.eval()
    remark = unfinished(state, path)
    if remark:
        log.warning(f"{path} is {remark}")
    source = f"{loaded.title} from {kind} {path}" + (f", {remark}" if remark else "")
    training = state.get("training") or training_progress(state, path)
    return Pretrained(loaded, loaded.preprocess, tokenizer, source, training)


def _from_library(found: sources.Found, path: str | Path, image_size: Size | None) -> Pretrained:
    if not found.has_image:
        raise ValueError(f"{path} is a text tower alone: it starts one in training (--text-weights)")
    if found.has_text:
        model = create_model("SIGLIP" if "logit_bias" in found.weights else "CLIP", **found.config)
    else:
        model = create_model("SIMCLR", **found.config, ssl_mlp_dim=1, ssl_emb_dim=1)
        for value in cast(Any, model).image_mlp.parameters():  # the smallest of heads, and the same each time
            nn.init.zeros_(value)
    sources.load(found, model)
    if image_size is not None and as_size(image_size) != model.preprocess.size:
        model = at_size(model, as_size(image_size))
    return Pretrained(model.eval(), model.preprocess, found.tokenizer, found.name)


def _from_ours(state: dict, path: str | Path, pooling: dict) -> tuple[ImageModel, Tokenizer | None, str]:
    if lacking := [key for key in ("state_dict", "preprocess") if not isinstance(state.get(key), dict)]:
        raise ValueError(f"{path} is no whole checkpoint of ours: it holds no {lacking[0]}")
    name, config = state["model"].get("name"), dict(state["model"]["config"])
    config.pop("objective", None)
    _refuse_larger(str(name), {**config, **pooling}, state["state_dict"], path)
    model = unfilled(create_model, str(name), **{**config, **pooling})
    load_weights(model, state["state_dict"], str(path), from_file=True)
    model.preprocess = Preprocess.from_dict(state["preprocess"])
    spec = state.get("tokenizer")
    return model, create_tokenizer(spec) if spec else None, "checkpoint"


def _refuse_larger(name: str, config: dict[str, Any], weights: dict, path: str | Path) -> None:
    """ValueError where a file describes a model that is far larger than what the file holds, before memory is taken."""
    if resolve_config(name, **config) == MODELS[name]:
        return
    with torch.device("meta"):  # shapes alone
        described = sum(value.numel() for value in create_model(name, **config).parameters())
    held = sum(value.numel() for value in weights.values() if isinstance(value, Tensor))
    if described > 2 * held + 1_000_000:
        raise ValueError(f"{path} describes a model of {described:,} parameters and holds {held:,}")


def _from_medclip(
    state: dict, path: str | Path, bert_vocab: str | None, pooling: dict
) -> tuple[ImageModel, Tokenizer | None, str]:
    from towers import medclip

    name = {"medclip-swin": "MEDCLIP_VIT", "medclip-resnet50": "MEDCLIP_RESNET"}[medclip.tower_name(state)]
    model = create_model(name, **{"text_pooling": "medclip", **pooling})
    medclip.load_medclip(model, state, str(path))
    tokenizer = WordPieceTokenizer(bert_vocab) if bert_vocab else None
    return model, tokenizer, "MedCLIP weights"


def _from_published(state: dict, path: str | Path, name: str | None) -> tuple[ImageModel, Tokenizer | None, str]:
    args = state.get("args")
    args = vars(args) if args is not None and not isinstance(args, dict) else args or {}
    name = name or args.get("model")
    if name not in MODELS:
        raise ValueError(f"{path} holds model {name!r}: name one of {', '.join(MODELS)} that it was trained as")
    weights = strip_wrappers(state["state_dict"])
    head = {}
    if "image_mlp.layer1.weight" in weights:
        head = dict(
            ssl_mlp_dim=len(weights["image_mlp.layer1.weight"]), ssl_emb_dim=len(weights["image_mlp.layer3.weight"])
        )
    model = unfilled(create_model, name, **head)
    load_weights(model, weights, str(path))
    tokenizer = SimpleTokenizer() if model.objective.text else None
    return model, tokenizer, "published checkpoint"


def initialise(model: ImageModel, path: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Start `model` from the weights at `path` alone: towers must match, a ViT's position embeddings are resized to the
    model's image size, and a SimCLR head that only one side has is passed over.

    Args:
        tokenizer: of the new run; one that numbers the words in another way is refused where the file says its own.
    """
    state = read_pretrained(path)
    if tokenizer is not None and (spec := state.get("tokenizer")) is not None:
        ours = tokenizer.spec()
        if any(spec.get(key) != ours.get(key) for key in ("kind", "vocab", "lowercase")):
            raise ValueError(
                f"the vocabulary of {path} ({spec['kind']}) and that of this run ({ours['kind']}) differ: the same ids "
                "would mean other words; give the same --bert-vocab as its run, or none where it had none"
            )
    if is_medclip_state(state):
        from towers import medclip

        medclip.load_medclip(model, state, str(path))
        return
    if "state_dict" not in state:
        raise ValueError(f"{path} holds no state_dict; its keys begin {list(state)[:5]}")
    theirs = Preprocess.from_dict(state["preprocess"]) if "preprocess" in state else None
    weights = strip_wrappers(state["state_dict"])
    weights = resize_position_embeddings(weights, model.visual, theirs and theirs.size)
    load_weights(model, weights, str(path), other_head=True)
    if theirs is not None:  # the tower goes on with the normalisation that it knows
        model.preprocess = replace(model.preprocess, mean=theirs.mean, std=theirs.std)
