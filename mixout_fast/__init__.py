"""Mixout for finetuning pretrained networks, faster than dropout."""

from mixout_fast.functional import mix_linear, mixout
from mixout_fast.linear import MixLinear

__version__ = "0.1.0"
__all__ = ["MixLinear", "mix_linear", "mixout", "__version__"]
