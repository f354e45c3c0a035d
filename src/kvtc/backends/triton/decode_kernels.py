"""The kernel that decodes integers: one thread a lane of the coder, all chunks of a call in one launch.

What a step costs is the wait for loads that the next state depends on, and a warp has nothing else to do meanwhile. An entry for
each of the 4096 slots would be one load, but the tables of a model then take megabytes, and slots are hit evenly: nearly every
step would wait some 250 cycles for the L2 cache. Here a table is a search tree of the symbols' first slots, and an entry for each
symbol: 70 KB for a model, which stay in the L1 cache. A node is one load of 16 bytes, and the root's is on its way early.
"""

import triton
import triton.language as tl

THREADS = tl.constexpr(32)
NODE = tl.constexpr(8)
PAIRS = tl.constexpr(4)
TREE = tl.constexpr(36)
# A slot that none reaches, of 13 bits.
NEVER = tl.constexpr(8191)
# Numbers of the format.
SLOT_BITS = tl.constexpr(12)
SLOT = tl.constexpr(4095)
LOWER_BOUND = tl.constexpr(65536)
WORD_BITS = tl.constexpr(16)
N_SYMBOLS = tl.constexpr(64)
ESCAPE = tl.constexpr(63)
N_CLASSES = tl.constexpr(27)
FIELDS = tl.constexpr(9)


@triton.jit
def count_bits(x):
    """Bits set in each uint32; the compiler makes one instruction of it."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def load_node(tree, node):
    """A node of each thread's tree -> uint32 [THREADS, PAIRS], two first slots in each."""
    at = tree + node * PAIRS
    return tl.load(at[:, None] + tl.arange(0, PAIRS)[None, :])


@triton.jit
def find_slot(node, slot):
    """Which of a node's 8 intervals holds `slot`: how many of the first slots behind the first are at most it."""
    # A difference of 13 bits leaves bit 13 set where it is not negative. Four of the upper halves can be, three of the lower
    # ones, for NEVER stands in place of the first slot: times 1 and 2**16, bits 29 .. 31 hold how many are.
    reached = (slot * 0x10001 + 0x20002000)[:, None] - node & 0x20002000
    return ((tl.sum(reached, 1) * 0x10001) >> 29).to(tl.int32)


# The stride is another number at each call: without this, kernels would be compiled for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["column_stride"])
def decode_integers(data, words, fields, steps, trees, entries, chunk_of_thread, output, column_stride, report):
    """Coefficients of all chunks. A program is one warp; its threads are lanes of one chunk or of several.

    data: uint8, all bytes of the chunks; words: the same as uint16. fields: int64 [chunks, FIELDS] in the order in which they are
    read here, places in elements of what they point into. steps: float32 [chunks]. trees: uint32 [tables, 9, PAIRS], a root and 8
    leaves, NEVER in place of the first slot of each. entries: int64 [tables, N_SYMBOLS], the frequency, from bit 16 on the first
    slot, from bit 32 on the float32 that times the step is the coefficient. chunk_of_thread: int32 [programs, THREADS], -1 for
    none, as many of a chunk as it has lanes, the first at a multiple of their number. output: float32, at [column * column_stride
    + token]. report: int32 [programs, THREADS, 4], of each lane the state it starts with, the one it ends with, the words its
    chunk took and its own escapes.
    """
    thread = tl.arange(0, THREADS)
    here = tl.program_id(0) * THREADS + thread
    chunk = tl.load(chunk_of_thread + here)
    in_use = chunk >= 0
    field = fields + chunk.to(tl.int64) * FIELDS
    n_lanes = tl.load(field, mask=in_use, other=1).to(tl.int32)
    n_tokens = tl.load(field + 1, mask=in_use, other=0).to(tl.int32)
    n_columns = tl.load(field + 2, mask=in_use, other=0).to(tl.int32)
    n_words = tl.load(field + 3, mask=in_use, other=0).to(tl.int32)
    chunk_words = words + tl.load(field + 4, mask=in_use, other=0)
    activities = data + tl.load(field + 5, mask=in_use, other=0)
    classes = data + tl.load(field + 6, mask=in_use, other=0)
    tables = tl.load(field + 7, mask=in_use, other=0).to(tl.int32)
    chunk_output = output + tl.load(field + 8, mask=in_use, other=0)
    step = tl.load(steps + chunk, mask=in_use, other=0.0)

    lane = thread & (n_lanes - 1)
    # A bit for this thread, those before it in its chunk, and all of its chunk.
    bit = tl.full([THREADS], 1, tl.uint32) << thread.to(tl.uint32)
    group_start = (thread - lane).to(tl.uint32)
    before = ((1 << lane.to(tl.uint32)) - 1) << group_start
    together = (0xFFFFFFFF >> (32 - n_lanes).to(tl.uint32)) << group_start

    low_word = tl.load(chunk_words + 2 * lane, mask=in_use, other=0).to(tl.uint32)
    high_word = tl.load(chunk_words + 2 * lane + 1, mask=in_use, other=0).to(tl.uint32)
    state = low_word | (high_word << WORD_BITS)
    start = state
    next_words, n_left = chunk_words + 2 * n_lanes, n_words
    n_escapes = tl.zeros_like(thread)

    most_columns = tl.max(n_columns, 0)
    for block in range(tl.max((n_tokens + n_lanes - 1) // n_lanes, 0)):
        token = block * n_lanes + lane
        in_chunk = token < n_tokens
        activity = (tl.load(activities + (token >> 2), mask=in_chunk, other=0) >> (2 * (token & 3)).to(tl.uint8)) & 3
        of_token = tables + activity.to(tl.int32) * N_CLASSES
        # What a column needs is loaded in the column before it: its class, and in time also the root of its tree.
        row = of_token + tl.load(classes, mask=in_chunk, other=0)
        next_class = tl.load(classes + 1, mask=in_chunk & (n_columns > 1), other=0)
        tree, symbols = trees + row * TREE, entries + row * N_SYMBOLS
        root = load_node(tree, 0)
        to = chunk_output + token
        for column in range(most_columns):
            active = in_chunk & (column < n_columns)
            row = of_token + next_class
            next_tree, next_symbols = trees + row * TREE, entries + row * N_SYMBOLS
            next_root = load_node(next_tree, 0)
            next_class = tl.load(classes + column + 2, mask=in_chunk & (column + 2 < n_columns), other=0)

            slot = state & SLOT
            leaf = find_slot(root, slot)
            symbol = leaf * NODE + find_slot(load_node(tree + PAIRS, leaf), slot)
            entry = tl.load(symbols + symbol)
            frequency, first = (entry & 0xFFFF).to(tl.uint32), ((entry >> 16) & 0xFFFF).to(tl.uint32)
            state_after = frequency * (state >> SLOT_BITS) + slot - first
            is_low = active & (state_after < LOWER_BOUND)
            low = tl.sum(tl.where(is_low, bit, 0), 0)
            rank = count_bits(low & before).to(tl.int32)
            word = tl.load(next_words + rank, mask=is_low & (rank < n_left), other=0)
            refilled = (state_after << WORD_BITS) | word.to(tl.uint32)
            state = tl.where(active, tl.where(is_low, refilled, state_after), state)
            n_taken = count_bits(low & together).to(tl.int32)
            next_words += n_taken
            n_left -= n_taken

            n_escapes += (active & (symbol == ESCAPE)).to(tl.int32)
            tl.store(to, (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True) * step, mask=active)
            to += column_stride
            tree, symbols, root = next_tree, next_symbols, next_root

    lane_report = report + 4 * here
    tl.store(lane_report, start.to(tl.int32, bitcast=True))
    tl.store(lane_report + 1, state.to(tl.int32, bitcast=True))
    tl.store(lane_report + 2, n_words - n_left)
    tl.store(lane_report + 3, n_escapes)
