"""Importing libraries without PyTorch's compiler, which takes nearly as long as PyTorch and which few runs ask for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
UTILS = f"{COMPILER}.utils"


def defer_compiler() -> None:
    """From here to `end_deferral`, importing torchvision and timm does not import the compiler.

    torchvision wants one function of it by name (0.29, ops/roi_align.py), timm its decorator `disable` (1.0.31,
    models/naflexvit.py). They get stand-ins that load it when they are called; for the latter PyTorch itself has one.
    Whatever else is asked of the compiler loads it at once, as without this.
    """
    if COMPILER in sys.modules:
        return
    compiler, utils = _NotLoaded(COMPILER), _NotLoaded(UTILS)
    compiler.__path__ = []
    vars(compiler).update(utils=utils, disable=_disable)
    vars(utils).update(is_compile_supported=_is_compile_supported)
    sys.modules.update({COMPILER: compiler, UTILS: utils})
    sys.meta_path.insert(0, _Finder())


def end_deferral() -> None:
    """Take the stand-ins away: who asks for the compiler from here on has it loaded."""
    for name in (COMPILER, UTILS):
        if isinstance(sys.modules.get(name), _NotLoaded):
            del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]


def _disable(fn: Callable | None = None, recursive: bool = True, **how: Any) -> Any:
    if "wrapping" in how:  # PyTorch's own deferral asks, whose time has come: a function that it decorates is called
        end_deferral()
        return importlib.import_module(COMPILER).disable(fn, recursive, **how)
    import torch

    return torch._disable_dynamo(fn, recursive)


def _is_compile_supported(device_type: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return is_compile_supported(device_type)


class _NotLoaded(ModuleType):
    """In place of a module of the compiler: gives what was put there, and loads the module for anything else."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's questions
            raise AttributeError(name)
        end_deferral()
        return getattr(importlib.import_module(self.__name__), name)


class _Finder(MetaPathFinder):
    """Finds the compiler's other modules: it is loaded first, and may have imported the one that is sought."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if not fullname.startswith(f"{COMPILER}."):
            return None
        end_deferral()
        compiler = importlib.import_module(COMPILER)
        if fullname in sys.modules:
            # Taken out, or the import system would take the module's own spec and run its file once more.
            return ModuleSpec(fullname, _Loaded(sys.modules.pop(fullname)))
        return PathFinder.find_spec(fullname, compiler.__path__)


class _Loaded(Loader):
    """Loads a module that is there already, as it is."""

    def __init__(self, module: ModuleType):
        self.module, self.found_by = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.found_by
