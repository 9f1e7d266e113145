"""Pickles, .npy files and JSON of others: plain values are read, everything else is refused by name."""

import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from inputs import metadata
from inputs.metadata import RefusedPickle, Table, iter_json, read_pickle, read_table


class Run:
    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_read_in_every_protocol(tmp_path, protocol):
    rows = [(1, "a", "ü"), (2**40, "", "b"), {"x": [1.5, None, True]}]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(rows, protocol))
    assert read_pickle(tmp_path / "a.pkl") == rows


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_the_published_npy_files_are_read(tmp_path, module):
    """Object arrays of dicts with numpy numbers inside, as numpy 1 and numpy 2 pickle them."""
    rows = [
        {"image_id": "a.jpg", "captions": ["x"], "n": np.int64(-7)},
        {"image_id": 5, "captions": ["ü", "y"]},
    ]
    np.save(tmp_path / "a.npy", np.array(rows, dtype=object))
    data = (tmp_path / "a.npy").read_bytes()
    old, new = (struct.pack("<B", len(name)) + name for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"))
    if module == "numpy.core" and old in data:
        data = data.replace(old, new)
    frame = data.find(b"\x95")  # the frame of protocol 4 states its length: written anew
    if frame > 0:
        data = data[: frame + 1] + struct.pack("<Q", len(data) - frame - 9) + data[frame + 9 :]
    (tmp_path / "a.npy").write_bytes(data.replace(b"numpy._core.multiarray", module.encode() + b".multiarray"))
    assert read_pickle(tmp_path / "a.npy") == rows


def test_arrays_of_numbers_and_strings_come_as_lists(tmp_path):
    for values in (np.arange(5), np.array([1.5, -2]), np.array(["a", "üb"]), np.array([True, False])):
        np.save(tmp_path / "a.npy", values)
        assert read_pickle(tmp_path / "a.npy") == values.tolist()
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"x": values, "n": values[0]}, protocol=4))
        assert read_pickle(tmp_path / "a.pkl") == {"x": values.tolist(), "n": values[0].item()}


@pytest.mark.parametrize(
    "hostile, named",
    [
        (Run(os.system, "touch ran"), r"(posix|nt)\.system"),
        (Run(eval, "__import__('os').system('touch ran')"), "builtins.eval"),
        (Run(print, "x"), "builtins.print"),
        (Path("x"), "pathlib"),
        (Run(np.load, "x"), "numpy"),
        ({1, 2}, "builtins.set"),
    ],
)
def test_pickles_that_ask_for_more_are_refused_by_name(tmp_path, monkeypatch, hostile, named):
    data = pickle.dumps([hostile], protocol=3)
    (tmp_path / "bad.pkl").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RefusedPickle, match=f"bad.pkl asks for {named}"):
        read_pickle(tmp_path / "bad.pkl")
    with open(tmp_path / "bad.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (1,)})
        file.write(data)
    with pytest.raises(RefusedPickle, match=f"bad.npy asks for {named}"):
        read_pickle(tmp_path / "bad.npy")
    assert not (tmp_path / "ran").exists()


def test_an_array_cannot_take_addresses_from_the_file(tmp_path):
    """ndarray((1,), 'O', buffer) takes pointers from the buffer: numpy's own class would follow them."""
    attack = b"\x80\x02]cnumpy\nndarray\n(K\x01\x85X\x01\x00\x00\x00OU\x08AAAAAAAAtRa."
    (tmp_path / "a.pkl").write_bytes(attack)
    assert read_pickle(tmp_path / "a.pkl") == [[]]
    state = b"(K\x01K\x01\x85cnumpy\ndtype\n(X\x01\x00\x00\x00OtR\x89U\x08AAAAAAAAtb"
    rebuild = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    (tmp_path / "b.pkl").write_bytes(rebuild + state + b".")
    with pytest.raises(RefusedPickle, match="b.pkl.*'O'"):
        read_pickle(tmp_path / "b.pkl")


@pytest.mark.parametrize("data", [b"", b"\x80\x04", b"no pickle", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x05\x00{}   "])
def test_damaged_pickles_are_named(tmp_path, data):
    (tmp_path / "bad.pkl").write_bytes(data)
    with pytest.raises(ValueError, match="bad.pkl"):
        read_pickle(tmp_path / "bad.pkl")


VALUES = [{"a": [1, {"b": ']},[{\\"'}]}, -12.5e3, 123456789, "ü\ud83d", None, True, [], {}, "x" * 50]


@pytest.mark.parametrize("piece", [1, 3, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_lists_are_read_piece_by_piece(tmp_path, monkeypatch, piece, indent):
    monkeypatch.setattr(metadata._JsonStream, "PIECE", piece)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(VALUES, indent=indent) + "\n")
    assert list(iter_json(path)) == VALUES
    path.write_text(json.dumps({"info": {"annotations": 1}, "n": 12, "annotations": VALUES, "z": 3}, indent=indent))
    assert list(iter_json(path, "annotations")) == VALUES
    path.write_text("[]")
    assert list(iter_json(path)) == []


@pytest.mark.parametrize("text", ["", "[1, 2", "[1 2]", '{"a": [1]}', '{"annotations": 3}', "7", '[{"a": }]', "[1,]"])
def test_damaged_json_is_named(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match="bad.json near character"):
        list(iter_json(tmp_path / "bad.json", "annotations"))


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    """Two tables that were joined in a spreadsheet."""
    (tmp_path / "a.csv").write_text("image,Label,split, label\na.png,benign,train,malignant\n")
    with pytest.raises(ValueError, match="a.csv has the column 'label' more than once"):
        Table(tmp_path / "a.csv").column("caption", "label")
    with pytest.raises(ValueError, match="a.csv has the column 'label' more than once"):
        read_table(tmp_path / "a.csv", ["image"])
    assert Table(tmp_path / "a.csv").column("image") == 0
    (tmp_path / "b.csv").write_text("image,,label,\na.png,1,benign,2\n")  # columns without a name are nobody's
    assert Table(tmp_path / "b.csv").column("label") == 2


BODY = "image{0}caption\n0.png{0}a mass\n1.png{0}none seen\n"


@pytest.mark.parametrize("text", [
    'image,"Note\n(free, or; not)",caption\n0.png,n,a mass\n1.png,"n\nm",none seen\n',
    'image;"a, b, c, d";caption\r\n0.png;x;a mass\r\n1.png;y;none seen\r\n',
    "sep=;\n" + BODY.format(";"), '"sep=\t"\r\n' + BODY.format("\t"), "\ufeffsep=,\n" + BODY.format(","),
    BODY.format(",") + "   \n,\n\n", BODY.format(","), "Image\tCaption\n" + BODY.format("\t").partition("\n")[2],
    f"image,caption,rle\n0.png,a mass,{'1 ' * 100_000}\n1.png,none seen,\n",
])  # fmt: skip
def test_tables_as_spreadsheets_write_them(tmp_path, text):
    (tmp_path / "a.csv").write_bytes(text.encode())
    table = Table(tmp_path / "a.csv")
    image, caption = table.column("image"), table.column("caption")
    wanted = [("0.png", "a mass"), ("1.png", "none seen")]
    assert [(fields[image], fields[caption]) for _, fields in table] == wanted
    assert [(row["image"], row["caption"]) for row in read_table(tmp_path / "a.csv", ["image", "caption"])] == wanted
    last = 1 + text[: text.rindex("1.png")].count("\n") + ("n\nm" in text)
    assert [where for where, _ in table][-1].endswith(f"a.csv line {last}")


def test_a_columns_name_is_found_with_blanks_and_dots(tmp_path):
    (tmp_path / "a.csv").write_text('"Image\nPath",Report.Text,file-name\n0.png,x,y\n')
    table = Table(tmp_path / "a.csv")
    assert [table.column(name) for name in ("image_path", "report_text", "file_name")] == [0, 1, 2]
    (tmp_path / "b.csv").write_text("Image Path,image-path\n0.png,1.png\n")
    with pytest.raises(ValueError, match="b.csv has the column 'image_path' more than once"):
        Table(tmp_path / "b.csv").column("image_path")
