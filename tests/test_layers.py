"""The order of the house: imports run downwards, heavy libraries come late, and some things are not done at all."""

import ast
import itertools
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "kvcache", "attention", "server")  # each may import those before it
OURS = (*LAYERS, "gossamer")
SOURCES = [
    *(path for layer in LAYERS for path in sorted((ROOT / layer).glob("**/*.py"))),
    *sorted((ROOT / "gossamer").glob("*.py")),  # the folders in there are links to those above
]
TEXT_ENDINGS = {".py", ".toml", ".md", ".yaml", ".yml", ".jinja", ".txt", ".json", ".cfg", ".sh"}
TEXT_NAMES = {"Makefile", "Dockerfile", ".dockerignore", ".gitignore", "run"}
TEXT_FOLDERS = (*OURS, "tests", "docs", "benchmarks", "deploy", ".ci")
LONGEST_FILE = 450  # lines
VAGUE = {"util", "utils", "helper", "helpers", "manager", "handler", "wrapper", "impl", "misc", "common"}


def module_of(path: pathlib.Path) -> str:
    """`kernels/triton/store.py` is gossamer.kernels.triton.store."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "gossamer" else ("gossamer", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: pathlib.Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a file imports, at whatever depth; `from a import b` gives a.b."""
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "importlib.import_module", "__import__"}:
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


def called(node: ast.Call) -> str:
    """The dotted name of what is called; "" when it has none."""
    names: list[str] = []
    target: ast.AST = node.func
    while isinstance(target, ast.Attribute):
        names.append(target.attr)
        target = target.value
    return ".".join([target.id, *reversed(names)]) if isinstance(target, ast.Name) else ""


def upward_imports(path: pathlib.Path, source: str) -> list[str]:
    """Imports of a layer above the file's own, and imports of ours by any other name than gossamer's."""
    layer = module_of(path).split(".")[1] if "." in module_of(path) else ""
    above = LAYERS[LAYERS.index(layer) + 1 :] if layer in LAYERS else ()
    wrong = []
    for line, name in imports_of(path, ast.parse(source)):
        parts = name.split(".")
        if parts[0] in (*LAYERS, "tests", "benchmarks"):
            wrong.append(f"{path}:{line} imports {name}, which is not below gossamer")
        elif parts[0] == "gossamer" and len(parts) > 1 and parts[1] in above:
            wrong.append(f"{path}:{line} imports {name}, which is above {layer}")
    return wrong


def forbidden_calls(path: pathlib.Path, source: str) -> list[str]:
    """Ways to run code that came as data, and switches that open such a way."""
    tree = ast.parse(source)
    wrong = [
        f"{path}:{line} imports {name}"
        for line, name in imports_of(path, tree)
        if name.split(".")[0] in {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    ]
    bases = {c.name: {ast.unparse(b) for b in c.bases} for c in ast.walk(tree) if isinstance(c, ast.ClassDef)}
    safe_loaders = {"yaml.SafeLoader", *(name for name, of in bases.items() if of == {"yaml.SafeLoader"})}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        truths = {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is True}
        if name in {"eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load", "os.getenv"}:
            wrong.append(f"{path}:{node.lineno} calls {name}")
        if name == "yaml.load" and not safe_loaders & {
            ast.unparse(k.value) for k in node.keywords if k.arg == "Loader"
        }:
            wrong.append(f"{path}:{node.lineno} calls yaml.load without a safe loader")
        if name == "torch.load" and "weights_only" not in truths:
            wrong.append(f"{path}:{node.lineno} calls torch.load without weights_only=True")
        wrong += [f"{path}:{node.lineno} sets {k}" for k in sorted(truths & {"trust_remote_code", "shell"} - {None})]
    return wrong


def vague_names(path: pathlib.Path, source: str) -> list[str]:
    """Files, classes and functions whose name does not say what they are."""
    names = [(0, part) for part in path.relative_to(ROOT).with_suffix("").parts]
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    names += [(node.lineno, node.name) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [
        f"{path}:{line} {name}"
        for line, name in names
        if VAGUE & {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
    ]


def text_files() -> Iterator[pathlib.Path]:
    below = (path for folder in TEXT_FOLDERS for path in (ROOT / folder).glob("**/*"))
    for path in itertools.chain(ROOT.glob("*"), below):
        if path.is_file() and (path.suffix in TEXT_ENDINGS or path.name in TEXT_NAMES):
            yield path


def test_the_folders_are_there() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(OURS)


def test_imports_run_downwards() -> None:
    assert [wrong for path in SOURCES for wrong in upward_imports(path, path.read_text())] == []


@pytest.mark.parametrize(
    "source",
    [
        "from gossamer.server.engine.request import Request",
        "def f():\n    import gossamer.server.config",
        "from ..server import config",
        "from .. import server",
        "import importlib\nimportlib.import_module('gossamer.server.cli')",
        "from kernels.layout import PagedKV",
    ],
)
def test_an_upward_import_is_seen(source: str) -> None:
    assert len(upward_imports(ROOT / "attention" / "example.py", source)) == 1
    assert upward_imports(ROOT / "attention" / "example.py", "from gossamer.kernels.layout import PagedKV") == []


def test_no_code_from_data() -> None:
    assert [wrong for path in SOURCES for wrong in forbidden_calls(path, path.read_text())] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from dill import loads",
        "eval('1')",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "load('x', trust_remote_code=True)",
        "subprocess.run('x', shell=True)",
        "yaml.load('x')",
        "class Mine(yaml.Loader): ...\nyaml.load('x', Loader=Mine)",
    ],
)
def test_a_forbidden_call_is_seen(source: str) -> None:
    assert len(forbidden_calls(ROOT / "server" / "example.py", source)) == 1
    allowed = "model.eval()\ntorch.load('x', weights_only=True)\nyaml.load('x', Loader=yaml.SafeLoader)"
    assert forbidden_calls(ROOT / "server" / "example.py", allowed) == []


def test_names_say_what_is_inside() -> None:
    assert [wrong for path in SOURCES for wrong in vague_names(path, path.read_text())] == []


def test_a_vague_name_is_seen() -> None:
    assert len(vague_names(ROOT / "server" / "utils.py", "class PageManager: ...\ndef run_helper(): ...")) == 3
    assert vague_names(ROOT / "server" / "commonality.py", "def implement(): ...") == []


def test_files_can_be_read_in_one_sitting() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_no_paths_of_one_machine() -> None:
    one_machine = re.compile(r"(?<![\w.~$}])/(?:root|work|home|Users)/[\w.]")
    wrong = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if path.name != "tokenizer.json" and one_machine.search(line)
    ]
    assert wrong == []


def test_triton_is_imported_below_its_own_folder_only() -> None:
    wrong = [
        f"{path}:{line} imports {name}"
        for path in SOURCES
        for line, name in imports_of(path, ast.parse(path.read_text()))
        if name.split(".")[0] == "triton" and (ROOT / "kernels" / "triton") not in path.parents
    ]
    assert wrong == []


def run_python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints, started away from the repository so that only the installed package is found."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_everything_but_the_gpu_kernels_is_imported_without_triton() -> None:
    names = [module_of(path) for path in SOURCES]
    names = [name for name in names if not name.startswith("gossamer.kernels.triton.") and name != "gossamer.__main__"]
    code = (
        "import importlib, sys\n"
        "sys.modules['triton'] = None\n"  # importing it fails from now on
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(sorted(name for name in sys.modules if name.startswith('gossamer.kernels.triton.')))"
    )
    assert run_python(code, *names) == "[]\n"


@pytest.mark.parametrize("arguments", ["--help", "serve --help", "policy show --help", "bench kernels --help"])
def test_help_comes_without_torch(arguments: str) -> None:
    code = (
        "import sys\n"
        "from gossamer.server.cli import main\n"
        "sys.argv[0] = 'gossamer'\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers', 'fastapi', 'triton', 'matplotlib'} & sys.modules.keys()))"
    )
    printed = run_python(code, *arguments.split())
    assert "Usage" in printed
    assert printed.strip().endswith("[]")
