"""Calibration: what the codec knows of a model. It is fitted once to rows of the model's caches."""

from .artifact import Calibration, SideCalibration, load_calibration

__all__ = ["Calibration", "SideCalibration", "load_calibration"]
