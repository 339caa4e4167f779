"""Bases in 8 and 4 bits: what is stored, what is computed with it, and what a changed base becomes."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BertModel

from fedpilot import memory, planning
from fedpilot.algorithms import ALGORITHMS
from fedpilot.errors import ModelError
from fedpilot.export import export_peft
from fedpilot.model import AdaptedModel, ModelSettings, build_model, quantised
from fedpilot.model.quantised import QuantisedLinear
from fedpilot.training import TrainingSettings
from fedpilot.types import Deployment, Plan, Task
from tests import tiny

KINDS: tuple[Any, ...] = ("int8", "nf4")
TRAINING = TrainingSettings(learning_rate=0.01, batch_size=4)


def linear(rows: int = 96, columns: int = 40, *, bias: bool = True) -> nn.Linear:
    """Weights that float16 holds, which bitsandbytes rounds to first; rows of unlike size, one of zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer = nn.Linear(columns, rows, bias=bias).requires_grad_(False)
        layer.weight.mul_(torch.logspace(-1, 1, rows).unsqueeze(1))
        layer.weight[5] = 0
        layer.weight.copy_(layer.weight.half())
    return layer


# --- what is stored -----------------------------------------------------------------------------------------------


def test_eight_bits_are_those_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "_PIECE", 128)
    layer = linear()
    stored = QuantisedLinear(layer, "int8")
    theirs, scales, _ = bnb.int8_vectorwise_quant(layer.weight.half())
    assert torch.equal(stored.weight, theirs)
    assert torch.equal(stored.scales, scales)


@pytest.mark.parametrize(
    ("rows", "columns"), [(96, 40), (7, 3), (41, 39)], ids=["whole blocks", "little", "an odd rest"]
)
def test_four_bits_are_those_of_bitsandbytes(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "_PIECE", 128)
    layer = linear(rows, columns)
    stored = QuantisedLinear(layer, "nf4")
    theirs, state = bnb.quantize_4bit(layer.weight, blocksize=64, quant_type="nf4")
    assert torch.equal(stored.weight, theirs)
    assert torch.equal(stored.scales, state.absmax)
    assert torch.equal(stored.whole(torch.float32), bnb.dequantize_4bit(theirs, state))


def test_no_entry_is_further_off_than_half_a_step() -> None:
    layer = linear()
    error = (QuantisedLinear(layer, "int8").whole(torch.float32) - layer.weight).abs()
    assert (error <= layer.weight.abs().amax(dim=1, keepdim=True) / 254 * (1 + 1e-5)).all()
    # NF4's widest gap between neighbours is .304 of the scale, at its lower end.
    error = (QuantisedLinear(layer, "nf4").whole(torch.float32) - layer.weight).abs().flatten()
    scales = layer.weight.abs().flatten().reshape(-1, 64).amax(dim=1).repeat_interleave(64)
    assert (error <= scales * 0.153).all()
    assert error.max() > 0.05 * scales.min()


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_without_numbers_takes_as_many_bytes(kind: Any) -> None:
    real, empty = QuantisedLinear(linear(7, 3), kind), QuantisedLinear(linear(7, 3).to("meta"), kind)
    for name, tensor in real.state_dict(keep_vars=True).items():
        other = empty.get_parameter(name)
        assert (other.shape, other.dtype) == (tensor.shape, tensor.dtype)
    assert (empty.scales.shape, empty.scales.dtype) == (real.scales.shape, real.scales.dtype)


# --- what is computed ---------------------------------------------------------------------------------------------


def test_a_product_is_that_of_bitsandbytes_four_bits() -> None:
    layer = linear(bias=False)
    theirs = Linear4bit(40, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False)
    theirs.load_state_dict(layer.state_dict())
    theirs.to("cpu")
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(QuantisedLinear(layer, "nf4")(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_and_its_gradient_are_those_of_the_whole_weight_bit_for_bit(kind: Any) -> None:
    layer = QuantisedLinear(linear(), kind)
    plain = linear()
    plain.weight.data = layer.whole(torch.float32)
    given = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))
    results = []
    for module in (layer, plain):
        x = given.clone().requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])  # type: ignore[arg-type]


def test_nothing_is_kept_for_the_backward_pass() -> None:
    layer, x = QuantisedLinear(linear(), "nf4"), torch.randn(5, 40, requires_grad=True)
    counter = memory.LiveStorages()
    counter.hold([layer.weight, layer.scales, layer.bias, x])
    with counter.counting():
        before = counter.live
        y = layer(x)
        assert counter.live - before == 4 * y.numel()
        assert counter.peak - before == 4 * (y.numel() + 96 * 40)  # the whole weight, while it is needed


def in_full(quantised: AdaptedModel, family: str) -> AdaptedModel:
    """A model in full precision with the weights that the quantised one stands for."""
    plain = tiny.build(family)  # its weights take no gradients
    for name, module in quantised.base.named_modules():
        if isinstance(module, QuantisedLinear):
            plain.base.get_parameter(f"{name}.weight").copy_(module.whole(torch.float32))
    return plain


def gradients(model: AdaptedModel, task: Task, family: str) -> dict[str, torch.Tensor]:
    model.load(task)
    model.train(task.plan.trainable, frozen_dropout=False)
    model.base.eval()
    model.loss(tiny.batch(family)).backward()
    return {name: p.grad.clone() for name, p in model.parameters_by_name().items() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "kind"),
    [("bert", "int8"), ("llama", "nf4"), ("dinov2", "nf4"), ("clip", "int8"), ("llama-classifier", "nf4")],
)
def test_a_model_trains_as_one_in_full_precision_with_the_weights_that_are_stored(family: str, kind: Any) -> None:
    quantised = tiny.build(family, quantisation=kind)
    plain = in_full(quantised, family)
    ranks = tiny.mixed_ranks(quantised)
    task = tiny.task(quantised, ranks)
    own, other = gradients(quantised, task, family), gradients(plain, task, family)
    assert own.keys() == other.keys() == task.plan.trainable
    assert all(torch.equal(own[name], other[name]) for name in own)
    linears = [m for block in quantised.blocks for m in block.modules() if isinstance(m, QuantisedLinear)]
    assert len(linears) >= 4 * quantised.spec.num_blocks
    assert not any(isinstance(m, QuantisedLinear) for m in map(quantised.base.get_submodule, quantised.head_modules()))


@pytest.mark.parametrize(("kind", "dtype", "bits"), [("int8", "bf16", 8), ("nf4", "bf16", 4), ("nf4", "float32", 4)])
def test_the_model_without_storage_stands_for_the_real_one(kind: Any, dtype: Any, bits: int) -> None:
    real, fake = (tiny.build("llama", quantisation=kind, dtype=dtype, device=device) for device in ("cpu", "fake"))
    kinds = [[(tuple(t.shape), t.dtype) for t in model.resident()] for model in (real, fake)]
    assert kinds[0] == kinds[1]
    assert real.num_parameters == fake.num_parameters == tiny.build("llama").num_parameters
    stored = sum(m.weight.nbytes for m in real.base.modules() if isinstance(m, QuantisedLinear))
    assert stored * 8 == bits * real.linear_weights


# --- a changed base -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_stands_beside_the_bits_and_leaves_no_trace_when_it_is_gone(kind: Any) -> None:
    quantised = tiny.build("llama", quantisation=kind)
    plain = in_full(quantised, "llama")
    inputs, start = tiny.batch("llama"), tiny.random_tensors(quantised, tiny.mixed_ranks(quantised))
    before = [tensor.clone() for tensor in quantised.resident()]
    untouched = tiny.logits(quantised, inputs)
    for rounds in (1, 4):  # as factors, and as a snapshot
        deployment = Deployment(start, tiny.changed_base(quantised, rounds))
        for model in (quantised, plain):
            model.deploy(deployment)
        assert torch.equal(tiny.logits(quantised, inputs), tiny.logits(plain, inputs))
        assert not torch.equal(tiny.logits(quantised, inputs), untouched)
    quantised.deploy(Deployment(quantised.spec.head))
    assert all(torch.equal(one, other) for one, other in zip(quantised.resident(), before, strict=True))
    assert torch.equal(tiny.logits(quantised, inputs), untouched)


def test_a_changed_base_takes_what_its_methods_are_charged() -> None:
    model, fake = (tiny.build("llama", quantisation="nf4", device=device) for device in ("cpu", "fake"))
    plan = planning.train_all(model.spec, 0, 3)
    profile = memory.trace(lambda p, size: fake.program(p, TRAINING, size), fake.spec, batch=TRAINING.batch_size)
    program = model.program(plan, TRAINING)
    tensors = {name: tensor.detach() for name, tensor in program.parameters.items()}
    model.load(Task(plan, tensors, tiny.changed_base(model, 1)))
    changed = replace(program, resident=(*model.resident(), *program.batch))
    charged = sum(4 * rows * columns for rows, columns in model.spec.modules.values())
    assert memory.measure_peak(changed) == memory.peak_bytes(profile, plan) + charged


def test_every_method_that_changes_the_base_says_so() -> None:
    sources = {name: Path(sys.modules[cls.__module__].__file__ or "").read_text() for name, cls in ALGORITHMS.items()}
    changing = {name for name, text in sources.items() if "base_deltas.extended" in text}
    assert changing == {name for name, cls in ALGORITHMS.items() if getattr(cls, "changes_base", False)}
    assert changing == {"fedex-lora", "flora", "galore", "xgblora"}


# --- what cannot be -----------------------------------------------------------------------------------------------


def test_a_weight_that_is_quantised_is_not_trained_whole() -> None:
    model = tiny.build("llama", quantisation="int8", device="fake")
    plan = Plan(0, {}, frozenset({f"{next(iter(model.spec.modules))}.weight"}))
    with pytest.raises(
        ModelError, match=r"must not be quantised, got .* in int8; .*'none', or choose .* such as flora"
    ):
        model.program(plan, TRAINING)


@pytest.mark.parametrize("device", ["cpu", "fake"])
def test_layers_that_keep_their_weight_transposed_are_refused(device: Any) -> None:
    with pytest.raises(ModelError, match=r"must go with linear layers, got .*, a Conv1D as GPT-2 has"):
        tiny.build("gpt2", quantisation="nf4", device=device)


@pytest.mark.parametrize("device", ["cpu", "fake"])
def test_weights_that_somebody_else_has_quantised_are_refused(tmp_path: Path, device: Any) -> None:
    folder = shutil.copytree(tiny.folder("llama"), tmp_path / "llama-bnb-4bit")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"must be stored in full precision, got quantised weights in .*-4bit"):
        build_model(ModelSettings(str(folder), "causal-lm"), device=device)


WITHOUT = """
import sys
from fedpilot import startup
startup.without_bitsandbytes()  # as the command line does
from fedpilot.errors import ModelError
from fedpilot.model import ModelSettings, build_model

class NotInstalled:
    def find_spec(self, name, *rest):
        if name == "bitsandbytes":
            raise ModuleNotFoundError(name)

def build(kind, device):
    try:
        build_model(ModelSettings(sys.argv[1], "causal-lm", quantisation=kind), device=device)
        print(kind, device, "built")
    except ModelError as error:
        print(error)

build("nf4", "fake")
build("int8", "cpu")
assert not any(name.startswith("bitsandbytes.") for name in sys.modules)
sys.meta_path.insert(0, NotInstalled())
build("nf4", "cpu")
del sys.meta_path[0]
build("nf4", "cpu")
"""


def test_four_bits_alone_need_bitsandbytes_and_say_what_to_install() -> None:
    command = [sys.executable, "-c", WITHOUT, str(tiny.folder("llama"))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    planned, eight, missing, four = run.stdout.splitlines()
    assert (planned, eight, four) == ("nf4 fake built", "int8 cpu built", "nf4 cpu built")
    assert "needs bitsandbytes" in missing
    assert "pip install 'fedpilot[quant]'" in missing


# --- where it goes ------------------------------------------------------------------------------------------------

PLAIN_USER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
for folder in map(Path, sys.argv[1:]):
    code = (folder / "README.md").read_text().split("```python\\n")[1].split("```")[0]
    exec(code.replace("<this folder>", str(folder)))
    with torch.no_grad():
        logits = model.eval()(**load_file(folder / "inputs.safetensors")).logits
    save_file({"logits": logits.float()}, folder / "outputs.safetensors")
assert "fedpilot" not in sys.modules
"""


@cache
def in_whole_scales(family: str) -> Path:
    """Layers of 64 inputs and 32 outputs, or multiples: bitsandbytes' kernel of 4 bits and bf16 takes no others."""
    path = Path(mkdtemp(prefix=f"fedpilot-64-{family}-"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    config = type(tiny.config_of(family))(**{**tiny.config_of(family).to_dict(), **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = BertModel(config) if family == "bert" else AutoModelForCausalLM.from_config(config)
        made.save_pretrained(path)
    return path


def test_the_cards_code_loads_the_adapter_beside_a_base_that_bitsandbytes_stores(tmp_path: Path) -> None:
    own: dict[Path, torch.Tensor] = {}
    for family, kind in (("llama", "int8"), ("llama", "nf4"), ("bert", "nf4")):  # BERT's pooler is part of its head
        inputs = {name: tensor for name, tensor in tiny.batch(family).items() if name != "labels"}
        source = str(in_whole_scales(family) if kind == "nf4" else tiny.folder(family))
        model = tiny.build(family, source=source, quantisation=kind)
        deployment = Deployment(tiny.random_tensors(model, tiny.mixed_ranks(model)))
        folder = export_peft(model, deployment, tmp_path / f"{family}-{kind}")
        save_file(inputs, folder / "inputs.safetensors")
        model.deploy(deployment)
        own[folder] = tiny.logits(model, inputs)
    run = subprocess.run([sys.executable, "-c", PLAIN_USER, *own], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    # bitsandbytes rounds activations to 8 bits too, which moves the logits as much as rounding the weights did; and it
    # multiplies 4 bits in bf16 where the processor can.
    four = 0.03 if bnb.has_avx512bf16() else 1e-5
    for (folder, logits), most in zip(own.items(), (0.03, four, four), strict=True):
        theirs = load_file(folder / "outputs.safetensors")["logits"]
        assert (theirs - logits).norm() < most * logits.norm(), folder.name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_computes_with_what_a_cpu_stores(kind: Any) -> None:
    models = [tiny.build("llama", quantisation=kind, device=device) for device in ("cpu", "cuda")]
    task = tiny.task(models[0], tiny.mixed_ranks(models[0]))
    inputs = tiny.batch("llama")
    own = []
    for model in models:
        model.load(task)
        own.append(tiny.logits(model, {name: tensor.to(model.device) for name, tensor in inputs.items()}).cpu())
    torch.testing.assert_close(own[0], own[1], rtol=1e-3, atol=1e-4)
