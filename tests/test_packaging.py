"""What pip gets: versions that fit together, and a wheel and an sdist that hold everything."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from fedpilot import data
from fedpilot.data import DataSettings
from fedpilot.errors import DataError, FedpilotError
from fedpilot.report import plots
from tests.test_cli import fedpilot

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
RUNTIME_ONLY = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}


def requirements() -> Iterator[Requirement]:
    """Of the library, of its extras and of its build."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    extras = PROJECT["optional-dependencies"].values()
    yield from map(Requirement, [*build, *PROJECT["dependencies"], *(line for lines in extras for line in lines)])


def test_every_requirement_has_a_pin_that_it_allows() -> None:
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        if name == "fedpilot":
            assert requirement.extras <= PROJECT["optional-dependencies"].keys()
        else:
            assert requirement.specifier.contains(pins[name]), f"{requirement} against {pins[name]}"


def test_pins_are_sorted_and_each_package_has_one() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(lines, key=str.lower)
    assert len({canonicalize_name(line.split("==")[0]) for line in lines}) == len(lines)


def test_the_extras_that_the_pages_name_are_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.py")]
    named = {
        name
        for page in pages
        for found in re.findall(r"fedpilot\[([\w,-]+)\]", page.read_text())
        for name in found.split(",")
    }
    assert {"flower", "dp", "report", "vision", "dev", "mlflow", "wandb", "docs"} <= PROJECT[
        "optional-dependencies"
    ].keys()
    assert named <= PROJECT["optional-dependencies"].keys()


def test_importing_the_package_imports_nothing_but_the_standard_library() -> None:
    code = "import sys; before = set(sys.modules); import fedpilot; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded - sys.stdlib_module_names == {"fedpilot"}


def test_the_command_line_starts_without_bitsandbytes() -> None:
    code = (
        "import atexit, sys; atexit.register(lambda: print(sys.modules['bitsandbytes'])); from fedpilot.cli import main"
    )
    call = [sys.executable, "-c", f"{code}; sys.argv[1:] = ['--version']; main()"]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "None"


def test_the_citation_has_what_its_format_asks_for() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    assert found["license"] == PROJECT["license"] == "Apache-2.0"
    assert all(entry.get("name") or entry.get("family-names") for entry in found["authors"])


# --- extras that are not there ------------------------------------------------------------------------------------

OF_EXTRAS = {"matplotlib", "PIL", "opacus", "dp_accounting", "onnx", "gguf", "mlflow", "wandb", "cryptography"}


def imported_at_once(tree: ast.Module) -> set[str]:
    """Packages that a module imports when it is imported; what only type checkers read does not count."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


def test_no_module_needs_an_extra_to_be_imported() -> None:
    package = ROOT / "src" / "fedpilot"
    for path in package.rglob("*.py"):
        if not path.is_relative_to(package / "engines" / "flower"):  # an extra as a whole
            assert imported_at_once(ast.parse(path.read_text())) & OF_EXTRAS == set(), path


def test_images_without_the_extra_say_which_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images.csv").write_text("image,label\na.png,x\nb.png,y\n")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"images must have Pillow, got: .*; pip install 'fedpilot\[vision\]'"):
        data.load(DataSettings(str(tmp_path / "images.csv"), "image-classification"))


def test_pictures_without_the_extra_say_which_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    with pytest.raises(FedpilotError, match=r"pictures must have matplotlib, .*; pip install 'fedpilot\[report\]'"):
        plots.partition_map(np.ones((2, 3), dtype=np.int64), ["a", "b"], ["x", "y", "z"], tmp_path / "x.png")
    result = fedpilot("plan", str(ROOT / "recipes" / "tiny.toml"), "--out", str(tmp_path / "plan"))
    assert result.exit_code == 0, result.output
    assert "pip install 'fedpilot[report]'" in result.stderr
    assert not (tmp_path / "plan").exists()


# --- wheel and sdist ----------------------------------------------------------------------------------------------


def plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in RUNTIME_ONLY}


def hatch(folder: Path, out: Path, kind: str) -> Path:
    """Builds from a folder; the file."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    (made,) = out.iterdir()
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel of the checkout, and an sdist."""
    root = tmp_path_factory.mktemp("built")
    return hatch(ROOT, root / "wheel", "wheel"), hatch(ROOT, root / "sdist", "sdist")


def test_the_wheel_holds_the_package_its_types_its_templates_the_recipes_and_the_licence(
    built: tuple[Path, Path],
) -> None:
    found = contents(built[0])
    sources = {
        f"fedpilot/{path.relative_to(ROOT / 'src' / 'fedpilot').as_posix()}" for path in (ROOT / "src").rglob("*.py")
    }
    recipes = {f"fedpilot/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.toml")}
    assert sources | recipes | {"fedpilot/py.typed", "fedpilot/report/templates/report.css"} <= found.keys()
    (info,) = {name.partition("/")[0] for name in found if ".dist-info/" in name}
    assert found[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"fedpilot = fedpilot.cli:main" in found[f"{info}/entry_points.txt"]
    assert not [name for name in found if not name.startswith(("fedpilot/", info))]
    assert Version(info.removeprefix("fedpilot-").removesuffix(".dist-info")) >= Version("0.1.0.dev0")


def test_the_sdist_builds_the_same_wheel_without_the_history(built: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    assert {"CITATION.cff", "README.md", "Makefile", "docs", "tests", "recipes"} <= {
        path.name for path in folder.iterdir()
    }
    assert contents(hatch(folder, tmp_path / "out", "wheel")) == contents(built[0])


@pytest.fixture(scope="module")
def clean(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Scripts of a new environment with the wheel and what it asks for, no extras."""
    root = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", str(root / "venv")], check=True)
    pip = [
        str(root / "venv" / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "-c",
        str(ROOT / "constraints.txt"),
    ]
    for what in (f"torch=={PINS['torch']}", str(built[0])):
        subprocess.run([*pip, what], cwd=root, check=True, env=plain_environment())
    yield root / "venv" / "bin"
    shutil.rmtree(root / "venv")  # gigabytes


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(clean: Path, built: tuple[Path, Path], tmp_path: Path) -> None:
    def output(*command: str) -> str:
        done = subprocess.run(
            [str(clean / command[0]), *command[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=plain_environment(),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "No broken requirements" in output("python", "-m", "pip", "check")
    code = "import fedpilot, json; print(json.dumps([fedpilot.__file__, fedpilot.__version__]))"
    place, version = json.loads(output("python", "-c", code))
    assert Path(place).is_relative_to(clean.parent)
    assert built[0].name.startswith(f"fedpilot-{version}-")
    assert "every public name" in output(
        "python", "-c", "import fedpilot; [getattr(fedpilot, n) for n in fedpilot.__all__]; print('every public name')"
    )
    assert "minilm-l3" in output("fedpilot", "assets", "--list")
    recipe = Path(place).parent / "recipes" / "tiny.toml"
    output("python", "-c", f"import fedpilot; fedpilot.load_recipe({str(recipe)!r})")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3, "hidden_size": 64}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96, "vocab_size": 100}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    shown = output("fedpilot", "profile", "--model", "model", "--task", "causal-lm", "--batch", "2", "--length", "16")
    assert "Peak by block" in shown
