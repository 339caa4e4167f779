import pytest
import torch

from fedpilot import tensors


def test_a_mean_counts_only_the_holders_of_a_name() -> None:
    mean = tensors.weighted_mean(
        [({"x": torch.tensor([1.0])}, 1.0), ({"x": torch.tensor([5.0]), "y": torch.ones(2)}, 3)]
    )
    assert mean["x"].item() == 4.0
    assert torch.equal(mean["y"], torch.ones(2))


def test_a_mean_reads_its_terms_once_and_holds_one_at_a_time() -> None:
    alive = 0

    def terms():
        nonlocal alive
        for value in (1.0, 2.0, 6.0):
            alive += 1
            yield {"x": torch.tensor([value])}, 1.0
            alive -= 1
            assert alive == 0

    assert tensors.weighted_mean(terms())["x"].item() == 3.0


def test_a_mean_does_not_edit_its_terms() -> None:
    first, second = {"x": torch.ones(2)}, {"x": torch.full((2,), 3.0)}
    tensors.weighted_mean([(first, 2.0), (second, 2.0)])
    assert torch.equal(first["x"], torch.ones(2))
    assert torch.equal(second["x"], torch.full((2,), 3.0))


def test_add_and_subtract_are_inverse_on_exact_numbers() -> None:
    a, b = {"x": torch.tensor([1.5, -2.0])}, {"x": torch.tensor([0.25, 8.0])}
    assert torch.equal(tensors.subtract(tensors.add(a, b), b)["x"], a["x"])


def test_bytes_follow_the_dtype() -> None:
    assert tensors.num_bytes({"a": torch.zeros(3, 5), "b": torch.zeros(2, dtype=torch.bfloat16)}) == 64


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_entry_makes_tensors_not_finite(bad: float) -> None:
    assert tensors.is_finite({"a": torch.zeros(2)})
    assert not tensors.is_finite({"a": torch.zeros(2), "b": torch.tensor([0.0, bad])})


def test_a_digest_sees_bits_names_shapes_and_dtypes_but_not_order() -> None:
    base = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.zeros(1)}
    same = {"b": torch.zeros(1), "a": torch.tensor([[1.0, 2.0]])}
    others = [
        {"a": torch.tensor([[1.0], [2.0]]), "b": torch.zeros(1)},
        {"a": torch.tensor([[1.0, 2.0]]), "c": torch.zeros(1)},
        {"a": torch.tensor([[1.0, 2.0]]), "b": -torch.zeros(1)},
        {"a": torch.tensor([[1.0, 2.0]]).to(torch.bfloat16), "b": torch.zeros(1)},
    ]
    assert tensors.digest(base) == tensors.digest(same)
    assert len({tensors.digest(x) for x in [base, *others]}) == 5


def test_only_keeps_the_order_of_the_tensors() -> None:
    held = {"b": torch.zeros(1), "a": torch.ones(1), "c": torch.ones(2)}
    assert list(tensors.only(held, frozenset({"a", "b"}))) == ["b", "a"]
