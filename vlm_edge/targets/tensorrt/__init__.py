"""TensorRT and TensorRT-RTX: which passes a graph takes, and how engines are compiled from it and kept."""
