import math

import numpy as np
import pytest
import torch

from fedpilot import attachments
from fedpilot.attachments import InstancePool
from fedpilot.errors import DataError
from fedpilot.evaluation import combined, evaluate, measure
from fedpilot.types import Deployment
from tests import tiny


def deployment(family: str) -> Deployment:
    adapted = tiny.shared(family)
    return Deployment(tiny.random_tensors(adapted, tiny.mixed_ranks(adapted)))


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_accuracy_and_loss_are_exact_means_over_examples(family: str) -> None:
    adapted, examples = tiny.shared(family), tiny.examples(family, 11)
    metrics = evaluate(adapted, deployment(family), examples, batch_size=4)
    logits = torch.cat([tiny.logits(adapted, batch) for batch in examples.batches(1)])
    labels = torch.tensor([int(row["labels"]) for row in examples.tensors])
    assert metrics["accuracy"] == float((logits.argmax(dim=1) == labels).double().mean())
    assert metrics["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    assert 0 < metrics["accuracy"] < 1


def test_perplexity_weighs_every_word_alike() -> None:
    adapted, examples = tiny.shared("llama"), tiny.examples("llama", 7)
    metrics = evaluate(adapted, deployment("llama"), examples, batch_size=2)
    total = words = 0.0
    for batch in examples.batches(1):
        count = batch["input_ids"].shape[1] - 1
        total += count * float(adapted.loss(batch).detach())
        words += count
    assert metrics == {
        "loss": pytest.approx(total / words, rel=1e-4),
        "perplexity": pytest.approx(math.exp(total / words), rel=1e-3),
    }
    plain_mean = sum(float(adapted.loss(batch).detach()) for batch in examples.batches(1)) / 7
    assert abs(plain_mean - metrics["loss"]) > 1e-3


def test_groups_have_their_own_metrics_and_leave_the_overall_ones_alone() -> None:
    adapted, examples = tiny.shared("vit"), tiny.examples("vit", 9)
    groups = ["shop", "tweets", "shop", "shop", "tweets", "shop", "shop", "shop", "tweets"]
    overall = evaluate(adapted, deployment("vit"), examples)
    metrics = evaluate(adapted, deployment("vit"), examples, groups=groups)
    tweets = evaluate(adapted, deployment("vit"), examples.subset([1, 4, 8]))
    assert metrics["accuracy/tweets"] == tweets["accuracy"]
    assert metrics["loss/tweets"] == pytest.approx(tweets["loss"], rel=1e-5)
    assert metrics["accuracy"] == overall["accuracy"]
    assert metrics["loss"] == pytest.approx(overall["loss"], rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((6 * metrics["accuracy/shop"] + 3 * metrics["accuracy/tweets"]) / 9)
    assert set(metrics) == {f"{m}{g}" for m in ("accuracy", "loss") for g in ("", "/shop", "/tweets")}


def test_a_language_model_has_perplexities_by_group() -> None:
    metrics = evaluate(tiny.shared("llama"), deployment("llama"), tiny.examples("llama", 3), groups=["a", "b", "a"])
    assert set(metrics) == {f"{m}{g}" for m in ("loss", "perplexity") for g in ("", "/a", "/b")}


def test_what_was_loaded_before_does_not_show() -> None:
    adapted, examples = tiny.build("bert", dropout=0.5), tiny.examples("bert", 5)
    chosen = Deployment(tiny.random_tensors(adapted, tiny.mixed_ranks(adapted)))
    first = evaluate(adapted, chosen, examples)
    adapted.load(tiny.task(adapted, tiny.mixed_ranks(adapted, [0, 3]), blocks=(0, 3), checkpointed=frozenset({3})))
    adapted.base.train()
    assert evaluate(adapted, chosen, examples) == first


def test_an_evaluation_must_have_examples_and_a_group_for_each() -> None:
    with pytest.raises(DataError, match="must have examples, got none"):
        evaluate(tiny.shared("vit"), deployment("vit"), tiny.Rows(()))
    with pytest.raises(DataError, match="each of the 10 examples, got 1 names"):
        evaluate(tiny.shared("vit"), deployment("vit"), tiny.examples("vit"), groups=["a"])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_batches_that_are_dealt_out_sum_to_the_same_bits(family: str) -> None:
    adapted, examples, chosen = tiny.shared(family), tiny.examples(family, 11), deployment(family)
    for groups in (None, [f"group {index % 2}" for index in range(11)]):
        whole = evaluate(adapted, chosen, examples, groups=groups, batch_size=2)
        parts = [
            measure(adapted, chosen, examples, groups=groups, batch_size=2, part=part, parts=3) for part in (2, 0, 1)
        ]
        assert sorted(len(part) for part in parts) == [2, 2, 2]
        assert combined(adapted.task_type, [batch for part in parts for batch in part]) == whole


# --- two classes ----------------------------------------------------------------------------------------------------


def yes_no(count: int, answers: tuple[int, int] = (7, 9)) -> tiny.Rows:
    """Prompts of unlike lengths whose last token is the answer, and the only one to be learnt."""
    rows = []
    for index, row in enumerate(tiny.examples("llama", count).tensors):
        words = torch.cat([row["input_ids"], torch.tensor([answers[index % 2 if index < 4 else 1]])])
        labels = torch.full_like(words, -100)
        labels[-1] = words[-1]
        rows.append({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels})
    return tiny.Rows(tuple(rows))


def test_a_language_model_that_chooses_among_answers_is_measured_as_a_classifier_of_them() -> None:
    adapted, examples = tiny.shared("llama"), yes_no(9)
    metrics = evaluate(adapted, deployment("llama"), examples, batch_size=4, answers=(7, 9))
    pairs, labels = [], []
    for batch in examples.batches(1):
        pairs.append(tiny.logits(adapted, batch)[0, -2, [7, 9]])
        labels.append([7, 9].index(int(batch["input_ids"][0, -1])))
    odds, truth = torch.stack(pairs), torch.tensor(labels)
    shares = odds.softmax(dim=1)[:, 1]
    ahead = (shares[truth == 1][:, None] > shares[truth == 0][None]).double().mean()
    assert set(metrics) == {"accuracy", "loss", "auc"}
    assert metrics["accuracy"] == pytest.approx(float((odds.argmax(dim=1) == truth).double().mean()))
    assert metrics["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(odds, truth)), rel=1e-4)
    assert metrics["auc"] == pytest.approx(float(ahead))


def test_batches_of_two_classes_that_are_dealt_out_give_the_same_area_under_the_curve() -> None:
    adapted, chosen, examples = tiny.shared("llama"), deployment("llama"), yes_no(9)
    groups = ["a", "b", "a", "b", "b", "b", "a", "b", "b"]
    whole = evaluate(adapted, chosen, examples, groups=groups, batch_size=2, answers=(7, 9))
    parts = [
        measure(adapted, chosen, examples, groups=groups, batch_size=2, answers=(7, 9), part=part, parts=3)
        for part in (2, 0, 1)
    ]
    again = combined("causal-lm", [batch for part in parts for batch in part])
    assert again.keys() == whole.keys()
    assert all(again[name] == whole[name] or math.isnan(whole[name]) for name in whole)
    assert 0 <= whole["auc/a"] <= 1
    assert math.isnan(whole["auc/b"])  # one class only


def test_an_example_whose_target_is_no_answer_is_refused() -> None:
    with pytest.raises(DataError, match="must be one of the answers"):
        evaluate(tiny.shared("llama"), deployment("llama"), yes_no(3), answers=(7, 11))


def test_how_many_sets_of_a_pool_are_in_use_is_the_entropy_of_the_choice() -> None:
    adapted, examples = tiny.build("dinov2"), tiny.examples("dinov2", 10)
    pool = InstancePool(6, 2)
    start = attachments.init(adapted.spec, pool, np.random.default_rng(0))
    metrics = evaluate(adapted, Deployment(start, attachment=pool), examples, groups=["a", "b"] * 5, batch_size=3)
    for name, rows in {"": range(10), "/a": range(0, 10, 2), "/b": range(1, 10, 2)}.items():
        counts = torch.zeros(6)
        for row in rows:
            tiny.logits(adapted, next(examples.subset([row]).batches(1)))
            counts += adapted.sets_used()
        shares = counts[counts > 0] / counts.sum()
        assert metrics[f"sets_in_use{name}"] == pytest.approx(
            float(torch.exp(-(shares * shares.log()).sum())), rel=1e-5
        )
    assert 2 <= metrics["sets_in_use"] < 6


def test_without_a_pool_no_sets_are_counted() -> None:
    assert "sets_in_use" not in evaluate(tiny.shared("bert"), deployment("bert"), tiny.examples("bert", 4))
