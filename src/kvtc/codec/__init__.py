"""One cache to one stream and back: the order of the stages (`codec`), and what they need of caches and streams."""

from .codec import Codec

__all__ = ["Codec"]
