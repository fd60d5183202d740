"""The layout of docs/architecture.md: which module may import which, names, packaging, public signatures."""

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import gpu_check
import pytest
import typer

from fusebert.bench.measure.settings import (
    CalibrateOptions,
    KernelsOptions,
    ParityOptions,
    PredictOptions,
    StepOptions,
    TrainOptions,
    TuneOptions,
)
from fusebert.train.cli import app
from fusebert.train.corpus.settings import PrepareSettings
from fusebert.train.run.settings import PretrainSettings
from fusebert.train.tasks.convert import ConvertSettings
from fusebert.train.tasks.settings import (
    EmbedSettings,
    EvaluateSettings,
    FillSettings,
    FinetuneSettings,
    PredictSettings,
    SummarizeSettings,
)

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "model", "train", "bench")

# From left to right; a module imports modules of its own layer and of layers to its left.
LAYERS = {
    "": FOLDERS,
    "train": ("errors environment options", "text", "corpus", "batches", "step", "run", "tasks", "cli __main__"),
    "bench": ("measure", "operators steps compiled", "report", "cli aot environment readme record sanitize"),
}
OPERATORS = ("attn", "norm", "embedding", "mlm", "gelu")  # in kernels/: they do not import each other

# The launched kernels of a folder or file start with one of these, so that a profile says which operator ran.
KERNEL_PREFIXES = {
    "kernels/attn": ("attn_",),
    "kernels/norm": ("layernorm_",),
    "kernels/embedding": ("embed_layernorm_",),
    "kernels/mlm": ("cross_entropy_", "mlm_"),
    "kernels/gelu.py": ("bias_gelu_",),
    "kernels": ("rows_", "dropout_"),
    "bench/operators": ("linear_gelu_", "gelu_linear_", "attn_"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("fusebert", *(parts[:-1] if parts[-1] == "__init__" else parts)))


SOURCES = {module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def imports_of(name: str) -> set[str]:
    """The modules of the project that module ``name`` imports anywhere, ``if TYPE_CHECKING`` and functions included."""
    package = name if SOURCES[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            ups = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*ups, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in SOURCES else base)
    return {each for each in found if each in SOURCES} - {name}


IMPORTS = {name: imports_of(name) for name in SOURCES}


def layer(module: str, parent: str) -> int | None:
    """Where in LAYERS[parent] the module is; None outside ``parent`` and for the parent package itself."""
    parts = module.split(".")[1:]
    if parent:
        if parts[0] != parent or len(parts) == 1:
            return None
        parts = parts[1:]
    found = [i for i, names in enumerate(LAYERS[parent]) if parts[0] in names.split()]
    assert found, f"{module} is in no layer of {parent or 'the project'}: add it to LAYERS"
    return found[0]


@pytest.mark.parametrize("parent", LAYERS)
def test_imports_go_from_right_to_left(parent):
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if None not in (layer(name, parent), layer(other, parent)) and layer(other, parent) > layer(name, parent)
    ]
    assert wrong == []


def test_operators_do_not_import_each_other():
    def operator(module: str) -> str | None:
        parts = module.split(".")
        return parts[2] if parts[1] == "kernels" and len(parts) > 2 and parts[2] in OPERATORS else None

    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if operator(name) and operator(other) and operator(name) != operator(other)
    ]
    assert wrong == []


def test_no_two_modules_import_each_other():
    """A package's __init__ re-exports its modules, so it is no node of its own: what it imports is followed instead."""

    def targets(module: str, seen: frozenset[str] = frozenset()) -> set[str]:
        found = set()
        for other in IMPORTS[module] - seen:
            found |= targets(other, seen | {other}) if SOURCES[other].name == "__init__.py" else {other}
        return found

    graph = {name: targets(name) for name, path in SOURCES.items() if path.name != "__init__.py"}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def is_jit(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator).split("(")[0].split(".") for decorator in function.decorator_list)


def triton_functions() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and is_jit(node):
                found.setdefault(node.name, []).append(name)
    return found


def launched_names() -> set[str]:
    """Functions in ``name[grid](...)`` or handed to a launcher: where a module has the function, any use but a call."""
    found: set[str] = set()
    for tree in TREES.values():
        nodes = list(ast.walk(tree))
        called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        imported = {alias.asname or alias.name for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
        there = imported | {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        found |= {
            node.id
            for node in nodes
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and id(node) not in called
        } & there
    return found


def test_triton_functions_have_unique_names():
    assert {name: modules for name, modules in triton_functions().items() if len(modules) > 1} == {}


def test_kernels_are_named_after_their_operator():
    launched, wrong = launched_names(), []
    for name, (module, *_) in triton_functions().items():
        if name not in launched:
            continue
        path = SOURCES[module].relative_to(ROOT).as_posix()
        folder = max((each for each in KERNEL_PREFIXES if path.startswith(each)), key=len)
        if not name.startswith(KERNEL_PREFIXES[folder]):
            wrong.append(f"{path}: {name}")
    assert wrong == []


PACKAGES = [name for name, path in SOURCES.items() if path.name == "__init__.py"]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_has_the_name_of_a_function_of_its_package(package):
    submodules = {name.rpartition(".")[2] for name in SOURCES if name.rpartition(".")[0] == package}
    defined = {
        alias.asname or alias.name
        for node in ast.walk(TREES[package])
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert submodules & defined == set()


def test_only_packages_list_their_names():
    lists = [
        name
        for name, tree in TREES.items()
        if SOURCES[name].name != "__init__.py"
        and any(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" for node in tree.body)
    ]
    assert lists == []


def test_tests_use_public_names():
    """A test that imports, reads or patches an underscore name breaks whenever the code is tidied."""

    def private(names: list[str]) -> list[str]:
        return [name for name in names if name.startswith("_") and not name.startswith("__")]

    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        ours, names = set(), []
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fusebert"):
                ours |= {alias.asname or alias.name for alias in node.names}
                names += [alias.name for alias in node.names]
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
                names.append(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("fusebert."):
                names += node.value.split(".") if node.value.replace(".", "").isidentifier() else []
        wrong += [f"{path.relative_to(ROOT)}: {name}" for name in private(names)]
    assert wrong == []


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory) -> Path:
    """The wheel, built from the repository and unpacked."""
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # building leaves build/ behind, which must not hold files of an older layout
    source.mkdir()
    for name in (*FOLDERS, "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "unpacked")
    return out / "unpacked"


def test_the_wheel_holds_every_file(unpacked_wheel):
    def files(root: Path) -> set[str]:
        found = (path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file())
        kept = (path for path in found if path.suffix in (".py", ".sh", ".html", ".typed"))
        return {path.relative_to(root).as_posix() for path in kept}

    assert files(unpacked_wheel / "fusebert") == files(ROOT)


def test_the_source_hash_covers_every_file(unpacked_wheel):
    """Results name the sources that they were measured on: a change in any file must show."""
    script = (
        "import pathlib, sys, fusebert.train.environment as environment\n"
        "root = pathlib.Path(environment.__file__).parents[1]\n"
        "assert root == pathlib.Path(sys.argv[1]), root\n"
        "before = environment.source_sha256()\n"
        "for path in sorted(root.rglob('*.py')):\n"
        "    text = path.read_text()\n"
        "    path.write_text(text + '# changed\\n')\n"
        "    if environment.source_sha256() == before:\n"
        "        print(path)\n"
        "    path.write_text(text)\n"
        "assert environment.source_sha256() == before\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(unpacked_wheel / "fusebert")],
        env={"PYTHONPATH": str(unpacked_wheel), "PYTHONSAFEPATH": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, ""), run.stderr


def public_signatures() -> list[str]:
    lines = []
    for package in ("fusebert.kernels", "fusebert.model"):
        module = importlib.import_module(package)
        for name in sorted(module.__all__):
            value = getattr(module, name)
            if not callable(value):
                lines.append(f"{package}.{name}: {type(value).__name__}")
                continue
            lines.append(f"{package}.{name}{inspect.signature(value)}")
            if inspect.isclass(value):
                members = {n: m for n, m in vars(value).items() if not n.startswith("_")}
                fields = {f.name for f in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
                for member, each in sorted(members.items()):
                    function = getattr(each, "__func__", each)
                    if inspect.isfunction(function):
                        lines.append(f"{package}.{name}.{member}{inspect.signature(function)}")
                    elif member not in fields:
                        lines.append(f"{package}.{name}.{member}")
    return lines


def test_what_gpu_check_leaves_out_exists():
    """A pattern of a test that has another name by now leaves out nothing, or the wrong test."""
    tests = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    for pattern in (*gpu_check.CANNOT_RUN, *gpu_check.FAILING):
        file, _, test = pattern.partition("::")
        name = re.match(r"\w*", test).group()
        found = [path for path, text in tests.items() if fnmatch(path.relative_to(ROOT).as_posix(), file)]
        assert any(re.search(rf"def {name}", tests[path]) for path in found), pattern


def test_public_signatures_are_those_of_the_snapshot():
    """A change here breaks users: write it into CHANGELOG.md and into the snapshot, on purpose."""
    snapshot = Path(__file__).with_name("public_signatures.txt")
    assert public_signatures() == snapshot.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (("prepare",), PrepareSettings),
        (("pretrain",), PretrainSettings),
        (("finetune",), FinetuneSettings),
        (("predict",), PredictSettings),
        (("embed",), EmbedSettings),
        (("fill",), FillSettings),
        (("evaluate",), EvaluateSettings),
        (("summarize",), SummarizeSettings),
        (("convert",), ConvertSettings),
        (("bench", "kernels"), KernelsOptions),
        (("bench", "step"), StepOptions),
        (("bench", "train"), TrainOptions),
        (("bench", "parity"), ParityOptions),
        (("bench", "tune"), TuneOptions),
        (("bench", "predict"), PredictOptions),
        (("bench", "calibrate"), CalibrateOptions),
    ],
)
def test_settings_and_command_line_options_are_the_same(words, settings):
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    options = {parameter.name: parameter for parameter in command.params}
    fields = {field.name: field for field in dataclasses.fields(settings)}
    assert options.keys() == fields.keys()
    for name, field in fields.items():
        if field.default is not dataclasses.MISSING:
            assert options[name].default == field.default, name
        assert options[name].help, name
