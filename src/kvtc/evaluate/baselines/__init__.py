"""The baselines that kvtc is measured against: one short file each, which names the paper, its
settings and what differs.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from ...cache import CacheGeometry
from ..methods import Method
from .cachegen import CacheGen, Profile
from .evicted import EvictedKvtc
from .eviction import H2O, Tova
from .fp8 import Fp8
from .gear import Gear
from .int4 import Int4
from .kivi import Kivi
from .nvfp4 import Nvfp4
from .plain import PlainZstd
from .turboquant import TurboQuant
from .xkv import Xkv

__all__ = [
    "H2O",
    "CacheGen",
    "EvictedKvtc",
    "Fp8",
    "Gear",
    "Int4",
    "Kivi",
    "Nvfp4",
    "PlainZstd",
    "Profile",
    "Tova",
    "TurboQuant",
    "Xkv",
    "baselines",
]


def baselines(
    geometry: CacheGeometry, window_tokens: int = 128, profile_caches: Iterable[Any] = ()
) -> dict[str, Method]:
    """The baselines that tables and charts show, by name: the published settings, and others from
    fine to coarse.

    Published, or used in the kvtc paper, are KIVI 2-bit, GEAR 2-bit, H2O 1/8, TOVA 1/8, xKV
    rank/8 (keys; values 3/16), CacheGen bins*1, and TurboQuant 4-bit to 2-bit. GEAR's rank of 4
    is for heads of 128 features; for heads of 32 features rank 1 is the same share.

    Parameters:
        geometry: of the model.
        window_tokens: last tokens kept exactly by all methods that quantize or approximate;
            default 128. FP8, NVFP4, INT4 and zstd keep no window; H2O and TOVA choose the
            tokens that they keep.
        profile_caches: transformers caches of other texts, on which CacheGen is profiled.
            Without them (default) CacheGen is left out; zstd is left out where the package
            zstandard is not installed. CacheGen, H2O and TOVA are left out where keys and
            values have two widths: a latent's key is no key that attention scores.

    Returns:
        Methods by name.

    Example:
        >>> from kvtc.evaluate.baselines import baselines
        >>> method = baselines(calibration.geometry)["INT4"]
        >>> coded = method.encode(model, cache, token_ids)
        >>> method.decode(coded, token_ids).get_seq_length(), round(method.measure(coded).body_ratio, 1)
        (600, 3.2)
    """
    is_one_width = geometry.key_dim == geometry.value_dim
    found: dict[str, Method] = {"FP8": Fp8(), "NVFP4": Nvfp4(), "INT4": Int4()}
    for bits in (4, 2):
        found[f"KIVI {bits}-bit"] = Kivi(window_tokens=window_tokens, bits=bits)
    for rank, name in ((4, "GEAR"), (1, "GEAR (rank 1)")):
        for bits in (4, 2):
            found[f"{name} {bits}-bit"] = Gear(window_tokens=window_tokens, bits=bits, rank=rank)
    for divisor in (2, 4, 8, 16) if is_one_width else ():
        found[f"H2O 1/{divisor}"] = H2O(share=1 / divisor)
    for divisor in (2, 4, 8, 16) if is_one_width else ():
        found[f"TOVA 1/{divisor}"] = Tova(share=1 / divisor)
    for divisor in (4, 8, 16):
        found[f"xKV rank/{divisor}"] = Xkv(
            window_tokens=window_tokens, geometry=geometry, key_share=1 / divisor, value_share=1.5 / divisor
        )
    caches = list(profile_caches)
    if caches and is_one_width:
        for factor in (0.5, 1, 2, 4):
            profile = Profile.of(caches, bin_factor=factor)
            found[f"CacheGen bins*{factor:g}"] = CacheGen(window_tokens=window_tokens, profile=profile)
    for sketched, name in ((False, "TurboQuant"), (True, "TurboQuant (sketched keys)")):
        for bits in (4, 3, 2):
            found[f"{name} {bits}-bit"] = TurboQuant(window_tokens=window_tokens, bits=bits, sketched_keys=sketched)
    if find_spec("zstandard"):
        found["zstd"] = PlainZstd()
        found["zstd (byte planes)"] = PlainZstd(byte_planes=True)
    return found
