"""A mixed nn.MultiheadAttention's forward pass in training, beside the class's own, which mixes the weights first."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mixout_fast import apply_mixout, testing

BATCH, LENGTH, WIDTH, HEADS = 3, 7, 36, 4
LATER = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PADDING = torch.arange(LENGTH) >= torch.tensor([[7], [4], [6]])
SCORES, HEADS_SCORES, PADDING_SCORES = (
    torch.linspace(-2, 2, LENGTH * LENGTH * BATCH * HEADS).sin()[:count].view(shape)
    for count, shape in (
        (LENGTH**2, (LENGTH, LENGTH)),
        (LENGTH**2 * BATCH * HEADS, (-1, LENGTH, LENGTH)),
        (BATCH * LENGTH, (BATCH, LENGTH)),
    )
)
MASKS = {
    "none": {},
    "bool": {"attn_mask": LATER},
    "float": {"attn_mask": SCORES},
    "of heads": {"attn_mask": HEADS_SCORES},
    "causal": {"attn_mask": LATER, "is_causal": True},
    "padding": {"key_padding_mask": PADDING},
    "padding, bool": {"key_padding_mask": PADDING, "attn_mask": LATER},
    "padding, causal": {"key_padding_mask": PADDING, "attn_mask": LATER, "is_causal": True},
    "padding, of heads, float": {"key_padding_mask": PADDING_SCORES, "attn_mask": HEADS_SCORES},
}


def mixed(device, backend=None, mask="input", filter_fn=None, **options):
    attention = nn.MultiheadAttention(WIDTH, HEADS, device=device, **options)
    nn.init.normal_(attention.in_proj_bias)
    target = {name: torch.randn_like(value) / 6 for name, value in attention.state_dict().items()}
    apply_mixout(attention, 0.5, target=target, mask=mask, backend=backend, filter_fn=filter_fn)
    attention.mixing_in_proj_weight.seed = torch.tensor(3, device=device)
    if filter_fn is None:
        attention.out_proj.mixing_weight.seed = torch.tensor(4, device=device)
    return attention


def batch(device):
    return torch.randn(BATCH, LENGTH, WIDTH, device=device)


def results(attention, x, masks=None, own=True, dtype=torch.float32):
    """y and the gradients of x and the parameters, from the module's forward pass or its class's. bf16 by autocast."""
    attention.to(torch.float32 if dtype == torch.bfloat16 else dtype)
    x = (x if attention.batch_first else x.transpose(0, 1)).detach().to(attention.in_proj_bias.dtype).requires_grad_()
    masks = {
        name: mask if mask is True else mask.to(x.device, x.dtype if mask.is_floating_point() else None)
        for name, mask in (masks or {}).items()
    }
    forward = attention if own else lambda *args, **options: attention.plain_class.forward(attention, *args, **options)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        output, weights = forward(x, x, x, need_weights=False, **masks)
    assert weights is None
    grad = torch.linspace(-1, 1, output.numel(), device=x.device).view_as(output).to(output.dtype)
    return output, *torch.autograd.grad(output, [x, *attention.parameters()], grad)


def check_against_the_class(attention, masks, dtype):
    x = batch(attention.in_proj_bias.device)
    runs = []
    for own, precision in ((True, dtype), (False, dtype), (False, torch.float64)):
        torch.manual_seed(0)
        runs.append(results(attention, x, masks, own, precision))
    for got, plain, exact in zip(*runs, strict=True):
        assert got.shape == plain.shape and got.dtype == plain.dtype
        assert (got - exact).norm() <= testing.ERROR_RATIO * (plain - exact).norm()


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_results_are_as_exact_as_the_classs(masks, batch_first, dtype, device, backend):
    check_against_the_class(mixed(device, backend, batch_first=batch_first), MASKS[masks], dtype)


@pytest.mark.parametrize("mask", ("input", "element"))
@pytest.mark.parametrize("mixes_last", (True, False))
def test_attentions_dropout_and_an_unmixed_out_proj(mask, mixes_last, device, backend):
    chosen = None if mixes_last else lambda module, name: name == ""
    check_against_the_class(mixed(device, backend, mask, chosen, dropout=0.5), {}, torch.float32)


def test_x_is_not_saved_but_its_kept_columns():
    """So mix_linear computes the product, not F.linear with a weight that was mixed first."""
    attention, x = apply_mixout(nn.MultiheadAttention(400, HEADS), 0.9), torch.randn(LENGTH, BATCH, 400)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, id):
        attention(x, x, x, need_weights=False)
    assert x.data_ptr() not in {tensor.data_ptr() for tensor in saved}
    assert (LENGTH * BATCH, 400) not in {tensor.shape for tensor in saved}  # out_proj's input


OTHER = {
    "weights": ({}, (0, 0, 0), {}),
    "weights of heads": ({}, (0, 0, 0), {"average_attn_weights": False}),
    "another key and value": ({}, (0, 1, 1), {"need_weights": False}),
    "another value": ({}, (0, 0, 1), {"need_weights": False}),
    "added biases": ({"add_bias_kv": True}, (0, 0, 0), {"need_weights": False}),
    "added zeros": ({"add_zero_attn": True}, (0, 0, 0), {"need_weights": False}),
    "no batch": ({}, (2, 2, 2), {"need_weights": False}),
}


@pytest.mark.parametrize("case", OTHER)
def test_what_it_does_not_do_the_class_does(case, device):
    options, chosen, arguments = OTHER[case]
    attention = mixed(device, **options)
    inputs = [batch(device), batch(device), batch(device)[0]]
    inputs = [inputs[i] for i in chosen]
    ours, plain = attention(*inputs, **arguments), attention.plain_class.forward(attention, *inputs, **arguments)
    assert torch.equal(ours[0], plain[0]) and not torch.equal(ours[0], attention.eval()(*inputs, **arguments)[0])
    assert (ours[1] is None) == (plain[1] is None) == ("need_weights" in arguments)


UNFIT = {
    "causal without a mask": {"is_causal": True},
    "a mask for each of a batch": {"attn_mask": LATER.expand(BATCH, -1, -1)},
    "a row": {"attn_mask": LATER[:1]},
    "four dimensions": {"attn_mask": LATER.expand(BATCH, HEADS, -1, -1)},
    "padding of one": {"key_padding_mask": PADDING[:1]},
    "padding of one place": {"key_padding_mask": PADDING[:, :1]},
    "integers": {"attn_mask": LATER.int()},
    "integer padding": {"key_padding_mask": PADDING.int()},
}


@pytest.mark.parametrize("masks", UNFIT)
def test_errors_are_the_classs(masks, device):
    """Also where a mask would broadcast, as with as many heads as batch entries."""
    attention = mixed(device, batch_first=True)
    attention.num_heads, attention.head_dim = BATCH, WIDTH // BATCH
    x, masks = batch(device), {k: v if v is True else v.to(device) for k, v in UNFIT[masks].items()}
    errors = []
    for forward in (attention.forward, attention.plain_class.forward.__get__(attention)):
        with pytest.raises((RuntimeError, AssertionError)) as caught:
            forward(x, x, x, need_weights=False, **masks)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def test_masks_of_different_kinds_are_added_up_with_the_classs_warning(device):
    attention, x = mixed(device, batch_first=True), batch(device)
    masks = {"key_padding_mask": PADDING.to(device), "attn_mask": SCORES.to(device)}
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        ours = attention(x, x, x, need_weights=False, **masks)[0]
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        plain = attention.plain_class.forward(attention, x, x, x, need_weights=False, **masks)[0]
    assert torch.equal(ours, plain)


def test_a_forward_of_others_is_left_alone(monkeypatch):
    monkeypatch.setattr(nn.MultiheadAttention, "forward", lambda self, x: F.linear(x, self.in_proj_weight))
    attention = apply_mixout(nn.MultiheadAttention(WIDTH, HEADS), 0.5)
    assert attention(torch.randn(3, WIDTH)).shape == (3, 3 * WIDTH)


def test_a_subclass_keeps_a_forward_of_its_own():
    class Projection(nn.MultiheadAttention):
        def forward(self, x):
            return F.linear(x, self.in_proj_weight)

    attention = apply_mixout(Projection(WIDTH, HEADS), 0.5)
    assert attention(torch.randn(3, WIDTH)).shape == (3, 3 * WIDTH)


def test_separate_projections_are_mixed(device):
    attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=5, vdim=6, device=device)
    apply_mixout(attention, 0.5, target={name: value + 1 for name, value in attention.state_dict().items()})
    inputs = [torch.randn(LENGTH, BATCH, width, device=device) for width in (WIDTH, 5, 6)]
    training = attention(*inputs, need_weights=False)[0]
    assert not torch.equal(training, attention.eval()(*inputs, need_weights=False)[0])
