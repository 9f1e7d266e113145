"""The audit on drawn textures, whose copies and whose strangers are known."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distributed
import make_dataset
from evaluation.predictions import Predictions, Scheme, set_scheme
from preparation import audit


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Two folders: forty textures alike in coarse brightness, as radiographs are; copies of ten and ten strangers."""
    root, rng = tmp_path_factory.mktemp("films"), np.random.default_rng(0)
    body = Image.fromarray(rng.integers(0, 256, (5, 5), dtype=np.uint8))
    paths = []
    for name in ("all", "train", "test"):
        (root / name).mkdir()
    for i in range(50):
        size = (int(rng.integers(100, 180)), int(rng.integers(100, 180)))
        organs = Image.fromarray(rng.integers(0, 256, (24, 24), dtype=np.uint8))
        paths.append(root / "all" / f"{i}.png")
        Image.blend(body.resize(size, 3), organs.resize(size, 3), 0.5).save(paths[-1])
    for i, path in enumerate(paths[:40]):
        Image.open(path).save(root / "train" / f"{i:02d}.png")
    for i, path in enumerate(paths[:10]):
        img = Image.open(path).convert("L")
        w, h = img.size
        img = [img.resize((w * 2, h * 2)), img.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
               img.crop((w // 16, 0, w // 16 + round(0.9 * w), round(0.9 * h)))][i % 3]  # fmt: skip
        img.save(root / "test" / f"copy{i}.jpg", quality=60)
    for i, path in enumerate(paths[40:]):
        Image.open(path).save(root / "test" / f"own{i}.png")
    (root / "test" / "torn.jpg").write_bytes(b"\xff\xd8 nothing")
    return root


def sets(films):
    return [f"train={films / 'train'}", f"test={films / 'test'}"]


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("few", [audit.FEW, 0], ids=["all pairs", "nearest by hash"])
def test_planted_copies_are_found_between_sets_and_strangers_are_not(films, tmp_path, caplog, monkeypatch, few):
    monkeypatch.setattr(audit, "FEW", few)
    out = tmp_path / "d.csv"
    with caplog.at_level("INFO", logger="medslip"):
        make_dataset.main(
            ["audit", f"train={films / 'train'}", f"test={films / 'test'}", "--output", str(out), "-j", "1"]
        )
    pairs = rows(out)
    found = {(row["image"][-6:-4], row["other_image"].rsplit("/", 1)[1]) for row in pairs}
    assert {(f"{i:02d}", f"copy{i}.jpg") for i in range(10)} <= found
    assert not [name for _, name in found if name.startswith("own")]
    mirrored = {row["other_image"].rsplit("/", 1)[1] for row in pairs if row["mirrored"] == "1"}
    assert {"copy1.jpg", "copy4.jpg", "copy7.jpg"} <= mirrored
    assert [float(row["correlation"]) for row in pairs] == sorted(
        (float(r["correlation"]) for r in pairs), reverse=True
    )
    assert "torn.jpg" in caplog.text and "test: 21 images, 10 of them in a pair" in caplog.text


def test_one_set_is_compared_with_itself_and_no_image_with_itself(films, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    for name in ("00.png", "03.png", "07.png"):
        Image.open(films / "train" / name).save(both / name)
        Image.open(films / "train" / name).save(both / f"again_{name}")
    make_dataset.main(["audit", f"all={both}", "--output", str(tmp_path / "d.csv"), "-j", "1"])
    pairs = {
        frozenset((r["image"].rsplit("/", 1)[1], r["other_image"].rsplit("/", 1)[1])) for r in rows(tmp_path / "d.csv")
    }
    assert pairs == {frozenset((name, f"again_{name}")) for name in ("00.png", "03.png", "07.png")}


@pytest.fixture(params=["torch", "oneDNN"])
def library(request, monkeypatch):
    """Which multiplies, whatever the machine, three images at a time: true for oneDNN, and how many it was given."""
    if request.param == "oneDNN" and not distributed.onednn_is_there():
        pytest.skip("a torch without oneDNN")
    given, multiply = [], distributed.onednn_linear
    monkeypatch.setattr(audit, "TOGETHER", 3)
    monkeypatch.setattr(audit, "onednn_pays", lambda: request.param == "oneDNN")
    monkeypatch.setattr(audit, "onednn_linear", lambda x, y: given.append(len(x)) or multiply(x, y))
    return request.param == "oneDNN", given


@pytest.mark.parametrize("n", [3, 5])
def test_products_on_either_side_are_those_of_float64(library, n):
    g, (by_onednn, given) = torch.Generator().manual_seed(0), library
    x, rows, columns = (torch.randn(shape, generator=g) for shape in ((n, 48, 40), (30, 48), (21, 40)))
    for found, exact in (
        (audit.beneath(rows, x), rows.double() @ x.double()),
        (audit.times(x, columns), x.double() @ columns.double().T),
    ):
        assert found.is_contiguous() and (found - exact).norm() < 1e-6 * exact.norm()
    assert given == (2 * [3] if by_onednn and n == 3 else [])


def test_an_audit_asks_onednn_for_one_number_of_images(library):
    by_onednn, given = library
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(7, 48, 48, generator=g), torch.rand(5, 48, 48, generator=g)
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(5))
    value, box = audit.best_overlap(a, b, pairs)
    assert set(given) == ({3} if by_onednn else set())
    alone = [audit.best_overlap(a[i : i + 1], b[j : j + 1], torch.zeros(1, 2, dtype=torch.long)) for i, j in pairs]
    torch.testing.assert_close(value, torch.cat([found for found, _ in alone]), rtol=0, atol=1e-5)


def test_the_overlap_is_numpys_correlation(library):
    """Without crop or shift the best correlation is at least Pearson's of the two, and 1 for a crop of the other."""
    g = torch.Generator().manual_seed(0)
    a = torch.nn.functional.interpolate(torch.rand(3, 1, 20, 20, generator=g), (48, 48), mode="bicubic")[:, 0] * 200
    b = a + 20 * torch.rand(a.shape, generator=g)
    own = torch.arange(3)[:, None].expand(3, 2)
    value, box = audit.best_overlap(a, b, own)
    for i in range(3):
        expected = np.corrcoef(audit.detail(a)[i].flatten(), audit.detail(b)[i].flatten())[0, 1]
        assert value[i] >= expected - 1e-3
    crop = torch.nn.functional.interpolate(a[:, None, 2:45, 1:44], (48, 48), mode="bilinear")[:, 0]
    value, box = audit.best_overlap(a, crop, own)
    refined, _ = audit.refined(a, crop, box, (0.5, 0.25))
    assert (refined > 0.97).all() and (refined >= value - 0.05).all()
    stranger = torch.nn.functional.interpolate(torch.rand(3, 1, 20, 20, generator=g), (48, 48), mode="bicubic")[:, 0]
    assert (audit.best_overlap(a, 200 * stranger, own)[0] < 0.5).all()


def outlines(folder, n=12, grain=40):
    """Films of one outline in the dark, as mammograms are, with a texture of their own inside it."""
    rng, (y, x) = np.random.default_rng(1), np.mgrid[:200, :200]
    inside = (x / 130) ** 2 + ((y - 100) / 90) ** 2 < 1
    for i in range(n):
        texture = Image.fromarray(rng.integers(150, 200, (grain, grain), dtype=np.uint8)).resize((200, 200), 3)
        Image.fromarray(np.where(inside, np.asarray(texture), 5).astype(np.uint8)).save(folder / f"{i:02d}.png")
    return [folder / f"{i:02d}.png" for i in range(n)]


def test_a_shared_outline_makes_no_copies_and_a_crop_by_a_sixth_is_one(tmp_path):
    paths = outlines(tmp_path)
    assert audit.audit({"films": paths})[0] == []
    film = Image.open(paths[0])
    film.crop((0, 15, 167, 182)).save(tmp_path / "crop.png")
    (pair,) = audit.audit({"films": paths, "other": [tmp_path / "crop.png"]})[0]
    assert pair.first == paths[0] and not pair.mirrored


@pytest.mark.parametrize("copies", [2, 10])
def test_a_set_of_one_image_only_is_all_pairs(tmp_path, copies):
    """Of which the principal components know nothing but that image."""
    rng = np.random.default_rng(2)
    film = Image.fromarray(rng.integers(0, 256, (30, 30), dtype=np.uint8)).resize((150, 150), 3)
    for i in range(copies):
        film.resize((120 + 5 * i, 130)).save(tmp_path / f"{i}.jpg", quality=70 + i)
    pairs, _ = audit.audit({"films": sorted(tmp_path.glob("*.jpg"))})
    assert len({path for pair in pairs for path in (pair.first, pair.second)}) == copies


def test_the_nearest_by_hash_have_every_copy_among_them_and_few_others(tmp_path, monkeypatch):
    """Outlines that all look alike, copies cropped at a random place or mirrored: within the set and between two."""
    monkeypatch.setattr(audit, "FEW", 0)
    rng, originals = np.random.default_rng(4), [Image.open(path) for path in outlines(tmp_path, 80, grain=10)]
    copies = []
    for i, film in enumerate(originals[:40]):
        x, y = rng.integers(0, 21, 2)
        copies.append(film.transpose(0) if i % 2 else film.crop((x, y, x + 180, y + 180)))

    def small(films):
        size = (audit.SIDE, audit.SIDE)
        return torch.from_numpy(np.stack([np.asarray(f.resize(size, Image.Resampling.BOX)) for f in films]))

    a, b = small(originals), small(copies)
    found = audit.candidates(a, b, same=False, block=32)
    assert {(i, i, i % 2) for i in range(40)} <= set(map(tuple, found.tolist()))
    assert len(found) <= 2 * audit.KEPT * (80 + 40)
    found = audit.candidates(torch.cat([a, b]), torch.cat([a, b]), same=True, block=32)
    assert {(i, 80 + i, i % 2) for i in range(40)} <= set(map(tuple, found.tolist()))
    assert all(i < j for i, j, _ in found.tolist())


@pytest.mark.parametrize("size, to", [(48, 48), (48, 46), (48, 43), (48, 41), (13, 5)])
def test_shrinking_is_the_area_mode_of_pytorch(size, to):
    x = torch.rand(2, size, size) * 255
    expected = torch.nn.functional.interpolate(x[:, None], (to, size), mode="area")[:, 0]
    assert torch.allclose(audit.shrinking(size, to) @ x, expected, atol=1e-4)


def test_the_average_is_torchs():
    x = torch.from_numpy(np.random.default_rng(3).random((2, 40, 33), dtype=np.float32))
    padded = torch.nn.functional.pad(x[:, None], (6,) * 4, mode="reflect")
    expected = torch.nn.functional.avg_pool2d(padded, 13, 1)[:, 0]
    found = audit.averaging(40, 13) @ x @ audit.averaging(33, 13).T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    sums = audit.WindowSums(x).of(7, 5)
    assert sums.shape == (2, 34, 29)
    torch.testing.assert_close(sums[:, 3, 4], x[:, 3:10, 4:9].sum((1, 2)), rtol=1e-4, atol=1e-4)


def test_a_pairs_correlation_hangs_on_no_other_pair():
    """What is computed once for each image, and in batches of any size, is what each pair gives by itself."""
    g = torch.Generator().manual_seed(5)
    images = torch.nn.functional.interpolate(torch.rand(6, 1, 24, 24, generator=g), (96, 96), mode="bicubic")[:, 0]
    images = (images.clamp(0, 1) * 255).round()
    images[4], images[5] = images[0].roll(2, 1), images[1].flip(-1)  # copies, so that the fine steps are gone through
    images = images.to(torch.uint8)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6), torch.arange(2))
    alone = torch.cat([audit.correlations(images, images, pair[None]) for pair in pairs])
    assert (alone > 0.9).sum() > 8 and (alone == -1).sum() > 8
    for batch in (7, 8192):
        torch.testing.assert_close(audit.correlations(images, images, pairs, batch), alone, rtol=0, atol=1e-5)


def test_metrics_are_given_with_and_without_copies(films, tmp_path, caplog):
    lines = ["image,group,label,predicted,prob_a,prob_b"]
    for i in range(10):
        right = i % 2 == 0  # all of the copies are right, of the others half
        lines.append(f"copy{i}.jpg,{i},{'ab'[i % 2]},{'ab'[i % 2]},{1 - i % 2},{i % 2}")
        lines.append(f"own{i}.png,{i}o,{'ab'[i % 2]},a,{0.5 + 0.1 * right},{0.5 - 0.1 * right}")
    (tmp_path / "predictions.csv").write_text("\n".join(lines) + "\n")
    with caplog.at_level("INFO", logger="medslip"):
        where = ["--output", str(tmp_path / "d.csv"), "--predictions", str(tmp_path / "predictions.csv"), "-j", "1"]
        make_dataset.main(["audit", *sets(films), *where])
    text = caplog.text[caplog.text.index("all: ") :]
    both = dict(line.split(": ", 1) for line in text.splitlines() if line.startswith(("all", "without")))
    assert json.loads(both["all"])["images"] == 20 and json.loads(both["without copies"])["images"] == 10
    assert json.loads(both["all"])["recall"] > json.loads(both["without copies"])["recall"]


def test_pairs_and_predictions_are_told_apart_from_formulas(tmp_path):
    first, second = Path("=a.png"), Path("-b.png")
    pair = audit.Pair(("=set", "@set"), first, second, -0.25, False)
    audit.write_pairs(tmp_path / "pairs.csv", [pair])
    with open(tmp_path / "pairs.csv", newline="") as file:
        _, cells = csv.reader(file)
    assert cells == ["'=set", "'=a.png", "'@set", "'-b.png", "-0.2500", "0", ""]
    rows = [{"image": name, "group": name, "label": label} for name, label in (("=a.png", "=x"), ("c.png", "y"))]
    scheme = Scheme(("=x", "y"), "image", "label", "group", ("image", "group", "label"))
    Predictions(rows, np.array([[0.9, 0.1], [0.2, 0.8]]), scheme).write(tmp_path / "predictions.csv")
    tested, files = audit.predicted_files(tmp_path / "predictions.csv", {"=set": [first, Path("c.png")]})
    lines = audit.without_copies(tested, files, [pair]).splitlines()
    assert [json.loads(line.partition(": ")[2])["images"] for line in lines] == [2, 1]
    assert audit.list_images(tmp_path / "predictions.csv") == [tmp_path / "=a.png", tmp_path / "c.png"]


def test_predictions_meet_their_files_by_whole_parts_of_a_path(tmp_path):
    """1.png is neither 11.png nor another set's 1.png; classes have any name."""
    classes = ("not seen", "A, b", "a")
    rows = [{"image": f"x/{i}.png", "group": str(i), "label": classes[i % 3]} for i in (1, 11, 21)]
    Predictions(rows, np.eye(3), set_scheme(classes)).write(tmp_path / "p.csv")
    test = [Path(f"/d/test/x/{i}.png") for i in (1, 11, 21)]
    train = [Path(f"/d/train/x/{i}.png") for i in (1, 11, 21, 31)]
    sets = {"train": train, "test": test}
    tested, files = audit.predicted_files(tmp_path / "p.csv", sets)
    assert files == test and tested.scheme.classes == classes
    pair = audit.Pair(("train", "test"), train[0], test[1], 1.0, False)  # train's own x/1.png, a copy of x/11.png
    assert json.loads(audit.without_copies(tested, files, [pair]).split("without copies: ")[1])["images"] == 2
    with pytest.raises(ValueError, match="one set must hold all of its 3 images.*a lacks 0, b lacks 0"):
        audit.predicted_files(tmp_path / "p.csv", {"a": train, "b": test})
    with pytest.raises(ValueError, match="one set must hold all of its 3 images.*a lacks 3"):
        audit.predicted_files(tmp_path / "p.csv", {"a": [Path(f"/d/x1/{i}.png") for i in (1, 11, 21)]})
    with pytest.raises(ValueError, match="may be /d/test/x/1.png or /e/x/1.png"):
        audit.predicted_files(tmp_path / "p.csv", {"a": [*test, Path("/e/x/1.png")]})


def test_bad_sets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="NAME=PATH"):
        make_dataset.main(["audit", "train"])
    with pytest.raises(FileNotFoundError, match="neither a folder nor a table"):
        make_dataset.main(["audit", f"a={tmp_path / 'nowhere'}"])
    with pytest.raises(FileNotFoundError, match="holds no images"):
        make_dataset.main(["audit", f"a={tmp_path}"])
    (tmp_path / "t.csv").write_text("image\n../up.jpg\n")
    with pytest.raises(ValueError, match=r"row 1.*\.\./up\.jpg"):
        make_dataset.main(["audit", f"a={tmp_path / 't.csv'}"])
