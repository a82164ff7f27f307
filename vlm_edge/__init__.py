"""vlm-edge: the compiler. `export` splits and traces a checkpoint, `build` lowers it for a target.

Importing this package loads neither torch nor transformers; the functions below import them when called.
"""

__version__ = "0.1.0"
