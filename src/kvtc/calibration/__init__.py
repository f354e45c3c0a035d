"""Calibration: once per model, from a stream of caches to a basis and a table of measured distortion per kind."""

from .artifact import Calibration, KindCalibration, load_calibration

__all__ = ["Calibration", "KindCalibration", "load_calibration"]
