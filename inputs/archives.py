"""Sources that lie in archives: YFCC15M's zips, and tar shards read at a sample's place in them."""

from __future__ import annotations

import json
import os
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from inputs.columns import Row
from inputs.images import UnreadableImage
from inputs.index import load_index, rows_index
from inputs.metadata import inside
from inputs.reader import Reader
from inputs.sources import read_list
from runtime.limits import BYTES
from utils import refuse_lfs_pointer


class ArchivePool:
    """Open archives, the last `size` that were used; every process opens its own."""

    opener: Callable[[Path], Any]

    def __init__(self, size: int = 64):
        self.size, self.process = size, os.getpid()
        self.by_name: dict[Path, dict[str, list[str]]] = {}  # of zip archives whose members have other names
        self.archives: OrderedDict[Path, Any] = OrderedDict()

    def __getstate__(self) -> dict:
        return {"size": self.size, "process": -1, "by_name": {}, "archives": OrderedDict()}

    def archive(self, path: Path) -> Any:
        """The open archive at `path`, opened where this process has not yet."""
        if self.process != os.getpid():  # a forked handle shares its position in the file with its parent
            self.archives, self.process = OrderedDict(), os.getpid()
        if path not in self.archives:
            self.archives[path] = self.opener(path)
            if len(self.archives) > self.size:
                self.archives.popitem(last=False)[1].close()
        self.archives.move_to_end(path)
        return self.archives[path]


def read_member(archive: zipfile.ZipFile, member: str) -> bytes:
    """A member's bytes; ValueError before it is read where it declares more than the limit. zipfile gives no more."""
    BYTES.refuse(archive.getinfo(member).file_size, member)
    return archive.read(member)


def open_zip(path: Path) -> zipfile.ZipFile:
    """A zip archive; ValueError names one that is torn, or none."""
    refuse_lfs_pointer(path)
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is torn or no zip file, fetch it again or delete it: {error}") from error


class ZipPool(ArchivePool):
    """Members of zip archives by name."""

    opener = staticmethod(open_zip)

    def read(self, path: Path, member: str) -> bytes:
        """A member's bytes; FileNotFoundError for an absent archive, UnreadableImage for a damaged one."""
        try:
            archive = self.archive(path)
            return read_member(archive, member if member in archive.NameToInfo else self.alike(path, archive, member))
        except FileNotFoundError:
            raise
        except Exception as error:  # zipfile and zlib raise any kind on damaged archives
            raise UnreadableImage(f"cannot read the image {path}/{member}: {error}") from error

    def alike(self, path: Path, archive: zipfile.ZipFile, member: str) -> str:
        """The member of that name in any folder and case; KeyError where there is none, or more than one."""
        if path not in self.by_name:
            self.by_name[path] = members_by_name(archive.namelist())
        found = self.by_name[path].get(member.lower(), [])
        if len(found) != 1:
            raise KeyError(f"{len(found)} members are called {member}" + (f": {', '.join(found[:3])}" if found else ""))
        return found[0]


def members_by_name(names: Iterable[str]) -> dict[str, list[str]]:
    """{file name in lower case: members of that name in any folder}, without what macOS adds."""
    members: dict[str, list[str]] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        if last and not last.startswith("._") and "__MACOSX" not in folder:
            members.setdefault(last.lower(), []).append(name)
    return members


class TarPool(ArchivePool):
    """Members of tar archives by their place in the file."""

    opener: Any = staticmethod(partial(open, mode="rb"))

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """A member's bytes; FileNotFoundError for an absent archive, UnreadableImage where it is shorter."""
        file = self.archive(path)
        file.seek(offset)
        data = file.read(size)
        if len(data) < size:
            raise UnreadableImage(f"{path} ends before byte {offset + size}")
        return data


_YFCC = re.compile(r"[0-9]{3}\.jpg")


class Yfcc15m(Reader):
    """YFCC15M (Thomee et al. 2016): image 12345678 is `678.jpg` in `images/12/345.zip`; `metadata` is
    `yfcc15m.pkl`, a list of (number, title, description). Title and description are two captions."""

    splits = ("train",)
    indexed = numbered = True

    def locate(self, metadata: str) -> None:
        """The pickle, and no archive opened yet."""
        self.find(metadata, "yfcc15m.pkl")
        self.archives = ZipPool()

    def rows(self) -> Iterator[Row]:
        """A row for each entry of the list; ValueError names one that is no (number, title, description)."""
        for number, row in enumerate(self._list()):
            where = f"{self.files[0]} row {number}"
            if not (isinstance(row, tuple | list) and list(map(type, row)) == [int, str, str]):
                raise ValueError(f"{where} is not (number, title, description): {str(row)[:80]}")
            if not 0 <= row[0] < 10**8:
                raise ValueError(f"{where}: the image number {row[0]} does not have at most 8 digits")
            yield Row(where, row[0], list(row[1:]))

    def _list(self) -> Iterable:
        """What the pickle holds, where it can be from the arrays that make_dataset.py writes beside it."""
        columns = load_index(*rows_index(self.files[0]))
        if columns is None:
            return read_list(self.files[0])
        texts = columns.texts
        images: Any = columns.images
        numbers = map(int, images)
        return ((number, texts[2 * i], texts[2 * i + 1]) for i, number in enumerate(numbers))

    def finder(self) -> Callable[[Row], bool]:
        """Whether the archive that a row's number names is there and holds the image; each is opened once."""
        present, listed = np.zeros(10**8, dtype=bool), np.zeros(10**5, dtype=bool)  # by image, by archive

        def exists(row: Row) -> bool:
            archive = row.image // 1000
            if not listed[archive]:
                listed[archive] = True
                path = self._archive(archive)
                if path.is_file():
                    with open_zip(path) as file:
                        names = file.namelist()
                    found = members_by_name(names)
                    numbers = [
                        int(n[:3])
                        for n, places in found.items()
                        if _YFCC.fullmatch(n) and (len(places) == 1 or n in places)
                    ]
                    present[1000 * archive + np.array(numbers, dtype=int)] = True
            return bool(present[row.image])

        return exists

    def wanted(self, row: Row) -> str:
        """Archive and member of a row, for messages."""
        archive, member = divmod(int(row.image), 1000)
        return f"{self._archive(archive)}/{member:03d}.jpg"

    def _archive(self, number: int) -> Path:
        return self.root / "images" / f"{number // 1000:02d}" / f"{number % 1000:03d}.zip"

    def _place(self, i: int) -> tuple[Path, str]:
        archive, member = divmod(int(self.images[self._row(i)]), 1000)
        return self._archive(archive), f"{member:03d}.jpg"

    def name(self, i: int) -> str:
        """Archive and member of image i."""
        return "/".join(map(str, self._place(i)))

    def data(self, i: int) -> bytes:
        """The member's bytes; raises as `ZipPool.read`."""
        return self.archives.read(*self._place(i))


# Extensions of a sample's image.
SHARD_IMAGES = (
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "tif", "tiff", "gif", "bmp", "jp2", "avif", "dcm", "dicom",
)  # fmt: skip
SHARD_TEXTS = ("txt", "json")  # and of what may hold its captions


class WebDataset(Reader):
    """Tar shards as img2dataset and `make_dataset.py shards` write them: `key.jpg`, `key.txt`, `key.json`.

    The root is a folder of `*.tar` (of another split than train: in its folder `validation` or `test`), or
    the shards themselves: a brace pattern such as `shards/{00000..00331}.tar`, or several joined by `::`.
    With a folder as root, `metadata` may hold a pattern relative to it, or name a `.txt` of one shard a line.
    Captions are the list `captions` of the JSON, else the text, else `caption` of the JSON. A name is cut
    at its first dot, or at the last in a shard where that makes more pairs of an image and a text.

    The members' places are indexed once and a sample is read at its place, not in the stream's order: so
    shards are sources like all others, whose global batches do not depend on the number of processes and
    workers, whose epochs hold each sample once and whose runs continue at any step. A stream split over nodes
    and workers holds none of that. The price is a seek for each image: keep shards on a disk that seeks.
    """

    indexed = True
    index_version = 2

    def __init__(self, root: str | Path, metadata: str = "", *arguments: Any, **keywords: Any):
        if not metadata and root and not Path(root).is_dir():
            root, metadata = ".", str(root)
        super().__init__(root, metadata, *arguments, **keywords)

    def locate(self, metadata: str) -> None:
        """The shards, which must all be there."""
        self.archives = TarPool()
        if not metadata:
            folders = [self.root / self.split] + [self.root] * (self.split == "train")
            self.files = next(filter(None, (sorted(folder.glob("*.tar")) for folder in folders)), [])
            if not self.files:
                raise FileNotFoundError(f"no shards (*.tar) in {' or '.join(map(str, folders))}")
            return
        if self.split != "train":
            raise FileNotFoundError(f"the shards {metadata} are of the split 'train', not {self.split!r}")
        names = [metadata]
        if metadata.endswith(".txt"):
            self.find(metadata)
            names = self.files[0].read_text(encoding="utf-8-sig").split("\n")
        names = [name for line in names if line.strip() for name in expand_shards(line.strip())]
        self.files = [self.root / name for name in names]
        absent = [str(path) for path in self.files if not path.is_file()]
        if absent or not names:
            raise FileNotFoundError(f"{len(absent)} of {len(names)} shards are absent: {', '.join(absent[:3])}")
        self.root = Path(os.path.commonpath([path.parent for path in self.files]))

    def rows(self) -> Iterator[Row]:
        """A row for each sample, whose image is its place: shard, offset, size and name."""
        for number, path in enumerate(self.files):
            with open(path, "rb") as file:
                for key, members in shard_samples(path, file).items():
                    where = f"{path} sample {key!r}"
                    kind = next((kind for kind in SHARD_IMAGES if kind in members), "")
                    captions = shard_captions(file, members, where)
                    if kind:
                        yield Row(where, f"{number} {' '.join(map(str, members[kind]))} {key}.{kind}", captions)
                        continue
                    cuts = [k for k in members if _cut(k, True)[1] in SHARD_IMAGES]  # images, each a row that is lost
                    for cut in cuts or [""]:
                        why = f": its name goes on with {cut!r}, and the format cuts names at their first dot"
                        yield Row(where + why * bool(cut), "", captions)

    def finder(self) -> Callable[[Row], bool]:
        """A sample without an image has an empty place."""
        return lambda row: bool(row.image)

    def _place(self, i: int) -> tuple[Path, int, int, str]:
        shard, offset, size, member = self.images[self._row(i)].split(" ", 3)
        return self.files[int(shard)], int(offset), int(size), member

    def name(self, i: int) -> str:
        """Shard and member of image i."""
        path, _offset, _size, member = self._place(i)
        return f"{path}/{member}"

    def data(self, i: int) -> bytes:
        """The member's bytes, read at its place; raises as `TarPool.read`."""
        return self.archives.read(*self._place(i)[:3])


def expand_shards(pattern: str) -> list[str]:
    """The paths that a brace pattern, or several joined by `::`, stands for."""
    if "{" not in pattern and "::" not in pattern:
        return [pattern]
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise ImportError(f"the pattern of shards {pattern} needs webdataset: pip install webdataset") from error
    return expand_urls(pattern)


def shard_samples(path: Path, file: BinaryIO) -> dict[str, dict[str, tuple[int, int]]]:
    """The samples of a shard: key -> extension in lower case -> (offset, size) in the file.

    Raises ValueError, naming the member, for one that a shard has no use for (a link, a device, a path that
    leaves the folder, a second file of the same name), and for a compressed or damaged archive.
    """
    refuse_lfs_pointer(path)
    members: dict[str, tuple[int, int]] = {}
    try:
        while True:  # archives one after the other (cat a.tar b.tar): each has its end mark
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    _take_member(member, members, f"{path} member {member.name!r}")
                file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # a damaged header ends the loop in silence
                raise tarfile.ReadError(f"it breaks off at byte {archive.offset}")
            if not _skip_zeros(file):
                return _by_sample(path, members)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is no complete, uncompressed tar archive: {error}") from error


def _take_member(member: tarfile.TarInfo, members: dict[str, tuple[int, int]], where: str) -> None:
    name = inside(member.name, where).removeprefix("./")
    if member.isdir():
        return
    if not member.isreg() or member.issparse() or member.size < 0:
        raise ValueError(f"{where} is no plain file (type {member.type!r}): refused")
    if name.rpartition("/")[2].startswith("._"):  # what macOS's tar adds beside each file
        return
    if members.setdefault(name, place := (member.offset_data, member.size)) != place:
        raise ValueError(f"{where} is there twice")


def _by_sample(path: Path, members: dict[str, tuple[int, int]]) -> dict[str, dict[str, tuple[int, int]]]:
    """A shard's files by key and extension.

    The format cuts a name at its first dot. Where the last dot makes more pairs of an image and a text, as of files
    that are named by DICOM's UIDs, all of the shard are cut at the last one.
    """
    at_last = max((False, True), key=lambda at_last: _pairs(members, at_last))  # of equals the first dot
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for name, place in members.items():
        key, kind = _cut(name, at_last)
        if samples.setdefault(key, {}).setdefault(kind, place) != place:
            raise ValueError(f"{path} member {name!r} is there twice")
    return samples


def _pairs(names: Iterable[str], at_last: bool) -> tuple[int, bool]:
    """How many keys have an image and a text when names are cut so, and whether any has an image."""
    keys = [_cut(name, at_last) for name in names]
    images, texts = ({key for key, kind in keys if kind in kinds} for kinds in (SHARD_IMAGES, SHARD_TEXTS))
    return len(images & texts), bool(images)


def _cut(name: str, at_last: bool = False) -> tuple[str, str]:
    """The key in a name, and the extension in lower case."""
    folder, slash, last = name.rpartition("/")
    stem, _, kind = last.rpartition(".") if at_last and "." in last else last.partition(".")
    return folder + slash + stem, kind.lower()


def _skip_zeros(file: BinaryIO) -> bool:
    """Go to the next block that is not all zeros; False at the end of the file."""
    while blocks := file.read(1 << 20):
        if blocks.strip(b"\0"):
            first = next(i for i in range(0, len(blocks), tarfile.BLOCKSIZE) if any(blocks[i : i + tarfile.BLOCKSIZE]))
            file.seek(first - len(blocks), os.SEEK_CUR)
            return True
    return False


def shard_captions(file: BinaryIO, members: dict[str, tuple[int, int]], where: str) -> list[str]:
    """The captions of a sample: of the places in WebDataset's order the first that states one; none where none does."""

    def text(kind: str) -> str:
        offset, size = members[kind]
        BYTES.refuse(size, f"{where}: its {kind}")
        file.seek(offset)
        return file.read(size).decode("utf-8-sig")

    try:
        values = json.loads(text("json")) if "json" in members else None
        values = values if isinstance(values, dict) else {}
        several = values.get("captions")
        places = [several if isinstance(several, list) else [], [text("txt")] if "txt" in members else [],
                  [values.get("caption")]]  # fmt: skip
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ValueError(f"{where}: {error}") from error
    stated = ([text for text in place if isinstance(text, str) and text.strip()] for place in places)
    return next(filter(None, stated), [])
