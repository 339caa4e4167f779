"""The code on the pages runs, and the site is built of them.

On a page, ``bash`` and ``python`` blocks are run from top to bottom in one folder, and a block with a title is the file
of that name. Blocks without a language are shown only.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedpilot import assets
from tests.test_cli import fedpilot

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHATML = (
    "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)

FAST = ("how-to/own-data.md", "how-to/instructions.md")
RUN = [
    pytest.param(page, marks=() if page in FAST else pytest.mark.slow, id=page)
    for page in sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    if any(language in ("bash", "python") for language, _, _ in BLOCK.findall((DOCS / page).read_text()))
    and page not in ("privacy.md",)  # its lines show a protocol, step by step
]


def blocks(text: str) -> Iterator[tuple[str, str, str]]:
    """Language, title and content of each block with a language."""
    yield from BLOCK.findall(text)


def commands(content: str) -> Iterator[list[str]]:
    """The words of each command; a backslash at the end of a line goes on in the next."""
    for line in content.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def run(page: str, names: dict[str, Any]) -> None:
    """Runs a page's blocks in the current folder."""
    for language, title, content in blocks(page):
        if title:
            Path(title).write_text(content)
        elif language == "bash":
            for program, *arguments in commands(content):
                assert program == "fedpilot", f"{program} cannot be run here; leave its block without a language"
                result = fedpilot(*arguments)
                assert result.exit_code == 0, f"{arguments}: {result.output}"
        elif language == "python":
            exec(compile(content, "page", "exec"), names)


def chat_model(folder: Path) -> None:
    """A small Llama with random weights whose tokenizer has a chat template."""
    words = ["<pad>", "</s>", "<s>", ":", "user", "assistant", "system", "Say", "yes", "no", "Again", "Be", "brief"]
    words += ["Count", "one", "two", "Greet", "hello"]
    known = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=known, pad_token="<pad>", eos_token="</s>", bos_token="<s>", chat_template=CHATML
    ).save_pretrained(folder)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(words), num_hidden_layers=3, **sizes, **tokens)).save_pretrained(
            folder
        )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages take for given."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "minilm-l3-folder").symlink_to(assets.folder("minilm-l3"))
    chat_model(tmp_path / "chat-model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(page: str, folder: Path) -> None:
    run((DOCS / page).read_text(), {})


def test_every_how_to_has_code_that_is_run_or_only_settings() -> None:
    shown = {path.relative_to(DOCS).as_posix() for path in (DOCS / "how-to").glob("*.md")}
    assert {parameter.values[0] for parameter in RUN} >= shown
    assert set(FAST) <= shown


def test_a_page_whose_command_fails_is_noticed(folder: Path) -> None:
    with pytest.raises(AssertionError, match="must be a known key"):
        run("```bash\nfedpilot plan recipes/tiny.toml \\\n  --set run.ronds=1\n```\n", {})


def readme_commands() -> dict[str, list[str]]:
    """First command of a block without a language in the README -> the block's fedpilot commands."""
    found = re.findall(r"^```\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    all_of_them = [[line for line in block.splitlines() if line.startswith("fedpilot ")] for block in found]
    return {lines[0].split()[1]: lines for lines in all_of_them if lines and len(lines[0].split()) > 2}


@pytest.mark.slow
@pytest.mark.parametrize("block", ["plan", "compare"])
def test_the_commands_of_the_readme_run_on_small_data(block: str, folder: Path) -> None:
    text = Path("recipes/tiny.toml").read_text().replace('name = "tiny"', 'name = "my_run"', 1)
    Path("my_recipe.toml").write_text(text)
    for line in readme_commands()[block]:
        result = fedpilot(*shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, f"{line}: {result.output}"


class Loaded(HTMLParser):
    """Collects what a browser would fetch when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.found.append(values["src"] or "")
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.found.append(values.get("href") or "")


def test_the_site_is_built_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted(path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.rglob("*.md"))
    home = (tmp_path / "site" / "index.html").read_text()
    for page in pages:
        assert (tmp_path / "site" / page).exists()
        assert f'href="{page}"' in home, f"{page} is not in the navigation"
        loaded = Loaded()
        loaded.feed((tmp_path / "site" / page).read_text())
        assert loaded.found
        assert not [target for target in loaded.found if "//" in target], page
    assert "fonts.googleapis" not in home
    assert "Returns" in (tmp_path / "site" / "reference" / "python.html").read_text()
