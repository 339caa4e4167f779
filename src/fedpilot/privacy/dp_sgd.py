"""DP-SGD: batches drawn by Poisson sampling, gradients clipped by example, Gaussian noise on their sum.

Abadi et al., "Deep Learning with Differential Privacy", 2016, arXiv 1607.00133. The gradient of one example in a layer
is Opacus' formula for that type of layer. The hooks are ours, for three reasons: Opacus' own warn where a layer's input
needs no gradient, which is so in every lowest adapter; they copy each gradient once; and they keep it through the
optimiser's step, where we drop it as soon as it is in the sum.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from fedpilot.errors import ModelError
from fedpilot.privacy import primitives
from fedpilot.privacy.noise import SecretNoise
from fedpilot.types import ExampleDP

_Sampler = Callable[[nn.Module, list[torch.Tensor], torch.Tensor], Mapping[nn.Parameter, torch.Tensor]]


def draws(seed: int | bytes) -> torch.Generator | SecretNoise:
    """What a private step's examples are drawn from: a seed, or a secret key, which the theorem asks for."""
    if isinstance(seed, bytes):
        return SecretNoise(primitives.derived(seed, "fedpilot noise: draws"))
    return torch.Generator().manual_seed(seed)


def poisson_draws(
    num_examples: int, sample_rate: float, num_steps: int, generator: torch.Generator | SecretNoise
) -> Iterator[list[int]]:
    """Positions of each step's examples: each is in with probability ``sample_rate``, by itself; may be none."""
    for _ in range(num_steps):
        if isinstance(generator, SecretNoise):
            drawn = generator.uniform(num_examples) < sample_rate
        else:
            drawn = torch.rand(num_examples, generator=generator, dtype=torch.float64) < sample_rate
        yield drawn.nonzero().flatten().tolist()


class NoisySum:
    """Sums of clipped gradients with noise, one for each trained tensor; they stand from the first step to the last.

    A step: `start`, then for each micro-batch a backward pass of its summed loss within `watching` and `add`, then
    `finish`. Clipping is joint: one norm over all trained tensors. A sum starts as its noise, so that adding the noise
    takes no memory.

    Args:
        model: Holds the parameters.
        parameters: What is trained, by global name.
        private: Clipping norm and noise.
        expected_examples: Mean size of a batch, which the sum is divided by.
        seed: Of the noise, which whoever knows it can take off again; or a secret key.

    Raises:
        ModelError: A trained tensor lies in a layer whose gradients by example have no formula, or Opacus is not
            installed.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        private: ExampleDP,
        *,
        expected_examples: float,
        seed: int | bytes = 0,
    ) -> None:
        if private.noise_multiplier and not math.isfinite(private.clip):
            raise ModelError(f"clip must be finite where there is noise, got {private.clip}; set it to a norm")
        self._parameters = tuple(parameters.values())
        self._private = private
        self._expected = expected_examples
        self._formulas = _formulas(model, parameters)
        self._secret: SecretNoise | None = None
        if isinstance(seed, bytes):
            self._secret, seed = SecretNoise(primitives.derived(seed, "fedpilot noise: steps")), 0
        self._generator = torch.Generator(self._parameters[0].device).manual_seed(seed)
        self._by_example: dict[nn.Parameter, torch.Tensor] = {}
        self.sums = [torch.zeros_like(parameter, requires_grad=False) for parameter in self._parameters]

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self._parameters[0].device

    def start(self) -> None:
        """Makes each sum fresh noise, N(0, σ²C²); with σ = 0 there is none."""
        private = self._private
        deviation = private.noise_multiplier * private.clip if private.noise_multiplier else 0.0
        for parameter, total in zip(self._parameters, self.sums, strict=True):
            parameter.grad = None  # it was the last step's sum
            if self._secret is None:
                total.normal_(0.0, deviation, generator=self._generator)
            else:
                self._secret.fill(total, deviation)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps the gradients by example of one forward and backward pass, and none of their plain sums."""
        handles = [module.register_forward_hook(self._watch) for module in self._formulas]
        for parameter in self._parameters:
            handles.append(parameter.register_post_accumulate_grad_hook(_drop))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def add(self, weights: torch.Tensor) -> None:
        """Clips what the last pass kept and adds it: g_i min(1, C / ||g_i||), with the norm over all tensors.

        Args:
            weights: (examples,) factor on each example's gradient before it is clipped.
        """
        squares = torch.zeros_like(weights)
        for gradient in self._by_example.values():
            squares.add_(torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.ndim))).square_())
        norms = squares.sqrt_().mul_(weights)
        factors = (self._private.clip / norms.add_(1e-6)).clamp_(max=1.0).mul_(weights)
        for parameter, total in zip(self._parameters, self.sums, strict=True):
            gradient = self._by_example.pop(parameter).flatten(1)
            total.view(-1).addmv_(gradient.T, factors)

    def finish(self) -> None:
        """Hands the sums over the expected number of examples to the optimiser."""
        for parameter, total in zip(self._parameters, self.sums, strict=True):
            parameter.grad = total.div_(self._expected)

    def _watch(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Keeps a layer's input until the gradient of its output comes."""
        if output.requires_grad:
            kept = [inputs[0].detach()]
            output.register_hook(lambda gradient: self._take(module, kept, gradient))  # type: ignore[no-untyped-call]

    def _take(self, module: nn.Module, kept: list[torch.Tensor], gradient: torch.Tensor) -> None:
        dtype = self._parameters[0].dtype  # under autocast both come in bf16
        found = self._formulas[module](module, [kept.pop().to(dtype)], gradient.detach().to(dtype))
        for parameter, by_example in found.items():
            known = self._by_example.get(parameter)
            self._by_example[parameter] = by_example.contiguous() if known is None else known.add_(by_example)


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _formulas(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[nn.Module, _Sampler]:
    """Layers that own the parameters -> their formula."""
    known = _opacus_formulas()
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    formulas: dict[nn.Module, _Sampler] = {}
    without: list[str] = []
    for module in model.modules():
        names = [name_of.pop(id(p)) for p in module.parameters(recurse=False) if id(p) in name_of]
        if names and type(module) in known:
            formulas[module] = known[type(module)]
        else:
            without += [f"{name} in a {type(module).__name__}" for name in names]
    if without or name_of:
        raise ModelError(
            "a private step must train layers whose gradients by example Opacus can compute, got "
            f"{', '.join([*without, *name_of.values()][:3])}; freeze them or train without differential privacy"
        )
    return formulas


def _opacus_formulas() -> Mapping[type[nn.Module], _Sampler]:
    try:
        from opacus.grad_sample import GradSampleModule
    except ImportError as error:
        raise ModelError(
            f"differential privacy needs the package opacus, got {error}; pip install 'fedpilot[dp]'"
        ) from error
    formulas: Mapping[type[nn.Module], _Sampler] = GradSampleModule.GRAD_SAMPLERS
    return formulas
