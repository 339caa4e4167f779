"""The one file that imports peft: a shared frozen base whose adapters are swapped in place, names in, names out.

Outside, a tensor is named by the base model's own module path (``bert.encoder.layer.0.attention.self.query.lora_A``,
``classifier.weight``); PEFT's prefixes stay in here. Three things differ from a `peft.PeftModel`, on purpose: the head
is trained in place instead of in a second copy, ranks differ by module under one scale, and only what a plan trains has
``requires_grad``, so that no backward pass goes below the lowest trained block.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, LoraModel
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from fedpilot import attachments, base_deltas, lora, training
from fedpilot.attachments import Pooling
from fedpilot.errors import ModelError
from fedpilot.memory import StepProgram
from fedpilot.model.attached import Attached, attach, pool_hidden
from fedpilot.model.last_block import FirstPosition
from fedpilot.model.loading import (
    Base,
    Device,
    ModelSettings,
    backbone_config,
    backbone_of,
    find_blocks,
    find_targets,
    load_base,
    some,
)
from fedpilot.model.prefix import Prefix, PrefixCache, by_example, entered_at, key_of
from fedpilot.model.quantised import QuantisedLinear
from fedpilot.privacy import NoisySum
from fedpilot.training import IGNORED, Batch, TrainingSettings
from fedpilot.types import Attachment, BaseDelta, Deployment, ModelSpec, Plan, StepKind, Task, Tensors

# Where PEFT's own mapping has nothing, or the names of older versions of transformers.
_TARGETS: Mapping[str, tuple[str, ...]] = {
    "vit": ("q_proj", "v_proj"),
    "dinov2": ("q_proj", "v_proj"),
    "clip": ("q_proj", "v_proj"),
}
_PEFT_TASKS: Mapping[str, str | None] = {
    "sequence-classification": "SEQ_CLS",
    "image-classification": None,
    "causal-lm": "CAUSAL_LM",
}
_ADAPTER = "default"


class AdaptedModel:
    """A base model with adapters that `load` swaps in place; one in a process serves all clients in turn.

    Built by `build_model`.

    Attributes:
        settings: What it was built from.
        spec: What algorithms know of it.
        base: The transformers model. Its weights are frozen but for the head.
        facts: What was chosen while it was built, for the record.
        plan: The plan of the loaded task; ``None`` after `deploy`.
        block_path: Name of the base model's list of blocks.
        accepted: Names that a batch may have for the base to read them.
        mode: Context in which its tensors can be computed with; not trivial for a model without storage.
        unquantised: Linear modules that are not quantised: the head, and whatever else lies outside quantised blocks.
        linear_weights: Numbers in the weights of the blocks' linear layers, however stored; 0 with any Conv1D.
    """

    def __init__(self, settings: ModelSettings, base: Base) -> None:
        self.settings = settings
        self.base = base.model.requires_grad_(False)
        self.mode = base.mode
        self._block_list, path = find_blocks(self.base)
        self._blocks: list[nn.Module] = list(self._block_list)
        owner, _, self._block_attribute = path.rpartition(".")
        self._block_owner = self.base.get_submodule(owner)
        self.block_path = path
        endings = settings.target_modules or _default_targets(self.base)
        modules, block_of = find_targets(self.base, endings, path)
        self.spec = ModelSpec(
            modules, block_of, len(self._blocks), settings.alpha / settings.rank, base.head, _width(self.base)
        )
        self.facts = {**base.facts, "target_modules": ", ".join(endings)}
        # Taken before any injection: the parameter objects survive it, their names do not.
        self._parameters: dict[str, nn.Parameter] = dict(self.base.named_parameters())
        self._inputs = _extra_inputs(self.base, settings)
        self.accepted = frozenset(inspect.signature(self.base.forward).parameters)
        self._padding = _padding(self.base, settings)
        self._attachment: Attachment | None = None
        self._attached: Attached | None = None
        self._transposed = {f"{n}.weight" for n, m in self.base.named_modules() if isinstance(m, Conv1D)}
        self._quantised = {f"{n}.weight": m for n, m in self.base.named_modules() if isinstance(m, QuantisedLinear)}
        linear = {n: m for n, m in self.base.named_modules() if isinstance(m, nn.Linear)}
        self.unquantised = tuple(name for name in linear if f"{name}.weight" not in self._quantised)
        in_blocks = [module for name, module in linear.items() if name.startswith(f"{path}.")]
        numbers = sum(module.in_features * module.out_features for module in in_blocks)
        transposed = any(name.startswith(f"{path}.") for name in self._transposed)
        self.linear_weights = 0 if transposed else numbers
        self._pristine: dict[str, torch.Tensor] = {}
        self._base: BaseDelta | None = None
        self._starts: dict[str, torch.Tensor] = {}  # first bits of the weights that are trained whole
        self._tuner: LoraModel | None = None
        self._ranks: dict[str, int] = {}
        self._live: dict[str, nn.Parameter] = {name: self._parameters[name] for name in base.head}
        self.plan: Plan | None = None
        self._below = _modules_before(self.base, path)
        self._first_position: FirstPosition | None = None
        if settings.last_block == "first-position":
            self._first_position = FirstPosition(self._blocks[-1], str(self.facts["model_type"]), settings.task)
        self._base_number = 0
        self._cache: PrefixCache | None = None
        self._prefix: Prefix | None = None
        self._copy(base.head)

    def _padded(self, inputs: Batch) -> Batch:
        """The batch with the padding that the model looks for, whatever its tokenizer fills up with."""
        if self._padding is None or not {"input_ids", "attention_mask"} <= inputs.keys():
            return inputs
        filled = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, self._padding)
        return {**inputs, "input_ids": filled}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self._parameters.values())).device

    @property
    def has_storage(self) -> bool:
        """Whether its tensors hold numbers; false on the meta device and for fake tensors."""
        return not isinstance(self.mode, FakeTensorMode) and self.device.type != "meta"

    @property
    def task_type(self) -> str:
        """What the model does."""
        return self.settings.task

    @property
    def extra_inputs(self) -> Mapping[str, bool]:
        """What a forward pass needs beside the batch."""
        return self._inputs

    @property
    def num_labels(self) -> int:
        """Classes of a classifier."""
        config: Any = self.base.config
        return int(config.num_labels)

    @property
    def padding(self) -> int | None:
        """Token by which a decoder that classifies finds the end of a text; ``None`` for all other models."""
        return self._padding

    @property
    def filler(self) -> int:
        """A token that may stand where the attention mask is 0."""
        config: Any = backbone_config(self.base)
        known = getattr(config, "pad_token_id", None)
        return known if isinstance(known, int) and known >= 0 else 0

    @property
    def blocks(self) -> list[nn.Module]:
        """Blocks that run, next to the input first."""
        return list(getattr(self._block_owner, self._block_attribute))

    @cached_property
    def num_parameters(self) -> int:
        """Of the base, each counted once, however few bits it is stored in."""
        stored = {name: layer.in_features * layer.out_features for name, layer in self._quantised.items()}
        return sum(stored.get(name, parameter.numel()) for name, parameter in self._parameters.items())

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Live adapter and head parameters and weights that are trained whole, by global name."""
        return dict(self._live)

    def read(self) -> Tensors:
        """Copies of all loaded adapter and head tensors, on the CPU; of a weight that is trained whole, its change.

        A change is (out, in) and float32, whatever the layout of the weight.
        """
        return {name: self._copy_of(name, parameter.detach()) for name, parameter in self._live.items()}

    def factored(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Tensors:
        """Changes of weights as a base delta's pairs, on the CPU; given as (left, right) in the weight's own layout."""
        pairs: dict[str, torch.Tensor] = {}
        for name, (left, right) in factors.items():
            module = name.removesuffix(".weight")
            b, a = (right.T, left.T) if name in self._transposed else (left, right)
            pairs[base_deltas.a_name(module)] = a.detach().to("cpu", copy=True).contiguous()
            pairs[base_deltas.b_name(module)] = b.detach().to("cpu", copy=True).contiguous()
        return pairs

    def _copy_of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in self._starts:
            return tensor.to("cpu", copy=True)
        change = tensor.to("cpu") - self._starts[name]
        return change.T.contiguous() if name in self._transposed else change

    def load(self, task: Task) -> None:
        """Makes the model the one that a task describes.

        Raises:
            ModelError: The task's names, shapes or blocks are not this model's.
        """
        plan = task.plan
        self._install(plan.ranks, task.tensors, task.base_delta, plan.blocks, plan.attachment)
        self._open_weights(plan)
        self.set_trainable(plan.trainable)
        self._set_checkpointed(plan.checkpointed)
        self.plan = plan

    def deploy(self, deployment: Deployment) -> None:
        """Makes the model the one that is evaluated and exported: the deployment's blocks, nothing trained."""
        tensors = deployment.tensors
        ranks = ranks_of(tensors)
        self._install(ranks, tensors, deployment.base_delta, deployment.blocks, deployment.attachment)
        self.set_trainable(frozenset())
        self._set_checkpointed(frozenset())
        self.plan = None

    @contextmanager
    def whole(self, without: Iterable[int]) -> Iterator[None]:
        """In the body all blocks run, and pairs in the named blocks count for nothing: a teacher beside its student."""
        running, absent = [self._blocks.index(block) for block in self.blocks], frozenset(without)
        self._run_blocks(range(self.spec.num_blocks))  # modules are found by their names in the whole model
        layers: list[Any] = [self.base.get_submodule(m) for m in self._ranks if self.spec.block_of[m] in absent]
        for layer in layers:
            layer.scaling[_ADAPTER] = 0.0
        try:
            yield
        finally:
            for layer in layers:
                layer.scaling[_ADAPTER] = self.spec.scale
            self._run_blocks(running)

    def linear_layers(self) -> dict[str, tuple[str, str | None]]:
        """Layers of the loaded pairs and head: path in the whole base -> names of the weight and of the bias."""
        found: dict[str, tuple[str, str | None]] = {}
        for name in self._live:
            owner, _, kind = name.rpartition(".")
            if kind in ("lora_A", "lora_B"):
                found[f"{name}.{_ADAPTER}"] = (name, None)
            elif kind == "weight":
                bias = f"{owner}.bias"
                found[owner] = (name, bias if bias in self._live else None)
        return found

    @contextmanager
    def with_layers(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """In the body these layers stand where the base has its own, by path in the whole base."""
        running = [self._blocks.index(block) for block in self.blocks]
        own = self._exchanged(layers, running)
        try:
            yield
        finally:
            self._exchanged(own, running)

    def _exchanged(self, layers: Mapping[str, nn.Module], running: Sequence[int]) -> dict[str, nn.Module]:
        """Puts layers into the base; those that stood there."""
        self._run_blocks(range(self.spec.num_blocks))  # modules are found by their names in the whole model
        before = {path: self.base.get_submodule(path) for path in layers}
        for path, layer in layers.items():
            self.base.set_submodule(path, layer)
        self._run_blocks(running)
        return before

    @contextmanager
    def watching(self, blocks: Iterable[int]) -> Iterator[dict[int, torch.Tensor]]:
        """Block -> hidden states (examples, length, width) that it gave in the body's last forward pass."""
        found: dict[int, torch.Tensor] = {}

        def note(block: int, module: nn.Module, args: object, output: Any) -> None:
            found[block] = output if isinstance(output, torch.Tensor) else output[0]

        hooks = [self._blocks[block].register_forward_hook(partial(note, block)) for block in blocks]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def has_frozen_dropout(self) -> bool:
        """Whether blocks or embeddings drop anything out while they train."""
        options: Mapping[str, object] = backbone_config(self.base).to_dict()
        above = ("classifier", "seq_classif", "summary")
        rates = [value for name, value in options.items() if "drop" in name and not name.startswith(above)]
        return any(isinstance(rate, int | float) and rate > 0 for rate in [*rates, self.settings.lora_dropout])

    @cached_property
    def rows_are_independent(self) -> bool:
        """Whether an example trains alike whatever else is in the batch: nothing drops out, nothing is batch-normed."""
        dropping = (module.p > 0 for module in self.base.modules() if isinstance(module, nn.Dropout))
        normed = (isinstance(module, _BatchNorm) for module in self.base.modules())
        return not (self.has_frozen_dropout or any(dropping) or any(normed))

    @cached_property
    def head_is_linear(self) -> bool:
        """Whether the head is made of plain linear layers and nothing else."""
        owners = {name.rpartition(".")[0] for name in self.spec.head}
        held = {f"{owner}.{name}" for owner in owners for name, _ in self.base.get_submodule(owner).named_parameters()}
        return held == set(self.spec.head) and all(type(self.base.get_submodule(o)) is nn.Linear for o in owners)

    def train(self, trainable: frozenset[str], *, frozen_dropout: bool) -> None:
        """Switches dropout on; without ``frozen_dropout`` only in and above the lowest block with a trained tensor."""
        self.base.train()
        if not frozen_dropout:
            for module in (*self._below, *self.blocks[: self._depth(trainable)]):
                module.eval()

    def remember_prefix(self, trainable: frozenset[str], max_bytes: int) -> None:
        """From here to the next load, blocks below the lowest trained one run once an example, within the bound.

        What is remembered lasts as long as the model: another client's turn, or a later round, with the same tensors
        in these blocks finds it again. Dropout must be off there; 0 bytes switch it off.
        """
        depth, attached = self._depth(trainable), self._attached
        if attached is not None and attached.depends_on_itself:
            depth = min(depth, attached.lowest)  # all blocks run
        self._prefix = None
        if not max_bytes or not (depth or attached):
            return
        if self._cache is None or self._cache.max_bytes != max_bytes:
            self._cache = PrefixCache(max_bytes)
        if not depth:
            return
        blocks = self.blocks
        chosen = [self._blocks.index(block) for block in blocks[:depth]]
        below = {n: p for n, p in self._live.items() if self.spec.block_of.get(n.rpartition(".")[0], -1) in chosen}
        self._prefix = Prefix(blocks, depth, self._cache, key_of(below, chosen, self._base_number))

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """What is remembered of frozen prefixes."""
        return self._cache

    def _depth(self, trainable: frozenset[str]) -> int:
        """How many of the running blocks lie below the lowest one with a trained tensor."""
        owners = (name.rpartition(".")[0] for name in trainable)
        lowest = min((self.spec.block_of[name] for name in owners if name in self.spec.block_of), default=None)
        blocks = self.blocks
        return len(blocks) if lowest is None else blocks.index(self._blocks[lowest])

    def eval_recomputing(self) -> None:
        """Switches dropout off, but leaves recomputed blocks recomputing, which transformers does in training alone."""
        self.base.eval()
        for block in self.blocks:
            block.training = bool(getattr(block, "gradient_checkpointing", False))

    def set_trainable(self, names: frozenset[str]) -> None:
        """Gives exactly the named tensors gradients.

        Raises:
            ModelError: A name is not loaded.
        """
        unknown = sorted(names - self._live.keys())
        if unknown:
            raise ModelError(f"trainable tensors must be loaded, got {some(unknown)}; plan a rank for the module first")
        for name, parameter in self._live.items():
            parameter.requires_grad_(name in names)
            parameter.grad = None

    def logits(self, batch: Batch) -> torch.Tensor:
        """(examples, classes), or (examples, length, words) of a language model."""
        read = {} if self._attachment is None else self._attachment.columns
        inputs = {name: tensor for name, tensor in batch.items() if name in self.accepted or name in read}
        inputs.pop("labels", None)
        if self._prefix is None:
            return self._forward(inputs)
        self._prefix.prepare(inputs, self._forward)
        whole = getattr(self._block_owner, self._block_attribute)
        setattr(self._block_owner, self._block_attribute, self._prefix.rest)
        try:
            return self._forward(inputs)
        finally:
            setattr(self._block_owner, self._block_attribute, whole)
            self._prefix.clear()

    def _forward(self, inputs: Batch) -> torch.Tensor:
        own = self._padded({name: tensor for name, tensor in inputs.items() if name in self.accepted})
        with training.arithmetic(self.settings.dtype, self.device.type):
            if self._attached is not None:
                side = {name: tensor for name, tensor in inputs.items() if name not in own}
                self._attached.begin(own, side, partial(self.query, own))
            logits: torch.Tensor = self.base(**own, **self._inputs).logits
        return logits

    def sets_used(self) -> torch.Tensor | None:
        """(N,) examples of the last forward pass by the set that they were run with; ``None`` without a pool."""
        return None if self._attached is None else self._attached.uses()

    def logits_from(self, hidden: torch.Tensor, depth: int) -> torch.Tensor:
        """Logits of given states in place of what the blocks below give; every position counts.

        Args:
            hidden: (examples, length, width), with or without a graph.
            depth: Position of the running block that they enter.
        """
        blocks, whole = self.blocks, getattr(self._block_owner, self._block_attribute)
        hook = blocks[depth].register_forward_pre_hook(
            lambda _, args, kwargs: ((hidden, *args[1:]), kwargs), with_kwargs=True
        )
        setattr(self._block_owner, self._block_attribute, entered_at(blocks, depth))
        try:
            return self._forward(self._inputs_like(hidden))
        finally:
            setattr(self._block_owner, self._block_attribute, whole)
            hook.remove()

    def _inputs_like(self, hidden: torch.Tensor) -> Batch:
        """Inputs of as many examples and positions; what they hold does not matter, as long as it is no padding."""
        if self.settings.task == "image-classification":
            return {"pixel_values": self.made_up_batch(len(hidden))["pixel_values"]}
        config: Any = self.base.config
        word = 0 if config.pad_token_id != 0 else 1
        words = torch.full(hidden.shape[:2], word, dtype=torch.long, device=self.device)
        return {"input_ids": words, "attention_mask": torch.ones_like(words)}

    def query(self, inputs: Batch, pooling: Pooling, depth: int) -> torch.Tensor:
        """(examples, width) pooled hidden states after ``depth`` blocks (0: all); remembered with prefixes.

        Dropout is off and there is no graph. Hooks of an attachment must be off.
        """

        def run(batch: Batch) -> torch.Tensor:
            return pool_hidden(self._hidden(batch, depth), batch.get("attention_mask"), pooling)

        return by_example(self._cache, f"query {pooling} {depth} {self._base_number}".encode(), inputs, run)

    def _hidden(self, inputs: Batch, depth: int) -> torch.Tensor:
        """(examples, length, width) hidden states after ``depth`` blocks (0: all), and the final norm if any."""
        backbone: Any = self.base.base_model
        running = getattr(self._block_owner, self._block_attribute)
        if depth:
            setattr(self._block_owner, self._block_attribute, self._block_list[:depth])
        training_modules = [module for module in self.base.modules() if module.training]
        for module in training_modules:
            module.training = False
        try:
            with torch.no_grad(), self._first_position.off() if self._first_position else nullcontext():
                hidden: torch.Tensor = backbone(**inputs, **self._inputs).last_hidden_state
        finally:
            setattr(self._block_owner, self._block_attribute, running)
            for module in training_modules:
                module.training = True
        return hidden

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy over the batch's targets (`training.num_targets`), a scalar with its graph."""
        mean = cross_entropy(self.logits(batch), batch["labels"]) / training.num_targets(batch).clamp(min=1)
        return mean if self._attached is None else self._attached.loss(mean)

    def program(
        self,
        plan: Plan,
        settings: TrainingSettings,
        micro_batch: int | None = None,
        kind: StepKind | None = None,
    ) -> StepProgram:
        """One optimiser step of the plan on made-up inputs of full length, for tracing and measuring.

        It overwrites the loaded adapters and, on a real device, trains them: `load` before the model is used again.

        Args:
            plan: Its ``micro_batch`` counts where the argument is ``None``.
            settings: Batch size, optimiser, clipping and autocast.
            micro_batch: Examples of a forward pass.
            kind: Of the step, where it is not plain LoRA's.
        """
        if kind is not None and kind.projection is not None and not self.has_storage:
            # Tracing is to see the step that costs most: one that renews its projectors.
            kind = replace(kind, projection=replace(kind.projection, gap=1))
        shapes = attachments.shapes(self.spec, plan.ranks, plan.attachment)
        tensors: Tensors
        if self.has_storage and plan.attachment is not None:
            tensors = attachments.init(self.spec, plan.attachment, np.random.default_rng(0))
        elif self.has_storage:
            tensors = lora.init(self.spec, plan.ranks, np.random.default_rng(0))
        else:
            tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        self.load(Task(plan, tensors))
        self.train(plan.trainable, frozen_dropout=settings.frozen_dropout)
        with self.mode:
            batch = self.made_up_batch(settings.batch_size)
            pieces = training.micro_batches(batch, micro_batch or plan.micro_batch)
            trained = {name: parameter for name, parameter in self._live.items() if name in plan.trainable}
            noisy = self.noisy_sum(trained, kind, settings.batch_size)
            train = training.make_step(
                self.loss, trained, settings, settings.learning_rate, kind=kind, head=self.spec.head, noisy=noisy
            )

        def step() -> None:
            train(pieces)

        inputs = tuple(batch.values())
        return StepProgram(
            resident=(*self.resident(), *inputs),
            blocks=self.blocks,
            parameters=self.parameters_by_name(),
            step=step,
            batch=inputs,
            sums=() if noisy is None else noisy.sums,
            context=lambda: self.mode,
            warm=train.make_state if kind is None else None,
            past_first=partial(train.past_first, pieces) if kind is None else None,
        )

    def noisy_sum(
        self,
        trained: Mapping[str, nn.Parameter],
        kind: StepKind | None,
        expected_examples: float,
        seed: int | bytes = 0,
    ) -> NoisySum | None:
        """What a private step of the kind sums clipped gradients in; ``None`` where the kind is not private."""
        if kind is None or kind.private is None:
            return None
        if self._attached is not None:
            raise ModelError("a private step must train pairs and head alone, got an attachment; choose ffa-lora")
        return NoisySum(self.base, trained, kind.private, expected_examples=expected_examples, seed=seed)

    def resident(self) -> list[torch.Tensor]:
        """Weights and buffers of the running model, and what is remembered of frozen prefixes."""
        remembered = [] if self._cache is None else self._cache.tensors()
        attached = [] if self._attached is None else self._attached.standing()
        return [*self.base.parameters(), *self.base.buffers(), *attached, *remembered]

    def adapter_config(self, ranks: Mapping[str, int]) -> LoraConfig:
        """PEFT's description of adapters of these ranks: whole module paths throughout; alpha is ``scale * rank``.

        PEFT matches a name against the end of a module's path: whole paths leave it no choice, where the shorter
        ``1.attention.query`` would catch block 11 too.
        """
        return LoraConfig(
            task_type=_PEFT_TASKS[self.settings.task],
            r=self.settings.rank,
            lora_alpha=_whole(self.settings.alpha),
            lora_dropout=self.settings.lora_dropout,
            target_modules=list(ranks),
            rank_pattern=dict(ranks),
            alpha_pattern={module: _whole(self.spec.scale * rank) for module, rank in ranks.items()},
            fan_in_fan_out=bool(self._transposed),
        )

    def peft_state(self, tensors: Tensors) -> Tensors:
        """Adapter and head tensors under the names of an ``adapter_model.safetensors``."""
        kinds = (".lora_A", ".lora_B")
        return {
            f"base_model.model.{name}{'.weight' if name.endswith(kinds) else ''}": tensor.detach().contiguous()
            for name, tensor in tensors.items()
        }

    def head_modules(self) -> tuple[str, ...]:
        """Modules that hold the head's tensors and nothing else, for PEFT's ``modules_to_save``."""
        prefix = backbone_of(self.base)
        owners = (n.rpartition(".")[0] if n.startswith(prefix) else n.partition(".")[0] for n in self.spec.head)
        return tuple(dict.fromkeys(owners))

    def made_up_batch(self, examples: int) -> Batch:
        """Inputs of full size and their labels, and what the loaded attachment reads besides.

        Of texts, each but the first ends in one position of padding.
        """
        columns = {} if self._attachment is None else self._attachment.columns
        side = {name: torch.zeros(examples, *shape, device=self.device) for name, shape in columns.items()}
        labels = torch.zeros(examples, dtype=torch.long, device=self.device)
        if self.settings.task == "image-classification":
            config = backbone_config(self.base)
            size = self.settings.image_size or config.image_size
            pixels = torch.zeros(examples, config.num_channels, size, size, device=self.device)
            return {"pixel_values": pixels, **side, "labels": labels}
        shape = (examples, self.settings.max_length)
        words = torch.ones(shape, dtype=torch.long, device=self.device)
        mask = torch.ones(shape, dtype=torch.long, device=self.device)
        mask[1 if examples > 1 else 0 :, -1] = 0
        if self.settings.task == "causal-lm":
            labels = torch.ones(shape, dtype=torch.long, device=self.device)
        return {"input_ids": words, "attention_mask": mask, **side, "labels": labels}

    def _install(
        self,
        ranks: Mapping[str, int],
        tensors: Tensors,
        base_delta: BaseDelta,
        blocks: Sequence[int] | None,
        attachment: Attachment | None,
    ) -> None:
        self._prefix = None
        self._close_weights()
        check_tensors(self.spec, ranks, tensors, attachment)
        if attachment is not None and (ranks or blocks is not None):
            raise ModelError(
                "a plan or deployment with an attachment must have no pairs and load all blocks, "
                f"got {len(ranks)} pairs and blocks {blocks}; leave ranks and blocks out"
            )
        if blocks is not None:
            self._check_blocks(ranks, tuple(blocks))
        if dict(ranks) != self._ranks or attachment != self._attachment:
            self._inject(ranks)
            self._attach(attachment)
        if self._attached is not None:
            self._attached.forget()  # else it would stand through all that the next task is charged for
        self._run_blocks(range(self.spec.num_blocks) if blocks is None else blocks)
        self._copy(tensors)
        self._change_base(base_delta)

    def _copy(self, tensors: Tensors) -> None:
        if self.has_storage:
            with torch.no_grad():
                for name, parameter in self._live.items():
                    parameter.copy_(tensors[name])

    def _check_blocks(self, ranks: Mapping[str, int], blocks: tuple[int, ...]) -> None:
        if not blocks or blocks != tuple(sorted(set(blocks))) or blocks[0] < 0 or blocks[-1] >= self.spec.num_blocks:
            raise ModelError(
                f"loaded blocks must be increasing numbers from 0 to {self.spec.num_blocks - 1}, got {blocks}"
            )
        absent = [module for module in ranks if self.spec.block_of[module] not in blocks]
        if absent:
            raise ModelError(f"adapted modules must lie in loaded blocks {blocks}, got {some(absent)}")

    def _inject(self, ranks: Mapping[str, int]) -> None:
        """Replaces the adapters by uninitialised ones of these ranks."""
        if self._tuner is not None:
            self._show_blocks(self._ranks)
            self._tuner.unload()
            self._tuner = None
        self._live = {name: self._parameters[name] for name in self.spec.head}
        if ranks:
            self._show_blocks(ranks)
            config = self.adapter_config(ranks)
            config.rank_pattern, config.alpha_pattern = {}, {}  # slow to match, and `_fill` sets what follows from them
            # Built without storage: kaiming's draws would cost time and touch the global generator.
            self._tuner = LoraModel(self.base, config, _ADAPTER, low_cpu_mem_usage=True)
        adapter: dict[str, nn.Parameter] = {}
        with self.mode:
            for module in self.spec.modules:  # the model's order, whatever the plan's: optimisers go through it
                if module in ranks:
                    adapter |= self._fill(module, ranks[module])
        self._run_blocks(range(self.spec.num_blocks))
        self._live = adapter | self._live
        self._ranks = dict(ranks)

    def _attach(self, attachment: Attachment | None) -> None:
        """Replaces what is hooked onto the base; its parameters are without values yet."""
        if self._attached is not None:
            self._attached.remove()
        self._attachment, self._attached = attachment, None
        if attachment is None:
            return
        with self.mode:
            self._attached = attach(attachment, self.spec, self.base, self.device)
        replaced = attachment.replaces(self.spec)
        head = {name: parameter for name, parameter in self._live.items() if name not in replaced}
        self._live = self._attached.parameters | head  # there are no pairs

    def _fill(self, module: str, rank: int) -> dict[str, nn.Parameter]:
        """Gives a module's pair storage; returns it by global name."""
        layer: Any = self.base.get_submodule(module)
        out_features, in_features = self.spec.modules[module]
        a = nn.Parameter(torch.empty(rank, in_features, device=self.device))
        b = nn.Parameter(torch.empty(out_features, rank, device=self.device))
        layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight = a, b
        layer.r[_ADAPTER], layer.lora_alpha[_ADAPTER] = rank, self.spec.scale * rank
        layer.scaling[_ADAPTER] = self.spec.scale  # alpha / rank of scale * rank may round
        layer.cast_input_dtype_enabled = False  # under autocast the product casts; a float32 copy would be kept
        return {lora.a_name(module): a, lora.b_name(module): b}

    def _show_blocks(self, modules: Iterable[str]) -> None:
        """Leaves in the base the modules' blocks alone, by their names in the whole: PEFT looks at all it finds."""
        shown = nn.ModuleList()
        for block in sorted({self.spec.block_of[module] for module in modules}):
            shown.add_module(str(block), self._block_list[block])
        setattr(self._block_owner, self._block_attribute, shown)

    def _run_blocks(self, blocks: Iterable[int]) -> None:
        chosen = [self._blocks[block] for block in blocks]
        whole = len(chosen) == len(self._blocks)
        setattr(self._block_owner, self._block_attribute, self._block_list if whole else nn.ModuleList(chosen))

    @torch.no_grad()
    def _change_base(self, base: BaseDelta) -> None:
        """Adds a change to frozen weights, from their first bits; whatever was added before is gone.

        A quantised weight keeps its bits, and has the change beside it.

        The change that stands is recognised by the log's own objects: a run's clients share them within a round.
        """
        if self._base is not None and _same_log(self._base, base):
            return
        delta = base_deltas.total(base)
        for name in delta:
            self._check_change(name, delta[name])
        self._base, self._base_number = base, self._base_number + 1
        for name, pristine in self._pristine.items():
            self._parameters[name].copy_(pristine)
        for name, layer in self._quantised.items():
            layer.change = delta[name].to(self.device, torch.float32) if name in delta else None
        whole = {name: change for name, change in delta.items() if name not in self._quantised}
        self._pristine = {name: self._parameters[name].detach().clone() for name in whole}
        for name, change in whole.items():
            change = change.T if name in self._transposed else change
            pristine = self._pristine[name]
            self._parameters[name].copy_(pristine.float() + change.to(pristine.device))

    def _open_weights(self, plan: Plan) -> None:
        """Makes the weights that a plan trains whole live parameters, behind all pairs and in the model's order."""
        modules = [module for module in self.spec.modules if base_deltas.weight_name(module) in plan.trainable]
        whole: dict[str, nn.Parameter] = {}
        for module in modules:
            name = base_deltas.weight_name(module)
            if module in plan.ranks or not (plan.blocks is None or self.spec.block_of[module] in plan.blocks):
                raise ModelError(
                    f"a weight that is trained whole must lie in a loaded block and have no pair, got {name}; "
                    "leave the module out of the plan's ranks"
                )
            if name in self._quantised:
                kind = self._quantised[name].kind
                raise ModelError(
                    f"a weight that is trained whole must not be quantised, got {name} in {kind}; "
                    "set model.quantisation = 'none', or choose a method that trains pairs, such as flora or xgblora"
                )
            if self._parameters[name].dtype != torch.float32:
                raise ModelError(
                    f"a weight that is trained whole must be float32, got {self._parameters[name].dtype} of {name}; "
                    "set model.dtype = 'float32' (training.autocast = 'bf16' still computes in bf16)"
                )
            whole[name] = self._parameters[name]
        pairs = {name: parameter for name, parameter in self._live.items() if name not in self.spec.head}
        head = {name: self._parameters[name] for name in self.spec.head if name in self._live}
        self._live = pairs | whole | head
        if self.has_storage:
            self._starts = {name: parameter.detach().to("cpu", copy=True) for name, parameter in whole.items()}

    @torch.no_grad()
    def _close_weights(self) -> None:
        """Gives the weights that were trained whole their first bits back."""
        for name, start in self._starts.items():
            self._parameters[name].copy_(start)
        self._starts = {}
        for name in [name for name in self._live if name in self._parameters and name not in self.spec.head]:
            parameter = self._live.pop(name)
            parameter.requires_grad_(False)
            parameter.grad = None

    def _check_change(self, name: str, change: torch.Tensor) -> None:
        if name not in self._parameters or name in self.spec.head:
            raise ModelError(f"a base delta must name a frozen weight, got {name}")
        shape = tuple(self._parameters[name].shape)
        if name in self._quantised:
            shape = (self._quantised[name].out_features, self._quantised[name].in_features)
        expected = tuple(reversed(shape)) if name in self._transposed else shape
        if tuple(change.shape) != expected:
            raise ModelError(f"base delta of {name} must have shape {expected}, got {tuple(change.shape)}")

    def _set_checkpointed(self, blocks: frozenset[int]) -> None:
        """Marks exactly these blocks for recomputation in the backward pass."""
        for index, block in enumerate(self._blocks):
            wanted = index in blocks
            if wanted and not isinstance(block, GradientCheckpointingLayer):
                raise ModelError(
                    f"a checkpointed block must support recomputation, got {type(block).__name__}; "
                    "plan this model without checkpointing"
                )
            if isinstance(block, GradientCheckpointingLayer):
                block.gradient_checkpointing = wanted
                block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def _same_log(a: BaseDelta, b: BaseDelta) -> bool:
    """Whether two logs are made of the same tensors, not merely equal ones."""
    return (
        a.snapshot_version == b.snapshot_version
        and len(a.steps) == len(b.steps)
        and (a.snapshot is b.snapshot or not (a.snapshot or b.snapshot))
        and all(one is other for one, other in zip(a.steps, b.steps, strict=True))
    )


def ranks_of(tensors: Tensors) -> dict[str, int]:
    """Module -> rank of the pair that is among the tensors."""
    return {module: int(tensors[lora.a_name(module)].shape[0]) for module in lora.modules_of(tensors)}


def check_tensors(
    spec: ModelSpec, ranks: Mapping[str, int], tensors: Tensors, attachment: Attachment | None = None
) -> None:
    """Refuses tensors that are not exactly those of the ranks, the attachment and the head.

    Raises:
        ModelError: A module is unknown, a rank is below 1, or a name or a shape differs.
    """
    unknown = sorted(ranks.keys() - spec.modules.keys())
    if unknown:
        raise ModelError(f"adapted modules must be among the model's targets, got {some(unknown)}")
    low = sorted(module for module, rank in ranks.items() if rank < 1)
    if low:
        raise ModelError(f"a rank must be at least 1, got less for {some(low)}; leave the module out instead")
    expected = attachments.shapes(spec, ranks, attachment)
    if expected.keys() != tensors.keys():
        extra, missing = sorted(tensors.keys() - expected.keys()), sorted(expected.keys() - tensors.keys())
        raise ModelError(
            "tensors must be exactly those of the plan's ranks, its attachment and the head, "
            f"got {some(extra)} too many and {some(missing)} missing"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ModelError(f"{name} must have shape {shape}, got {tuple(tensors[name].shape)}")


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in float32; of texts, each position predicts the next label."""
    if labels.ndim == 2:
        # Shifting the labels instead of the logits saves a copy of the largest tensor of the step.
        labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="sum")


def build_model(
    settings: ModelSettings,
    *,
    num_labels: int | None = None,
    device: Device = "cpu",
    seed: int = 0,
) -> AdaptedModel:
    """Loads a base model and finds its blocks, modules to adapt and head.

    Args:
        settings: Which model.
        num_labels: Classes; ``None`` for a language model.
        device: ``meta`` and ``fake`` (tensors that claim to be on the CPU) have shapes and no storage, and need no
            weights: a folder with a ``config.json`` is enough.
        seed: Of the head's first values, where the checkpoint holds none.

    Raises:
        ModelError: The source cannot be had, lacks weights, or cannot be adapted as asked.
    """
    return AdaptedModel(settings, load_base(settings, num_labels, device, seed))


def _default_targets(base: Any) -> tuple[str, ...]:
    """The family's usual modules; none for a family that neither we nor PEFT know."""
    family = base.config.model_type
    known = _TARGETS.get(family) or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(family, ())
    return () if isinstance(known, str) else tuple(known)


def _modules_before(base: nn.Module, path: str) -> list[nn.Module]:
    """Modules that run before the blocks: those that stand before them and do not hold them."""
    names = list(dict(base.named_modules()))
    before = names[: names.index(path)]
    return [base.get_submodule(name) for name in before if name and not f"{path}.".startswith(f"{name}.")]


def _width(base: Any) -> int:
    """Entries of a hidden state."""
    return int(getattr(backbone_config(base), "hidden_size", 0))


def _extra_inputs(base: Any, settings: ModelSettings) -> dict[str, bool]:
    """What a forward pass needs beside the batch."""
    if settings.image_size is None or settings.image_size == getattr(backbone_config(base), "image_size", None):
        return {}
    taken: Mapping[str, inspect.Parameter] = inspect.signature(base.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):  # handed on to the encoder
        taken = {**taken, **inspect.signature(base.get_submodule(backbone_of(base)[:-1]).forward).parameters}
    return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in taken else {}


def _padding(base: Any, settings: ModelSettings) -> int | None:
    """Token by which a decoder finds the end of a text; ``None`` for a model that does not look for it."""
    looks = settings.task == "sequence-classification" and hasattr(base, "score")
    return int(base.config.pad_token_id) if looks else None


def _whole(value: float) -> float | int:
    """The same number, without a fraction where there is none: PEFT's alpha is an integer by its type."""
    return int(value) if float(value).is_integer() else value
