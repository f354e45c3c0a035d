"""The kernel that reads a cache as joint rows: keys turned back, values beside them."""

import triton
import triton.language as tl

FIELDS = tl.constexpr(3)


@triton.jit
def from_fp8(code, MANTISSA: tl.constexpr):
    """uint8 of a float with 3 bits of mantissa (e4m3) or 2 (e5m2) -> float32. In integers, for not every GPU knows every fp8."""
    if MANTISSA == 2:
        return (code.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    bits = code.to(tl.uint32)
    sign, rest = (bits & 0x80) << 24, bits & 0x7F
    normal = (rest << 20) + (120 << 23)
    # Subnormals are multiples of 2**-9.
    subnormal = (rest.to(tl.float32) * 0.001953125).to(tl.uint32, bitcast=True)
    magnitude = tl.where(rest == 0x7F, 0x7FC00000, tl.where(rest < 8, subnormal, normal))
    return (sign | magnitude).to(tl.float32, bitcast=True)


@triton.jit
def load_numbers(data, place, inside, MANTISSA: tl.constexpr):
    """As float32, 0 where there is nothing."""
    x = tl.load(data + place, mask=inside, other=0)
    if MANTISSA == 0:
        return x.to(tl.float32)
    return from_fp8(x, MANTISSA)


@triton.jit
def gather_side(
    data, token_stride, layer_stride, head_stride, feature_stride, cos, sin, fields, rows, row_stride, n_tokens, n_heads,
    n_features, TURNED: tl.constexpr, MANTISSA: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head; see `gather_rows`."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.arange(0, FEATURES)
    layer, head = tl.program_id(1) // n_heads, tl.program_id(1) % n_heads
    inside = (token < n_tokens)[:, None] & (feature < n_features)[None, :]
    offset = (
        token.to(tl.int64) * token_stride
        + tl.cast(layer, tl.int64) * layer_stride
        + tl.cast(head, tl.int64) * head_stride
    )[:, None]
    place = offset + feature.to(tl.int64)[None, :] * feature_stride
    x = load_numbers(data, place, inside, MANTISSA)
    if TURNED:
        field = fields + layer * FIELDS
        table, n_pairs, is_interleaved = tl.load(field), tl.load(field + 1).to(tl.int32), tl.load(field + 2)
        if n_pairs > 0:
            is_first = tl.where(is_interleaved != 0, feature % 2 == 0, feature < n_pairs)
            other = tl.where(is_first, feature + n_pairs, feature - n_pairs)
            other = tl.where(is_interleaved != 0, feature ^ 1, other)
            pair = tl.where(is_interleaved != 0, feature // 2, tl.minimum(feature, other))
            in_pair = inside & (feature < 2 * n_pairs)[None, :]
            place = offset + other.to(tl.int64)[None, :] * feature_stride
            partner = load_numbers(data, place, in_pair, MANTISSA)
            angle = table + token.to(tl.int64)[:, None] * n_pairs + pair[None, :]
            along = x * tl.load(cos + angle, mask=in_pair, other=0.0)
            across = partner * tl.load(sin + angle, mask=in_pair, other=0.0)
            x = tl.where(in_pair, tl.where(is_first[None, :], along - across, along + across), x)
    to = rows + token.to(tl.int64)[:, None] * row_stride + tl.program_id(1).to(tl.int64) * n_features + feature[None, :]
    tl.store(to, x, mask=inside)


# It changes from call to call and makes no better code: the kernel would be compiled for each kind of it, at a first call.
@triton.jit(do_not_specialize=["n_tokens"])
def gather_rows(
    key_data, key_token_stride, key_layer_stride, key_head_stride, key_feature_stride,
    value_data, value_token_stride, value_layer_stride, value_head_stride, value_feature_stride,
    cos, sin, fields, rows, row_stride, value_column, n_tokens, n_heads, key_features, value_features,
    MANTISSA: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Programs: [tokens / TOKENS, layers * heads, 2], keys and then values.

    *_data: of any strides, uint8 for fp8. cos, sin: float32, of one rotation [tokens, pairs] after another. fields: int64 [layers,
    FIELDS], where the layer's rotation begins in them, its pairs (0: none), whether they are interleaved. rows: float32, by layer,
    head and feature, keys from column 0, values from value_column on. MANTISSA: of fp8; 0 otherwise.
    """
    if tl.program_id(2) == 0:
        gather_side(
            key_data, key_token_stride, key_layer_stride, key_head_stride, key_feature_stride, cos, sin, fields, rows,
            row_stride, n_tokens, n_heads, key_features, True, MANTISSA, TOKENS, FEATURES,
        )  # fmt: skip
    else:
        gather_side(
            value_data, value_token_stride, value_layer_stride, value_head_stride, value_feature_stride, cos, sin,
            fields, rows + value_column, row_stride, n_tokens, n_heads, value_features, False, MANTISSA, TOKENS, FEATURES,
        )  # fmt: skip
