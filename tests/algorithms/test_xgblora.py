"""Identities of XGBLoRA."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny, toy

from fedpilot import base_deltas, lora, memory, rounds, tensors
from fedpilot.algorithms.xgblora import XGBLoRA, XGBLoRAState
from fedpilot.config import setup
from fedpilot.errors import PlanError
from fedpilot.exchange import download_bytes
from fedpilot.memory import MemoryProfile
from fedpilot.training import TrainingSettings
from fedpilot.types import ClientProfile, LeftOut, ModelSpec, Plan, Site, Task, Tensors, Upload

SHAPES = {
    f"{block}.{name}": shape for block in range(4) for name, shape in {"tall": (90, 30), "wide": (40, 70)}.items()
}
SPEC = ModelSpec(
    SHAPES, {module: int(module[0]) for module in SHAPES}, 4, 1.5, {"head.weight": torch.arange(15.0).reshape(3, 5)}
)
SIDES = sum(map(sum, SHAPES.values())) // 4
"""Of one block."""


def xgb(**options: Any) -> XGBLoRA:
    return XGBLoRA(SPEC, None, **options)  # type: ignore[arg-type]


def task_of(algorithm: XGBLoRA, state: XGBLoRAState, client: int, blocks: Sequence[int]) -> Task:
    modules = lora.blocks_modules(SPEC, blocks)
    trained = lora.names(modules) if algorithm.server != "freeze_a" else [lora.b_name(module) for module in modules]
    return algorithm.distribute(state, Plan(client, dict.fromkeys(modules, 1), frozenset([*trained, "head.weight"])))


def trained(task: Task, seed: int) -> Upload:
    """An upload that differs from what went down in every entry; client k has 3 + 4 k examples."""
    generator = torch.Generator().manual_seed(1000 * seed + task.plan.client_id)
    sent = tensors.select(task.tensors, sorted(task.plan.trainable))
    moved = {name: t + torch.randn(t.shape, generator=generator) for name, t in sent.items()}
    return Upload(task.plan.client_id, 3 + 4 * task.plan.client_id, moved)


def shares(uploads: Sequence[Upload]) -> list[float]:
    total = sum(upload.num_examples for upload in uploads)
    return [upload.num_examples / total for upload in uploads]


def mean_product(uploads: Sequence[Upload], module: str, a: torch.Tensor | None = None) -> torch.Tensor:
    """s Σ p_k b_k a_k in float64."""
    terms = [
        share * u.tensors[lora.b_name(module)].double() @ (u.tensors[lora.a_name(module)] if a is None else a).double()
        for share, u in zip(shares(uploads), uploads, strict=True)
    ]
    return SPEC.scale * torch.stack(terms).sum(0)


def test_the_exact_server_merges_the_mean_over_the_holders_of_a_block() -> None:
    algorithm = xgb()
    state = algorithm.init(np.random.default_rng(0))
    uploads = [trained(task_of(algorithm, state, k, blocks), 0) for k, blocks in enumerate([[1, 3], [3], [1, 3]])]
    after = algorithm.aggregate(state, iter(uploads))
    total = base_deltas.total(after.base)
    assert total.keys() == {base_deltas.weight_name(module) for module in lora.blocks_modules(SPEC, [1, 3])}
    for module in lora.blocks_modules(SPEC, [1, 3]):
        held = uploads if module.startswith("3") else [uploads[0], uploads[2]]
        exact = mean_product(held, module)
        assert float((total[base_deltas.weight_name(module)] - exact).norm() / exact.norm()) < 1e-5
    assert list(after.head) == ["head.weight"]
    expected = sum(share * u.tensors["head.weight"] for share, u in zip(shares(uploads), uploads, strict=True))
    torch.testing.assert_close(after.head["head.weight"], expected)


def test_the_rank_of_all_boosters_is_at_most_the_clients_that_trained_them() -> None:
    algorithm, rng = xgb(), np.random.default_rng(5)
    state = algorithm.init(np.random.default_rng(0))
    bound = dict.fromkeys(range(4), 0)
    for round in range(6):
        blocks = sorted(int(block) for block in rng.choice(3, 2, replace=False))  # block 3 is never chosen
        clients = [int(client) for client in rng.choice(5, 2, replace=False)]
        state = algorithm.aggregate(state, [trained(task_of(algorithm, state, k, blocks), round) for k in clients])
        bound = {block: count + len(clients) * (block in blocks) for block, count in bound.items()}
    total = base_deltas.total(state.base)
    for module in SHAPES:
        name, most = base_deltas.weight_name(module), bound[SPEC.block_of[module]]
        assert (name in total) is (most > 0)
        if name in total:
            assert torch.linalg.matrix_rank(total[name], rtol=1e-5) == most < 30


def test_proj1_merges_the_best_booster_of_rank_one() -> None:
    algorithm = xgb(server="proj1")
    state = algorithm.init(np.random.default_rng(0))
    uploads = [trained(task_of(algorithm, state, client, [1, 3]), 0) for client in range(3)]
    (step,) = algorithm.aggregate(state, uploads).base.steps
    for module in lora.blocks_modules(SPEC, [1, 3]):
        exact = mean_product(uploads, module)
        found = step[base_deltas.b_name(module)] @ step[base_deltas.a_name(module)]
        values = torch.linalg.svdvals(exact)
        assert torch.linalg.matrix_rank(found) == 1
        assert float((found - exact).norm()) == pytest.approx(float(values[1:].square().sum().sqrt()), rel=1e-5)
        assert float(found.norm()) == pytest.approx(float(values[0]), rel=1e-5)


def test_with_a_frozen_the_mean_of_b_is_exact_and_of_rank_one() -> None:
    algorithm = xgb(server="freeze_a")
    state = algorithm.init(np.random.default_rng(0))
    tasks = [task_of(algorithm, state, client, [0, 2]) for client in range(3)]
    uploads = [trained(task, 0) for task in tasks]
    (step,) = algorithm.aggregate(state, uploads).base.steps
    for module in lora.blocks_modules(SPEC, [0, 2]):
        assert lora.a_name(module) not in uploads[0].tensors
        a = tasks[0].tensors[lora.a_name(module)]
        assert torch.equal(step[base_deltas.a_name(module)], a)
        found = step[base_deltas.b_name(module)].double() @ a.double()
        exact = mean_product(uploads, module, a)
        assert float((found - exact).norm() / exact.norm()) < 1e-6


def test_a_late_client_pays_for_every_booster_that_it_missed() -> None:
    for server, per_client in (("exact", 1), ("proj1", 0), ("freeze_a", 0)):
        algorithm = xgb(server=server)
        state = algorithm.init(np.random.default_rng(0))
        for round, clients in enumerate(([0, 1], [0, 2, 3], [1, 2])):
            uploads = [trained(task_of(algorithm, state, k, [round, 3]), round) for k in clients]
            state = algorithm.aggregate(state, uploads)
        ranks = [2, 3, 2] if per_client else [1, 1, 1]
        # Client 4 never took part, client 3 was sent version 1 in round 2, client 1 version 2 in round 3.
        lacking = {4: sum(ranks), 3: sum(ranks[1:]), 1: ranks[2]}
        found = {client: download_bytes(task_of(algorithm, state, client, [0])) - 4 * 15 for client in lacking}
        assert found == {client: 4 * 2 * SIDES * rank for client, rank in lacking.items()}


# --- with the toy model -------------------------------------------------------------------------------------------


class Engine:
    """Toy sites; keeps tasks and what each model is like at the end."""

    def __init__(self, algorithm: XGBLoRA, clients: Sequence[ClientProfile]) -> None:
        self.algorithm, self.clients = algorithm, clients
        self.tasks: list[Task] = []
        self.logits: list[torch.Tensor] = []

    def exchange(self, round: int, tasks: Any) -> Any:
        for task in tasks:
            site = toy.site(self.clients[task.plan.client_id])
            upload = self.algorithm.local_update(task, site)
            self.tasks.append(task)
            self.logits.append(site.model.net(site.model.x).detach())  # type: ignore[attr-defined]
            yield upload


def run(algorithm: XGBLoRA, clients: Sequence[ClientProfile], num_rounds: int) -> tuple[list[XGBLoRAState], Engine]:
    engine: Any = Engine(algorithm, clients)
    pairs = rounds.run_rounds(algorithm, engine, clients, lambda d: {"loss": 0.0}, num_rounds=num_rounds, seed=1)
    return [state for state, _ in pairs], engine


def test_one_client_is_the_centralised_algorithm(profile: MemoryProfile) -> None:
    """Boosting by hand on plain torch: fresh pairs on S_t, κ steps on loss and penalty, W_l += s b a."""
    client, lam, kappa = ClientProfile(0, 7, 10**9), 0.02, 2
    algorithm = XGBLoRA(toy.spec(), profile, blocks_per_round=2, kappa=kappa, lam=lam)
    states, engine = run(algorithm, [client], 6)
    model: Any = toy.site(client).model
    net = model.net
    for task in engine.tasks:
        chosen = [net.blocks[algorithm.spec.block_of[module]].linear for module in task.plan.ranks]
        for linear, module in zip(chosen, task.plan.ranks, strict=True):
            linear.lora_A = torch.nn.Parameter(task.tensors[lora.a_name(module)].clone())
            linear.lora_B = torch.nn.Parameter(torch.zeros(linear.weight.shape[0], 1))
        live = [factor for linear in chosen for factor in (linear.lora_A, linear.lora_B)]
        for _ in range(kappa):
            loss = torch.nn.functional.cross_entropy(net(model.x), model.y)
            loss = loss + lam * sum(factor.square().sum() for factor in live)
            trained = [*live, *net.head.parameters()]
            with torch.no_grad():
                for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                    parameter -= model.lr * gradient
        with torch.no_grad():
            for linear in chosen:
                linear.weight += toy.SCALE * linear.lora_B @ linear.lora_A
                linear.lora_A = torch.nn.Parameter(linear.lora_A[:0])
                linear.lora_B = torch.nn.Parameter(linear.lora_B[:, :0])
    assert len({tuple(task.plan.ranks) for task in engine.tasks}) > 1
    deployed, pristine = algorithm.deploy(states[-1]), toy.Net()
    for name, change in base_deltas.total(deployed.base_delta).items():
        expected = net.get_parameter(name) - pristine.get_parameter(name)
        torch.testing.assert_close(change, expected.detach(), rtol=1e-4, atol=1e-5)
        assert change.norm() > 0.01
    for name, tensor in deployed.tensors.items():
        torch.testing.assert_close(tensor, net.get_parameter(name).detach(), rtol=1e-4, atol=1e-5)


def test_the_function_does_not_jump_over_a_merge(profile: MemoryProfile) -> None:
    client = ClientProfile(0, 7, 10**9)
    for server in ("exact", "proj1", "freeze_a"):
        algorithm = XGBLoRA(toy.spec(), profile, blocks_per_round=2, server=server)
        states, engine = run(algorithm, [client], 3)
        deployed, model = algorithm.deploy(states[-1]), toy.site(client).model
        model.load(Task(Plan(0, {}, frozenset()), deployed.tensors, deployed.base_delta))
        torch.testing.assert_close(model.net(model.x), engine.logits[-1], rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]
        (plan,) = algorithm.plan(states[-1], [client], np.random.default_rng(0))
        assert isinstance(plan, Plan)
        model.load(algorithm.distribute(states[-1], plan))
        torch.testing.assert_close(model.net(model.x), engine.logits[-1], rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]
        assert float((engine.logits[0] - engine.logits[-1]).norm()) > 0.1


def test_a_penalty_makes_boosters_smaller(profile: MemoryProfile) -> None:
    client = ClientProfile(0, 7, 10**9)
    sizes = []
    for lam in (0.0, 0.05):
        states, _ = run(XGBLoRA(toy.spec(), profile, blocks_per_round=1, lam=lam), [client], 1)
        sizes.append(tensors.norm(base_deltas.total(states[-1].base)))
    assert 0 < sizes[1] < 0.9 * sizes[0]


def test_a_round_has_one_booster_and_who_cannot_train_it_all_trains_its_deepest_blocks(profile: MemoryProfile) -> None:
    spec = toy.spec()
    algorithm = XGBLoRA(spec, profile, blocks_per_round=2)
    state = algorithm.init(np.random.default_rng(0))

    def peak(blocks: Sequence[int]) -> int:
        modules = lora.blocks_modules(spec, blocks)
        trainable = frozenset(lora.names(modules)) | frozenset(spec.head)
        return memory.peak_bytes(profile, Plan(0, dict.fromkeys(modules, 1), trainable))

    def blocks_of(seed: int, budget: int) -> tuple[int, ...] | int | None:
        (entry,) = algorithm.plan(state, [ClientProfile(0, 5, budget)], np.random.default_rng(seed))
        if isinstance(entry, LeftOut):
            return entry.needed_bytes
        return tuple(spec.block_of[module] for module in entry.ranks)

    seen = set()
    for seed in range(20):
        chosen = blocks_of(seed, 10**9)
        assert isinstance(chosen, tuple)
        seen.add(chosen)
        assert blocks_of(seed, peak(chosen)) == chosen
        assert blocks_of(seed, peak(chosen) - 1) == blocks_of(seed, peak(chosen[1:])) == chosen[1:]
        assert blocks_of(seed, peak(chosen[1:]) - 1) == peak(chosen[1:])
    assert seen == {(0, 1), (0, 2), (1, 2)}


@pytest.mark.parametrize(("num_steps", "taken"), [(40, 4), (3, 3)])
def test_time_is_predicted_for_the_steps_that_a_client_takes(
    profile: MemoryProfile, num_steps: int, taken: int
) -> None:
    """At most κ: who keeps its deadline in these trains."""
    algorithm = XGBLoRA(toy.spec(), profile, blocks_per_round=1, kappa=4)
    client, state = ClientProfile(0, 320, 10**9, num_steps, flops_per_second=1e3), XGBLoRAState({}, 0)
    (plan,) = algorithm.plan(state, [client], np.random.default_rng(0))
    assert isinstance(plan, Plan)
    assert plan.seconds == memory.seconds(profile, plan, 1e3, taken)
    on_time = replace(client, deadline_s=plan.seconds)
    late = replace(client, deadline_s=0.9 * plan.seconds)
    assert algorithm.plan(state, [on_time], np.random.default_rng(0)) == [plan]
    (out,) = algorithm.plan(state, [late], np.random.default_rng(0))
    assert isinstance(out, LeftOut)
    assert f"needs {plan.seconds:.1f} s" in out.reason


def test_a_third_of_the_blocks_is_the_default(profile: MemoryProfile) -> None:
    (plan,) = XGBLoRA(toy.spec(), profile).plan(
        XGBLoRAState({}, 0), [ClientProfile(0, 5, 10**9)], np.random.default_rng(0)
    )
    assert isinstance(plan, Plan)
    assert len(plan.ranks) == 1


class Spy:
    """A model that trains nothing and keeps how it was asked to."""

    def load(self, task: Task) -> None:
        self.task = task

    def fit(self, trainable: frozenset[str], **options: Any) -> Mapping[str, float]:
        self.options = options
        return {"loss": 0.0}

    def read(self) -> Tensors:
        return self.task.tensors


def test_a_local_update_takes_kappa_steps_of_its_kind() -> None:
    for server, pattern in (("exact", "AB"), ("freeze_a", "B")):
        algorithm, spy = xgb(kappa=5, server=server), Spy()
        state = algorithm.init(np.random.default_rng(0))
        algorithm.local_update(task_of(algorithm, state, 0, [1]), Site(ClientProfile(0, 5, 0), spy))  # type: ignore[arg-type]
        assert (spy.options["max_steps"], spy.options["penalty"]) == (5, None)
        assert spy.options["kind"].patterns == (pattern,)


@pytest.mark.parametrize("server", ["exact", "freeze_a"])
def test_its_memory_is_predicted_to_the_byte_on_a_real_model(server: Any) -> None:
    sketch = tiny.build("llama", device="fake")
    settings = TrainingSettings(learning_rate=1e-3, batch_size=4)
    algorithm = XGBLoRA(sketch.spec, None, blocks_per_round=2, server=server)  # type: ignore[arg-type]
    profile = setup.profile_of(sketch, settings, checkpointing=False, kind=algorithm.step_kind)
    algorithm = XGBLoRA(sketch.spec, profile, blocks_per_round=2, server=server)
    for seed in range(3):
        (plan,) = algorithm.plan(XGBLoRAState({}, 0), [ClientProfile(0, 5, 10**12)], np.random.default_rng(seed))
        assert isinstance(plan, Plan)
        assert plan.peak_bytes == memory.measure_peak(sketch.program(plan, settings, kind=algorithm.step_kind))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(PlanError, match="blocks_per_round must be at most the model's 4 blocks, got 5"):
        xgb(blocks_per_round=5).plan(XGBLoRAState({}, 0), [], np.random.default_rng(0))
    for options, message in (
        ({"blocks_per_round": 0}, "blocks_per_round must be at least 1, got 0"),
        ({"kappa": 0}, "kappa must be at least 1, got 0"),
        ({"lam": -1.0}, "lam must be zero or more, got -1.0"),
    ):
        with pytest.raises(PlanError, match=message):
            xgb(**options)
