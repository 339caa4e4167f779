"""The last block that computes the first position alone gives what the whole block gives."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    CamembertConfig,
    ElectraConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from fedpilot import lora
from fedpilot.errors import ModelError
from fedpilot.model import AdaptedModel, ModelSettings, build_model
from fedpilot.model.attached import pool_hidden
from fedpilot.types import Plan, Task
from tests import tiny

CONFIGS = {
    "bert": BertConfig,
    "camembert": CamembertConfig,
    "electra": ElectraConfig,
    "roberta": RobertaConfig,
    "xlm-roberta": XLMRobertaConfig,
}
BLOCKS = 3
TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense")


@cache
def folder(family: str) -> Path:
    config = CONFIGS[family](
        vocab_size=tiny.WORDS,
        hidden_size=24,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=32,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=tiny.NUM_LABELS,
        pad_token_id=0,
    )
    path = Path(mkdtemp(prefix=f"fedpilot-{family}-"))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    return path


def build(family: str, last_block: str) -> AdaptedModel:
    settings = ModelSettings(
        str(folder(family)),
        rank=4,
        alpha=1.0,
        max_length=tiny.LENGTH,
        target_modules=TARGETS,
        last_block=last_block,  # type: ignore[arg-type]
    )
    return build_model(settings, num_labels=tiny.NUM_LABELS, device="cpu")


model = cache(build)


def both(family: str) -> tuple[AdaptedModel, AdaptedModel]:
    return model(family, "whole"), model(family, "first-position")


def random_task(adapted: AdaptedModel, **plan: Any) -> Task:
    running = plan.get("blocks") or range(BLOCKS)
    ranks = dict.fromkeys(lora.blocks_modules(adapted.spec, running), 3)
    return tiny.task(adapted, ranks, **plan)


def gradients(adapted: AdaptedModel, task: Task) -> Mapping[str, torch.Tensor]:
    adapted.load(task)
    adapted.base.train()
    adapted.loss(tiny.batch("bert", 6)).backward()
    return {name: p.grad.clone() for name, p in adapted.parameters_by_name().items() if p.grad is not None}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("recomputed", [frozenset(), frozenset({0, BLOCKS - 1})])
def test_logits_and_gradients_are_those_of_the_whole_block(family: str, recomputed: frozenset[int]) -> None:
    """In float64, where the order of a sum's terms does not show."""
    whole, first = (build(family, last_block) for last_block in ("whole", "first-position"))
    task = random_task(whole, checkpointed=recomputed)
    for adapted in (whole, first):
        adapted.load(task)
        adapted.base.double()
    expected, found = gradients(whole, task), gradients(first, task)
    assert expected.keys() == found.keys() == task.plan.trainable
    for name, gradient in expected.items():
        assert gradient.dtype == torch.float64
        assert torch.linalg.norm(found[name] - gradient) <= 1e-12 * torch.linalg.norm(gradient) + 1e-15, name
    inputs = tiny.batch("bert", 6)
    torch.testing.assert_close(tiny.logits(first, inputs), tiny.logits(whole, inputs), rtol=1e-12, atol=1e-12)


def test_the_last_block_gives_one_position_and_the_others_all() -> None:
    _, first = both("bert")
    first.load(random_task(first))
    inputs = tiny.batch("bert", 6)
    with first.watching(range(BLOCKS)) as states:
        tiny.logits(first, inputs)
    lengths = [states[block].shape[1] for block in range(BLOCKS)]
    assert lengths == [inputs["input_ids"].shape[1]] * (BLOCKS - 1) + [1]


class Products(TorchDispatchMode):
    """Shapes of what is multiplied example by example."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.startswith(("bmm", "baddbmm")):
            self.shapes |= {tuple(operand.shape) for operand in args}
        return func(*args, **(kwargs or {}))


def test_no_weight_is_repeated_for_each_example() -> None:
    """As a linear layer does for positions that are not side by side; in bf16 it took a twelfth of a step."""
    _, first = both("bert")
    first.load(random_task(first))
    first.base.train()
    with Products() as seen:
        first.loss(tiny.batch("bert", 6)).backward()
    assert not {(6, 24, 24), (6, 24, 40), (6, 40, 24)} & seen.shapes


def test_another_block_that_is_the_last_to_run_computes_all_positions() -> None:
    whole, first = both("bert")
    task = random_task(whole, blocks=(0, 1))
    expected, found = gradients(whole, task), gradients(first, task)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_last_hidden_states_are_there_at_every_position_for_whoever_pools_them() -> None:
    inputs = {n: t for n, t in tiny.batch("bert", 6).items() if n != "labels"}
    pooled = []
    for adapted in both("bert"):
        adapted.load(random_task(adapted))
        adapted.base.eval()
        hidden = adapted._hidden(inputs, 0)
        assert hidden.shape[:2] == inputs["input_ids"].shape
        pooled.append(pool_hidden(hidden, inputs["attention_mask"], "mean"))
    assert torch.equal(*pooled)


def test_remembered_prefixes_serve_the_narrowed_block() -> None:
    whole, first = both("bert")
    top = lora.blocks_modules(whole.spec, [BLOCKS - 1])
    names = frozenset(lora.names(top)) | frozenset(whole.spec.head)
    task = random_task(whole, trainable=sorted(names))
    first.load(task)
    first.remember_prefix(names, 2**20)
    inputs = tiny.batch("bert", 6)
    found = [tiny.logits(first, inputs) for _ in range(2)]
    assert first.prefix_cache is not None
    assert first.prefix_cache.hits == 6
    whole.load(task)
    for logits in found:
        torch.testing.assert_close(logits, tiny.logits(whole, inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["vit", "llama", "llama-classifier"])
def test_a_head_that_reads_other_positions_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match="'first-position' must go with sequence-classification and one of bert, "):
        tiny.build(family, last_block="first-position")


def test_the_settings_part_profiles_and_are_on_record() -> None:
    whole, first = both("bert")
    assert (whole.facts["last_block"], first.facts["last_block"]) == ("whole", "first-position")
    assert replace(first.settings, last_block="whole") == whole.settings


def test_the_tensors_after_some_steps_are_the_same_to_a_millionth() -> None:
    ends = []
    for adapted in both("bert"):
        task = random_task(adapted)
        adapted.load(Task(Plan(0, task.plan.ranks, task.plan.trainable), task.tensors))
        adapted.base.train()
        optimiser = torch.optim.SGD(adapted.parameters_by_name().values(), lr=0.05)
        for seed in range(6):
            optimiser.zero_grad()
            adapted.loss(tiny.batch("bert", 6, seed)).backward()
            optimiser.step()
        ends.append(adapted.read())
    for name, tensor in ends[0].items():
        change = np.linalg.norm(ends[1][name] - tensor) / np.linalg.norm(tensor)
        assert change <= 1e-6, name
