"""Models of open_clip and transformers as towers: the library's own modules, built from plain settings.

A tower's name says whose it is, `transformers:siglip_vision_model` or `open-clip:`, and its settings are the library's
own configuration. A checkpoint holds both, so that it is read back without the folder it came from and without a
network. What a folder or a hub holds is read by towers/sources.py.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inputs.sizes import Size, height_width, size_text
from towers.padding import by_length
from towers.weights import refuse_margin

TRANSFORMERS, OPEN_CLIP = "transformers:", "open-clip:"


def is_library_tower(name: str) -> bool:
    """Whether a tower is a module of open_clip or transformers."""
    return name.startswith((TRANSFORMERS, OPEN_CLIP))


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

# Keys that name files, addresses, weights, code or kernels to fetch; what a run does not need is left out as well.
_FOREIGN = re.compile(
    "^_|auto_map|pretrained(?!_window_sizes)|checkpoint|cache|hub|url|file|(?<!drop_)path|name_or|hf_model_name|"
    "tokenizer|implementation|backend|transformers_version|architectures|problem_type|id2label|label2id"
)
_WORD = re.compile(r"[A-Za-z0-9_.\-]{0,64}")


def plain_settings(config: dict[str, Any]) -> dict[str, Any]:
    """A library's configuration without what names files, addresses or weights, as a checkpoint may hold it."""
    kept = {}
    for key, value in config.items():
        if _FOREIGN.search(key):
            continue
        value = plain_settings(value) if isinstance(value, dict) else value
        if _is_plain(value):
            kept[key] = value
    return kept


def check_library_settings(name: str, settings: dict[str, Any]) -> None:
    """ValueError for a setting that `plain_settings` would not have kept: a checkpoint brings them from anywhere."""
    for key, value in settings.items():
        if not isinstance(key, str) or _FOREIGN.search(key):
            raise ValueError(f"tower {name!r}: {key} is no setting of an architecture")
        if isinstance(value, dict):
            check_library_settings(name, value)
        elif not _is_plain(value):
            raise ValueError(f"tower {name!r}: {key} takes numbers and short words, not {str(value)[:80]!r}")


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) and not isinstance(item, dict) for item in value)
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return value is None or isinstance(value, (bool, int, float, dict))


# ---------------------------------------------------------------------------------------------------------------------
# transformers
# ---------------------------------------------------------------------------------------------------------------------


def keep_inputs_alone(module: Any) -> None:
    """Checkpoint the gradients of a module of transformers, by the name that its release has for it (5.24: the new)."""
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable()


def _pooled(out: Any) -> Tensor:
    return out.pooler_output


def _flat(out: Any) -> Tensor:
    return out.pooler_output.flatten(1)  # (B, d, 1, 1)


def _first_token(out: Any) -> Tensor:
    return out.last_hidden_state[:, 0]


@dataclass(frozen=True)
class _Vision:
    """An image architecture of transformers: its class, and how its output becomes one vector."""

    cls: str
    features: Callable[[Any], Tensor] = _pooled
    follows_size: bool = False  # takes interpolate_pos_encoding; the others need none, or have one size
    extra: tuple[tuple[str, Any], ...] = ()  # of the constructor


VISION: dict[str, _Vision] = {  # by model_type
    "clip_vision_model": _Vision("CLIPVisionModel", follows_size=True),
    "siglip_vision_model": _Vision("SiglipVisionModel", follows_size=True),
    "siglip2_vision_model": _Vision("Siglip2VisionModel"),
    # The pooler of a ViT is a layer of its pre-training; classifiers read the class token.
    "vit": _Vision("ViTModel", _first_token, follows_size=True, extra=(("add_pooling_layer", False),)),
    "dinov2": _Vision("Dinov2Model"),
    "dinov2_with_registers": _Vision("Dinov2WithRegistersModel"),
    "dinov3_vit": _Vision("DINOv3ViTModel"),
    "dinov3_convnext": _Vision("DINOv3ConvNextModel"),
    "swin": _Vision("SwinModel", follows_size=True),
    "swinv2": _Vision("Swinv2Model", follows_size=True),
    "convnext": _Vision("ConvNextModel"),
    "convnextv2": _Vision("ConvNextV2Model"),
    "resnet": _Vision("ResNetModel", _flat),
}
PAIRS = {  # model_type of a pair: (its class, of its image side, of its text side)
    "clip": ("CLIPModel", "clip_vision_model", "clip_text_model"),
    "siglip": ("SiglipModel", "siglip_vision_model", "siglip_text_model"),
    "siglip2": ("Siglip2Model", "siglip2_vision_model", "siglip2_text_model"),
}
TEXT = {  # model_type: class; encoders without a read-out of their own get the mean over a caption's tokens
    "clip_text_model": "CLIPTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2_text_model": "Siglip2TextModel",
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "modernbert": "ModernBertModel",
}


def hf_config(settings: dict[str, Any]) -> Any:
    """The configuration object of transformers; ValueError for a model type that is none of VISION, PAIRS or TEXT."""
    import transformers

    kind = settings.get("model_type")
    known = [*VISION, *PAIRS, *TEXT]
    if kind not in known:
        raise ValueError(f"transformers' model type {kind!r} is none that can be a tower: {', '.join(known)}")
    rest = {key: value for key, value in settings.items() if key != "model_type"}
    try:
        return transformers.AutoConfig.for_model(kind, **rest)
    except Exception as error:  # its validation raises many kinds
        raise ValueError(f"transformers takes no such settings of {kind}: {error}") from error


class HFImageTower(nn.Module):
    """An image model of transformers: images (B, 3, H, W) to its own pooled features (B, d)."""

    def __init__(self, settings: dict[str, Any], size: Size):
        super().__init__()
        import transformers

        config = hf_config({key: value for key, value in settings.items() if key != "projection_dim_of_pair"})
        if (channels := getattr(config, "num_channels", 3)) != 3 or not getattr(config, "vision_use_head", True):
            what = f"images of {channels} channels" if channels != 3 else "no head that pools"
            raise ValueError(f"a {config.model_type} with {what} is no tower here: three channels and a pooled output")
        self.kind = VISION[config.model_type]
        self.model: Any = getattr(transformers, self.kind.cls)(config, **dict(self.kind.extra))
        self.width = config.hidden_size if hasattr(config, "hidden_size") else config.hidden_sizes[-1]
        patch: Any = getattr(config, "patch_size", None)
        self.patch = patch if config.model_type == "siglip2_vision_model" else None
        if isinstance(patch, int) and config.model_type not in ("swin", "swinv2"):  # those pad
            refuse_margin(config.model_type, (patch, patch), size)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to features (B, d)."""
        if self.patch is not None:
            return self.kind.features(self.model(**patches_of(images, self.patch)))
        resize = {"interpolate_pos_encoding": True} if self.kind.follows_size else {}
        return self.kind.features(self.model(pixel_values=images, **resize))

    def set_grad_checkpointing(self) -> None:
        """Keep only the blocks' inputs for the backward pass."""
        keep_inputs_alone(self.model)


def patches_of(images: Tensor, patch: int) -> dict[str, Tensor]:
    """Images (B, 3, H, W) as SigLIP 2 reads them: patches (B, N, patch*patch*3), all of them real, and their grid."""
    B, C, H, W = images.shape
    h, w = H // patch, W // patch
    grid = images.view(B, C, h, patch, w, patch).permute(0, 2, 4, 3, 5, 1)  # (B, h, w, patch, patch, C)
    shapes = torch.tensor([[h, w]], device=images.device).expand(B, 2)
    return {
        "pixel_values": grid.reshape(B, h * w, patch * patch * C),
        "pixel_attention_mask": torch.ones(B, h * w, dtype=torch.long, device=images.device),
        "spatial_shapes": shapes,
    }


def positions(config: Any) -> int:
    """The longest text that a text model of transformers has positions for; RoBERTa's first is behind its padding."""
    longest = config.max_position_embeddings
    return longest - config.pad_token_id - 1 if "roberta" in config.model_type else longest


class HFTextTower(nn.Module):
    """A text model of transformers: token ids (B, L) to its pooled output, or the mean over a caption's own (B, d)."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        import transformers

        config = hf_config({key: value for key, value in settings.items() if key != "projection_dim_of_pair"})
        self.config = config
        self.pooled = config.model_type.endswith("_text_model")
        no_pooler = {} if self.pooled or config.model_type == "modernbert" else {"add_pooling_layer": False}
        self.model: Any = getattr(transformers, TEXT[config.model_type])(config, **no_pooler)
        self.width = getattr(config, "projection_size", None) or config.hidden_size

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L), padded as their tokenizer does, to features (B, d)."""
        if self.pooled:
            return self.model(input_ids=tokens).pooler_output
        return by_length(self._mean, tokens, tokens != self.config.pad_token_id, self.model)

    def _mean(self, tokens: Tensor) -> Tensor:
        real = (tokens != self.config.pad_token_id).long()  # (B, L)
        x = self.model(input_ids=tokens, attention_mask=real).last_hidden_state  # (B, L, d)
        return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)

    def set_grad_checkpointing(self) -> None:
        """Keep only the layers' inputs for the backward pass."""
        keep_inputs_alone(self.model)


# ---------------------------------------------------------------------------------------------------------------------
# open_clip
# ---------------------------------------------------------------------------------------------------------------------


def open_clip_net(settings: dict[str, Any], size: Size | None = None) -> Any:
    """open_clip's own pair from its `model_cfg`, with fresh weights; ImportError without open_clip.

    A text tower of transformers is named by a hub's id there, a tower of timm by its name. Their own configurations,
    under `text_config` and `timm_config` here, are put where the library looks for them, so that nothing is fetched.

    Args:
        size: of the images in pixels, where it is not that of `settings`.

    Raises:
        ValueError: settings or a size that the towers do not take.
    """
    try:
        from open_clip.model import CustomTextCLIP
    except ImportError as error:
        raise ImportError("this model is open_clip's: pip install open_clip_torch") from error
    settings = json.loads(json.dumps(settings))  # a copy, tuples as lists
    text_config, timm_config = settings.pop("text_config", None), settings.pop("timm_config", None)
    settings.pop("custom_text", None)
    vision = settings["vision_cfg"]
    vision["timm_model_pretrained"] = False
    by_timm = timm_config is not None or bool(vision.get("timm_model_name"))
    own = vision.get("image_size", 224)
    own_size = height_width(own if isinstance(own, int) else tuple(own))
    other = size if size is not None and height_width(size) != own_size else None
    if other is not None and not by_timm:
        if not isinstance(vision.get("layers", 12), int):
            raise ValueError(
                f"open_clip's ResNet pools by attention over the positions of {size_text(own)} pixels, and takes no "
                f"images of {size_text(other)}: leave --image-size out"
            )
        refuse_margin("open_clip's ViT", (vision.get("patch_size", 16),) * 2, other)
        vision["image_size"] = list(height_width(other))
    with tempfile.TemporaryDirectory() as folder:
        if timm_config is not None:
            (Path(folder) / "image").mkdir()
            written = json.dumps({**timm_config, "pretrained_cfg": {}})
            (Path(folder) / "image" / "config.json").write_text(written)
            vision["timm_model_name"] = f"local-dir:{folder}/image"
        if text_config is not None:
            (Path(folder) / "config.json").write_text(json.dumps(text_config))
            settings["text_cfg"] |= {"hf_model_name": folder, "hf_model_pretrained": False}
        try:
            # The same towers as those of a plain CLIP, but each a module of its own.
            net = CustomTextCLIP(**settings)
        except Exception as error:  # of any kind, on settings that are not its own
            raise ValueError(f"open_clip takes no such settings: {type(error).__name__}: {error}") from error
    if other is not None and by_timm:
        visual: Any = net.visual
        patch = getattr(getattr(visual.trunk, "patch_embed", None), "patch_size", None)
        if patch is not None:
            refuse_margin("open_clip's tower of timm", height_width(patch), other)
        visual.set_input_size(height_width(other))
    return net


class _Matrix(nn.Module):
    """A projection (d, e) that its library holds as a bare parameter."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, d) to (B, e)."""
        return x @ self.weight


class OpenCLIPImageTower(nn.Module):
    """An image tower of open_clip without the projection into the space of captions: (B, 3, H, W) to (B, d)."""

    def __init__(self, visual: Any):
        super().__init__()
        head = getattr(visual, "head", None)
        self.projection: nn.Module = nn.Identity()
        if isinstance(getattr(visual, "proj", None), nn.Parameter):  # its own ViT
            self.projection = _Matrix(visual.proj)
            visual.proj = None
        elif isinstance(head, nn.Sequential) and len(head):  # a tower of timm
            self.projection, visual.head = head, nn.Identity()
        self.model = visual

    @property
    def positioned(self) -> tuple[str, nn.Module]:
        """The module that holds the position embeddings, by its name in this one."""
        trunk = getattr(self.model, "trunk", None)
        return ("model.", self.model) if trunk is None else ("model.trunk.", trunk)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to features (B, d)."""
        out = self.model(images)
        return out[0] if isinstance(out, tuple) else out

    def set_grad_checkpointing(self) -> None:
        """Keep only the blocks' inputs for the backward pass."""
        self.model.set_grad_checkpointing()


class OpenCLIPTextTower(nn.Module):
    """A text tower of open_clip: token ids (B, L) to embeddings (B, embed_dim)."""

    def __init__(self, text: Any):
        super().__init__()
        self.model = text

    @property
    def projection(self) -> Any:
        """What ends in the space of captions: a module or a parameter of open_clip's own, or None."""
        own = getattr(self.model, "text_projection", None)
        return getattr(self.model, "proj", None) if own is None else own

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L), padded as their tokenizer does, to embeddings (B, embed_dim)."""
        return self.model(tokens)

    def set_grad_checkpointing(self) -> None:
        """Keep only the layers' inputs for the backward pass."""
        theirs = getattr(self.model, "transformer", None)
        if hasattr(theirs, "gradient_checkpointing_enable"):  # of transformers
            keep_inputs_alone(theirs)
        else:
            self.model.set_grad_checkpointing()


# ---------------------------------------------------------------------------------------------------------------------
# Either
# ---------------------------------------------------------------------------------------------------------------------


def build_image_tower(name: str, settings: dict[str, Any], size: Size) -> tuple[Any, int, nn.Module | None]:
    """The image tower with fresh weights, the width of its features, and its projection to the space of captions.

    Args:
        name: `transformers:MODEL_TYPE` or `open-clip:`.
        settings: the library's own configuration; of an image tower that is half of a CLIP of transformers with
            `projection_dim_of_pair`, the width of that space.
        size: of the images in pixels.

    Returns:
        None for the projection of a tower that comes alone; nn.Identity where features are in that space already.

    Raises:
        ImportError: without open_clip. ValueError: settings or a size that the tower does not take.
    """
    check_library_settings(name, settings)
    if name.startswith(TRANSFORMERS):
        tower = HFImageTower(settings, size)
        projection: nn.Module | None = None
        if width := settings.get("projection_dim_of_pair"):
            projection = nn.Linear(tower.width, width, bias=False)
            nn.init.normal_(projection.weight, std=tower.width**-0.5)
        elif settings["model_type"].startswith("siglip"):
            projection = nn.Identity()
        return tower, tower.width, projection
    tower = OpenCLIPImageTower(open_clip_net(settings, size).visual)
    projection, tower.projection = tower.projection, nn.Identity()
    was_training = tower.training
    with torch.no_grad():
        width = tower.eval()(torch.zeros(1, 3, *height_width(size))).shape[1]
    tower.train(was_training)
    return tower, width, projection


@dataclass(frozen=True)
class LibraryText:
    """A text tower of a library, as `models.CLIP` holds one; token ids are padded as its own tokenizer does."""

    name: str
    settings: dict[str, Any]
    context_length: int
    modules = ("text_tower",)

    @property
    def reads_padding(self) -> bool:
        """Whether a shorter row of ids gives another embedding, or none.

        SigLIP was trained on captions padded to the full length, which its attention sees and its read-out is at.
        """
        if self.name.startswith(TRANSFORMERS):
            return self.settings["model_type"].startswith("siglip")
        return "text_config" not in self.settings  # its own text tower has a mask of the whole length

    def _check_length(self) -> None:
        """ValueError for a context that the tower cannot read."""
        theirs = self.settings if self.name.startswith(TRANSFORMERS) else self.settings.get("text_config")
        if theirs is None:
            length = self.settings["text_cfg"].get("context_length", 77)
            if self.context_length != length:
                raise ValueError(
                    f"open_clip's own text tower reads rows of {length} tokens, no context of {self.context_length}"
                )
            return
        settings = {key: value for key, value in theirs.items() if key != "projection_dim_of_pair"}
        if settings.get("model_type") not in TEXT:  # a text tower that open_clip knows, and this project not
            return
        if self.context_length > (longest := positions(hf_config(settings))):
            raise ValueError(
                f"the text tower, transformers' {settings['model_type']}, has positions for {longest} tokens, too few "
                f"for a context of {self.context_length}"
            )

    def attach(self, model: Any, embed_dim: int) -> None:
        """Register the tower on `model`, and a projection (width, embed_dim) where it does not end in that space."""
        check_library_settings(self.name, self.settings)
        self._check_length()
        if self.name.startswith(OPEN_CLIP):
            model.text_tower = OpenCLIPTextTower(open_clip_net(self.settings).text)
            return
        model.text_tower = HFTextTower(self.settings)
        width = model.text_tower.width
        if width != embed_dim or not self.settings["model_type"].startswith("siglip"):
            model.text_projection = nn.Parameter(torch.empty(width, embed_dim))
            nn.init.normal_(model.text_projection, std=width**-0.5)

    def checkpoint_gradients(self, model: Any) -> None:
        """Keep only the layers' inputs for the backward pass."""
        model.text_tower.set_grad_checkpointing()

    def encode(self, model: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, L) to embeddings (B, embed_dim)."""
        if tokens.shape[1] > self.context_length:
            raise ValueError(f"captions of {tokens.shape[1]} tokens do not fit a context of {self.context_length}")
        x = model.text_tower(tokens)
        return x @ model.text_projection if hasattr(model, "text_projection") else x
