"""Secure aggregation and secret noise over Flower's messages, with the real app, trainers and recipes."""

import base64
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

from fedpilot import jobs, lora, tensors
from fedpilot.config.recipe import Recipe, load_recipe
from fedpilot.engines.flower import client_app, codec, messages
from fedpilot.engines.flower.codec import NodeFailure, Stamp
from fedpilot.engines.flower.engine import settings_of
from fedpilot.engines.flower.running import Waiting, run
from fedpilot.engines.flower.storage import SECRET, node_secret
from fedpilot.engines.flower.timing import Timing
from fedpilot.engines.flower.trainer import NodeOptions, Trainer
from fedpilot.errors import ConfigError, PlanError, RecordError, UploadError
from fedpilot.jobs import Job
from fedpilot.types import Plan, Task, Upload
from tests.engines.flower.local_grid import LocalGrid
from tests.engines.flower.recipes import RECIPE
from tests.test_cli import save_data, save_model

QUICK = Timing(timeout_s=0.0, reconnect_s=0.0, poll_s=0.0, note_s=0.0)
TEN = (
    *('partition.kind="iid"', 'partition.column="none"', "partition.num_clients=10", "run.rounds=1"),
    "privacy.secure_aggregation=true",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secure")
    save_model(folder / "model")
    save_data(folder / "data.csv")
    (folder / "toy.toml").write_text(RECIPE)
    return folder


@pytest.fixture(autouse=True)
def node_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the nodes of a test remember; their trainers are new ones, their models are not."""
    monkeypatch.setenv(client_app.FOLDER, str(tmp_path / "nodes"))
    client_app._trainer.cache_clear()
    yield tmp_path / "nodes"
    client_app._trainer.cache_clear()


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "toy.toml", overrides)


def stage_of(message: Message) -> str:
    """Of a message of a round with a secure sum; empty for others."""
    if message.metadata.message_type == messages.UPDATE:
        return "mask" if messages.text_of(message.content, "note") else ""
    if message.metadata.message_type == messages.NOTE:
        body = json.loads(messages.text_of(message.content, "manifest"))["body"]
        return str(json.loads(body["text"])["stage"])
    return ""


class Nodes:
    """Nodes of the real app; what they answer is kept and may be changed.

    Attributes:
        gone: Stage -> partitions that do not answer in it or after.
        change: Stage and partition -> another reply.
    """

    def __init__(self, gone: dict[str, set[int]] | None = None) -> None:
        self.gone = gone or {}
        self.change: Callable[[str, int, Message, Message], Message] = lambda stage, partition, asked, reply: reply
        self.replies: list[tuple[str, int, Message]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        stage, partition = stage_of(message), int(context.node_config["partition-id"])
        if partition in self.gone.get(stage, ()):
            raise ConnectionError("the node has gone")
        reply = self.change(stage, partition, message, client_app.app(message, context))
        self.replies.append((stage, partition, reply))
        return reply

    def grid(self, count: int) -> LocalGrid:
        app: Any = self
        return LocalGrid(app, {1000 - 7 * k: {"partition-id": k} for k in range(count)})


def job_of(recipe: Recipe, path: Path, folder: Path) -> Job:
    return jobs.start(recipe, path, traces=folder / "traces")


def over_flower(job: Job, nodes: Nodes | None = None, **options: Any) -> Job:
    count = len(job.experiment.population.clients)
    run((nodes or Nodes()).grid(count), job, Waiting(seconds=0), QUICK, **options)
    return job


def adapter(job: Job) -> tensors.Tensors:
    return job.directory.load_adapter("last")[0].tensors


def line(job: Job, round: int = 1) -> Any:
    return job.directory.lines()[round]


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Ten clients' round in process, without masks."""
    job = job_of(recipe_of(folder, *TEN[:-1]), tmp_path_factory.mktemp("plain") / "run", folder)
    jobs.run(job)
    return job


def assert_mean(job: Job, expected: tensors.Tensors, examples: int) -> None:
    """Within the quantisation of the sum over its weight, and float32's own rounding."""
    facts = line(job)["facts"]
    bound = facts["secure_clients"] * facts["secure_step"] / 2 / examples
    assert bound < 1e-6
    for name, tensor in adapter(job).items():
        torch.testing.assert_close(tensor, expected[name], rtol=3e-7, atol=bound + 1e-7, msg=name)


def test_the_sum_over_flower_is_the_plain_sum_and_the_bits_are_those_of_the_same_code_in_process(
    folder: Path, tmp_path: Path, plain: Job
) -> None:
    there = over_flower(job_of(recipe_of(folder, *TEN), tmp_path / "there", folder))
    here = job_of(recipe_of(folder, *TEN), tmp_path / "here", folder)
    jobs.run(here)
    assert tensors.digest(adapter(there)) == tensors.digest(adapter(here))
    assert_mean(there, adapter(plain), sum(u["num_examples"] for u in line(plain)["uploads"]))
    for one in (here, there):
        assert len(line(one)["uploads"]) == 10
        assert line(one)["bytes_down"] == line(plain)["bytes_down"]
        assert 1.0 < line(one)["bytes_up"] / line(plain)["bytes_up"] < 1.1  # 32 bits an entry, and the masked weights


def test_three_of_ten_that_drop_after_they_masked_are_in_the_right_sum(
    folder: Path, tmp_path: Path, plain: Job
) -> None:
    job = over_flower(job_of(recipe_of(folder, *TEN), tmp_path / "run", folder), Nodes({"unmask": {1, 4, 8}}))
    assert line(job)["aggregated"]
    assert line(job)["facts"]["secure_clients"] == 10
    assert_mean(job, adapter(plain), sum(u["num_examples"] for u in line(plain)["uploads"]))


def test_nodes_that_drop_at_every_stage_leave_the_mean_of_the_others(folder: Path, tmp_path: Path) -> None:
    gone: dict[str, set[int]] = {"advertise": {0}, "share": {3}, "mask": {5, 7}, "unmask": {9}}
    job = over_flower(job_of(recipe_of(folder, *TEN, "privacy.threshold=0.5"), tmp_path / "run", folder), Nodes(gone))
    others = job_of(recipe_of(folder, *TEN[:-1]), tmp_path / "others", folder)
    nodes = Nodes({"": {0, 3, 5, 7}})
    run(nodes.grid(10), others, Waiting(nodes=6, seconds=0), QUICK)
    assert [u["client_id"] for u in line(job)["uploads"]] == [1, 2, 4, 6, 8, 9]
    assert {f["client_id"] for f in line(job)["failures"]} == {0, 3, 5, 7}
    assert_mean(job, adapter(others), sum(u["num_examples"] for u in line(others)["uploads"]))


def test_below_the_threshold_the_round_fails_cleanly_and_the_state_stays(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, *TEN)
    for stage, gone in (("mask", {0, 1, 2, 3, 4}), ("unmask", {0, 1, 2, 3, 4}), ("advertise", set(range(8)))):
        job = over_flower(job_of(recipe, tmp_path / stage, folder), Nodes({stage: gone}))
        assert not line(job)["aggregated"]
        assert not line(job)["uploads"]
        assert {f["client_id"] for f in line(job)["failures"]} == set(range(10))
        assert any("no sum came about" in f["reason"] for f in line(job)["failures"])
        before = job.directory.load_checkpoint(job.experiment.algorithm().init(np.random.default_rng([0, 0])))
        assert before is not None
        start = job.experiment.algorithm().init(np.random.default_rng([0, 0])).adapter
        assert tensors.digest(adapter(job)) == tensors.digest(start)


def chi_square(found: np.ndarray) -> float:
    counts = np.bincount(found, minlength=256)
    return float(((counts - len(found) / 256) ** 2 / (len(found) / 256)).sum())


def test_the_servers_view_of_one_upload_looks_uniform(folder: Path, tmp_path: Path) -> None:
    """Chi-square over the bytes of what travelled: within five deviations; an upload in the open is far off."""
    masked, opened = Nodes(), Nodes()
    over_flower(job_of(recipe_of(folder, *TEN), tmp_path / "masked", folder), masked)
    over_flower(job_of(recipe_of(folder, *TEN[:-1]), tmp_path / "open", folder), opened)
    uploads = [reply for stage, _, reply in masked.replies if stage == "mask"]
    assert len(uploads) == 10
    for reply in uploads:
        assert chi_square(np.frombuffer(messages.payload_of(reply.content), dtype=np.uint8)) < 255 + 5 * math.sqrt(510)
    plainly = [r for s, _, r in opened.replies if s == "" and messages.UPDATE in r.metadata.message_type]
    for reply in plainly:
        assert chi_square(np.frombuffer(messages.payload_of(reply.content), dtype=np.uint8)) > 5000
    assert plainly


def test_a_lie_in_a_share_is_noticed_and_the_sum_is_right_without_it(folder: Path, tmp_path: Path, plain: Job) -> None:
    nodes = Nodes()

    def lying(stage: str, partition: int, asked: Message, reply: Message) -> Message:
        if stage != "unmask" or partition not in (2, 6):
            return reply
        manifest = json.loads(messages.text_of(reply.content, "manifest"))
        note = json.loads(manifest["body"]["text"])
        share = bytearray(base64.b64decode(note["seeds"][0][1]))
        share[-1] ^= 1
        note["seeds"][0][1] = base64.b64encode(share).decode()
        manifest["body"]["text"] = json.dumps(note)
        return Message(messages.carried(json.dumps(manifest), b""), reply_to=asked)

    nodes.change = lying
    job = over_flower(job_of(recipe_of(folder, *TEN), tmp_path / "run", folder), nodes)
    assert line(job)["aggregated"]
    assert_mean(job, adapter(plain), sum(u["num_examples"] for u in line(plain)["uploads"]))


def test_answers_of_another_task_or_round_are_refused_as_replays(folder: Path, tmp_path: Path) -> None:
    nodes, kept = Nodes(), dict[str, Message]()

    def replaying(stage: str, partition: int, asked: Message, reply: Message) -> Message:
        if partition == 3 and stage:
            again = kept.setdefault(stage, reply)
            return Message(again.content, reply_to=asked)
        return reply

    nodes.change = replaying
    job = over_flower(job_of(recipe_of(folder, *TEN, "run.rounds=2"), tmp_path / "run", folder), nodes)
    assert len(line(job, 1)["uploads"]) == 10
    [failure] = line(job, 2)["failures"]
    assert failure["client_id"] == 3
    assert "round must be 2, got 1" in failure["reason"]
    assert len(line(job, 2)["uploads"]) == 9


def test_no_secret_is_in_the_log_or_on_the_servers_disk(
    folder: Path, tmp_path: Path, node_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[bytes] = []
    true_random = os.urandom

    def remembered(count: int) -> bytes:
        drawn.append(true_random(count))
        return drawn[-1]

    monkeypatch.setattr("fedpilot.privacy.participant.Participant.__init__.__defaults__", (None, remembered))
    with caplog.at_level(logging.DEBUG):
        job = over_flower(job_of(recipe_of(folder, *TEN), tmp_path / "run", folder), Nodes({"unmask": {2}}))
    secrets = [value for value in drawn if len(value) == 32]  # private keys and seeds
    assert len(secrets) == 30
    written = b"".join(path.read_bytes() for path in job.path.rglob("*") if path.is_file())
    written += b"".join(path.read_bytes() for path in node_folder.rglob("*") if path.is_file())
    written += caplog.text.encode()
    for secret in secrets:
        for form in (secret, secret.hex().encode(), base64.b64encode(secret), repr(secret).encode()):
            assert form not in written


def test_a_task_that_asks_for_an_open_upload_is_refused_by_a_node_of_a_secure_recipe(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that tells its nodes of masks and then asks for none."""
    job, true = job_of(recipe_of(folder, *TEN), tmp_path / "run", folder), Job.recipe.fget
    assert true is not None
    open_one = replace(job.recipe, privacy=replace(job.recipe.privacy, secure_aggregation=False))
    monkeypatch.setattr(Job, "recipe", property(lambda self: open_one))
    over_flower(job)
    assert not line(job)["uploads"]
    assert all("must be masked where the recipe says so" in failure["reason"] for failure in line(job)["failures"])


def test_a_note_that_is_late_comes_to_nothing_and_the_next_round_is_whole(folder: Path, tmp_path: Path) -> None:
    """The answer stays with the SuperLink, and the node refuses what belongs to the round that is over."""
    nodes, old = Nodes(), list[tuple[Message, Context]]()
    said: list[str] = []

    def once(stage: str, partition: int, asked: Message, reply: Message) -> Message:
        if partition == 4 and stage == "unmask":
            if not old:
                old.append((asked, Context(1, 5, {"partition-id": 4}, asked.content, {})))
                raise TimeoutError("not in time")
            late = client_app.app(*old[0])  # the first round's question, in the second round
            said.append(json.loads(messages.text_of(late.content, "manifest"))["body"]["reason"])
        return reply

    nodes.change = once
    job = over_flower(job_of(recipe_of(folder, *TEN, "run.rounds=2"), tmp_path / "run", folder), nodes)
    assert [line(job, round)["facts"]["secure_clients"] for round in (1, 2)] == [10, 10]
    [reason] = said
    assert "must belong to the attempt whose keys client 4 sent last" in reason


# --- noise that nobody else can work out --------------------------------------------------------------------------

LOCAL = ('privacy.kind="local"', "privacy.clip=0.5", "privacy.noise_multiplier=2.0")
DP_SGD = ('algorithm.name="ffa-lora"', "algorithm.noise_multiplier=1.0", "algorithm.delta=1e-3")


def upload_of(recipe: Recipe, folder: Path, noise: Any = "secret", shift: float = 0.0) -> tensors.Tensors:
    """What a node that has just started uploads of its first round's task."""
    trainer = Trainer(NodeOptions(folder, partition=0, noise=noise), client_app._loader())
    settings = settings_of(recipe.resolved(), ("bad", "good"), (recipe.algorithm.name, recipe.algorithm.options))
    loaded = trainer._load(settings)
    spec, rng = loaded.adapted.spec, np.random.default_rng(3)
    start = lora.init(spec, dict.fromkeys(spec.modules, 2), rng)
    start = {name: tensor + shift for name, tensor in start.items()}
    trained = frozenset(name for name in start if "ffa" not in recipe.algorithm.name or not name.endswith("lora_A"))
    task = Task(Plan(0, dict.fromkeys(spec.modules, 2), trained), start)
    stamp = Stamp("run", 1, 0, "t", spec.scale)
    packed = trainer.update(settings, codec.encode_task(task, stamp))
    found = codec.decode_answer(packed, stamp, most_bytes=10**7)
    assert isinstance(found, Upload), found
    return tensors.subtract(found.tensors, tensors.only(start, trained))


@pytest.mark.parametrize("private", [LOCAL, DP_SGD], ids=["local", "dp-sgd"])
def test_nodes_of_one_recipe_draw_noise_from_secrets_of_their_own_and_a_retry_draws_it_again(
    private: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(folder, *private)
    one, other = (upload_of(recipe, tmp_path / name) for name in ("one", "other"))  # the same client and task
    from_the_recipe = upload_of(recipe, tmp_path / "seeded", "seeded")
    for a, b in ((one, other), (one, from_the_recipe), (other, from_the_recipe)):
        assert tensors.norm(tensors.subtract(a, b)) > 0.1 * tensors.norm(a)
    assert tensors.digest(upload_of(recipe, tmp_path / "one")) == tensors.digest(one)  # started again
    seeded_again = upload_of(recipe, tmp_path / "seeded 2", "seeded")
    assert tensors.digest(seeded_again) == tensors.digest(from_the_recipe)
    assert (tmp_path / "one" / SECRET).stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "seeded" / SECRET).exists()


def test_another_task_in_the_same_round_gets_other_noise(folder: Path, tmp_path: Path) -> None:
    """Or the difference of two uploads would have none."""
    recipe = recipe_of(folder, *LOCAL, "privacy.clip=1e-6", "privacy.noise_multiplier=1e6")  # noise and nothing else
    one, other = (upload_of(recipe, tmp_path / "node", shift=shift) for shift in (0.0, 1e-3))
    noise = tensors.norm(one)
    assert noise > 1
    assert tensors.norm(tensors.subtract(one, other)) == pytest.approx(math.sqrt(2) * noise, rel=0.2)


def test_a_secret_is_for_its_owner_and_a_damaged_one_is_said(tmp_path: Path) -> None:
    secret = node_secret(tmp_path / "node")
    assert len(secret) == 32
    assert node_secret(tmp_path / "node") == secret != node_secret(tmp_path / "other")
    assert [path.name for path in (tmp_path / "node").iterdir()] == [SECRET]
    (tmp_path / "node" / SECRET).write_bytes(b"short")
    with pytest.raises(RecordError, match="must hold 32 bytes, got 5"):
        node_secret(tmp_path / "node")


@pytest.fixture
def deployed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes as `fedpilot join` starts them: each with a folder and a secret of its own."""

    def trainer(partition: int) -> Trainer:
        if partition not in made:
            made[partition] = Trainer(NodeOptions(tmp_path / f"node {partition}", partition=partition), loader)
        return made[partition]

    made: dict[int, Trainer] = {}
    loader = client_app._loader()
    trainer.cache_clear = made.clear  # type: ignore[attr-defined]
    monkeypatch.setattr(client_app, "_trainer", trainer)


@pytest.mark.usefixtures("deployed")
def test_dp_sgd_over_flower_records_epsilon_and_its_noise_is_not_that_of_the_recipe(
    folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(folder, 'algorithm.name="ffa-lora"', "algorithm.epsilon=6.0", "algorithm.delta=1e-3")
    there = over_flower(job_of(recipe, tmp_path / "there", folder))
    here = job_of(recipe, tmp_path / "here", folder)
    jobs.run(here)
    for round in (1, 2):
        assert len(line(there, round)["uploads"]) == 3
        assert 0 < line(there, round)["facts"]["epsilon"] == line(here, round)["facts"]["epsilon"] <= 6.0
        assert all("loss" not in upload["metrics"] for upload in line(there, round)["uploads"])
    assert line(there, 1)["facts"]["epsilon"] < line(there, 2)["facts"]["epsilon"]
    assert tensors.digest(adapter(there)) != tensors.digest(adapter(here))


CENTRAL = ('privacy.kind="client"', "privacy.clip=0.5", "privacy.noise_multiplier=1.5", 'algorithm.weights="uniform"')


@pytest.mark.parametrize("secure", [False, True])
def test_client_level_privacy_over_flower_records_epsilon_and_ends_at_the_budget(
    secure: bool, folder: Path, tmp_path: Path
) -> None:
    settings = (*TEN[:-1], *CENTRAL, f"privacy.secure_aggregation={str(secure).lower()}", "run.rounds=5")
    private = recipe_of(folder, *settings).safeguards.private
    assert private is not None
    budget = (private.epsilon(2, 1.0) + private.epsilon(3, 1.0)) / 2
    job = over_flower(job_of(recipe_of(folder, *settings, f"privacy.max_epsilon={budget}"), tmp_path / "run", folder))
    assert [entry["round"] for entry in job.directory.lines()] == [0, 1, 2]
    for round in (1, 2):
        assert line(job, round)["facts"]["epsilon"] == private.epsilon(round, 1.0)
        assert not line(job, round)["failures"]
        assert ("secure_clients" in line(job, round)["facts"]) == secure


def test_noise_on_secure_sums_that_one_client_could_decide_is_refused_before_the_run(
    folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(folder, *CENTRAL, *TEN[-1:])  # three clients, and a sum needs three
    job = job_of(recipe, tmp_path / "run", folder)
    with pytest.raises(PlanError, match="must hardly ever have just 3 clients, got a probability of 2 over the run"):
        over_flower(job)
    assert not job.directory.lines()


def test_the_servers_noise_follows_from_its_secret_and_is_the_same_again_for_the_same_sum(
    folder: Path, tmp_path: Path
) -> None:
    recipe, found = recipe_of(folder, *CENTRAL, "run.rounds=1"), {}
    for name, key in (("seeded", None), ("one", "a"), ("again", "a"), ("other", "b")):
        job = job_of(recipe, tmp_path / name, folder)
        over_flower(job, noise_folder=None if key is None else tmp_path / key)
        found[name] = tensors.digest(adapter(job))
    assert found["one"] == found["again"]
    assert len({found["seeded"], found["one"], found["other"]}) == 3


def test_local_noise_and_masks_go_together(folder: Path, tmp_path: Path) -> None:
    settings = (*LOCAL, "privacy.noise_multiplier=0.1", "run.rounds=1")
    masked, opened = (
        over_flower(job_of(recipe_of(folder, *settings, f"privacy.secure_aggregation={on}"), tmp_path / on, folder))
        for on in ("true", "false")
    )
    assert_mean(masked, adapter(opened), sum(u["num_examples"] for u in line(opened)["uploads"]))


# --- recipes ------------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_a_secure_recipe_is_said_at_once(folder: Path) -> None:
    overrides = ['algorithm.name="flora"', "run.cohort=2", 'defence.rule="median"', *TEN[-1:]]
    with pytest.raises(ConfigError) as caught:
        recipe_of(folder, *overrides)
    said = "\n".join(caught.value.problems)
    assert "secure aggregation must go with a method that needs only sums of uploads, got FLoRA" in said
    assert "take fedit, ffa-lora" in said
    assert "secure_aggregation must go without screening and robust rules" in said
    assert "min_clients must be at most the clients of a round, 2, got 3" in said
    wrong = ("privacy.threshold=0.4", "privacy.min_clients=2", "privacy.bits=16", "privacy.bound=0.0")
    with pytest.raises(ConfigError) as caught:
        recipe_of(folder, "privacy.secure_aggregation=true", *wrong)
    assert len(caught.value.problems) == 4


# --- notes on the wire --------------------------------------------------------------------------------------------


def test_a_note_on_the_wire_is_whole_and_answers_its_question_or_is_refused() -> None:
    stamp = Stamp("run", 2, 5, "task", 2.0)
    packed = codec.encode_note('{"stage": "share"}\nä', stamp)
    assert codec.decode_note(packed, stamp) == (stamp, '{"stage": "share"}\nä')
    failed = codec.encode_failure(NodeFailure("client", "gone"), stamp)
    assert codec.decode_note(failed, stamp)[1] == NodeFailure("client", "gone")
    for change in ({"round": 3}, {"client_id": 6}, {"task": "other"}, {"run": "other"}):
        with pytest.raises(UploadError, match=f"{next(iter(change))} must be"):
            codec.decode_note(packed, replace(stamp, **change))
    upload = codec.encode_upload(Upload(5, 1, {"x": torch.ones(2)}), stamp)
    wrong = (
        replace(packed, payload=b"more"),
        upload,
        replace(packed, manifest=packed.manifest.replace('"text":', '"words":')),
        replace(packed, manifest=packed.manifest.replace("note", "upload")),
        replace(packed, manifest="[" * 10_000),
    )
    for found in wrong:
        with pytest.raises(UploadError):
            codec.decode_note(found, stamp)
