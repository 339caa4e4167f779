"""Identities of RecLoRA, on a real (tiny) model and on its bank's own arithmetic."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests import tiny
from tests.test_cli import fedpilot
from transformers import AutoModelForSequenceClassification

from fedpilot import attachments, lora, memory
from fedpilot.algorithms.fedit import FedIT
from fedpilot.algorithms.reclora import RecLoRA, RecLoRAState
from fedpilot.attachments import AdapterBank, gate_weights, mixed_adapter
from fedpilot.client import ClientModel
from fedpilot.errors import ModelError, PlanError
from fedpilot.export import export_peft
from fedpilot.memory import measure_peak
from fedpilot.model import AdaptedModel
from fedpilot.prediction import predict
from fedpilot.record import RunDirectory
from fedpilot.tensors import digest
from fedpilot.training import Batch, TrainingSettings
from fedpilot.types import ClientProfile, Deployment, LeftOut, Plan, Site, Task, Tensors, Upload

WIDTH, N, RANK = 5, 3, 2
MIXES = ("product", "factor")
RECIPE = Path(__file__).parents[2] / "recipes" / "reclora.toml"


def bank(**changes: Any) -> AdapterBank:
    return AdapterBank(**{"size": N, "rank": RANK, "width": WIDTH, "hidden": 7, **changes})


def values(model: AdaptedModel, chosen: AdapterBank, seed: int = 0) -> Tensors:
    """Bank, gates and head, none of them zero, gates far from even."""
    generator = torch.Generator().manual_seed(seed)
    start = attachments.init(model.spec, chosen, np.random.default_rng(seed))
    strong = {"gate_in": 1.0, "gate_out": 2.0}
    return {
        name: tensor + strong.get(name.rpartition(".")[2], 0.3) * torch.randn(tensor.shape, generator=generator)
        for name, tensor in start.items()
    }


def vectors(count: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def logits(model: AdaptedModel, chosen: AdapterBank | None, tensors: Tensors, batch: Batch) -> torch.Tensor:
    model.deploy(Deployment(tensors, attachment=chosen))
    return tiny.logits(model, batch)


def with_vectors(batch: Batch, users: torch.Tensor) -> Batch:
    return {**batch, "user_vector": users}


def same_members(tensors: Tensors) -> Tensors:
    """Every member of each bank the first one."""
    return {
        name: tensor[:1].expand_as(tensor).clone() if ".bank_" in name else tensor for name, tensor in tensors.items()
    }


def plain(model: AdaptedModel, tensors: Tensors) -> Tensors:
    """The first member of each bank as a LoRA, and the head."""
    pairs: dict[str, torch.Tensor] = {}
    for module in model.spec.modules:
        pairs[lora.a_name(module)] = tensors[f"{module}.bank_A"][0]
        pairs[lora.b_name(module)] = tensors[f"{module}.bank_B"][0]
    return pairs | {name: tensors[name] for name in model.spec.head}


# --- the mix --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("mix", MIXES)
def test_equal_members_weighed_alike_are_one_plain_lora(family: str, mix: Any) -> None:
    model, batch = tiny.shared(family), tiny.batch(family)
    chosen = bank(width=0, mix=mix)
    tensors = same_members(values(model, chosen))
    torch.testing.assert_close(
        logits(model, chosen, tensors, batch), logits(model, None, plain(model, tensors), batch), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("mix", MIXES)
def test_one_users_bank_is_the_plain_adapter_that_is_exported_for_it(mix: Any) -> None:
    """Of the product mix: one wide LoRA of rank N r with the weights folded into A."""
    model, batch = tiny.shared("bert"), tiny.batch("bert")
    chosen = bank(mix=mix)
    tensors, user = values(model, chosen), vectors(1)[0]
    folded = mixed_adapter(chosen, model.spec, tensors, user)
    module = next(iter(model.spec.modules))
    rank = N * RANK if mix == "product" else RANK
    assert folded[lora.a_name(module)].shape == (rank, model.spec.modules[module][1])
    ours = logits(model, chosen, tensors, with_vectors(batch, user.expand(5, WIDTH)))
    torch.testing.assert_close(ours, logits(model, None, folded, batch), rtol=1e-5, atol=1e-5)


def test_the_two_mixes_differ() -> None:
    model, batch = tiny.shared("bert"), with_vectors(tiny.batch("bert"), vectors(5))
    tensors = values(model, bank())
    made = [logits(model, bank(mix=mix), tensors, batch) for mix in MIXES]  # type: ignore[arg-type]
    assert float((made[0] - made[1]).abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("mix", MIXES)
def test_a_batch_of_users_gives_what_each_gives_alone(family: str, mix: Any) -> None:
    model = tiny.shared(family)
    chosen, examples, users = bank(mix=mix), tiny.examples(family, 4), vectors(4)
    tensors = values(model, chosen)
    together = logits(model, chosen, tensors, with_vectors(next(examples.batches(4)), users))
    for row in range(4):
        alone = next(examples.subset([row]).batches(1))
        one = logits(model, chosen, tensors, with_vectors(alone, users[row : row + 1]))
        length = one.shape[1] if family == "llama" else None
        torch.testing.assert_close(together[row : row + 1, :length], one, rtol=1e-4, atol=1e-4)


def test_another_users_vector_gives_other_logits_and_none_gives_the_even_mix() -> None:
    model, batch = tiny.shared("bert"), tiny.batch("bert")
    tensors = values(model, bank())
    first = logits(model, bank(), tensors, with_vectors(batch, vectors(5)))
    other = logits(model, bank(), tensors, with_vectors(batch, vectors(5, seed=6)))
    assert float((first - other).abs().max()) > 1e-2
    without = logits(model, bank(), tensors, batch)
    gates = {name for name in tensors if ".gate_" in name}
    even = {name: tensor for name, tensor in tensors.items() if name not in gates}
    torch.testing.assert_close(without, logits(model, bank(width=0), even, batch))


def test_the_gate_is_the_papers() -> None:
    chosen = bank(tau=2.0)
    tensors = values(tiny.shared("bert"), chosen)
    module = next(name for name in tiny.shared("bert").spec.modules if name.endswith("layer.3.attention.self.value"))
    norm, first, last = (tensors[f"{module}.gate_{part}"] for part in ("norm", "in", "out"))
    user = vectors(1)[0]
    x = (user - user.mean()) / (user.var(unbiased=False) + 1e-5).sqrt() * norm[0] + norm[1]
    z = last @ torch.cat([(first @ torch.cat([x, torch.ones(1)])).relu(), torch.ones(1)])
    torch.testing.assert_close(gate_weights(chosen, tensors, module, user[None])[0], (z / 2).softmax(0))


def test_a_user_vector_of_another_width_is_refused() -> None:
    model = tiny.shared("bert")
    batch = with_vectors(tiny.batch("bert"), torch.zeros(5, WIDTH + 1))
    with pytest.raises(ModelError, match=r"user_vector of shape \(5,\) each, got \(6,\)"):
        logits(model, bank(), values(model, bank()), batch)


@pytest.mark.parametrize("change", [{"size": 0}, {"rank": 0}, {"tau": 0.0}, {"dropout": 1.0}, {"hidden": 0}])
def test_a_bank_says_what_it_must_be(change: Mapping[str, float]) -> None:
    with pytest.raises(PlanError, match=next(iter(change))):
        bank(**change)


def test_a_bank_travels_as_json_and_back() -> None:
    assert attachments.from_table(attachments.to_table(bank(mix="factor"))) == bank(mix="factor")


# --- the method -----------------------------------------------------------------------------------------------------


def recommender(model: AdaptedModel, **options: Any) -> RecLoRA:
    return RecLoRA(model.spec, None, **{"N": N, "rank": RANK, "user_width": WIDTH, "hidden": 7, **options})  # type: ignore[arg-type]


def users_of(family: str, count: int = 10) -> tiny.Rows:
    rows = tiny.examples(family, count)
    pairs = zip(rows.tensors, vectors(count), strict=True)
    return replace(rows, tensors=tuple({**row, "user_vector": user} for row, user in pairs))


def site(model: AdaptedModel, examples: tiny.Rows, **settings: Any) -> Site:
    training = TrainingSettings(**{"learning_rate": 0.02, "batch_size": 4, **settings})
    place = ClientModel(model, examples, training, learning_rate=training.learning_rate, seed=3)
    return Site(ClientProfile(0, len(examples), 2**40), place)


@pytest.fixture(scope="module")
def dry() -> AdaptedModel:
    """A model that drops nothing out, so that two methods draw alike."""
    return tiny.build("bert", dropout=0.0)


@pytest.mark.parametrize("mix", MIXES)
def test_a_bank_of_one_learns_what_fedit_learns(dry: AdaptedModel, mix: Any) -> None:
    method = recommender(dry, N=1, mix=mix)
    state = method.init(np.random.default_rng(0))
    plan = attachments.suffix_plan(dry.spec, 0, method.bank, 0)
    ours = method.local_update(Task(plan, state.bank), site(dry, users_of("bert")))

    fedit = FedIT(dry.spec, None, rank=RANK)  # type: ignore[arg-type]
    start = plain(dry, state.bank)
    ranks = dict.fromkeys(dry.spec.modules, RANK)
    theirs = fedit.local_update(
        Task(replace(plan, ranks=ranks, trainable=frozenset(start), attachment=None), start),
        site(dry, users_of("bert")),
    )
    learnt = plain(dry, ours.tensors)
    assert learnt.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(learnt[name], tensor, rtol=1e-4, atol=1e-5)
        assert not torch.equal(tensor, start[name])


def test_neither_history_nor_user_vector_is_in_an_upload(dry: AdaptedModel) -> None:
    """Bank, gates and head come up and nothing else; no entry of the users' vectors is among them or the metrics."""
    method = recommender(dry)
    plan = attachments.suffix_plan(dry.spec, 0, method.bank, 0)
    place = site(dry, users_of("bert"))
    upload = method.local_update(Task(plan, method.init(np.random.default_rng(0)).bank), place)
    kinds = {name.rpartition(".")[2] for name in upload.tensors if name not in dry.spec.head}
    assert upload.tensors.keys() == plan.trainable
    assert kinds == {"bank_A", "bank_B", "gate_norm", "gate_in", "gate_out"}
    private = vectors(10).flatten()
    assert not any(torch.isin(tensor, private).any() for tensor in upload.tensors.values())
    assert set(upload.metrics) == {"loss", "steps", "examples", "seconds"}


def test_gates_learn_once_their_members_differ(dry: AdaptedModel) -> None:
    """B = 0 at first, so a first step moves B alone and a second one the gates as well."""
    method = recommender(dry, dropout=0.0)
    start = method.init(np.random.default_rng(0)).bank
    plan = attachments.suffix_plan(dry.spec, 0, method.bank, 0)
    for steps, moved in ((1, False), (2, True)):
        upload = method.local_update(Task(plan, start), site(dry, users_of("bert"), max_steps=steps))
        gate = next(name for name in start if name.endswith("gate_out"))
        assert torch.equal(upload.tensors[gate], start[gate]) != moved


def test_members_are_averaged_index_by_index_over_unequal_clients(dry: AdaptedModel) -> None:
    method = recommender(dry)
    states = [values(dry, method.bank, seed) for seed in (1, 2)]
    uploads = [Upload(k, 1 + 2 * k, tensors) for k, tensors in enumerate(states)]
    for weights, shares in (("examples", (0.25, 0.75)), ("uniform", (0.5, 0.5))):
        mean = replace(method, weights=weights).aggregate(RecLoRAState(values(dry, method.bank, 9)), uploads).bank
        for name in mean:
            expected = shares[0] * states[0][name] + shares[1] * states[1][name]
            torch.testing.assert_close(mean[name], expected, rtol=1e-5, atol=1e-6)


def test_no_gate_means_no_gates_tensors_and_no_user_vector(dry: AdaptedModel) -> None:
    method = recommender(dry, gate="none")
    assert method.bank.columns == {}
    assert not any(".gate_" in name for name in method.init(np.random.default_rng(0)).bank)
    assert not method.needs_user_vectors


def test_a_clients_own_deployment_is_the_plain_lora_of_its_mean_user(dry: AdaptedModel) -> None:
    method, users, batch = recommender(dry), vectors(4), tiny.batch("bert")
    tensors = values(dry, method.bank)
    deployment = Deployment(tensors, attachment=method.bank)
    own = method.personal(deployment, {"user_vector": users})
    assert own.attachment is None
    mean = users.mean(dim=0).expand(5, WIDTH)
    ours = logits(dry, method.bank, tensors, with_vectors(batch, mean))
    dry.deploy(own)
    torch.testing.assert_close(tiny.logits(dry, batch), ours, rtol=1e-5, atol=1e-5)
    dry.deploy(method.personal(deployment, {}))
    torch.testing.assert_close(tiny.logits(dry, batch), logits(dry, method.bank, tensors, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks transformers for it
def test_an_exported_client_gives_peft_the_same_logits(dry: AdaptedModel, tmp_path: Path) -> None:
    method, user, batch = recommender(dry), vectors(1), tiny.batch("bert")
    tensors = values(dry, method.bank)
    own = method.personal(Deployment(tensors, attachment=method.bank), {"user_vector": user})
    export_peft(dry, own, tmp_path / "client")
    ours = logits(dry, method.bank, tensors, with_vectors(batch, user.expand(5, WIDTH)))
    base = AutoModelForSequenceClassification.from_pretrained(tiny.folder("bert"), num_labels=tiny.NUM_LABELS)
    loaded = PeftModel.from_pretrained(base, tmp_path / "client").eval()
    with torch.no_grad():
        theirs = loaded(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_a_client_trains_the_deepest_blocks_whose_measured_peak_fits() -> None:
    """Predicted without storage, measured on the real tensors: the same bytes, gates and users' vectors included."""
    settings = TrainingSettings(learning_rate=0.02, batch_size=4)
    sketch, model = tiny.build("llama", device="fake"), tiny.build("llama")
    kind = recommender(model).step_kind
    assert kind.attachment is not None
    profile = memory.trace_attached(
        lambda plan, size: sketch.program(plan, settings, size, kind), sketch.spec, kind.attachment, batch=4
    )
    peaks = [memory.peak_bytes(profile, attachments.suffix_plan(sketch.spec, 0, kind.attachment, k)) for k in range(3)]
    assert peaks[0] > peaks[1] > peaks[2]
    method = replace(recommender(model, participation="suffix"), profile=profile)
    state = method.init(np.random.default_rng(0))
    rich, poor = ClientProfile(0, 5, peaks[0]), ClientProfile(1, 5, peaks[0] - 1)
    whole, part = method.plan(state, [rich, poor], np.random.default_rng(0))
    assert isinstance(whole, Plan)
    assert isinstance(part, Plan)
    assert {model.spec.block_of[name.rpartition(".")[0]] for name in part.trainable} == {1, 2}
    assert measure_peak(model.program(whole, settings, None, kind)) == whole.peak_bytes
    for participation in ("exclusive", "all"):
        method = replace(method, participation=participation)
        if participation == "all":
            with pytest.raises(PlanError, match="client 1 must train every block with participation 'all'"):
                method.plan(state, [rich, poor], np.random.default_rng(0))
        else:
            _, out = method.plan(state, [rich, poor], np.random.default_rng(0))
            assert isinstance(out, LeftOut)
            assert out.needed_bytes == peaks[0]


# --- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_recipe_gives_the_same_bits_in_worker_processes_and_every_client_its_own_adapter(tmp_path: Path) -> None:
    changes = [
        "run.rounds=1",
        "data.limit=60",
        "data.test_limit=30",
        "training.max_steps=1",
        "click_model.rounds=1",
        "click_model.training=central",
        "evaluation.every=1",
    ]
    for name, extra in (("one", []), ("two", ["run.workers=2"])):
        options = [part for change in [*changes, *extra] for part in ("--set", change)]
        result = fedpilot("run", str(RECIPE), "--out", str(tmp_path / name), *options)
        assert result.exit_code == 0, result.output
    runs = [RunDirectory.open(tmp_path / name) for name in ("one", "two")]
    digests = [digest(run.load_adapter("last")[0].tensors) for run in runs]
    assert digests[0] == digests[1]
    first, second = (run.lines()[-1] for run in runs)
    assert all(first[key] == second[key] for key in ("metrics", "bytes_up", "bytes_down"))
    alone = runs[0].manifest["click_model"]["test"]  # type: ignore[index]
    assert set(alone) == {"accuracy", "loss", "auc"}

    exported = []
    for group in ("group 0", "group 7"):
        out = tmp_path / group
        result = fedpilot("export", str(tmp_path / "one"), str(out), "--client", group, "--which", "last")
        assert result.exit_code == 0, result.output
        exported.append(load_file(out / "adapter_model.safetensors"))
    assert any(not torch.equal(exported[0][name], exported[1][name]) for name in exported[0])
    texts = ["Heat (1995), Action Crime. liked: Fargo; Casino. disliked: Junior."]
    own, everybody = (predict(tmp_path / "one", texts, client=client, which="last")[0] for client in ("group 7", None))
    assert set(own.probabilities) == {"no", "yes"}
    assert own.probabilities != everybody.probabilities
