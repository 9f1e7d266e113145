"""Scripts start without PyTorch's compiler and without looking for garbage; whoever wants the former gets it whole."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import ROOT, environment

from runtime import imports

# Each script's imports as `answer_flags` leaves the process before them, then what was deferred, in real use.
SCRIPTS = """
import sys
from runtime.imports import defer_compiler, end_deferral
defer_compiler()
import eval_zeroshot, export, main, main_linear, make_report, make_tables, predict
import beit_finetuning.run_class_finetuning
end_deferral()
assert not [name for name in sys.modules if name.startswith(("torch._dynamo", "torch.distributed.fsdp", "sympy"))]
assert "transformers" not in sys.modules
import torch
from timm.layers.typing import disable_compiler
assert disable_compiler(lambda x: x + 1)(2) == 3
assert sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu") in (True, False)
assert torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(2)).tolist() == [2, 2]
assert type(sys.modules["torch._dynamo"]).__name__ == "module"
"""
# What PyTorch decorates, called while the compiler is deferred.
EARLY = """
from runtime.imports import defer_compiler, end_deferral
defer_compiler()
import torch
optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
end_deferral()
optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
assert len(optimizer.param_groups) == 2
import torch._dynamo.config as config
assert torch._dynamo.utils.config is config
"""
# What is imported is no garbage, and what is made afterwards is collected.
GARBAGE = """
import argparse, gc, sys, weakref
from runtime.command_line import answer_flags, run_script
sys.argv = ["script"]
class Ring:
    def __init__(self): self.itself = self
seen = []
answer_flags(argparse.ArgumentParser(), lambda args: seen.append(gc.isenabled()))
assert seen == [True] and not gc.isenabled()
imported = Ring()
def main():
    assert gc.isenabled() and gc.get_freeze_count() > 1000 and not any(o is imported for o in gc.get_objects())
    ring = weakref.ref(Ring())
    gc.collect()
    assert ring() is None
    seen.append("ran")
run_script(main)
assert seen == [True, "ran"]
"""


@pytest.mark.parametrize("code", [SCRIPTS, EARLY, GARBAGE], ids=["scripts", "early", "garbage"])
def test_scripts_start_without_the_compiler_which_works_when_it_is_asked(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert not done.returncode, done.stderr


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A small package in the compiler's place, which imports one of its modules by itself."""
    package = tmp_path / "slow_compiler"
    package.mkdir()
    (package / "__init__.py").write_text("from . import first\nheld = first\nimported = True\nutils = None\n")
    (package / "first.py").write_text("")
    (package / "second.py").write_text("from slow_compiler import imported\n")
    (package / "utils.py").write_text("is_compile_supported = other = 'theirs'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "COMPILER", "slow_compiler")
    monkeypatch.setattr(imports, "UTILS", "slow_compiler.utils")
    imports.defer_compiler()
    yield
    imports.end_deferral()
    for name in [name for name in sys.modules if name.partition(".")[0] == "slow_compiler"]:
        del sys.modules[name]


def is_loaded() -> bool:
    return "slow_compiler.first" in sys.modules


def test_what_is_put_there_loads_nothing_and_anything_else_the_compiler(compiler):
    import slow_compiler  # pyright: ignore[reportMissingImports]

    assert slow_compiler.disable is imports._disable
    assert not hasattr(slow_compiler, "__wrapped__") and not is_loaded()
    assert slow_compiler.imported is True and is_loaded()
    import slow_compiler as again  # pyright: ignore[reportMissingImports]

    assert again is not slow_compiler and again.imported


@pytest.mark.parametrize("name", ["first", "second", "utils"])
def test_other_modules_of_the_compiler_are_imported_once(compiler, name):
    if name == "utils":
        from slow_compiler.utils import other  # pyright: ignore[reportMissingImports]

        assert other == "theirs"
        return
    module = __import__(f"slow_compiler.{name}", fromlist=["*"])
    assert module is sys.modules[f"slow_compiler.{name}"] and module.__spec__.origin == module.__file__
    loaded = sys.modules["slow_compiler"]
    assert loaded.held is loaded.first is sys.modules["slow_compiler.first"]


def test_a_module_that_the_compiler_lacks_is_named_and_nothing_is_left_behind(compiler):
    with pytest.raises(ModuleNotFoundError, match="slow_compiler.third"):
        import slow_compiler.third  # pyright: ignore[reportMissingImports]  # noqa: F401
    assert not [finder for finder in sys.meta_path if isinstance(finder, imports._Finder)]
