"""The choices that the CUDA and the Triton backend share."""

from mixout_fast import reference

MANY_OUTPUTS = 2048
"""With this many outputs or more, the table for many outputs applies: one pass's grid for y then fills the device."""


def takes_full_product(p: float, out_features: int, in_features: int) -> bool:
    """Whether an input mask's dW from a saved x is one full product, m ⊙ (dYᵀ X) · s, and not the compact one.

    It is with few outputs (reference.THIN_OUTPUT), and where the capacity is more than 3/4 of in_features: the compact
    product saves less than a quarter of the operations then, and x is gathered first. Not measured: no GPU. Estimated
    for an H100 at 600 TFLOP/s in 16 bits and 2.5 TB/s: with 3/4 kept, a quarter of the product takes as long as the
    gather at 1700 outputs, whatever the rows and in_features. In fp32 without tensor cores the compact product would
    still win.
    """
    kept = reference.capacity(in_features, p)
    return out_features < reference.THIN_OUTPUT or 4 * kept > 3 * in_features
