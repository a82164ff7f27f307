"""Graph passes for TensorRT and TensorRT-RTX: portable ONNX in, a graph of the operators their parser imports out, in fp32.

`vlm_edge/targets/tensorrt/pipeline.py` says which passes a graph goes through. Typing and quantisation come after them.
"""
