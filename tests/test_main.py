"""main.py end to end on small data: training, validation, resuming, two processes, errors."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed_helpers import run_ranks
from helpers import (
    DROPOUT,
    GOLDENS,
    ROOT,
    assert_same_run,
    command,
    environment,
    signal_after,
    slow,
    stop_after,
    weights,
)
from roco_tree import make_roco
from source_tree import save_jpeg

import losses
import main
import models
from datasets import create_reader
from runtime import checkpoints, command_line


@pytest.fixture(scope="module")
def roco(tmp_path_factory):
    return make_roco(tmp_path_factory.mktemp("roco"))


@pytest.fixture(scope="module")
def unbroken(roco, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    main.main(command(roco, out, *DROPOUT))
    return out


def test_what_a_run_leaves_behind(unbroken):
    names = {p.name for p in unbroken.iterdir()}
    assert {"checkpoint.pt", "checkpoint_best.pt", "settings.json", "log.txt", "log.jsonl", "tensorboard"} <= names
    rows = [json.loads(line) for line in (unbroken / "log.jsonl").read_text().splitlines()]
    steps = [r for r in rows if r["kind"] == "train"]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert all(abs(r["loss"] - r["clip_loss"] - r["ssl_loss"]) < 1e-4 for r in steps)
    epochs = [r for r in rows if r["kind"] == "epoch"]
    assert len(epochs) == 2 and epochs[-1]["val_candidates"] == 8
    mean = sum(r["loss"] for r in steps if r["epoch"] == 1) / 3
    assert epochs[1]["loss"] == pytest.approx(mean, rel=1e-6)
    recalls = [v for k, v in epochs[-1].items() if k.startswith("val_") and "_r" in k and "rank" not in k]
    assert len(recalls) == 6
    settings = json.loads((unbroken / "settings.json").read_text())
    assert settings["derived"]["effective_batch"] == 8 and settings["derived"]["total_steps"] == 6
    assert "weight decay" in (unbroken / "log.txt").read_text()
    loaded = models.load_pretrained(unbroken / "checkpoint_best.pt")
    assert loaded.model.name == "SLIP_VITT16" and loaded.preprocess.size == 32
    assert loaded.tokenizer(["a mass"]).shape == (1, 24)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_resuming_after_an_epoch_is_the_unbroken_run(roco, unbroken, tmp_path, workers, monkeypatch):
    with monkeypatch.context() as m:  # the first process ends after its first epoch
        m.setattr(main, "finish_epoch", stop_after(main.finish_epoch))
        with pytest.raises(KeyboardInterrupt):
            main.main(command(roco, tmp_path, *DROPOUT, "-j", workers))
    main.main(command(roco, tmp_path, *DROPOUT, "-j", workers))
    assert_same_run(unbroken, tmp_path)


@pytest.mark.parametrize("extra", [[], ["--update-freq", "2", "--batch-size", "4"], ["--print-freq", "1000"]])
def test_a_signal_in_an_epoch_checkpoints_and_the_rest_is_the_unbroken_run(roco, tmp_path, monkeypatch, extra):
    assert threading.current_thread() is threading.main_thread()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    main.main(command(roco, whole, *DROPOUT, *extra))
    with monkeypatch.context() as m:
        m.setattr(main, "update", signal_after(main.update, 2, signal.SIGUSR2))
        main.main(command(roco, broken, *DROPOUT, *extra))
    state = checkpoints.load_checkpoint(broken / "checkpoint.pt")
    assert (state["epoch"], state["step_in_epoch"]) == (0, 2)
    assert "stopped by SIGUSR2" in (broken / "log.txt").read_text()
    main.main(command(roco, broken, *DROPOUT, *extra))
    assert_same_run(whole, broken)


def test_other_settings_refuse_to_resume_and_are_named(roco, unbroken):
    with pytest.raises(ValueError, match=r"(?s)settings differ.*lr: 0.001 there, 0.01 now"):
        main.main(command(roco, unbroken, *DROPOUT, "--lr", "1e-2"))
    with pytest.raises(ValueError, match=r"(?s)model.embed_dim: 16 there, 8 now"):
        main.main(command(roco, unbroken, *DROPOUT, "embed_dim=8"))


def test_accumulation_has_a_correct_tail(roco, tmp_path):
    """24 pairs in batches of 4 are 6 micro-batches, that is two steps: groups of 4 and of 2."""
    main.main(command(roco, tmp_path, "--batch-size", "4", "--update-freq", "4", "--epochs", "1"))
    state = checkpoints.load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == 2
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len([r for r in rows if r["kind"] == "train"]) == 2


@pytest.mark.parametrize(
    "model, extra, length",
    [("CLIP_VITT16", [], 16), ("MEDCLIP_RESNET", [], 16), ("MEDCLIP_RESNET", ["--text-pooling", "medclip"], 24)],
)
def test_the_text_tower_is_given_what_it_reads(roco, tmp_path, monkeypatch, model, extra, length):
    """Captions of 9 to 12 tokens in a context of 24; MedCLIP's own pooling reads the padding too."""
    seen, original = set(), main.accumulate_micro

    def watched(run, micro_batches, identities):
        seen.update(inputs[1].shape[1] for inputs in micro_batches)
        yield from original(run, micro_batches, identities)

    monkeypatch.setattr(main, "accumulate_micro", watched)
    argv = command(roco, tmp_path, "--epochs", "1", "--eval-freq", "9", *extra, model=model)
    if model == "MEDCLIP_RESNET":
        argv = [x for x in argv if not x.startswith("vision.")]
        argv[argv.index("text_layers=1")] = "text_layers=2"
    main.main(argv)
    assert seen == {length}


def test_the_tail_weighs_its_micro_batches_by_their_number(roco, tmp_path):
    """The gradient of a group is the mean over its micro-batches, whatever --update-freq says."""
    runs = {}
    for freq in (1, 4):  # one micro-batch each time: a group of 1 is the tail of update-freq 4
        out = tmp_path / str(freq)
        main.main(command(roco, out, "--batch-size", "24", "--update-freq", str(freq), "--epochs", "1"))
        runs[freq] = weights(out)
    assert all(torch.equal(runs[1][k], runs[4][k]) for k in runs[1])


@pytest.mark.parametrize("model", ["CLIP_VITT16", "SIMCLR_VITT16"])
def test_the_other_objectives_train(roco, tmp_path, model):
    row = main.main(command(roco, tmp_path, "--epochs", "1", model=model))
    assert row["loss"] > 0 and ("val_i2t_r1" in row) == (model == "CLIP_VITT16")
    assert (tmp_path / "checkpoint_best.pt").exists()


def test_medslip_fine_tunes_and_exports_what_medclip_loads(roco, tmp_path):
    from towers import medclip

    tiny_bert = [
        "vision.embed_dim=12",
        "vision.depths=[1,1]",
        "vision.num_heads=[2,2]",
        "text_width=32",
        "text_heads=2",
        "text_layers=3",
    ]
    vocab = tmp_path / "vocab.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "mammogram", "chest", "ct", "mri", "mass", "case", "of"]
    vocab.write_text("\n".join(words) + "\n")
    argv = [
        "--dataset",
        "roco",
        "--root",
        str(roco),
        "--model",
        "MEDSLIP_VIT",
        "--output-dir",
        str(tmp_path / "run"),
        "-j",
        "0",
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--lr",
        "5e-5",
        "--image-size",
        "64",
        "--ssl-mlp-dim",
        "32",
        "--ssl-emb-dim",
        "16",
        "--bert-vocab",
        str(vocab),
        "--override",
        *tiny_bert,
    ]
    main.main(argv)
    exported = medclip.read_weights(tmp_path / "run" / "medclip_export")
    best = models.load_pretrained(tmp_path / "run" / "checkpoint_best.pt")
    assert best.tokenizer.vocab == words and best.model.config["vocab_size"] == len(words)
    assert torch.equal(exported["text_model.projection_head.weight"], best.model.text_projection.T)
    assert torch.equal(
        exported["vision_model.model.encoder.layers.0.blocks.0.attention.self.query.weight"],
        best.model.visual.encoder.layers[0].blocks[0].attention.q_proj.weight,
    )
    other = models.create_model("MEDCLIP_VIT", **{k: v for k, v in best.model.config.items() if k != "objective"})
    models.initialise(other, tmp_path / "run" / "medclip_export")
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(other.eval().encode_image(image), best.model.encode_image(image))


def test_init_starts_anew_from_weights_alone(roco, unbroken, tmp_path):
    row = main.main(
        command(
            roco,
            tmp_path,
            "--init",
            str(unbroken / "checkpoint.pt"),
            "--epochs",
            "1",
            "--lr",
            "0",
            "--lr-start",
            "0",
            "--lr-end",
            "0",
            "--wd",
            "0",
            "--image-size",
            "48",
        )
    )
    assert row["epoch"] == 0
    then, now = weights(unbroken), weights(tmp_path)
    assert torch.equal(then["token_embedding.weight"], now["token_embedding.weight"])
    assert now["visual.pos_embed"].shape[1] == 37


def test_evaluate_only_validates(roco, unbroken, tmp_path):
    scores = main.main(command(roco, tmp_path, "--evaluate", "--resume", str(unbroken / "checkpoint.pt")))
    rows = [json.loads(line) for line in (unbroken / "log.jsonl").read_text().splitlines()]
    last = [r for r in rows if r["kind"] == "epoch"][-1]
    assert scores["val_i2t_r5"] == last["val_i2t_r5"] and not (tmp_path / "checkpoint.pt").exists()


def test_caption_filter_applies_to_validation_and_reports_the_full_pool(roco, tmp_path):
    row = main.main(command(roco, tmp_path, "--caption-filter", "mammo", "--batch-size", "4", "--epochs", "1"))
    assert row["val_candidates"] == 2 and row["val_full_candidates"] == 8


def _train_rank(rank, world, argv):
    main.main(argv)


@pytest.mark.parametrize("model", ["SLIP_VITT16", *slow("SIMCLR_VITT16", "CLIP_VITT16")])
def test_two_processes_equal_one(roco, tmp_path, model):
    one, two = tmp_path / "one", tmp_path / "two"
    sgd_like = ["--eps", "1e-2", "--epochs", "2"]  # AdamW divides rounding noise by itself where gradients vanish
    main.main(command(roco, one, "--batch-size", "8", *sgd_like, model=model))
    run_ranks(_train_rank, 2, command(roco, two, "--batch-size", "4", *sgd_like, model=model))
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()  # no wrapper prefix
    for key in a:
        # A running mean sums a whole layer of weights that each differ by rounding.
        atol = 3e-4 if "running_" in key else 2e-5
        torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=atol, msg=lambda m, k=key: f"{k}: {m}")
    best = [checkpoints.load_checkpoint(p / "checkpoint.pt")["best_acc1"] for p in (one, two)]
    assert best[0] == best[1]  # validation counts every sample once


# --- errors ----------------------------------------------------------------------------------------------------------


def test_errors_name_the_thing(roco, tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        main.main(command(tmp_path / "no-such-folder", tmp_path / "a"))
    with pytest.raises(FileNotFoundError, match="absent.pt"):
        main.main(command(roco, tmp_path / "b", "--resume", str(tmp_path / "absent.pt")))
    with pytest.raises(ValueError, match=r"24.*64|64.*24"):
        main.main(command(roco, tmp_path / "c", "--batch-size", "64"))
    with pytest.raises(SystemExit):
        main.main(command(roco, tmp_path / "d", model="SLIP_VITB17"))
    with pytest.raises(ValueError, match="--bert-vocab"):
        main.main(command(roco, tmp_path / "e", "--medclip-weights", "x.zip", model="MEDSLIP_VIT"))
    with pytest.raises(ValueError, match="MEDSLIP_.*SLIP_VITT16"):
        main.main(command(roco, tmp_path / "f", "--medclip-weights", "x.zip"))
    with pytest.raises(ValueError, match="KEY=VALUE"):
        main.main(command(roco, tmp_path / "g", "text_layers"))


def test_torn_checkpoint_is_never_a_silent_fresh_start(roco, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match="no checkpoint in"):
        main.main(command(roco, tmp_path))
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"torn"


def test_a_loss_that_stays_not_finite_ends_the_run(roco, tmp_path, monkeypatch):
    original = main.build_model

    def poisoned(*args):
        model, tokenizer = original(*args)
        with torch.no_grad():
            model.image_projection.fill_(torch.nan)
        return model, tokenizer

    monkeypatch.setattr(main, "build_model", poisoned)
    with pytest.raises(FloatingPointError, match="not finite in all 1 updates"):
        main.main(command(roco, tmp_path))


def test_published_defaults():
    """The defaults of the published script, as users' command lines rely on them."""
    args = vars(main.get_args_parser().parse_args([]))
    published = dict(
        dataset="yfcc15m",
        root="",
        metadata="yfcc15m.pkl",
        output_dir="./",
        model="SLIP_VITB16",
        ssl_mlp_dim=4096,
        ssl_emb_dim=256,
        ssl_scale=1.0,
        ssl_temp=0.1,
        resume="",
        epochs=25,
        warmup_epochs=1,
        start_epoch=0,
        batch_size=64,
        lr=3e-3,
        lr_start=1e-6,
        lr_end=1e-5,
        update_freq=1,
        wd=0.1,
        betas=(0.9, 0.98),
        eps=1e-8,
        eval_freq=1,
        disable_amp=False,
        print_freq=10,
        workers=10,
        evaluate=False,
        world_size=1,
        rank=0,
        local_rank=0,
        dist_url="env://",
        dist_backend="nccl",
        seed=0,
        gpu=None,
        wandb=False,
    )
    assert {k: args[k] for k in published} == published


def test_broken_images_are_named_replaced_and_limited(tmp_path):
    root = make_roco(tmp_path / "roco")
    bad = root / "train" / "radiology" / "images" / "ROCO_00003.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    main.main(command(root, tmp_path / "run", "--epochs", "1", "--max-bad-share", "0.2"))
    assert "ROCO_00003.jpg" in (tmp_path / "run" / "bad_samples.txt").read_text()
    with pytest.raises(ValueError, match="1 images.*more than.*bad_samples.txt"):
        main.main(command(root, tmp_path / "strict", "--epochs", "1"))


def test_a_broken_validation_image_is_an_error_or_left_out(tmp_path):
    root = make_roco(tmp_path / "roco")
    bad = root / "validation" / "radiology" / "images" / "ROCO_00026.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(ValueError, match="ROCO_00026.jpg"):
        main.main(command(root, tmp_path / "strict", "--epochs", "1"))
    row = main.main(command(root, tmp_path / "skip", "--epochs", "1", "--skip-broken"))
    assert row["val_candidates"] == 7


def test_evaluate_takes_the_runs_own_best_and_its_settings(roco, unbroken, tmp_path):
    before = (unbroken / "settings.json").read_bytes()
    best = checkpoints.load_checkpoint(unbroken / "checkpoint_best.pt")["best_acc1"]
    argv = ["--dataset", "roco", "--root", str(roco), "--output-dir", str(unbroken), "-j", "0", "--evaluate"]
    scores = main.main(argv)  # no model flags: the checkpoint says what it is
    recalls = [v for k, v in scores.items() if k.startswith(("val_i2t_r", "val_t2i_r"))]
    assert sum(recalls) / 6 == pytest.approx(best)
    assert (unbroken / "settings.json").read_bytes() == before
    with pytest.raises(ValueError, match="--evaluate needs weights"):
        main.main([*argv, "--output-dir", str(tmp_path)])


def test_a_refused_resume_leaves_the_runs_files_alone(roco, unbroken):
    before = {name: (unbroken / name).read_bytes() for name in ("settings.json", "log.jsonl")}
    with pytest.raises(ValueError, match="settings differ"):
        main.main(command(roco, unbroken, *DROPOUT, "--lr", "1e-2"))
    assert {name: (unbroken / name).read_bytes() for name in before} == before


def test_resume_names_where_to_start_and_a_further_run_goes_on(roco, tmp_path):
    main.main(command(roco, tmp_path / "a", "--keep-last", "9"))
    first = next((tmp_path / "a").glob("checkpoint_step*3.pt"))
    main.main(command(roco, tmp_path / "b", "--resume", str(first)))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "checkpoint_best.pt").exists()
    main.main(command(roco, tmp_path / "b", "--resume", str(first)))  # the same command after a requeue
    log = (tmp_path / "b" / "log.txt").read_text()
    assert "or further, so it is continued" in log and "this run is finished" in log


@pytest.mark.parametrize("beside", [False, True])
def test_only_the_best_of_this_folder_has_to_be_beaten(roco, unbroken, tmp_path, beside):
    """With a score in the checkpoint that no epoch reaches."""
    state = checkpoints.load_checkpoint(unbroken / "checkpoint_step00000003.pt") | {"best_acc1": 101.0}
    checkpoints.save_checkpoint(state, tmp_path / "high.pt")
    folder = tmp_path / "run"
    folder.mkdir()
    if beside:
        checkpoints.save_checkpoint({"epoch": 1}, folder / "checkpoint_best.pt")
    main.main(command(roco, folder, *DROPOUT, "--resume", str(tmp_path / "high.pt")))
    best = checkpoints.load_checkpoint(folder / "checkpoint_best.pt")
    assert best == {"epoch": 1} if beside else best["epoch"] == 2 and best["best_acc1"] <= 100


@pytest.mark.parametrize("start, end", [(9.0, 100), (-3.0, 1)])
def test_the_inverse_temperature_stays_between_1_and_100(roco, unbroken, tmp_path, start, end):
    """After every update (CLIP, section 2.5)."""
    state = checkpoints.load_checkpoint(unbroken / "checkpoint.pt")
    state["state_dict"]["logit_scale"].fill_(start)
    checkpoints.save_checkpoint(state, tmp_path / "start.pt")
    still = ("--epochs", "1", "--lr", "0", "--lr-start", "0", "--lr-end", "0")
    main.main(command(roco, tmp_path / "run", "--init", str(tmp_path / "start.pt"), *still))
    assert weights(tmp_path / "run")["logit_scale"].exp().item() == pytest.approx(end, rel=1e-4)


def test_one_bad_step_spoils_neither_weights_nor_statistics_nor_meters(roco, tmp_path, monkeypatch):
    original, steps = main.accumulate_micro, []

    def poisoned(run, micro_batches, identities):
        steps.append(1)
        if len(steps) == 2:
            micro_batches[0][0][:] = torch.nan
        yield from original(run, micro_batches, identities)

    monkeypatch.setattr(main, "accumulate_micro", poisoned)
    argv = command(roco, tmp_path, "--epochs", "1", "--print-freq", "3")
    argv[argv.index("--override") + 1 : argv.index("text_width=32")] = []
    main.main([*argv, "--vision-tower", "resnet10t"])
    state = weights(tmp_path)
    assert [k for k, v in state.items() if not v.isfinite().all()] == []
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["skipped_updates"] == 1 and rows[0]["loss"] > 0 and rows[-1]["loss"] == rows[0]["loss"]


def test_a_filter_that_leaves_no_validation_pair_validates_on_the_whole_pool(roco, tmp_path):
    row = main.main(
        command(roco, tmp_path, "--caption-filter", "case 1?[0-9]\\b", "--batch-size", "4", "--epochs", "1")
    )
    assert row["val_full_candidates"] == 8 and "val_candidates" not in row
    assert "all candidates choose" in (tmp_path / "log.txt").read_text()


def test_contradictory_and_empty_commands_are_refused(roco, tmp_path):
    with pytest.raises(ValueError, match="--resume and --init"):
        main.main(command(roco, tmp_path, "--resume", "a.pt", "--init", "b.pt"))
    with pytest.raises(ValueError, match="--start-epoch 5.*--epochs 2"):
        main.main(command(roco, tmp_path, "--start-epoch", "5"))
    with pytest.raises(ValueError, match="vocab_size=100"):
        main.main(command(roco, tmp_path, "--override", "vocab_size=100"))
    with pytest.raises(SystemExit):
        main.main(command(roco, tmp_path, "--print-freq", "0"))
    with pytest.raises(ValueError, match="512"):
        main.main(
            command(roco, tmp_path, "--context-length", "600", "--override", "text_layers=2", model="MEDCLIP_RESNET")
        )
    published = tmp_path / "published.pt"
    torch.save({"state_dict": {}, "args": {"model": "SLIP_VITT16"}}, published)
    with pytest.raises(ValueError, match="--init starts a new run"):
        main.main(command(roco, tmp_path, "--resume", str(published)))


def test_freezing_and_published_gather_reach_the_run(roco, tmp_path):
    main.main(
        command(
            roco,
            tmp_path,
            "--epochs",
            "1",
            "--freeze",
            "image",
            "--no-gather-with-grad",
            "--accum-negatives",
            "full",
            "--update-freq",
            "2",
            "--batch-size",
            "4",
            model="SLIP_VITT16",
        )
    )
    torch.manual_seed(0)
    fresh = models.create_model(
        "SLIP_VITT16",
        **{
            k: v
            for k, v in checkpoints.load_checkpoint(tmp_path / "checkpoint.pt")["model"]["config"].items()
            if k != "objective"
        },
    )
    trained = weights(tmp_path)
    assert torch.equal(trained["visual.blocks.0.attn.qkv.weight"], fresh.visual.blocks[0].attn.qkv.weight)
    assert not torch.equal(trained["image_projection"], fresh.image_projection)


# --- what others have left -------------------------------------------------------------------------------------------


def test_a_run_of_an_earlier_version_is_continued(roco, tmp_path):
    """A checkpoint of commit 60cae9c in the middle of its second epoch; the losses are those of its unbroken run."""
    shutil.copy(GOLDENS / "run_of_60cae9c.pt", tmp_path / "checkpoint_step00000008.pt")
    argv = command(roco, tmp_path, "vision.proj_drop_rate=0.1", "--batch-size", "4", model="SIMCLR_VITT16")
    main.main(argv)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses == pytest.approx([1.0972395, 3.3515673, 2.1471329, 0.5372905], rel=1e-3)


def edited(folder: Path, captions: Callable[[int], str]) -> None:
    rows = "".join(f"{i}.jpg,{captions(i)}\n" for i in range(16))
    (folder / "train.csv").write_text(f"image,caption\n{rows}")


def csv_command(folder: Path, *extra) -> list[str]:
    argv = command(folder, folder / "out", *extra)
    argv[argv.index("--dataset") + 1] = "csv"
    return argv


@pytest.fixture
def table(tmp_path):
    for i in range(16):
        save_jpeg(tmp_path / f"{i}.jpg", 10 * i)
    edited(tmp_path, "finding number {}".format)
    return tmp_path


def test_other_captions_are_not_continued_on(table):
    main.main(csv_command(table, "--epochs", "1", "--start-epoch", "0"))
    edited(table, lambda i: f"another text {99 - i}")
    with pytest.raises(ValueError, match="its settings differ.*images and captions"):
        main.main(csv_command(table, "--epochs", "1"))


def test_a_table_without_splits_holds_images_out(table):
    rows = (table / "train.csv").read_text().splitlines()[1:]
    (table / "pairs.csv").write_text("\n".join(["image,caption", *rows, *(row + " again" for row in rows)]))
    scores = main.main(csv_command(table, "--metadata", "pairs.csv", "--val-fraction", "0.25", "--batch-size", "4"))
    held = create_reader("csv", table, "pairs.csv", "validation", val_fraction=0.25)
    kept = create_reader("csv", table, "pairs.csv", "train", val_fraction=0.25)
    assert scores["val_candidates"] == len(held) and len(held) + len(kept) == 16 and 1 <= len(held) < 10
    assert not {held.name(i) for i in range(len(held))} & {kept.name(i) for i in range(len(kept))}
    assert "no column split: 25% of the images" in (table / "out" / "log.txt").read_text()
    everything = main.main(
        csv_command(table, "--metadata", "pairs.csv", "--val-fraction", "0", "--output-dir", str(table / "x"))
    )
    assert "val_candidates" not in everything


def test_a_run_that_held_out_images_goes_on_so(table, monkeypatch):
    """Whether its version knew no patients, or its table had no column of them when it began."""
    rows = (table / "train.csv").read_text().splitlines()[1:]
    (table / "pairs.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    argv = csv_command(table, "--metadata", "pairs.csv", "--val-fraction", "0.25", "--batch-size", "4")
    began = main.main([*argv, "--eval-freq", "1"])["val_candidates"]
    lines = [f"{row},P{i // 8}" for i, row in enumerate(rows)]
    (table / "pairs.csv").write_text("\n".join(["image,caption,patient", *lines]) + "\n")
    args = main.get_args_parser().parse_args(argv)
    assert main.began_by_image(args) and len(main.build_reader(args, "validation", "all")) == began
    checkpoint = next((table / "out").glob("checkpoint*.pt"))
    state = torch.load(checkpoint, weights_only=True)
    del state["settings"]["held out by"]  # as an earlier version wrote it
    for path in (table / "out").glob("checkpoint*.pt"):
        torch.save(state, path)
    main.main(argv)  # finished, and not refused for another split
    assert main.began_by_image(args)
    new = main.get_args_parser().parse_args([*argv, "--output-dir", str(table / "new")])
    held = main.build_reader(new, "validation", "all")
    assert not main.began_by_image(new) and len(held) == 8 and held.held_out_by == "patient"
    main.main([*argv, "--output-dir", str(table / "new")])
    assert not main.began_by_image(new)
    (table / "pairs.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    with pytest.raises(ValueError, match="its settings differ.*held out by: .?patient.? there"):
        main.main([*argv, "--output-dir", str(table / "new")])


@pytest.mark.parametrize("accumulation", ["micro", "full"])
def test_duplicates_are_no_negatives_in_training(table, accumulation, monkeypatch):
    """Two images with the same bytes, and two captions that are equal: the loss of the formula with a mask."""
    shutil.copy(table / "0.jpg", table / "1.jpg")
    edited(table, lambda i: "the same words" if i in (4, 9) else f"finding {i}")
    seen, full = [], main.accumulate_full if accumulation == "full" else main.accumulate_micro

    def watched(run, micro_batches, identities):
        found = list(full(run, micro_batches, identities))
        if not seen:
            with torch.no_grad():
                if accumulation == "full":
                    inputs = [torch.cat(parts) for parts in zip(*micro_batches, strict=True)]
                    found_identities = torch.cat([told["identities"] for told in identities])
                else:
                    inputs, found_identities = micro_batches[0], identities[0]["identities"]
                outputs = run.model(*inputs)
            duplicates = (found_identities[:, None] == found_identities[None]).any(-1)
            off = ~torch.eye(len(duplicates), dtype=torch.bool)
            expected = [
                losses.clip_loss(outputs["image_embed"], outputs["text_embed"], outputs["logit_scale"], mask)
                for mask in (duplicates, None)
            ]
            seen.append((found[0]["clip_loss"].item(), *map(float, expected), int((duplicates & off).sum())))
        return iter(found)

    monkeypatch.setattr(main, f"accumulate_{accumulation}", watched)
    extra = ["--mask-duplicates", "--epochs", "1", "--update-freq", "2" if accumulation == "full" else "1"]
    size = ["--batch-size", "8" if accumulation == "full" else "16", "--accum-negatives", accumulation]
    main.main(csv_command(table, *extra, *size))
    got, masked, plain, pairs = seen[0]
    assert pairs == 4 and got == pytest.approx(masked, rel=1e-5) and abs(got - plain) > 1e-4


# --- what the command line says --------------------------------------------------------------------------------------


def test_errors_are_one_line_and_have_the_exit_code_of_their_kind(table, monkeypatch, capsys):
    for argv, code, words in [
        (csv_command(table / "absent"), 1, "no captions of the split 'train' at"),
        (csv_command(table, "--epochs", "1", "--start-epoch", "3"), 2, "--start-epoch 3 leaves nothing"),
        (csv_command(table, "--init", "a.pt", "--resume", "b.pt"), 2, "choose one"),
        (csv_command(table, "--resume", table / "0.jpg"), 1, "it is a JPEG image"),
        (csv_command(table, "--batch-size", "1"), 2, "--batch-size 2 or more"),
    ]:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, argv)])
        with pytest.raises(SystemExit) as left:
            command_line.run_script(main.main)
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert left.value.code == code and line.startswith("error: ") and words in line
    argv = [sys.executable, ROOT / "main.py", *map(str, csv_command(table / "absent"))]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    monkeypatch.setattr(sys, "argv", ["main.py", *map(str, csv_command(table / "absent")), "--debug"])
    with pytest.raises(FileNotFoundError):  # with its traceback
        command_line.run_script(main.main)


def test_a_stopped_run_says_so_to_the_shell_and_to_whoever_reads_it(roco, tmp_path, monkeypatch):
    update = main.update
    monkeypatch.setattr(main, "update", signal_after(update, 4, signal.SIGTERM))
    monkeypatch.setattr(sys, "argv", ["main.py", *command(roco, tmp_path)])
    with pytest.raises(SystemExit) as left:
        command_line.run_script(main.main)
    assert left.value.code == 128 + signal.SIGTERM
    source = models.load_pretrained(tmp_path / "checkpoint.pt").source
    assert source.endswith("unfinished: epoch 1 of 2, step 4 of 6")
    assert "unfinished: epoch 1 of 2" in models.load_pretrained(tmp_path / "checkpoint_best.pt").source
    monkeypatch.setattr(main, "update", update)
    main.main(command(roco, tmp_path))
    assert all(
        "unfinished" not in models.load_pretrained(path).source
        for path in map(tmp_path.joinpath, ("checkpoint.pt", "checkpoint_best.pt"))
    )


def test_another_runs_settings_start_a_new_run(roco, tmp_path):
    """The same weights without a flag but the folder; a flag wins; another script's settings are refused."""
    main.main(command(roco, tmp_path / "first", "--seed", "3"))
    main.main(["--config", str(tmp_path / "first" / "settings.json"), "--output-dir", str(tmp_path / "second")])
    assert_same_run(tmp_path / "first", tmp_path / "second")
    again = ["--config", str(tmp_path / "first" / "settings.json"), "--output-dir", str(tmp_path / "third")]
    main.main([*again, "--epochs", "1", "--lr", "2e-3"])
    settings = json.loads((tmp_path / "third" / "settings.json").read_text())["args"]
    assert (settings["epochs"], settings["lr"], settings["seed"]) == (1, 2e-3, 3)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"args": {"protocol": "logistic"}}))
    with pytest.raises(ValueError, match="no flag for protocol"):
        main.main(["--config", str(other), "--output-dir", str(tmp_path / "fourth")])
    other.write_text("[]")
    with pytest.raises(ValueError, match="no settings.json of a run"):
        main.main(["--config", str(other)])


def test_a_finished_run_is_extended_by_a_new_one(roco, tmp_path):
    """The refusal says how; the new run starts from the old weights with a schedule of its own."""
    main.main(command(roco, tmp_path / "first", "--epochs", "1"))
    with pytest.raises(ValueError, match=r"epochs: 1 there, 2 now; it is finished.*--init .*first/checkpoint.pt"):
        main.main(command(roco, tmp_path / "first", "--epochs", "2"))
    old = checkpoints.load_checkpoint(tmp_path / "first" / "checkpoint.pt")
    longer = ["--init", str(tmp_path / "first" / "checkpoint.pt"), "--warmup-epochs", "0", "--lr", "1e-4"]
    main.main(command(roco, tmp_path / "second", "--epochs", "1", *longer, "--print-freq", "1"))
    rows = [json.loads(line) for line in (tmp_path / "second" / "log.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if row["kind"] == "train"]
    assert rates[0] == pytest.approx(1e-4) and rates == sorted(rates, reverse=True)
    new = checkpoints.load_checkpoint(tmp_path / "second" / "checkpoint.pt")
    weights = [k for k, v in old["state_dict"].items() if v.is_floating_point() and "running" not in k]
    moved = [(new["state_dict"][k] - old["state_dict"][k]).abs().max().item() for k in weights]
    assert 0 < max(moved) < 0.01
