"""The model card of an export, README.md: enough to use the model by itself, and no more than its files say."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import models
import utils
from evaluation.features import Backbone
from evaluation.metrics import METRICS, Interval, fractions, headings, percent
from evaluation.predictions import positive_class
from exporting.parts import described, file_name, image_lines
from exporting.sources import Source
from inputs.sizes import size_text
from synthetic.world import is_synthetic
from tokenizer import SimpleTokenizer, Tokenizer, WordPieceTokenizer

ABSENT = "not recorded"
FRESH = "fresh weights"


def as_text(value: object) -> str:
    """What a file or a name says, as text in a table or a line: no markup of its own takes effect."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`" if text else ABSENT


# ---------------------------------------------------------------------------------------------------------------------
# Results of probes and fine-tunings
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A results.json: a line for people, and the figures for a hub."""

    line: str
    dataset: str
    figures: list[tuple[str, str, float]]  # of METRICS; the name with its interval; percent; none of another tower
    synthetic: bool

    @classmethod
    def of(cls, path: Path, weights: str) -> Measured:
        """What a run's folder, or the file itself, says; ValueError names one that is no results.json of a run.

        Args:
            weights: fingerprint of the image tower in this export; of results on another one the line says so.
        """
        file = path if path.suffix == ".json" else path / "results.json"
        result = utils.read_json(file) if file.is_file() else {}
        if not result:
            raise ValueError(f"--results {path} holds no results.json")
        try:
            return cls._read(file, result, weights)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--results {file} is not what a run of this project writes: {error!r}") from error

    @classmethod
    def _read(cls, file: Path, result: dict[str, Any], weights: str) -> Measured:
        dataset = str(result.get("dataset", ABSENT))
        title = f"{as_text(dataset)}, run {as_text(file.absolute().parent.name)}"
        settings = result.get("settings", {})
        theirs = settings.get("weights_sha256")
        own = theirs == weights
        if "data_set" in settings:
            title += ", after **fine-tuning end to end**, which changes the image tower"
        elif theirs is None:
            title += ", whose file does not say of **which image tower**"
        elif not own:
            title += ", of **another image tower** than the one in this folder, or at another size"
        metrics, synthetic = result.get("metrics", {}), bool(result.get("synthetic"))
        if not metrics:
            scores = result.get("logistic") or result.get("knn") or result
            scores = percent(fractions(scores, result.get("unit", "percent")))
            shown = ", ".join(f"{as_text(k)} {v:.2f}" for k, v in scores.items() if isinstance(v, float))
            return cls(f"- {title}: {shown or ABSENT}", dataset, [], synthetic)
        unit = 100 if result.get("unit") == "fraction" or "metrics" in result else 1
        titles, over = headings(METRICS, positive_class(result)), result.get("interval", {})
        level, of = f"{100 * over.get('level', 0.95):.0f}%", over.get("over", "patients")
        found = {name: Interval.of(value) for name, value in metrics.items()}
        cells = [f"{as_text(titles.get(k, k))} {value.shown('.2f', '.1f', unit)}" for k, value in found.items()]
        figures = [  # a hub shows them as this model's own
            (k, f"{titles.get(k, k)}, percent"
             + (f", {level} interval over {of} {unit * v.low:.1f} to {unit * v.high:.1f}"
                if v.low is not None and v.high is not None else ""), round(unit * v.value, 2))
            for k, v in found.items() if own and v.value is not None
        ]  # fmt: skip
        line = (
            f"- {title}: {', '.join(cells)}; percent, {level} intervals over {as_text(of)}, one training seed unless "
            "the run says otherwise"
        )
        return cls(line, dataset, figures, synthetic)


# ---------------------------------------------------------------------------------------------------------------------
# The parts of the card
# ---------------------------------------------------------------------------------------------------------------------


def start_of(source: Source) -> str:
    """The weights that a training started from: names of files without the folders that they lay in."""
    names = {
        key: value if re.match("[a-z-]+:", value) or "/" not in value else file_name(Path(value))
        for key, value in source.starts.items()
    }
    return "; ".join(f"{key.replace('_', ' ')} {name}" for key, name in names.items()) or (FRESH if source.args else "")


def facts(source: Source) -> dict[str, str]:
    """What is recorded of one training; "" where nothing is."""
    args, derived = source.args, source.derived

    def told(*names: str) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {args[name]}" for name in names if args.get(name) is not None)

    pairs = derived.get("training_pairs")
    return {
        "Data": told("dataset", "caption_filter") + (f", {pairs} pairs" if pairs is not None else ""),
        "Started from": start_of(source),
        "Learning rate, epochs, batch": told("lr", "epochs")
        + (f", effective batch {derived['effective_batch']}" if "effective_batch" in derived else ""),
        "Seed": str(args["seed"]) if args.get("seed") is not None else "",
        "Versions": ", ".join(f"{k} {v}" for k, v in source.versions.items()),
    }


def table(loaded: models.Pretrained, sources: Sequence[Source]) -> list[str]:
    """What the model is and where it comes from, in rows."""
    config, size = loaded.model.config, size_text(loaded.preprocess.size)
    rows = {
        "Model": f"{loaded.model.title}: image tower {config['vision_tower']} at {size} pixels"
        + f", text tower {config['text_tower']}" * loaded.model.objective.text,
        "Objective": config["objective"],
        "Training": progress(loaded.training),
    }
    every = [facts(source) for source in sources]
    for name in every[0]:
        values = dict.fromkeys(told[name] for told in every)
        rows[name] = "; ".join(value or ABSENT for value in values) if any(values) else ""
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | {as_text(value) if value else ABSENT} |" for name, value in rows.items()]
    what = "Weights" if len(sources) == 1 else f"Mean of the weights of {len(sources)} checkpoints"
    return [
        *lines, "", f"{what}, with the SHA-256 of each file:", "",
        *(f"- {as_text(source.name)} {source.sha256 or '(by its name)'}" for source in sources),
    ]  # fmt: skip


def inputs(loaded: models.Pretrained, reads: bool) -> list[str]:
    """How images and captions are prepared, and what comes out."""
    model: Any = loaded.model
    lines = [
        "## Images", "", described(loaded.preprocess) + ". As lines of Pillow, from an `image` to the "
        "`pixels` (1, 3, H, W) that the tower takes:", "",
        "```python", "import numpy as np", "from PIL import Image", "", *image_lines(loaded.preprocess), "```", "",
    ]  # fmt: skip
    if not reads:
        return lines
    scale = float(model.logit_scale.detach())
    bias = float(model.logit_bias.detach()) if model.logit_bias is not None else None
    kind, bias_text = ("softmax", "") if bias is None else ("sigmoid", f" {'+' if bias >= 0 else '-'} {abs(bias):.6g}")
    read = captions_of(loaded.tokenizer, model.config["context_length"])
    if model.text.reads_padding:
        read += " The embedding depends on the padding too."
    return [
        *lines, "## Captions", "", read, "",
        f"Labels are put into sentences like those of the training, such as `a mammogram of a {{}}.`; of several "
        "templates or synonyms the unit vectors are averaged, and the mean is made a unit vector again. Probabilities "
        f"of labels: {kind}({math.exp(scale):.6g} * cosine{bias_text}), "
        "the cosine being the product of the two unit vectors.", "",
    ]  # fmt: skip


def captions_of(tokenizer: Tokenizer | None, context: int) -> str:
    """How captions become ids, in words."""
    if tokenizer is None:
        return f"Token ids (B, L), L at most {context}; the vocabulary is not part of these files."
    if isinstance(tokenizer, SimpleTokenizer):
        how = "CLIP's byte pairs, in lower case: start, the text, end, zeros to the whole length"
    elif isinstance(tokenizer, WordPieceTokenizer):
        how = f"BERT's word pieces{', in lower case' * tokenizer.lowercase}: [CLS], the text, [SEP], zeros"
    else:
        theirs: Any = tokenizer
        to = "the whole length" if theirs.pad_to == "context" else "the longest of a batch"
        how = "the tokenizer of the tower's library, padded "
        how += f"with id {theirs.pad_id} on the {theirs.pad_side} to {to}"
        if theirs.clean != "none":
            how += f", after open_clip's cleaning {theirs.clean!r}"
    return f"At most {context} tokens, of which a longer caption keeps the first and the end: {how}."


NEEDS = {  # by formats.FORMATS: what the lines of Python import
    "open-clip": "`pip install open_clip_torch transformers`",
    "timm": "`pip install timm`",
    "transformers": "`pip install torch torchvision transformers pillow`",
    "onnx": "`pip install onnxruntime tokenizers ftfy numpy pillow`",
    "safetensors": "a checkout of MedSLIP with its requirements.txt",
    "medclip": "MedCLIP's code, https://github.com/RyanWangZf/MedCLIP",
}


def outputs(loaded: models.Pretrained, form: str, reads: bool) -> str:
    """What the lines of Python need, take and give."""
    model: Any = loaded.model
    h, w = loaded.preprocess.shape
    d = model.config["embed_dim"] if model.objective.text else model.feature_dim
    given = {
        "onnx": f"image.onnx: `image` (n, 3, {h}, {w}) float32 to `unit_vector` (n, {d}) of length 1."
        + f" text.onnx: `text` (n, {model.config['context_length']}) int64 to the same." * model.objective.text,
        "timm": f"The tower's features (n, {model.feature_dim}), before any projection, not normalised.",
        "medclip": "As MedCLIP's own code gives them.",
        "transformers": "Its processor and the lines below agree to two of 256 levels, and where an odd margin is cut "
        "off, to a pixel."
        + f" The image tower alone is here: its features (n, {model.feature_dim}) are not projected." * (not reads),
        "open-clip": f"Vectors (n, {d}) of length 1 of images and of captions."
        + " Its tokenizer first repairs mojibake and HTML entities and joins white space, which "
        "leaves captions without these as they are." * (getattr(loaded.tokenizer, "clean", "") == "none"),
        "safetensors": f"Vectors (n, {d}) of length 1.",
    }  # fmt: skip
    return f"Needs {NEEDS[form]}. {given[form]}"


def progress(training: dict[str, Any]) -> str:
    """How far the weights were trained, in words."""
    if "epochs" not in training:
        return ", ".join(f"{key} {value}" for key, value in training.items())
    step = f", step {training['step']}" if "step" in training else ""
    end = "was" if training["finished"] else "was not"
    return f"epoch {training['epoch']} of {training['epochs']}{step}; its run {end} finished"


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------


def card(
    loaded: models.Pretrained, sources: Sequence[Source], form: str, library: str, use: list[str], name: str,
    results: Sequence[Path],
) -> ModelCard:  # fmt: skip
    """The card, every figure of it from a file of the runs.

    Args:
        form: of formats.FORMATS, and `library` its reader's name.
        use: lines of Python that use what was written.
        name: of the folder.
        results: folders of probes and fine-tunings.

    Raises:
        ValueError: a folder of `results` that holds none.
    """
    found = [Measured.of(path, fingerprint(loaded)) for path in results]
    roots = [source.args["root"] for source in sources if source.args.get("root")]
    synthetic = any(result.synthetic for result in found) or any(is_synthetic(Path(root)) for root in roots)
    reads = any("captions" in line for line in use)
    starts = "; ".join(dict.fromkeys(map(start_of, sources)))
    lines = ["# " + loaded.model.title + " (SYNTHETIC data)" * synthetic, ""]
    if synthetic:
        lines += ["Trained or measured on SYNTHETIC images: its numbers say nothing about patients.", ""]
    lines += [
        "```python", f"folder = {name!r}  # where this folder lies",
        "# image is an image of Pillow" + ", captions a list of texts" * reads, *use, "```", "",
        outputs(loaded, form, reads), "",
        *table(loaded, sources), "", *inputs(loaded, reads), "## Measured", "",
        *([result.line for result in found] or [f"Probes: {ABSENT}."]), "", *validation(sources), *LIMITS,
        f"- Weights it started from: {as_text(starts)}"
        + (f"; their licence: {ABSENT}, it is that of whoever published them." if starts != FRESH else "."),
        f"- Training data: {', '.join(map(as_text, datasets(sources))) or ABSENT}; DATA.md of MedSLIP names the terms "
        "of each set.",
    ]  # fmt: skip
    front = ModelCardData(
        license="unknown", library_name=library,
        pipeline_tag="zero-shot-image-classification" if reads else "image-feature-extraction",
        tags=["medical", "radiology", "medslip", loaded.model.config["objective"], *["synthetic"] * synthetic],
        datasets=datasets(sources) or None, metrics=sorted({k for r in found for k, _, _ in r.figures}) or None,
        model_name=loaded.model.title, eval_results=[
            EvalResult("image-classification", result.dataset, result.dataset, metric, value, metric_name=title)
            for result in found for metric, title, value in result.figures
        ] or None,
    )  # fmt: skip
    return ModelCard(f"---\n{front.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def fingerprint(loaded: models.Pretrained) -> str:
    """Of the image side, as results.json of a probe has it."""
    return Backbone(loaded.model.visual, loaded.model, loaded.preprocess, "backbone", "").fingerprint()


def datasets(sources: Sequence[Source]) -> list[str]:
    """Names of what they were trained on."""
    return sorted({str(source.args["dataset"]) for source in sources if source.args.get("dataset")})


def validation(sources: Sequence[Source]) -> list[str]:
    """What a run measured of the very weights that are exported."""
    if len(sources) > 1 or not (scores := sources[0].scores):
        return [
            "Retrieval on the validation pairs: " + ("of the mean not measured." if len(sources) > 1 else f"{ABSENT}."),
            "",
        ]
    figures = ", ".join(f"{as_text(k)} {v:.4g}" for k, v in scores.items() if isinstance(v, (int, float)))
    return [f"Retrieval on the validation pairs, of these weights, recall (`r`) in percent: {figures}.", ""]


LIMITS = (
    "## Intended use and limits", "",
    "Research on image representations. Not a medical device: not for diagnosis, triage or any decision about a "
    "patient. What it was not trained on, other scanners, views and populations included, is untested unless the "
    "figures above say otherwise; embeddings reproduce what captions of the training data say and how often.",
    "", "## Licences", "",
    "- Code: MIT (MedSLIP).",
)  # fmt: skip
