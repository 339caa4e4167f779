import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedpilot import assets, base_deltas, lora
from fedpilot.client import ClientModel
from fedpilot.errors import ModelError
from fedpilot.export import export_peft, folded
from fedpilot.model import ModelSettings, build_model
from fedpilot.training import TrainingSettings
from fedpilot.types import BaseDelta, Deployment
from tests import tiny

CASES: Mapping[str, tuple[str, list[int] | None]] = {
    "bert-mixed": ("bert", None),
    "bert-some": ("bert", [1, 10]),
    "vit-mixed": ("vit", None),
    "dinov2-some": ("dinov2", [0, 2]),
    "llama-mixed": ("llama", None),
    "llama-some": ("llama", [2]),
    "gpt2-mixed": ("gpt2", None),
    "clip-mixed": ("clip", None),
    "llama-classifier-some": ("llama-classifier", [0, 2]),
    "bert-merged": ("bert", []),
    "llama-merged": ("llama", [2]),
    "gpt2-merged": ("gpt2", [0, 1, 2]),
}
"""Name -> family and the blocks that have adapters; of the merged ones the base has changed too, in every block."""

PLAIN_USER = """
import json, sys, warnings
warnings.simplefilter("error", UserWarning)
from pathlib import Path
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
import torch

transformers.logging.disable_progress_bar()
for line in Path(sys.argv[1]).read_text().splitlines():
    folder, auto_class, options = json.loads(line)
    folder = Path(folder)
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = getattr(transformers, auto_class).from_pretrained(base, **options)
    model = PeftModel.from_pretrained(model, folder).eval()
    inputs = load_file(folder / "inputs.safetensors")
    with torch.no_grad():
        save_file({"logits": model(**inputs).logits}, folder / "outputs.safetensors")
assert "fedpilot" not in sys.modules
"""

AUTO = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
}


def export_case(case: str, root: Path) -> tuple[Path, torch.Tensor]:
    """Exports a case with its inputs beside it; returns the folder and fedpilot's own logits."""
    family, blocks = CASES[case]
    adapted = tiny.build(family) if case.endswith("merged") else tiny.shared(family)
    base = tiny.changed_base(adapted) if case.endswith("merged") else BaseDelta()
    deployment = Deployment(tiny.random_tensors(adapted, tiny.mixed_ranks(adapted, blocks), seed=len(case)), base)
    folder = export_peft(adapted, deployment, root / case, facts={"rounds": 7})
    inputs = {name: tensor for name, tensor in tiny.batch(family).items() if name != "labels"}
    save_file(inputs, folder / "inputs.safetensors")
    adapted.deploy(deployment)
    return folder, tiny.logits(adapted, inputs)


def plain_logits(root: Path, exported: list[tuple[Path, str]]) -> dict[Path, torch.Tensor]:
    """Logits of the exported folders in one process that never imports fedpilot."""
    lines = []
    for folder, task in exported:
        options = {} if task == "causal-lm" else {"num_labels": tiny.NUM_LABELS}
        lines.append(json.dumps([str(folder), AUTO[task], options]))
    (root / "cases").write_text("\n".join(lines))
    command = [sys.executable, "-c", PLAIN_USER, str(root / "cases")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {folder: load_file(folder / "outputs.safetensors")["logits"] for folder, _ in exported}


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Case -> fedpilot's logits, and those of a process that has only transformers and peft."""
    root = tmp_path_factory.mktemp("exports")
    exported = {case: export_case(case, root) for case in CASES}
    tasks = [(folder, tiny.SETTINGS[CASES[case][0]].task) for case, (folder, _) in exported.items()]
    plain = plain_logits(root, tasks)
    return {case: (own, plain[folder]) for case, (folder, own) in exported.items()}


@pytest.mark.parametrize("case", CASES)
def test_an_export_gives_the_same_logits_without_fedpilot(
    case: str, logits: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    own, plain = logits[case]
    torch.testing.assert_close(plain, own, rtol=0, atol=1e-5)
    assert own.std() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task", "blocks", "pooler"),
    [
        ("minilm-l3", "sequence-classification", 3, True),
        ("minilm-l6", "sequence-classification", 6, False),
        ("dinov2-s", "image-classification", 12, False),
        ("smollm2-135m", "causal-lm", 30, False),
    ],
)
def test_real_weights_are_trained_and_exported(name: str, task: Any, blocks: int, pooler: bool, tmp_path: Path) -> None:
    settings = ModelSettings(assets.resolve(name), task, max_length=12, image_size=56 if "dinov2" in name else None)
    adapted = build_model(settings, num_labels=None if task == "causal-lm" else tiny.NUM_LABELS)
    assert adapted.spec.num_blocks == blocks
    assert any("pooler" in tensor for tensor in adapted.spec.head) is pooler
    work = tiny.task(adapted, tiny.mixed_ranks(adapted, [0, 1, blocks - 1]))
    rows = tiny.Rows(tuple({key: tensor[0] for key, tensor in adapted.made_up_batch(1).items()} for _ in range(6)))
    client = ClientModel(adapted, rows, TrainingSettings(learning_rate=1e-3, batch_size=2), learning_rate=1e-3, seed=0)
    client.load(work)
    assert client.fit(work.plan.trainable)["steps"] == 3
    deployment = Deployment(client.read())
    folder = export_peft(adapted, deployment, tmp_path / "adapter")
    inputs = {key: tensor for key, tensor in adapted.made_up_batch(2).items() if key != "labels"}
    save_file(inputs, folder / "inputs.safetensors")
    adapted.deploy(deployment)
    own = tiny.logits(adapted, inputs)
    # Random pairs make logits of dozens: what is compared is their first five digits.
    torch.testing.assert_close(plain_logits(tmp_path, [(folder, task)])[folder], own, rtol=1e-5, atol=1e-5)


def test_the_files_say_exactly_which_module_has_which_rank(tmp_path: Path) -> None:
    folder, _ = export_case("bert-some", tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    adapted = tiny.shared("bert")
    ranks = tiny.mixed_ranks(adapted, [1, 10])
    assert config["rank_pattern"] == ranks
    assert config["alpha_pattern"] == {module: 1.5 * rank for module, rank in ranks.items()}
    assert sorted(config["target_modules"]) == sorted(ranks)
    assert config["modules_to_save"] == ["classifier"]
    assert config["base_model_name_or_path"] == str(tiny.folder("bert"))
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 6, "SEQ_CLS")
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == 2 * len(ranks) + 2
    module = "bert.encoder.layer.10.intermediate.dense"
    assert tuple(weights[f"base_model.model.{module}.lora_B.weight"].shape) == (40, ranks[module])


def test_a_trained_pooler_is_exported_with_the_classifier(tmp_path: Path) -> None:
    adapted = tiny.build("bert", device="meta", train_pooler=True)
    tensors = tiny.random_tensors(adapted, tiny.mixed_ranks(adapted))
    folder = export_peft(adapted, Deployment(tensors), tmp_path / "new" / "folder")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    assert "base_model.model.bert.pooler.dense.weight" in load_file(folder / "adapter_model.safetensors")


def test_the_model_card_names_base_ranks_and_run(tmp_path: Path) -> None:
    adapted = tiny.shared("llama")
    tensors = tiny.random_tensors(adapted, tiny.mixed_ranks(adapted, [1]))
    facts = {"algorithm": "fed-pilot", "rounds": 7}
    card = (
        export_peft(adapted, Deployment(tensors), tmp_path, base_model="some/base", facts=facts) / "README.md"
    ).read_text()
    head, metadata, body = card.split("---\n", maxsplit=2)
    assert head == ""
    for line in (
        "base_model: some/base",
        "library_name: peft",
        "- lora",
        "- federated",
        "pipeline_tag: text-generation",
    ):
        assert line in metadata.splitlines()
    for line in ("| algorithm | fed-pilot |", "| rounds | 7 |", "| 0 | - |", "| 1 | q_proj 1, v_proj 4 |"):
        assert line in body.splitlines()
    assert 'AutoModelForCausalLM.from_pretrained("some/base")' in body


def test_the_model_card_of_a_decoder_that_classifies_names_its_padding(tmp_path: Path) -> None:
    adapted = tiny.shared("llama-classifier")
    deployment = Deployment(tiny.random_tensors(adapted, tiny.mixed_ranks(adapted)))
    card = (export_peft(adapted, deployment, tmp_path / "out") / "README.md").read_text()
    folder = tiny.folder("llama-classifier")
    assert f'AutoModelForSequenceClassification.from_pretrained("{folder}", num_labels=3, pad_token_id=0)' in card


def test_what_is_merged_into_the_base_is_folded_at_the_rank_that_it_has(tmp_path: Path) -> None:
    adapted = tiny.build("bert", device="meta")
    module = "bert.encoder.layer.10.intermediate.dense"
    dense = BaseDelta(
        1, snapshot=base_deltas.total(tiny.changed_base(adapted, 1)), snapshot_version=1
    )  # rank 3 and rounding
    for base, rank in (
        (tiny.changed_base(adapted, 1), 3),
        (dense, 3),
        (tiny.changed_base(adapted, 2), 6),
        (tiny.changed_base(adapted, 9), 24),
    ):
        tensors = tiny.random_tensors(adapted, {module: 2})
        if rank == 24:  # a full rank stays one with a pair beside it
            assert base.snapshot
        pairs, left_out = folded(adapted.spec, Deployment(tensors, base))
        assert left_out == 0
        assert pairs.keys() == {*lora.names(adapted.spec.modules), *adapted.spec.head}
        for name, (out_features, in_features) in adapted.spec.modules.items():
            expected = min(rank + 2 * (name == module), in_features)
            assert pairs[lora.a_name(name)].shape == (expected, in_features)
            assert pairs[lora.b_name(name)].shape == (out_features, expected)
            exact = base_deltas.total(base)[base_deltas.weight_name(name)]
            if name == module:
                exact = exact + lora.delta(tensors, name, adapted.spec.scale)
            torch.testing.assert_close(lora.delta(pairs, name, adapted.spec.scale), exact, rtol=0, atol=1e-5)


def test_a_cut_export_is_the_nearest_of_its_rank_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    adapted = tiny.build("llama", device="meta")
    deployment = Deployment(tiny.random_tensors(adapted, tiny.mixed_ranks(adapted)), tiny.changed_base(adapted, 2))
    pairs, left_out = folded(adapted.spec, deployment, max_rank=2)
    exact, _ = folded(adapted.spec, deployment)
    lost = whole = 0.0
    for module in adapted.spec.modules:
        change = lora.delta(exact, module, adapted.spec.scale).double()
        values = torch.linalg.svdvals(change)
        tail = float(values[2:].square().sum())
        distance = float((change - lora.delta(pairs, module, adapted.spec.scale)).norm())
        assert pairs[lora.a_name(module)].shape[0] == 2
        assert distance == pytest.approx(tail**0.5, rel=1e-4)
        lost, whole = lost + tail, whole + float(values.square().sum())
    assert 0.1 < left_out == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    folder = export_peft(adapted, deployment, tmp_path / "cut", max_rank=2)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {2}
    assert set(config["alpha_pattern"].values()) == {3}
    card = (folder / "README.md").read_text()
    assert f"Cut to rank 2: {left_out:.3g} of the changes' Frobenius norm is left out." in card
    assert "left out" not in (export_peft(adapted, deployment, tmp_path / "whole") / "README.md").read_text()


def test_a_deployment_of_some_blocks_alone_is_not_exported(tmp_path: Path) -> None:
    adapted = tiny.shared("bert")
    shallow = Deployment(tiny.random_tensors(adapted, tiny.mixed_ranks(adapted, (0, 2))), blocks=(0, 2))
    with pytest.raises(ModelError, match=r"must be of the whole model, got one of blocks \(0, 2\) alone"):
        export_peft(adapted, shallow, tmp_path / "shallow")
    assert not (tmp_path / "shallow").exists()


def test_what_an_adapter_cannot_hold_is_not_exported(tmp_path: Path) -> None:
    adapted = tiny.shared("llama")
    tensors = tiny.random_tensors(adapted, tiny.mixed_ranks(adapted, [1]))
    with pytest.raises(ModelError, match=r"got a change of model\.norm"):
        export_peft(
            adapted, Deployment(tensors, BaseDelta(1, steps=({"model.norm.weight": torch.zeros(24)},))), tmp_path
        )
    with pytest.raises(ModelError, match="max_rank must be at least 1, got 0"):
        export_peft(adapted, Deployment(tensors), tmp_path, max_rank=0)
    with pytest.raises(ModelError, match="take an adapter of a later round"):
        export_peft(adapted, Deployment({}, BaseDelta(1, steps=({},))), tmp_path)
    with pytest.raises(ModelError, match="at least one adapted module"):
        export_peft(adapted, Deployment({}), tmp_path)
    with pytest.raises(ModelError, match="must be exactly those"):
        export_peft(tiny.shared("vit"), Deployment({}), tmp_path)
    assert list(tmp_path.iterdir()) == []
