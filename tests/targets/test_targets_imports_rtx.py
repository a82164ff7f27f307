"""The table of TensorRT-RTX against its real parser: the same verdict on every graph."""

import warnings

import msgspec
import onnx_ir as ir
import pytest
from one_node import BUILDABLE, REFUSED

from vlm_edge.targets import load_target
from vlm_edge.targets.precision import bundle_roles
from vlm_edge.targets.preflight import preflight
from vlm_edge_runtime.bundle.reader import open_bundle

trt = pytest.importorskip("tensorrt_rtx")


class Parser:
    """TensorRT-RTX's parser on strongly typed networks; `errors` holds what it said of the last graph."""

    def __init__(self) -> None:
        class Quiet(trt.ILogger):
            def __init__(self):
                trt.ILogger.__init__(self)

            def log(self, severity, message):
                pass

        self._logger = Quiet()
        self._builder = trt.Builder(self._logger)
        self.errors: list[str] = []

    def accepts(self, proto: bytes | None = None, *, path=None) -> bool:
        network = self._builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._logger)
        parsed = parser.parse(proto) if path is None else parser.parse_from_file(str(path))
        self.errors = [parser.get_error(number).desc() for number in range(parser.num_errors)]
        return bool(parsed)


@pytest.fixture(scope="module")
def parser():
    return Parser()


@pytest.fixture(scope="module")
def newest():
    """All precisions, any opset: what is left is the table."""
    target = load_target("rtx-50")
    return msgspec.structs.replace(target, device=msgspec.structs.replace(target.device, opset=99))


@pytest.mark.parametrize("name", BUILDABLE)
def test_what_the_table_takes_the_parser_takes(parser, name):
    assert parser.accepts(ir.to_proto(BUILDABLE[name]()).SerializeToString()), parser.errors


@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"cache inside", "top 4000"}))  # these two are refused by the build alone
def test_what_the_table_refuses_the_parser_refuses(parser, name):
    assert not parser.accepts(ir.to_proto(REFUSED[name][0]()).SerializeToString())


STRICTER = {
    "nonpad_kv_seqlen": "the parser drops this input without an error",
    "inputs and outputs may be": "types of inputs and outputs that no graph of ours has",
    "2 outputs are used": "the mask of Dropout; its documentation says that it has none",
    "attribute layout is 1": "documented as not supported",
    "its result is UINT8": "documented as not supported",
    "(A) is UINT8": "documented as a type of the network's inputs and outputs alone",
    "input 1 (axis) is computed": "CumSum's axis is documented as a build-time constant",
}
"""What the table refuses knowingly, though the parser takes it: words of the reason → why."""
LOOSER = ("celu_", "identity_", "mod_", "range_", "affine_grid_3d", "matmul_1d_3d")
"""Single cases that the parser refuses for what no table says (Celu in half precision, fmod = 0 of floats, sequences)."""


@pytest.mark.slow
def test_verdicts_on_the_models_of_onnx_itself(parser, newest):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    same, differ = 0, []
    for case in cases:
        problems = preflight(ir.from_proto(case.model), newest, "graph")
        accepted = parser.accepts(case.model.SerializeToString())
        stricter = accepted and any(words in problem.limit for problem in problems for words in STRICTER)
        looser = not accepted and case.name.removeprefix("test_").startswith(LOOSER)
        if accepted == (not problems):
            same += 1
        elif not stricter and not looser:
            differ.append((case.name, accepted, problems[:1], parser.errors[:1]))
    assert not differ
    assert same > 0.9 * len(cases) > 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smolvlm", "florence2"])
def test_verdicts_on_portable_and_lowered_graphs(portable_bundle, parser, tmp_path, name):
    from vlm_edge.targets.tensorrt.pipeline import lower_exactly

    target = load_target("rtx-40")
    bundle = open_bundle(portable_bundle(name))
    kinds = bundle_roles(bundle.graphs)
    for role in bundle.graphs:
        path = bundle.graph_path(role)
        assert parser.accepts(path=path) == (not preflight(ir.load(path), target, role)), (role, parser.errors)
        model = ir.load(path)
        lower_exactly(model, kinds[role], target.gpu()[0], capacity=64 if kinds[role] == "decoder" else None)
        assert preflight(model, target, role) == []
        ir.save(model, tmp_path / f"{role}.onnx", external_data=f"{role}.data")
        assert parser.accepts(path=tmp_path / f"{role}.onnx"), (role, parser.errors)
