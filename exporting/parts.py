"""What several formats write: tensors, a tokenizer's own file, and the preparation of an image in lines of Pillow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from inputs.sizes import height_width
from inputs.transforms import INTERPOLATIONS, Preprocess
from tokenizer import LibraryTokenizer, SimpleTokenizer, Tokenizer


def tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors takes them: each with memory of its own."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------

# CLIP's words, as the tokenizers library writes an expression.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def tokenizers_definition(tokenizer: Tokenizer) -> str:
    """The text of a `tokenizer.json` of the tokenizers library that gives the same ids.

    Of a caption that is cleaned as `cleaning` says; cut at the context, without padding.
    """
    from tokenizers import Tokenizer as Backend

    if isinstance(tokenizer, SimpleTokenizer):
        whole = _clip_bpe(tokenizer)
    else:
        definition = json.loads(tokenizer.definition)  # type: ignore[attr-defined]
        definition["truncation"], definition["padding"] = None, None
        whole = Backend.from_str(json.dumps(definition))
    whole.enable_truncation(tokenizer.context_length)  # type: ignore[attr-defined]
    return whole.to_str(pretty=True)


def _clip_bpe(tokenizer: SimpleTokenizer) -> Any:
    from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    merges = sorted(tokenizer.rank, key=tokenizer.rank.__getitem__)
    whole = Backend(models.BPE(tokenizer.ids, merges, end_of_word_suffix="</w>"))  # type: ignore[arg-type]
    whole.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
    whole.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    whole.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    ends = [("<|startoftext|>", tokenizer.start), ("<|endoftext|>", tokenizer.end)]
    whole.post_processor = processors.TemplateProcessing("<|startoftext|> $A <|endoftext|>", special_tokens=ends)
    return whole


_UNESCAPED = "html.unescape(html.unescape(ftfy.fix_text(caption)))"
_CLEANED = {  # by LibraryTokenizer's `clean`
    "none": [],
    "whitespace": [f'caption = " ".join({_UNESCAPED}.split())'],
    "lower": [f'caption = " ".join({_UNESCAPED}.split()).lower()'],
    "canonicalize": [
        f'caption = " ".join({_UNESCAPED}.split()).replace("_", " ")',
        'caption = " ".join(caption.translate(str.maketrans("", "", string.punctuation)).lower().split())',
    ],
}


def token_lines(tokenizer: Tokenizer, context: int) -> list[str]:
    """Python that makes `tokens` (1, context), int64, of a `caption` by a `tokenizer` of the tokenizers library."""
    clean, pad = "none", getattr(tokenizer, "pad_id", 0)
    if isinstance(tokenizer, SimpleTokenizer):
        clean = "lower"
    elif isinstance(tokenizer, LibraryTokenizer):
        clean = tokenizer.clean
    left = getattr(tokenizer, "pad_side", "right") == "left"
    place = "-len(ids) :" if left else ": len(ids)"
    return [
        *_CLEANED[clean],
        "ids = tokenizer.encode(caption).ids",
        f"tokens = np.full((1, {context}), {pad})",
        f"tokens[0, {place}] = ids",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def image_lines(preprocess: Preprocess) -> list[str]:
    """Python that makes `pixels` (1, 3, H, W), float32, of a Pillow `image` with 8 bits, as `eval_view` does it."""
    h, w = preprocess.shape
    numbers = [f"mean, std = {list(preprocess.mean)}, {list(preprocess.std)}"]
    made = [
        "pixels = (np.asarray(image, np.float32) / 255 - mean) / std",
        "pixels = pixels.transpose(2, 0, 1)[None].astype(np.float32)",
    ]
    if preprocess.prepare == "medclip":
        return numbers + [
            'image = image.convert("L")',
            *_padded_lines(preprocess),
            f'image = image.resize(({w}, {h}), Image.Resampling.BICUBIC).convert("RGB")',
            *made,
        ]
    own = preprocess.prepare != "slip"
    filter_ = INTERPOLATIONS[preprocess.interpolation if own else "bilinear"].name
    tall, wide = height_width((preprocess.resize_to if own else None) or preprocess.size)
    lines = ['image = image.convert("RGB")']
    if preprocess.prepare == "squash":
        lines += [f"width, height = {wide}, {tall}"]
    elif preprocess.prepare == "fit":
        lines += [
            f"ratio = max(image.height / {tall}, image.width / {wide})",
            "width, height = round(image.width / ratio), round(image.height / ratio)",
        ]
    else:  # the smallest that covers
        lines += [
            f"covers = ({tall} * image.width // image.height, {tall}), ({wide}, {wide} * image.height // image.width)",
            "width, height = max(covers)",
        ]
    lines += [f"image = image.resize((width, height), Image.Resampling.{filter_})"]
    if preprocess.prepare == "fit":
        fill = (preprocess.fill,) * 3
        lines += [
            f'ground = Image.new("RGB", (max(width, {w}), max(height, {h})), {fill})',
            "ground.paste(image, ((ground.width - width) // 2, (ground.height - height) // 2))",
            "image, (width, height) = ground, ground.size",
        ]
    if preprocess.prepare != "squash" or (tall, wide) != (h, w):
        floor = preprocess.floor and preprocess.prepare == "cover"
        half = "({} - {}) // 2" if floor else "round(({} - {}) / 2)"
        lines += [
            f"left, top = {half.format('width', w)}, {half.format('height', h)}",
            f"image = image.crop((left, top, left + {w}, top + {h}))",
        ]
    return [*numbers, *lines, *made]


def _padded_lines(preprocess: Preprocess) -> list[str]:
    h, w = preprocess.shape
    return [
        f"scale = max(image.height / {h}, image.width / {w}, 1)",
        f'black = Image.new("L", (round({w} * scale), round({h} * scale)))',
        "black.paste(image, ((black.width - image.width) // 2, (black.height - image.height) // 2))",
        "image = black",
    ]


def described(preprocess: Preprocess) -> str:
    """The same in words."""
    h, w = preprocess.shape
    if preprocess.prepare == "medclip":
        how = (
            "made grey, in the middle of a black canvas of the input's proportions and no smaller, resized bicubically"
        )
    elif preprocess.prepare == "slip":
        how = "resized bilinearly until it covers the input, then its centre"
    else:
        tall, wide = height_width(preprocess.resize_to or preprocess.size)
        to = {"cover": "until it covers", "squash": "to exactly", "fit": "until it fits into"}[preprocess.prepare]
        how = f"resized ({preprocess.interpolation}) {to} {wide} x {tall} pixels, then the centre"
    return f"RGB of 8 bits a channel, {w} pixels wide and {h} high: {how}"


def file_name(path: Path) -> str:
    """A file or folder for people elsewhere: its name and that of the folder that it is in."""
    return "/".join(path.absolute().parts[-2:])


def refuse_other_objective(model: Any, theirs: bool, where: str) -> None:
    """ValueError for a model that was trained on with a sigmoid where its library has a softmax, or the reverse.

    Args:
        theirs: whether the library's model has a bias of the logits.
    """
    if theirs != (model.logit_bias is not None):
        has, lacks = ("a softmax", "a sigmoid") if theirs else ("a sigmoid", "a softmax")
        raise ValueError(f"{where} is used with {lacks}, and {model.name} was trained with {has}: --to safetensors")
