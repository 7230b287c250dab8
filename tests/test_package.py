"""The package as a whole: which part knows which, what it promises to export, and how it is built."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import torchdrop
from tests import ROOT
from torchdrop.kernels import native

PACKAGE = ROOT / "torchdrop"

RANKS = {
    "_version": 0,
    "_extras": 0,
    "core.checks": 0,
    "core.hooks": 0,
    "core.torch_inductor": 0,
    "core.torch_state": 0,
    "core.names": 0,
    "kernels": 1,
    "losses": 1,
    "rules": 1,
    "schedules": 1,
    "random": 1,
    "seeding": 2,
    "ops": 2,
    "core": 3,
    "layers": 4,
    "functional": 5,
    "handlers": 5,
    "monte_carlo": 6,
    "configure": 6,
    "scheduler": 7,
    "acquisition": 7,
    "aids": 7,
    "calibrate": 7,
    "tune": 7,
    "": 8,
    "integrations": 9,
    "demo": 9,
    "docs": 9,
    "__main__": 9,
}
"""A part imports parts of its own rank or lower; a file may have a rank of its own. The empty name is ``import
torchdrop`` itself."""

TWINS = ["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"]
CLASS_TWINS = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"]

OF_A_CALL = {
    "input", "training", "x", "weight", "branch", "edge_index", "edge_weight", "num_nodes", "protected", "new", "old",
    "residual", "bias",
}  # fmt: skip
"""What a function is given at each call, and a layer in its forward."""

WITHOUT_A_CLASS = {
    "drop_edge_weight", "drop_key_mask", "local_reparameterization", "masksembles_masks", "masksembles_predict",
    "multi_sample_loss", "patch_dropout_indices", "scaled_dot_product_attention", "sparse_variational_kl",
    "variational_kl",
}  # fmt: skip

POSITIONS_OF_TORCH_NN = {"torchdrop.functional.embedding_dropout": "torchdrop.EmbeddingDropout"}
"""A function, and its class, which has the positions of a class of torch.nn without a rate: p is a keyword of it."""

needs_tree = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the tests lie outside a source tree")


FRAGMENT = re.compile(r"""(?:^\s*|[.:] |# |\"{3})(?:Of|Those of|That of) [a-z`]""")
"""The beginning of a sentence without a subject."""

QUESTION = re.compile(r"(What|Where|Which|How)\b")
"""The beginning of a docstring that is a clause, as in "What `audit` found.", and not a description."""


def sources() -> list[Path]:
    found = sorted(PACKAGE.rglob("*.py"))
    assert PACKAGE / "__init__.py" in found
    return found


def guides() -> list[Path]:
    found = sorted(PACKAGE.rglob("*.md"))
    assert PACKAGE / "monte_carlo" / "README.md" in found
    return found


def docstrings(source: str) -> Iterator[str]:
    """Yields the docstrings of a file: those of modules, classes, functions and attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield inspect.cleandoc(node.value.value)


def part_of(module: str) -> str | None:
    """The part of torchdrop that a dotted name lies in, or None where it is another package."""
    names = module.split(".")
    if names[0] != "torchdrop":
        return None
    if ".".join(names[1:3]) in RANKS and len(names) > 2:
        return ".".join(names[1:3])
    here = PACKAGE / names[1] if len(names) > 1 else PACKAGE
    return names[1] if len(names) > 1 and (here.is_dir() or here.with_suffix(".py").exists()) else ""


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, anywhere in it, relative ones resolved."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def python(*args: str, cwd: Path, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs this Python there. Its package comes from `cwd` only if PYTHONPATH says so."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=clean | environment, timeout=timeout, capture_output=True, text=True
    )


class TestImports:
    def test_resolution(self, tmp_path: Path) -> None:
        """The check itself: every form of import is seen."""
        assert part_of("torchdrop.kernels.mask_params.MaskParams") == "kernels"
        assert part_of("torchdrop.random.draw_key") == "random"
        assert part_of("torchdrop.Dropout") == part_of("torchdrop") == ""
        assert part_of("torch.nn") is None
        found = set(imports(PACKAGE / "ops" / "fast_path.py"))
        assert {"torchdrop.kernels", "torchdrop.random", "torchdrop.kernels.mask_params.MaskParams", "torch"} <= found

    def test_point_one_way(self) -> None:
        wrong = []
        for path in sources():
            top = path.parent == PACKAGE
            own = path.stem if top else part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
            own = "" if own == "__init__" else own
            assert own in RANKS, f"{own} is new: give it a rank here"
            for name in imports(path):
                part = part_of(name)
                alone = own in ("schedules", "rules") and name.split(".")[0] in ("torch", "torchdrop")
                if alone or (part is not None and RANKS[part] > RANKS[own]):
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
        assert wrong == []

    @pytest.mark.slow
    def test_importing_the_package_loads_nothing_for_demonstrations(self, tmp_path: Path) -> None:
        script = (
            "import sys, json, torch; before = set(sys.modules); import torchdrop;"
            "print(json.dumps(sorted(set(sys.modules) - before)))"
        )
        run = python("-c", script, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        loaded = set(json.loads(run.stdout))
        assert {"torchdrop.layers.dropout", "torchdrop.kernels.native"} <= loaded
        heavy = {"sklearn", "matplotlib", "scipy", "tqdm", "transformers", "triton", "torch._dynamo", "torch._inductor"}
        assert not loaded & {*heavy, "torchdrop.demo"}
        assert run.stderr == ""


def public() -> dict[str, Any]:
    names = {f"torchdrop.{name}": getattr(torchdrop, name) for name in torchdrop.__all__}
    names |= {f"torchdrop.functional.{n}": getattr(torchdrop.functional, n) for n in torchdrop.functional.__all__}
    own = {n: v for n, v in vars(torchdrop.losses).items() if getattr(v, "__module__", "") == "torchdrop.losses"}
    names |= {f"torchdrop.losses.{name}": value for name, value in own.items() if not name.startswith("_")}
    return names


def class_of(function: str) -> type | None:
    """The class of which a function has the name, in small letters and with underscores, maybe after apply_."""
    classes = {name.lower(): value for name, value in vars(torchdrop).items() if isinstance(value, type)}
    return classes.get(function.split(".")[-1].removeprefix("apply_").replace("_", ""))


def kinds(value: Any) -> dict[str, str]:
    """How each argument of a function or class is given: by position, or as a keyword alone."""
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return {}
    arguments = inspect.signature(value).parameters.values()
    return {one.name: "keyword" if one.kind is one.KEYWORD_ONLY else "position" for one in arguments}


class TestPublicNames:
    @pytest.mark.parametrize("module", [torchdrop, torchdrop.functional], ids=lambda module: module.__name__)
    def test_contents_are_complete_and_sorted(self, module: ModuleType) -> None:
        found = {
            name for name, value in vars(module).items()
            if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
        }  # fmt: skip
        assert found <= set(module.__all__)
        assert list(module.__all__) == sorted(set(module.__all__))

    def test_have_a_docstring_with_an_example(self) -> None:
        docs = {
            name: (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__) or ""
            for name, value in public().items() if not inspect.ismodule(value)
        }  # fmt: skip
        assert "torchdrop.Dropout" in docs
        assert [name for name, doc in docs.items() if ">>> " not in doc] == []
        assert [name for name, value in public().items() if not value.__doc__] == []

    @pytest.mark.parametrize("name", TWINS)
    def test_functions_take_their_twins_arguments(self, name: str) -> None:
        ours = list(inspect.signature(getattr(torchdrop.functional, name)).parameters.values())
        stock = list(inspect.signature(getattr(nn.functional, name)).parameters.values())
        assert len(stock) == 4
        for mine, theirs in zip(ours, stock, strict=False):
            assert (mine.name, mine.kind, mine.default) == (theirs.name, theirs.kind, theirs.default)
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in ours[4:])

    @pytest.mark.parametrize("name", CLASS_TWINS)
    def test_classes_take_their_twins_arguments(self, name: str) -> None:
        ours = list(inspect.signature(getattr(torchdrop, name)).parameters.values())
        stock = list(inspect.signature(getattr(nn, name)).parameters.values())
        assert [parameter.name for parameter in stock] == ["p", "inplace"]
        for mine, theirs in zip(ours, stock, strict=False):
            assert (mine.name, mine.kind, mine.default) == (theirs.name, theirs.kind, theirs.default)
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in ours[2:])

    def test_function_and_class_share_their_keywords(self) -> None:
        apart = set()
        for name in torchdrop.functional.__all__:
            function = inspect.signature(getattr(torchdrop.functional, name)).parameters
            layer = class_of(name)
            if layer is None or set(function) - OF_A_CALL != set(inspect.signature(layer).parameters):
                apart.add(name)
        assert apart == WITHOUT_A_CLASS | {"concrete_dropout", "embedding_dropout", "masksembles", "standout"}

    def test_a_function_and_its_class_agree_on_positional_arguments(self) -> None:
        apart = {}
        pairs = [name for name, value in public().items() if inspect.isfunction(value) and class_of(name)]
        for name in pairs:
            function, layer = kinds(public()[name]), kinds(class_of(name))
            shared = function.keys() & layer.keys()
            assert shared, name
            ours, theirs = ([(one, kind) for one, kind in of.items() if one in shared] for of in (function, layer))
            if ours != theirs:
                apart[name] = f"{ours} and {theirs}"
        assert len(pairs) > 30
        assert apart.keys() == POSITIONS_OF_TORCH_NN.keys(), apart

    def test_keep_prob_is_the_first_keyword(self) -> None:
        before = {}
        for name, value in public().items():
            keywords = [argument for argument, kind in kinds(value).items() if kind == "keyword"]
            if "keep_prob" in keywords:
                before[name] = keywords[: keywords.index("keep_prob")]
        assert len(before) > 60
        assert {name for name, first in before.items() if first} == set(POSITIONS_OF_TORCH_NN.values())
        assert all(first in ([], ["p"]) for first in before.values())

    def test_docstrings_list_arguments_in_their_order(self) -> None:
        wrong, listed = [], 0
        for name, value in public().items():
            described = re.search(r"^Args:\n((?:    .*\n|\n(?=    ))*)", inspect.getdoc(value) or "", re.M)
            lines = re.findall(r"^    (\w[\w, ]*):", described[1] if described else "", re.M)
            own = list(kinds(value))
            order = [own.index(argument) for line in lines for argument in line.split(", ") if argument in own]
            listed += len(order)
            if order != sorted(order):
                wrong.append(name)
        assert listed > 300
        assert wrong == []

    def test_rates_are_typed(self) -> None:
        rates = {
            f"{name}({one.name})": one.annotation for name, value in public().items() if kinds(value)
            for one in inspect.signature(value).parameters.values() if one.name in ("p", "drop_prob", "keep_prob")
        }  # fmt: skip
        assert "torchdrop.DropPath(drop_prob)" in rates
        numbers = {name for name, annotation in rates.items() if annotation == "float"}
        assert numbers == {name for name in rates if name.startswith("torchdrop.Variational")}
        assert {rates[name] for name in rates.keys() - numbers} == {"Probability", "Probability | None"}

    def test_version_is_the_installed_one(self) -> None:
        assert torchdrop.__version__ == importlib.metadata.version("torchdrop")

    @needs_tree
    def test_version_is_the_one_in_the_citation_and_the_newest_change(self) -> None:
        cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
        newest = re.search(r"^## (\S+) - ", (PACKAGE / "CHANGELOG.md").read_text(), re.M)
        assert cited is not None
        assert newest is not None
        assert cited[1] == newest[1] == torchdrop.__version__

    def test_is_typed(self) -> None:
        assert Path(torchdrop.__file__).with_name("py.typed").is_file()


class TestSources:
    def test_files_hold_one_idea(self) -> None:
        """A file of more lines is split by idea."""
        lines = {path.name: len(path.read_text().splitlines()) for path in sources()}
        assert {name: count for name, count in lines.items() if count > 400} == {}

    def test_prose_is_made_of_sentences(self) -> None:
        """No docstring or comment has a fragment that begins with "Of", and no docstring begins as a question."""
        found = []
        for path in sources():
            source = path.read_text()
            lines = [line for line in source.splitlines() if FRAGMENT.search(line)]
            lines += [text.splitlines()[0] for text in docstrings(source) if QUESTION.match(text)]
            found += [f"{path.relative_to(PACKAGE)}: {line}" for line in lines]
        assert found == []

    def test_fragments_are_found(self) -> None:
        assert FRAGMENT.search('    """Of one step."""')
        assert FRAGMENT.search("    # Those of the places")
        assert FRAGMENT.search("It is kept. That of a part is not.")
        assert not FRAGMENT.search("Those who draw; the sum of them. Often it is.")
        source = '''"""Whatever it is."""\nclass A:\n    """What it is."""\nB = 1\n"""How many."""\n'''
        assert {text for text in docstrings(source) if QUESTION.match(text)} == {"What it is.", "How many."}

    def test_name_no_place_on_a_machine(self) -> None:
        files = [p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".c", ".h", ".toml", ".md")]
        texts = ("pyproject.toml", "setup.py", "README.md", "benchmarks/README.md")
        files += [ROOT / name for name in texts if (ROOT / name).exists()]
        assert any(p.suffix == ".c" for p in files)
        place = re.compile(r"(?<![\w.])/(?:home|root|Users|work|workspace|tmp)\b")
        assert place.search("see /home/someone and /work/shop") is not None
        found = [f"{p.name}: {line}" for p in files for line in p.read_text().splitlines() if place.search(line)]
        assert found == []

    @needs_tree
    def test_every_package_is_listed_for_the_build(self) -> None:
        tomllib = pytest.importorskip("tomllib")
        listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
        there = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
        assert set(listed) == there


def copy_of_package(to: Path) -> Path:
    """The package's Python files alone, without the compiled library."""
    unwanted = shutil.ignore_patterns("_native.*", "__pycache__", "csrc", "build")
    shutil.copytree(PACKAGE, to / "torchdrop", ignore=unwanted)
    return to / "torchdrop"


WITHOUT_NATIVE = """
import json, torch, torchdrop, warnings
from torchdrop import kernels
x = torch.ones(50_000, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    torchdrop.available_backends()
    with torchdrop.use_backend("aten"):
        torchdrop.Dropout()(x)
    quiet = not caught
    torchdrop.Dropout()(x), torchdrop.Dropout()(x)
told = [str(warning.message) for warning in caught]
served = kernels.backend_for(x.device, x.dtype).NAME
layers = [torchdrop.Dropout(), torchdrop.AlphaDropout(), torchdrop.GaussianDropout()]
equal = []
for layer in layers:
    for size in (64, 50_000):
        torch.manual_seed(1)
        y = layer(x[:size])
        torch.manual_seed(1)
        equal.append(torch.equal(layer(x[:size]), y) and not torch.equal(y, x[:size]))
y = torchdrop.Dropout()(x)
(slope,) = torch.autograd.grad(y.sum(), x)
try:
    with torchdrop.use_backend("native"):
        refused = ""
except RuntimeError as error:
    refused = str(error)
with torchdrop.use_backend("reference"):
    reference = torchdrop.Dropout()(x).unique().tolist()
print(json.dumps([
    torchdrop.__file__, torchdrop.available_backends(), served, all(equal), y.unique().tolist(), torch.equal(y, slope),
    y.mean().item(), refused, reference, quiet, told,
]))
"""


class TestWithoutNativeKernels:
    @pytest.mark.slow
    @pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
    def test_works_and_says_why(self, tmp_path: Path, broken: bool) -> None:
        package = copy_of_package(tmp_path)
        if broken:
            name = "_native.dll" if sys.platform == "win32" else "_native.so"
            (package / "kernels" / name).write_bytes(b"no library")
        run = python("-W", "error", "-c", WITHOUT_NATIVE, cwd=tmp_path, PYTHONPATH=str(tmp_path))
        assert run.returncode == 0, run.stderr
        file, reasons, served, replays, values, linear, mean, refused, reference, quiet, told = json.loads(run.stdout)
        assert Path(file).resolve() == (package / "__init__.py").resolve()
        (why,) = reasons["native"]
        assert ("could not be loaded" if broken else "its C kernels were not built") in why
        assert "pip install --no-cache-dir --force-reinstall --no-deps torchdrop" in why
        assert quiet
        assert len(told) == 1
        assert told[0].endswith(f"The reason: {why}")
        assert reasons["aten"] == reasons["reference"] == []
        assert served == "aten"
        assert replays
        assert linear
        assert values == reference == [0.0, 2.0]
        assert abs(mean - 1.0) < 0.05
        assert refused == f"the native backend cannot serve this: {why}"


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("libgomp.so.1: cannot open shared object file: No such file or directory", "OpenMP runtime libgomp.so.1"),
        ("Library not loaded: @rpath/libomp.dylib", "OpenMP runtime libomp.dylib"),
        ("/home/libgomp-x/_native.so: invalid ELF header", "could not be loaded"),
    ],
)
def test_a_missing_openmp_runtime_is_named(said: str, named: str) -> None:
    assert named in native._unloaded(OSError(said))


def build(tree: Path, *command: str, **environment: str) -> Path:
    """Runs a build of a copy of the source tree; the one file that it makes."""
    pytest.importorskip("setuptools", "77", reason="building needs setuptools")
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    unwanted = shutil.ignore_patterns("_native.*", "__pycache__")
    shutil.copytree(PACKAGE, tree / "torchdrop", ignore=unwanted)
    run = python(*command, cwd=tree, **environment)
    assert run.returncode == 0, run.stdout + run.stderr
    (made,) = (tree / "out").iterdir()
    return made


WHEEL = ("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", "out")
SDIST = ("-c", "import os; os.mkdir('out'); from setuptools import build_meta; build_meta.build_sdist('out')")


@needs_tree
@pytest.mark.slow
class TestBuild:
    def test_without_a_compiler(self, tmp_path: Path) -> None:
        wheel = build(tmp_path / "tree", *WHEEL, CC="/nonexistent")
        names = zipfile.ZipFile(wheel).namelist()
        assert "torchdrop/py.typed" in names
        assert "torchdrop/kernels/native.py" in names
        assert not [name for name in names if "_native" in name]

    @pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
    def test_with_a_compiler(self, tmp_path: Path) -> None:
        """The wheel holds all of the package and the library, and works where it is unpacked."""
        compiler = tmp_path / "cc"
        compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CC", "cc")} "$@" -O0\n')  # in a third of the time
        compiler.chmod(0o755)
        wheel = build(tmp_path / "tree", *WHEEL, CC=str(compiler))
        assert re.fullmatch(r"torchdrop-.+-py3-none-(?!any).+\.whl", wheel.name)
        names = set(zipfile.ZipFile(wheel).namelist())
        assert names >= {str(path.relative_to(ROOT)) for path in [*sources(), *guides()]}
        assert "torchdrop/py.typed" in names
        assert [name for name in names if "_native" in name] == ["torchdrop/kernels/_native.so"]
        assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
        zipfile.ZipFile(wheel).extractall(tmp_path / "site")
        script = (
            "import torchdrop, torch; torch.manual_seed(1); y = torchdrop.Dropout()(torch.ones(100_000));"
            "print(torchdrop.__file__, torchdrop.available_backends()['native'], y.sum().item())"
        )
        run = python("-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
        torch.manual_seed(1)
        expected = torchdrop.Dropout()(torch.ones(100_000)).sum().item()
        assert run.stdout.split() == [str(tmp_path / "site" / "torchdrop" / "__init__.py"), "[]", str(expected)], (
            run.stderr
        )

    def test_source_distribution_has_what_the_build_needs(self, tmp_path: Path) -> None:
        made = build(tmp_path / "tree", *SDIST)
        shutil.unpack_archive(made, tmp_path / "unpacked")
        (tree,) = (tmp_path / "unpacked").iterdir()
        needed = [
            *sources(),
            *guides(),
            *(PACKAGE / "kernels" / "csrc").iterdir(),
            PACKAGE / "py.typed",
            *(ROOT / name for name in ("setup.py", "LICENSE", "CITATION.cff")),
        ]
        missing = [str(p.relative_to(ROOT)) for p in needed if not (tree / p.relative_to(ROOT)).exists()]
        assert missing == []
