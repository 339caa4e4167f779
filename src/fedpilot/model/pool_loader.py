"""Runs an exported pool on its base model; stands beside ``pool.json`` and ``pool.safetensors`` and needs no fedpilot.

    from load_pool import load
    model = load("<this folder>")
    logits = model(input_ids=..., attention_mask=...)

Every example is run with the mean of the k sets of adapters whose keys are nearest, by cosine, to what the base model
itself, or its lower blocks, make of it.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

AUTO = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}


class PooledModel(nn.Module):
    """A transformers classifier with a pool of adapters; for inference.

    Args:
        base: The model that the pool was trained on.
        pool: Its tensors by name.
        facts: What ``pool.json`` holds.
    """

    def __init__(self, base: Any, pool: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        super().__init__()
        self.base, self.pool, self.facts = base.eval(), pool, facts
        self.labels: list[str] = facts["labels"]
        self.weights: torch.Tensor | None = None
        with torch.no_grad():
            for name in facts["head"]:
                base.get_parameter(name).copy_(pool[name])
        for module in facts["modules"]:
            base.get_submodule(module).register_forward_hook(self._adapting(module))
        base.get_submodule(facts["classifier"]).register_forward_hook(self._classifying(facts["classifier"]))

    @torch.no_grad()
    def forward(self, **inputs: Any) -> torch.Tensor:
        """(examples, classes) logits of what the base model's tokenizer or image processor gives."""
        inputs = {**inputs, **self.facts["inputs"]}
        self.weights = None  # the query is the base model's own
        hidden = self._hidden(inputs)
        query = hidden[:, 0]
        if self.facts["query"] == "mean":
            mask = inputs.get("attention_mask", torch.ones(hidden.shape[:2])).to(hidden.device).unsqueeze(-1).float()
            query = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        cosines = F.normalize(query, dim=1) @ F.normalize(self.pool["pool.keys"].to(query.device), dim=1).T
        count = self.facts["top_k"]
        self.weights = torch.zeros_like(cosines).scatter(1, cosines.topk(count, dim=1).indices, 1 / count)
        logits: torch.Tensor = self.base(**inputs).logits
        return logits

    def _hidden(self, inputs: dict[str, Any]) -> torch.Tensor:
        """(examples, length, width) of the base model after as many blocks as the query is taken at; 0 for all."""
        owner, _, attribute = self.facts["blocks"].rpartition(".")
        holder = self.base.get_submodule(owner)
        blocks = getattr(holder, attribute)
        if self.facts["query_blocks"]:
            setattr(holder, attribute, blocks[: self.facts["query_blocks"]])
        try:
            hidden: torch.Tensor = self.base.base_model(**inputs).last_hidden_state.float()
        finally:
            setattr(holder, attribute, blocks)
        return hidden

    def _tensor(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return self.pool[name].to(like.device, like.dtype)

    def _mean(self, name: str, like: torch.Tensor) -> torch.Tensor:
        assert self.weights is not None
        rows = self.weights.to(like.dtype) @ self._tensor(name, like)
        return rows.reshape(rows.shape[0], *[1] * (like.ndim - 2), rows.shape[1])

    def _adapting(self, module: str) -> Any:
        def hook(owner: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if self.weights is None:
                return None
            if self.facts["pool"] == "ssf":
                gamma, beta = (self._mean(f"{module}.pool_{kind}", output) for kind in ("gamma", "beta"))
                return gamma * output + beta
            a, b = (self._tensor(f"{module}.pool_{kind}", output) for kind in "AB")
            slots = _by_set(F.linear(args[0], a.flatten(0, 1)), a)
            slots = slots * self.weights.to(output.dtype).reshape(-1, *[1] * (slots.ndim - 3), a.shape[0], 1)
            change: torch.Tensor = self.facts["scale"] * F.linear(slots.flatten(-2), b.transpose(0, 1).flatten(1))
            return output + change

        return hook

    def _classifying(self, module: str) -> Any:
        def hook(owner: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if self.weights is None:
                return None
            weight = self._tensor(f"{module}.pool_weight", output)
            logits = _by_set(F.linear(args[0], weight.flatten(0, 1)), weight)
            mean = (self.weights.to(logits.dtype).unsqueeze(-1) * logits).sum(dim=-2)
            bias = f"{module}.pool_bias"
            return mean + self._mean(bias, mean) if bias in self.pool else mean

        return hook


def _by_set(values: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
    return values.reshape(*values.shape[:-1], *sets.shape[:2])


def load(folder: str | Path, base_model: str | None = None) -> PooledModel:
    """The model of an exported folder.

    Args:
        folder: With ``pool.json`` and ``pool.safetensors``.
        base_model: Hub id or folder of the base model; ``None`` for the one that ``pool.json`` names.
    """
    facts = json.loads((Path(folder) / "pool.json").read_text(encoding="utf-8"))
    auto: Any = getattr(transformers, AUTO[facts["task"]])
    base = auto.from_pretrained(
        base_model or facts["base_model"], num_labels=len(facts["labels"]), ignore_mismatched_sizes=True
    )
    return PooledModel(base, load_file(Path(folder) / "pool.safetensors"), facts)
