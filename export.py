"""A trained model for other libraries: a checkpoint, or the mean of several, to a folder with a model card.

    python export.py checkpoint_best.pt --to open-clip --output my_model      for open_clip: "local-dir:my_model"
    python export.py checkpoint_best.pt --to transformers --output my_model   for AutoModel and its like
    python export.py checkpoint_best.pt --to timm --output my_tower           for timm: "local-dir:my_tower"
    python export.py checkpoint_best.pt --to safetensors --output my_model    for this project's own scripts
    python export.py checkpoint_best.pt --to onnx --output my_graphs          image.onnx and text.onnx
    python export.py checkpoint_best.pt --to medclip --output my_medclip      for MedCLIP's own code
    python export.py a/checkpoint.pt b/checkpoint.pt --to safetensors --output mean     the mean of their weights

A model that a format cannot hold exactly is refused with the reason. The card, README.md, says how the model is used,
and of its training what the run's own files say; what they do not is "not recorded".
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from flags.exports import get_args_parser
from runtime.command_line import answer_flags, run_script

if __name__ == "__main__":  # before PyTorch is loaded
    answer_flags(get_args_parser())

import utils
from exporting.card import card
from exporting.formats import FORMATS
from exporting.sources import load_mean
from runtime.integrity import write_sums
from runtime.logs import start_logging

log = logging.getLogger("medslip")


# fmt: off
# fmt: on


def export(
    checkpoints: Sequence[Path], form: str, output: Path, bert_vocab: str | None = None, results: Sequence[Path] = ()
) -> Path:
    """Write `output` whole, or leave nothing.

    Raises:
        FileExistsError: `output` is there already.
        ValueError: the format cannot hold the model, or the checkpoints have no mean, with the reason.
    """
    if output.exists():
        raise FileExistsError(f"{output} is there already: choose a new folder")
    loaded, sources = load_mean(checkpoints, bert_vocab, FORMATS[form].image_alone)
    weights = sum(value.nbytes for value in loaded.model.state_dict().values())
    utils.refuse_full(output.parent, weights, "the weights")
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir(parents=True)
    try:
        use = FORMATS[form].write(loaded, temporary)
        text = card(loaded, sources, form, FORMATS[form].library, use, output.name, results)
        (temporary / "README.md").write_text(str(text), encoding="utf8")  # save() would take the system's line ends
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
        folder = export(args.checkpoints, args.to, args.output, args.bert_vocab, args.results)
        size = sum(file.stat().st_size for file in folder.rglob("*"))
        log.info(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}; {size / 2**20:.1f} MiB")
        return folder


if __name__ == "__main__":
    run_script(main)
