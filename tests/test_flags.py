"""Flags are told, and refused, without PyTorch: their choices are names, which are those of the registries."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import datasets
import distributed
import models
from beit_finetuning.modeling_finetune import BEIT_MODELS
from beit_finetuning.views import Augmentation
from evaluation import catalog, heads
from exporting.formats import FORMATS
from flags import finetuning, names, preparing, training
from inputs import cbis
from runtime.command_line import Parser, given_flags, nearest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (
    "main.py", "main_linear.py", "eval_zeroshot.py", "predict.py", "export.py", "make_dataset.py", "make_tables.py",
    "make_report.py", "run_with_submitit.py", "run_with_submitit_linear.py", "run_with_submitit_finetune.py", "demo.py",
    "beit_finetuning/run_class_finetuning.py",
)  # fmt: skip
REFUSED = (
    ("main.py", ["--init", "a", "--resume", "b"], "--resume and --init"),
    ("main.py", ["--model", "SIGLIP_VITT16", "--no-gather-with-grad"], "sigmoid"),
    ("main.py", ["--model", "SIMCLR_VITT16", "--shared-view"], "not SIMCLR_VITT16"),
    ("main.py", ["--patch-dropout", "1"], "--patch-dropout 1: a share from 0 to below 1"),
    ("main.py", ["--warmup-epochs", "3", "--epochs", "2"], "--warmup-epochs 3 is more than --epochs 2"),
    ("main.py", ["--val-fraction", "0.2", "--dataset", "roco"], "--val-fraction is for --dataset csv"),
    ("main.py", ["--evaluate", "--estimate"], "choose one"),
    ("main_linear.py", ["--dataset", "cbis_calc", "--knn", "20"], "--knn is for other sets"),
    ("predict.py", ["zero-shot", "w.pt", "a.png", "--set", "pets", "--labels", "a", "b"], "leave out --labels"),
    ("eval_zeroshot.py", ["--retrieval", "--root", "x", "--datasets", "roco"], "choose one of the two"),
    ("main_linear.py", ["--dataset", "imagenet", "--baseline", "a.csv"], "--cache-features"),
    ("eval_zeroshot.py", ["--root", "x"], "add --retrieval"),
    ("predict.py", ["zero-shot", "w.pt", "a.png", "--labels", "one"], "at least two"),
    ("predict.py", ["embed", "w.pt", "a.png", "--output", "x.csv"], ".npz"),
    ("predict.py", ["classify", "run", "a.png", "--outptu", "x.csv"], "did you mean --output?"),
    ("make_tables.py", ["--seeds", "0", "0"], "a seed is there twice"),
    ("run_with_submitit.py", ["--start-epoch", "9", "--epochs", "3", "--dry-run"], "--start-epoch 9"),
    ("beit_finetuning/run_class_finetuning.py", ["--mixup", "0.8", "--batch_size", "3"], "is odd"),
)
CASES = [(script, (flag,)) for script in SCRIPTS for flag in ("--help", "--wrokers")]
CASES += [(script, tuple(flags)) for script, flags, _ in REFUSED]
# Runs scripts as the command line does, one after the other, and says which slow libraries are there after each.
WATCHED = """
import contextlib, io, json, runpy, sys
found, root = [], sys.path[0]
for path, flags in json.load(sys.stdin):
    sys.argv, sys.path[0], code = [path, *flags], path.rpartition("/")[0], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as left:
            code = left.code
    slow = ("torch", "timm", "transformers", "sklearn", "scipy", "torchvision", "matplotlib", "pandas")
    found.append([code, [name for name in slow if name in sys.modules], out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers():
    """{(script, flags): (exit code, slow libraries that were loaded, standard output, standard error)}."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    asked = json.dumps([(str(ROOT / script), flags) for script, flags in CASES])
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], input=asked, capture_output=True, text=True, check=True, env=environment
    )
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_a_typo_need_no_pytorch(answers, script):
    code, slow, out, _ = answers[script, ("--help",)]
    assert (code, slow) == (0, []) and "usage:" in out
    code, slow, _, err = answers[script, ("--wrokers",)]
    assert (code, slow) == (2, [])
    assert err.startswith("error: ") and err.count("\n") == 1
    if "--workers" in out and "are required" not in err:
        assert "did you mean --workers" in err


@pytest.mark.parametrize("script, flags, said", REFUSED)
def test_what_the_flags_alone_can_refuse_is_refused_without_pytorch(answers, script, flags, said):
    code, slow, _, err = answers[script, tuple(flags)]
    assert (code, slow) == (2, []) and said in err and err.count("\n") == 1


def test_names_are_those_of_the_registries():
    assert list(names.READERS) == list(datasets.READERS)
    assert list(names.OBJECTIVES) == list(models.OBJECTIVES)
    assert {name for name, objective in models.OBJECTIVES.items() if objective.sigmoid} == set(names.SIGMOID)
    assert list(names.MODELS.items()) == [(name, config.objective) for name, config in models.MODELS.items()]
    assert list(names.PRECISIONS) == list(distributed.PRECISIONS)
    assert list(names.BEIT_MODELS) == list(BEIT_MODELS)
    assert list(names.CBIS_SETS) == list(cbis.CBIS_SETS)
    assert (names.CBIS_IMAGES, names.CBIS_COLUMNS) == (cbis.CBIS_IMAGES, cbis.CBIS_COLUMNS)
    assert (names.PROTOCOLS, names.CLASS_WEIGHTS) == (tuple(heads.PROTOCOLS), heads.CLASS_WEIGHTS)
    assert list(names.FORMATS) == list(FORMATS)
    assert names.CATALOG == catalog.CATALOG


def test_defaults_of_fine_tuning_views_are_those_of_the_recipe():
    args = finetuning.get_args_parser().parse_args([])
    given = (args.aa, args.color_jitter, args.train_interpolation, args.reprob, args.remode, args.recount, args.hflip)
    assert Augmentation(*given) == Augmentation()


def test_every_subcommand_of_make_dataset_has_a_module():
    parser = preparing.get_args_parser()
    [commands] = [action.choices for action in parser._actions if action.dest == "command"]
    modules = {name: command.get_default("module") for name, command in commands.items() if name != "demo"}
    assert all((ROOT / "preparation" / f"{module}.py").is_file() for module in modules.values())
    assert len(set(modules.values())) == len(modules)


def test_abbreviations_stay_and_an_unknown_word_is_one_line(capsys):
    parser = Parser("x.py")
    parser.add_argument("--batch-size", type=int)
    assert parser.parse_args(["--batch", "3"]).batch_size == 3
    for argv, said in (
        (["--batch_sise=3"], "no flag --batch_sise: did you mean --batch-size?"),
        (["file.txt"], "nothing is known of file.txt"),
        (["--batch-size", "x"], "argument --batch-size: invalid int value: 'x'"),
    ):
        with pytest.raises(SystemExit) as left:
            parser.parse_args(argv)
        assert left.value.code == 2 and capsys.readouterr().err == f"error: {said} (x.py --help)\n"


def test_only_one_rank_says_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        Parser("x.py").parse_args(["--no-such"])
    assert capsys.readouterr().err == ""


def test_given_flags_are_what_differs_from_the_defaults_and_give_it_again():
    parser = training.get_args_parser()
    argv = ["--lr", "0.001", "--root", "a b", "--no-gather-with-grad", "--override", "x=1", "y=2", "--mask-duplicates"]
    args = parser.parse_args(argv)
    said = given_flags(training.get_args_parser(), args)
    assert parser.parse_args(shlex.split(said)) == args and len(shlex.split(said)) == len(argv)
    assert given_flags(parser, parser.parse_args([])) == "the defaults"


def test_nearest_names_two_only_where_both_are_as_near():
    assert nearest("--modle", ["--model", "--compile"]) == ": did you mean --model?"
    assert nearest("SLIP_VITB61", names.MODELS) == ": did you mean SLIP_VITB16 or SIGLIP_VITB16?"
    assert nearest("zzz", names.MODELS) == ""


def test_predict_loads_no_library_that_only_evaluations_and_other_towers_need():
    code = "import predict, sys; print([m for m in ('sklearn', 'scipy.stats', 'transformers') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
