"""The compiled coder against the format as plain Python says it, its size against the entropy, and what damage does to it."""

from __future__ import annotations

import struct
import subprocess
import sys
from dataclasses import dataclass

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtc.coding import rans
from kvtc.coding.rans import RansTables, cost_bits, count_lanes, decode_symbols, encode_symbols, normalize_frequencies
from kvtc.errors import CorruptCalibration, CorruptStream, InvalidArgument

TOKENS = st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257]) | st.integers(0, 100)
FEW_SYMBOLS_A_LANE = 4


@pytest.fixture(autouse=True, scope="module")
def _lanes_for_few_symbols():
    """Several lanes for so few symbols that plain Python codes them in no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rans, "SYMBOLS_A_LANE", FEW_SYMBOLS_A_LANE)
        yield


def lanes_of(n_columns: int, n_tokens: int, symbols_a_lane: int | None = None) -> int:
    """The rule of the format, as it says it."""
    n_lanes, each = 1, symbols_a_lane or rans.SYMBOLS_A_LANE
    while n_lanes < 32 and 2 * n_lanes <= n_tokens and 2 * n_lanes * each <= n_columns * n_tokens:
        n_lanes *= 2
    return n_lanes if n_columns and n_tokens else 0


@dataclass(frozen=True)
class Case:
    """Symbols, their classes and the tables, as the coder takes them."""

    symbols: np.ndarray
    column_class: np.ndarray
    token_class: np.ndarray
    tables: RansTables

    def encode(self) -> bytes:
        return encode_symbols(self.symbols, self.column_class, self.token_class, self.tables)

    def decode(self, data: bytes) -> np.ndarray:
        return decode_symbols(data, self.column_class, self.token_class, self.tables)

    def order(self):
        """(column, token, lane, frequencies) of every symbol in the order of decoding."""
        n_columns, n_tokens = self.symbols.shape
        n_lanes = lanes_of(n_columns, n_tokens)
        for block in range(0, n_tokens, n_lanes or 1):
            for column in range(n_columns):
                for token in range(block, min(block + n_lanes, n_tokens)):
                    table = int(self.token_class[token]) * self.tables.n_classes + int(self.column_class[column])
                    yield column, token, token - block, self.tables.frequencies[table].tolist()

    def bits(self) -> float:
        """Cross entropy of the symbols under their tables."""
        table = self.token_class.astype(int) * self.tables.n_classes + self.column_class.astype(int)[:, None]
        return float(-np.log2(self.tables.frequencies[table, self.symbols] / 4096).sum())


def plain_encode(case: Case) -> bytes:
    """The format, symbol by symbol from the last to the first."""
    states, words = [2**16] * lanes_of(*case.symbols.shape), []
    for column, token, lane, frequencies in reversed(list(case.order())):
        symbol = int(case.symbols[column, token])
        frequency, first = frequencies[symbol], sum(frequencies[:symbol])
        if states[lane] >= frequency * 2**20:
            words.append(states[lane] % 2**16)
            states[lane] //= 2**16
        states[lane] = states[lane] // frequency * 4096 + first + states[lane] % frequency
    return struct.pack(f"<{len(states)}I{len(words)}H", *states, *reversed(words))


def plain_decode(data: bytes, case: Case) -> np.ndarray | None:
    """The format, symbol by symbol from the first to the last; None for what no encoder writes."""
    n_lanes = lanes_of(*case.symbols.shape)
    if len(data) < 4 * n_lanes or len(data) % 2:
        return None
    states = list(struct.unpack_from(f"<{n_lanes}I", data))
    words = list(struct.unpack_from(f"<{(len(data) - 4 * n_lanes) // 2}H", data, 4 * n_lanes))[::-1]
    symbols = np.zeros_like(case.symbols)
    if any(state < 2**16 for state in states):
        return None
    for column, token, lane, frequencies in case.order():
        symbol, slot = 0, states[lane] % 4096
        while slot >= frequencies[symbol]:
            slot -= frequencies[symbol]
            symbol += 1
        symbols[column, token] = symbol
        states[lane] = frequencies[symbol] * (states[lane] // 4096) + slot
        if states[lane] < 2**16:
            if not words:
                return None
            states[lane] = states[lane] * 2**16 + words.pop()
    return None if words or any(state != 2**16 for state in states) else symbols


def random_frequencies(random: np.random.Generator, n_tables: int, n_symbols: int) -> np.ndarray:
    """Tables from even ones to ones that give a single symbol all but what the others must have."""
    counts = random.exponential(size=(n_tables, n_symbols)) ** random.choice([0, 1, 4, 40], size=(n_tables, 1))
    return normalize_frequencies(counts)


def make_case(
    seed: int, n_columns: int, n_tokens: int, n_symbols: int = 17, n_classes: int = 3, n_kinds: int = 2, typical=True
) -> Case:
    """typical: symbols as likely as their tables say; else all alike, so that rare ones are as many as others."""
    random = np.random.default_rng(seed)
    tables = RansTables(random_frequencies(random, n_classes * n_kinds, n_symbols), n_classes)
    column_class = random.integers(0, n_classes, n_columns).astype(np.uint16)
    token_class = random.integers(0, n_kinds, n_tokens).astype(np.uint8)
    if typical:
        slots = random.integers(0, 4096, (n_columns, n_tokens))
        tops = tables.frequencies.cumsum(axis=1)[token_class.astype(int) * n_classes + column_class[:, None]]
        symbols = (slots[:, :, None] >= tops).sum(axis=2)
    else:
        symbols = random.integers(0, n_symbols, (n_columns, n_tokens))
    return Case(symbols.astype(np.uint8), column_class, token_class, tables)


cases = st.builds(
    make_case,
    seed=st.integers(0, 2**32 - 1),
    n_columns=st.integers(0, 5),
    n_tokens=TOKENS,
    n_symbols=st.sampled_from([2, 3, 17, 256]),
    n_classes=st.integers(1, 4),
    n_kinds=st.integers(1, 4),
    typical=st.booleans(),
)


@given(case=cases)
def test_bytes_are_what_the_format_says_and_decode(case):
    data = case.encode()
    assert data == plain_encode(case)
    symbols = case.decode(data)
    assert (symbols.dtype, symbols.shape) == (np.uint8, case.symbols.shape)
    assert np.array_equal(symbols, case.symbols)
    assert np.array_equal(plain_decode(data, case), case.symbols)


@pytest.mark.parametrize("n_symbols", [2, 3, 256])
@pytest.mark.parametrize("likely", [0, -1])
@pytest.mark.parametrize("symbol", [0, 1, -1])
@pytest.mark.parametrize("n_tokens", [1, 32, 33, 257])
def test_one_symbol_has_almost_everything(n_symbols, likely, symbol, n_tokens):
    """Frequencies 4095 and 1 are the ends of the arithmetic, with symbols that are always or never the likely one."""
    frequencies = np.ones((1, n_symbols), np.uint16)
    frequencies[0, likely] = 4097 - n_symbols
    symbols = np.full((40, n_tokens), symbol % n_symbols, np.uint8)
    case = Case(symbols, np.zeros(40, np.uint8), np.zeros(n_tokens, np.uint8), RansTables(frequencies, 1))
    data = case.encode()
    assert data == plain_encode(case)
    assert np.array_equal(case.decode(data), symbols)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_no_symbols_take_no_bytes(shape):
    case = make_case(0, *shape)
    assert case.encode() == b""
    assert case.decode(b"").shape == shape
    with pytest.raises(CorruptStream, match="2 bytes"):
        case.decode(b"\0\0")


def test_layout_and_type_of_the_input_change_nothing():
    case = make_case(1, 6, 70)
    data = case.encode()
    read_only = case.symbols.copy()
    read_only.flags.writeable = False
    for symbols in (np.asfortranarray(case.symbols), read_only, case.symbols.repeat(2, axis=1)[:, ::2]):
        assert encode_symbols(symbols, case.column_class.astype(np.uint8), case.token_class, case.tables) == data
    for buffer in (bytearray(data), memoryview(b"x" + data)[1:]):
        assert np.array_equal(case.decode(buffer), case.symbols)


@pytest.mark.parametrize("seed", range(3))
def test_size_is_the_entropy_and_a_fixed_cost(seed):
    case = make_case(seed, 500, 1024, n_classes=9)
    bits, entropy = 8 * len(case.encode()), case.bits()
    assert bits < 1.005 * entropy
    # Each lane wastes the 16 bits it starts with, and up to 16 more of the state it ends with.
    assert 32 * 16 - 1 < bits - entropy < 32 * 32 + 1e-4 * entropy


@pytest.mark.parametrize(
    ("n_columns", "n_tokens", "n_lanes"),
    [
        (0, 256, 0),
        (256, 0, 0),
        (1, 1, 1),
        (10_239, 2, 1),
        (10_240, 2, 2),
        (10**6, 1, 1),
        (10**6, 3, 2),
        (600, 256, 8),
        (640, 256, 16),
        (1000, 256, 16),
        (1279, 256, 16),
        (1280, 256, 32),
        (1000, 8192, 32),
        (65_535, 32_768, 32),
    ],
)
def test_a_lane_has_enough_symbols_to_pay_for_it(n_columns, n_tokens, n_lanes, monkeypatch):
    monkeypatch.setattr(rans, "SYMBOLS_A_LANE", 10_240)
    assert count_lanes(n_columns, n_tokens) == lanes_of(n_columns, n_tokens, 10_240) == n_lanes


@pytest.mark.parametrize("shape", [(30, 682), (30, 683), (330, 128), (9, 4600)])
def test_bytes_are_what_the_format_says_with_its_own_number_of_lanes(shape, monkeypatch):
    monkeypatch.setattr(rans, "SYMBOLS_A_LANE", 10_240)
    case = make_case(7, *shape)
    data = case.encode()
    assert data == plain_encode(case)
    assert np.array_equal(case.decode(data), case.symbols)


def test_a_chunk_of_256_tokens_costs_at_most_a_five_hundredth_more_than_its_entropy(monkeypatch):
    """1000 coefficients, wide to narrow, at 1.4 bits; 16 lanes at 16 to 32 bits."""
    monkeypatch.setattr(rans, "SYMBOLS_A_LANE", 10_240)
    distance = np.abs(np.arange(17) - 8)
    tables = RansTables(normalize_frequencies(np.exp(-distance / np.geomspace(4, 0.05, 27)[:, None])), 27)
    random = np.random.default_rng(0)
    column_class = np.sort(random.integers(0, 27, 1000)).astype(np.uint8)
    symbols = tables.slots[column_class[:, None], random.integers(0, 4096, (1000, 256))]
    case = Case(symbols, column_class, np.zeros(256, np.uint8), tables)
    bits, entropy = 8 * len(case.encode()), case.bits()
    assert 1.2 < entropy / symbols.size < 1.5
    assert 16 * 16 < bits - entropy < 0.002 * entropy


@pytest.mark.parametrize("n_symbols", [2, 17, 64])
def test_size_is_that_of_another_coder(n_symbols):
    """`constriction` with one lane, words of 32 bits and probabilities of 24: what its rounding and ours add is next to nothing."""
    case = make_case(5, 100, 300, n_symbols=n_symbols, n_classes=5)
    table = case.token_class.astype(int) * case.tables.n_classes + case.column_class.astype(int)[:, None]
    probabilities = (case.tables.frequencies[table.reshape(-1)] / 4096).astype(np.float32)
    symbols = case.symbols.reshape(-1).astype(np.int32)
    model = constriction.stream.model.Categorical(perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols, model, probabilities)
    theirs, ours = coder.get_compressed(), case.encode()
    assert np.array_equal(constriction.stream.stack.AnsCoder(theirs).decode(model, probabilities), symbols)
    assert np.array_equal(case.decode(ours), case.symbols)
    # A lane costs 16 to 32 bits, and the other coder up to 64.
    n_lanes = lanes_of(*case.symbols.shape)
    assert 2 * n_lanes - 8 - 2e-4 * len(ours) < len(ours) - 4 * len(theirs) < 4 * n_lanes + 2e-4 * len(ours)


@given(case=cases)
def test_costs_are_the_cross_entropy_of_each_token_class(case):
    costs = cost_bits(case.symbols, case.column_class, case.tables)
    assert (costs.dtype, costs.shape) == (np.float32, (case.tables.n_token_classes, len(case.token_class)))
    for kind in range(case.tables.n_token_classes):
        table = kind * case.tables.n_classes + case.column_class.astype(int)[:, None]
        expected = -np.log2(case.tables.frequencies[table, case.symbols] / 4096).sum(axis=0)
        np.testing.assert_allclose(costs[kind], expected, rtol=1e-5, atol=1e-6)


def test_damaged_bytes_are_noticed_or_decode_to_other_symbols():
    for case in (make_case(2, 3, 40), make_case(3, 2, 5, typical=False), make_case(4, 1, 1)):
        data = case.encode()
        for place in range(len(data)):
            for flip in (1, 0x80, 0xFF):
                check_like_plain(case, data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])


def test_bytes_that_are_missing_or_too_many_are_noticed():
    case = make_case(2, 3, 40)
    data = case.encode()
    for n_bytes in range(len(data)):
        with pytest.raises(CorruptStream):
            case.decode(data[:n_bytes])
    for more in (b"\0", b"\0\0", b"\xff" * 2000):
        with pytest.raises(CorruptStream):
            case.decode(data + more)


@settings(max_examples=300)
@given(case=cases, seed=st.integers(0, 2**32 - 1), n_words=st.integers(0, 99), even=st.booleans())
def test_any_bytes_are_handled(case, seed, n_words, even):
    n_lanes = lanes_of(*case.symbols.shape)
    check_like_plain(case, np.random.default_rng(seed).bytes(4 * n_lanes + 2 * n_words + (not even)))


def check_like_plain(case: Case, data: bytes) -> None:
    """Decoding ends as the format says: in these symbols, or in `CorruptStream` and nothing else."""
    expected = plain_decode(data, case)
    if expected is None:
        with pytest.raises(CorruptStream):
            case.decode(data)
    else:
        assert np.array_equal(case.decode(data), expected)


@pytest.mark.parametrize("seed", range(6))
def test_loops_stay_inside_of_their_arrays(seed, monkeypatch):
    """The compiled loops look at no bounds; as plain Python numpy does, and they do the same with sound bytes and with noise."""
    from kvtc.coding import rans_kernels

    case = make_case(seed, 3, [1, 7, 33, 40, 130, 257][seed], n_symbols=[2, 17][seed % 2], typical=seed < 3)
    data, random = case.encode(), np.random.default_rng(seed)
    n_states = 4 * lanes_of(*case.symbols.shape)
    noise = [random.bytes(n_states + 2 * n_words) for n_words in (0, 1, 5, 100)]
    damaged = [data, data[:-2], data[:n_states], data + b"\0\0", data[:n_states] + bytes(2 * case.symbols.size), *noise]
    expected = [outcome(case, tried) for tried in damaged]
    assert np.array_equal(expected[0], case.symbols)
    for name in ("encode_lanes", "decode_lanes", "_copy_tokens", "_copy_row"):
        monkeypatch.setattr(rans_kernels, name, getattr(rans_kernels, name).py_func)
    assert case.encode() == data
    for tried, before in zip(damaged, expected, strict=True):
        found = outcome(case, tried)
        assert found == before if isinstance(found, str) else np.array_equal(found, before)


def outcome(case: Case, data: bytes) -> np.ndarray | str:
    """The symbols, or why there are none."""
    try:
        return case.decode(data)
    except CorruptStream as error:
        return str(error)


def test_damage_is_named():
    case = make_case(2, 4, 40)
    data = case.encode()
    low_state = struct.pack("<I", 65535) + data[4:]
    for damaged, message in [
        (data[:100], "100 bytes .* from 128 to 448"),
        (data + b"\0", f"{len(data) + 1} bytes .* even"),
        (low_state, "starts at 65535; expected at least 65536"),
        (data[:-2], "decoding read more"),
        (data + b"\0\0", f"decoding read only {(len(data) - 128) // 2}"),
    ]:
        with pytest.raises(CorruptStream, match=message):
            case.decode(damaged)
    other_start = struct.unpack_from("<I", data)[0] ^ 1 << 13
    single = make_case(4, 1, 1)
    with pytest.raises(CorruptStream, match="lane 0 ends at state"):
        single.decode(struct.pack("<I", other_start | 1 << 30))


@given(seed=st.integers(0, 2**32 - 1), n_symbols=st.sampled_from([2, 3, 17, 256]), power=st.sampled_from([0, 1, 5, 60]))
def test_normalized_rows_are_the_best_ones(seed, n_symbols, power):
    """A move of one slot never pays; costs are convex, so no other row is better."""
    random = np.random.default_rng(seed)
    counts = random.exponential(size=(3, n_symbols)) ** power * random.choice([0, 1], p=[0.2, 0.8], size=(3, n_symbols))
    rows = normalize_frequencies(counts)
    assert rows.dtype == np.uint16
    assert RansTables(rows, 1).n_token_classes == 3
    for count, row in zip(counts, rows.astype(np.float64), strict=True):
        gain = (count * np.log2((row + 1) / row)).max()
        loss = min((c * np.log2(f / (f - 1)) for c, f in zip(count, row, strict=True) if f > 1), default=np.inf)
        assert gain <= loss * (1 + 1e-5)


@pytest.mark.parametrize("count", [0, 1, 7, 100, 4096, 10**9])
def test_two_symbols_get_the_best_of_all_rows(count):
    row = normalize_frequencies(np.array([[count, 1000]]))[0]
    first = np.arange(1, 4096)
    costs = -count * np.log2(first / 4096) - 1000 * np.log2(1 - first / 4096)
    assert row.tolist() == [first[costs.argmin()], 4096 - first[costs.argmin()]]


@pytest.mark.parametrize(
    ("counts", "row"),
    [
        ([0, 0, 0, 0], [1024, 1024, 1024, 1024]),
        ([1, 1, 1], [1366, 1365, 1365]),
        ([5, 0, 0], [4094, 1, 1]),
        ([1e308, 1e308, 1e-300], [2047, 2048, 1]),
        ([3, 2, 1], [2048, 1365, 683]),
    ],
)
def test_normalized_rows_are_the_same_everywhere(counts, row):
    assert normalize_frequencies(np.array([counts, counts], np.float64)).tolist() == [row, row]


@pytest.mark.parametrize(
    "counts", [np.ones(4), np.ones((2, 1)), np.ones((1, 257)), [[-1.0, 2]], [[np.nan, 1]], [[np.inf, 1]]]
)
def test_counts_that_are_none_are_refused(counts):
    with pytest.raises(InvalidArgument):
        normalize_frequencies(np.asarray(counts))


@pytest.mark.parametrize(
    ("frequencies", "n_classes", "message"),
    [
        (np.full((2, 2), 2048, np.int32), 1, "uint16"),
        (np.full(2, 2048, np.uint16), 1, "uint16"),
        (np.full((1, 1), 4096, np.uint16), 1, "2 to 256 symbols"),
        (np.full((3, 2), 2048, np.uint16), 2, "multiple"),
        (np.full((3, 2), 2048, np.uint16), 0, "multiple"),
        (np.zeros((0, 2), np.uint16), 1, "multiple"),
        (np.array([[2048, 2048], [2048, 2047]], np.uint16), 1, "table 1 .* sum to 4095"),
        (np.array([[4096, 0]], np.uint16), 1, "expected 1 to 4095"),
    ],
)
def test_tables_are_checked(frequencies, n_classes, message):
    with pytest.raises(InvalidArgument, match=message):
        RansTables(frequencies, n_classes)
    with pytest.raises(CorruptCalibration, match=message):
        RansTables(frequencies, n_classes, CorruptCalibration)


def test_tables_with_gaps():
    """Symbols that never come need no slots if the caller says so; those that come nevertheless are refused."""
    frequencies = np.array([[0, 4095, 1, 0], [1, 0, 0, 4095]], np.uint16)
    with pytest.raises(InvalidArgument, match="expected 1 to 4095"):
        RansTables(frequencies, 2)
    tables = RansTables(frequencies, 2, with_gaps=True)
    columns, tokens = np.arange(2, dtype=np.uint8), np.zeros(70, np.uint8)
    symbols = np.array([[1], [3]], np.uint8).repeat(70, axis=1)
    symbols[:, 44] = [2, 0]
    case = Case(symbols, columns, tokens, tables)
    assert case.encode() == plain_encode(case)
    assert np.array_equal(case.decode(case.encode()), symbols)
    assert np.isinf(cost_bits(symbols, columns[::-1].copy(), tables)).any()
    for token in (0, 31, 69):
        wrong = symbols.copy()
        wrong[0, token] = 3
        with pytest.raises(InvalidArgument, match="frequency 0"):
            encode_symbols(wrong, columns, tokens, tables)
    with pytest.raises(InvalidArgument, match="expected 0 to 4095"):
        RansTables(np.array([[0, 4096]], np.uint16), 1, with_gaps=True)


def test_tables_keep_their_own_copy():
    frequencies = np.full((2, 2), 2048, np.uint16)
    tables = RansTables(frequencies, 1)
    frequencies[:] = 0
    assert tables.frequencies.tolist() == [[2048, 2048]] * 2
    with pytest.raises(ValueError, match="read-only"):
        tables.frequencies[0, 0] = 1


def test_arguments_are_checked():
    case = make_case(2, 3, 40)
    symbols, columns, tokens, tables = case.symbols, case.column_class, case.token_class, case.tables
    data = case.encode()
    for call in (
        lambda: encode_symbols(symbols.astype(np.int64), columns, tokens, tables),
        lambda: encode_symbols(symbols[0], columns, tokens, tables),
        lambda: encode_symbols(symbols + 17, columns, tokens, tables),
        lambda: encode_symbols(symbols, columns[:2], tokens, tables),
        lambda: encode_symbols(symbols, columns, tokens[:2], tables),
        lambda: encode_symbols(symbols, columns + 3, tokens, tables),
        lambda: encode_symbols(symbols, columns, tokens + 2, tables),
        lambda: encode_symbols(symbols, columns.astype(np.int32), tokens, tables),
        lambda: encode_symbols(symbols, columns, tokens.astype(np.int32), tables),
        lambda: decode_symbols(data, columns + 3, tokens, tables),
        lambda: decode_symbols(data, columns, tokens[None], tables),
        lambda: cost_bits(symbols[:2], columns, tables),
        lambda: cost_bits(symbols + 17, columns, tables),
    ):
        with pytest.raises(InvalidArgument):
            call()
    with pytest.raises(CorruptStream, match=r"token class [23] of 2"):
        decode_symbols(data, columns, tokens + 2, tables)


def test_the_compiler_is_not_imported_with_the_module():
    code = "import sys, kvtc.coding.rans; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "False", done.stderr
