"""Low-rank adapters in towers: merged as peft merges them, continued bit for bit, read by all without peft."""

import subprocess
import sys

import pytest
import torch
import twins
from distributed_helpers import run_ranks
from helpers import DROPOUT, ROOT, assert_same_run, command, environment, slow, stop_after, weights
from model_helpers import batches, gradients, tiny_medslip, tiny_model, write_checkpoint
from roco_tree import make_roco
from torch import nn
from torch.nn.utils import parametrize

import main
import models
import utils
from beit_finetuning import networks, run_class_finetuning
from beit_finetuning.modeling_finetune import Beit
from runtime import checkpoints
from towers import lora

peft = pytest.importorskip("peft")
CAPTION = torch.tensor([[1, 2, 3, 4], [1, 9, 8, 5]])


def simclr(tower, **settings):
    around = dict(ssl_mlp_dim=8, ssl_emb_dim=8, vision_kwargs=settings)
    return models.create_model("SIMCLR_VITT16", vision_tower=tower, **around)


def library_pair(maker):
    return lambda folder: models.load_pretrained(maker(folder / "twin")).model


# Each with a layer that peft must adapt, one whose weight is read past it, and one that looks like them and has none.
MODELS = {
    "timm's ViT, CLIP's text": (
        lambda _: tiny_model("SLIP"), "transformer.resblocks.0.mlp.c_fc", "transformer.resblocks.1.attn.in_proj_weight",
        "visual.patch_embed"),
    "Swin, BERT": (lambda _: tiny_medslip(), "bert.encoder.layer.2.attention.self.query", "", "text_projection"),
    "CLIP of transformers": (
        library_pair(twins.clip), "visual.model.encoder.layers.1.self_attn.q_proj", "", "image_projection"),
    "SigLIP of transformers": (  # whose image side ends in an attention of torch's
        library_pair(twins.siglip), "visual.model.encoder.layers.1.self_attn.q_proj",
        "visual.model.head.attention.in_proj_weight", "image_projection"),
    "open_clip": (
        library_pair(twins.open_clip_pair), "text_tower.model.transformer.resblocks.1.mlp.c_proj",
        "visual.model.transformer.resblocks.0.attn.out_proj.weight", "visual.model.conv1"),
    "open_clip's text": (
        library_pair(twins.open_clip_pair), "text_tower.model.transformer.resblocks.1.mlp.c_proj",
        "text_tower.model.transformer.resblocks.1.attn.in_proj_weight", "text_tower.model.token_embedding"),
    "timm's BEiT": (
        lambda _: simclr("beit_base_patch16_224", depth=2, embed_dim=32, num_heads=2), "visual.blocks.1.attn.proj",
        "visual.blocks.1.attn.qkv.weight", "visual.patch_embed"),
    "ResNet-50": (
        lambda _: simclr("medclip-resnet50"), "visual.layer1.0.conv1", "", "visual.layer1.0.conv2"),  # 1x1 and 3x3
}  # fmt: skip


def answers(model):
    """Embeddings of both sides, in eval mode."""
    model.eval()
    images = torch.rand(2, 3, *model.preprocess.shape, generator=torch.Generator().manual_seed(0))
    found = [model.encode_image(images)]
    if model.objective.text:
        found.append(model.encode_text(CAPTION.repeat(1, 99)[:, : model.text.context_length]))
    return found


def learnt(model):
    """As after some training: B is no longer zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("lora_B.default.weight"):
                value.normal_(std=0.1, generator=generator)
    return model


@pytest.mark.parametrize("kind", list(MODELS))
def test_every_adapter_learns_and_merged_weights_answer_the_same(kind, tmp_path):
    make, adapted, read, passed_over = MODELS[kind]
    torch.manual_seed(0)
    model = make(tmp_path)
    names, before = list(model.state_dict()), answers(model)
    beside = {n for n, _ in model.named_parameters() if n.split(".")[0] not in sum(model.parts.values(), ())}
    said = lora.adapt_model(model, 3)
    for ours, theirs in zip(answers(model), before, strict=True):  # nothing has changed yet
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert adapted in layers and not any(name.startswith(passed_over) for name in layers)
    sums = {
        f"{name}.{own}": (module, own)
        for name, module in model.named_modules() if parametrize.is_parametrized(module)
        for own in module.parametrizations
    }  # fmt: skip
    assert set(sums) >= {read} - {""} and bool(sums) == bool(read)
    assert f"in {len(layers) + len(sums)} adapted layers" in said and adapted.rpartition(".")[2] in said
    learns = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {n for n in learns if ".lora_" not in n and ".projection" not in n} >= beside - {"logit_bias"}

    found = answers(learnt(model))
    sum(value.square().sum() for value in found).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".lora_" in n)
    raw = {name: value.clone() for name, value in model.state_dict().items()}
    state = lora.stored(raw)
    assert sorted(state["state_dict"]) == sorted(names)
    again = lora.restored(state)
    assert again.keys() == raw.keys() and all(torch.equal(again[name], raw[name]) for name in raw)
    for name, layer in layers.items():  # by peft itself
        layer.merge()
        theirs = layer.base_layer.weight
        torch.testing.assert_close(state["state_dict"][f"{name}.weight"], theirs, rtol=1e-5, atol=1e-6)
    for name, (module, own) in sums.items():  # by torch
        assert (module.parametrizations[own].original - state["state_dict"][name]).abs().max() > 1e-3
        parametrize.remove_parametrizations(module, own)
        torch.testing.assert_close(state["state_dict"][name], getattr(module, own), rtol=1e-5, atol=1e-6)
    plain = models.rebuilt(model, seed=9)
    plain.load_state_dict(state["state_dict"])
    for ours, theirs, start in zip(answers(plain), found, before, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max() and (theirs - start).abs().max() > 1e-3


def test_a_model_without_adapters_is_stored_as_it_is():
    held = tiny_model("CLIP").state_dict()
    assert lora.stored(held) == {"state_dict": held} and lora.restored({"state_dict": held}) == held


def test_what_cannot_be_adapted_is_refused(monkeypatch):
    model = nn.Sequential()
    model.tower = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, groups=8))
    tower = lora.Tower("this tower", ["tower"], lambda: model.tower(torch.rand(1, 3, 8, 8)))
    with pytest.raises(ValueError, match="this tower has none of its own"):
        lora.adapt(model, [tower], 2)
    frozen = tiny_model("SIMCLR")
    frozen.freeze("image")
    with pytest.raises(ValueError, match="--freeze leaves none"):
        lora.adapt_model(frozen, 2)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="^--lora needs peft: pip install peft$"):
        lora.adapt_model(tiny_model("CLIP"), 2)


@pytest.mark.parametrize("make", [lambda: tiny_model("SLIP"), *slow(tiny_medslip)], ids=["vit", "medslip"])
def test_gradient_checkpointing_and_compilation_change_nothing(make):
    """The first layers are fixed, so a block's input has no gradient, at which some ways of checkpointing give up."""
    torch.manual_seed(0)
    model = make()
    lora.adapt_model(model, 3)
    learnt(model)
    inputs = batches(model, 4, size=model.config["image_size"])
    inputs = [x.float() if x.is_floating_point() else x for x in inputs]
    state, results = {name: value.clone() for name, value in model.state_dict().items()}, []

    def compiled():
        utils.compile_towers(model, backend="aot_eager")

    for change in (lambda: None, model.checkpoint_gradients, compiled):
        change()
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(3)  # the same dropout
        found = gradients(model, [inputs], main.accumulate_micro)[1]
        results.append({name: value.clone() for name, value in found.items() if value is not None})
    for found in results[1:]:
        assert found.keys() == results[0].keys()
        for name, value in found.items():
            torch.testing.assert_close(value, results[0][name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("held", [False, True])
def test_statistics_of_batchnorm_are_held_where_they_are_asked_to_be(held):
    model = simclr("test_resnet")
    if held:
        model.hold_batchnorm()
    lora.adapt_model(model, 2)
    before = lora.stored({name: value.clone() for name, value in model.state_dict().items()})["state_dict"]
    model.train()(*(torch.rand(4, 3, 32, 32) for _ in range(2)))
    after = lora.stored(model.state_dict())["state_dict"]
    statistics = [name for name in before if name.startswith("visual.") and "running_" in name]
    assert statistics and all(torch.equal(before[name], after[name]) for name in statistics) == held


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roco(tmp_path_factory):
    return make_roco(tmp_path_factory.mktemp("roco"))


@pytest.fixture(scope="module")
def start(roco):
    """Weights to adapt."""
    main.main(command(roco, roco / "start", "--epochs", "1"))
    return roco / "start" / "checkpoint.pt"


def flags(start):
    return [*DROPOUT, "--init", str(start), "--lora", "3", "--warmup-epochs", "0"]


@pytest.fixture(scope="module")
def whole(roco, start):
    main.main(command(roco, roco / "whole", *flags(start)))
    return roco / "whole"


def test_a_continued_run_is_the_unbroken_one_bit_for_bit(roco, start, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(main, "finish_epoch", stop_after(main.finish_epoch))
        with pytest.raises(KeyboardInterrupt):
            main.main(command(roco, tmp_path, *flags(start)))
    main.main(command(roco, tmp_path, *flags(start)))
    assert_same_run(whole, tmp_path)
    ours, theirs = (checkpoints.load_checkpoint(run / "checkpoint.pt") for run in (tmp_path, whole))
    assert ours["adapters"].keys() == theirs["adapters"].keys()
    assert all(torch.equal(value, theirs["adapters"][name]) for name, value in ours["adapters"].items())
    with pytest.raises(ValueError, match="lora: 3 there, 4 now"):
        main.main(command(roco, tmp_path, *flags(start), "--lora", "4"))
    other = command(roco, tmp_path / "resumed", *DROPOUT, "--resume", str(whole / "checkpoint.pt"), "--lora", "3")
    main.main([*other, "--warmup-epochs", "0"])  # finished: nothing is left to do, and nothing is refused


def test_only_linear_layers_of_towers_and_what_is_beside_them_move(start, whole):
    before, after = weights(start.parent), weights(whole)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    inside = {name for name in moved if name.startswith(("visual.", "transformer.", "token_", "ln_final"))}
    layers = {name.removesuffix(".weight").rpartition(".")[2] for name in inside}
    assert layers == {"qkv", "proj", "fc1", "fc2", "out_proj", "c_fc", "c_proj", "in_proj_weight"}
    assert all(name.endswith("weight") for name in inside) and "visual.patch_embed.proj.weight" not in moved
    assert {"image_projection", "text_projection", "logit_scale", "image_mlp.layer1.weight"} <= moved


def test_a_frozen_tower_gets_no_adapters(roco, start, tmp_path):
    main.main(command(roco, tmp_path, *flags(start), "--freeze", "image", "--epochs", "1"))
    before, after = weights(start.parent), weights(tmp_path)
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert "transformer" in moved and "visual" not in moved
    assert not any("visual" in name for name in checkpoints.load_checkpoint(tmp_path / "checkpoint.pt")["adapters"])


def test_every_reader_takes_the_checkpoint_without_peft(whole, tmp_path):
    """In a process where peft cannot be imported: --evaluate's loader, --init, the export and a fine-tuning's start."""
    code = f"""
import sys
sys.modules["peft"] = None
import torch, export, models
from beit_finetuning.weights import read_tower
path = {str(whole / "checkpoint.pt")!r}
state = torch.load(path, weights_only=True)["state_dict"]
export.main([path, "--to", "safetensors", "--output", {str(tmp_path / "out")!r}])
for loaded in (models.load_pretrained(path).model, models.load_pretrained({str(tmp_path / "out")!r}).model):
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
models.initialise(loaded, path)
tower = read_tower(path, "state_dict", "visual.")
assert all(torch.equal(value, state["visual." + name]) for name, value in tower.items())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_medclips_export_of_an_adapted_model_is_that_of_its_merged_weights():
    from towers import medclip

    model = tiny_medslip()
    lora.adapt_model(model, 2)
    plain = lora.stored(learnt(model).state_dict())["state_dict"]
    merged = tiny_medslip()
    merged.load_state_dict(plain)
    ours, theirs = medclip.export_medclip(model, plain), medclip.export_medclip(merged)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _train(rank, world, argv):
    main.main(argv)


@pytest.mark.parametrize("extra", [[], ["--shard"]], ids=["replicated", "sharded"])
def test_two_processes_equal_one(roco, start, tmp_path, extra):
    same = ["--init", str(start), "--lora", "3", "--eps", "1e-2", "--epochs", "1"]
    main.main(command(roco, tmp_path / "one", *same))
    run_ranks(_train, 2, command(roco, tmp_path / "two", "--batch-size", "4", *same, *extra))
    one, two = (checkpoints.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    for part in ("state_dict", "adapters"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-4, atol=1e-5)


def test_random_weights_are_warned_of(roco, tmp_path, caplog):
    main.main(command(roco, tmp_path, "--lora", "2", "--epochs", "1"))
    assert "--lora holds the image and the text tower at random weights" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning
# ---------------------------------------------------------------------------------------------------------------------


def test_beits_network_is_adapted_but_for_its_head():
    config = networks.NetworkConfig(3, tiny_model("CLIP").preprocess.to_dict())
    model = Beit(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    said = networks.adapt_network(networks.Network(model, "BEiT", config), 2)
    learns = {name for name, value in model.named_parameters() if value.requires_grad and ".lora_" not in name}
    assert learns == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert "8 adapted layers" in said


def test_a_fine_tuning_continues_and_is_rebuilt_from_plain_weights(tmp_path, monkeypatch):
    from test_finetune import SMALL, tree

    root, checkpoint = tree(tmp_path / "set"), write_checkpoint(tmp_path / "weights.pt", "vit")
    argv = ["--data_set", "image_folder", "--data_path", str(root / "train"), "--eval_data_path", str(root / "val")]
    argv += ["--finetune", str(checkpoint), *SMALL, "--lr", "2e-3", "--lora", "2", "--drop_path", "0.2"]
    argv += ["--model_ema", "--model_ema_decay", "0.5", "--output_dir"]
    results = run_class_finetuning.main([*argv, str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        patch.setattr(run_class_finetuning, "finish_epoch", stop_after(run_class_finetuning.finish_epoch))
        with pytest.raises(KeyboardInterrupt):
            run_class_finetuning.main([*argv, str(tmp_path / "parts")])
    assert run_class_finetuning.main([*argv, str(tmp_path / "parts")]) == results
    whole, parts = (checkpoints.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    for key in ("state_dict", "state_dict_ema", "adapters", "adapters_ema"):
        assert whole[key].keys() == parts[key].keys()
        assert all(torch.equal(value, parts[key][name]) for name, value in whole[key].items())
    rebuilt = networks.rebuild(whole).model
    assert all(torch.equal(value, whole["state_dict"][name]) for name, value in rebuilt.state_dict().items())
    started = checkpoints.load_checkpoint(checkpoint)["state_dict"]
    moved = {n for n, v in started.items() if n.startswith("visual.") and not torch.equal(v, whole["state_dict"][n])}
    assert moved and all(name.rsplit(".", 2)[1] in ("qkv", "proj", "fc1", "fc2") for name in moved)
