"""Forwards of transformers' classes that are exchanged while a model is traced, and only then."""
