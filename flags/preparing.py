"""Flags of make_dataset.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flags.common import add_column_arguments, add_workers_argument, description
from flags.names import CATALOG, CBIS_COLUMNS, READERS
from inputs.display import add_frame_argument
from runtime.command_line import HelpFormatter, Parser

# Of `audit`: correlation from which a pair counts as a copy; benchmarks/bench_audit.py says what it finds and lists
# wrongly.
THRESHOLD = 0.88
COLUMNS = {  # of `unpack`: names by which each column is found, the first that is there
    "image": ("image", "img", "jpg"),
    "caption": ("caption", "text", "captions"),
    "id": ("image_id", "id", "name"),
}


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """The subcommands; `module` is the file of preparation/ whose `run` does it."""
    parser = Parser("make_dataset.py", description=description("make_dataset.py"), formatter_class=HelpFormatter)
    commands = parser.add_subparsers(title="datasets", dest="command", required=True)
    for add in (add_yfcc, add_cbis_tables, add_shards, add_shrink, add_unpack, add_check, add_audit, add_demo):
        add(commands)
    return parser


def add_yfcc(commands: Any) -> None:
    """The flags of `yfcc15m`."""
    parser = commands.add_parser(
        "yfcc15m",
        help="collect the captions of YFCC15M",
        description="Reads YFCC100M's table line by line and writes two pickled lists: yfcc15m.pkl with (number, "
        "title, description) of the captioned images, yfcc100m.pkl with the numbers of all that were downloaded. "
        "yfcc15m.pkl.rows holds the first once more as arrays, from which main.py starts without unpickling.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--ids", type=Path, default=Path("flickr_unique_ids.npy"), help="numbers of the downloaded images"
    )
    parser.add_argument(
        "--subset",
        type=Path,
        default=Path("yfcc100m_subset_data.tsv"),
        help="OpenAI's list of captioned images, number first",
    )
    parser.add_argument(
        "--dataset",
        type=Path,
        default=Path("yfcc100m_dataset.txt"),
        help="YFCC100M's table: number, title and description in columns 1, 9 and 10, URL-encoded",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("."), help="where the lists are written")
    parser.add_argument(
        "--root",
        type=Path,
        default=None,
        help="folder that holds images/: its archives are indexed now instead of at the first training run",
    )
    parser.set_defaults(module="yfcc")


def add_cbis_tables(commands: Any) -> None:
    """The flags of `cbis`."""
    parser = commands.add_parser(
        "cbis",
        help="join CBIS-DDSM's case tables with its images",
        description="Joins the four case tables of CBIS-DDSM with the images of its JPEG edition (csv/ and "
        "jpeg/) or DICOM edition (CBIS-DDSM/, as NBIA, tcia_utils or idc-index lay it) and writes calc.csv and "
        "mass.csv into --root: "
        f"one row a lesion with the columns {', '.join(CBIS_COLUMNS)}. The last three are paths relative to "
        "--root, empty where no image was found; those rows are named. Behind them stand what the radiologist noted "
        "(density, assessment, subtlety, descriptors) and the crop's size in pixels.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--root",
        type=Path,
        required=True,
        help="folder of the download; the case tables lie in it or in its csv/",
    )
    parser.add_argument(
        "--val-folds",
        type=int,
        default=5,
        help="one part in this many of the training table's patients becomes the validation split",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="draws the validation patients; keep it for results that are to be compared",
    )
    parser.add_argument(
        "--merge-types",
        action="store_true",
        help="write both types into both.csv instead. Refused when a patient of one type's training table is "
        "in the other's test table, as 31 are in the published tables",
    )
    parser.set_defaults(module="cbis_tables")


def add_shards(commands: Any) -> None:
    """The flags of `shards`."""
    parser = commands.add_parser(
        "shards",
        help="write any dataset of main.py as tar shards",
        description="Writes a dataset's images and captions as WebDataset shards in img2dataset's form: samples "
        "key.jpg, key.txt (its first caption) and key.json (all captions), in OUTPUT/00000.tar and so on, for "
        "--dataset webdataset. An image that is not shrunk is copied byte for byte; one that cannot be decoded is "
        "skipped and named in OUTPUT/bad_samples.txt. Run again after an interruption, it writes the shards that "
        "are missing.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--dataset", required=True, choices=READERS, help="which reader, as for main.py")
    parser.add_argument("--root", required=True, help="folder of the dataset, as for main.py")
    parser.add_argument("--metadata", default="", help="file of captions where the layout does not fix it")
    add_column_arguments(parser)
    parser.add_argument("--split", default="train", help="train, validation or test")
    parser.add_argument("--output", type=Path, required=True, help="folder of the shards; one for each split")
    parser.add_argument("--shard-size", type=int, default=5000, help="images in a shard; 1,000 to 10,000 are usual")
    parser.add_argument(
        "--short-side",
        type=int,
        default=None,
        metavar="PIXELS",
        help="shrink larger images to this short side, as JPEG of quality 95 (PNG stays PNG); twice the training "
        "size, 448, keeps what crops need. Default: copy",
    )
    add_frame_argument(
        parser, "which frame of DICOM files and TIFFs with several (a tomosynthesis): first, middle, or a number from 1"
    )
    add_workers_argument(parser)
    parser.set_defaults(module="shards")


def add_shrink(commands: Any) -> None:
    """The flags of `shrink`."""
    parser = commands.add_parser(
        "shrink",
        help="copy a folder with its images shrunk",
        description="Copies a folder tree; JPEG, PNG and DICOM files whose short side is longer than --short-side are "
        "shrunk to it (JPEG quality 95; more than 8 bits are windowed as in training; a DICOM file of one frame keeps "
        "its name and header, with 8 bits as displayed, without loss), all other files are copied as they are, so that "
        "readers find the layout they know. Images inside zip or tar archives are not touched: for "
        "those there is `shards`. Run again after an interruption, it continues.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--root", type=Path, required=True, help="folder to copy")
    parser.add_argument("--output", type=Path, required=True, help="the copy; outside --root")
    parser.add_argument(
        "--short-side",
        type=int,
        default=448,
        metavar="PIXELS",
        help="448 is twice the usual training size, which leaves room for crops",
    )
    parser.add_argument(
        "--crop-breast",
        action="store_true",
        help="of whole mammograms: cut each image to the breast before it is shrunk, so that more of it is left",
    )
    add_workers_argument(parser)
    parser.set_defaults(module="shrink")


def add_unpack(commands: Any) -> None:
    """The flags of `unpack`."""
    parser = commands.add_parser(
        "unpack",
        help="ROCO's parquet folders (Hugging Face) or ROCO v2's zips (Zenodo) to ROCO's layout",
        description="Writes OUTPUT/{train,validation,test}/radiology/images/<id>.jpg and captions.txt for --dataset "
        "roco. The source is a folder of parquet files whose names or folders begin with their split "
        "(train-00000-of-00026.parquet), or of <split>_captions.csv beside <split>_images.zip or its unpacked folder. "
        "Images keep their bytes; one that cannot be decoded is left out and named in OUTPUT/bad_samples.txt. Run "
        "again after an interruption, it goes on; a finished copy is verified.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--source", type=Path, required=True, help="folder of the download")
    parser.add_argument("--output", type=Path, required=True, help="folder of the copy")
    parser.add_argument(
        "--short-side",
        type=int,
        default=None,
        metavar="PIXELS",
        help="shrink larger images to this short side; 448 is twice the usual training size. Default: copy",
    )
    for role in COLUMNS:
        usual = ", ".join(COLUMNS[role])
        text = f"parquet: the column of the {role}, where it is none of {usual}"
        parser.add_argument(f"--{role}-column", default=None, metavar="NAME", help=text)
    add_workers_argument(parser)
    parser.set_defaults(module="unpack")


def add_check(commands: Any) -> None:
    """The flags of `check`."""
    parser = commands.add_parser(
        "check",
        help="count a finished download, and name the images that cannot be decoded",
        description="Decodes every image of a dataset of main.py, or of a set of the catalog, split by split. "
        "Exit code 1 where some cannot be decoded; they are named in --output.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--dataset", default="", choices=["", *READERS], help="which reader, as for main.py")
    parser.add_argument("--root", default="", help="folder of the dataset, or of the set in place of the catalog's")
    parser.add_argument("--metadata", default="", help="file of captions where the layout does not fix it")
    add_column_arguments(parser)
    parser.add_argument("--set", default="", metavar="NAME", help="a labelled set of the catalog instead")
    parser.add_argument("--catalog", default=str(CATALOG), help="where the labelled sets are")
    parser.add_argument("--output", type=Path, default=Path("unreadable.txt"), help="the images that cannot be decoded")
    add_workers_argument(parser)
    parser.set_defaults(module="check")


def add_audit(commands: Any) -> None:
    """The flags of `audit`."""
    parser = commands.add_parser(
        "audit",
        help="near duplicates within a set of images, or between two",
        description="Lists pairs of images that are copies of one another: resized, re-encoded, mirrored or cropped by "
        "up to a sixth. One set is compared with itself, several with one another. Exit code 0 whether there are any "
        "or not; unreadable images are counted and named.",
        formatter_class=HelpFormatter,
    )
    # fmt: off
    parser.add_argument("sets", nargs="+", metavar="NAME=PATH",
                        help="a folder, searched with all below it, or a CSV with a column image")
    parser.add_argument("--output", type=Path, default=Path("duplicates.csv"), help="the pairs, most alike first")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="correlation from which a pair is listed")
    parser.add_argument("--pretrained", default="", metavar="PATH",
                        help="weights of a model: its nearest neighbours are candidates too, pairs get their cosine")
    parser.add_argument("--predictions", type=Path, default=None, metavar="PREDICTIONS.CSV",
                        help="of a set of type csv: its metrics on all test images, and without those that have a copy "
                        "in another set")
    # fmt: on
    add_workers_argument(parser)
    parser.set_defaults(module="audit")


def add_demo(commands: Any) -> None:
    """The flags of `demo`."""
    parser = commands.add_parser(
        "demo",
        help="draw a small SYNTHETIC radiology world",
        description="Draws mammogram-like and other radiology-like phantoms with captions: --root/roco in the "
        "layout of ROCO v1, --root/cbis in that of CBIS-DDSM with its lesion tables. All of it is synthetic; "
        "results on it say nothing about patients.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--root", type=Path, required=True, help="folder to draw into; a finished one of equal settings is kept"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other patients")
    parser.add_argument("--pairs", type=int, default=6000, help="training pairs of the ROCO part")
    parser.add_argument("--size", type=int, default=64, help="pixels along the short side of an image")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw; the result is the same")
    parser.set_defaults(module="demo")
# fmt: on
