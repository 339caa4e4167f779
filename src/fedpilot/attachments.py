"""What a method hooks onto the base model instead of LoRA pairs: hyper-parameters, names, shapes and first values.

This is small data that travels with a plan; `fedpilot.model.attached` makes it run.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch.nn import functional as F

from fedpilot import lora
from fedpilot.errors import PlanError
from fedpilot.types import Attachment, ModelSpec, Plan, Tensors

KEYS = "pool.keys"

Pooling: TypeAlias = Literal["cls", "mean"]
"""Of last hidden states: the first position's, or their mean without padding."""

USER_VECTOR = "user_vector"
"""Column of a batch with each example's h_u (examples, d_h), from a click model."""


@dataclass(frozen=True)
class InstancePool:
    """N sets of adapters with a key each; every example is run with the mean of the k sets nearest to it (FedIns).

    ``<module>.pool_gamma`` and ``<module>.pool_beta`` are (N, out); of LoRAs ``<module>.pool_A`` is (N, rank, in) and
    ``<module>.pool_B`` (N, out, rank). The classifier's last layer comes N times too: ``pool_weight`` (N, classes, in)
    and ``pool_bias`` (N, classes). ``pool.keys`` is (N, width).

    Attributes:
        size: N, sets in the pool.
        top_k: k, sets that an example is run with.
        pool: ``ssf`` scales and shifts outputs, γ ⊙ y + β; ``lora`` adds low-rank pairs.
        rank: Of each pair of a pool of LoRAs.
        query: What is held against the keys, of the frozen base's hidden states: ``cls`` the first position's,
            ``mean`` their mean without padding.
        query_blocks: After how many blocks these states are taken; 0 for all.
        choice: In training; ``nearest`` takes the k keys with the largest cosines, ``spread`` those whose cosines are
            furthest above the key's own mean over the batch, so that every key finds examples. Predictions are always
            made with the nearest.
        key_weight: λ; the loss is (1 - λ) cross-entropy + λ (1 - similarity).
        similarity: Of the chosen keys, ``sum`` or ``mean`` of their cosines.

    Raises:
        PlanError: A field breaks its rule.
    """

    size: int
    top_k: int
    pool: Literal["ssf", "lora"] = "ssf"
    rank: int = 8
    query: Pooling = "cls"
    key_weight: float = 0.1
    similarity: Literal["sum", "mean"] = "sum"
    query_blocks: int = 0
    choice: Literal["nearest", "spread"] = "nearest"

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.size:
            raise PlanError(f"top_k must lie in 1..size, got {self.top_k} with size {self.size}; choose fewer sets")
        if self.rank < 1:
            raise PlanError(f"rank must be at least 1, got {self.rank}; 8 is usual")
        if not 0 <= self.key_weight < 1:
            raise PlanError(f"key_weight must be in [0, 1), got {self.key_weight}; 0.1 is usual")
        if self.query_blocks < 0:
            raise PlanError(f"query_blocks must be at least 0, got {self.query_blocks}; 0 stands for all blocks")

    @property
    def columns(self) -> Mapping[str, tuple[int, ...]]:
        """None: the query is the base model's own."""
        return {}

    def shapes(self, spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
        """Adapters module by module, then the keys, then the heads."""
        n, r = self.size, self.rank
        found: dict[str, tuple[int, ...]] = {}
        for module, (out_features, in_features) in spec.modules.items():
            if self.pool == "ssf":
                found |= {f"{module}.pool_gamma": (n, out_features), f"{module}.pool_beta": (n, out_features)}
            else:
                found |= {f"{module}.pool_A": (n, r, in_features), f"{module}.pool_B": (n, out_features, r)}
        found[KEYS] = (n, spec.width)
        return found | {pooled(name): (n, *spec.head[name].shape) for name in self._heads(spec)}

    def replaces(self, spec: ModelSpec) -> frozenset[str]:
        """The classifier's last layer."""
        return frozenset(self._heads(spec))

    def init(self, spec: ModelSpec, rng: np.random.Generator) -> Tensors:
        """γ ~ N(1, 0.02), β ~ N(0, 0.02); LoRAs as `lora.init` draws them; keys ~ N(0, 0.02); all heads the model's."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        values: dict[str, torch.Tensor] = {}
        for name, shape in self.shapes(spec).items():
            kind = name.rpartition(".")[2]
            if kind == "pool_A":
                values[name] = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[-1])
            elif kind == "pool_B":
                values[name] = torch.zeros(shape)
            elif kind in ("pool_weight", "pool_bias"):
                values[name] = spec.head[name.replace(".pool_", ".")].expand(shape).clone()
            else:
                values[name] = 0.02 * torch.randn(shape, generator=generator) + (kind == "pool_gamma")
        return values

    def _heads(self, spec: ModelSpec) -> tuple[str, ...]:
        head = last_layer(spec)
        return () if head is None else tuple(name for name in spec.head if name.rpartition(".")[0] == head)


def pooled(name: str) -> str:
    """Name of N stacked copies of a head's tensor.

    >>> pooled("classifier.weight")
    'classifier.pool_weight'
    """
    module, _, kind = name.rpartition(".")
    return f"{module}.pool_{kind}"


def last_layer(spec: ModelSpec) -> str | None:
    """The head's module that gives the logits; ``None`` where there is no head."""
    matrices = [name for name, tensor in spec.head.items() if tensor.ndim == 2]
    return matrices[-1].rpartition(".")[0] if matrices else None


@dataclass(frozen=True)
class AdapterBank:
    """N LoRAs for each module, mixed for every example by a gate that reads its user's vector (RecLoRA).

    ``<module>.bank_A`` is (N, rank, in) and ``<module>.bank_B`` (N, out, rank). Its gate is ``gate_norm`` (2, d_h),
    scale and shift of a normalisation, ``gate_in`` (hidden, d_h + 1) and ``gate_out`` (N, hidden + 1), each a matrix
    with its bias as the last column.

    Attributes:
        size: N, LoRAs of a module.
        rank: Of each.
        width: d_h, entries of a user's vector; 0 for no gate, where every LoRA weighs 1 / N.
        mix: ``product``: Δ = Σ w_i B_i A_i; ``factor``: Δ = (Σ w_i B_i)(Σ w_i A_i).
        tau: τ, temperature of the softmax.
        hidden: Width of the gate's layer.
        dropout: Before its last layer, in training.

    Raises:
        PlanError: A field breaks its rule.
    """

    size: int
    rank: int = 8
    width: int = 0
    mix: Literal["product", "factor"] = "product"
    tau: float = 1.0
    hidden: int = 60
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("rank", 1), ("width", 0), ("hidden", 1)):
            if getattr(self, name) < least:
                raise PlanError(f"{name} of a bank must be at least {least}, got {getattr(self, name)}; raise it")
        if not self.tau > 0:
            raise PlanError(f"tau must be above 0, got {self.tau}; 1 is usual")
        if not 0 <= self.dropout < 1:
            raise PlanError(f"dropout of a gate must be in [0, 1), got {self.dropout}; 0.1 is usual")

    @property
    def columns(self) -> Mapping[str, tuple[int, ...]]:
        """The user's vector, where there is a gate; examples without one get all LoRAs alike."""
        return {USER_VECTOR: (self.width,)} if self.width else {}

    def shapes(self, spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
        """Module by module: the LoRAs, then their gate."""
        found: dict[str, tuple[int, ...]] = {}
        for module, (out_features, in_features) in spec.modules.items():
            found[f"{module}.bank_A"] = (self.size, self.rank, in_features)
            found[f"{module}.bank_B"] = (self.size, out_features, self.rank)
            if self.width:
                found[f"{module}.gate_norm"] = (2, self.width)
                found[f"{module}.gate_in"] = (self.hidden, self.width + 1)
                found[f"{module}.gate_out"] = (self.size, self.hidden + 1)
        return found

    def replaces(self, spec: ModelSpec) -> frozenset[str]:
        """Nothing: the head stays the model's."""
        return frozenset()

    def init(self, spec: ModelSpec, rng: np.random.Generator) -> Tensors:
        """Each A as `lora.init` draws it, B zero; normalisation 1 and 0; layers uniform in ±1/sqrt(inputs)."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        values: dict[str, torch.Tensor] = {}
        for name, shape in self.shapes(spec).items():
            kind = name.rpartition(".")[2]
            if kind == "bank_B":
                values[name] = torch.zeros(shape)
            elif kind == "gate_norm":
                values[name] = torch.stack([torch.ones(self.width), torch.zeros(self.width)])
            else:
                inputs = shape[-1] if kind == "bank_A" else shape[-1] - 1
                values[name] = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(inputs)
        return values


def gate_weights(
    bank: AdapterBank, tensors: Tensors, module: str, vectors: torch.Tensor, *, training: bool = False
) -> torch.Tensor:
    """w = softmax(Linear(dropout(relu(Linear(norm(h_u))))) / τ): weights (examples, N) of a module's LoRAs.

    Args:
        bank: With a gate.
        tensors: At least the module's gate.
        module: Whose.
        vectors: h_u (examples, d_h), float32.
        training: Whether dropout acts.
    """
    norm, first, last = (tensors[f"{module}.gate_{part}"] for part in ("norm", "in", "out"))
    hidden = F.layer_norm(vectors, (bank.width,), norm[0], norm[1])
    hidden = F.relu(F.linear(hidden, first[:, :-1], first[:, -1]))
    hidden = F.dropout(hidden, bank.dropout, training)
    return (F.linear(hidden, last[:, :-1], last[:, -1]) / bank.tau).softmax(dim=-1)


def mixed_adapter(bank: AdapterBank, spec: ModelSpec, tensors: Tensors, vector: torch.Tensor | None) -> Tensors:
    """The plain LoRA that the bank is for one user, and the head: what anybody can load.

    A product mix is one pair of rank N r, the weights folded into its A; a factor mix one of rank r.

    Args:
        bank: Hyper-parameters.
        spec: The model.
        tensors: The bank's, its gates' and the head's.
        vector: h_u (d_h,); ``None`` for all LoRAs alike.
    """
    pairs: dict[str, torch.Tensor] = {}
    for module in spec.modules:
        a, b = tensors[f"{module}.bank_A"], tensors[f"{module}.bank_B"]
        weights = torch.full((bank.size,), 1 / bank.size)
        if bank.width and vector is not None:
            weights = gate_weights(bank, tensors, module, vector.float().unsqueeze(0))[0]
        if bank.mix == "product":
            pairs[lora.a_name(module)] = (weights[:, None, None] * a).flatten(0, 1)
            pairs[lora.b_name(module)] = b.transpose(0, 1).flatten(1).contiguous()
        else:
            pairs[lora.a_name(module)] = torch.einsum("n,nri->ri", weights, a)
            pairs[lora.b_name(module)] = torch.einsum("n,nor->or", weights, b)
    return pairs | {name: tensors[name] for name in spec.head}


ATTACHMENTS: Mapping[str, type[Any]] = {"adapter-bank": AdapterBank, "instance-pool": InstancePool}
"""Name in messages -> class; no other class travels."""


def shapes(spec: ModelSpec, ranks: Mapping[str, int], attachment: Attachment | None) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a client holds: pairs, what the attachment has, and what is left of the head."""
    whole = lora.shapes(spec, ranks)
    if attachment is None:
        return whole
    replaced = attachment.replaces(spec)
    pairs = {name: shape for name, shape in whole.items() if name not in spec.head}
    head = {name: shape for name, shape in whole.items() if name in spec.head and name not in replaced}
    return pairs | dict(attachment.shapes(spec)) | head


def init(spec: ModelSpec, attachment: Attachment, rng: np.random.Generator) -> Tensors:
    """First values of the attachment's tensors and of what is left of the head."""
    replaced = attachment.replaces(spec)
    head = {name: tensor.clone() for name, tensor in spec.head.items() if name not in replaced}
    return {**attachment.init(spec, rng), **head}


def trainable(spec: ModelSpec, attachment: Attachment, blocks: Iterable[int]) -> frozenset[str]:
    """All tensors but those that belong to modules of other blocks."""
    wanted = frozenset(blocks)
    names = shapes(spec, {}, attachment)
    return frozenset(n for n in names if spec.block_of.get(n.rpartition(".")[0]) in {None, *wanted})


def suffix_plan(spec: ModelSpec, client_id: int, attachment: Attachment, first: int) -> Plan:
    """Trains the attachment in the blocks from ``first`` on, and all of it that lies in no block.

    What a step keeps for the backward pass grows with the number of blocks above the lowest trained one, hardly with
    how many of them are trained: of all subsets with one lowest block the suffix trains the most.
    """
    names = trainable(spec, attachment, range(first, spec.num_blocks))
    return Plan(client_id, ranks={}, trainable=names, attachment=attachment)


# --- as JSON ------------------------------------------------------------------------------------------------------


def to_table(attachment: Attachment) -> dict[str, object]:
    """Name and hyper-parameters; `from_table` reads them back.

    Raises:
        PlanError: It is of a class that does not travel.
    """
    for name, cls in ATTACHMENTS.items():
        if type(attachment) is cls:
            options = asdict(attachment)  # type: ignore[call-overload]
            return {"name": name, **{k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}}
    known = ", ".join(ATTACHMENTS)
    raise PlanError(f"an attachment must be one of {known}, got {type(attachment).__name__}; add it to ATTACHMENTS")


def from_table(table: Mapping[str, object]) -> Attachment:
    """The attachment of a table that anybody may have written.

    Raises:
        PlanError: The name is unknown, or the hyper-parameters are not just its own, of their types and by their rules.
    """
    name = table.get("name")
    if not isinstance(name, str) or name not in ATTACHMENTS:
        raise PlanError(f"an attachment must be one of {', '.join(ATTACHMENTS)}, got {str(name)[:40]!r}")
    cls = ATTACHMENTS[name]
    hints = get_type_hints(cls)
    names = {field.name for field in fields(cls)}
    if table.keys() - {"name"} != names:
        raise PlanError(f"{name} must have just {', '.join(sorted(names))}, got {sorted(map(str, table))[:20]}")
    values = {key: _typed(table[key], hints[key], f"{name} {key}") for key in names}
    made: Attachment = cls(**values)
    return made


def _typed(value: object, hint: object, what: str) -> object:
    """The value where it is one of the annotated type, which is a scalar, a choice or a tuple of integers."""
    if get_origin(hint) is Literal:
        good = isinstance(value, str) and value in get_args(hint)
    elif hint is float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    elif hint is int:
        good = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
    elif get_origin(hint) is tuple:
        good = isinstance(value, list | tuple) and all(type(item) is int and abs(item) < 2**31 for item in value)
        value = tuple(value) if isinstance(value, list) else value
    else:
        good = isinstance(hint, type) and isinstance(value, hint)
    if not good:
        raise PlanError(f"{what} must be {getattr(hint, '__name__', hint)}, got {str(value)[:40]!r}")
    return value
