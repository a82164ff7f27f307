"""Actions out of generated tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.bundle.manifest import ActionTokens
from vlm_edge_runtime.errors import PromptError


def decode_actions(rule: ActionTokens, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """The actions in an answer, float32 `[actions, dimensions]`; words between them are passed over.

    A token stands for the middle of its bin: low + (bin + ½) · (high − low) / bins (RT-2, arXiv 2307.15818, section 3.2, cuts
    each dimension into 256 bins of equal width; RT-1, 2212.06817, section 5.1). Raises PromptError when the answer breaks off
    inside an action.
    """
    ids = np.asarray(tokens, np.int64)
    bins = ids - rule.first_token
    bins = bins[(bins >= 0) & (bins < rule.bins)]
    low, high = np.asarray(rule.low), np.asarray(rule.high)
    if len(bins) % len(low):
        raise PromptError(
            f"the answer has {len(bins)} action tokens, and an action is {len(low)} of them: it breaks off inside one. "
            "Allow more new tokens (max_new_tokens)."
        )
    values: npt.NDArray[np.float64] = low + (bins.reshape(-1, len(low)) + 0.5) * (high - low) / rule.bins
    return values.astype(np.float32)
