"""Whether a backend does what the reference does, for `benchmarks.gpu`: nothing is timed before it
does.
"""

from typing import Any

import torch

from benchmarks.gpu.cases import caches, calibration_for, drawn
from benchmarks.gpu.coding import Case, Setting, relative_error
from kvtc.backends import CodedIntegers, ReferenceBackend, make_backend
from kvtc.coding.joint.uniform_quantizer import column_classes
from kvtc.coding.paper.allocation import allocate_bits


def gate(setting: Setting) -> dict[str, Any]:
    """Whether the backend does what the reference does on this device; `passed` is False where
    anything differs.
    """
    small = Setting(setting.device, setting.backend, setting.clock, is_small=True)
    checks = {"entropy coding": _same_integers(small), "groups": _same_groups(small)}
    for profile in ("paper", "joint"):
        checks[f"decoded, {profile}"] = _same_cache(Case("nemo", profile, 6000), small)
    backend = make_backend(setting.device, setting.backend)
    return {"backend": backend.name, "checks": checks, "passed": all(check["passed"] for check in checks.values())}


def _same_integers(setting: Setting) -> dict[str, Any]:
    """One set of coefficients, coded by both: equal bytes, and each reads the other's."""
    calibration = calibration_for(setting.shape("nemo"), "joint", 40, setting.device)
    model = calibration.joint.coefficients
    n, step = setting.gate_tokens, float(model.steps[len(model.steps) // 3])
    coefficients = drawn(model.deviations, n, torch.Generator(setting.device).manual_seed(3))
    classes = column_classes(model.deviations, step)
    spans = [slice(0, n // 4), slice(n // 4, n)]
    coded, values = [], []
    backends = ReferenceBackend(setting.device), make_backend(setting.device, setting.backend)
    for backend in backends:
        rounded = backend.round(coefficients, step, classes, model.tables)
        coded.append(backend.write_integers(rounded, spans, classes, model.tables))
    for backend in backends:
        chunks = [
            CodedIntegers(t.stop - t.start, c.activities, c.symbols, c.escapes, classes, model.tables, step)
            for t, c in zip(spans, coded[0], strict=True)
        ]
        values.append(backend.read_integers(chunks, len(classes)))
    off = float((values[0] - values[1]).abs().max()) / step
    return {"passed": coded[0] == coded[1] and off < 1e-3, "equal_bytes": coded[0] == coded[1], "off_in_steps": off}


def _same_groups(setting: Setting) -> dict[str, Any]:
    kind = calibration_for(setting.shape("nemo"), "paper", 40, setting.device).key
    allocation = allocate_bits(kind.distortion, 160)
    deviations = kind.basis.spectrum.sqrt().numpy()
    n = setting.gate_tokens
    coefficients = drawn(deviations, n, torch.Generator(setting.device).manual_seed(4))
    counts = [n // 4, n - n // 4]
    spans = [slice(0, counts[0]), slice(counts[0], n)]
    backends = ReferenceBackend(setting.device), make_backend(setting.device, setting.backend)
    packed = [backend.pack_groups(coefficients, spans, allocation) for backend in backends]
    values = [backend.unpack_groups(packed[0], counts, allocation) for backend in backends]
    off = float((values[0] - values[1]).abs().max()) / float(values[0].abs().max())
    return {"passed": packed[0] == packed[1] and off < 1e-6, "equal_bytes": packed[0] == packed[1], "off": off}


def _same_cache(case: Case, setting: Setting) -> dict[str, Any]:
    """One stream decoded by both, and encoded by either."""
    calibration = calibration_for(setting.shape(case.shape), case.profile, setting.rank(case.rank), setting.device)
    (sequence,) = caches(calibration, case.profile, (1, setting.gate_tokens), setting.device)
    reference = Setting(setting.device, "reference", setting.clock, is_small=True).codec(calibration, case)
    mine = setting.codec(calibration, case)
    stream = reference.encode(sequence.cache, sequence.token_ids)
    expected = reference.decode(stream, sequence.token_ids)
    off = relative_error(mine.decode(stream, sequence.token_ids), expected)
    own = mine.decode(mine.encode(sequence.cache, sequence.token_ids), sequence.token_ids)
    kept, lost = relative_error(own, sequence.cache), relative_error(expected, sequence.cache)
    # bfloat16 resolves 2 ** -8; products of other shapes round otherwise, an integer here and there differs.
    return {
        "passed": off < 4e-3 and abs(kept - lost) < 0.02 * lost + 1e-4,
        "off": off,
        "error": kept,
        "reference": lost,
    }
