"""The sources of images with captions by name, and what the training loop draws from them.

READERS names the sources of inputs/. ContrastiveDataset makes a sample of each pair, GlobalBatchSampler says which
pairs a rank sees in which step, Collate makes a batch; all three depend on seed, epoch and index alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from inputs.archives import WebDataset, Yfcc15m
from inputs.colour import Colours, apply_colour
from inputs.columns import KNOWN_COLUMNS, PairColumns
from inputs.images import UnreadableImage, decode_pixels
from inputs.reader import Reader, number_of
from inputs.sentences import draw_sentences
from inputs.sources import Cc3m, Cc12m, Coco, Csv, RedCaps, Roco, RocoAll, RocoNonRadiology, RocoV2
from inputs.transforms import Preprocess, View, as_view, ssl_pixels, train_pixels
from tokenizer import Tokenizer

READERS: dict[str, type[Reader]] = {
    "roco": Roco,
    "roco_nonradiology": RocoNonRadiology,
    "roco_all": RocoAll,
    "rocov2": RocoV2,
    "csv": Csv,
    "yfcc15m": Yfcc15m,
    "coco": Coco,
    "cc3m": Cc3m,
    "cc12m": Cc12m,
    "redcaps": RedCaps,
    "webdataset": WebDataset,
}


def create_reader(
    name: str,
    root: str | Path,
    metadata: str = "",
    split: str = "train",
    caption_filter: str = "all",
    cache_dir: str | Path = "",
    val_fraction: float = 0.1,
    by_image: bool = False,
    named: PairColumns = KNOWN_COLUMNS,
) -> Reader:
    """The reader `name` of READERS; `Reader` explains the arguments.

    Raises ValueError for an unknown name, split, filter or column, FileNotFoundError where the split's files are
    absent.
    """
    if name not in READERS:
        raise ValueError(f"unknown dataset {name!r}; choose from {', '.join(READERS)}")
    if named != KNOWN_COLUMNS and not issubclass(READERS[name], Csv):
        raise ValueError(f"columns are named, and studies read, of a table, --dataset csv; {name} has its publisher's")
    return READERS[name](root, metadata, split, caption_filter, cache_dir, val_fraction, by_image, named)


# ---------------------------------------------------------------------------------------------------------------------
# What training draws
# ---------------------------------------------------------------------------------------------------------------------


class UnreadableImages:
    """The unreadable images of a run, one line each in a file that all workers and ranks append to.

    Raises UnreadableImage as soon as there are more than `limit`.
    """

    def __init__(self, path: Path, limit: float):
        self.path, self.limit = path, limit
        self.names: set[str] = set()
        self.position = 0  # how far the file was read

    def add(self, name: str, reason: str) -> None:
        """Note an image once, whichever process comes first; raises as the class says."""
        name = name.replace("\n", " ").replace("\t", " ")
        if name in self.names:
            return
        self._read()
        if name not in self.names:
            line = f"{name}\t{' '.join(reason.split())}\n"
            with open(self.path, "ab") as file:
                file.write(line.encode("utf-8", "surrogateescape"))  # a name may be no UTF-8
            self._read()
        if len(self.names) > self.limit:
            raise UnreadableImage(
                f"{len(self.names)} images cannot be read, more than the {self.limit:g} that may be; "
                f"{self.path} names them"
            )

    def _read(self) -> None:
        """What others have added since."""
        if self.path.is_file():
            with open(self.path, "rb") as file:
                file.seek(self.position)
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]
            self.position += len(new)
            lines = new.decode("utf-8", "surrogateescape").split("\n")[:-1]
            self.names.update(line.partition("\t")[0] for line in lines)


class ContrastiveDataset(Dataset):
    """Samples for the contrastive objectives: `ds[epoch, index]` is a dict of `inputs` and "index".

    "image": (3, S, S), one training view; "view1", "view2": (3, S, S), two SSL views, all uint8 and with a
    single channel where the image is grey; "text": a caption, drawn if there are several. Every choice
    comes from (seed, epoch, index), so the number of workers or ranks changes no sample.

    With `colour_later` the SSL views are crops as they are, and "view1_colour", "view2_colour" say with what
    `colour.apply_colour_batch` finishes them on the accelerator.

    With `sentences`, a tokenizer, a caption that is longer than its context is `draw_sentences` of it.

    With `identities` a sample also has "identities", two whole numbers that are the same for the same file of an image
    and for the same caption, as it was drawn.

    Where the reader knows studies, "view2" is of another image of the same study, where there is one, and "studies" is
    the study's number.

    An unreadable image is an error. With `bad_samples`, a file, it is named there and another image, chosen
    from the same numbers, takes its place; more than `max_bad_fraction` of the reader's images end the run.
    """

    INPUTS = ("text", "image", "view1", "view2")  # in the order of their random numbers
    ATTEMPTS = 10
    SENTENCES, STUDY = ATTEMPTS + 1, ATTEMPTS + 2  # behind the numbers of stand-ins: what they draw moves no view

    def __init__(
        self,
        reader: Reader,
        inputs: tuple[str, ...],
        preprocess: Preprocess,
        seed: int,
        bad_samples: Path | None = None,
        max_bad_fraction: float = 0.01,
        colour_later: bool = False,
        identities: bool = False,
        sentences: Tokenizer | None = None,
    ):
        unknown = sorted(set(inputs) - set(self.INPUTS))
        if unknown:
            raise ValueError(f"unknown inputs {', '.join(unknown)}; choose from {', '.join(self.INPUTS)}")
        self.reader, self.inputs, self.preprocess, self.seed = reader, inputs, preprocess, seed
        self.colour_later, self.identities, self.sentences = colour_later, identities, sentences
        self.unreadable = UnreadableImages(bad_samples, max_bad_fraction * len(reader)) if bad_samples else None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        # The caption first, then the views as INPUTS orders them: CLIP and SLIP see the same caption and view.
        rng = np.random.default_rng((self.seed, epoch, index))
        index, data, pixels = self._pixels(epoch, index)
        pixels = self.preprocess.pixels(pixels)  # once for all views
        sample: dict = {"index": index}
        if "text" in self.inputs:
            captions = self.reader.captions(index)
            sample["text"] = captions[rng.integers(len(captions))]
            if self.sentences is not None:
                numbers = np.random.default_rng((self.seed, *key, self.SENTENCES))
                length, most = self.sentences.length, self.sentences.context_length
                sample["text"] = draw_sentences(sample["text"], length, most, numbers)
            if self.identities:
                sample["identities"] = [number_of(data), number_of(sample["text"].encode())]
        if "image" in self.inputs:
            sample["image"] = train_pixels(self.preprocess, pixels, rng)
        second = pixels
        if "view2" in self.inputs and self.reader.studies is not None:
            sample["studies"] = [int(self.reader.studies.of[index])]
            second = self._of_study(key, self.reader.studies.others(index), pixels)
        for name, source in (("view1", pixels), ("view2", second)):
            if name in self.inputs:
                sample[name], colour = ssl_pixels(self.preprocess, source, rng)
                if self.colour_later:
                    sample[f"{name}_colour"] = colour
                else:
                    sample[name] = torch.from_numpy(apply_colour(sample[name].numpy(), colour).copy())
        return sample

    def _pixels(self, epoch: int, index: int) -> tuple[int, bytes, torch.Tensor]:
        """The image at `index`, or the first of its stand-ins that can be read: its own index, file and planes."""
        for attempt in range(1, self.ATTEMPTS + 1):
            if (found := self._read(index)) is not None:
                return index, *found
            stand_in = np.random.default_rng((self.seed, epoch, index, attempt))
            index = int(stand_in.integers(len(self.reader)))
        named = f": see {self.unreadable.path}" if self.unreadable else ""
        raise UnreadableImage(f"{self.ATTEMPTS} images in a row cannot be read{named}")

    def _of_study(self, key: tuple[int, int], others: np.ndarray, own: torch.Tensor) -> torch.Tensor:
        """Planes of one of the study's other images, drawn for `key`; the image's own where none can be read."""
        numbers = np.random.default_rng((self.seed, *key, self.STUDY))
        for other in numbers.permutation(others).tolist():
            if (found := self._read(other)) is not None:
                return self.preprocess.pixels(found[1])
        return own

    def _read(self, index: int) -> tuple[bytes, torch.Tensor] | None:
        """File and planes of an image; None for one that cannot be read, once it is noted."""
        try:
            data = self.reader.data(index)
            return data, decode_pixels(data, self.reader.name(index))
        except (UnreadableImage, FileNotFoundError) as error:
            if self.unreadable is None:
                raise
            self.unreadable.add(self.reader.name(index), str(error))
            return None


class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """This rank's part of each global batch, as lists of (epoch, index) for ContrastiveDataset.

    The permutation of an epoch depends on (seed, epoch) alone. A global batch is a slice of it, batch_size
    * world_size long, of which rank r takes the r-th part: N ranks see what one process with N times the
    batch sees. The last, incomplete one is dropped. `len()` is the number of steps in an epoch.
    """

    def __init__(self, n: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0):
        self.global_batch = batch_size * world_size
        if n < self.global_batch:
            raise ValueError(
                f"{n} pairs do not fill one global batch of {self.global_batch} ({batch_size} for each of "
                f"{world_size} processes); choose a smaller batch"
            )
        self.n, self.batch_size, self.rank, self.seed = n, batch_size, rank, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch of the next iteration, and how many of its steps are done already."""
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        return self.n // self.global_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        # Every rank draws the same permutation and takes its own part of each global batch.
        order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
        for step in range(self.start_step, len(self)):
            start = step * self.global_batch + self.rank * self.batch_size
            yield [(epoch, index) for index in order[start : start + self.batch_size].tolist()]


class Collate:
    """Samples to a batch: views stacked to uint8 (B, 3, S, S), "text" tokenised to (B, L), "index" (B,), "identities"
    (B, 2), "studies" (B, 1).

    What happens to the views' colours becomes `colour.Colours`.

    With `trim`, for a text tower that never reads padding, what lies behind the longest caption, rounded up to a
    multiple of 8 tokens, is cut off: nothing to compute there, and few different lengths.
    """

    def __init__(self, tokenizer: Callable[[list[str]], torch.Tensor] | None = None, trim: bool = False):
        self.tokenizer = tokenizer  # None where no text is read
        self.trim = trim

    def __call__(self, samples: list[dict]) -> dict[str, Any]:
        """Samples of ContrastiveDataset to the batch that the class describes."""
        batch: dict[str, Any] = {}
        for name in samples[0]:
            values = [sample[name] for sample in samples]
            if name == "text" and self.tokenizer is not None:
                tokens = self.tokenizer(values)  # (B, L)
                if self.trim:
                    real = tokens != getattr(self.tokenizer, "pad_id", 0)
                    longest = int(real.any(0).nonzero().max()) + 1  # every caption has its start and end token
                    tokens = tokens[:, : longest + -longest % 8].contiguous()
                batch[name] = tokens
            elif name in ("index", "identities", "studies"):
                batch[name] = torch.tensor(values)
            elif name.endswith("_colour"):
                batch[name] = Colours.of(values)
            else:
                # The channels innermost, as resizing leaves them and convolutions like them.
                views = [view.expand(3, -1, -1).permute(1, 2, 0) for view in values]
                batch[name] = torch.stack(views).permute(0, 3, 1, 2)
        return batch


class EvalPairs(Dataset):
    """The evaluation view of each image of a reader: `ds[i]` is ((3, S, S), i). An unreadable one raises."""

    def __init__(self, reader: Reader, preprocess: Preprocess | View):
        self.reader, self.view = reader, as_view(preprocess)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.view(self.reader.image(i), None), i
