"""The kernel that writes rows of one layer where they go: keys turned, both saturated to the cache's dtype."""

import triton
import triton.language as tl


@triton.jit
def turned(x, partner, cos, sin, is_first):
    """Features of pairs after rotation; partner: the other of each pair."""
    along, across = x * cos, partner * sin
    return tl.where(is_first, along - across, along + across)


@triton.jit
def saturated(x, LIMIT: tl.constexpr):
    """float32 with what lies past the limit at the limit; NaN stays."""
    return tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))


@triton.jit
def to_bfloat16(x):
    """float32 -> uint16 of bfloat16, to nearest, ties to even. In integers, for the interpreter's conversion cuts bits off."""
    bits = x.to(tl.uint32, bitcast=True)
    code = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, code).to(tl.uint16)


@triton.jit
def to_fp8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """float32 within the range -> uint8 of a float with so many bits of mantissa, to nearest, ties to even.

    In integers, for not every GPU converts to every fp8.
    """
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    # Rounded by an addition of floats, whose last place is a subnormal's.
    magic: tl.constexpr = (127 - BIAS + 23 - MANTISSA + 1) << 23
    shifted = bits.to(tl.float32, bitcast=True) + tl.full(x.shape, magic, tl.uint32).to(tl.float32, bitcast=True)
    subnormal = shifted.to(tl.uint32, bitcast=True) - magic
    rest: tl.constexpr = 23 - MANTISSA
    bias: tl.constexpr = (127 - BIAS) << 23
    normal = (bits - bias + ((1 << (rest - 1)) - 1) + ((bits >> rest) & 1)) >> rest
    code = tl.where(bits < ((128 - BIAS) << 23), subnormal, normal)
    return (sign | tl.where(bits > 0x7F800000, 0x7F, code)).to(tl.uint8)


@triton.jit
def place_side(
    rows, token_stride, head_stride, cos, sin, turn_stride, n_pairs, data, n_places, token_offsets, to_head, to_feature, n_tokens,
    n_features, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head; see `place_rows`."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.arange(0, FEATURES)
    head = tl.program_id(1).to(tl.int64)
    inside = (token < n_tokens)[:, None] & (feature < n_features)[None, :]
    of_token = rows + head * head_stride + token.to(tl.int64)[:, None] * token_stride
    x = tl.load(of_token + feature[None, :], mask=inside, other=0).to(tl.float32)
    if TURNED:
        if INTERLEAVED:
            is_first = feature % 2 == 0
            pair, other = feature // 2, feature ^ 1
        else:
            is_first = feature < n_pairs
            pair = tl.where(is_first, feature, feature - n_pairs)
            other = tl.where(is_first, feature + n_pairs, feature - n_pairs)
        in_pair = inside & (feature < 2 * n_pairs)[None, :]
        partner = tl.load(of_token + other[None, :], mask=in_pair, other=0).to(tl.float32)
        angle = token.to(tl.int64)[:, None] * turn_stride + pair[None, :]
        cosine, sine = tl.load(cos + angle, mask=in_pair, other=0), tl.load(sin + angle, mask=in_pair, other=0)
        x = tl.where(in_pair, turned(x, partner, cosine, sine, is_first[None, :]), x)
    x = saturated(x, LIMIT)
    offset = tl.load(token_offsets + token, mask=token < n_tokens, other=-1) + head * to_head
    place = offset[:, None] + feature.to(tl.int64)[None, :] * to_feature
    # As unsigned numbers negative ones are too large.
    in_data = inside & (place.to(tl.uint64) < tl.cast(n_places, tl.uint64))
    if MANTISSA == 0:
        tl.store(data + place, x.to(data.dtype.element_ty), mask=in_data)
    elif BIAS == 127:
        tl.store(data + place, to_bfloat16(x), mask=in_data)
    else:
        tl.store(data + place, to_fp8(x, MANTISSA, BIAS), mask=in_data)


# What changes from call to call and makes no better code. Kernels would be compiled for each kind of it, at a first call.
_PLAIN = ["n_tokens", "key_offsets", "value_offsets", "n_key_places", "n_value_places", "key_to_head", "value_to_head"]


@triton.jit(do_not_specialize=_PLAIN)
def place_rows(
    keys, key_token_stride, key_head_stride, cos, sin, turn_stride, n_pairs,
    values, value_token_stride, value_head_stride,
    key_data, n_key_places, key_offsets, key_to_head, key_to_feature,
    value_data, n_value_places, value_offsets, value_to_head, value_to_feature,
    n_tokens, key_features, value_features,
    TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Rows of a layer to its targets. Programs: [tokens / TOKENS, heads, 2], keys and then values.

    keys, values: features of a head side by side, heads and tokens of any strides. cos, sin: float32, pairs side by side. *_data:
    [n_places] of the cache's dtype, uint16 for bfloat16 and uint8 for fp8; *_offsets: int64, of each token; places outside of the
    data are not written. LIMIT: largest value of the dtype. MANTISSA, BIAS: of those stored as integers; 0 otherwise.
    """
    if tl.program_id(2) == 0:
        place_side(
            keys, key_token_stride, key_head_stride, cos, sin, turn_stride, n_pairs, key_data, n_key_places, key_offsets,
            key_to_head, key_to_feature, n_tokens, key_features, TURNED, INTERLEAVED, LIMIT, MANTISSA, BIAS, TOKENS, FEATURES,
        )  # fmt: skip
    else:
        place_side(
            values, value_token_stride, value_head_stride, cos, sin, turn_stride, n_pairs, value_data, n_value_places,
            value_offsets, value_to_head, value_to_feature, n_tokens, value_features, False, False, LIMIT, MANTISSA, BIAS, TOKENS,
            FEATURES,
        )  # fmt: skip
