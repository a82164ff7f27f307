"""A model of SmolVLM-256M-Instruct's shape with random weights, which several benchmarks use.

Speed does not depend on the values of the weights, so no download is needed: SigLIP-B/16 at 512 px, pixel shuffle 4, and a
decoder of SmolLM2-135M's shape (30 layers, hidden 576, 9 query and 3 KV heads, vocabulary 49,280).
"""
