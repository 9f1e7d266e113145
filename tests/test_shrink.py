"""make_dataset.py shrink: trees with smaller images, interrupted and by several processes."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, wait_for
from PIL import Image
from source_tree import FILES, image_bytes

import make_dataset
from datasets import create_reader
from inputs.images import UnreadableImage, read_image
from preparation import processes, shards, shrink


@pytest.fixture
def tree(tmp_path) -> Path:
    root = tmp_path / "in"
    for name, data in FILES.items():
        path = root / "train" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (root / "train" / "captions.txt").write_text("R_1\t text\n")
    (root / "train" / "BIG.JPEG").write_bytes(image_bytes((200, 100), seed=9))
    (root / "broken.png").write_bytes(FILES["alpha.png"][:200])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.jpg").write_bytes(FILES["large.jpg"])
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    return root


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_tree_is_copied_with_its_images_shrunk(tree, tmp_path, capsys):
    output = tmp_path / "out"
    make_dataset.main(["shrink", "--root", str(tree), "--output", str(output), "--short-side", "60", "-j", "1"])
    copy = tree_bytes(output)
    shrunk = {
        "train/images/large.jpg",
        "train/images/grey.jpg",
        "train/images/alpha.png",
        "train/images/deep.png",
        "train/images/really_a_png.jpg",
        "train/BIG.JPEG",
        "linked/linked.jpg",
    }
    kept = {
        "train/images/small.jpg",
        "train/images/web.webp",
        "train/images/scan.tif",
        "train/captions.txt",
        "broken.png",
    }
    assert set(copy) == shrunk | kept | {"shrink.json", "bad_samples.txt"}
    for name in kept:
        assert copy[name] == (tree / name).read_bytes()
    for name in shrunk:
        before, after = Image.open(tree / name), Image.open(io.BytesIO(copy[name]))
        assert min(after.size) == 60 and after.format == before.format
    deep = read_image(tree / "train/images/deep.png").resize((87, 60), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(read_image(output / "train/images/deep.png")), np.asarray(deep))
    assert str(tree / "broken.png") in copy["bad_samples.txt"].decode()
    assert "7 shrunk, 4 copied, 1 unreadable" in capsys.readouterr().out


def test_a_shrunk_tree_is_continued_and_the_same_with_many_processes(tree, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    shrink.shrink_tree(tree, many, 60, workers=3)
    shrink.shrink_tree(tree, one, 60)
    drop = {"shrink.json": b"", "bad_samples.txt": b""}
    assert {**tree_bytes(one), **drop} == {**tree_bytes(many), **drop}
    (one / "train" / "images" / "large.jpg").unlink()
    (tree / "train" / "captions.txt").write_text("R_1\t other\n")
    assert shrink.shrink_tree(tree, one, 60) == {"shrunk": 1, "copied": 1, "there already": 10}
    assert (one / "train" / "captions.txt").read_text() == "R_1\t other\n"
    large = "train/images/large.jpg"
    assert (one / large).read_bytes() == (many / large).read_bytes()
    assert shrink.shrink_tree(one, tmp_path / "again", 30)["copied"] >= 1  # a copy of a copy has notes of its own
    assert json.loads((tmp_path / "again" / "shrink.json").read_text())["short_side"] == 30


def test_a_shrunk_copy_lies_elsewhere_and_has_one_size(tree, tmp_path):
    for output in (tree, tree / "small", tmp_path):
        with pytest.raises(ValueError, match="lie in each other"):
            shrink.shrink_tree(tree, output, 60)
    shrink.shrink_tree(tree, tmp_path / "out", 60)
    with pytest.raises(ValueError, match="begun with short_side 60, not 80"):
        shrink.shrink_tree(tree, tmp_path / "out", 80)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        shrink.shrink_tree(tmp_path / "nowhere", tmp_path / "out2", 60)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="not begun by this command"):
        shrink.shrink_tree(tree, tmp_path / "used", 60)
    (tmp_path / "killed").mkdir()  # before the settings of its first start were whole
    (tmp_path / "killed" / f".shrink.json.{'0' * 16}.tmp").write_text("{")
    assert shrink.shrink_tree(tree, tmp_path / "killed", 60) == shrink.shrink_tree(tree, tmp_path / "fresh", 60)


def test_shrinking_and_sharding_keep_the_contrast_of_twelve_bits(tmp_path):
    """A radiograph of 12 bits in a 16-bit colour file: its copies look as the file itself does in training."""
    pytest.importorskip("webdataset")
    from test_images import png_of_16_bits

    ramp = np.tile(np.linspace(0, 4095, 120).astype(np.uint16), (80, 1))[..., None].repeat(3, -1)
    root = tmp_path / "in"
    root.mkdir()
    (root / "deep.png").write_bytes(png_of_16_bits(ramp))
    (root / "train.csv").write_text("image,caption\ndeep.png,a ramp\n")
    make_dataset.main(
        ["shrink", "--root", str(root), "--output", str(tmp_path / "small"), "--short-side", "40", "-j", "1"]
    )
    reader = create_reader("csv", root)
    assert shards.make_shards(reader, tmp_path / "shards", shard_size=3, short_side=40) == 0
    expected = np.asarray(read_image(root / "deep.png").resize((60, 40), Image.Resampling.LANCZOS), dtype=int)
    for copy in (create_reader("csv", tmp_path / "small"), create_reader("webdataset", tmp_path / "shards")):
        got = np.asarray(copy.image(0), dtype=int)
        assert got.shape == (40, 60, 3) and got.max() > 250 and abs(got - expected).max() <= 2


def test_pipes_and_devices_among_the_images_are_left_out_and_not_waited_for(tree, tmp_path, caplog):
    os.mkfifo(tree / "train" / "images" / "pipe.jpg")
    counts = shrink.shrink_tree(tree, tmp_path / "out", 60, workers=2)
    assert counts["left out"] == 1 and counts["shrunk"] == 7
    assert "what was left out are pipes and devices" in caplog.text
    with pytest.raises(UnreadableImage, match="pipe.jpg: it is no regular file"):
        read_image(tree / "train" / "images" / "pipe.jpg")


def test_a_link_to_nothing_is_named_and_what_comes_after_it_is_copied(tree, tmp_path, caplog):
    """As git-annex and DVC leave what was not fetched."""
    for name in ("0_first.jpg", "0_first.txt"):
        (tree / "train" / "images" / name).symlink_to(tmp_path / "nowhere")
    counts = shrink.shrink_tree(tree, tmp_path / "out", 60, workers=1)
    assert counts["missing"] == 2 and counts["shrunk"] == 7 and "cannot be opened" in caplog.text
    bad = (tmp_path / "out" / "bad_samples.txt").read_text()
    assert all(f"{tree}/train/images/0_first.{kind}" in bad for kind in ("jpg", "txt"))


def many_images(folder: Path) -> list[str]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(300):
        Image.fromarray(rng.integers(0, 256, (300, 300), "uint8")).save(folder / f"{n}.png")
    return [sys.executable, "make_dataset.py", "shrink", "--root", str(folder), "--short-side", "60", "-j", "2"]


def of_group(group: int) -> list[int]:
    """Processes of a group that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = path.read_text().rsplit(")", 1)[1].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked for in /proc")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGKILL))]
)
def test_a_stopped_copy_leaves_no_processes_and_goes_on(tmp_path, number):
    """A Ctrl-C reaches the whole group, also in the middle of a fork; of another signal only the parent knows."""
    command = [*many_images(tmp_path / "in"), "--output", str(tmp_path / "out")]
    job = subprocess.Popen(command, cwd=ROOT, process_group=0, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list((tmp_path / "out").glob("*.png"))) > 5 or job.poll() is not None, 60, "images")
    assert job.poll() is None, job.stderr.read()
    os.killpg(job.pid, number) if number == signal.SIGINT else os.kill(job.pid, number)
    said = job.communicate(timeout=60)[1]
    assert job.returncode == (130 if number == signal.SIGINT else -number), said
    assert "Traceback" not in said
    wait_for(lambda: not of_group(job.pid), 30, "the end of the group")
    assert len(list((tmp_path / "out").glob("*.png"))) < 300
    subprocess.run(command, cwd=ROOT, check=True)
    shrink.shrink_tree(tmp_path / "in", tmp_path / "whole", 60)
    copy, whole = tree_bytes(tmp_path / "out"), tree_bytes(tmp_path / "whole")
    assert [name for name in whole if copy.get(name) != whole[name]] == [] and len(whole) == 301


def die_of_memory(shared: object, item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does where memory runs out
    return item


def test_a_process_of_the_pool_that_dies_is_one_line():
    with pytest.raises(RuntimeError, match="smaller -j"), processes.over_processes(2, None) as each:
        list(each(die_of_memory, range(100)))
