"""Mixout for finetuning pretrained networks, faster than dropout."""

from mixout_fast.apply import apply_mixout, mixout_report, remove_mixout, target_state_dict
from mixout_fast.decay import wdecay
from mixout_fast.functional import mix_linear, mixout
from mixout_fast.linear import MixLinear
from mixout_fast.schedule import MixoutScheduler

__version__ = "0.1.0"
__all__ = [
    "MixLinear",
    "MixoutScheduler",
    "apply_mixout",
    "mix_linear",
    "mixout",
    "remove_mixout",
    "mixout_report",
    "target_state_dict",
    "wdecay",
    "__version__",
]
