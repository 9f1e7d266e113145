"""Small models with random weights in the folder layouts of other libraries, made by these libraries themselves."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CAPTIONS = [
    "a mammogram of a malignant mass in the left breast", "chest radiograph, normal heart size",
    "axial CT of the abdomen: a cyst of 3 cm in segment IV", "MRI of the knee with a torn meniscus & an effusion",
]  # fmt: skip
VISION_KINDS = ("vit", "dinov2", "dinov3_vit", "dinov3_convnext", "swin", "convnext")
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
VISION = dict(**TEXT, image_size=32, patch_size=8)


def images(n: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (6 + i, 8, 3), dtype=np.uint8)).resize((90 + 20 * i, 70), 3)
        for i in range(n)
    ]


def word_pieces(folder: Path) -> int:
    """BERT's kind of tokenizer, in a folder; returns its size."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CAPTIONS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ids)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return _saved(tokenizer, folder, **names)


def byte_pairs(folder: Path, *, start: str, end: str, pad: str, first: list[str]) -> int:
    """RoBERTa's, CLIP's and SigLIP's kind: `first` are the special tokens by id; an empty `start` is none."""
    tokenizer = Tokenizer(models.BPE(unk_token=first[-1]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=first, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    named = {token: tokenizer.token_to_id(token) for token in (start, end) if token}
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{start} $A {end}".strip(), special_tokens=list(named.items())
    )
    return _saved(tokenizer, folder, pad_token=pad, eos_token=end, **({"bos_token": start} if start else {}))


def _saved(tokenizer: Tokenizer, folder: Path, **names) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=24, **names)
    theirs.save_pretrained(folder)
    return tokenizer.get_vocab_size()


def processor(folder: Path, kind: str, **given) -> None:
    values = dict(do_resize=True, do_rescale=True, do_normalize=True, rescale_factor=1 / 255, resample=3)
    values |= dict(image_processor_type=kind, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.25], **given)
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def clip(folder: Path) -> Path:
    size = byte_pairs(folder, start="<s>", end="</s>", pad="</s>", first=["!", "<unk>", "<s>", "</s>"])
    ids = dict(vocab_size=size, bos_token_id=2, eos_token_id=3, pad_token_id=3, max_position_embeddings=24)
    config = transformers.CLIPConfig(
        text_config={**TEXT, **ids}, vision_config={**VISION, "num_hidden_layers": 3}, projection_dim=20
    )
    _randomised(transformers.CLIPModel(config)).save_pretrained(folder)
    processor(
        folder,
        "CLIPImageProcessor",
        size={"shortest_edge": 36},
        crop_size={"height": 32, "width": 32},
        do_center_crop=True,
    )
    return folder


def siglip(folder: Path) -> Path:
    size = byte_pairs(folder, start="", end="</s>", pad="</s>", first=["<unk>", "</s>", "<p>"])
    ids = dict(vocab_size=size, bos_token_id=1, eos_token_id=1, pad_token_id=1, max_position_embeddings=16)
    config = transformers.SiglipConfig(text_config={**TEXT, **ids, "projection_size": 32}, vision_config=VISION)
    _randomised(transformers.SiglipModel(config)).save_pretrained(folder)
    processor(folder, "SiglipImageProcessor", size={"height": 32, "width": 32})
    return folder


def siglip2(folder: Path) -> Path:
    size = byte_pairs(folder, start="", end="<eos>", pad="<pad>", first=["<pad>", "<eos>", "<unk>"])
    ids = dict(vocab_size=size, bos_token_id=1, eos_token_id=1, pad_token_id=0, max_position_embeddings=16)
    vision = dict(**TEXT, patch_size=8, num_patches=16)
    config = transformers.Siglip2Config(text_config={**TEXT, **ids, "projection_size": 32}, vision_config=vision)
    _randomised(transformers.Siglip2Model(config)).save_pretrained(folder)
    processor(folder, "Siglip2ImageProcessor", patch_size=8, max_num_patches=16)
    return folder


def vision(kind: str, folder: Path) -> Path:
    """An image tower of transformers alone."""
    made = {
        "vit": (transformers.ViTConfig(**VISION), transformers.ViTModel),
        "dinov2": (transformers.Dinov2Config(**{**VISION, "patch_size": 8}), transformers.Dinov2Model),
        "dinov3_vit": (transformers.DINOv3ViTConfig(**VISION, num_register_tokens=4), transformers.DINOv3ViTModel),
        "dinov3_convnext": (transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
                            transformers.DINOv3ConvNextModel),
        "swin": (transformers.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4],
                                         window_size=4), transformers.SwinModel),
        "convnext": (transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
                     transformers.ConvNextModel),
    }  # fmt: skip
    config, cls = made[kind]
    _randomised(cls(config)).save_pretrained(folder)
    if kind == "convnext":
        processor(folder, "ConvNextImageProcessor", size={"shortest_edge": 32}, crop_pct=0.875)
    elif kind == "dinov2":
        crop = dict(crop_size={"height": 32, "width": 32}, do_center_crop=True)
        processor(folder, "BitImageProcessor", size={"shortest_edge": 37}, **crop)
    else:
        processor(folder, "ViTImageProcessor", size={"height": 32, "width": 32})
    return folder


def text(kind: str, folder: Path) -> Path:
    """A text tower of transformers alone."""
    if kind == "bert":
        size = word_pieces(folder)
        model = transformers.BertModel(transformers.BertConfig(vocab_size=size, **TEXT, pad_token_id=0))
    else:
        size = byte_pairs(folder, start="<s>", end="</s>", pad="<pad>", first=["<s>", "<pad>", "</s>", "<unk>"])
        ids = dict(vocab_size=size, bos_token_id=0, pad_token_id=1, eos_token_id=2, max_position_embeddings=40)
        if kind == "roberta":
            model = transformers.RobertaModel(transformers.RobertaConfig(**ids, **TEXT, type_vocab_size=1))
        else:
            ids |= dict(cls_token_id=0, sep_token_id=2)
            model = transformers.ModernBertModel(transformers.ModernBertConfig(**ids, **TEXT))
    _randomised(model).save_pretrained(folder)
    return folder


def open_clip_pair(folder: Path, text: str = "clip") -> Path:
    """open_clip's folder: its own towers, or, for text bert, BiomedCLIP's: a ViT of timm and a BERT of transformers."""
    open_clip = pytest.importorskip("open_clip")
    folder.mkdir(parents=True)
    if text == "clip":
        vision = dict(image_size=32, layers=2, width=64, head_width=16, patch_size=8)
        own = dict(context_length=77, vocab_size=49408, width=32, heads=4, layers=2)
        net = open_clip.model.CLIP(20, vision, own, quick_gelu=True)
        config = dict(embed_dim=20, vision_cfg=vision, text_cfg=own, quick_gelu=True)
    else:
        size = word_pieces(folder)
        bert = transformers.BertConfig(
            vocab_size=size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1
        )
        bert.save_pretrained(folder / "bert")
        vision = dict(
            timm_model_name="test_vit", timm_model_pretrained=False, timm_pool="", timm_proj="linear", image_size=160
        )
        own = dict(hf_model_name=str(folder / "bert"), hf_tokenizer_name="some/where", hf_proj_type="mlp",
                   hf_pooler_type="cls_last_hidden_state_pooler", context_length=24)  # fmt: skip
        net = open_clip.model.CustomTextCLIP(20, vision, {**own, "hf_model_pretrained": False})
        config = dict(embed_dim=20, vision_cfg=vision, text_cfg={**own, "hf_model_name": "some/where"})
        shutil.rmtree(folder / "bert")
    torch.save(_randomised(net).state_dict(), folder / "open_clip_pytorch_model.bin")
    prepared = dict(mean=[0.48, 0.46, 0.41], std=[0.27, 0.26, 0.28], interpolation="bicubic", resize_mode="shortest")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": prepared}))
    return folder


def with_text_config(folder: Path, copy: Path) -> Path:
    """The same with the configuration of its text tower in a folder, so that open_clip finds it without a hub."""
    shutil.copytree(folder, copy)
    written = json.loads((copy / "open_clip_config.json").read_text())
    written["model_cfg"]["text_cfg"]["hf_model_name"] = str(copy / "bert")
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1)
    vocabulary = len(json.loads((copy / "tokenizer.json").read_text())["model"]["vocab"])
    transformers.BertConfig(vocab_size=vocabulary, **sizes).save_pretrained(copy / "bert")
    (copy / "open_clip_config.json").write_text(json.dumps(written))
    return copy


def timm_tower(folder: Path) -> Path:
    tower = _randomised(timm.create_model("test_vit", pretrained=False))
    timm.models.save_for_hf(tower, folder, safe_serialization=True)
    return folder


def _randomised(model: torch.nn.Module) -> torch.nn.Module:
    """With weights of some size everywhere: fresh ones hide a part that is missing behind small numbers."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()
