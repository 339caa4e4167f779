"""A Llama decoder and its byte-level BPE tokenizer read out of a GGUF file."""

from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from fedpilot.errors import AssetError

Facts: TypeAlias = dict[str, object]
"""The file's metadata: GGUF key -> number, string or list."""

Weights: TypeAlias = dict[str, NDArray[np.float32]]

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}
_CONTROL = 3
"""GGUF's type of a token that never stands for text."""


def read(path: Path) -> tuple[Facts, Weights]:
    """Metadata and dequantised float32 weights, under the names that Hugging Face's Llama gives them.

    Raises:
        AssetError: The package ``gguf`` is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise AssetError(
            f"conversion of {path.name} needs the package gguf, got {error}; pip install 'fedpilot[assets]'"
        ) from error
    reader = gguf.GGUFReader(path)
    facts: Facts = {name: field.contents() for name, field in reader.fields.items()}
    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    weights: Weights = {}
    for tensor in reader.tensors:
        block, kind = _parts(tensor.name)
        array = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if kind in heads:
            array = _unpermuted(array, cast(int, heads[kind]))
        prefix = "" if block is None else f"model.layers.{block}."
        weights[f"{prefix}{_NAMES[kind]}.weight"] = np.ascontiguousarray(array)
    return facts, weights


def llama_config(facts: Facts) -> dict[str, object]:
    """``config.json`` of a decoder whose output layer is its embedding."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": facts["llama.vocab_size"],
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": round(cast(float, facts["llama.attention.layer_norm_rms_epsilon"]), 9),
        "rope_theta": facts["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def tokenizer_json(facts: Facts) -> dict[str, object]:
    """``tokenizer.json`` of SmolLM's tokenizer: GPT-2's byte-level BPE with every digit apart."""
    tokens = cast(list[str], facts["tokenizer.ggml.tokens"])
    types = cast(list[int], facts["tokenizer.ggml.token_type"])
    merges = cast(list[str], facts["tokenizer.ggml.merges"])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    control = [index for index, kind in enumerate(types) if kind == _CONTROL]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": tokens[index], **plain} for index in control],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def tokenizer_config(facts: Facts) -> dict[str, object]:
    """``tokenizer_config.json``: special tokens, longest input and chat template."""
    tokens = cast(list[str], facts["tokenizer.ggml.tokens"])
    special = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {key: cast(int, facts[f"tokenizer.ggml.{name}_token_id"]) for key, name in special.items()}
    return {
        **{f"{key}_token": tokens[index] for key, index in ids.items()},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": facts["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": facts["tokenizer.chat_template"],
    }


def _parts(name: str) -> tuple[str | None, str]:
    """Block number and kind: ``blk.3.attn_q.weight`` -> ``("3", "attn_q")``; ``token_embd.weight`` has no block."""
    parts = name.split(".")
    return (parts[1], parts[2]) if parts[0] == "blk" else (None, parts[0])


def _unpermuted(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key projection (heads * width, in) back in Hugging Face's order.

    GGUF interleaves the two halves of each head because its rotary embedding turns neighbouring rows.
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)
