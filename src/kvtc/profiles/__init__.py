"""Profiles: which part stands in each place of the pipeline. Nothing outside the codec asks which one is in use.

place           paper                                   joint                       conditional
prediction      none                                    none                        from token ids
transform       keys and values apart                   together                    together, of what prediction leaves
metric          squared error                           sensitivity of attention    the same
quantizer       groups chosen by a dynamic program      one step                    one step
entropy coder   DEFLATE, or another lossless coder      rANS, calibrated tables     the same
"""

from .interface import Allowance, BodyCoder, BodyRows, Plan
from .joint.coder import JointCoder
from .paper.coder import PaperCoder

__all__ = ["Allowance", "BodyCoder", "BodyRows", "JointCoder", "PaperCoder", "Plan"]
