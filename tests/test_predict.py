"""A run's model on new inputs, and a pool that leaves home with a loader of its own."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fedpilot as package
from fedpilot import Predictor, attachments, data, jobs, lora
from fedpilot.attachments import InstancePool, Pooling
from fedpilot.config.recipe import load_recipe
from fedpilot.errors import ConfigError, DataError, ModelError, RecordError
from fedpilot.model import AdaptedModel, build_model
from fedpilot.pool_export import export_pool
from fedpilot.record import RunDirectory
from fedpilot.types import Deployment
from tests import tiny
from tests.test_cli import NOUNS, fedpilot, save_data, save_model

RECIPE = """
[run]
name = "toy"
rounds = 1

[model]
source = "{model}"
task = "{task}"
rank = 2
max_length = 12

[data]
source = "data.csv"
test_fraction = 0.25
{data}

[partition]
kind = "iid"
num_clients = 2

[clients]
memory = ["1 GiB"]

[training]
learning_rate = 0.01

[algorithm]
name = "{algorithm}"
"""
TEXTS = ["word1 good", "word2 word3 word4 bad bad", "good good", "word9"]
POOL = InstancePool(4, 2, query="mean")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("predict")
    save_model(made / "model")
    save_data(made / "data.csv")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (made / "llama").mkdir(exist_ok=True)
        (made / "llama" / name).write_bytes((made / "model" / name).read_bytes())
    config = LlamaConfig(
        vocab_size=24, hidden_size=24, num_attention_heads=4, num_hidden_layers=2, intermediate_size=40,
        max_position_embeddings=16, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(made / "llama")
    return made


def run_of(
    folder: Path,
    path: Path,
    algorithm: str,
    *,
    model: str = "model",
    task: str = "sequence-classification",
    data: str = "",
) -> tuple[RunDirectory, AdaptedModel, Deployment]:
    """A run directory as a run leaves it, with an adapter that is not as at the start."""
    file = folder / f"{path.name}.toml"
    file.write_text(RECIPE.format(model=model, task=task, algorithm=algorithm, data=data))
    recipe = load_recipe(file)
    labels = [] if task == "causal-lm" else ["bad", "good"]
    adapted = build_model(recipe.model, num_labels=len(labels) or None)
    generator = torch.Generator().manual_seed(3)
    rng = np.random.default_rng(0)
    if algorithm == "fedins":
        start, pool = attachments.init(adapted.spec, POOL, rng), POOL
    else:
        start, pool = lora.init(adapted.spec, dict.fromkeys(adapted.spec.modules, 2), rng), None
    values = {name: tensor + 0.5 * torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()}
    run = RunDirectory.create(path, jobs.facts_of(recipe) | {"label_names": labels})
    deployment = Deployment(values, attachment=pool)
    run.save_adapter("best", deployment, {"round": 1, "metrics": {}})
    run.save_adapter("last", Deployment(start, attachment=pool), {"round": 2, "metrics": {}})
    return run, adapted, deployment


def expected(folder: Path, adapted: AdaptedModel, deployment: Deployment, texts: list[str]) -> torch.Tensor:
    """Probabilities one text at a time."""
    adapted.deploy(deployment)
    rows = data.Rows(np.zeros(len(texts), np.int64), texts=texts)
    encoded = data.encode(rows, task="sequence-classification", model=str(folder / "model"), max_length=12)
    ones = [tiny.logits(adapted, next(encoded.subset([i]).batches(1))) for i in range(len(texts))]
    return torch.cat(ones).softmax(dim=1)


@pytest.mark.parametrize("algorithm", ["fedit", "fedins"])
def test_predictions_are_the_models_and_keep_the_order_of_the_inputs(
    folder: Path, tmp_path: Path, algorithm: str
) -> None:
    _, adapted, deployment = run_of(folder, tmp_path / "run", algorithm)
    shares = expected(folder, adapted, deployment, TEXTS)
    found = package.predict(tmp_path / "run", TEXTS)
    assert [list(one.probabilities) for one in found] == [["bad", "good"]] * 4
    torch.testing.assert_close(
        torch.tensor([list(one.probabilities.values()) for one in found]), shares, rtol=1e-4, atol=1e-5
    )
    assert [one.label for one in found] == [("bad", "good")[i] for i in shares.argmax(dim=1)]


def test_the_last_adapter_is_another_one_than_the_best(folder: Path, tmp_path: Path) -> None:
    run_of(folder, tmp_path / "run", "fedins")
    best, last = (package.predict(tmp_path / "run", TEXTS[:1], which=which) for which in ("best", "last"))  # type: ignore[arg-type]
    assert best[0].probabilities != last[0].probabilities


def test_a_table_needs_the_runs_columns_and_no_classes(folder: Path, tmp_path: Path) -> None:
    run_of(folder, tmp_path / "run", "fedins")
    predictor = Predictor.open(tmp_path / "run")
    table = tmp_path / "new.csv"
    table.write_text("text,more\n" + "\n".join(f"{text},x" for text in TEXTS) + "\n")
    assert predictor.table(table) == predictor.texts(TEXTS)
    table.write_text("words\nword1 good\n")
    with pytest.raises(DataError, match=r"must have a column 'text', got the columns words"):
        predictor.table(table)
    with pytest.raises(DataError, match="a text must not be empty"):
        predictor.texts(["good", " "])


def test_the_command_says_it_as_a_table_as_lines_and_as_a_file(folder: Path, tmp_path: Path) -> None:
    run_of(folder, tmp_path / "run", "fedins")
    given = [part for text in ("[bold]good", "word2 bad") for part in ("--text", text)]
    shown = fedpilot("predict", str(tmp_path / "run"), *given)
    assert shown.exit_code == 0, shown.output
    assert "[bold]good" in shown.output
    lines = fedpilot("predict", str(tmp_path / "run"), *given, "--json").stdout.splitlines()
    records = [json.loads(line) for line in lines]
    assert [set(record) for record in records] == [{"label", "probabilities"}] * 2
    assert all(sum(record["probabilities"].values()) == pytest.approx(1) for record in records)
    table = tmp_path / "out.csv"
    assert fedpilot("predict", str(tmp_path / "run"), *given, "--out", str(table)).exit_code == 0
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [record["label"] for record in records]
    assert float(rows[0]["good"]) == pytest.approx(records[0]["probabilities"]["good"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "inputs must be given as --text or as --data FILE"),
        (["--text", "a", "--data", "b.csv"], "inputs must be given as --text or as --data FILE"),
        (["--text", "a", "--out", "c.txt"], "--out must end in .csv or .jsonl, got c.txt"),
        (["--text", "a", "--client", "client 0"], "--client must be left out for fedit, whose model is the same for"),
    ],
)
def test_what_cannot_be_asked_is_said(folder: Path, tmp_path: Path, arguments: list[str], problem: str) -> None:
    run_of(folder, tmp_path / "run", "fedit")
    result = fedpilot("predict", str(tmp_path / "run"), *arguments)
    assert result.exit_code != 0
    assert problem in " ".join(result.output.split())


def test_a_folder_without_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"manifest\.json must exist"):
        Predictor.open(tmp_path)


def test_a_language_model_goes_on_as_its_own_generation_does(folder: Path, tmp_path: Path) -> None:
    _, adapted, deployment = run_of(folder, tmp_path / "run", "fedit", model="llama", task="causal-lm")
    predictor = Predictor.open(tmp_path / "run")
    (found,) = predictor.texts(["word1 word2"])
    assert found.label is None
    adapted.deploy(deployment)
    adapted.base.eval()
    words = [3, 4]  # word1 and word2
    for _ in range(10):
        with torch.no_grad():
            logits = adapted.logits({"input_ids": torch.tensor([words]), "attention_mask": torch.ones(1, len(words))})
        words.append(int(logits[0, -1].argmax()))
    names = ["[PAD]", "[UNK]", *NOUNS, "good", "bad"]
    assert found.continuation is not None
    assert found.continuation.split() == [names[word] for word in words[2:]]


def test_a_language_model_with_answers_chooses_among_them(folder: Path, tmp_path: Path) -> None:
    columns = 'prompt = "text"\ntext = "label"\nanswers = ["bad", "good"]'
    run = tmp_path / "run"
    _, adapted, deployment = run_of(folder, run, "fedit", model="llama", task="causal-lm", data=columns)
    found = Predictor.open(tmp_path / "run").texts(["word1 word2", "word3"])
    assert [list(one.probabilities) for one in found] == [["bad", "good"]] * 2
    adapted.deploy(deployment)
    adapted.base.eval()
    with torch.no_grad():
        logits = adapted.logits({"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 2)})
    shares = logits[0, -1, [23, 22]].softmax(dim=0)
    torch.testing.assert_close(torch.tensor(list(found[0].probabilities.values())), shares, rtol=1e-4, atol=1e-5)


# --- a pool that is exported --------------------------------------------------------------------------------------

USER = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
assert "fedpilot" not in sys.modules
from load_pool import load
model = load(sys.argv[1])
inputs = torch.load(sys.argv[2])
torch.save(model(**inputs), sys.argv[3])
assert "fedpilot" not in sys.modules and "peft" not in sys.modules
"""


@pytest.mark.parametrize(
    ("family", "pool", "query_blocks"), [("dinov2", "ssf", 0), ("bert", "lora", 0), ("dinov2", "ssf", 1)]
)
def test_an_exported_pool_gives_the_same_logits_in_a_process_without_fedpilot(
    tmp_path: Path, family: str, pool: Any, query_blocks: int
) -> None:
    model = tiny.shared(family)
    query: Pooling = "mean" if family == "bert" else "cls"
    chosen = InstancePool(6, 2, pool=pool, rank=3, query=query, query_blocks=query_blocks)
    start = attachments.init(model.spec, chosen, np.random.default_rng(0))
    generator = torch.Generator().manual_seed(0)
    values = {name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()}
    deployment = Deployment(values, attachment=chosen)
    export_pool(model, deployment, tmp_path / "out", labels=["a", "b", "c"])
    model.deploy(deployment)
    batch = tiny.batch(family, 6)
    torch.save({name: tensor for name, tensor in batch.items() if name != "labels"}, tmp_path / "inputs.pt")
    ours = tiny.logits(model, batch)
    subprocess.run(
        [sys.executable, "-c", USER, *(str(tmp_path / name) for name in ("out", "inputs.pt", "logits.pt"))],
        check=True,
        capture_output=True,
        text=True,
    )
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), ours, rtol=1e-5, atol=1e-5)


def test_export_writes_a_pool_as_a_folder_with_its_loader(folder: Path, tmp_path: Path) -> None:
    run_of(folder, tmp_path / "run", "fedins")
    result = fedpilot("export", str(tmp_path / "run"), str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"pool.safetensors", "pool.json", "load_pool.py", "README.md"}
    assert json.loads((tmp_path / "out" / "pool.json").read_text())["labels"] == ["bad", "good"]
    refused = fedpilot("export", str(tmp_path / "run"), str(tmp_path / "cut"), "--max-rank", "2")
    assert "--max-rank must be left out for a pool" in " ".join(refused.output.split())
    nobodys = fedpilot("export", str(tmp_path / "run"), str(tmp_path / "own"), "--client", "client 0")
    assert "--client must be left out for fedins" in " ".join(nobodys.output.split())


def test_only_a_pool_is_exported_as_one(tmp_path: Path) -> None:
    model = tiny.shared("dinov2")
    with pytest.raises(ModelError, match="an exported pool must be an InstancePool, got NoneType"):
        export_pool(model, Deployment(dict(model.spec.head)), tmp_path, labels=[])


def test_texts_for_a_model_of_images_are_refused(folder: Path, tmp_path: Path) -> None:
    run_of(folder, tmp_path / "run", "fedit")
    predictor = Predictor.open(tmp_path / "run")
    images = predictor.recipe.__class__(**{**vars(predictor.recipe), "model": tiny.settings("dinov2")})
    with pytest.raises(ConfigError, match="texts must go to a model of texts"):
        Predictor(images, predictor.adapted, predictor.labels).texts(["a"])
