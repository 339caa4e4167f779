import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedpilot


def test_the_public_names_are_sorted_and_listed_once() -> None:
    assert sorted(set(fedpilot.__all__)) == fedpilot.__all__
    assert set(fedpilot.__all__) <= set(dir(fedpilot))


def test_the_public_names_are_those_that_have_a_home_and_the_version() -> None:
    assert {*fedpilot._HOME_OF, "__version__"} == set(fedpilot.__all__)


@pytest.mark.parametrize("name", fedpilot.__all__)
def test_a_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(fedpilot, name)
    assert name in ("ALGORITHMS", "__version__") or value.__doc__


def test_type_checkers_see_the_same_names_in_the_same_homes() -> None:
    tree = ast.parse(Path(fedpilot.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: str(node.module).removeprefix("fedpilot.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == fedpilot._HOME_OF


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'FedPilto'"):
        _ = fedpilot.FedPilto


def test_importing_the_package_imports_no_heavy_library() -> None:
    code = "import sys, fedpilot; print([n for n in ('torch', 'numpy', 'transformers', 'peft') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
