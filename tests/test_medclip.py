"""MedCLIP's towers against the outputs of MedCLIP itself (transformers 4.24), and its weight files."""

import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from model_helpers import tiny_medslip

import losses
import models
from towers import medclip
from towers.files import read_pretrained

GOLDEN = torch.load(Path(__file__).parent / "goldens" / "medclip.pt", weights_only=True)
KINDS = {"vit": "VIT", "resnet": "RESNET"}


def det_state(keys, std=0.04):
    """The goldens' weights, drawn from each key's name: [name, shape, dtype] to a state dictionary."""
    out = {}
    for name, shape, dtype in keys:
        if dtype == "torch.int64":
            out[name] = torch.zeros(shape, dtype=torch.long)
            continue
        value = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * std
        if name.endswith("running_var"):
            value = 1 + value.abs()
        elif value.ndim == 1 and name.endswith("weight"):
            value = 1 + value
        elif name.endswith("logit_scale"):
            value = torch.full_like(value, 2.6592)
        out[name] = value
    return out


@pytest.fixture(scope="module")
def states():
    return {kind: det_state(GOLDEN[kind]["keys"]) for kind in KINDS}


@pytest.fixture(scope="module")
def files(states, tmp_path_factory):
    """Each kind as the published folder `medclip-<kind>/pytorch_model.bin`."""
    root = tmp_path_factory.mktemp("weights")
    for kind, state in states.items():
        (root / f"medclip-{kind}").mkdir()
        torch.save(state, root / f"medclip-{kind}" / "pytorch_model.bin")
    return root


def relative(ours, golden):
    return ((ours - golden).abs().max() / golden.abs().max()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_equal_medclip(kind, files):
    loaded = models.load_pretrained(files / f"medclip-{kind}")
    model, golden = loaded.model, GOLDEN[kind]
    assert model.name == f"MEDCLIP_{KINDS[kind]}" and model.config["text_pooling"] == "medclip"
    ids, mask = GOLDEN["inputs"]["input_ids"], GOLDEN["inputs"]["attention_mask"]
    with torch.no_grad():
        image = model.encode_image(GOLDEN["inputs"]["gray"].expand(-1, 3, -1, -1))
        text = model.encode_text(ids, mask)
        no_mask = model.encode_text(ids, torch.ones_like(mask))
    assert relative(image, golden["vision_gray"]) < 1e-5
    assert relative(text, golden["text_raw"]) < 1e-5
    assert relative(torch.nn.functional.normalize(text, dim=-1), golden["encode_text"]) < 1e-5
    assert relative(torch.nn.functional.normalize(no_mask, dim=-1), golden["encode_text_nomask"]) < 1e-5
    assert model.logit_scale.exp().item() == pytest.approx(golden["logit_scale_exp"].item(), rel=1e-6)


def test_zip_bin_and_folder_are_the_same(files, tmp_path):
    folder = files / "medclip-resnet"
    archive = tmp_path / "medclip-resnet.zip"
    with zipfile.ZipFile(archive, "w") as z:
        z.write(folder / "pytorch_model.bin", "medclip-resnet/pytorch_model.bin")
    reference = read_pretrained(folder)
    for path in (archive, folder / "pytorch_model.bin"):
        state = read_pretrained(path)
        assert all(torch.equal(state[k], v) for k, v in reference.items()) and len(state) == len(reference)


@pytest.mark.parametrize("kind", KINDS)
def test_export_round_trip_restores_every_key(kind, states):
    model = models.create_model(f"MEDSLIP_{KINDS[kind]}", ssl_mlp_dim=8, ssl_emb_dim=4)
    medclip.load_medclip(model, states[kind])
    exported = medclip.export_medclip(model)
    assert {k: list(v.shape) for k, v in exported.items()} == {k: v for k, v, _ in GOLDEN[kind]["keys"]}
    for key, value in states[kind].items():
        if not medclip._UNUSED.search(key):
            assert torch.equal(exported[key], value), key
    again = models.create_model(f"MEDCLIP_{KINDS[kind]}")
    medclip.load_medclip(again, exported)
    assert torch.equal(again.text_projection, model.text_projection)


def test_exported_index_buffer_is_the_one_swin_uses():
    index = medclip._relative_position_index(7)
    assert index.shape == (49, 49) and index.min() == 0 and index.max() == 13 * 13 - 1
    tower = medclip.SwinTower(medclip.SwinConfig(embed_dim=12, depths=[1], num_heads=[3], window_size=7))
    own = [b for n, b in tower.named_buffers() if n.endswith("relative_position_index")]
    assert own and torch.equal(own[0].view(49, 49), index)


def test_wrong_and_partial_files_are_refused_by_name(states):
    model = models.create_model("MEDCLIP_VIT")
    with pytest.raises(ValueError, match=r"medclip-resnet.*MEDCLIP_VIT[\s\S]*missing[\s\S]*embeddings.norm"):
        medclip.load_medclip(model, states["resnet"], "medclip-resnet")
    before = model.bert.embeddings.word_embeddings.weight.clone()
    partial = {k: v for k, v in states["vit"].items() if "layer.7" not in k}
    with pytest.raises(ValueError, match=r"missing \(16\).*text_model.model.encoder.layer.7"):
        medclip.load_medclip(model, partial)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, before)  # nothing half-loaded
    with pytest.raises(ValueError, match=r"other shape \(1\).*logit_scale"):
        medclip.load_medclip(model, states["vit"] | {"logit_scale": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"unexpected \(1\).*surprise"):
        medclip.load_medclip(model, states["vit"] | {"surprise": torch.zeros(3)})


def test_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is an empty folder"):
        models.load_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("weights elsewhere")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin"):
        models.load_pretrained(tmp_path)


def test_masked_pooling_ignores_padding_and_medclip_pooling_does_not():
    short = torch.tensor([[2, 7, 8, 3]])
    padded = torch.tensor([[2, 7, 8, 3, 0, 0, 0]])
    masked = tiny_medslip().eval()
    with torch.no_grad():
        torch.testing.assert_close(masked.encode_text(short), masked.encode_text(padded), rtol=1e-4, atol=1e-5)
        exact = tiny_medslip(text_pooling="medclip").eval()
        assert exact.text.reads_padding and not masked.text.reads_padding
        assert (exact.encode_text(short) - exact.encode_text(padded)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="mean.*masked, medclip"):
        tiny_medslip(text_pooling="mean")


@pytest.mark.parametrize("name", ["MEDSLIP_VIT", "MEDSLIP_RESNET"])
def test_every_parameter_receives_a_gradient(name):
    model = (
        tiny_medslip()
        if name == "MEDSLIP_VIT"
        else models.create_model(
            name,
            image_size=64,
            text_width=32,
            text_heads=2,
            text_layers=3,
            vocab_size=50,
            ssl_mlp_dim=16,
            ssl_emb_dim=8,
        )
    )
    views = [torch.randn(4, 3, 64, 64) for _ in range(3)]
    tokens = torch.randint(1, 50, (4, 6))
    loss = model.objective.loss(losses.LossSettings())
    loss(model(views[0], tokens, *views[1:]))["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_no_decay_for_swin_bias_tables():
    import utils

    groups = {g["name"]: g["names"] for g in utils.parameter_groups(tiny_medslip(), 0.1)}
    tables = [n for n in groups["no decay"] if n.endswith("relative_position_bias_table")]
    assert len(tables) == 2 and not any("bias" in n.rsplit(".", 1)[-1] for n in groups["decay"])
