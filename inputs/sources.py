"""Sources of image files in their publishers' layouts: ROCO, tables, COCO, CC3M, CC12M, RedCaps."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from inputs.columns import Row
from inputs.conventions import (
    SPLIT_NAMES,
    SPLIT_OF,
    STUDY_COLUMNS,
    alike,
    crossing,
    group_column,
    group_name,
    left_out,
    split_key,
)
from inputs.metadata import JsonLines, Table, fields_of, inside, iter_json, open_table, plain_path, read_pickle
from inputs.reader import SPLITS, NoSplit, Reader, first_file, number_of
from inputs.sentences import joined
from utils import refuse_lfs_pointer


class Roco(Reader):
    """ROCO v1 (Pelka et al. 2018): `{train,validation,test}/{radiology,non-radiology}/images/<id>.jpg` beside
    `captions.txt`, or the first MedSLIP's `selected_pairs.txt`: lines of an id, white space and the caption.

    The root is the folder of the three splits, or its parent where it is called `data`, or one split, or a
    folder of captions itself; from the last two the other splits are found beside it. A folder of captions
    that belongs to no split is `train`. `metadata` is the name of another file of captions beside `images`.
    """

    kinds: tuple[str, ...] = ("radiology",)

    def locate(self, metadata: str) -> None:
        """The captions of the split, from any of the roots that the class names."""
        if Path(metadata).name != metadata:
            raise ValueError(f"ROCO's metadata is the name of a file beside images/, no path: {metadata!r}")
        names = (metadata,) if metadata else ("captions.txt", "selected_pairs.txt")

        def captions_in(folder: Path) -> Path | None:
            return next((folder / name for name in names if (folder / name).is_file()), None)

        given, own_split = self.root, "train"
        roots = [given, given / "data"]
        split_folder = given.parent if given.name in ("radiology", "non-radiology") else given
        if split_folder.name in SPLITS:
            own_split = split_folder.name
            roots.append(split_folder.parent)
        for root in roots:
            found = [path for kind in self.kinds if (path := captions_in(root / self.split / kind)) is not None]
            if len(found) == len(self.kinds):
                self.root, self.files = root, found
                return
        alone = captions_in(given)
        if alone is None or self.split != own_split:
            wanted = " and ".join(f"{self.split}/{kind}/{' or '.join(names)}" for kind in self.kinds)
            raise FileNotFoundError(f"no ROCO split {self.split!r} under {given}: expected {wanted}")
        self.files = [alone]

    def rows(self) -> Iterator[Row]:
        """A row for each line: the id, white space, the caption."""
        for path in self.files:
            refuse_lfs_pointer(path)
            images = (path.parent.relative_to(self.root) / "images").as_posix()
            with open(path, "rb") as lines:  # text mode would split a caption at a carriage return inside
                for number, line in enumerate(lines, 1):
                    where = f"{path} line {number}"
                    try:
                        fields = line.decode("utf-8-sig").split(None, 1)
                    except UnicodeDecodeError as error:
                        raise ValueError(f"{where} is not UTF-8: {error}") from error
                    if fields:
                        yield Row(where, f"{images}/{inside(fields[0], where)}.jpg", fields[1:])


class RocoNonRadiology(Roco):
    """ROCO's other part: charts, photographs and drawings out of the same papers."""

    kinds = ("non-radiology",)


class RocoAll(Roco):
    """Both parts of ROCO."""

    kinds = ("radiology", "non-radiology")


class RocoV2(Reader):
    """ROCO v2 (Rückert et al. 2024): `<split>_captions.csv` with ID and Caption, and the images in
    `<split>_images/<split>/`, `<split>_images/` or `<split>/`; validation is called `valid`."""

    def locate(self, metadata: str) -> None:
        """The split's table and its folder of images."""
        short = "valid" if self.split == "validation" else self.split
        self.find(metadata, f"{short}_captions.csv")
        folders = (f"{short}_images/{short}", f"{short}_images", short)
        self.images = next((folder for folder in folders if (self.root / folder).is_dir()), "")
        if not self.images:
            raise FileNotFoundError(f"no images at {self.root}/{{{','.join(folders)}}}")

    def rows(self) -> Iterator[Row]:
        """A row for each line of the table."""
        table = Table(self.files[0])
        image, caption = table.column("id"), table.column("caption")
        for where, fields in table:
            yield Row(where, f"{self.images}/{inside(fields[image], where)}.jpg", [fields[caption]])


class Csv(Reader):
    """Any table of captions and of image paths in the root; comma, semicolon or tab separated, or JSON lines.

    The columns are those that `named` names, else the first that the header holds of IMAGE and of CAPTION; several
    columns of captions are sections of one text. The table is `metadata`, with {split} in its name where each split has
    its own, or `<root>/<split>` with an ending of KINDS. In one table for all splits a column `split` tells them apart;
    without one, `val_fraction` of the images are held out for validation, always the same: with a column of
    conventions.GROUP_COLUMNS those of whole patients, unless `by_image`. Studies are those of a column of
    STUDY_COLUMNS, told apart within such a patient.
    """

    KINDS = ("csv", "tsv", "jsonl")

    IMAGE = ("image", "image_path", "filepath", "file_path", "filename", "file_name", "path", "picture")
    CAPTION = ("caption", "title", "text", "report", "description", "sentence")

    def locate(self, metadata: str) -> None:
        """The table of the split, or the one for all splits."""
        names, self.prefix = SPLIT_NAMES[self.split], f"{self.root}/"
        self.for_all_splits = bool(metadata) and "{split}" not in metadata
        if self.for_all_splits:
            self.find(metadata)
        elif metadata:
            places = [metadata.replace("{split}", name) for name in names]
            self.files = [first_file([Path(base, place) for place in places for base in ("", self.root)], self.split)]
        else:
            self.find("", *(f"{name}.{kind}" for name in names for kind in self.KINDS))

    def rows(self) -> Iterator[Row]:
        """The rows of the split; NoSplit where the table has none."""
        table = open_table(self.files[0])
        image = table.column(self.named.image) if self.named.image else table.column(*self.IMAGE)
        captions = [table.column(name) for name in self.named.captions] or [table.column(*self.CAPTION)]
        split = table.column("split") if "split" in table.header else None
        whole = group_column(table.header)
        group = table.column(whole) if whole else None
        study = [table.column(*STUDY_COLUMNS)] if self.named.study else []
        if study and group not in (None, *study):
            study.insert(0, group)  # some count their studies in each patient anew
        held = self._held_out(table, image, group) if self.for_all_splits and split is None else set()
        chosen, lone, unknown, splits_of = 0, 0, Counter(), defaultdict(set)
        numbers: dict[str, array] = defaultdict(partial(array, "q"))  # of each split's images
        for where, fields in table:
            path = self._path(fields[image])
            name = self.split
            if split is not None:
                name = SPLIT_OF.get(split_key(fields[split]))
                if name is None:
                    unknown[fields[split]] += 1
            elif self.for_all_splits:
                name = "validation" if path in held else "train"
            if name is not None and group is not None and (named := group_name(fields[group], "")):
                splits_of[named].add(name)
            if name is not None and split is not None:
                numbers[name].append(_number(path))
            if name == self.split:
                chosen += 1
                row = Row(where, path, [joined(fields[caption] for caption in captions)])
                names = [group_name(fields[column], "") for column in study]  # without a tab
                row.study = "\t".join(names) if all(names) else ""
                lone += bool(names and names[-1] and not row.study)
                yield row
        self.groups = frozenset(group for group, splits in splits_of.items() if self.split in splits)
        self._remark(split is not None, unknown, whole, crossing(splits_of))
        if twice := in_several(numbers.values()):
            first = next(path for _, fields in table if _number(path := self._path(fields[image])) in twice)
            self.remarks.append(f"{len(twice):,} images are in several splits, first {first}")
        if lone:
            self.remarks.append(f"{lone:,} images have a study but no {whole}, which studies are told apart in")
        if not chosen:
            raise NoSplit("; ".join([f"{table.path} has no rows of the split {self.split!r}", *self.remarks]))

    def _path(self, cell: str) -> str:
        return plain_path(cell.strip()).removeprefix(self.prefix)

    def _held_out(self, table: Table | JsonLines, image: int, group: int | None) -> set[str]:
        """The images that are not trained on; with a column of groups those of whole ones, of one at least.

        An image of several groups belongs to its first, one without a group is one by itself. Groups whose names look
        alike stay together.
        """
        if group is None or self.by_image:
            paths = {self._path(fields[image]) for _, fields in table}
            return {path for path in paths if held_out(path, self.val_fraction)}
        self.held_out_by = table.header[group]
        group_of: dict[str, str] = {}
        for _, fields in table:
            path = self._path(fields[image])
            group_of.setdefault(path, group_name(fields[group], alone=path))
        one = {name: names[0] for names in alike(group_of.values()) for name in names}
        groups = set(one.values())
        held = {name for name in groups if held_out(name, self.val_fraction)}
        if not held and self.val_fraction and len(groups) > 1:
            held = {min(groups, key=_number)}
        return {path for path, name in group_of.items() if one[name] in held}

    def _remark(self, has_splits: bool, unknown: Counter, whole: str | None, shared: list[str]) -> None:
        if unknown:
            self.remarks.append(left_out(unknown, "unknown splits", SPLIT_OF))
        if shared and has_splits:
            self.remarks.append(f"{len(shared)} values of {whole} are in several splits, first {shared[0]}")
        if self.for_all_splits and not has_splits:
            what = f"values of {whole}, with all their images" if self.held_out_by else "images"
            alone = "" if self.held_out_by else "; one by one, since " + (
                f"this run began so: {len(shared)} values of {whole} are on both sides" if whole else
                "no column (patient, study, ...) tells what belongs together"
            )  # fmt: skip
            self.remarks.append(
                f"the table has no column split: {self.val_fraction:.0%} of the {what}, the same in every run, are "
                f"held out for validation (--val-fraction){alone}"
            )


def in_several(numbers: Iterable[Sequence[int]]) -> set[int]:
    """What is in more than one of several lists."""
    each = [np.unique(np.asarray(own, np.int64)) for own in numbers]
    found, count = np.unique(np.concatenate([np.empty(0, np.int64), *each]), return_counts=True)
    return set(found[count > 1].tolist())


def held_out(name: str, fraction: float) -> bool:
    """Whether an image or group belongs to the `fraction` that is not trained on: decided by its name alone."""
    return _number(name) < fraction * 2**63


def _number(name: str) -> int:
    return number_of(name.encode("utf-8", "surrogateescape"))


class Coco(Reader):
    """COCO Captions 2017 (Chen et al. 2015): `{train,val}2017/` and `annotations/captions_*.json`.

    Which file an image's id is says the list `images` there; where there is none it is the id in 12 digits, as COCO's
    own files are called.
    """

    splits = ("train", "validation")
    indexed = True
    index_version = 2

    def locate(self, metadata: str) -> None:
        """The split's annotations."""
        self.folder = "train2017" if self.split == "train" else "val2017"
        name = f"captions_{self.folder}.json"
        if metadata and self.split == "validation":  # the training file is given, the other lies beside it
            metadata = str(Path(metadata).with_name(name))
        self.find(metadata, f"annotations/{name}")

    def rows(self) -> Iterator[Row]:
        """A row for each image with all its captions; one that the list of images lacks has no image."""
        names = self._file_names()
        captions: dict[int, list[str]] = {}
        for number, item in enumerate(iter_json(self.files[0], "annotations")):
            where = f"{self.files[0]} annotation {number}"
            image, caption = fields_of(item, where, image_id=int, caption=str)
            captions.setdefault(image, []).append(caption)
        for image, texts in captions.items():
            where = f"{self.files[0]} image {image}"
            if names and image not in names:
                yield Row(f"{where}, which is not in its list of images", "", texts)
            else:
                yield Row(where, f"{self.folder}/{names.get(image) or f'{image:012d}.jpg'}", texts)

    def _file_names(self) -> dict[int, str]:
        """{id: path below the folder of images}, {} without a list; ValueError for a path outside, or two of an id."""
        names: dict[int, str] = {}
        for number, item in enumerate(iter_json(self.files[0], "images", optional=True)):
            where = f"{self.files[0]} images {number}"
            image, name = fields_of(item, where, id=int, file_name=str)
            name = inside(name, where).removeprefix(f"{self.folder}/")
            if names.setdefault(image, name) != name:
                raise ValueError(f"{where}: the id {image} is that of {names[image]!r} already, now of {name!r}")
        return names


class Cc3m(Reader):
    """CC3M (Sharma et al. 2018) as `cc3m.npy`: an array of {image_id: path, captions: [text]}."""

    splits = ("train",)
    indexed = True
    key = "image_id"

    def locate(self, metadata: str) -> None:
        """The list."""
        self.find(metadata, f"{type(self).__name__.lower()}.npy")

    def rows(self) -> Iterator[Row]:
        """A row for each entry."""
        for number, item in enumerate(read_list(self.files[0])):
            where = f"{self.files[0]} row {number}"
            path, texts = fields_of(item, where, **{self.key: (str, int), "captions": list})
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{where}: the captions are not all text: {str(texts)[:80]}")
            yield Row(where, str(path), texts)


class Cc12m(Cc3m):
    """CC12M (Changpinyo et al. 2021) as `cc12m.npy`: an array of {image_name: path, captions: [text]}."""

    key = "image_name"


class RedCaps(Reader):
    """RedCaps (Desai et al. 2021): the merged list of annotations, and `images/<subreddit>/<id>.jpg` as the
    downloader writes them or `<subreddit>/<id>.jpg` as SLIP reads them; each subreddit may lie either way."""

    splits = ("train",)
    indexed = True

    def locate(self, metadata: str) -> None:
        """The merged list."""
        self.find(metadata, "redcaps_v1.json")

    def rows(self) -> Iterator[Row]:
        """A row for each annotation."""
        images = self.root / "images"
        downloaded = {folder.name for folder in images.iterdir()} if images.is_dir() else set()
        for number, item in enumerate(iter_json(self.files[0], "annotations")):
            where = f"{self.files[0]} annotation {number}"
            image, folder, caption = fields_of(item, where, image_id=str, subreddit=str, caption=str)
            yield Row(where, f"{'images/' if folder in downloaded else ''}{folder}/{image}.jpg", [caption])


def read_list(path: Path) -> list:
    """The list in a `.pkl` or `.npy`; only plain values are read."""
    rows = read_pickle(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds {type(rows).__name__}, not a list of rows")
    return rows
