"""Reference models for families that no library ships: small, faithful to their papers, ordinary `PreTrainedModel`s.

One file per model; importing it registers the model with transformers. The registry line of a model type names the file (`zoo`).
"""
