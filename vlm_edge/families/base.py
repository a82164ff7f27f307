"""What a fusion family is: the graphs a checkpoint splits into, and the rule by which the runtime joins them.

A family is one module of this package with a `FAMILY` in it; `registry.toml` says which model types belong to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from vlm_edge_runtime.bundle.manifest import Contract, Dim, TensorSpec
from vlm_edge_runtime.errors import UnsupportedModelError

from .registry import Entry

if TYPE_CHECKING:
    from vlm_edge.export.checkpoint import Checkpoint

Tensors = tuple[torch.Tensor, ...]
Part = Any
"""A model, or a part of one, whose own methods and attributes transformers gives no types to."""
_DTYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}


@dataclass(frozen=True, slots=True)
class Case:
    """One set of sizes for the dynamic dimensions of a graph. `padding`: how many tokens the first row is padded on the left."""

    label: str
    sizes: dict[str, int]
    padding: int = 0

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """The concrete shape of an input or output in this case."""
        return tuple(self.sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)

    def generator(self) -> torch.Generator:
        """Random numbers that are the same in every run for the same case."""
        seed = sum((i + 1) * 1000003 * size for i, size in enumerate(self.sizes.values())) + self.padding
        return torch.Generator().manual_seed(seed)


def all_outputs(case: Case, inputs: Tensors) -> None:
    """The default of `GraphPlan.compared`: every number of every output counts."""
    return


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """One graph to be: what is traced, its signature, and how it is checked.

    - `module(*inputs) -> outputs` runs under our traced attention and may rearrange how the model is called;
    - `sample(case)` makes inputs; `cases[0]` is traced, so each of its dynamic sizes is at least 2 and unlike the others;
    - `reference(case, inputs)` gives the same outputs from the *original* model, with its own attention and masks;
    - `compared(case, inputs)` gives one boolean mask per output (broadcastable), or None where everything counts. Tokens that
      are padding have no meaning and are left out.
    """

    role: str
    module: torch.nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cases: tuple[Case, ...]
    sample: Callable[[Case], Tensors]
    reference: Callable[[Case, Tensors], Tensors]
    compared: Callable[[Case, Tensors], Tensors | None] = all_outputs


@dataclass(frozen=True, slots=True)
class Split:
    """A checkpoint taken apart: its graphs in the order of execution, and the contract that goes into the manifest."""

    graphs: tuple[GraphPlan, ...]
    contract: Contract


class Family(Protocol):
    """One fusion family. `auto_class` names the transformers class that loads its checkpoints."""

    name: str
    auto_class: str

    def refuse(self, config: PreTrainedConfig, entry: Entry) -> None:
        """Raises UnsupportedModelError, in one sentence, for a configuration that cannot be carried; nothing is loaded yet."""

    def split(self, checkpoint: Checkpoint, entry: Entry) -> Split:
        """Takes the loaded model apart. Nothing is traced yet; the model is left as it is."""


def float32(name: str, *shape: Dim) -> TensorSpec:
    """A float32 input or output with named dynamic dimensions."""
    return TensorSpec(name=name, dtype="float32", shape=shape)


def int64(name: str, *shape: Dim) -> TensorSpec:
    """An int64 input or output with named dynamic dimensions."""
    return TensorSpec(name=name, dtype="int64", shape=shape)


def randn(spec: TensorSpec, case: Case) -> torch.Tensor:
    """Normally distributed numbers in the shape that `spec` has in `case`."""
    return torch.randn(case.shape(spec), generator=case.generator(), dtype=_DTYPES[spec.dtype])


def sequence_of_cases(names: Sequence[str], *rows: Sequence[Any]) -> tuple[Case, ...]:
    """A table of cases: each row is a label and then the sizes of `names`, in order."""
    return tuple(Case(str(row[0]), dict(zip(names, row[1:], strict=True))) for row in rows)


OptionsT = TypeVar("OptionsT", bound=msgspec.Struct)


def options(entry: Entry, kind: type[OptionsT]) -> OptionsT:
    """The registry's line as the family's own options. Raises UnsupportedModelError when the line does not say enough."""
    try:
        return msgspec.convert(entry.options, kind)
    except msgspec.ValidationError as error:
        raise UnsupportedModelError(f"The registry's line for '{entry.model_type}' ({entry.file}) is wrong: {error}.") from None


def submodule(model: PreTrainedModel, path: str, entry: Entry) -> torch.nn.Module:
    """`model.a.b.c`. Raises UnsupportedModelError naming the registry's line when the model has no such part."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no '{path}', which the registry's line for '{entry.model_type}' ({entry.file}) names."
        ) from None


class Single(torch.nn.Module):
    """A part with one tensor in and one out, as a graph."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, tensor: torch.Tensor) -> Tensors:
        return (self.part(tensor),)


class Seam(Exception):
    """Leaves a forward pass at the moment a given part is called, carrying what it was called with."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__("the seam between two graphs")
        self.tensor = tensor


class _Cut(torch.nn.Module):
    """Stands in for a part. It has no `__call__` of a module's kind: the tracer would count a module entered and never left."""

    def __call__(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise Seam(tensor)


def run_to(root: torch.nn.Module, part: torch.nn.Module, call: Callable[[], object]) -> torch.Tensor:
    """Runs `call` until it reaches `part`, somewhere in `root`, and returns the tensor `part` would have been given.

    Modules between `root` and `part` must not be entered by being called (their `forward` or other methods may).
    """
    parent, name = next((module, name) for module in root.modules() for name, child in module.named_children() if child is part)
    parent._modules[name] = _Cut()
    try:
        call()
    except Seam as seam:
        return seam.tensor
    finally:
        parent._modules[name] = part
    raise UnsupportedModelError(f"The model never called its {type(part).__name__} while an image was encoded.")
