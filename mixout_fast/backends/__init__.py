"""The backends and the choice among them.

A backend is a module with `unavailable(device_type)` and the functions of `mixout_fast.reference` that the autograd
functions call: mix, mask_grad, linear and gradients, with the same arguments. A backend with one-pass products also has
`one_pass_rows(dtype, out_features)`, the most rows for which y and dX are computed so. A backend in C++ also has
checked_mix_linear, the layer's eager call as a whole. How a backend divides the work between its kernels and the
library's matrix products is its own affair.
"""

import os
from types import ModuleType

from mixout_fast import reference
from mixout_fast.backends import cpu, cuda, triton

BACKENDS = {"cpu": cpu, "cuda": cuda, "triton": triton, "reference": reference}
"""Name -> module, in the order in which an automatic choice tries them."""


DEFAULT = os.environ.get("MIXOUT_FAST_BACKEND") or None
"""The backend of calls that name none; None chooses by device. Read once: a look-up costs a microsecond."""


def describe(device_type: str) -> dict[str, str | None]:
    """Backend name -> why it cannot serve the device; None: it can."""
    return {name: module.unavailable(device_type) for name, module in BACKENDS.items()}


def select(name: str | None, device_type: str) -> ModuleType:
    """The named backend, or DEFAULT, or the first that serves the device.

    Raises ValueError for a name that is unknown or cannot serve the device, listing those that can.
    """
    chosen = name or DEFAULT
    if chosen is None:
        for module in BACKENDS.values():
            if module.unavailable(device_type) is None:
                return module
    reasons = describe(device_type)
    if reasons.get(chosen, "unknown") is not None:
        source = "backend" if name else "MIXOUT_FAST_BACKEND"
        serving = ", ".join(backend for backend, reason in reasons.items() if reason is None)
        why = reasons.get(chosen, f"there is none of this name, only {', '.join(BACKENDS)}")
        raise ValueError(f"{source} {chosen!r} cannot serve device {device_type!r}: {why}; these can: {serving}")
    return BACKENDS[chosen]
