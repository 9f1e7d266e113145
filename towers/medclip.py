"""MedCLIP's towers (Wang et al. 2022, section 3.2), and its weight files read and written key for key.

The image tower is Hugging Face's Swin-Tiny or torchvision's ResNet-50, the text tower Bio_ClinicalBERT. MedCLIP saved
its weights under transformers 4.24; later releases name parts of Swin differently, so names are mapped either way.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from transformers import BertConfig, BertModel, SwinConfig, SwinModel

import utils
from inputs.sizes import Size, height_width, size_text
from runtime.limits import BYTES
from towers.library import keep_inputs_alone
from towers.padding import by_length
from towers.weights import Mismatch

POOLINGS = ("masked", "medclip")
WEIGHTS_NAME = "pytorch_model.bin"


class SwinTower(SwinModel):
    """Hugging Face's Swin; (B, 3, H, W) to the mean of the last stage's normalised tokens (B, 768)."""

    def forward(self, pixel_values: Tensor) -> Any:  # a Tensor: the mean pooling is always there
        """Images (B, 3, H, W) to features (B, 768)."""
        return super().forward(pixel_values, interpolate_pos_encoding=True).pooler_output

    def set_grad_checkpointing(self) -> None:
        """Keep only the blocks' inputs for the backward pass."""
        keep_inputs_alone(self)


SWIN_SETTINGS = (
    "embed_dim", "depths", "num_heads", "window_size", "patch_size", "mlp_ratio", "qkv_bias", "drop_path_rate",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "use_absolute_embeddings", "initializer_range",
    "layer_norm_eps",
)  # fmt: skip


def build_image_tower(name: str, settings: dict, size: Size = 224) -> tuple[nn.Module, int]:
    """The image tower with fresh weights, and the width of its features.

    Args:
        name: medclip-swin or medclip-resnet50.
        settings: fields of transformers.SwinConfig that differ from Swin-Tiny patch4 window7 224 (Swin only).
        size: of the images in pixels.

    Raises:
        ValueError: unknown name; settings that it does not take; images in whose last stage a window has no room.
    """
    if name == "medclip-swin":
        if unknown := sorted(set(settings) - set(SWIN_SETTINGS)):
            raise ValueError(f"medclip-swin has no setting {unknown[0]}: choose from {', '.join(SWIN_SETTINGS)}")
        tiny = dict(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, drop_path_rate=0.1)
        config = SwinConfig(**{**tiny, **settings})
        scale = config.patch_size * 2 ** (len(config.depths) - 1)  # of the last stage
        if math.ceil(min(height_width(size)) / scale) < config.window_size:  # transformers fails at the first image
            least = scale * (config.window_size - 1) + 1
            raise ValueError(f"medclip-swin takes images of at least {least} pixels a side, not {size_text(size)}")
        return SwinTower(config), config.hidden_size
    if name == "medclip-resnet50":
        if settings:
            raise ValueError(f"medclip-resnet50 takes no settings, got {settings}")
        tower: Any = resnet50()
        tower.fc = nn.Identity()  # MedCLIP's fc is the projection, which the model holds
        return tower, 2048
    raise ValueError(f"unknown MedCLIP image tower {name!r}: choose medclip-swin or medclip-resnet50")


@dataclass(frozen=True)
class BertText:
    """BERT with MedCLIP's read-out: the mean over the first, second and last layer, over tokens, then a projection.

    `pooling` medclip averages over every position, padding included, exactly as MedCLIP does, so a caption's embedding
    depends on the longest caption beside it; masked averages over the caption's own tokens.
    """

    context_length: int = 77
    vocab_size: int = 28996
    width: int = 768
    heads: int = 12
    layers: int = 12
    pooling: str = "masked"
    modules = ("bert",)

    @property
    def reads_padding(self) -> bool:
        """Whether an embedding depends on how far its caption is padded."""
        return self.pooling == "medclip"

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise ValueError(f"unknown text pooling {self.pooling!r}: choose one of {', '.join(POOLINGS)}")
        if self.context_length > 512:
            raise ValueError(f"BERT reads at most 512 tokens, not {self.context_length}")
        if self.layers < 2:
            raise ValueError(f"MedCLIP's text embedding reads layers 1, 2 and the last, so {self.layers} is too few")

    def attach(self, model: Any, embed_dim: int) -> None:
        """Register BERT and its projection on `model`. The pooler, which MedCLIP never reads, is skipped."""
        config = BertConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            use_cache=False,
        )
        model.bert = BertModel(config, add_pooling_layer=False)
        model.text_projection = nn.Parameter(torch.empty(self.width, embed_dim))
        nn.init.normal_(model.text_projection, std=self.width**-0.5)

    def checkpoint_gradients(self, model: Any) -> None:
        """Keep only the layers' inputs for the backward pass."""
        keep_inputs_alone(model.bert)

    def encode(self, model: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, L) to embeddings (B, embed_dim); real tokens are those up to the last id that is not 0."""
        if attention_mask is None and not self.reads_padding:
            return by_length(partial(self._encode, model), tokens, tokens != 0, model.bert)
        return self._encode(model, tokens, attention_mask)

    def _encode(self, model: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            attention_mask = (tokens != 0).flip(1).cumsum(1).flip(1) > 0  # (B, L)
        mask = self._whole_mask(attention_mask > 0, model.bert)  # (B, 1, L, L)
        hidden = model.bert(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        x = (hidden[1] + hidden[2] + hidden[-1]) / 3  # (B, L, D)
        if self.pooling == "medclip":
            x = x.mean(1)  # (B, D)
        else:
            mask = attention_mask.to(x.dtype).unsqueeze(-1)  # (B, L, 1)
            x = (x * mask).sum(1) / mask.sum(1).clamp(min=1)  # (B, D)
        return x @ model.text_projection  # (B, embed_dim)

    @staticmethod
    def _whole_mask(real: Tensor, bert: Any) -> Tensor:
        """Real tokens (B, L) as the mask (B, 1, L, L) of every layer.

        From (B, L) transformers makes it itself, but first asks whether all are real, which waits for the device.
        """
        B, L = real.shape
        mask = real[:, None, None, :].expand(B, 1, L, L)  # the same for every query
        if bert.config._attn_implementation != "eager":
            return mask
        return torch.zeros((), dtype=bert.dtype, device=real.device).masked_fill(
            ~mask, torch.finfo(bert.dtype).min
        )  # added to scores


# ---------------------------------------------------------------------------------------------------------------------
# Weight files
# ---------------------------------------------------------------------------------------------------------------------

# (transformers 4.24, transformers 5), in the order in which they apply: `.attention.output.dense.` before `.output.`.
_SWIN_NAMES = (
    (".attention.self.query.", ".attention.q_proj."),
    (".attention.self.key.", ".attention.k_proj."),
    (".attention.self.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
    (".attention.self.relative_position_bias_table", ".attention.relative_position_bias.relative_position_bias_table"),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)
# Stored by MedCLIP, read by nobody: two fixed index buffers and BERT's pooler.
_UNUSED = re.compile(r"\.relative_position_index$|\.position_ids$|^text_model\.model\.pooler\.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """MedCLIP's state dictionary from its folder, its zip, or `pytorch_model.bin` itself.

    Raises:
        FileNotFoundError: nothing there, or no pytorch_model.bin in the folder or zip.
        ValueError: the file is no readable dictionary of tensors.
    """
    path = Path(path)
    if path.is_dir():
        if any(path.glob("checkpoint*.pt")):
            raise FileNotFoundError(f"{path} is the folder of a run: name its checkpoint_best.pt")
        found = [*path.glob(WEIGHTS_NAME), *path.glob(f"*/{WEIGHTS_NAME}")]
        if len(found) != 1:
            raise FileNotFoundError(f"{path} holds {len(found)} files named {WEIGHTS_NAME}, expected one")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"MedCLIP weights {path} do not exist")
    utils.refuse_lfs_pointer(path)
    source: Path | io.BytesIO = path
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if name.split("/")[-1] == WEIGHTS_NAME]
            if len(inside) == 1:
                BYTES.refuse(archive.getinfo(inside[0]).file_size, f"{path}/{inside[0]}")
                source = io.BytesIO(archive.read(inside[0]))
            elif not any(name.endswith("/data.pkl") for name in archive.namelist()):  # torch's own files are zips too
                raise FileNotFoundError(f"{path} holds {len(inside)} files named {WEIGHTS_NAME}, expected one")
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a torn or foreign file
        raise ValueError(f"{path} is not a readable {WEIGHTS_NAME}: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} does not hold a dictionary of tensors")
    return state


def tower_name(state: dict[str, Tensor]) -> str:
    """Which image tower a MedCLIP state dictionary belongs to: medclip-swin or medclip-resnet50."""
    return "medclip-resnet50" if "vision_model.model.conv1.weight" in state else "medclip-swin"


def _to_medclip_name(key: str) -> str:
    """The name that MedCLIP under transformers 4.24 gives to our parameter or buffer `key`."""
    fixed = {"logit_scale": "logit_scale", "text_projection": "text_model.projection_head.weight"}
    if key in fixed:
        return fixed[key]
    if key.startswith("bert."):
        return "text_model.model." + key.removeprefix("bert.")
    name = "vision_model.model." + key.removeprefix("visual.")
    for old, new in _SWIN_NAMES:
        name = name.replace(new, old)
    return name


def _name_map(model: Any, own: dict[str, Tensor]) -> dict[str, str]:
    """Our name to MedCLIP's for everything of `own` that MedCLIP holds: no SimCLR head, no fixed index buffers."""
    names = {key: _to_medclip_name(key) for key in own if not key.startswith("image_mlp.")}
    resnet = model.config["vision_tower"] == "medclip-resnet50"
    names["image_projection"] = "vision_model.model.fc.weight" if resnet else "vision_model.projection_head.weight"
    return {ours: theirs for ours, theirs in names.items() if not _UNUSED.search(theirs)}


def load_medclip(model: Any, state: dict[str, Tensor], source: str = "the file") -> None:
    """Copy MedCLIP's weights into a MEDCLIP_* or MEDSLIP_* model, key for key; a SimCLR head keeps its fresh weights.

    Raises:
        ValueError: names the missing and the unexpected keys and the tensors of another shape.
    """
    ours = model.state_dict()
    names = _name_map(model, ours)
    state = {key: value for key, value in state.items() if not _UNUSED.search(key)}
    # As MedCLIP holds them: its projections are the transposes of ours, views into the same memory.
    own = {theirs: _as_theirs(name, ours[name]) for name, theirs in names.items()}
    if differ := Mismatch.between(own, state):
        raise ValueError(f"{source} does not fit {model.name} ({model.config['vision_tower']}): {differ}")
    with torch.no_grad():
        for theirs, value in own.items():
            value.copy_(state.get(theirs, value))


def _as_theirs(ours: str, value: Tensor) -> Tensor:
    """A tensor of ours as MedCLIP's layers hold it, or the reverse."""
    return value.T if ours.endswith("_projection") else value


def export_medclip(model: Any, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Both towers as the state dictionary that MedCLIP itself loads strictly under transformers 4.24.

    `weights` is the model's state dictionary where the model itself holds only a part of each tensor, or adapters.
    BERT's pooler, which MedCLIP stores and never reads, is written as zeros.
    """
    own = model.state_dict() if weights is None else weights
    out = {}
    for ours, theirs in _name_map(model, own).items():
        out[theirs] = _as_theirs(ours, own[ours]).detach().cpu().contiguous().clone()
    width = model.text.width
    out["text_model.model.embeddings.position_ids"] = torch.arange(model.bert.config.max_position_embeddings).unsqueeze(
        0
    )
    out["text_model.model.pooler.dense.weight"] = torch.zeros(width, width)
    out["text_model.model.pooler.dense.bias"] = torch.zeros(width)
    if model.config["vision_tower"] == "medclip-swin":
        index = _relative_position_index(model.visual.config.window_size)
        for key in [k for k in out if k.endswith(".relative_position_bias_table")]:
            out[key.replace("bias_table", "index")] = index.clone()
    return out


def _relative_position_index(window: int) -> Tensor:
    """Row of the bias table for each pair of a window's tokens (Liu et al. 2021, section 3.2): (window^2, window^2)."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y[None] + window - 1) * (2 * window - 1) + (x[:, None] - x[None] + window - 1)
