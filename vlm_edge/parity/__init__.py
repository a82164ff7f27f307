"""Is the compiled model still the original? Comparing graphs and answers, verdicts, and the first node that is wrong.

PyTorch is imported by `reference.py` and `modules.py` alone, and those only when a checkpoint is given to compare with: on a
device, builds are compared with the portable graphs without it.
"""

from .bisect import Culprit, first_divergence
from .comparison import compare
from .culprits import bisect_bundle
from .dataset import Dataset, Pair, Question, load_dataset
from .examples import Example, built_in
from .report import BuildReport, ParityReport
from .tolerance import EXIT_CODES, Tolerance, Verdict, tolerance

__all__ = [
    "EXIT_CODES",
    "BuildReport",
    "Culprit",
    "Dataset",
    "Example",
    "Pair",
    "ParityReport",
    "Question",
    "Tolerance",
    "Verdict",
    "bisect_bundle",
    "built_in",
    "compare",
    "first_divergence",
    "load_dataset",
    "tolerance",
]
