"""What narrower numbers in the transforms cost in quality: float32, bfloat16 and, inverse alone,
fp8 (e4m3) operands.

    python -m benchmarks.quality.precision --text FILE... [--ratios 8 16 32 64]

Sums are float32. fp8 is emulated: a scale for each token's coefficients and for each feature's row
of the basis, rounded to e4m3.
"""

import argparse
from dataclasses import asdict

import torch
from torch import Tensor

import kvtc
from benchmarks.shared.text_quality import add_text_arguments, measure, print_qualities
from kvtc.coding.product import Columns, PackedRows
from kvtc.evaluate.provenance import save_result
from kvtc.profiles.joint.model import JointModel
from kvtc.profiles.joint.transform import by_layer
from kvtc.reference import MODEL_DIRECTORY

E4M3_MAX = 448.0


def in_fp8(rows: Tensor) -> Tensor:
    """Rows rounded to e4m3 under a scale each."""
    scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / E4M3_MAX
    return (rows / scale).to(torch.float8_e4m3fn).float() * scale


def in_fp8_operands(model: JointModel) -> None:
    """Let a transform restore rows by products of fp8."""
    transform = model.transform()
    joint = model._joint
    synthesis = in_fp8(joint.metric.unweigh(joint.basis.matrix(torch.device("cpu")).T).T).T
    transform._synthesis = [Columns(columns) for columns in by_layer(synthesis, len(transform._synthesis))]
    transform.packed = lambda coefficients, chosen=None: PackedRows(in_fp8(coefficients), chosen=chosen)


def codecs(calibration: kvtc.Calibration, profile: str, ratio: float, window: int) -> dict[str, kvtc.Codec]:
    """One for each precision."""
    made = {
        f"{profile} {ratio:g}x {precision}": kvtc.Codec(
            calibration, profile, ratio=ratio, window_tokens=window, precision=precision, model=MODEL_DIRECTORY
        )
        for precision in ("float32", "bfloat16")
    }
    narrow = kvtc.Codec(calibration, profile, ratio=ratio, window_tokens=window, model=MODEL_DIRECTORY)
    in_fp8_operands(narrow._encoder._model)
    return made | {f"{profile} {ratio:g}x fp8": narrow}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--ratios", type=float, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--profiles", nargs="+", default=["joint"])
    parser.add_argument("--window", type=int, default=0)
    options = parser.parse_args()
    model, tokenizer = kvtc.reference_model(dtype="bfloat16")
    calibration = kvtc.reference_calibration()
    methods: dict[str, kvtc.Codec] = {}
    for profile in options.profiles:
        for ratio in options.ratios:
            methods |= codecs(calibration, profile, ratio, options.window)
    qualities = measure(model, tokenizer, methods, options)
    print_qualities(qualities)
    save_result("precision", {"window": options.window, "qualities": [asdict(quality) for quality in qualities]})


if __name__ == "__main__":
    main()
