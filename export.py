"""A trained model for other libraries: one checkpoint to a folder that they load, with a model card.

    python export.py checkpoint_best.pt --to open-clip --output my_model      for open_clip: "local-dir:my_model"
    python export.py checkpoint_best.pt --to timm --output my_tower           for timm: "local-dir:my_tower"
    python export.py checkpoint_best.pt --to safetensors --output my_model    for this project's own scripts
    python export.py checkpoint_best.pt --to onnx --output my_graphs          image.onnx and text.onnx
    python export.py checkpoint_best.pt --to medclip --output my_medclip      for MedCLIP's own code

A model that a format cannot hold exactly is refused with the reason. The card, README.md, says what the run's own files
say; what they do not is "not recorded".
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import models
import utils
from evaluation.metrics import METRICS, Interval, headings
from evaluation.predictions import positive_class
from inputs.sizes import as_size, size_text
from runtime.checkpoints import save_checkpoint
from runtime.command_line import HelpFormatter, run_script
from runtime.integrity import write_sums
from runtime.logs import read_rows, start_logging
from runtime.one_run import KINDS, SETTINGS
from synthetic.world import is_synthetic
from tokenizer import BPE_PATH, SimpleTokenizer
from towers import medclip
from towers.files import SAFETENSORS_FORMAT

log = logging.getLogger("medslip")


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser("export.py", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoint", help="any weights that this project reads")
    parser.add_argument("--to", required=True, choices=list(FORMATS),
                        help="open-clip holds both towers; timm the image tower's features, not projected; onnx, "
                        "one graph for each side, needs pip install onnx onnxscript")
    parser.add_argument("--output", required=True, type=Path, help="a folder that does not exist yet")
    parser.add_argument(
        "--bert-vocab",
        default=None,
        metavar="VOCAB.TXT",
        help="vocabulary of Bio_ClinicalBERT; only MedCLIP's own weights need it",
    )
    parser.add_argument(
        "--results",
        default=[],
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folders of probes and fine-tunings whose results.json goes into the card",
    )
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return parser
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# The formats
# ---------------------------------------------------------------------------------------------------------------------


def tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors takes them: each with memory of its own."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}


def plain_tower(model: Any, where: str) -> None:
    """ValueError unless the image tower is one of timm's."""
    if not timm.is_model(model.config["vision_tower"]):
        raise ValueError(f"{where} has no image tower {model.config['vision_tower']}, which is not one of timm's")


def to_open_clip(loaded: models.Pretrained, folder: Path) -> None:
    """open_clip's folder: a timm tower with a linear projection beside CLIP's text transformer.

    open_clip builds a timm tower from its name alone, so a tower with settings of its own has no place in it.
    """
    model: Any = loaded.model
    if not model.objective.text:
        raise ValueError(f"{model.name} has no text side, and open_clip's models have two: choose --to timm")
    if model.config["text_tower"] != "clip" or not isinstance(loaded.tokenizer, SimpleTokenizer):
        raise ValueError(
            "open_clip averages a BERT's last layer, our text tower three of its layers: the embeddings would be others"
        )
    plain_tower(model, "open_clip")
    name, size = model.config["vision_tower"], loaded.preprocess.size
    theirs: Any = timm.create_model(name, num_classes=0)
    fixed = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if fixed is not None and fixed.fixed_input_size and size != (theirs_size := as_size(fixed.input_size[1:])):
        raise ValueError(
            f"open_clip builds {name} for {size_text(theirs_size)} pixels alone, this one takes {size_text(size)}"
        )
    if not isinstance(size, int):
        raise ValueError(
            f"open_clip resizes to {size_text(size)} pixels bicubically, whatever its configuration says; this "
            "model was trained on bilinear views: choose --to timm or --to onnx"
        )
    differ = [
        key for key, value in model.visual.state_dict().items()
        if key not in theirs.state_dict() or theirs.state_dict()[key].shape != value.shape
    ] + [key for key in theirs.state_dict() if key not in model.visual.state_dict()]  # fmt: skip
    settings = {k: v for k, v in model.config["vision_kwargs"].items() if not k.endswith(("drop_rate", "path_rate"))}
    if differ or settings or theirs.num_features != model.feature_dim:
        raise ValueError(
            f"open_clip builds {name} from its name alone, without the settings {settings}"
            + (f"; {differ[0]} would have another shape" if differ else "")
        )
    width, heads, layers = (model.config[f"text_{part}"] for part in ("width", "heads", "layers"))
    text = {"context_length": model.config["context_length"], "vocab_size": model.config["vocab_size"]}
    config = {
        "model_cfg": {
            "embed_dim": model.config["embed_dim"],
            "quick_gelu": True,
            **({} if model.logit_bias is None else {"init_logit_bias": model.logit_bias.item()}),
            "vision_cfg": {
                "timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear",
                "image_size": size,
            },
            "text_cfg": {**text, "width": width, "heads": heads, "layers": layers},
        },
        "preprocess_cfg": {
            "mean": list(loaded.preprocess.mean), "std": list(loaded.preprocess.std), "interpolation": "bilinear",
            "resize_mode": "shortest",
        },
    }  # fmt: skip
    weights = {}
    for key, value in model.state_dict().items():
        if key == "image_projection":
            weights["visual.head.proj.weight"] = value.T
        elif key.startswith("visual."):
            weights["visual.trunk." + key.removeprefix("visual.")] = value
        elif not key.startswith("image_mlp."):
            weights[key] = value
    save_file(tensors(weights), folder / "open_clip_model.safetensors")
    utils.write_json(folder / "open_clip_config.json", config)


def to_timm(loaded: models.Pretrained, folder: Path) -> None:
    """timm's folder of the image tower: create_model("local-dir:FOLDER", pretrained=True) gives its features (B, d)."""
    model: Any = loaded.model
    plain_tower(model, "timm")
    name, tower = model.config["vision_tower"], model.visual
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    arguments = dict(model.config["vision_kwargs"])
    if cfg is not None and cfg.fixed_input_size:
        arguments["img_size"] = loaded.preprocess.to_dict()["size"]
    config = {
        "architecture": name.partition(".")[0],
        "num_classes": 0,
        "num_features": model.feature_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": 0, "input_size": [3, *loaded.preprocess.shape], "mean": list(loaded.preprocess.mean),
            "std": list(loaded.preprocess.std), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center",
            "fixed_input_size": bool(cfg is not None and cfg.fixed_input_size),
            "first_conv": cfg.first_conv if cfg is not None else None,
            "classifier": cfg.classifier if cfg is not None else None,
        },
    }  # fmt: skip
    save_file(tensors(tower.state_dict()), folder / "model.safetensors")
    utils.write_json(folder / "config.json", config)


def to_safetensors(loaded: models.Pretrained, folder: Path) -> None:
    """Weights, and in config.json all that models.load_pretrained reads of a checkpoint beside them."""
    model = loaded.model
    save_file(tensors(model.state_dict()), folder / "model.safetensors")
    about = {
        "format": SAFETENSORS_FORMAT,
        "model": {"name": model.name, "config": model.config},
        "preprocess": loaded.preprocess.to_dict(),
        "tokenizer": loaded.tokenizer.spec() if loaded.tokenizer else None,
        "training": loaded.training,
    }
    utils.write_json(folder / "config.json", about)


def to_medclip(loaded: models.Pretrained, folder: Path) -> None:
    """MedCLIP's own pytorch_model.bin; ValueError for what its code cannot hold."""
    model: Any = loaded.model
    if not models.is_medclip(model.config):
        tower, objective = (model.config[name] for name in ("vision_tower", "objective"))
        raise ValueError(f"MedCLIP's code holds its own two towers alone, with a softmax, not {tower} of {objective}")
    if model.config["vocab_size"] != models.BERT_VOCABULARY:
        raise ValueError(
            f"MedCLIP reads Bio_ClinicalBERT's {models.BERT_VOCABULARY} tokens, this model {model.config['vocab_size']}"
        )
    if not isinstance(loaded.preprocess.size, int):
        raise ValueError(
            f"MedCLIP makes a square of every image, this model {size_text(loaded.preprocess.size)} pixels"
        )
    save_checkpoint(medclip.export_medclip(model), folder / medclip.WEIGHTS_NAME)


class _Image(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.normalize(self.model.encode_image(image), dim=-1)


class _Text(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.normalize(self.model.encode_text(tokens), dim=-1)


def to_onnx(loaded: models.Pretrained, folder: Path) -> None:
    """image.onnx: normalised images (B, 3, H, W) to unit vectors (B, d); text.onnx: token ids (B, L), L the context."""
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"--to onnx needs {' and '.join(missing)}: pip install onnx onnxscript")
    model: Any = loaded.model
    if hasattr(model.visual, "set_attn_implementation"):  # the fused one of Hugging Face's Swin has no graph
        model.visual.set_attn_implementation("eager")
    graphs: dict[str, tuple[nn.Module, Tensor]] = {
        "image": (_Image(model), torch.zeros(2, 3, *loaded.preprocess.shape))
    }
    if model.objective.text:
        tokens = torch.zeros(2, model.config["context_length"], dtype=torch.long)
        tokens[:, :3] = torch.tensor([1, 2, model.config["vocab_size"] - 1])
        graphs["text"] = (_Text(model), tokens)
    for name, (module, example) in graphs.items():
        program = torch.onnx.export(
            module.eval(), (example,), dynamo=True, input_names=[name], output_names=["unit_vector"], verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )  # fmt: skip
        assert program is not None  # what the dynamo exporter returns
        program.save(folder / f"{name}.onnx")
    utils.write_json(folder / "preprocess.json", loaded.preprocess.to_dict())
    if loaded.tokenizer is not None:
        utils.write_json(folder / "tokenizer.json", loaded.tokenizer.spec())
        if isinstance(loaded.tokenizer, SimpleTokenizer):
            shutil.copyfile(BPE_PATH, folder / BPE_PATH.name)


FORMATS: dict[str, Callable[[models.Pretrained, Path], None]] = {
    "open-clip": to_open_clip, "timm": to_timm, "safetensors": to_safetensors, "onnx": to_onnx, "medclip": to_medclip,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The model card
# ---------------------------------------------------------------------------------------------------------------------

ABSENT = "not recorded"
USE = {
    "open-clip": 'import open_clip\nmodel, _, view = open_clip.create_model_and_transforms("local-dir:{folder}")\n'
    'tokenizer = open_clip.get_tokenizer("local-dir:{folder}")',
    "timm": 'import timm\ntower = timm.create_model("local-dir:{folder}", pretrained=True)  # (B, 3, S, S) to (B, d)',
    "safetensors": 'import models\nmodel = models.load_pretrained("{folder}")\nmodel.embed_images(["image.jpg"])',
    "onnx": 'import onnxruntime\nsession = onnxruntime.InferenceSession("{folder}/image.onnx")',
    "medclip": "# the folder takes the place of MedCLIP's pretrained/ folder: {folder}/pytorch_model.bin",
}


def written(path: Path) -> dict:
    """What a run's JSON file holds; {} where it is not there."""
    return utils.read_json(path) if path.is_file() else {}


def card(loaded: models.Pretrained, checkpoint: Path, form: str, folder: Path, results: list[Path]) -> str:
    """README.md, every figure of it from a file of the run."""
    run = checkpoint.parent
    settings = written(run / SETTINGS)
    if KINDS["training"] not in settings.get("args", {}):  # of a probe, that earlier versions wrote over it
        settings = {}
    args, derived = settings.get("args", {}), settings.get("derived", {})
    found = {path: written(path if path.suffix == ".json" else path / "results.json") for path in results}
    if empty := [str(path) for path, result in found.items() if not result]:
        raise ValueError(f"--results {empty[0]} holds no results.json")
    synthetic = any(result.get("synthetic") for result in found.values()) or is_synthetic(Path(args.get("root") or run))
    config = loaded.model.config
    training = ", ".join(f"{k} {v}" for k, v in loaded.training.items()) or ABSENT
    start = [f"{k.replace('_', ' ')} {args[k]}" for k in ("medclip_weights", "vision_weights", "text_weights", "init")
             if args.get(k)]  # fmt: skip
    rows = {
        "Model": f"{loaded.model.name}: image tower {config['vision_tower']} at "
        f"{size_text(loaded.preprocess.size)} pixels"
        + f", text tower {config['text_tower']}, {config['text_layers']} layers" * loaded.model.objective.text,
        "Objective": config["objective"],
        "Training": training,
        "Data": f"{args['dataset']}, pairs kept by the caption filter {args['caption_filter']!r}: "
        f"{derived.get('training_pairs', ABSENT)}" if args.get("dataset") else ABSENT,
        "Started from": ("; ".join(start) or "fresh weights") if args else ABSENT,
        "Learning rate, epochs, batch": f"{args['lr']:g}, {args['epochs']}, {derived.get('effective_batch', ABSENT)}"
        if args else ABSENT,
        "Seed": str(args.get("seed", ABSENT)),
        "Versions": ", ".join(f"{k} {v}" for k, v in settings.get("versions", {}).items()) or ABSENT,
    }  # fmt: skip
    lines = ["# " + loaded.model.name + (" (SYNTHETIC data)" if synthetic else ""), ""]
    if synthetic:
        lines += ["Trained or measured on SYNTHETIC images: its numbers say nothing about patients.", ""]
    lines += ["```python", USE[form].format(folder=folder), "```", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += ["", "## Measured", ""]
    lines += [line for path, result in found.items() for line in measured(path, result)] or [f"Probes: {ABSENT}."]
    lines += ["", *validation_of(run / "log.jsonl")]
    lines += [
        "", "## Intended use and limits", "",
        "Research on image representations. Not a medical device: not for diagnosis, triage or any decision about a "
        "patient. What it was not trained on, other scanners, views and populations included, is untested unless the "
        "table above says otherwise; embeddings reproduce what captions of the training data say and how often.",
        "", "## Licences", "",
        "- Code: MIT (MedSLIP).",
        f"- Weights it started from: {'; '.join(start) or ('none' if args else ABSENT)}; their licence: {ABSENT}, "
        "it is that of whoever published them.",
        f"- Training data: {args.get('dataset', ABSENT)}; DATA.md of MedSLIP names the terms of each set.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def measured(path: Path, result: dict) -> list[str]:
    """The metrics of one results.json with their intervals."""
    title = f"{result.get('dataset', ABSENT)} ({path})"
    unit = 100 if result.get("unit") == "fraction" or "metrics" in result else 1
    metrics = result.get("metrics", {})
    if not metrics:
        scores = result.get("logistic") or result.get("knn") or {}
        figures = ", ".join(f"{k} {v:.2f}" for k, v in scores.items() if isinstance(v, float))
        return [f"- {title}: {figures or ABSENT}"]
    titles = headings(METRICS, positive_class(result))
    cells = [f"{titles.get(name, name)} {Interval.of(m).shown('.2f', '.1f', unit)}" for name, m in metrics.items()]
    over = result.get("interval", {})
    return [f"- {title}: {', '.join(cells)}; percent, {100 * over.get('level', 0.95):.0f}% intervals over "
            f"{over.get('over', 'patients')}, one training seed unless the run says otherwise"]  # fmt: skip


def validation_of(log_file: Path) -> list[str]:
    """The last epoch's validation of the training run."""
    if not log_file.is_file():
        return []
    epochs = read_rows(log_file, "epoch")
    kept = {k: v for k, v in (epochs[-1] if epochs else {}).items() if k.startswith("val_") and v is not None}
    if not kept:
        return []
    figures = ", ".join(f"{k.removeprefix('val_')} {v:.4g}" for k, v in kept.items())
    return [f"Retrieval on the validation pairs after epoch {epochs[-1].get('epoch')}: {figures}."]


# ---------------------------------------------------------------------------------------------------------------------


def export(
    checkpoint: Path, form: str, output: Path, bert_vocab: str | None = None, results: list[Path] | None = None
) -> Path:
    """Write `output` whole, or leave nothing.

    Raises:
        FileExistsError: `output` is there already.
        ValueError: the format cannot hold the model, with the reason.
    """
    if output.exists():
        raise FileExistsError(f"{output} is there already: choose a new folder")
    loaded = models.load_pretrained(checkpoint, bert_vocab=bert_vocab)
    weights = sum(value.nbytes for value in loaded.model.state_dict().values())
    utils.refuse_full(output.parent, weights, "the weights")
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir(parents=True)
    try:
        FORMATS[form](loaded, temporary)
        (temporary / "README.md").write_text(card(loaded, checkpoint, form, output, results or []), encoding="utf8")
        write_sums(temporary)
        os.rename(temporary, output)
    except Exception as error:
        if shutil.disk_usage(output.parent).free < 1 << 20:  # each format's writer has an error of its own for that
            raise OSError(f"could not write {output}: no space is left on its disk") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def main(argv: list[str] | None = None) -> Path:
    """Export as the command line says; returns the new folder."""
    args = get_args_parser().parse_args(argv)
    with start_logging():
        folder = export(Path(args.checkpoint), args.to, args.output, args.bert_vocab, args.results)
        size = sum(file.stat().st_size for file in folder.rglob("*"))
        log.info(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}; {size / 2**20:.1f} MiB")
        return folder


if __name__ == "__main__":
    run_script(main)
