"""Where things live: who may import whom, and how large a file or a function may grow."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A file imports what stands on a step below its own, and its own folder. A new file at the root is a new command or a
# new part of the method: it fails here until someone names its step.
STEPS = (
    ("distributed", "tokenizer", "contrast", "synthetic"),
    ("utils", "losses"),
    ("runtime",),
    ("inputs",),
    ("flags",),
    ("towers", "datasets"),
    ("models",),
    ("evaluation",),
    ("preparation", "reporting", "exporting", "beit_finetuning", "redcaps"),
)
COMMANDS = (
    "main", "main_linear", "eval_zeroshot", "predict", "export", "make_dataset", "make_report", "run_with_submitit",
    "run_with_submitit_linear", "run_with_submitit_finetune", "make_tables", "demo", "hubconf",
)  # fmt: skip
STARTS_OTHERS = ("make_tables", "demo", "run_with_submitit_linear", "run_with_submitit_finetune")
STEP = {part: step for step, parts in enumerate([*STEPS, COMMANDS]) for part in parts}
FOLDERS = sorted(part for part in STEP if (ROOT / part).is_dir())
FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))])
LONGEST_FILE, LONGEST_FUNCTION, MOST_AT_THE_ROOT = 700, 80, 20  # lines; lines; Python files, hubconf.py among them


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: Path) -> str:
    return path.stem if path.parent == ROOT else path.parent.name


def imports(tree: ast.AST) -> list[str]:
    """Dotted names of all that is imported, inside functions too; `from folder import file` is folder.file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf8")) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_what_stands_below_it(path, trees):
    mine = part_of(path)
    assert mine in STEP, f"{path.name} is new at the root: give it a folder, or name its step here"
    if name_of(path) == "beit_finetuning/run_with_submitit_finetune.py":
        return  # BEiT's place for the launcher, which is the root's
    used = {name.partition(".")[0] for name in imports(trees[path])} & set(STEP)
    upward = {part for part in used - {mine} if STEP[part] >= STEP[mine]}
    if mine in STARTS_OTHERS:
        upward -= set(COMMANDS)
    assert not upward, f"{name_of(path)} imports {', '.join(sorted(upward))}, which stands no lower"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_circle_within_a_folder(folder, trees):
    files = {path.stem: path for path in trees if part_of(path) == folder and path.parent != ROOT}
    left = {}
    for name, path in files.items():
        used = [dotted.split(".")[1] for dotted in imports(trees[path]) if dotted.startswith(f"{folder}.")]
        left[name] = set(used) & set(files) - {name}
    while free := [name for name, used in left.items() if not used & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"{folder}/ has a circle among {sorted(left)}"


def test_no_circle_among_the_files_of_one_step(trees):
    """At the root: two files of a step may not import one another (a folder is one part)."""
    for parts in STEPS:
        for part in set(parts) - set(FOLDERS):
            used = {name.partition(".")[0] for name in imports(trees[ROOT / f"{part}.py"])}
            assert not used & (set(parts) - {part}), f"{part}.py imports a file of its own step"


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_what_it_is_for(folder, trees):
    tree = trees[ROOT / folder / "__init__.py"]
    assert ast.get_docstring(tree) and len(tree.body) == 1, f"{folder}/__init__.py is one docstring, nothing else"


def test_the_root_is_a_table_of_contents():
    assert len(list(ROOT.glob("*.py"))) <= MOST_AT_THE_ROOT


def test_files_and_functions_fit_a_reader(trees):
    everything = {**trees}
    for path in [*ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]:
        everything[path] = ast.parse(path.read_text(encoding="utf8"))
    too_long = []
    for path, tree in everything.items():
        if (lines := len(path.read_text(encoding="utf8").splitlines())) > LONGEST_FILE and path.name != "main.py":
            too_long.append(f"{name_of(path)}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                if (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION:
                    too_long.append(f"{name_of(path)}, {node.name}: {lines} lines")
    assert not too_long
