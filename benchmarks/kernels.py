"""The native kernels against this machine's limits and against ONNX Runtime: `python -m benchmarks.kernels [--threads N]`.

Matrix-vector products (one token) in GB/s of weights beside the bandwidth of reading as many bytes; matrix-matrix products (a
prompt) in GOP/s beside the multipliers' peak. Everything is timed in turn, round after round, in one process (one thread by the
processor time it got): the medians of the ratios hold on a noisy machine, the absolute numbers only on a quiet one. Needs gcc.
With `--prompts`: the products of a 135 M decoder and of SigLIP-B at 96, 256 and 1,024 tokens, and the attention of both.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "runtimes" / "native"
FORMATS = {"int4": (0, 32), "int8": (1, 32), "float16": (2, 0), "float32": (3, 0)}
BITS = {"int4": 4, "int8": 8}
PROMPT_ROWS = 256
PROMPTS = (96, 256, 1024)
DECODER = ((576, 960), (576, 576), (576, 3072), (1536, 576))
ENCODER = ((768, 768), (768, 3072), (3072, 768))
ATTENTIONS = (("encoder", 1024, 12, 1, False), ("decoder", 96, 9, 3, True), ("decoder", 1120, 9, 3, True))
"""What, tokens, heads of 64, how many share keys, causal."""


def compiled(folder: Path, *sources: Path) -> ctypes.CDLL:
    """benchmarks/limits.c with the pool and `sources` as a library. Raises CalledProcessError, or OSError without gcc."""
    files = [ROOT / "benchmarks" / "limits.c", NATIVE / "pool.c", *sources]
    out = folder / "libkernels.so"
    command = ["gcc", "-std=c11", "-O3", "-fPIC", "-shared", "-fno-math-errno", *map(str, files), "-lm", "-lpthread"]
    subprocess.run([*command, "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


def library(folder: Path) -> ctypes.CDLL:
    """Compiles benchmarks/kernels.c with the kernels and the pool."""
    found = compiled(folder, ROOT / "benchmarks" / "kernels.c", *sorted((NATIVE / "kernels").glob("*.c")))
    size, real, pointer = ctypes.c_size_t, ctypes.c_double, ctypes.c_void_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "bench_open": (pointer, [size, ctypes.c_char_p]),
        "bench_name": (ctypes.c_char_p, [pointer]),
        "bench_read": (real, [pointer, pointer, size]),
        "bench_peak": (real, [pointer, ctypes.c_int]),
        "bench_panel_bytes": (size, [ctypes.c_int, size, size]),
        "bench_bytes": (real, [pointer, size, size, pointer, size, pointer]),
        "bench_attention": (real, [pointer, size, size, size, ctypes.c_int, ctypes.c_int, pointer]),
        "bench_product": (real, [pointer, ctypes.c_int, size, size, size, pointer, size, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        getattr(found, name).restype, getattr(found, name).argtypes = result, arguments
    return found


def aligned(count: int) -> npt.NDArray[np.uint8]:
    """Bytes that begin at a multiple of 4,096, each written once."""
    raw = np.full(count + 4096, 0x11, np.uint8)
    start = -raw.ctypes.data % 4096
    return raw[start : start + count]


def ort_product(kind: str, depth: int, width: int, threads: int) -> Callable[[npt.NDArray[np.float32]], float]:
    """The same product in ONNX Runtime: MatMulNBits at accuracy level 4, or MatMul."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    inputs, nodes, stored = ["x"], [], []
    if kind in BITS:
        blocks, size = depth // 32, 32 * BITS[kind] // 8
        stored += [numpy_helper.from_array(np.full((width, blocks, size), 0x11, np.uint8), "w")]
        stored += [numpy_helper.from_array(np.full(width * blocks, 0.01, np.float32), "s")]
        options: dict[str, Any] = {"K": depth, "N": width, "bits": BITS[kind], "block_size": 32, "accuracy_level": 4}
        nodes = [helper.make_node("MatMulNBits", [*inputs, "w", "s"], ["y"], domain="com.microsoft", **options)]
    elif kind == "bytes":
        stored += [numpy_helper.from_array(np.ones((depth, width), np.int8), "w")]
        stored += [numpy_helper.from_array(np.full(width, 0.01, np.float32), "s")]
        nodes = [helper.make_node("DynamicQuantizeMatMul", [*inputs, "w", "s"], ["y"], domain="com.microsoft")]
    else:
        stored += [numpy_helper.from_array(np.full((depth, width), 0.01, np.float32), "w")]
        nodes = [helper.make_node("MatMul", [*inputs, "w"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", width])],
        stored,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    clock = time.process_time if threads == 1 else time.perf_counter
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])

    def run(x: npt.NDArray[np.float32]) -> float:
        begin = clock()
        session.run(None, {"x": x})
        return clock() - begin

    return run


def ort_attention(tokens: int, heads: int, group: int, causal: bool, threads: int) -> Callable[[], float]:
    """The same attention in ONNX Runtime: GroupQueryAttention where causal, else MultiHeadAttention."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    widths = {"q": heads * 64, "k": heads // group * 64, "v": heads // group * 64}
    stored, outputs = [], ["y"]
    if causal:
        stored = [numpy_helper.from_array(np.array([tokens - 1], np.int32), "last")]
        stored += [numpy_helper.from_array(np.array(tokens, np.int32), "all")]
        outputs += ["present_key", "present_value"]
        options: dict[str, Any] = {"num_heads": heads, "kv_num_heads": heads // group}
        node = helper.make_node(
            "GroupQueryAttention", [*widths, "", "", "last", "all"], outputs, domain="com.microsoft", **options
        )
    else:
        node = helper.make_node("MultiHeadAttention", [*widths], outputs, domain="com.microsoft", num_heads=heads)
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, tokens, width]) for name, width in widths.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        stored,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    feeds = {name: generator.standard_normal((1, tokens, width)).astype(np.float32) for name, width in widths.items()}
    clock = time.process_time if threads == 1 else time.perf_counter

    def run() -> float:
        begin = clock()
        session.run(None, feeds)
        return clock() - begin

    return run


def rounds(timers: dict[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """Each timer in turn, `count` times after one warm-up."""
    found: dict[str, list[float]] = {name: [] for name in timers}
    for index in range(count + 1):
        for name, timer in timers.items():
            seconds = timer()
            if index:
                found[name].append(seconds)
    return found


def lines(lib: ctypes.CDLL, bench: int, threads: int, count: int, depth: int, width: int) -> Iterator[str]:
    """One table line per format."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((PROMPT_ROWS, depth)).astype(np.float32)
    peaks = [lib.bench_peak(bench, floats) for floats in (0, 1)]
    yield f"peak: {peaks[0] / 1e9:.0f} GOP/s in 8 bits, {peaks[1] / 1e9:.0f} GFLOP/s in floats"
    yield "| weights | GB/s, one token | % of reading | × ONNX Runtime | GOP/s, 256 tokens | % of the peak | × ONNX Runtime |"
    yield "|---|---|---|---|---|---|---|"
    for kind, (number, block) in FORMATS.items():
        panel = lib.bench_panel_bytes(number, depth, block)
        data = aligned(width // 16 * panel)
        few = width // 8
        one = ort_product(kind, depth, width, threads) if kind != "float16" else None
        many = ort_product(kind, depth, few, threads) if kind != "float16" else None

        def native(rows: int, outputs: int, number: int = number, block: int = block, data: Any = data) -> float:
            return float(lib.bench_product(bench, number, depth, outputs, block, data.ctypes.data, rows, x.ctypes.data))

        timers: dict[str, Callable[[], float]] = {
            "read": lambda data=data: float(lib.bench_read(bench, data.ctypes.data, data.nbytes)),  # type: ignore[misc]
            "one": lambda native=native: native(1, width),  # type: ignore[misc]
            "many": lambda native=native, few=few: native(PROMPT_ROWS, few),  # type: ignore[misc]
            "peak": lambda block=block: 1.0 / max(lib.bench_peak(bench, int(block == 0)), 1.0),  # type: ignore[misc]
        }
        if one is not None and many is not None:
            timers["ort one"] = lambda one=one: one(x[:1])  # type: ignore[misc]
            timers["ort many"] = lambda many=many: many(x)  # type: ignore[misc]
        found = rounds(timers, count)
        speed = data.nbytes / statistics.median(found["one"]) / 1e9
        work = 2.0 * PROMPT_ROWS * depth * few
        share = statistics.median(r / o for r, o in zip(found["read"], found["one"], strict=True))
        part = statistics.median(work / m * p for m, p in zip(found["many"], found["peak"], strict=True))
        beside = [
            f"{statistics.median(a / b for a, b in zip(found[f'ort {key}'], found[key], strict=True)):.2f}" if one else "–"
            for key in ("one", "many")
        ]
        gops = work / statistics.median(found["many"]) / 1e9
        yield f"| {kind} | {speed:.1f} | {100 * share:.0f} | {beside[0]} | {gops:.0f} | {100 * part:.0f} | {beside[1]} |"


def prompt_lines(lib: ctypes.CDLL, bench: int, threads: int, count: int) -> Iterator[str]:
    """One table line per shape and number of tokens: GOP/s, percent of the 8-bit peak, ratio to ONNX Runtime of each format."""
    kinds = ("int4", "int8", "bytes")
    yield "| depth × width | tokens | " + " | ".join(f"{kind} GOP/s | % | × ORT" for kind in kinds) + " |"
    yield "|---" * (2 + 3 * len(kinds)) + "|"
    generator = np.random.default_rng(0)
    for depth, width in (*DECODER, *ENCODER):
        data = {kind: aligned(width // 16 * lib.bench_panel_bytes(*_packing(kind, depth))) for kind in kinds}
        peers = {kind: ort_product(kind, depth, width, threads) for kind in kinds}
        for rows in PROMPTS:
            x = generator.standard_normal((rows, depth)).astype(np.float32)
            timers: dict[str, Callable[[], float]] = {"peak": lambda: 1.0 / max(lib.bench_peak(bench, 0), 1.0)}
            for kind in kinds:
                timers[kind] = partial(_product_seconds, lib, bench, kind, depth, width, data[kind], x)
                timers[f"ort {kind}"] = partial(peers[kind], x)
            found = rounds(timers, count)
            work, peak = 2.0 * rows * depth * width, statistics.median(found["peak"])
            cells = []
            for kind in kinds:
                seconds = statistics.median(found[kind])
                ratio = statistics.median(o / m for o, m in zip(found[f"ort {kind}"], found[kind], strict=True))
                cells.append(f"{work / seconds / 1e9:.0f} | {100 * work / seconds * peak:.0f} | {ratio:.2f}")
            yield f"| {depth} × {width} | {rows} | " + " | ".join(cells) + " |"


def _packing(kind: str, depth: int) -> tuple[int, int, int]:
    """Format, depth and block as `bench_panel_bytes` takes them. Bytes take no more than 8-bit blocks."""
    number, block = FORMATS["int8" if kind == "bytes" else kind]
    return number, depth, block


def _product_seconds(
    lib: ctypes.CDLL, bench: int, kind: str, depth: int, width: int, data: npt.NDArray[np.uint8], x: npt.NDArray[np.float32]
) -> float:
    if kind == "bytes":
        return float(lib.bench_bytes(bench, depth, width, data.ctypes.data, len(x), x.ctypes.data))
    number, block = FORMATS[kind]
    return float(lib.bench_product(bench, number, depth, width, block, data.ctypes.data, len(x), x.ctypes.data))


def attention_lines(lib: ctypes.CDLL, bench: int, threads: int, count: int) -> Iterator[str]:
    """One table line per attention: GFLOP/s in float32 and, where the CPU multiplies those, bfloat16; ratios to ONNX Runtime."""
    yield "| attention | tokens | float32 GFLOP/s | % of its peak | × ORT | half GFLOP/s | × ORT |"
    yield "|---|---|---|---|---|---|---|"
    for name, tokens, heads, group, causal in ATTENTIONS:
        x = np.random.default_rng(0).standard_normal(3 * tokens * heads * 64).astype(np.float32)

        def native(
            half: int, tokens: int = tokens, heads: int = heads, group: int = group, causal: bool = causal, x: Any = x
        ) -> float:
            return float(lib.bench_attention(bench, tokens, heads, group, int(causal), half, x.ctypes.data))

        timers: dict[str, Callable[[], float]] = {
            "ort": ort_attention(tokens, heads, group, causal, threads),
            "float": lambda native=native: native(0),  # type: ignore[misc]
            "half": lambda native=native: native(1),  # type: ignore[misc]
            "peak": lambda: 1.0 / max(lib.bench_peak(bench, 1), 1.0),
        }
        found = rounds(timers, count)
        work = 4.0 * 64 * heads * tokens * ((tokens + 1) / 2 if causal else tokens)
        speeds = {key: work / statistics.median(found[key]) / 1e9 for key in ("float", "half")}
        share = 100 * speeds["float"] * 1e9 * statistics.median(found["peak"])
        ratios = {key: statistics.median(o / m for o, m in zip(found["ort"], found[key], strict=True)) for key in speeds}
        yield (
            f"| {name} | {tokens} | {speeds['float']:.0f} | {share:.0f} | {ratios['float']:.2f} "
            f"| {speeds['half']:.0f} | {ratios['half']:.2f} |"
        )


def main() -> None:
    """Prints the limits and one line per weight format, or per shape of a prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kernels", default="", help="avx512, avx2, neon or scalar; default: the best this CPU has")
    parser.add_argument("--depth", type=int, default=2048)
    parser.add_argument("--width", type=int, default=32768)
    parser.add_argument("--prompts", action="store_true", help="products and attention of many tokens")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lib = library(Path(folder))
        bench = lib.bench_open(given.threads, given.kernels.encode())
        if not bench:
            raise SystemExit(f"this CPU has no kernels '{given.kernels}'")
        if given.prompts:
            print(f"{lib.bench_name(bench).decode()} kernels, {given.threads} threads, {given.rounds} rounds")
            for line in prompt_lines(lib, bench, given.threads, given.rounds):
                print(line, flush=True)
            for line in attention_lines(lib, bench, given.threads, given.rounds):
                print(line, flush=True)
            return
        print(f"{lib.bench_name(bench).decode()} kernels, {given.threads} threads, weights {given.depth} × {given.width}")
        for line in lines(lib, bench, given.threads, given.rounds, given.depth, given.width):
            print(line)


if __name__ == "__main__":
    main()
