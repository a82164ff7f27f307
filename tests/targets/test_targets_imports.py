"""Lowering runs on a device: nothing it imports may pull in PyTorch or transformers."""

import pkgutil
import subprocess
import sys

import vlm_edge.passes
import vlm_edge.quantize
import vlm_edge.targets


def test_no_torch():
    packages = (vlm_edge.passes, vlm_edge.quantize, vlm_edge.targets)
    names = [f"{package.__name__}.{module.name}" for package in packages for module in pkgutil.iter_modules(package.__path__)]
    assert "vlm_edge.targets.build" in names
    code = f"import sys, importlib\nfor n in {names!r}: importlib.import_module(n)\n"
    code += "bad = {'torch', 'transformers', 'onnxscript', 'onnxruntime.quantization'} & set(sys.modules)\nassert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
