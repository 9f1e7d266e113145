"""What `torch.hub.load` finds here: the models of this repository, from any folder or project."""

import sys
from pathlib import Path

# torch.hub takes this folder off the path again, while some modules load others when these are first needed, and loader
# processes start by importing. Last, so that it hides nothing of the caller's.
sys.path.append(str(Path(__file__).resolve().parent))

import models  # noqa: E402

if Path(models.__file__).resolve().parent != Path(__file__).resolve().parent:
    raise ImportError(f"MedSLIP's models.py is hidden by {models.__file__}: load MedSLIP before that is imported")

dependencies = ["torch", "torchvision", "timm", "transformers", "numpy", "PIL", "ftfy", "regex"]


def medslip(weights: str | Path, **options) -> models.Pretrained:
    """The model in `weights`, ready to embed images and captions: models.load_pretrained, with its options and errors.

        model = torch.hub.load("/path/to/medslip", "medslip", "runs/vit_mammo/checkpoint_best.pt", source="local")

    Args:
        weights: what load_pretrained reads; a relative path starts at the caller's working directory.
        options: model, bert_vocab, text_pooling, image_size.
    """
    return models.load_pretrained(weights, **options)
