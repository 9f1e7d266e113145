"""A small model, a tokenizer, pairs and labelled images for the tests of evaluation."""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import models
from inputs.images import UnreadableImage
from runtime import checkpoints

CPU = torch.device("cpu")


class Tower(nn.Module):
    """An image's mean colour, a text's counts of tokens; dropout shows whether it was put in eval mode."""

    def __init__(self, d: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(3, d), nn.Linear(16, d)
        self.dropout = nn.Dropout(0.5)

    def encode_image(self, x):
        return self.dropout(self.image(x.mean(dim=(2, 3))))

    def encode_text(self, tokens):
        return self.dropout(self.text(F.one_hot(tokens, 16).float().mean(dim=1)))


def tokenizer(texts):
    """Letters modulo 15, zeros after the end, padded to the longest."""
    rows = [[1 + ord(c) % 15 for c in text] for text in texts]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


class Pairs:
    """A reader of n pairs; every third caption is the same."""

    def __init__(self, n: int, broken=(), missing=()):
        self.n, self.broken, self.missing, self.split = n, broken, missing, "test"

    def __len__(self):
        return self.n

    def captions(self, i):
        return ["shared"] if i % 3 == 0 else [f"caption {i}", "another"]

    def image(self, i):
        if i in self.broken:
            raise UnreadableImage(f"cannot decode the image {i}")
        if i in self.missing:
            raise FileNotFoundError(f"there is no image {i}")
        return Image.new("RGB", (8, 8), (i * 37 % 256, i * 91 % 256, i * 53 % 256))


class Labelled(torch.utils.data.Dataset):
    def __init__(self, n: int, classes: int, broken=(), missing=()):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(n, 3, 4, 4, generator=generator)
        self.labels = torch.randint(classes, (n,), generator=generator)
        self.broken, self.missing = broken, missing

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if i in self.broken:
            raise UnreadableImage(f"cannot decode the image {i}")
        if i in self.missing:
            raise FileNotFoundError(f"there is no image {i}")
        return self.images[i], int(self.labels[i])


NAMES = ["cat", "big dog", ["bird", "small bird"], "fish", "ant", "bee", "owl"]
TEMPLATES = ["a photo of a {}.", "the {}"]
SMALL = dict(
    image_size=32, vision_kwargs=dict(patch_size=16, embed_dim=24, depth=1, num_heads=2), embed_dim=16,
    text_width=16, text_heads=2, text_layers=1,
)  # fmt: skip


def write_checkpoint(path, name="CLIP_VITT16"):
    torch.manual_seed(0)
    model = models.create_model(name, **SMALL)
    state = {
        "model": {"name": name, "config": model.config},
        "state_dict": model.state_dict(),
        "preprocess": model.preprocess.to_dict(),
        "tokenizer": {"kind": "clip-bpe", "context_length": 77} if hasattr(model, "encode_text") else None,
    }
    checkpoints.save_checkpoint(state, path)
