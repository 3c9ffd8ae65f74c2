"""The random words, against the published vectors of Philox4x32-10 and a Philox in plain Python integers."""

import pytest
import torch

from mixout_fast import backends, reference, testing
from mixout_fast.functional import MASKS

# Known-answer vectors of Random123 (Salmon et al., SC 2011): counter, key, words.
KNOWN_ANSWERS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)
SEEDS = (0, 1, -1, 2**32, 2**63 - 1, -(2**63), 0x299F31D0A4093822)


def philox(counter, key):
    for _ in range(10):
        high0, low0 = divmod(counter[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, 2**32)
        counter = (high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0)
        key = ((key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32)
    return counter


def words(seed, count):
    key = (seed % 2**32, (seed >> 32) % 2**32)
    return [philox((i // 4, 0, 0, 0), key)[i % 4] for i in range(count)]


def unhex(line):
    return tuple(int(word, 16) for word in line.split())


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    counter, key, answer = unhex(counter), unhex(key), unhex(answer)
    assert philox(counter, key) == answer
    assert reference.philox4x32(counter, key) == answer
    tensors = reference.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(tensor.item() for tensor in tensors) == answer


@pytest.mark.parametrize("count", (1, 3, 4, 17))
@pytest.mark.parametrize("seed", SEEDS)
def test_words_of_the_reference(seed, count, device):
    assert reference.mask_words(torch.tensor(seed, device=device), count).tolist() == words(seed, count)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
@pytest.mark.parametrize("seed", SEEDS)
def test_an_entry_is_kept_iff_its_word_reaches_the_threshold(seed, p, mask, device, backend):
    rows, columns = 5, 17
    count = columns if mask == "input" else rows * columns
    kept = [word >= round(p * 2**32) for word in words(seed, count)]
    want = torch.tensor(kept, device=device).view(-1, columns).expand(rows, columns)
    got = testing.mask_of((rows, columns), torch.tensor(seed, device=device), p, mask, backend)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("mask", MASKS)
def test_the_threshold_is_inclusive_and_exact(mask, device, backend):
    testing.check_threshold(mask, device, backend)


@pytest.mark.parametrize("seed", SEEDS)
def test_indices_of_kept_entries(seed, device, backend):
    p, count = 0.7, 255
    kept = [i for i, word in enumerate(words(seed, count)) if word >= round(p * 2**32)]
    x, weight = torch.randn(3, count, device=device), torch.randn(2, count, device=device)
    draw = torch.tensor(seed, device=device), p, "input"
    for static in (False, True):
        _, index, columns = backends.BACKENDS[backend].linear(x, weight, None, None, *draw, True, static)
        # A backend that cannot wait for the device always returns the static size.
        is_static = static or len(index) == reference.capacity(count, p)
        padding = [-1] * (reference.capacity(count, p) - len(kept)) if is_static else []
        assert index.tolist() == kept + padding
        assert torch.equal(columns[:, : len(kept)], x[:, kept])
        assert not columns[:, len(kept) :].any()


# min(K, ceil((1-p) K + 8 sqrt(K p (1-p))) rounded up to 16), by hand
CAPACITIES = (
    (768, 0.9, 144),  # 76.8 + 8 * 8.314 = 143.3
    (768, 0.1, 768),  # 691.2 + 8 * 8.314 = 757.7
    (1024, 0.7, 432),  # 307.2 + 8 * 14.664 = 424.5
    (1023, 0.5, 640),  # 511.5 + 8 * 15.992 = 639.4
    (17, 0.9, 16),  # 1.7 + 8 * 1.237 = 11.6
    (3, 0.9, 3),
    (255, 0.0, 255),
    (255, 1.0, 0),
)


@pytest.mark.parametrize(("count", "p", "capacity"), CAPACITIES)
def test_capacity(count, p, capacity, device, backend):
    assert reference.capacity(count, p) == capacity
    x, weight = torch.ones(1, count, device=device), torch.ones(1, count, device=device)
    draw = torch.tensor(3, device=device), p, "input"
    _, index, _ = backends.BACKENDS[backend].linear(x, weight, None, None, *draw, True, True)
    assert index.shape == (capacity,)


def test_kept_entries_past_the_capacity_count_as_dropped(device, backend):
    """The capacity binds for one seed in 350 million: this is the first, found by trying all."""
    module = backends.BACKENDS[backend]
    seed, p, count = 37628019, 0.9865, 200
    words_kept = [i for i, word in enumerate(words(seed, count)) if word >= round(p * 2**32)]
    assert len(words_kept) == 17
    assert reference.capacity(count, p) == 16
    kept = words_kept[:16]
    seed = torch.tensor(seed, device=device)
    mixed = module.mix(torch.ones(3, count, device=device), None, seed, p, "input", torch.float32)
    assert mixed.nonzero().tolist() == [[row, column] for row in range(3) for column in kept]
    for static in (False, True):
        _, index, _ = module.linear(*torch.ones(2, 3, count, device=device), None, None, seed, p, "input", True, static)
        assert index.tolist() == kept
    element = module.mix(torch.ones(1, count, device=device), None, seed, p, "element", torch.float32)
    assert element.count_nonzero() == 17, "the element mask has no capacity"
