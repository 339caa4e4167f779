"""The cache of frozen prefixes: the same computation, within its bound."""

from dataclasses import replace

import pytest
import torch

from fedpilot import base_deltas, lora, tensors
from fedpilot.client import ClientModel
from fedpilot.errors import ModelError
from fedpilot.model import AdaptedModel
from fedpilot.model.prefix import PrefixCache
from fedpilot.training import TrainingSettings
from fedpilot.types import BaseDelta, Task
from tests import tiny
from tests.tiny import FAMILIES

ROOM = 10**9


def top(model: AdaptedModel, blocks: int = 1) -> frozenset[str]:
    """The tensors of the highest blocks and the head."""
    count = model.spec.num_blocks
    return frozenset({*lora.names(lora.blocks_modules(model.spec, range(count - blocks, count))), *model.spec.head})


def fit(
    model: AdaptedModel, family: str, trainable: frozenset[str], *, seed: int = 1, tensors_seed: int = 0, **changes
) -> tuple[tensors.Tensors, dict[str, float]]:
    settings = TrainingSettings(
        **{"learning_rate": 0.02, "batch_size": 4, "local_epochs": 3, "optimiser": "sgd", **changes}
    )
    examples = changes.pop("examples", tiny.examples(family, 10))
    client = ClientModel(model, examples, settings, learning_rate=0.02, seed=seed)
    client.load(tiny.task(model, tiny.mixed_ranks(model), trainable, seed=tensors_seed))
    metrics = client.fit(trainable)
    return client.read(), dict(metrics)


def relative(a: tensors.Tensors, b: tensors.Tensors, names: frozenset[str]) -> float:
    """Largest distance of two tensors in units of the norm."""
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in names)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_what_is_learnt_is_the_same_to_a_millionth_and_the_prefix_runs_once_an_example(family: str) -> None:
    model = tiny.build(family, dropout=0.0)
    for trainable in (top(model), top(model, 2)):
        plain, without = fit(model, family, trainable)
        assert model.prefix_cache is None or not model.prefix_cache.hits
        cached, with_cache = fit(model, family, trainable, cache_bytes=ROOM)
        cache = model.prefix_cache
        assert cache is not None
        assert (cache.misses, cache.hits) == (10, 20)
        assert relative(cached, plain, trainable) < 1e-6
        assert with_cache["loss"] == pytest.approx(without["loss"], rel=1e-6)
        model._cache = None


def test_the_first_epoch_is_the_same_to_the_bit(family: str) -> None:
    model = tiny.build(family, dropout=0.0)
    plain, _ = fit(model, family, top(model), local_epochs=1)
    cached, _ = fit(model, family, top(model), local_epochs=1, cache_bytes=ROOM)
    assert tensors.digest(cached) == tensors.digest(plain)


def test_a_head_alone_is_trained_on_what_all_blocks_gave() -> None:
    for family in ("bert", "vit"):
        model = tiny.build(family, dropout=0.0)
        head = frozenset(model.spec.head)
        plain, _ = fit(model, family, head)
        cached, _ = fit(model, family, head, cache_bytes=ROOM)
        assert relative(cached, plain, head) < 1e-6
        assert model.prefix_cache is not None
        assert model.prefix_cache.hits == 20


def test_nothing_is_remembered_where_the_lowest_block_trains() -> None:
    model = tiny.build("vit", dropout=0.0)
    fit(model, "vit", top(model, 3), cache_bytes=ROOM)
    assert model.prefix_cache is None


def test_a_later_turn_finds_what_is_unchanged_and_nothing_else() -> None:
    model = tiny.build("bert", dropout=0.0)
    counts = []
    for change in ({}, {"seed": 2}, {"tensors_seed": 5}, {"trainable": top(model, 2)}):
        trainable = change.pop("trainable", top(model))
        before = 0 if model.prefix_cache is None else model.prefix_cache.misses
        got, _ = fit(model, "bert", trainable, cache_bytes=ROOM, **change)
        wanted, _ = fit(model, "bert", trainable, **change)
        assert relative(got, wanted, trainable) < 1e-6
        counts.append(model.prefix_cache.misses - before)
    assert counts == [10, 0, 10, 10]


def test_another_base_is_another_prefix() -> None:
    model = tiny.build("bert", dropout=0.0)
    trainable, settings = top(model), TrainingSettings(learning_rate=0.02, batch_size=4, cache_bytes=ROOM)
    module = next(iter(model.spec.modules))
    out, width = model.spec.modules[module]
    step = base_deltas.pair(module, torch.ones(out, 1), torch.ones(1, width))
    results = []
    for base in (BaseDelta(), base_deltas.extended(BaseDelta(), step)):
        task = replace(tiny.task(model, tiny.mixed_ranks(model), trainable), base_delta=base)
        client = ClientModel(model, tiny.examples("bert", 6), settings, learning_rate=0.02, seed=1)
        client.load(task)
        client.fit(trainable)
        results.append(tensors.digest(client.read()))
    assert model.prefix_cache is not None
    assert (model.prefix_cache.misses, model.prefix_cache.hits) == (12, 0)
    assert results[0] != results[1]


def test_scores_use_what_training_remembers(family: str) -> None:
    model = tiny.build(family, dropout=0.0)
    trainable = top(model)
    results = []
    for cache_bytes in (0, ROOM):
        settings = TrainingSettings(learning_rate=0.02, batch_size=4, cache_bytes=cache_bytes)
        client = ClientModel(model, tiny.examples(family, 10), settings, learning_rate=0.02, seed=1)
        client.load(tiny.task(model, tiny.mixed_ranks(model), trainable))
        first = client.gradients(trainable, num_examples=6)
        client.fit(trainable)
        results.append(first)
    assert relative(results[1], results[0], trainable) < 1e-6
    assert model.prefix_cache is not None
    assert (model.prefix_cache.misses, model.prefix_cache.hits) == (10, 6)


def test_micro_batches_and_a_bound_that_is_too_small_change_nothing() -> None:
    model = tiny.build("llama", dropout=0.0)
    trainable = top(model)
    plain, _ = fit(model, "llama", trainable)
    cached, _ = fit(model, "llama", trainable, cache_bytes=2000)
    assert relative(cached, plain, trainable) < 1e-6
    assert model.prefix_cache is not None
    assert 0 < model.prefix_cache.num_bytes <= 2000
    assert 0 < model.prefix_cache.hits < 20


def test_padding_in_front_is_part_of_the_example() -> None:
    model = tiny.build("gpt2", dropout=0.0)
    rows = [dict(row) for row in tiny.examples("gpt2", 4).tensors]
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"labels": -100}

    def left(row: dict[str, torch.Tensor], to: int) -> dict[str, torch.Tensor]:
        pad = to - len(row["input_ids"])
        return {n: torch.nn.functional.pad(t, (pad, 0), value=fill.get(n, 0)) for n, t in row.items()}

    model.load(tiny.task(model, tiny.mixed_ranks(model), top(model)))
    for to in (width, width + 2):
        batch = {n: torch.stack([left(row, to)[n] for row in rows]) for n in rows[0]}
        model.remember_prefix(top(model), 0)
        plain = model.logits(batch)
        model.remember_prefix(top(model), ROOM)
        torch.testing.assert_close(model.logits(batch), plain, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model.logits(batch), plain, rtol=1e-6, atol=1e-6)
    assert model.prefix_cache is not None
    assert (model.prefix_cache.misses, model.prefix_cache.hits) == (8, 8)


# --- dropout ------------------------------------------------------------------------------------------------------


def test_frozen_dropout_must_be_off() -> None:
    model = tiny.build("bert", dropout=0.1)
    with pytest.raises(ModelError, match="cache_bytes must be 0 while frozen blocks drop out, got 1000000000"):
        fit(model, "bert", top(model), cache_bytes=ROOM)
    plain, _ = fit(model, "bert", top(model), frozen_dropout=False)
    cached, _ = fit(model, "bert", top(model), frozen_dropout=False, cache_bytes=ROOM)
    assert relative(cached, plain, top(model)) < 1e-6
    dropping, _ = fit(model, "bert", top(model))
    assert relative(dropping, plain, top(model)) > 1e-3


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_without_frozen_dropout_what_lies_below_is_still_and_what_lies_above_drops(family: str) -> None:
    model = tiny.build(family, dropout=0.3, lora_dropout=0.3)
    task: Task = tiny.task(model, tiny.mixed_ranks(model), top(model))
    model.load(task)
    model.train(top(model), frozen_dropout=False)
    seen: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda m, a, out: seen.append(out.detach())) for block in model.blocks[-2:]]
    for _ in range(2):
        model.logits(tiny.batch(family))
    for hook in hooks:
        hook.remove()
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[1], seen[3])


# --- the cache ----------------------------------------------------------------------------------------------------


def test_the_cache_lets_the_oldest_go_but_nothing_of_this_turn() -> None:
    cache = PrefixCache(100)
    cache.begin(b"a")
    for name in (b"1", b"2"):
        cache.put(name, torch.zeros(10))  # 40 bytes
    cache.put(b"3", torch.zeros(10))
    assert [cache.get(name) is not None for name in (b"1", b"2", b"3")] == [True, True, False]
    cache.begin(b"a")
    assert cache.get(b"1") is not None
    cache.put(b"3", torch.zeros(10))
    assert [cache.get(name) is not None for name in (b"1", b"2", b"3")] == [True, False, True]
    assert cache.num_bytes == 80
    cache.begin(b"b")
    assert cache.get(b"1") is None


def test_the_cache_keeps_copies_and_not_the_batches_that_they_were_part_of() -> None:
    cache = PrefixCache(100)
    cache.begin(b"a")
    whole = torch.arange(1000.0)
    cache.put(b"1", whole[:10])
    (kept,) = cache.tensors()
    assert kept.untyped_storage().nbytes() == 40 == cache.num_bytes
