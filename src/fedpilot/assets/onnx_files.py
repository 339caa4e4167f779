"""Parameters of a PyTorch model read out of the ONNX graph it was exported to."""

from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpilot.errors import AssetError

Weights: TypeAlias = dict[str, NDArray[np.float32]]


def read(path: Path, prefix: str) -> Weights:
    """Float parameters under their PyTorch names.

    PyTorch's exporter keeps the names of parameters but for the weights of linear layers, which it transposes into
    constants with made-up names (``onnx::MatMul_470``). They get their own back from the bias that is added to the
    product.

    Args:
        path: An ``.onnx`` file with its weights inside.
        prefix: Parameters whose name starts with it are returned, without it; so are constants with made-up names that
            feed no linear layer, under those.

    Raises:
        AssetError: The package ``onnx`` is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise AssetError(
            f"conversion of {path.name} needs the package onnx, got {error}; pip install 'fedpilot[assets]'"
        ) from error
    graph = onnx.load(path).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = [(node.op_type, list(node.input), list(node.output)) for node in graph.node]
    own_name = linear_weights(nodes, set(constants))
    weights: Weights = {}
    for name, array in constants.items():
        linear = own_name.get(name)
        if linear is not None and linear.startswith(prefix):
            weights[linear.removeprefix(prefix)] = np.ascontiguousarray(array.T)
        elif linear is None and name.startswith((prefix, "onnx::")) and array.dtype == np.float32:
            weights[name.removeprefix(prefix)] = array
    return weights


def linear_weights(nodes: list[tuple[str, list[str], list[str]]], constants: set[str]) -> dict[str, str]:
    """Made-up name of each linear layer's weight -> its own.

    Args:
        nodes: The graph's nodes as (operator, inputs, outputs).
        constants: Names of the graph's constants.

    >>> linear_weights([("MatMul", ["x", "onnx::7"], ["y"]), ("Add", ["f.bias", "y"], ["z"])], {"onnx::7", "f.bias"})
    {'onnx::7': 'f.weight'}
    """
    weight_of = {outputs[0]: inputs[1] for operator, inputs, outputs in nodes if operator == "MatMul"}
    names: dict[str, str] = {}
    for operator, inputs, _ in nodes:
        if operator != "Add":
            continue
        for product, bias in (inputs, inputs[::-1]):
            if weight_of.get(product, "") in constants and bias in constants:
                names[weight_of[product]] = f"{bias.removesuffix('.bias')}.weight"
    return names
