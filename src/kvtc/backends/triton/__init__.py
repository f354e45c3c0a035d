"""Kernels in Triton: for CUDA devices, and for the CPU where Triton interprets them (TRITON_INTERPRET=1).

What no kernel does better than torch is done as the reference does it.
"""

from __future__ import annotations

from ..reference import ReferenceBackend


class TritonBackend(ReferenceBackend):
    """device: a CUDA device; the CPU in the interpreter."""

    name = "triton"
    batch_tokens = 8192
