"""Decoders whose signature neither engine can serve are refused in words."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
from onnx import TensorProto, helper
from toy_bundle import toy_bundle
from toy_decoder import Toy

from vlm_edge_runtime.engines import EngineOptions, open_engine
from vlm_edge_runtime.errors import DeviceError

Change = Callable[[onnx.ModelProto], None]


class Changed(Toy):
    """A toy whose graphs are changed at the last moment."""

    change: Change

    def portable_model(self) -> bytes:
        return self._changed(super().portable_model())

    def lowered_model(self) -> bytes:
        return self._changed(super().lowered_model())

    def _changed(self, data: bytes) -> bytes:
        model = onnx.load_from_string(data)
        self.change(model)
        return model.SerializeToString()


def _input(name: str, shape: list[int | str | None], kind: int = TensorProto.FLOAT) -> Change:
    return lambda model: model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))


def _without_output(name: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        kept = [output for output in model.graph.output if output.name != name]
        del model.graph.output[:]
        model.graph.output.extend(kept)

    return change


CASES = {
    "no batch": (Toy(), _input("bias", [32]), "has an input 'bias'"),
    "no dimension": (Toy(), _input("bias", []), "has an input 'bias'"),
    "sequence in another place": (Toy(), _input("bias", ["batch", 3, "sequence"]), "has an input 'bias'"),
    "one row of tokens": (Toy(), _input("bias", [1, "sequence"]), "has an input 'bias'"),
    "state of unknown size": (Toy(), _input("state.0", ["batch", "width"]), r"'state.0'"),
    "state that nothing follows": (
        Toy(recurrent=True, cached=False),
        _without_output("present_state.0"),
        r"has no output '?present_state.0",
    ),
    "cache that nothing follows": (Toy(), _without_output("present.1.value"), r"has no output '?present.1.value"),
}


@pytest.mark.parametrize("build", [None, "lowered"], ids=["portable", "lowered"])
@pytest.mark.parametrize("case", CASES)
def test_unknown_kinds_of_inputs(tmp_path, case, build) -> None:
    toy, change, message = CASES[case]
    changed = Changed(**{name: getattr(toy, name) for name in Toy.__slots__ if not name.startswith("_")})
    changed.change = change
    engine = open_engine(toy_bundle(tmp_path, changed, build), "cpu", EngineOptions(threads=1, spin=False))
    with pytest.raises(DeviceError, match=message):
        engine.decoder().allocate(1, 8)
    engine.close()


def test_a_lowered_decoder_is_no_portable_one(tmp_path) -> None:
    class Swapped(Toy):
        def portable_model(self) -> bytes:
            return self.lowered_model()

    with pytest.raises(DeviceError, match="not a portable decoder: it was lowered to a shared cache"):
        open_engine(toy_bundle(tmp_path, Swapped(), None), "cpu", EngineOptions(threads=1, spin=False)).decoder()
