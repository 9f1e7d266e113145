"""float32 linear layers by oneDNN: values and gradients against float64, where they are taken, that a run keeps to
them, and how the machine is asked.
"""

import copy
import json
import os

import numpy as np
import pytest
import torch
from distributed_helpers import free_port
from helpers import assert_same_run, command, stop_after
from model_helpers import tiny_model, write_checkpoint
from roco_tree import make_roco
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import distributed
import eval_zeroshot
import main
import main_linear
import predict
from beit_finetuning import run_class_finetuning
from evaluation import linear_sgd
from runtime.logs import read_rows
from towers import onednn
from towers.prompts import TextCache

BY_ONEDNN = distributed.Processes(precision=distributed.ONEDNN)
pytestmark = pytest.mark.skipif(not distributed.onednn_is_there(), reason="a torch without oneDNN")


def seeded(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def layer(into=160, out=192, bias=True):
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(into, out, bias))
    onednn.place(found, BY_ONEDNN)
    assert type(found[0]) is onednn.OneDNNLinear
    return found[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (17,), (300,), (4, 77), (2, 3, 40)])
def test_values_and_gradients_are_those_of_float64(shape, bias):
    ours, x, up = layer(bias=bias), seeded(*shape, 160).requires_grad_(), seeded(*shape, 192)
    exact, y = copy.deepcopy(ours).double(), x.detach().double().requires_grad_()
    out, expected = ours(x), exact(y)
    out.backward(up)
    expected.backward(up.double())
    found = [out, x.grad, *(p.grad for p in ours.parameters())]
    for value, other in zip(found, [expected, y.grad, *(p.grad for p in exact.parameters())], strict=True):
        assert value.dtype == torch.float32 and other.dtype == torch.float64
        assert (value - other).norm() < 2e-6 * other.norm()


def test_what_is_fixed_gets_no_gradient_and_a_block_may_be_run_again():
    ours, x = layer(), seeded(200, 160).requires_grad_()
    ours(x).sum().backward()
    expected = x.grad.clone(), ours.weight.grad.clone()
    x.grad = ours.weight.grad = None
    checkpoint(ours, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(ours.weight.grad, expected[1])
    ours.requires_grad_(False)
    ours.weight.grad = x.grad = None
    out = ours(x)
    assert [None if t is None else t.shape for t in out.grad_fn.saved_tensors] == [None, ours.weight.shape]
    out.sum().backward()
    assert ours.weight.grad is None and torch.equal(x.grad, expected[0])
    ours.requires_grad_(True)
    assert [t is None for t in ours(x.detach()).grad_fn.saved_tensors] == [False, True]


def test_anything_but_float32_on_a_cpu_is_computed_as_ever():
    ours = layer()
    usual = nn.Linear(160, 192)
    usual.load_state_dict(ours.state_dict())
    x = seeded(9, 160)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16 and torch.equal(ours(x), usual(x))
    assert torch.equal(ours.double()(x.double()), usual.double()(x.double()))
    ours.float()
    assert ours(x[0]).shape == (192,) and ours(x[:0]).shape == (0, 192)
    assert ours.to("meta")(x.to("meta")).shape == (9, 192)


def test_which_layers_ask_it():
    class Own(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.ModuleDict({"wide": nn.Linear(128, 130), "narrow": nn.Linear(512, 64), "own": Own(128, 128),
                           "read": nn.Linear(128, 128)})  # fmt: skip
    parametrize.register_parametrization(model["read"], "weight", nn.Identity())
    names, kinds = list(model.state_dict()), {name: type(module) for name, module in model.items()}
    onednn.place(model, BY_ONEDNN)
    assert {name for name, module in model.items() if type(module) is not kinds[name]} == {"wide"}
    assert list(model.state_dict()) == names
    assert type(copy.deepcopy(model)["wide"]) is onednn.OneDNNLinear
    onednn.place(model, distributed.Processes())
    assert {name: type(module) for name, module in model.items()} == kinds


LINEAR = torch.nn.functional.linear


def slow(x, weight):
    for _ in range(20):
        found = LINEAR(x, weight)
    return found


@pytest.mark.parametrize("way", [slow, lambda x, weight: (x.bfloat16() @ weight.bfloat16().T).float()])
def test_a_slower_and_a_less_exact_one_do_not_pay(way, monkeypatch):
    monkeypatch.setattr(distributed, "onednn_linear", way)
    assert not distributed.onednn_pays.__wrapped__()


def test_a_faster_and_exact_one_pays(monkeypatch):
    monkeypatch.setattr(distributed, "onednn_linear", lambda x, weight: LINEAR(x, weight))
    with monkeypatch.context() as patch:
        patch.setattr(distributed.F, "linear", slow)
        assert distributed.onednn_pays.__wrapped__()
    monkeypatch.setattr(distributed, "onednn_is_there", lambda: False)
    assert not distributed.onednn_pays.__wrapped__()
    with pytest.raises(ValueError, match="no oneDNN for the CPU; take fp32"):
        distributed.resolve_precision(distributed.ONEDNN, torch.device("cpu"))


def test_it_is_asked_by_one_thread_which_others_cannot_hold_up(monkeypatch):
    seen, threads = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        multiply = distributed.onednn_linear
        monkeypatch.setattr(
            distributed, "onednn_linear", lambda *given: seen.append(torch.get_num_threads()) or multiply(*given)
        )
        distributed.onednn_pays.__wrapped__()
        assert set(seen[:7]) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def roco(tmp_path_factory):
    return make_roco(tmp_path_factory.mktemp("roco"))


def wide(roco, folder, *extra):
    """A run whose projection head has layers that are wide enough."""
    return command(roco, folder, "--epochs", "2", "--ssl-mlp-dim", "128", "--ssl-emb-dim", "128", *extra)


def precision_of(folder):
    return json.loads((folder / "settings.json").read_text())["derived"]["precision"]


@pytest.mark.parametrize("first, then", [(True, False), (False, True)])
def test_a_run_goes_on_with_the_library_that_it_began_with(roco, tmp_path, monkeypatch, first, then):
    """Whatever the machine would choose; the same command, and bit for bit."""
    monkeypatch.setattr(distributed, "onednn_pays", lambda: first)
    main.main(wide(roco, tmp_path / "unbroken"))
    with monkeypatch.context() as patch:
        patch.setattr(main, "finish_epoch", stop_after(main.finish_epoch))
        with pytest.raises(KeyboardInterrupt):
            main.main(wide(roco, tmp_path / "run"))
    monkeypatch.setattr(distributed, "onednn_pays", lambda: then)
    main.main(wide(roco, tmp_path / "run"))
    assert_same_run(tmp_path / "unbroken", tmp_path / "run")
    assert precision_of(tmp_path / "run") == ("fp32-onednn" if first else "fp32")


def test_both_ways_have_the_same_losses(roco, tmp_path, monkeypatch):
    calls = []
    multiply = onednn.onednn_linear
    monkeypatch.setattr(onednn, "onednn_linear", lambda *tensors: calls.append(tensors) or multiply(*tensors))
    losses = []
    for precision in ("fp32", "fp32-onednn"):
        main.main(wide(roco, tmp_path / precision, "--precision", precision))
        assert bool(calls) == (precision != "fp32") and precision_of(tmp_path / precision) == precision
        losses.append([row["loss"] for row in read_rows(tmp_path / precision / "log.jsonl", "train")])
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_every_script_asks_it_or_not_as_the_precision_says(roco, tmp_path, monkeypatch):
    calls, multiply = [], onednn.onednn_linear
    monkeypatch.setattr(onednn, "onednn_linear", lambda *tensors: calls.append(tensors) or multiply(*tensors))
    monkeypatch.setattr(onednn, "NARROWEST", 8)  # of towers that are small enough for a test
    monkeypatch.setattr(distributed, "onednn_pays", lambda: True)
    main.main(command(roco, tmp_path / "run", "--epochs", "1"))
    weights, here = str(tmp_path / "run" / "checkpoint.pt"), ["--gpu", "-1", "-j", "0"]
    image = str(next((roco / "train" / "radiology" / "images").iterdir()))
    commands = {
        "training": lambda p: main.main(command(roco, tmp_path / f"again{p}", "--epochs", "1", *p)),
        "validation": lambda p: main.main(["--evaluate", "--resume", weights, "--dataset", "roco", "--root", str(roco),
                                           *here, "--output-dir", str(tmp_path / "run"), *p]),
        "probe": lambda p: main_linear.main(["--dataset", "digits", "--cache-features", "--pretrained", weights, *here,
                                             "--resamples", "9", "--output-dir", str(tmp_path / f"probe{p}"), *p]),
        "zero-shot": lambda p: eval_zeroshot.main(["--resume", weights, "--datasets", "digits", *here, "--output-dir",
                                                   str(tmp_path / f"words{p}"), *p]),
        "fine-tuning": lambda p: run_class_finetuning.main([
            "--data_set", "digits", "--finetune", weights, "--epochs", "1", "--warmup_epochs", "0", "--batch_size",
            "512", "--num_workers", "0", "--gpu", "-1", "--output_dir", str(tmp_path / f"tuned{p}"), *p]),
        "classify": lambda p: predict.main(["classify", str(tmp_path / f"probe{p}"), image, "--gpu", "-1"]),
        "classify, fine-tuned": lambda p: predict.main(["classify", str(tmp_path / f"tuned{p}"), image, "--gpu", "-1"]),
        "embed": lambda p: predict.main(["embed", weights, image, "--output", str(tmp_path / "bank.npz"), *p]),
        "search": lambda p: predict.main(["search", str(tmp_path / "bank.npz"), "--text", "a chest", *p]),
    }  # fmt: skip
    for name, run in commands.items():
        for precision, asks in (([], True), (["--precision", "fp32"], False)):
            calls.clear()
            run(precision)
            assert bool(calls) == asks, name
    for precision in ("fp32", "fp32-onednn"):
        p = [] if precision == "fp32-onednn" else ["--precision", precision]
        assert precision_of(tmp_path / f"probe{p}") == precision_of(tmp_path / f"tuned{p}") == precision
        results = [tmp_path / f"{name}{p}" / "results.json" for name in ("probe", "tuned")]
        assert {json.loads(file.read_text())["settings"]["precision"] for file in results} == {precision}
        assert json.loads((tmp_path / f"words{p}" / "zeroshot.json").read_text())["precision"] == precision
        commands["embed"](p)
        assert str(np.load(tmp_path / "bank.npz")["precision"]) == precision
        results[1].unlink()  # of a run that was stopped: its checkpoint says it as well
        calls.clear()
        commands["classify, fine-tuned"](p)
        assert bool(calls) == (precision == "fp32-onednn")


def tuning(folder):
    weights = folder.parent / "weights.pt"
    if not weights.exists():
        write_checkpoint(weights, "vit")
    return run_class_finetuning.main([
        "--data_set", "digits", "--epochs", "2", "--warmup_epochs", "0", "--batch_size", "512", "--num_workers", "0",
        "--gpu", "-1", "--finetune", str(weights), "--resamples", "9", "--model_ema", "--output_dir", str(folder),
    ])  # fmt: skip


@pytest.mark.parametrize("first, then", [(True, False), (False, True)])
def test_a_fine_tuning_goes_on_with_the_library_that_it_began_with(tmp_path, monkeypatch, first, then):
    monkeypatch.setattr(onednn, "NARROWEST", 8)
    monkeypatch.setattr(distributed, "onednn_pays", lambda: first)
    whole = tuning(tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        patch.setattr(run_class_finetuning, "finish_epoch", stop_after(run_class_finetuning.finish_epoch))
        with pytest.raises(KeyboardInterrupt):
            tuning(tmp_path / "run")
    monkeypatch.setattr(distributed, "onednn_pays", lambda: then)
    calls, multiply = [], onednn.onednn_linear
    monkeypatch.setattr(onednn, "onednn_linear", lambda *tensors: calls.append(tensors) or multiply(*tensors))
    assert tuning(tmp_path / "run") == whole and bool(calls) == first
    assert_same_run(tmp_path / "unbroken", tmp_path / "run")
    assert precision_of(tmp_path / "run") == ("fp32-onednn" if first else "fp32")


def test_a_probe_by_sgd_is_not_continued_by_another_library(tmp_path, monkeypatch):
    argv = ["--dataset", "digits", "--arch", "test_vit", "--gpu", "-1", "-j", "0", "--epochs", "2", "--resamples", "9"]
    argv += ["--image-size", "160", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(distributed, "onednn_pays", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(linear_sgd, "save_sgd", stop_after(linear_sgd.save_sgd))
        with pytest.raises(KeyboardInterrupt):
            main_linear.main(argv)
    monkeypatch.setattr(distributed, "onednn_pays", lambda: False)
    with pytest.raises(ValueError, match="precision: 'fp32-onednn' there, 'fp32' now"):
        main_linear.main(argv)
    assert main_linear.main([*argv, "--precision", "fp32-onednn"])["settings"]["precision"] == "fp32-onednn"


def test_text_features_of_the_two_are_kept_apart(tmp_path):
    model = tiny_model("CLIP")
    caches = [TextCache.of(model, processes, tmp_path) for processes in (distributed.Processes(), BY_ONEDNN)]
    assert caches[0].model != caches[1].model


def _joined(rank, world, port, choices):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    distributed.onednn_pays = lambda: choices[rank]
    processes = distributed.init_distributed(main.get_args_parser().parse_args([]))
    assert (processes.rank, processes.precision) == (rank, "fp32-onednn" if choices[0] else "fp32")
    distributed.gather_objects(processes, None)  # both have come
    distributed.leave_distributed(processes)


@pytest.mark.parametrize("choices", [(True, False), (False, True)])
def test_all_processes_do_as_the_first(choices):
    torch.multiprocessing.start_processes(_joined, (2, free_port(), choices), nprocs=2, start_method="fork")


def test_a_compiled_run_has_products_of_its_own(roco, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "onednn_pays", lambda: True)
    args = main.get_args_parser().parse_args(wide(roco, tmp_path, "--compile"))
    assert args.compile
    processes = distributed.init_distributed(args)
    assert processes.precision == "fp32-onednn"
    monkeypatch.setattr(main.utils, "compile_towers", lambda *_, **__: None)
    learner = main.prepare_learner(args, processes, main.build_model(args)[0])
    assert learner.processes.precision == "fp32"
    assert not any(isinstance(module, onednn.OneDNNLinear) for module in learner.model.modules())
