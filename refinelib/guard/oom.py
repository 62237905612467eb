"""Whether memory ran out, whoever asked for it."""

from __future__ import annotations

import torch

#: What CUDA and its libraries say where they ask for memory themselves: for a context, a kernel, a workspace.
_THEIR_WORDS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED")


def ran_out(error: BaseException) -> bool:
    """PyTorch's own memory raises ``OutOfMemoryError``; CUDA, cuBLAS and cuDNN, which take theirs beside it, end in some other ``RuntimeError``. All of these leave the
    device as it was: the same can be tried in smaller pieces.
    """
    return isinstance(error, torch.OutOfMemoryError) or isinstance(error, RuntimeError) and any(words in str(error) for words in _THEIR_WORDS)
