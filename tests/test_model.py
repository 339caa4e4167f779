import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig

from fedpilot import base_deltas, lora, tensors
from fedpilot.errors import ModelError
from fedpilot.memory import measure_peak
from fedpilot.model import ModelSettings, build_model
from fedpilot.training import TrainingSettings
from fedpilot.types import BaseDelta, Deployment, Plan, Task, Tensors
from tests import tiny
from tests.tiny import FAMILIES

SETTINGS = TrainingSettings(learning_rate=0.05, batch_size=4)


def frozen_bits(model) -> str:
    """Digest of every weight but adapters and head."""
    live = {id(parameter) for parameter in model.parameters_by_name().values()}
    frozen = ((name, p) for name, p in model.base.named_parameters() if id(p) not in live)
    return tensors.digest({name.replace(".base_layer", ""): p for name, p in frozen})


def gradients(model, inputs, seed: int = 0) -> dict[str, torch.Tensor]:
    """Gradients of a training step's loss with dropout drawn from the seed."""
    model.base.train()
    model.base.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.loss(inputs).backward()
    return {n: p.grad.clone() for n, p in model.parameters_by_name().items() if p.grad is not None}


def called_blocks(model, inputs) -> list[int]:
    """Numbers of the blocks that a forward pass runs, in order."""
    calls: list[int] = []
    hooks = [b.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, b in enumerate(model._blocks)]
    tiny.logits(model, inputs)
    for hook in hooks:
        hook.remove()
    return calls


# --- names and shapes ---------------------------------------------------------------------------------------------

FIRST_MODULE = {
    "bert": ("bert.encoder.layer.0.attention.self.value", (24, 24)),
    "vit": ("vit.layers.0.attention.q_proj", (24, 24)),
    "dinov2": ("dinov2.encoder.layer.0.attention.q_proj", (24, 24)),
    "llama": ("model.layers.0.self_attn.q_proj", (24, 24)),
    "gpt2": ("transformer.h.0.attn.c_attn", (72, 24)),
    "clip": ("vision_model.encoder.layers.0.self_attn.v_proj", (24, 24)),
    "llama-classifier": ("model.layers.0.self_attn.q_proj", (24, 24)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_have_the_base_models_own_names(family: str) -> None:
    model = tiny.build(family)  # a shared one may run fewer blocks just now
    spec = model.spec
    assert next(iter(spec.modules.items())) == FIRST_MODULE[family]
    assert spec.num_blocks == len(model.blocks) == (12 if family == "bert" else 3)
    assert [spec.block_of[module] for module in spec.modules] == sorted(spec.block_of.values())
    assert set(spec.block_of.values()) == set(range(spec.num_blocks))
    assert spec.scale == 1.5


def test_modules_that_are_not_square_are_out_by_in() -> None:
    assert tiny.shared("llama").spec.modules["model.layers.2.self_attn.v_proj"] == (12, 24)
    assert tiny.shared("bert").spec.modules["bert.encoder.layer.11.intermediate.dense"] == (40, 24)


def test_the_usual_modules_of_bert_are_query_and_value() -> None:
    modules = tiny.build("bert", device="meta", target_modules=None).spec.modules
    assert {module.rpartition(".")[2] for module in modules} == {"query", "value"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_what_lies_above_the_backbone(family: str) -> None:
    dense = ["score.weight"] if family == "llama-classifier" else ["classifier.weight", "classifier.bias"]
    assert list(tiny.shared(family).spec.head) == (dense if tiny.labels(family) else [])


@pytest.mark.parametrize("device", ["cpu", "fake"])
def test_a_pooler_is_trained_where_the_checkpoint_has_none_or_by_wish(device: str, tmp_path: Path) -> None:
    pooler = ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    weights = load_file(tiny.folder("bert") / "model.safetensors")
    tiny.config_of("bert").save_pretrained(tmp_path)
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    assert list(tiny.build("bert", device=device, train_pooler=True).spec.head)[:2] == pooler
    lacking = tiny.build("bert", device=device, source=str(tmp_path))
    assert list(lacking.spec.head)[:2] == pooler
    assert "bert.pooler.dense.weight" in lacking.facts["newly_initialised"]
    if device == "cpu":
        with pytest.raises(ModelError, match="or set train_pooler if only the pooler is missing"):
            tiny.build("bert", source=str(tmp_path), train_pooler=False)


def test_a_fresh_head_follows_from_its_seed_and_a_saved_one_is_kept() -> None:
    heads = [tensors.select(tiny.build("bert", seed=seed).spec.head, ["classifier.weight"]) for seed in (0, 0, 1)]
    assert tensors.digest(heads[0]) == tensors.digest(heads[1]) != tensors.digest(heads[2])
    saved = load_file(tiny.folder("vit") / "model.safetensors")
    assert torch.equal(tiny.build("vit", seed=7).spec.head["classifier.weight"], saved["classifier.weight"])
    assert "classifier.weight" in tiny.build("bert").facts["newly_initialised"]
    assert tiny.build("vit").facts["newly_initialised"] == ""


def test_building_and_loading_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = tiny.build("bert")
    model.load(tiny.task(model, tiny.mixed_ranks(model)))
    assert torch.equal(torch.get_rng_state(), before)


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_acts_as_its_delta_on_the_base_weight(family: str) -> None:
    model, inputs = tiny.build(family), tiny.batch(family)
    ranks = tiny.mixed_ranks(model)
    full = tiny.random_tensors(model, ranks)
    model.deploy(Deployment(full))
    adapted = tiny.logits(model, inputs)
    delta = {f"{module}.weight": lora.delta(full, module, model.spec.scale) for module in ranks}
    head = tensors.select(full, model.spec.head)
    model.deploy(Deployment(head))
    plain = tiny.logits(model, inputs)
    model.deploy(Deployment(head, base_deltas.extended(BaseDelta(), delta)))
    torch.testing.assert_close(tiny.logits(model, inputs), adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 0.01


def test_block_1_is_not_mistaken_for_blocks_10_and_11() -> None:
    model, inputs = tiny.shared("bert"), tiny.batch("bert")
    prefix, name = "bert.encoder.layer", "attention.self.value"
    ranks = {f"{prefix}.1.{name}": 2, f"{prefix}.10.{name}": 5, f"{prefix}.11.intermediate.dense": 3}
    model.load(tiny.task(model, ranks))
    loaded = {n: tuple(t.shape) for n, t in model.read().items() if ".lora_" in n}
    assert loaded == {
        f"{prefix}.1.{name}.lora_A": (2, 24),
        f"{prefix}.1.{name}.lora_B": (24, 2),
        f"{prefix}.10.{name}.lora_A": (5, 24),
        f"{prefix}.10.{name}.lora_B": (24, 5),
        f"{prefix}.11.intermediate.dense.lora_A": (3, 24),
        f"{prefix}.11.intermediate.dense.lora_B": (40, 3),
    }
    layers = {n.removesuffix(".base_layer") for n, _ in model.base.named_modules() if n.endswith(".base_layer")}
    assert layers == set(ranks)
    scales = {m: model.base.get_submodule(m).scaling["default"] for m in ranks}
    assert set(scales.values()) == {1.5}
    held = [(layer.r["default"], layer.lora_alpha["default"]) for layer in map(model.base.get_submodule, ranks)]
    assert held == [(rank, 1.5 * rank) for rank in ranks.values()]
    alone = tiny.task(model, {f"{prefix}.1.{name}": 2})
    model.load(alone)
    merged = {f"{prefix}.1.{name}.weight": lora.delta(alone.tensors, f"{prefix}.1.{name}", 1.5)}
    one = tiny.logits(model, inputs)
    model.deploy(Deployment(tensors.select(alone.tensors, model.spec.head), base_deltas.extended(BaseDelta(), merged)))
    torch.testing.assert_close(tiny.logits(model, inputs), one, rtol=1e-4, atol=1e-4)
    model.deploy(Deployment(model.spec.head))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_was_loaded_and_belongs_to_the_reader(family: str) -> None:
    model = tiny.shared(family)
    task = tiny.task(model, tiny.mixed_ranks(model))
    model.load(task)
    read = model.read()
    assert tensors.digest(read) == tensors.digest(task.tensors)
    for tensor in read.values():
        tensor.zero_()
    assert tensors.digest(model.read()) == tensors.digest(task.tensors)


def test_adapters_are_made_anew_only_when_ranks_change() -> None:
    model = tiny.build("llama")
    ranks = tiny.mixed_ranks(model)
    module = next(iter(ranks))
    model.load(tiny.task(model, ranks, seed=0))
    first = model.base.get_submodule(module)
    model.load(tiny.task(model, dict(reversed(ranks.items())), seed=1, blocks=(0, 1, 2)))
    assert model.base.get_submodule(module) is first
    model.load(tiny.task(model, {**ranks, module: 7}))
    assert model.base.get_submodule(module) is not first
    assert not any(name.endswith("base_layer.base_layer") for name, _ in model.base.named_modules())


def test_live_parameters_come_in_the_models_order_whatever_the_plans() -> None:
    model = tiny.shared("llama")
    shuffled = list(model.spec.modules)
    random.Random(0).shuffle(shuffled)
    model.load(tiny.task(model, dict.fromkeys(shuffled, 2)))
    assert list(model.parameters_by_name()) == list(lora.names(model.spec.modules))


def test_swapping_adapters_does_not_touch_a_frozen_weight() -> None:
    model = tiny.build("llama")
    before = tensors.digest(dict(model.base.named_parameters()))
    for blocks in ((0, 2), (1,), (0, 1, 2)):
        model.load(tiny.task(model, tiny.mixed_ranks(model, blocks)))
    model.deploy(Deployment({}))
    assert tensors.digest(dict(model.base.named_parameters())) == before


# --- what is trained ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_the_plan_trains_gets_a_gradient(family: str) -> None:
    model, inputs = tiny.shared(family), tiny.batch(family)
    ranks = tiny.mixed_ranks(model)
    last, first = list(ranks)[-1], next(iter(ranks))
    wanted = {lora.b_name(first), *lora.names([last]), *list(model.spec.head)[:1]}
    model.load(tiny.task(model, ranks, wanted))
    assert {n for n, p in model.base.named_parameters() if p.requires_grad} == {
        n for n, p in model.base.named_parameters() if any(p is model.parameters_by_name()[w] for w in wanted)
    }
    assert gradients(model, inputs).keys() == wanted


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_nothing_is_recorded_below_the_lowest_trained_block(family: str) -> None:
    model, inputs = tiny.shared(family), tiny.batch(family)
    ranks = tiny.mixed_ranks(model)
    lowest = model.spec.num_blocks - 2
    names = lora.names(lora.blocks_modules(model.spec, [lowest]))
    model.load(tiny.task(model, ranks, names))
    recorded: list[bool] = []
    hooks = [
        block.register_forward_hook(
            lambda _module, _inputs, out: recorded.append((out[0] if isinstance(out, tuple) else out).requires_grad)
        )
        for block in model.blocks
    ]
    gradients(model, inputs)
    for hook in hooks:
        hook.remove()
    assert recorded == [index >= lowest for index in range(model.spec.num_blocks)]


@pytest.mark.parametrize("family", ["bert", "dinov2", "llama", "gpt2"])
def test_recomputed_blocks_give_bit_equal_gradients_with_dropout_on(family: str) -> None:
    model, inputs = tiny.build(family, dropout=0.2, lora_dropout=0.1), tiny.batch(family)
    ranks = tiny.mixed_ranks(model)
    calls: list[int] = []
    for index in range(3):
        inner = next(module for module in model.blocks[index].modules() if isinstance(module, nn.LayerNorm | nn.Linear))
        inner.register_forward_hook(lambda *_, i=index: calls.append(i))
    results, counts = [], []
    for checkpointed in (frozenset(), frozenset({0, 2})):
        model.load(tiny.task(model, ranks, checkpointed=checkpointed))
        results.append(gradients(model, inputs))
        counts.append([calls.count(index) for index in range(3)])
        calls.clear()
    assert tensors.digest(results[0]) == tensors.digest(results[1])
    assert counts == [[1, 1, 1], [2, 1, 2]]
    model.load(tiny.task(model, ranks))
    assert tensors.digest(gradients(model, inputs, seed=1)) != tensors.digest(results[0])


@pytest.mark.parametrize(("dropout", "alike"), [(0.0, True), (None, False)])
def test_the_dropout_setting_overrides_the_base_models_own(dropout: float | None, alike: bool) -> None:
    model, inputs = tiny.build("bert", dropout=dropout), tiny.batch("bert")
    model.load(tiny.task(model, tiny.mixed_ranks(model, [11])))
    first, second = (tensors.digest(gradients(model, inputs, seed)) for seed in (0, 1))
    assert (first == second) is alike


# --- fewer blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shallow_model_runs_only_its_blocks_and_becomes_whole_again(family: str) -> None:
    model, inputs = tiny.build(family), tiny.batch(family)
    last = model.spec.num_blocks - 1
    model.load(tiny.task(model, tiny.mixed_ranks(model, [0, last]), blocks=(0, last)))
    assert called_blocks(model, inputs) == [0, last]
    assert model.blocks == [model._blocks[0], model._blocks[last]]
    shallow = model.read()
    hidden = sum(p.numel() for p in model.resident())
    model.deploy(Deployment(shallow))
    assert called_blocks(model, inputs) == list(range(model.spec.num_blocks))
    assert sum(p.numel() for p in model.resident()) > hidden


def test_a_shallow_model_equals_one_built_without_the_other_blocks(tmp_path: Path) -> None:
    model, inputs = tiny.build("llama"), tiny.batch("llama")
    task = tiny.task(model, tiny.mixed_ranks(model, [0, 2]), blocks=(0, 2))
    model.load(task)
    config = tiny.config_of("llama")
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    weights = load_file(tiny.folder("llama") / "model.safetensors")
    kept = {n.replace("layers.2.", "layers.1."): t for n, t in weights.items() if "layers.1." not in n}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    small = build_model(tiny.settings("llama", source=str(tmp_path)))
    small.deploy(Deployment({n.replace("layers.2.", "layers.1."): t for n, t in task.tensors.items()}))
    torch.testing.assert_close(tiny.logits(model, inputs), tiny.logits(small, inputs))


# --- changes of the base ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "dtype"), [("bert", "float32"), ("llama", "bf16"), ("gpt2", "float32")])
def test_a_base_delta_leaves_no_trace_when_it_is_gone(family: str, dtype: str) -> None:
    model, inputs = tiny.build(family, dtype=dtype), tiny.batch(family)
    before, plain = frozen_bits(model), tiny.logits(model, inputs)
    ranks = tiny.mixed_ranks(model)
    generator = torch.Generator().manual_seed(2)
    changes = [
        {f"{module}.weight": torch.randn(shape, generator=generator) for module, shape in some}
        for some in (list(model.spec.modules.items())[:2], list(model.spec.modules.items())[1:])
    ]
    start = tiny.random_tensors(model, ranks)
    for change in changes:
        model.load(Task(Plan(0, ranks, frozenset()), start, base_deltas.extended(BaseDelta(), change)))
        assert frozen_bits(model) != before
    name, change = next(iter(changes[1].items()))
    module = model.base.get_submodule(name.removesuffix(".weight"))
    weight = module.base_layer.weight.float()
    saved = load_file(tiny.folder(family) / "model.safetensors")
    pristine = next(t for n, t in saved.items() if name.endswith(n) or n.endswith(name)).to(weight.dtype)
    pristine = pristine.to(module.base_layer.weight.dtype).float()
    change = change.T if family == "gpt2" else change
    torch.testing.assert_close(weight, pristine + change, rtol=1e-2, atol=1e-2)
    model.deploy(Deployment(model.spec.head))
    assert frozen_bits(model) == before
    assert torch.equal(tiny.logits(model, inputs), plain)


def test_a_base_at_the_same_version_of_the_same_log_is_left_alone_and_another_log_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.build("bert")
    module, shape = next(iter(model.spec.modules.items()))
    one, two = (base_deltas.extended(BaseDelta(), {f"{module}.weight": torch.full(shape, x)}) for x in (0.5, 2.0))
    further = base_deltas.extended(one, {f"{module}.weight": torch.full(shape, 0.25)})
    weight = model.base.get_submodule(module).weight
    pristine = weight.detach().clone()
    summed: list[BaseDelta] = []
    total = base_deltas.total

    def counted(base: BaseDelta) -> Tensors:
        summed.append(base)
        return total(base)

    monkeypatch.setattr(base_deltas, "total", counted)
    for base, expected in ((one, 0.5), (one, 0.5), (further, 0.75), (two, 2.0), (BaseDelta(), 0.0), (one, 0.5)):
        model.deploy(Deployment(model.spec.head, base))
        assert torch.equal(weight, pristine + expected)
    assert summed == [one, further, two, BaseDelta(), one]


def test_a_base_delta_must_name_a_frozen_weight_and_fit_it() -> None:
    model = tiny.shared("bert")
    module = "bert.encoder.layer.1.intermediate.dense"
    for change, message in (
        ({"bert.encoder.layer.99.weight": torch.zeros(1)}, "must name a frozen weight, got bert.encoder.layer.99"),
        ({"classifier.weight": torch.zeros(3, 24)}, "must name a frozen weight, got classifier.weight"),
        ({f"{module}.weight": torch.zeros(24, 40)}, r"must have shape \(40, 24\), got \(24, 40\)"),
    ):
        with pytest.raises(ModelError, match=message):
            model.deploy(Deployment(model.spec.head, base_deltas.extended(BaseDelta(), change)))


# --- refused tasks ------------------------------------------------------------------------------------------------


def test_a_task_that_is_not_the_models_is_refused() -> None:
    model = tiny.shared("llama")
    good = tiny.task(model, tiny.mixed_ranks(model, [1]))
    a, b = good.tensors, good.plan.ranks
    module = next(iter(b))
    lost = {name: tensor for name, tensor in a.items() if name != f"{module}.lora_A"}
    wrong = {
        "must be among the model's targets, got model.layers.7": ({"model.layers.7.q_proj": 2}, a, None),
        "a rank must be at least 1, got less for model.layers.1": ({**b, module: 0}, a, None),
        "must have shape": ({**b, module: 9}, a, None),
        "got extra too many and none missing": (b, {**a, "extra": torch.zeros(1)}, None),
        f"got none too many and {module}.lora_A missing": (b, lost, None),
        "must lie in loaded blocks": (b, a, (0, 2)),
        "increasing numbers from 0 to 2": (b, a, (1, 0)),
        r"increasing numbers from 0 to 2, got \(1, 3\)": (b, a, (1, 3)),
        r"increasing numbers from 0 to 2, got \(\)": (b, a, ()),
    }
    for message, (ranks, given, blocks) in wrong.items():
        with pytest.raises(ModelError, match=message):
            model.load(Task(Plan(0, ranks, frozenset(), blocks=blocks), given))
    with pytest.raises(ModelError, match=r"trainable tensors must be loaded, got nowhere\.lora_A"):
        model.load(Task(Plan(0, b, frozenset({"nowhere.lora_A"})), a))


def test_blocks_that_cannot_be_recomputed_are_refused() -> None:
    model = tiny.build("llama")
    model._blocks[1] = nn.Identity()
    with pytest.raises(ModelError, match="must support recomputation, got Identity"):
        model.load(tiny.task(model, tiny.mixed_ranks(model), checkpointed=frozenset({1})))


# --- sources ------------------------------------------------------------------------------------------------------


def test_a_folder_or_hub_id_that_cannot_be_had_says_what_to_do(tmp_path: Path) -> None:
    for source, message in (
        (str(tmp_path), "must be a folder with a config.json"),
        ("nobody/such-a-model", "check the spelling, give the path of a folder, or allow the hub"),
        (str(tmp_path / "absent"), "check the spelling"),
    ):
        with pytest.raises(ModelError, match=message):
            build_model(tiny.settings("bert", source=source), num_labels=2)


def test_a_folder_without_weights_serves_only_without_storage(tmp_path: Path) -> None:
    tiny.config_of("llama").save_pretrained(tmp_path)
    settings = tiny.settings("llama", source=str(tmp_path))
    with pytest.raises(ModelError, match="must be a folder with a model"):
        build_model(settings)
    assert build_model(settings, device="meta").spec == build_model(settings, device="fake").spec


def test_a_checkpoint_must_hold_every_weight_below_the_head(tmp_path: Path) -> None:
    weights = load_file(tiny.folder("bert") / "model.safetensors")
    tiny.config_of("bert").save_pretrained(tmp_path)
    lost = next(name for name in weights if "layer.3.output.dense.weight" in name)
    save_file({n: t for n, t in weights.items() if n != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"must hold every weight but the head's, got none for .*layer\.3\.output"):
        build_model(tiny.settings("bert", source=str(tmp_path)), num_labels=2)


def test_unknown_target_modules_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"got \['qeury'\]; choose among attention.output.dense, attention.self.key"):
        tiny.build("bert", device="meta", target_modules=("value", "qeury"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_must_be_able_to_do_its_task(device: str) -> None:
    with pytest.raises(ModelError, match="must be one that vit can do, got 'causal-lm'"):
        tiny.build("vit", device=device, task="causal-lm")


def test_the_record_names_what_was_chosen() -> None:
    facts = tiny.build("bert", attention="eager", target_modules=None).facts
    assert (facts["attention"], facts["dtype"], facts["target_modules"]) == ("eager", "float32", "query, value")
    assert facts["head"] == "classifier.weight, classifier.bias"


def test_a_classifier_must_know_its_classes() -> None:
    with pytest.raises(ModelError, match="must know its number of classes"):
        build_model(tiny.settings("vit"))


# --- without storage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "gpt2"])
def test_a_step_without_storage_takes_the_bytes_of_a_real_one(family: str) -> None:
    peaks = []
    for device in ("cpu", "fake"):
        model = tiny.build(family, device=device)
        ranks, last = tiny.mixed_ranks(model), model.spec.num_blocks - 1
        trained = {*lora.names(lora.blocks_modules(model.spec, [last - 1, last])), *model.spec.head}
        plan = Plan(0, ranks, frozenset(trained), checkpointed=frozenset({last}), micro_batch=2)
        peaks.append(measure_peak(model.program(plan, SETTINGS)))
    assert peaks[0] == peaks[1]


def test_a_program_trains_what_the_plan_says_in_the_models_order() -> None:
    model = tiny.build("llama")
    ranks = tiny.mixed_ranks(model)
    plan = Plan(0, ranks, frozenset(lora.names(lora.blocks_modules(model.spec, [2]))))
    before = frozen_bits(model)
    program = model.program(plan, SETTINGS)
    start = model.read()
    program.step()
    program.step()
    changed = {name for name, tensor in model.read().items() if not torch.equal(tensor, start[name])}
    assert changed == plan.trainable
    assert frozen_bits(model) == before
    assert list(program.parameters) == list(lora.names(model.spec.modules))


def test_a_seven_billion_parameter_model_is_planned_from_its_config_alone(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ).save_pretrained(tmp_path)
    settings = ModelSettings(str(tmp_path), "causal-lm", max_length=16, dtype="bf16")
    model = build_model(settings, device="fake")
    plan = Plan(0, dict.fromkeys(model.spec.modules, 8), frozenset(lora.names(model.spec.modules)))
    program = model.program(plan, TrainingSettings(learning_rate=1e-3, batch_size=2))
    weights = sum(t.numel() * t.element_size() for t in program.resident)
    assert weights == pytest.approx(2 * 6.74e9 + 4 * 2 * 32 * 8 * 8192, rel=0.01)
    assert len(program.blocks) == 32


def test_a_bf16_base_keeps_adapters_and_head_in_float32() -> None:
    model, inputs = tiny.build("bert", dtype="bf16"), tiny.batch("bert")
    model.load(tiny.task(model, tiny.mixed_ranks(model)))
    assert {p.dtype for p in model.parameters_by_name().values()} == {torch.float32}
    assert model.base.get_submodule("bert.encoder.layer.0.output.dense").weight.dtype == torch.bfloat16
    assert {g.dtype for g in gradients(model, inputs).values()} == {torch.float32}


# --- losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_the_loss_is_the_one_that_transformers_computes(family: str) -> None:
    model, inputs = tiny.shared(family), tiny.batch(family)
    model.deploy(Deployment(tiny.random_tensors(model, tiny.mixed_ranks(model))))
    model.base.eval()
    with torch.no_grad():
        expected = model.base(**inputs).loss
        torch.testing.assert_close(model.loss(inputs), expected)


@pytest.mark.parametrize(("ends", "padding"), [(2, 2), ([7, 2], 7), (None, 0)])
def test_a_decoder_classifies_at_its_last_word_whatever_fills_up_behind_it(
    ends: int | list[int] | None, padding: int, tmp_path: Path
) -> None:
    config = json.loads((tiny.folder("llama-classifier") / "config.json").read_text())
    config |= {"pad_token_id": None, "eos_token_id": ends}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(tiny.folder("llama-classifier") / "model.safetensors", tmp_path)
    model = tiny.build("llama-classifier", source=str(tmp_path))
    assert model.base.config.pad_token_id == padding
    rows = tiny.examples("llama-classifier", 4)
    alone = [tiny.logits(model, next(rows.subset([index]).batches(1))) for index in range(4)]
    together = next(rows.batches(4))
    together["input_ids"] = together["input_ids"].masked_fill(together["attention_mask"] == 0, 59)
    torch.testing.assert_close(tiny.logits(model, together), torch.cat(alone), rtol=0, atol=1e-5)


def test_an_image_encoder_of_a_model_of_images_and_texts_has_its_own_sizes_and_dropouts(tmp_path: Path) -> None:
    config = tiny.config_of("clip")
    config.text_config.num_hidden_layers, config.vision_config.attention_dropout = 5, 0.25
    config.save_pretrained(tmp_path)
    model = tiny.build("clip", source=str(tmp_path), device="meta")
    assert (model.spec.num_blocks, model.spec.width, model.has_frozen_dropout) == (3, 24, True)
    assert not tiny.build("clip", source=str(tmp_path), device="meta", dropout=0.0).has_frozen_dropout


def test_a_batch_without_a_single_target_has_no_loss() -> None:
    model = tiny.shared("llama")
    inputs = {**tiny.batch("llama"), "labels": torch.full((5, tiny.LENGTH), -100)}
    inputs["labels"] = inputs["labels"][:, : inputs["input_ids"].shape[1]]
    assert float(model.loss(inputs).detach()) == 0.0


def test_images_of_another_size_are_taken_where_the_model_can() -> None:
    for family in ("vit", "dinov2", "clip"):
        model = tiny.build(family, image_size=8)
        plan = Plan(0, {}, frozenset(model.spec.head))
        program = model.program(plan, SETTINGS)
        assert program.batch[0].shape == (4, 3, 8, 8)
        program.step()


def test_a_made_up_text_has_padding_in_every_example_but_the_first() -> None:
    made = tiny.shared("bert").made_up_batch(3)
    assert made["attention_mask"].sum(dim=1).tolist() == [tiny.LENGTH, tiny.LENGTH - 1, tiny.LENGTH - 1]
    assert np.prod(made["input_ids"].shape) == 3 * tiny.LENGTH


def test_attention_must_be_settled_before_a_model_is_built() -> None:
    with pytest.raises(ModelError, match="attention must be settled before a model is built, got 'auto'"):
        build_model(ModelSettings(str(tiny.folder("bert")), attention="auto"), num_labels=2, device="meta")
