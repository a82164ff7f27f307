"""Whole builds with engines: what is kept, what is made again, what is left to the device."""

import json
import shutil
import subprocess
import sys

import msgspec
import pytest
import sketch_bundle
from engine_builds import ALL, SMS, Remembered, stand_in_tensorrt

from vlm_edge.targets import examine, load_target
from vlm_edge.targets.backend import CompileOptions
from vlm_edge.targets.build import build
from vlm_edge.targets.tensorrt import backend, engines, seam
from vlm_edge.targets.tensorrt.cache import TimingCache, engine_key
from vlm_edge.targets.tensorrt.seam import Gpu, Library, load_library
from vlm_edge_runtime.bundle.engine_files import find_engine
from vlm_edge_runtime.bundle.reader import open_bundle, read_manifest
from vlm_edge_runtime.errors import BundleError, TargetError

ORIN = Gpu("Orin", 87)
GRAPHS = {"vision_encoder", "projector", "embed_tokens", "decoder.c32"}
SMALL = CompileOptions(context=(32,))


def made(bundle, target="rtx-40", compiling=SMALL, **options):
    seen = Remembered()
    return build(bundle, target, progress=seen, compiling=compiling, **options), seen


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    path = sketch_bundle.vlm_bundle(tmp_path_factory.mktemp("compiled") / "sketch.vlm")
    made(path)
    return path


@pytest.fixture
def compiled(compiled_once, tmp_path):
    """A bundle whose graphs all have engines, for this test alone."""
    return shutil.copytree(compiled_once, tmp_path / "sketch.vlm")


def test_every_graph_becomes_an_engine(vlm_bundle):
    """A context longer than what the model attends to (128) is compiled for that."""
    result, _ = made(vlm_bundle, compiling=CompileOptions(sm=SMS, context=(32, 4096)))
    assert {one.graph for one in result.engines} == {*GRAPHS, "decoder.c128"} == set(result.graphs)
    assert {one.graph: one.capacity for one in result.engines if one.capacity} == {"decoder.c32": 32, "decoder.c128": 128}
    for one in result.engines:
        assert one.sm == list(SMS) and one.builder == "tensorrt-rtx" and one.role == one.graph.partition(".")[0]
        assert (vlm_bundle / one.file.file).stat().st_size == one.file.bytes > 0
        assert one.file.file.endswith(f"/engines/{one.graph}.sm86-89-120.engine")
    decoder = find_engine(result, "decoder.c32", sm=86, where=vlm_bundle)
    assert len(decoder.aliases) == 4 and decoder.aliases["present.1.value"] == "past_key_values.1.value"
    sizes = [one.shapes["inputs_embeds"].max for one in decoder.profiles]
    assert sizes == [(4, 1, 64), (4, 32, 64)], "rows that decode together, tokens of one call"
    opened = open_bundle(vlm_bundle, build="rtx-40")
    assert set(opened.graphs) == set(result.graphs) and opened.kv.shared_buffer and opened.kv.dtype == "float16"


def test_buckets_share_their_weights_on_disk(vlm_bundle):
    result, _ = made(vlm_bundle, compiling=CompileOptions(context=(32, 128), make=False))
    small, large = result.graphs["decoder.c32"], result.graphs["decoder.c128"]
    assert small.data == large.data and small.model.sha256 != large.model.sha256
    assert small.data[0].file == "builds/rtx-40/decoder.onnx.data"
    assert large.model.bytes < small.data[0].bytes, "what the second is made of besides its weights"
    assert result.options["decoder.c128.cosine"] > 0.999, "each was compared with the portable decoder"


def test_an_unchanged_build_is_not_compiled_again(compiled):
    first = read_manifest(compiled).builds["rtx-40"]
    before = {path: path.stat().st_mtime_ns for path in (compiled / "builds").rglob("*") if path.is_file()}
    second, seen = made(compiled)
    assert second.engines == first.engines and set(seen.engines().values()) == {"unchanged"}
    assert not [step for step in seen.steps if step.startswith("lower")]
    assert before == {path: path.stat().st_mtime_ns for path in (compiled / "builds").rglob("*") if path.is_file()}


def test_what_changed_is_compiled_again(compiled):
    """Fewer rows: decoder and embedding. One profile or two: the decoder. Another GPU: all, beside the old."""
    keys = {one.graph: one.key for one in read_manifest(compiled).builds["rtx-40"].engines}
    rows, seen = made(compiled, compiling=CompileOptions(max_batch=2))
    again = {graph for graph, detail in seen.engines().items() if detail != "unchanged"}
    assert again == {"decoder.c32", "embed_tokens"}
    assert {one.graph for one in rows.engines if one.key != keys[one.graph]} == again and len(rows.engines) == len(GRAPHS)
    assert [one.use for one in find_engine(rows, "decoder.c32", sm=89, where=compiled).profiles] == ["decode", "prefill"]
    one_profile = CompileOptions(profiles="one", max_batch=2)
    one, seen = made(compiled, compiling=one_profile)
    assert [found.use for found in find_engine(one, "decoder.c32", sm=89, where=compiled).profiles] == ["any"]
    assert [graph for graph, detail in seen.engines().items() if detail != "unchanged"] == ["decoder.c32"]
    other, _ = made(compiled, compiling=msgspec.structs.replace(one_profile, sm=(120,)))
    assert len(other.engines) == 2 * len(GRAPHS)
    assert find_engine(other, "projector", sm=120, where=compiled) != find_engine(other, "projector", sm=89, where=compiled)
    one_for_both, _ = made(compiled, compiling=msgspec.structs.replace(one_profile, sm=(89, 120)))
    assert [engine.sm for engine in one_for_both.engines] == [[89, 120]] * len(GRAPHS)
    files = {path.name for path in (compiled / "builds" / "rtx-40" / "engines").iterdir()}
    assert files == {f"{graph}.sm89-120.engine" for graph in GRAPHS}


def test_one_profile_where_two_hold_the_weights_twice(compiled, monkeypatch):
    """Decided by what came out; the next build knows it by the key and does not try again."""
    asked = []

    def twice(engine_bytes, weights_bytes):
        asked.append(engine_bytes > weights_bytes > 0)
        return True

    monkeypatch.setattr(engines, "holds_weights_twice", twice)
    result, seen = made(compiled, compiling=CompileOptions(max_batch=2))
    decoder = find_engine(result, "decoder.c32", sm=89, where=compiled)
    assert [one.use for one in decoder.profiles] == ["any"] and asked == [True]
    assert "1 profile: two hold the" in seen.engines()["decoder.c32"]
    _, seen = made(compiled, compiling=CompileOptions(max_batch=2))
    assert set(seen.engines().values()) == {"unchanged"}


def test_engines_outlive_a_rebuild_of_the_same_graphs(compiled):
    result, seen = made(compiled, overwrite=True)
    assert len([step for step in seen.steps if step.startswith("lower")]) == 4
    assert set(seen.engines().values()) == {"unchanged"} and len(result.engines) == len(GRAPHS)
    open_bundle(compiled, build="rtx-40")
    result, seen = made(compiled, overwrite=True, precision="decoder=int4")
    assert [graph for graph, detail in seen.engines().items() if detail != "unchanged"] == ["decoder.c32"]
    assert len(result.engines) == len(GRAPHS)


def test_another_request_under_a_taken_name(compiled):
    for options, said in [
        ({"precision": "decoder=int4"}, r"precision \(decoder=fp16\)"),
        ({"block_size": 32}, r"block size \(128\)"),
        ({"compiling": CompileOptions(context=(64,))}, r"context \(32\)"),
        ({"target": "rtx-30", "name": "rtx-40"}, r"target \(rtx-40\)"),
        ({"calibration": ["picture.png"]}, "set of pictures"),
    ]:
        with pytest.raises(BundleError, match=f"has a build 'rtx-40' already, made with another {said}.*pass --overwrite"):
            made(compiled, **options)
    same, seen = made(compiled, precision="fp16")
    assert set(seen.engines().values()) == {"unchanged"} and same.engines


def test_a_damaged_engine_is_told_and_made_again(compiled):
    engine = find_engine(read_manifest(compiled).builds["rtx-40"], "projector", sm=89, where=compiled)
    file = compiled / engine.file.file
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError, match=r"projector.*SHA-256.*run the build's `vlm-edge build` again"):
        open_bundle(compiled, build="rtx-40")
    _, seen = made(compiled)
    assert [graph for graph, detail in seen.engines().items() if detail != "unchanged"] == ["projector"]
    file.unlink()
    with pytest.raises(BundleError, match="is missing"):
        open_bundle(compiled, build="rtx-40")
    made(compiled)
    open_bundle(compiled, build="rtx-40")


def test_an_engine_of_another_graph_is_not_found(compiled):
    result = read_manifest(compiled).builds["rtx-40"]
    with pytest.raises(TargetError, match=r"cannot run decoder.c32 on SM 86: its engines are for SM 89; run `vlm-edge build"):
        find_engine(result, "decoder.c32", sm=86, where=compiled)
    with pytest.raises(TargetError, match="it has no engine of it yet"):
        find_engine(msgspec.structs.replace(result, engines=[]), "decoder.c32", sm=86, where=compiled)
    result.graphs["decoder.c32"].model = result.graphs["projector"].model
    with pytest.raises(TargetError, match=r"was compiled from another decoder\.c32\.onnx than the build has now"):
        find_engine(result, "decoder.c32", sm=89, where=compiled)


def test_the_key_holds_all_that_an_engine_is_made_from(vlm_bundle):
    result, _ = made(vlm_bundle, compiling=CompileOptions(make=False))
    rtx = load_library(load_target("rtx-40"), (89,), gpu=None)
    one, other = result.graphs["projector"], result.graphs["embed_tokens"]
    keys = [
        engine_key(one, [], rtx, (89,), {}),
        engine_key(other, [], rtx, (89,), {}),
        engine_key(one, [], rtx, (86, 89), {}),
        engine_key(one, [], Library(rtx.module, rtx.flavour, "1.8"), (89,), {}),
        engine_key(one, [], Library(rtx.module, "tensorrt", rtx.version), (89,), {}),
        engine_key(one, [], rtx, (89,), {"workspace": 1}),
    ]
    assert len(set(keys)) == len(keys)
    assert engine_key(one, [], rtx, (89, 86), {}) == keys[2]


@pytest.mark.parametrize("target", ["jetson-orin-nano", "jetson-orin-nano-jp62", "h100-h200", "jetson-thor"])
def test_engines_of_another_machine_are_left_to_it(vlm_bundle, target):
    result, seen = made(vlm_bundle, target)
    assert result.engines == [] and "decoder.c32" in result.graphs
    assert "TensorRT compiles for the GPU of the machine it runs on" in seen.steps["engines: not built here"]
    _, seen = made(vlm_bundle, target, compiling=CompileOptions())
    assert list(seen.steps) == ["engines: not built here"], "and the graphs are not lowered again"


def test_the_device_goes_on_with_a_stand_in_tensorrt(vlm_bundle, monkeypatch, tmp_path):
    """Graphs from a desktop, engines on the device by the same command, and after an update of TensorRT again."""
    graphs, _ = made(vlm_bundle, "jetson-orin-nano")
    monkeypatch.setattr(backend, "local_gpu", lambda: ORIN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in_tensorrt("10.16.1.11"))
    monkeypatch.setattr(seam, "set_timings", lambda library, config, data: None)
    monkeypatch.setattr(seam, "timings", lambda config: b"measured")
    result, seen = made(vlm_bundle, "jetson-orin-nano", compiling=CompileOptions())
    assert not [step for step in seen.steps if step.startswith("lower")]
    assert result.graphs == graphs.graphs and {one.graph for one in result.engines} == set(result.graphs)
    assert {(one.builder, one.builder_version, *one.sm) for one in result.engines} == {("tensorrt", "10.16.1.11", 87)}
    kept = sorted(path.name for path in (tmp_path / "vlm-edge" / "timings").iterdir())
    assert len(kept) == 4 and all(name.startswith("orin-sm87.10.16.1.11.") for name in kept)
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in_tensorrt("10.16.2.5"))
    newer, seen = made(vlm_bundle, "jetson-orin-nano", compiling=CompileOptions())
    assert "unchanged" not in seen.engines().values() and {one.builder_version for one in newer.engines} == {"10.16.2.5"}
    assert len(newer.engines) == len(result.engines), "the old engines are gone"


def test_the_device_of_another_jetpack_with_a_stand_in_tensorrt(vlm_bundle, monkeypatch):
    made(vlm_bundle, "jetson-orin-nano")
    monkeypatch.setattr(backend, "local_gpu", lambda: ORIN)
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in_tensorrt("10.3.0.30"))
    with pytest.raises(TargetError, match=r"JetPack 7\.2, installed is 10\.3\.0\.30: .* build for the target of the version"):
        made(vlm_bundle, "jetson-orin-nano", compiling=CompileOptions())


def test_timings_survive_and_never_hurt(vlm_bundle, tmp_path):
    result, _ = made(vlm_bundle, compiling=CompileOptions(make=False))
    rtx = load_library(load_target("rtx-40"), (89,), gpu=None)
    entry = result.graphs["projector"]
    cache = TimingCache(ORIN, rtx, entry, tmp_path / "new")
    assert cache.read() == b""
    cache.write(b"measured")
    assert cache.read() == b"measured" and [path.name for path in cache.path.parent.iterdir()] == [cache.path.name]
    others = [
        TimingCache(Gpu("Orin", 110), rtx, entry, tmp_path / "new"),
        TimingCache(ORIN, Library(rtx.module, rtx.flavour, "2"), entry, tmp_path / "new"),
        TimingCache(ORIN, rtx, result.graphs["embed_tokens"], tmp_path / "new"),
    ]
    assert all(other.read() == b"" for other in others)
    (tmp_path / "file").write_text("in the way")
    TimingCache(ORIN, rtx, entry, tmp_path / "file" / "folder").write(b"lost, and no error")


def test_requests_that_no_target_can_meet(vlm_bundle):
    with pytest.raises(TargetError, match="compiles no engines"):
        made(vlm_bundle, "cpu-fp32", compiling=ALL)
    with pytest.raises(TargetError, match="not for SM 90"):
        made(vlm_bundle, compiling=CompileOptions(sm=(90,)))
    with pytest.raises(TargetError, match="name at least one number of tokens"):
        made(vlm_bundle, compiling=CompileOptions(context=(0,)))
    with pytest.raises(TargetError, match="0 rows cannot decode together"):
        made(vlm_bundle, compiling=CompileOptions(max_batch=0))
    assert not read_manifest(vlm_bundle).builds


def test_what_preflight_refuses_is_never_compiled(vlm_bundle, monkeypatch):
    from vlm_edge.targets.preflight import Problem

    fault = Problem(graph="projector", node="n", op="MatMul", module="model.projector", limit="no such type", way_out="fp16")
    monkeypatch.setattr(examine, "preflight", lambda model, target, graph: [fault] if graph == "projector" else [])
    with pytest.raises(TargetError, match=r"projector: MatMul 'n' in model\.projector: no such type"):
        made(vlm_bundle)
    assert not read_manifest(vlm_bundle).builds and not (vlm_bundle / "builds").exists()


def test_a_failed_engine_leaves_those_before_it(vlm_bundle, monkeypatch):
    real = engines.compile_engine

    def fails(library, path, **options):
        if path.name.startswith("embed"):
            raise TargetError("TensorRT says no")
        return real(library, path, **options)

    monkeypatch.setattr(engines, "compile_engine", fails)
    with pytest.raises(TargetError, match="says no"):
        made(vlm_bundle)
    assert [one.graph for one in read_manifest(vlm_bundle).builds["rtx-40"].engines] == ["vision_encoder", "projector"]
    monkeypatch.setattr(engines, "compile_engine", real)
    _, seen = made(vlm_bundle)
    assert list(seen.engines().values())[:2] == ["unchanged", "unchanged"]
    open_bundle(vlm_bundle, build="rtx-40")


def test_a_dual_encoder(dual_bundle):
    result, _ = made(dual_bundle, compiling=CompileOptions(sm=SMS))
    assert {one.graph: one.profiles[0].use for one in result.engines} == {"vision_encoder": "any", "text_encoder": "any"}


def test_without_torch_and_from_the_command_line(vlm_bundle):
    """The command on a device: neither PyTorch nor transformers nor what exports with them can be imported."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnxscript', 'safetensors'): sys.modules[name] = None\n"
        "from vlm_edge.cli.main import main\n"
        f"main(['build', {str(vlm_bundle)!r}, '--target', 'rtx-40', '--sm', '86,120', '--context', '32', '--json'])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    (document,) = json.loads(ran.stdout)
    assert {one["graph"] for one in document["engines"]} == GRAPHS
    assert all(one["sm"] == [86, 120] for one in document["engines"])


def test_an_engine_outside_the_bundle_is_refused(compiled):
    manifest = json.loads((compiled / "manifest.json").read_text())
    manifest["builds"]["rtx-40"]["engines"][0]["file"]["file"] = "../../elsewhere.engine"
    (compiled / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="names a file outside the bundle"):
        open_bundle(compiled, build="rtx-40")


def test_the_command_line_says_what_it_takes(vlm_bundle):
    from click.testing import CliRunner

    from vlm_edge.cli.build import command

    told = CliRunner().invoke(command, [str(vlm_bundle), "--target", "rtx-40", "--sm", "ada"])
    assert told.exit_code == 2 and "--sm takes whole numbers between commas, got 'ada'" in told.output
    made_here = CliRunner().invoke(command, [str(vlm_bundle), "--target", "jetson-thor", "--context", "32"])
    assert made_here.exit_code == 0, made_here.output
    assert "engines: not built here" in made_here.output and "decoder.c32" in made_here.output
