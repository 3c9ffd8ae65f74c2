"""Parameters that many tests have."""

import pytest

from mixout_fast import testing
from mixout_fast.functional import MASKS

masks = pytest.mark.parametrize("mask", MASKS)
precisions = pytest.mark.parametrize(
    ("dtype", "compute"),
    testing.PRECISIONS,
    ids=[str(w)[6:] if w == c else f"{str(w)[6:]}->{str(c)[6:]}" for w, c in testing.PRECISIONS],
)
