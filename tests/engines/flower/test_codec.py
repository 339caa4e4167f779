"""Tasks and uploads as bytes and back, and what is refused."""

import json
import random
import tracemalloc
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpilot import attachments, base_deltas, exchange, lora, tensors
from fedpilot.attachments import InstancePool
from fedpilot.engines.flower import codec
from fedpilot.engines.flower.codec import NodeFailure, Packed, Stamp
from fedpilot.errors import ClientError, UploadError
from fedpilot.types import BaseDelta, Fresh, Plan, Task, Tensors, Upload
from tests import toy
from tests.engines.flower import mutations
from tests.engines.flower.mutations import LAYOUT, MOST_BYTES, STAMP

SPEC = toy.spec()
RANKS = {"blocks.0.linear": 2, "blocks.2.linear": 3}


def draw(fresh: Fresh, ranks: Any) -> Tensors:
    return lora.fresh(SPEC, fresh, ranks)


def a_task(**changes: Any) -> Task:
    whole = dict(toy.random_adapter(SPEC, 4))
    held = {name: t for name, t in lora.truncate(whole, RANKS).items() if "lora_" in name}
    held["head.bias"] = torch.randn(3).bfloat16()
    plan = Plan(
        2,
        RANKS,
        frozenset({"blocks.2.linear.lora_B", "head.bias"}),
        blocks=(0, 2),
        checkpointed=frozenset({2}),
        micro_batch=4,
        scored=frozenset({"blocks.0.linear.lora_A"}),
        values={0: 0.1, 2: 1 / 3},
        peak_bytes=2**40,
        seconds=1.25,
        sends={"items": (6, 2, 3), "labels": (6,)},
    )
    extra = {"peers": torch.randn(2, 3), "count": torch.arange(3)}
    return replace(Task(plan, held, extra=extra), **changes)


def same(one: Tensors, other: Tensors) -> bool:
    return list(one) == list(other) and tensors.digest(one) == tensors.digest(other)


def test_a_task_comes_back_to_the_bit_with_its_plan_and_its_order() -> None:
    task = a_task()
    stamp, found = codec.decode_task(codec.encode_task(task, STAMP), draw)
    assert stamp == STAMP
    assert found.plan == task.plan
    assert list(found.plan.ranks) == list(task.plan.ranks)
    assert same(found.tensors, task.tensors)
    assert same(found.extra, task.extra)
    assert {t.dtype for t in found.tensors.values()} == {torch.float32, torch.bfloat16}


def test_a_task_of_the_second_exchange_says_so_and_needs_no_tensors_of_the_model() -> None:
    task = replace(
        a_task(), tensors={}, exchange=2, plan=replace(a_task().plan, trainable=frozenset(), scored=frozenset())
    )
    packed = codec.encode_task(task, STAMP)
    found = codec.decode_task(packed, draw)[1]
    assert (found.exchange, found.plan, found.tensors) == (2, task.plan, {})
    assert same(found.extra, task.extra)
    assert len(packed.payload) == exchange.download_bytes(task) == 2 * 3 * 4 + 3 * 8


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("exchange", 3, "exchange must be an integer from 1 to 2, got 3"),
        ("extra", [["a", "float32", [2], 0]], "offset of a must be"),
    ],
)
def test_what_a_second_exchange_adds_is_checked_like_the_rest(key: str, value: object, message: str) -> None:
    packed = codec.encode_task(a_task(), STAMP)
    document = json.loads(packed.manifest)
    document["body"][key] = value
    with pytest.raises(ClientError, match=message):
        codec.decode_task(codec.Packed(json.dumps(document), packed.payload), draw)


def test_a_shape_of_what_is_sent_is_checked() -> None:
    packed = codec.encode_task(a_task(), STAMP)
    document = json.loads(packed.manifest)
    document["body"]["plan"]["sends"] = [["items", [0, 3]]]
    with pytest.raises(ClientError, match="shape must be an integer from 1"):
        codec.decode_task(codec.Packed(json.dumps(document), packed.payload), draw)


def a_pooled_task() -> Task:
    pool = InstancePool(3, 2, pool="lora", rank=2, query="mean", key_weight=0.25, similarity="mean")
    plan = attachments.suffix_plan(SPEC, 2, pool, 1)
    return Task(plan, attachments.init(SPEC, pool, np.random.default_rng(0)))


def test_an_attachment_travels_by_its_name_and_its_numbers() -> None:
    task = a_pooled_task()
    packed = codec.encode_task(task, STAMP)
    found = codec.decode_task(packed, draw)[1]
    assert found.plan == task.plan
    assert same(found.tensors, task.tensors)
    assert len(packed.payload) == exchange.download_bytes(task)
    table = json.loads(packed.manifest)["body"]["plan"]["attachment"]
    assert table["name"] == "instance-pool"
    assert all(type(value) in (str, int, float) for value in table.values())


@pytest.mark.parametrize("value", mutations.HOSTILE, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("key", ["attachment", "name", "size", "top_k", "pool", "key_weight"])
def test_an_attachment_that_is_none_is_refused_and_nothing_is_made_of_it(key: str, value: Any) -> None:
    packed = codec.encode_task(a_pooled_task(), STAMP)
    document = json.loads(packed.manifest)
    plan = document["body"]["plan"]
    if key == "attachment":
        plan[key] = value
    else:
        plan["attachment"][key] = value
    try:
        found = codec.decode_task(codec.Packed(json.dumps(document), packed.payload), draw)[1].plan.attachment
    except ClientError:
        return
    assert found is None or (type(found) is InstancePool and 1 <= found.top_k <= found.size < 2**31)
    assert found is not None or (key, value) == ("attachment", None)


def test_a_plan_without_extras_comes_back() -> None:
    task = Task(Plan(2, {"m": 1}, frozenset({"m.lora_A"})), {"m.lora_A": torch.ones(1, 4)})
    assert codec.decode_task(codec.encode_task(task, STAMP), draw)[1].plan == task.plan


def test_the_payload_is_exactly_what_is_charged_as_download() -> None:
    task = a_task()
    assert len(codec.encode_task(task, STAMP).payload) == exchange.download_bytes(task)


def test_drawn_tensors_do_not_travel_and_are_there_all_the_same() -> None:
    names = frozenset({"blocks.0.linear.lora_A", "blocks.2.linear.lora_A"})
    fresh = Fresh(seed=2**63, rank=4, names=names)
    task = a_task()
    task = replace(task, tensors={**task.tensors, **lora.fresh(SPEC, fresh, RANKS)}, fresh=fresh)
    packed = codec.encode_task(task, STAMP)
    assert len(packed.payload) == exchange.download_bytes(task) < tensors.num_bytes(task.tensors)
    found = codec.decode_task(packed, draw)[1]
    assert found.fresh == fresh
    assert same(found.tensors, task.tensors)


def test_a_draw_of_another_shape_is_refused() -> None:
    fresh = Fresh(1, 4, frozenset({"blocks.0.linear.lora_A"}))
    task = replace(a_task(), fresh=fresh)
    with pytest.raises(ClientError, match=r"drawn tensor blocks\.0\.linear\.lora_A must have shape \(2, 6\)"):
        codec.decode_task(codec.encode_task(task, STAMP), lambda fresh, ranks: {})


def a_log(steps: int) -> BaseDelta:
    log = BaseDelta()
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        pair = base_deltas.pair(
            "blocks.1.linear", torch.randn(7, 1, generator=generator), torch.randn(1, 6, generator=generator)
        )
        log = base_deltas.extended(log, pair)
    return log


@pytest.mark.parametrize("steps", [0, 2, 9])
def test_what_a_node_replays_from_any_version_has_the_servers_bits_and_only_the_download_travels(steps: int) -> None:
    log = a_log(steps)
    assert steps != 9 or 0 < log.snapshot_version < log.version
    for since in range(steps + 1):
        task = a_task(base_delta=base_deltas.since(log, since))
        packed = codec.encode_task(task, STAMP)
        assert len(packed.payload) == exchange.download_bytes(task)
        assert len(packed.payload) <= sum(map(tensors.num_bytes, (task.tensors, task.extra))) + 7 * 6 * 4
        found = codec.decode_task(packed, draw)[1].base_delta
        assert (found.version, found.since) == (log.version, since)
        held = base_deltas.total(a_log(since))
        assert same(base_deltas.replayed(held, found), base_deltas.total(log))


def test_an_upload_comes_back_to_the_bit_with_numbers_that_are_not_finite() -> None:
    sent = Upload(2, 7, {"a": torch.randn(3, 2).bfloat16(), "b": torch.tensor(1.5)}, {"loss": float("nan"), "x": 1 / 3})
    found = codec.decode_answer(codec.encode_upload(sent, STAMP), STAMP, most_bytes=100)
    assert isinstance(found, Upload)
    assert (found.client_id, found.num_examples) == (2, 7)
    assert same(found.tensors, sent.tensors)
    assert np.isnan(found.metrics["loss"])
    assert found.metrics["x"] == 1 / 3


def test_tensors_that_are_not_finite_pass_the_codec_and_are_refused_by_the_upload_check() -> None:
    sent = mutations.upload(random.Random(0))
    sent.tensors["m.lora_A"][0, 0] = float("inf")
    found = codec.decode_answer(codec.encode_upload(sent, STAMP), STAMP, most_bytes=MOST_BYTES)
    assert isinstance(found, Upload)
    with pytest.raises(UploadError, match=r"m\.lora_A must be finite"):
        exchange.check_upload(found, LAYOUT)


def test_a_failure_comes_back_as_one_printable_line() -> None:
    packed = codec.encode_failure(NodeFailure("memory", "out of\nmemory\ud800"), STAMP)
    assert codec.decode_answer(packed, STAMP, most_bytes=0) == NodeFailure("memory", "out of memory ")


def test_a_dtype_that_does_not_travel_is_refused_before_sending() -> None:
    with pytest.raises(ClientError, match=r"dtype of a must be one of float32, .*, got torch.complex64"):
        codec.encode_upload(Upload(2, 1, {"a": torch.zeros(1, dtype=torch.complex64)}), STAMP)


@pytest.mark.parametrize(
    ("field", "value"), [("run", "other"), ("round", 2), ("client_id", 1), ("task", "t0"), ("scale", 2.0)]
)
def test_an_answer_to_anything_else_is_refused(field: str, value: Any) -> None:
    late = codec.encode_upload(mutations.upload(random.Random(0)), replace(STAMP, **{field: value}))
    with pytest.raises(UploadError, match=f"{field} must be {getattr(STAMP, field)!r}, got {value!r}"):
        codec.decode_answer(late, STAMP, most_bytes=MOST_BYTES)


def told(change: Any, payload: bytes | None = None) -> Packed:
    """A good upload whose manifest was changed by hand, hash and size made right for its payload."""
    good = codec.encode_upload(Upload(2, 1, {"a": torch.ones(2, 3), "b": torch.ones(4)}), STAMP)
    document = json.loads(good.manifest)
    change(document)
    whole = bytearray(good.payload if payload is None else payload)
    return Packed(mutations.honest(json.dumps(document), whole), whole)


def line(index: int, column: int, value: Any) -> Any:
    def change(document: Any) -> None:
        document["body"]["tensors"][index][column] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (line(0, 0, "b"), "names of tensors must be distinct"),
        (line(0, 1, "object"), "dtype must be one of"),
        (line(0, 1, "float64"), "offset of b must be 48"),
        (line(0, 2, [3, 3]), "offset of b must be 36"),
        (line(1, 2, [5]), "tensors must fill the payload of 40 bytes, got 44"),
        (line(0, 2, [-2, -3]), "shape must be an integer from 1"),
        (line(0, 2, [0, 3]), "shape must be an integer from 1"),
        (line(0, 2, [1] * 9), "shape must have at most 8 axes"),
        (line(0, 2, [2**40, 2**40]), "shape must be one that memory can hold"),
        (line(1, 3, 0), "offset of b must be 24"),
        (line(1, 3, 2**62), "offset of b must be 24"),
        (line(1, 3, True), "offset must be an integer"),
        (line(1, 3, None), "offset must be an integer"),
        (lambda d: d.update(kind="task"), "kind must be upload or failure"),
        (lambda d: d.update(format=codec.FORMAT + 1), f"format must be {codec.FORMAT}"),
        (lambda d: d.update(extra=1), "keys must be"),
        (lambda d: d["body"].update(num_examples=-1), "num_examples must be an integer"),
        (lambda d: d["body"].update(metrics=[["loss", 1], ["loss", 2]]), "distinct first entries"),
    ],
)
def test_a_lying_manifest_is_refused_with_the_reason(change: Any, message: str) -> None:
    with pytest.raises(UploadError, match=message):
        codec.decode_answer(told(change), STAMP, most_bytes=1000)


def test_one_flipped_bit_is_refused() -> None:
    good = codec.encode_upload(mutations.upload(random.Random(0)), STAMP)
    payload = bytearray(good.payload)
    payload[5] ^= 1
    with pytest.raises(UploadError, match="sha256 must be"):
        codec.decode_answer(Packed(good.manifest, payload), STAMP, most_bytes=MOST_BYTES)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "9" * 5000, '{"format": NaN}', '{"a": 1, "a": 2}', "null"])
def test_a_manifest_that_is_not_strict_json_is_refused(text: str) -> None:
    with pytest.raises(UploadError, match="manifest must be"):
        codec.decode_answer(Packed(text, b""), STAMP, most_bytes=10)


def test_a_claim_of_ten_gigabytes_is_refused_without_allocating() -> None:
    def claim(document: Any) -> None:
        document["body"]["tensors"] = [["a", "float32", [2_500_000_000], 0]]

    packed = told(claim)
    lie = Packed(packed.manifest.replace('"num_bytes": 40', f'"num_bytes": {10**10}'), packed.payload)
    tracemalloc.start()
    for message in (packed, lie):
        with pytest.raises(
            UploadError, match=r"must fill the payload of 40 bytes|at most 1000 bytes, got a claim of 1"
        ):
            codec.decode_answer(message, STAMP, most_bytes=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


def test_a_large_payload_is_refused_before_it_is_hashed_or_copied() -> None:
    packed = told(lambda document: None, payload=bytes(10**7))
    tracemalloc.start()
    with pytest.raises(UploadError, match="payload must be at most 1000 bytes, got a claim of 10000000"):
        codec.decode_answer(packed, STAMP, most_bytes=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200), st.binary(max_size=64))
def test_random_bytes_are_refused(manifest: str, payload: bytes) -> None:
    assert mutations.judged(Packed(manifest, payload)) == "refused"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_any_value_anywhere_in_a_manifest_is_refused_or_meant(data: st.DataObject) -> None:
    good = codec.encode_upload(mutations.upload(random.Random(1)), STAMP)
    document = json.loads(good.manifest)
    place = data.draw(st.sampled_from(mutations.places(document)[1:]))
    owner = document
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = data.draw(json_values)
    mutations.judged(Packed(json.dumps(document), good.payload))


def test_thousands_of_wrong_messages_are_refused_or_are_what_they_say() -> None:
    generator = random.Random(5)
    outcomes = Counter(mutations.attempt(generator) for _ in range(3000))
    assert outcomes["refused"] > 2000
    assert outcomes["accepted"] > 20  # else the check of what is accepted checks nothing


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_value_anywhere_in_a_task_is_refused_or_read(data: st.DataObject) -> None:
    log = base_deltas.since(a_log(9), 8)
    fresh = Fresh(1, 4, frozenset({"blocks.0.linear.lora_A"}))
    good = codec.encode_task(a_task(base_delta=log, fresh=fresh), STAMP)
    document = json.loads(good.manifest)
    place = data.draw(st.sampled_from(mutations.places(document)[1:]))
    owner = document
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = data.draw(json_values)
    try:
        codec.decode_task(Packed(json.dumps(document), good.payload), lambda fresh, ranks: {})
    except ClientError as error:
        str(error).encode()


def test_a_stamp_is_all_that_an_answer_must_agree_with() -> None:
    assert Stamp.__dataclass_fields__.keys() == {"run", "round", "client_id", "task", "scale"}
