"""Graphs in ONNX Runtime's C sessions as `tensorrt_program.Program`: what the decode loop of the GPU runs, over addresses.

A decoder on a shared cache (GroupQueryAttention of com.microsoft) counts differently from TensorRT's: `seqlens_k` is the index of
the newest entry, `total_sequence_length` a number in host memory. Both are seen to here; to the loop they are `past_lengths`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle.manifest import TensorSpec
from vlm_edge_runtime.errors import DeviceError

from .cuda_memory import Buffers
from .decoder_inputs import PAST
from .ort_cuda_models import cast
from .ort_cuda_place import Place
from .tensorrt_program import Profile, Shape, TensorInfo
from .tensorrt_signature import PAST_LENGTHS
from .tensorrt_types import size_of

_NEWEST, _TOTAL = "seqlens_k", "total_sequence_length"


class OrtProgram:
    """One session, for one capacity of the cache where it has one; programs of a session share it.

    `convert`: an output and the type that it is wanted in (its converter is a session of its own, run behind the graph).
    """

    counts_last = True
    """Whether `past_lengths` is the index of the newest entry instead of the number of entries before the run."""

    def __init__(
        self,
        place: Place,
        session: _native.Session,
        role: str,
        *,
        capacity: int | None = None,
        convert: tuple[str, str] | None = None,
    ) -> None:
        self.place, self.session, self.role, self.capacity = place, session, role, capacity
        self.profiles: Sequence[Profile] = ()
        given = {spec.name: spec for spec in specs_of(session.inputs, role)}
        self.inputs = tuple(self._seen(spec) for spec in given.values() if spec.name != _TOTAL)
        self.total_shape = given[_TOTAL].shape if _TOTAL in given else None
        self.outputs = tuple(self._seen(spec) for spec in specs_of(session.outputs, role))
        self.converter: _native.Session | None = None
        self.convert = ""
        if convert is not None:
            self.convert, wanted = convert
            spec = next(one for one in self.outputs if one.name == self.convert)
            self.converter, _ = place.session(cast(len(spec.shape), spec.dtype, wanted), f"{role}.{self.convert}", captured=True)
            self._unconverted = spec.dtype
            self.outputs = tuple(_typed(one, wanted) if one.name == self.convert else one for one in self.outputs)
        self.tensors: Mapping[str, TensorInfo] = {
            spec.name: TensorInfo(spec.name, spec.dtype, tuple(s if isinstance(s, int) else -1 for s in spec.shape), is_input)
            for is_input, specs in ((True, self.inputs), (False, self.outputs))
            for spec in specs
        }

    @property
    def unconverted(self) -> str:
        """The type of the output that is converted, as the graph gives it."""
        return self._unconverted

    def alias(self, output: str) -> str | None:
        """The cache is updated in place: a present is bound where its past lies."""
        past = PAST + output.removeprefix("present.")
        return past if output.startswith("present.") and past in self.tensors else None

    def context(self, profile: int, *, fixed: bool) -> OrtContext:
        """A new context."""
        return OrtContext(self, fixed)

    def bound_run(self, session: _native.Session, graph_id: int) -> _native.BoundRun:
        """A run of a session on the place's memory."""
        return _native.BoundRun(session, cuda=self.place.cuda is not None, graph_id=graph_id)

    def close(self) -> None:
        """Lets go of the converter; the session is the engine's."""
        if self.converter is not None:
            self.converter.close()

    def _seen(self, spec: TensorSpec) -> TensorSpec:
        """A tensor as the loop sees it: the cache with its capacity, one token's logits, `past_lengths`."""
        if spec.name == _NEWEST:
            return TensorSpec(name=PAST_LENGTHS, dtype=spec.dtype, shape=spec.shape)
        if spec.name == "logits" and len(spec.shape) == 3:
            return TensorSpec(name=spec.name, dtype=spec.dtype, shape=(spec.shape[0], 1, spec.shape[2]))
        if not spec.name.startswith((PAST, "present.")) or len(spec.shape) != 4 or self.capacity is None:
            return spec
        return TensorSpec(name=spec.name, dtype=spec.dtype, shape=(*spec.shape[:2], self.capacity, spec.shape[3]))


class OrtContext:
    """`tensorrt_program.Context`: one binding, whose names are bound again when their shape or address changes."""

    def __init__(self, program: OrtProgram, fixed: bool) -> None:
        self._program = program
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._bound: dict[str, tuple[Shape, int]] = {}
        self._scratch = Buffers(program.place.device)
        self._total = np.zeros(1, np.int32)
        if fixed and program.capacity is not None:
            self._total[0] = program.capacity  # so that one captured graph serves every length; seqlens_k says what is valid
        self._run, self._convert = self._runs(-1)

    def set_shape(self, name: str, shape: Shape) -> None:
        """An input's shape."""
        self._shapes[name] = tuple(shape)

    def set_address(self, name: str, address: int) -> None:
        """A tensor's memory."""
        self._addresses[name] = address

    def set_total(self, entries: int) -> None:
        """Entries of the longest row after the run, which the attention kernels are told on the host."""
        self._total[0] = entries

    def output_shape(self, name: str) -> Shape:
        """By the names of dimensions. Raises DeviceError where the graph decides the shape while it runs."""
        sizes: dict[str, int] = {}
        for spec in self._program.inputs:
            known = self._shapes.get(spec.name, ())
            sizes |= {dim: size for dim, size in zip(spec.shape, known, strict=False) if isinstance(dim, str) and dim}
        spec = next(one for one in self._program.outputs if one.name == name)
        if unknown := [dim for dim in spec.shape if isinstance(dim, str) and dim not in sizes]:
            raise DeviceError(
                f"graph '{self._program.role}': the shape of '{name}' depends on values ('{unknown[0]}' is no size of an input), "
                "which this engine does not serve."
            )
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)

    def enqueue(self, stream: int) -> None:
        """Queues a run on the sessions' stream (done when it returns, on the CPU provider)."""
        self._bind(self._run, self._convert, self._bound)
        self._run.run()
        if self._convert is not None:
            self._convert.run()

    def capturable(self, stream: int) -> bool:
        """Steps are launched by the C loop; whether ONNX Runtime makes CUDA graphs of its runs is said by the engine."""
        return True

    def frozen(self) -> list[_native.BoundRun]:
        """Runs over the addresses as they are now, for the C loop: they stay when this context gets others.

        On a GPU each is a CUDA graph of ONNX Runtime's: captured in its third run, replayed from then on.
        """
        run, convert = self._runs(self._program.place.graph_id())
        self._bind(run, convert, {})
        return [run] if convert is None else [run, convert]

    def close(self) -> None:
        """Frees what it holds between graph and converter."""
        self._scratch.close()

    def _runs(self, graph_id: int) -> tuple[_native.BoundRun, _native.BoundRun | None]:
        program = self._program
        run = program.bound_run(program.session, graph_id)
        if program.total_shape is not None:
            run.bind_input(_TOTAL, self._total.ctypes.data, [1] * len(program.total_shape), True)
        return run, None if program.converter is None else program.bound_run(program.converter, graph_id)

    def _bind(self, run: _native.BoundRun, convert: _native.BoundRun | None, bound: dict[str, tuple[Shape, int]]) -> None:
        """Binds what is new; `bound` is what the run has."""
        program = self._program
        for spec in program.inputs:
            wanted = (self._shapes[spec.name], self._addresses[spec.name])
            if bound.get(spec.name) != wanted:
                run.bind_input(_NEWEST if spec.name == PAST_LENGTHS else spec.name, wanted[1], wanted[0])
                bound[spec.name] = wanted
        for spec in program.outputs:
            wanted = (self.output_shape(spec.name), self._addresses[spec.name])
            if bound.get(spec.name) == wanted:
                continue
            bound[spec.name] = wanted
            if convert is None or spec.name != program.convert:
                run.bind_output(spec.name, wanted[1], wanted[0])
                continue
            between = self._scratch.reserve("between", size_of(wanted[0], program.unconverted))
            run.bind_output(spec.name, between, wanted[0])
            convert.bind_input("given", between, wanted[0])
            convert.bind_output("wanted", wanted[1], wanted[0])


def specs_of(values: Sequence[tuple[str, str, tuple[int | str, ...]]], role: str) -> tuple[TensorSpec, ...]:
    """A session's inputs or outputs. Raises DeviceError for a type that no numpy array has."""
    for name, dtype, _ in values:
        if dtype == "unsupported":
            raise DeviceError(f"graph '{role}': '{name}' has a type that numpy has not: build the bundle again.")
    return tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in values)


def widened(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The specs with float32 in place of float16: what callers give and get."""
    return tuple(_typed(spec, "float32") if spec.dtype == "float16" else spec for spec in specs)


def _typed(spec: TensorSpec, dtype: str) -> TensorSpec:
    return TensorSpec(name=spec.name, dtype=dtype, shape=spec.shape)
