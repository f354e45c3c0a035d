"""The kernels that encode integers: rounding by cost, one thread a token, and rANS, one warp a chunk.

Symbols lie as the coder reads them: 8 coefficients of a token are the bytes of one number, tokens beside one another. So a thread
of either kernel moves 8 symbols at a time, and a warp's accesses are side by side.
"""

import triton
import triton.language as tl

from .decode_kernels import ESCAPE, LOWER_BOUND, N_CLASSES, N_SYMBOLS, SLOT, THREADS, WORD_BITS, count_bits

GROUP = tl.constexpr(8)
# Numbers of the format.
N_ACTIVITIES = tl.constexpr(4)
MAX_SYMBOL = tl.constexpr(31)
ROUNDING = tl.constexpr(0.4)
MAX_MAGNITUDE = tl.constexpr(float(1 << 30))
TOTAL = tl.constexpr(4096)
HEADROOM_BITS = tl.constexpr(20)
RECIPROCAL_BITS = tl.constexpr(44)
FIELDS = tl.constexpr(4)
COPIED_WORDS = tl.constexpr(4096)


@triton.jit
def quantized(scaled):
    """Coefficients over the step -> their integers when rounded by error alone, and the symbols of these."""
    magnitude = tl.floor(tl.abs(scaled) + ROUNDING)
    magnitude = tl.where(magnitude < MAX_MAGNITUDE, magnitude, MAX_MAGNITUDE)
    value = tl.where(scaled < 0, -magnitude, magnitude).to(tl.int32)
    return value, tl.where(magnitude <= MAX_SYMBOL, value + MAX_SYMBOL, ESCAPE)


@triton.jit
def cheapest_activity(of_token, column_stride, columns, n_columns, step, classes, costs):
    """The activity class in which each token's integers cost least when they are rounded by error alone, the first of equals.

    columns: of each token, 0 where there is none.
    """
    totals = tl.zeros([THREADS, N_ACTIVITIES], tl.float32)
    # What a column needs is loaded in the column before it.
    coefficient = tl.load(of_token, mask=columns > 0, other=0.0)
    for column in range(n_columns):
        of_token += column_stride
        following = tl.load(of_token, mask=column + 1 < columns, other=0.0)
        _, symbol = quantized(tl.div_rn(coefficient, step))
        entry = (tl.load(classes + column).to(tl.int32) * N_SYMBOLS + symbol) * N_ACTIVITIES
        totals += tl.abs(tl.load(costs + (entry[:, None] + tl.arange(0, N_ACTIVITIES)[None, :])))
        coefficient = following
    return tl.argmin(totals, 1, tie_break_left=True)


@triton.jit
def priced(error, bits, BIT_PRICE: tl.constexpr):
    """Squared error and bits as one price."""
    return error * error + BIT_PRICE * bits


@triton.jit
def cheapest_integer(scaled, costs, offsets, activity, column_class, BIT_PRICE: tl.constexpr):
    """-> value, symbol, bits: of zero and the two integers next to each coefficient over the step, the cheapest.

    What is beyond the symbols is rounded by error alone; its cost takes the place of that of one.
    """
    value, symbol = quantized(scaled)
    is_large = ~(tl.abs(scaled) < MAX_SYMBOL)
    magnitude = tl.where(is_large, 0.0, tl.abs(scaled))
    below = magnitude.to(tl.int32)
    sign = tl.where(scaled < 0, -1, 1)
    one = tl.maximum(below, 1)
    other = below + 1
    of_class = costs + (column_class * N_SYMBOLS * N_ACTIVITIES + activity)
    zero_cost = tl.load(of_class + MAX_SYMBOL * N_ACTIVITIES)
    one_cost = tl.load(of_class + tl.where(is_large, symbol, MAX_SYMBOL + sign * one) * N_ACTIVITIES)
    other_cost = tl.load(of_class + (MAX_SYMBOL + sign * other) * N_ACTIVITIES)
    of_class = offsets + (column_class * N_ACTIVITIES + activity) * 2
    shift_of_one, shift_of_more = tl.load(of_class), tl.load(of_class + 1)

    least = priced(magnitude, tl.abs(zero_cost), BIT_PRICE)
    shift = tl.where(one == 1, shift_of_one, shift_of_more)
    price = priced(magnitude - (one.to(tl.float32) - shift), tl.abs(one_cost), BIT_PRICE)
    takes_one = price < least
    least = tl.where(takes_one, price, least)
    price = priced(magnitude - (other.to(tl.float32) - shift_of_more), tl.abs(other_cost), BIT_PRICE)
    takes_other = (price < least) & (below > 0)

    best = sign * tl.where(takes_other, other, tl.where(takes_one, one, 0))
    cost = tl.where(takes_other, other_cost, tl.where(takes_one | is_large, one_cost, zero_cost))
    symbol = tl.where(is_large, symbol, best + MAX_SYMBOL)
    # A negative cost: the symbol has no room in its table.
    return tl.where(is_large, value, best), tl.where(cost < 0, ESCAPE, symbol), tl.abs(cost)


# What changes from call to call and makes no better code. Kernels would be compiled for each kind of it, at a first call.
@triton.jit(do_not_specialize=["column_stride", "n_tokens", "n_columns"])
def round_tokens(
    coefficients, column_stride, n_tokens, n_columns, step, classes, costs, offsets, values, symbols, activities, bits,
    BIT_PRICE: tl.constexpr,
):  # fmt: skip
    """Rounding by cost of THREADS tokens (`coding.rounding`).

    coefficients: float32 [n_columns, n_tokens], the tokens of a column side by side. classes: uint8 [n_columns]. costs: float32
    [classes, symbols, activities], negative where the symbol escapes. offsets: float32 [classes, activities, 2]. values: int32
    [n_columns, n_tokens], of escapes alone. symbols: int64 [groups, n_tokens], 0 past the last column. activities: uint8
    [n_tokens]. bits: float32 [n_tokens].
    """
    token = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    inside = token < n_tokens
    first = coefficients + token
    columns = tl.where(inside, n_columns, 0)
    activity = cheapest_activity(first, column_stride, columns, n_columns, step, classes, costs)
    tl.store(activities + token, activity.to(tl.uint8), mask=inside)

    total = tl.zeros([THREADS], tl.float32)
    of_token, of_values, of_symbols = first, values + token, symbols + token
    coefficient = tl.load(of_token, mask=inside, other=0.0)
    for group in range((n_columns + GROUP - 1) // GROUP):
        packed = tl.zeros([THREADS], tl.int64)
        for place in tl.static_range(GROUP):
            column = group * GROUP + place
            of_token += column_stride
            following = tl.load(of_token, mask=column + 1 < columns, other=0.0)
            column_class = tl.load(classes + column, mask=column < n_columns, other=0).to(tl.int32)
            value, symbol, cost = cheapest_integer(
                tl.div_rn(coefficient, step), costs, offsets, activity, column_class, BIT_PRICE
            )
            in_use = column < columns
            total += tl.where(in_use, cost, 0.0)
            symbol = tl.where(in_use, symbol, 0)
            tl.store(of_values, value, mask=symbol == ESCAPE)
            packed |= symbol.to(tl.int64) << (8 * place)
            of_values += n_tokens
            coefficient = following
        tl.store(of_symbols, packed, mask=inside)
        of_symbols += n_tokens
    tl.store(bits + token, total, mask=inside)


@triton.jit
def byte_of(packed, PLACE: tl.constexpr):
    """One byte of an int64 as int32."""
    return (packed >> (8 * PLACE)).to(tl.int32) & 0xFF


@triton.jit(do_not_specialize=["n_all_tokens", "n_columns"])
def encode_chunks(
    symbols, n_all_tokens, classes, n_columns, activities, entries, reciprocals, fields, words, report,
):  # fmt: skip
    """rANS data of one chunk a program, at the end of its part of `words` (`coding.rans_kernels.encode_lanes`).

    symbols: int64 [groups, n_all_tokens]. classes: int64 [groups], a byte a column, 0 past the last. activities: uint8
    [n_all_tokens]. entries: int32, reciprocals: int64 [activities, classes, symbols] of `RansTables`. fields: int64 [chunks,
    FIELDS]: first token, tokens (at least 1), lanes, end of its part of words, which has room for a word a symbol and two a lane.
    words: uint16. report: int32 [chunks, 2], words written, and 1 if a symbol's frequency is 0.
    """
    chunk = tl.program_id(0)
    field = fields + chunk * FIELDS
    first_token = tl.load(field)
    n_tokens, n_lanes = tl.load(field + 1).to(tl.int32), tl.load(field + 2).to(tl.int32)
    end = words + tl.load(field + 3)
    lane = tl.arange(0, THREADS)
    n_groups, n_blocks = (n_columns + GROUP - 1) // GROUP, (n_tokens + n_lanes - 1) // n_lanes
    state = tl.full([THREADS], LOWER_BOUND, tl.uint32)
    seen = tl.zeros([THREADS], tl.int32)
    n_words = 0
    for blocks_after in range(n_blocks):
        token = (n_blocks - 1 - blocks_after) * n_lanes + lane
        in_chunk = (lane < n_lanes) & (token < n_tokens)
        activity = tl.load(activities + first_token + token, mask=in_chunk, other=0).to(tl.int32)
        columns = tl.where(in_chunk, n_columns, 0)
        of_token = activity * (N_CLASSES * N_SYMBOLS)
        of_group = symbols + tl.cast(n_groups - 1, tl.int64) * n_all_tokens + first_token + token
        packed = tl.load(of_group, mask=in_chunk, other=0)
        packed_classes = tl.load(classes + n_groups - 1)
        # What a column needs is loaded in the column before it, and what 8 need in the 8 before.
        index = of_token + byte_of(packed_classes, 7) * N_SYMBOLS + byte_of(packed, 7)
        entry, reciprocal = tl.load(entries + index), tl.load(reciprocals + index)
        for groups_after in range(n_groups):
            group = n_groups - 1 - groups_after
            of_group -= n_all_tokens
            next_packed = tl.load(of_group, mask=(groups_after + 1) * GROUP < columns, other=0)
            next_classes = tl.load(classes + group - 1, mask=group > 0, other=0)
            for place in tl.static_range(GROUP - 1, -1, -1):
                if place > 0:
                    index = of_token + byte_of(packed_classes, place - 1) * N_SYMBOLS + byte_of(packed, place - 1)
                else:
                    index = of_token + byte_of(next_classes, 7) * N_SYMBOLS + byte_of(next_packed, 7)
                next_entry, next_reciprocal = tl.load(entries + index), tl.load(reciprocals + index)

                active = group * GROUP + place < columns
                seen |= tl.where(active, entry, 0)
                frequency, first_slot = (entry & SLOT).to(tl.uint32), ((entry >> WORD_BITS) & SLOT).to(tl.uint32)
                is_full = active & ((state >> HEADROOM_BITS) >= frequency)
                full = tl.sum(is_full.to(tl.uint32) << lane.to(tl.uint32), 0)
                # The last lane's word is the last one: words are read in the order of the lanes.
                later = count_bits((full >> lane.to(tl.uint32)) >> 1).to(tl.int32)
                tl.store(end - (n_words + 1 + later), (state & 0xFFFF).to(tl.uint16), mask=is_full)
                n_words += count_bits(full).to(tl.int32)
                state_before = tl.where(is_full, state >> WORD_BITS, state)
                # Exactly state // frequency, for each state below frequency * 2**20.
                quotient = ((state_before.to(tl.uint64) + 1) * reciprocal.to(tl.uint64)) >> RECIPROCAL_BITS
                state_after = state_before + quotient.to(tl.uint32) * (TOTAL - frequency) + first_slot
                state = tl.where(active, state_after, state)
                entry, reciprocal = next_entry, next_reciprocal
            packed, packed_classes = next_packed, next_classes

    in_use = lane < n_lanes
    of_lane = end - n_words - 2 * (n_lanes - lane)
    tl.store(of_lane, (state & 0xFFFF).to(tl.uint16), mask=in_use)
    tl.store(of_lane + 1, (state >> WORD_BITS).to(tl.uint16), mask=in_use)
    tl.store(report + 2 * chunk, n_words)
    tl.store(report + 2 * chunk + 1, tl.max((seen < 0).to(tl.int32), 0))


@triton.jit
def collect_words(words, fields, output):
    """Parts of `words`, uint16, one after another. fields: int64 [parts, 3]: begin of a part, its words, where they go."""
    field = fields + tl.program_id(0) * 3
    at = tl.program_id(1) * COPIED_WORDS + tl.arange(0, COPIED_WORDS)
    inside = at < tl.load(field + 1)
    word = tl.load(words + tl.load(field) + at, mask=inside, other=0)
    tl.store(output + tl.load(field + 2) + at, word, mask=inside)
