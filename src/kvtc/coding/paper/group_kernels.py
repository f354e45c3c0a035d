"""The loop that turns bytes into coefficients (`groups`), compiled by numba; imported where it is first needed."""

from __future__ import annotations

from ..compilation import compiled


@compiled(nogil=True)
def read_run(data, offset, bits, size, count, levels, values, halves, found, start):  # type: ignore[no-untyped-def]
    """A run of an allocation, `count` groups from column `start` of found float32 [T, n] on: `group_quantizer.dequantize`.

    data: uint8 of a chunk, in which the run begins at offset. levels: float32, of the largest symbol. values: float32 [256], of
    symbols of 2, 4 or 8 bits. halves: float32 [2**16], of the bits of a float16.
    """
    n_scales = count * len(found)
    for group in range(count):
        for token in range(len(found)):
            index = group * len(found) + token
            coefficients = found[token, start + group * size : start + (group + 1) * size]
            if bits == 16:
                at = offset + 2 * size * index
                for place in range(size):
                    coefficients[place] = halves[data[at + 2 * place] | data[at + 2 * place + 1] << 8]
                continue
            at = offset + index
            shift = halves[data[at] | data[at + n_scales] << 8]
            scale = halves[data[at + 2 * n_scales] | data[at + 3 * n_scales] << 8] / levels
            first, mask = offset + 4 * n_scales, (1 << bits) - 1
            for place in range(size):
                bit = (size * index + place) * bits
                coefficients[place] = shift + values[data[first + (bit >> 3)] >> (bit & 7) & mask] * scale
