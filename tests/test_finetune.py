"""End-to-end fine-tuning: the published network, groups, schedules and loading, and the script from end to end."""

import json
import math
import re
import shlex
import signal
import subprocess
import sys
import zlib
from argparse import Namespace
from itertools import islice
from pathlib import Path

import cbis_tree
import numpy as np
import pytest
import torch
from distributed_helpers import run_ranks
from helpers import GOLDENS, ROOT, environment, signal_after
from model_helpers import tiny_medslip, write_checkpoint
from PIL import Image
from torch import nn

import main_linear
import models
import utils
from beit_finetuning import optim, results, run_class_finetuning
from beit_finetuning.modeling_finetune import Beit, create_beit
from beit_finetuning.views import Augmentation, Criterion, TrainView, beit_preprocess, operations
from beit_finetuning.weights import load_weights, read_tower, resize_positions
from evaluation import downstream, predictions, set_probes
from evaluation.features import Loading, extract, load_backbone
from evaluation.heads import Samples
from evaluation.probe import Fitting
from inputs.transforms import eval_view
from preparation import cbis_tables
from runtime import checkpoints

FIGURES = torch.load(GOLDENS / "finetune.pt", weights_only=True)

# ---------------------------------------------------------------------------------------------------------------------
# The published figures
# ---------------------------------------------------------------------------------------------------------------------


def network(case: dict) -> Beit:
    """The golden's tiny network with weights that follow from their names: normal numbers seeded by crc32 + salt."""
    model = Beit(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=7, **case["settings"])
    weights = {}
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            g = torch.Generator().manual_seed(zlib.crc32(name.encode()) + case["salt"])
            value = torch.randn(value.shape, generator=g) * case["std"]
            value = 1 + value if value.ndim == 1 and name.endswith("weight") else value
        weights[name] = value
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("case", FIGURES["forward"], ids=lambda case: case["variant"])
def test_outputs_losses_and_gradients_are_the_published_ones(case):
    model = network(case)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        name: tuple(shape) for name, shape in case["shapes"].items() if name in dict(model.named_parameters())
    }
    model.eval()
    torch.testing.assert_close(model.forward_features(case["input"]), case["features"], rtol=1e-4, atol=1e-5)
    logits = model(case["input"])
    torch.testing.assert_close(logits, case["logits"], rtol=1e-4, atol=1e-5)
    smoothed, soft = (Criterion(0.1)(logits, case[target]) for target in ("target", "soft_target"))
    assert smoothed.item() == pytest.approx(float(case["smoothed_loss"]), rel=1e-5)
    assert soft.item() == pytest.approx(float(case["soft_loss"]), rel=1e-5)
    (smoothed + soft).backward()  # the figures are of the sum
    found = {name: p.grad for name, p in model.named_parameters()}
    assert found.keys() == case["gradients"].keys()
    for name, expected in case["gradients"].items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", FIGURES["trajectory"], ids=lambda case: case["variant"])
def test_a_training_is_the_published_one(case):
    """Eight updates: losses, gradient norms and final weights."""
    model = network(case).eval()
    groups = optim.parameter_groups(model, case["weight_decay"], case["layer_decay"])
    optimizer = optim.create_optimizer(groups, case["lr"], case["betas"])
    total = case["epochs"] * case["steps_per_epoch"]
    losses, norms, micro = [], [], iter(zip(case["inputs"], case["soft_targets"], strict=True))
    for step in range(total):
        rate = optim.learning_rate(
            step, total, case["lr"], case["min_lr"], case["warmup_epochs"] * case["steps_per_epoch"]
        )
        assert rate == pytest.approx(case["lr_schedule"][step], rel=1e-6, abs=1e-12)
        optim.set_rates(optimizer, rate)
        for images, target in islice(micro, case["update_freq"]):
            loss = Criterion()(model(images), target)
            (loss / case["update_freq"]).backward()
            losses.append(loss.item())
        norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(case["losses"], rel=1e-3)
    assert norms == pytest.approx(case["grad_norms"], rel=1e-2)
    ours = model.state_dict()
    for name, expected in case["end"].items():
        torch.testing.assert_close(ours[name], expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name", FIGURES["groups"])
def test_layer_decay_and_weight_decay_of_every_parameter_are_the_published_ones(name):
    case = FIGURES["groups"][name]
    with torch.device("meta"):
        model = create_beit(
            name, num_classes=1000, use_abs_pos_emb=True, use_rel_pos_bias=False, use_mean_pooling=False, init_values=0
        )
    assert sum(p.numel() for p in model.parameters()) == case["count"]
    found = {
        parameter: (group["weight_decay"], group["lr_scale"])
        for group in optim.parameter_groups(model, 0.05, case["layer_decay"])
        for parameter in group["names"]
    }
    assert found.keys() == case["parameters"].keys()
    for parameter, (decay, scale) in found.items():
        expected = case["parameters"][parameter]
        assert decay == expected["weight_decay"] and scale == pytest.approx(expected["lr_scale"], rel=1e-9)


def test_schedules_are_the_published_ones():
    for case in FIGURES["schedules"]:
        a = case["args"]
        total, warmup = a["epochs"] * a["niter_per_ep"], a.get("warmup_epochs", 0) * a["niter_per_ep"]
        got = [optim.learning_rate(i, total, a["base_value"], a["final_value"], warmup) for i in range(total)]
        np.testing.assert_allclose(got, case["schedule"].numpy(), rtol=1e-9, atol=1e-15)


def test_position_embeddings_follow_the_size():
    case = FIGURES["pos_embed"]
    torch.testing.assert_close(resize_positions(case["before"], (6, 6)), case["after"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", FIGURES["initial"])
def test_networks_start_from_the_published_distribution(variant):
    """Mean and standard deviation of each tensor, within the spread of so many draws."""
    settings = {
        "slip": dict(use_abs_pos_emb=True, use_rel_pos_bias=False, use_mean_pooling=False, init_values=0),
        "beit": dict(use_abs_pos_emb=False, use_rel_pos_bias=True, use_mean_pooling=True, init_values=0.1),
        "shared_rel": dict(
            use_abs_pos_emb=True,
            use_rel_pos_bias=False,
            use_shared_rel_pos_bias=True,
            use_mean_pooling=True,
            init_values=1e-5,
        ),
    }[variant]
    torch.manual_seed(0)
    model = Beit(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=7, init_scale=0.001, **settings
    )
    for name, (mean, std) in FIGURES["initial"][variant].items():
        value = model.state_dict()[name].double()
        few = 5 / math.sqrt(value.numel())
        assert abs(value.mean().item() - mean) <= max(2 * few * std, 1e-8), name
        assert value.std().item() == pytest.approx(std, rel=2 * few, abs=1e-8), name


# ---------------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------------

SMALL = ["--batch_size", "4", "--epochs", "2", "--warmup_epochs", "1", "-j", "0", "--gpu", "-1", "--print-freq", "1"]


def tree(root: Path, classes: int = 3, n: int = 8, size: int = 40) -> Path:
    """ImageNet's layout: train/ and val/ with a folder a class, whose grey tells it."""
    rng = np.random.default_rng(0)
    for split, count in (("train", n), ("val", 4)):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(40 + 80 * label, 20, (size, size, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.JPEG")
    return root


def catalog_of(folder: Path, root: Path) -> Path:
    entry = {"path": str(root), "type": "imagefolder", "train": "train", "test": "val"}
    utils.write_json(folder / "catalog.json", {"imagenet": entry})
    return folder / "catalog.json"


def published_commands() -> list[list[str]]:
    """The commands of the README, which are those that SLIP published, without the launcher."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"python run_with_submitit_finetune.py (.*?)```", text, re.DOTALL)
    return [shlex.split(block.replace("\\\n", " ")) for block in blocks]


def slip_file(path: Path, name: str, depth: int | None = None, ours: bool = False) -> Path:
    """Random weights in the layout of the published SLIP files, or of our own."""
    kwargs = {**models.MODELS[name].vision_kwargs, **({"depth": depth} if depth else {})}
    torch.manual_seed(0)
    model = models.create_model(name, vision_kwargs=kwargs, text_layers=1, ssl_mlp_dim=8, ssl_emb_dim=4)
    if ours:
        described = {"model": {"name": model.name, "config": model.config}, "preprocess": model.preprocess.to_dict()}
        checkpoints.save_checkpoint({"state_dict": model.state_dict(), "tokenizer": None, **described}, path)
        return path
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "args": Namespace(model=name), "epoch": 25}, path)
    return path


def test_the_published_commands_parse_and_build_the_real_models(tmp_path):
    commands = published_commands()
    assert len(commands) == 3
    for argv, name, blocks in zip(commands, ("SLIP_VITS16", "SLIP_VITB16", "SLIP_VITL16"), (12, 12, 24), strict=True):
        args = run_class_finetuning.get_args_parser().parse_args(argv)
        assert args.enable_deepspeed and args.lr == 4e-3 and not args.use_mean_pooling and not args.rel_pos_bias
        with torch.device("meta"):
            options = dict(init_values=args.layer_scale_init_value, use_mean_pooling=args.use_mean_pooling)
            model = create_beit(
                args.model, use_abs_pos_emb=args.abs_pos_emb, use_rel_pos_bias=args.rel_pos_bias, **options
            )
            published = models.create_model(name, text_layers=1)
        assert len(model.blocks) == blocks
        ours = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.startswith("head.")}
        theirs = {
            k.removeprefix("visual."): tuple(v.shape)
            for k, v in published.state_dict().items()
            if k.startswith("visual.")
        }
        assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, name, tensors",
    [(0, "SLIP_VITS16", 150), (1, "SLIP_VITB16", 150), (2, "SLIP_VITL16", 294)],
    ids=["small", "base", "large"],
)
@pytest.mark.parametrize("ours", [False, True], ids=["SLIP's file", "our file"])
def test_a_published_command_runs_at_its_real_size(command, name, tensors, ours, tmp_path):
    """As it stands in the README, but for the paths, the number of classes and a batch, and an epoch, of few images."""
    if ours and name == "SLIP_VITL16":
        pytest.skip("a second file of 1.3 GB shows nothing new")
    argv = published_commands()[command]
    for flag, value in {
        "--batch_size": "4",
        "--epochs": "1",
        "--warmup_epochs": "0",
        "--nb_classes": "3",
        "--output_dir": str(tmp_path / "out"),
        "--finetune": str(slip_file(tmp_path / "weights.pt", name, ours=ours)),
    }.items():
        argv[argv.index(flag) + 1] = value
    root = tree(tmp_path / "imagenet", n=3)
    results = run_class_finetuning.main(
        [*argv, "--catalog", str(catalog_of(tmp_path, root)), "-j", "0", "--gpu", "-1", "--print-freq", "1"]
    )
    assert results["samples"] == 12 and results["metric"] == "top1"
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    assert f"{tensors} tensors loaded" in (tmp_path / "out" / "log.txt").read_text()
    for path in tmp_path.rglob("*.pt"):
        path.unlink()


def test_what_a_published_file_brings(tmp_path):
    """The tower's every tensor, with and without the prefix; one that does not fit is refused with its keys."""
    path = slip_file(tmp_path / "slip.pt", "SLIP_VITS16", depth=1)
    options = dict(depth=1, use_abs_pos_emb=True, use_rel_pos_bias=False, use_mean_pooling=False, init_values=0)
    model = create_beit("beit_small_patch16_224", num_classes=3, **options)
    head = model.head.weight.clone()
    report = load_weights(model, path, "state_dict", "module.visual.")
    stored = torch.load(path, weights_only=False)["state_dict"]
    for name in report.loaded:
        assert torch.equal(model.state_dict()[name], stored[f"module.visual.{name}"])
    assert set(report.loaded) == {n for n in model.state_dict() if not n.startswith("head.")}
    assert torch.equal(model.head.weight, head)
    with pytest.raises(ValueError, match="position embeddings.*--abs_pos_emb"):
        load_weights(create_beit("beit_small_patch16_224", **{**options, "use_abs_pos_emb": False}), path, "state_dict",
                     "module.visual.")  # fmt: skip
    with pytest.raises(ValueError, match="blocks.1"):
        load_weights(create_beit("beit_small_patch16_224", **{**options, "depth": 2}), path, "state_dict",
                     "module.visual.")  # fmt: skip


def test_of_weights_and_their_average_the_average_is_taken_unless_one_is_named(tmp_path, caplog):
    raw, average = {"patch_embed.proj.weight": torch.zeros(2)}, {"patch_embed.proj.weight": torch.ones(2)}
    torch.save({"model": raw, "model_ema": average, "state_dict": raw}, tmp_path / "beit.pth")
    torch.save({"model": raw, "model_ema": None}, tmp_path / "without.pth")
    with caplog.at_level("INFO"):
        assert torch.equal(read_tower(tmp_path / "beit.pth")["patch_embed.proj.weight"], torch.ones(2))
        assert "the average, model_ema, is taken" in caplog.text
        assert torch.equal(read_tower(tmp_path / "beit.pth", "model")["patch_embed.proj.weight"], torch.zeros(2))
        assert "--model_key model_ema takes it" in caplog.text
    assert torch.equal(read_tower(tmp_path / "without.pth")["patch_embed.proj.weight"], torch.zeros(2))


def fine_tune(folder: Path, tmp_path: Path, *extra: str) -> dict:
    checkpoint = tmp_path / "weights.pt"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, "vit")
    data = ["--data_set", "image_folder", "--data_path", str(tmp_path / "set/train")]
    data += ["--eval_data_path", str(tmp_path / "set/val")]
    return run_class_finetuning.main(
        [*data, "--finetune", str(checkpoint), *SMALL, "--lr", "2e-3", "--output_dir", str(folder), *extra]
    )


@pytest.fixture
def small_set(tmp_path):
    return tree(tmp_path / "set")


def test_mixed_and_averaged_training_learns(small_set, tmp_path):
    extra = ["--epochs", "6", "--mixup", "0.8", "--cutmix", "1", "--model_ema", "--model_ema_decay", "0.5"]
    results = fine_tune(tmp_path / "out", tmp_path, *extra, "--update_freq", "2", "--clip_grad", "5")
    assert results["score"] > 0.6 and "top1" in results["ema"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["unit"] == "fraction"
    again = fine_tune(tmp_path / "out", tmp_path, *extra, "--update_freq", "2", "--clip_grad", "5", "--eval")
    assert again["score"] == results["score"]
    with pytest.raises(ValueError, match="lr: 0.002 there, 0.1 now"):
        fine_tune(tmp_path / "out", tmp_path, *extra, "--update_freq", "2", "--clip_grad", "5", "--lr", "0.1")


def test_a_signal_within_an_epoch_loses_nothing(small_set, tmp_path, monkeypatch):
    extra = ["--mixup", "0.8", "--drop_path", "0.2"]
    whole = fine_tune(tmp_path / "whole", tmp_path, *extra)
    update = signal_after(run_class_finetuning.update, 8, signal.SIGTERM)
    monkeypatch.setattr(run_class_finetuning, "update", update)
    assert fine_tune(tmp_path / "parts", tmp_path, *extra) == {"stopped_by": "SIGTERM"}
    assert not (tmp_path / "parts" / "results.json").exists()
    assert fine_tune(tmp_path / "parts", tmp_path, *extra) == whole
    first, second = (
        checkpoints.load_checkpoint(tmp_path / n / "checkpoint.pt")["state_dict"] for n in ("whole", "parts")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def _rank(rank: int, world: int, tmp_path: Path) -> None:
    fine_tune(tmp_path / "two", tmp_path, "--batch_size", "2", "--drop_path", "0")


def test_two_processes_equal_one(small_set, tmp_path):
    fine_tune(tmp_path / "one", tmp_path, "--batch_size", "4", "--drop_path", "0")
    run_ranks(_rank, 2, tmp_path)
    first, second = (checkpoints.load_checkpoint(tmp_path / n / "checkpoint.pt")["state_dict"] for n in ("one", "two"))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tower", ["vit", "batchnorm"])
def test_lesions_give_a_row_that_compares_with_the_probes(tower, tmp_path):
    root = tmp_path / "cbis"
    cbis_tree.make_small_cbis(root)
    cbis_tables.make_cbis(root)
    checkpoint = write_checkpoint(tmp_path / "weights.pt", tower)
    argv = ["--data_set", "cbis_mass", "--data_path", str(root), "--finetune", str(checkpoint), *SMALL]
    argv += ["--resamples", "50", "--class_weights", "balanced", "--drop_path", "0", "--layer_decay", "0.75"]
    argv += ["--model_ema", "--model_ema_decay", "0.5"]
    results = run_class_finetuning.main([*argv, "--output_dir", str(tmp_path / "out")])
    assert results["validation_score"] == "auroc" and set(results["metrics"]) >= {"auroc", "f1"}
    assert set(results["ema"]["metrics"]) == set(results["metrics"])
    assert results["settings"]["class_weights"] == "balanced" and results["settings"]["protocol"] == "fine-tuning"
    found = predictions.Predictions.read(tmp_path / "out" / "predictions.csv")
    assert len(found.rows) == results["lesions"]["test"]
    np.testing.assert_allclose(found.prob.sum(1), 1)
    probe = main_linear.main(
        ["--dataset", "cbis_mass", "--root", str(root), "--pretrained", str(checkpoint), "-j", "0", "--gpu", "-1",
         "--resamples", "50", "--output-dir", str(tmp_path / "probe"),
         "--baseline", str(tmp_path / "out" / "predictions.csv")]
    )  # fmt: skip
    assert set(probe["difference"]) == set(probe["metrics"])


def test_unknown_flags_and_wrong_numbers_are_refused(small_set, tmp_path, capsys):
    with pytest.raises(SystemExit):
        fine_tune(tmp_path / "a", tmp_path, "--layer_decai", "0.5")
    assert "--layer_decai" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--nb_classes 1000: image_folder has 3 classes"):
        fine_tune(tmp_path / "b", tmp_path, "--nb_classes", "1000")
    with pytest.raises(ValueError, match="--batch_size 3 is odd"):
        fine_tune(tmp_path / "c", tmp_path, "--batch_size", "3", "--mixup", "0.8")


@pytest.mark.parametrize("script", ["run_with_submitit_finetune.py", "beit_finetuning/run_with_submitit_finetune.py"])
def test_the_launcher_submits_the_published_command(script, tmp_path):
    argv = [x.replace("/path/to", str(tmp_path)) for x in published_commands()[1]]
    done = subprocess.run(
        [sys.executable, ROOT / script, *argv, "--dry-run"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=1" in done.stdout and "run_class_finetuning.py" in done.stdout


def test_the_script_starts_from_its_own_folder():
    done = subprocess.run(
        [sys.executable, "run_class_finetuning.py", "--help"],
        cwd=ROOT / "beit_finetuning",
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--layer_decay" in done.stdout


@pytest.mark.slow
def test_digits_are_read_better_by_a_fine_tuned_tower_than_by_a_probe_of_it(tmp_path):
    """The same untrained tower; the paired interval of the difference over the test images excludes zero."""
    checkpoint = write_checkpoint(tmp_path / "weights.pt", "batchnorm")
    backbone = load_backbone(checkpoint)
    splits = {}
    for train in (True, False):
        images = downstream.create_downstream("digits", train, eval_view(backbone.preprocess))
        splits[train] = extract(backbone, images, "", Loading(64))[0], images.labels
    train, test = (Samples(*splits[key]) for key in (True, False))
    head = set_probes.fit_on("digits", train, "0123456789", "top1", Fitting())
    probed = head.probabilities(test.features).argmax(1) == test.labels

    recipe = "--batch_size 32 --epochs 20 --warmup_epochs 2 --lr 3e-3 --layer_decay 1 --drop_path 0 --color_jitter 0"
    argv = [
        "--data_set",
        "digits",
        "--finetune",
        str(checkpoint),
        *recipe.split(),
        "--aa",
        "",
        "--reprob",
        "0",
        "--hflip",
        "0",
    ]
    argv += ["-j", "0", "--gpu", "-1"]
    logits, original = [], results.Evaluation.logits

    def watched(*args):
        logits.append(original(*args)[0])
        return original(*args)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(results.Evaluation, "logits", watched)
        run_class_finetuning.main([*argv, "--disable_eval_during_finetuning", "--output_dir", str(tmp_path / "out")])
    tuned = logits[-1].argmax(1) == test.labels
    rng = np.random.default_rng(0)
    gain = tuned.astype(float) - probed
    low = np.quantile([rng.choice(gain, len(gain)).mean() for _ in range(2000)], 0.025)
    print(f"probe {probed.mean():.4f}, fine-tuned {tuned.mean():.4f}, gain {gain.mean():.4f}, at least {low:.4f}")
    assert low > 0


def test_medclips_swin_is_fine_tuned_with_its_own_preprocessing(small_set, tmp_path):
    """A tower whose layers are stages: every stage has its rate, and the images stay the grey squares it knows."""
    model = tiny_medslip()
    state = {
        "state_dict": model.state_dict(),
        "model": {"name": model.name, "config": model.config},
        "preprocess": model.preprocess.to_dict(),
        "tokenizer": None,
    }
    checkpoints.save_checkpoint(state, tmp_path / "weights.pt")
    fine_tune(tmp_path / "out", tmp_path, "--layer_decay", "0.5")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["derived"]["preprocess"]["prepare"] == "medclip"
    assert "factors on the rate 0.125 to 1" in (tmp_path / "out" / "log.txt").read_text()  # stem, two stages, head


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-mstd0.5-inc1", "rand-m10", "augmix-m5"])
def test_every_strength_of_a_policy_is_drawn_without_an_error(policy):
    """The strongest posterising keeps no bit, which Pillow refuses."""
    view = TrainView(beit_preprocess(64, True), Augmentation(auto_augment=policy))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 80, 3), np.uint8))
    for i in range(150):
        assert view(image, np.random.default_rng(i)).shape == (3, 64, 64)
    for operation in operations(view.transform):
        if operation.name.startswith("Posterize"):
            assert not np.asarray(operation.aug_fn(image, 0)).any()
