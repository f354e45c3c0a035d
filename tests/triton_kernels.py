"""Every kernel as it is launched on a GPU, compiled for GPUs that need not be there: `python -m tests.triton_kernels 80 90`.

Triton decides when it is imported whether it interprets or compiles, so this is a program of its own.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import dataclass, field
from typing import Any

ROOM = "kvtc.backends.triton"
_POINTER = "*"


@dataclass(frozen=True)
class Kernel:
    """types: of its arguments in order, constants left out. constants: by name."""

    module: str
    name: str
    types: str
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4


_PLACED = {"LIMIT": 448.0, "TURNED": True, "INTERLEAVED": False, "TOKENS": 16, "FEATURES": 128}
_PLACE = "*{rows} i32 i32 *fp32 *fp32 i32 i32 *{rows} i32 i32 *{data} i64 *i64 i32 *{data} i64 *i64 i32 i32 i32"
# Features of a cache lie side by side, which Triton sees in the argument 1.
_STRIDES = {"key_to_feature": 1, "value_to_feature": 1}

KERNELS = [
    Kernel(
        "decode_kernels", "decode_integers", "*u8 *u16 *i64 *fp32 *u32 *i64 *i32 *fp32 i32 *i32", num_warps=1
    ),
    *(
        Kernel(
            "place_kernels",
            "place_rows",
            _PLACE.format(rows=rows, data=data),
            _PLACED | _STRIDES | {"MANTISSA": mantissa, "BIAS": bias},
        )
        for rows, data, mantissa, bias in [("bf16", "u16", 7, 127), ("fp32", "u8", 3, 7), ("fp32", "fp16", 0, 0)]
    ),
]  # fmt: skip


def compile_kernel(kernel: Kernel, capability: int) -> dict[str, Any]:
    """Facts of the machine code: bytes of shared memory, and how often what slows kernels down occurs in it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"{ROOM}.{kernel.module}"), kernel.name)
    names = [name for name in function.arg_names if name not in kernel.constants]
    types = dict(zip(names, kernel.types.split(), strict=True))
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, of in enumerate(signature.values()) if of.startswith(_POINTER)
    }
    compiled = triton.compile(
        ASTSource(function, signature, kernel.constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": kernel.num_warps, "enable_fp_fusion": False},
    )
    ptx = compiled.asm["ptx"]
    return {
        "kernel": f"{kernel.name} sm_{capability}",
        "cubin_bytes": len(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:ld|st)\.local", ptx)),
        "approximate_divisions": len(re.findall(r"\bdiv\.(?:full|approx)", ptx)),
        "fused": len(re.findall(r"\bfma\.", ptx)),
    }


def main() -> None:
    facts = [compile_kernel(kernel, int(capability)) for capability in sys.argv[1:] for kernel in KERNELS]
    sys.stdout.write(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
