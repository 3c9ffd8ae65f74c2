"""apply_mixout on transformers' architectures: nothing skipped, nothing changed before a step, saved as before."""

import copy
import json
from statistics import median

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

from safetensors.torch import load_file
from stack_models import MODELS, batch, bert, gpt2, vit, xlnet
from transformers.pytorch_utils import Conv1D

from mixout_fast import apply_mixout, mixout_report, remove_mixout, testing
from mixout_fast.apply import mixed_parameters
from mixout_fast.functional import MASKS
from mixout_fast.mixed_weight import MixedWeights

# Raw parameters that multiply no x: a token's vector, positions, segments, attention sinks; and the experts' routers.
NOT_WEIGHTS = {
    "mixtral": {"weight"},
    "gpt_oss": {"weight", "sinks"},
    "xlnet": {"mask_emb", "seg_embed"},
    "vit": {"cls_token", "position_embeddings"},
}

architectures = pytest.mark.parametrize("name", MODELS)


def step(model, inputs, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    model(**inputs).loss.backward()
    optimizer.step()


@architectures
@pytest.mark.parametrize("mask", MASKS)
def test_first_output_is_the_plain_models_and_removal_gives_it_back(name, mask, device, backend, mixes_first):
    model, inputs = MODELS[name]().train().to(device), batch(name, device=device)
    plain = model(**inputs).logits
    apply_mixout(model, 0.9, mask=mask, backend=backend)
    testing.assert_same_bits("logits before any step", model(**inputs).logits, plain, name)
    step(model, inputs)
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    mixed = model.eval()(**inputs).logits
    remove_mixout(model)
    assert type(model) is type(MODELS[name]())
    testing.assert_same_bits("eval after removal", model.eval()(**inputs).logits, mixed, name)
    testing.assert_same_bits("training after removal", model.train()(**inputs).logits, mixed, name)


@architectures
def test_first_output_is_as_accurate_as_the_plain_models(name):
    """With the one-pass kernel, which sums in an order of its own; over all hidden states together."""
    model, inputs = MODELS[name]().train(), batch(name, 8)

    def states(model, inputs):
        return torch.cat([h.flatten() for h in model(**inputs, output_hidden_states=True).hidden_states]).double()

    with torch.no_grad():
        exact_inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        exact_model = copy.deepcopy(model).double()
        if name in ("mixtral", "gpt_oss"):
            exact_model.set_experts_implementation("eager")  # torch's grouped_mm does not support fp64
        exact = states(exact_model, exact_inputs)
        library = (states(model, inputs) - exact).abs().max()
        ours = (states(apply_mixout(model, 0.9), inputs) - exact).abs().max()
    assert ours <= testing.ERROR_RATIO * library


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("precision", (torch.float32, torch.float64, torch.bfloat16))
def test_conv1d_multiplies_by_the_mixed_weight(precision, mask, seed, device, backend):
    """On integers, whose sums are exact; bf16 by autocast."""
    shape = (3, 7), 40, 70
    case = testing.integer_case(*shape, p=0.75, dtype=precision, compute=precision, device=device, seed=seed)
    dtype = torch.float32 if precision == torch.bfloat16 else precision
    layer = Conv1D(70, 40).to(device, dtype)
    layer.load_state_dict({"weight": case.weight.t(), "bias": case.bias})
    apply_mixout(layer, 0.75, target={"weight": case.target.t().to(dtype)}, mask=mask, backend=backend)
    layer.mixing_weight.seed = case.seed
    leaves = case.input.to(dtype).requires_grad_(), *layer._parameters.values()
    results = []
    with torch.autocast(device, torch.bfloat16, enabled=precision == torch.bfloat16):
        read = F.linear(leaves[0], layer.mixing_weight(leaves[1]).t(), leaves[2])
        for output in (layer(leaves[0]), read):
            results.append((output, *torch.autograd.grad(output, leaves, case.grad_output.to(output.dtype))))
    for name, got, want in zip(testing.RESULTS, *results, strict=True):
        testing.assert_same_values(name, got, want, case)
    plain = Conv1D(70, 40).to(device, dtype)
    plain.load_state_dict(layer.state_dict())
    testing.assert_same_bits("eval", layer.eval()(leaves[0]), plain(leaves[0]), case)


def test_conv1d_saves_the_kept_columns_alone():
    """So it calls mix_linear, and does not multiply by a weight that was mixed first."""
    layer = apply_mixout(Conv1D(70, 400), 0.9)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, id):
        layer(torch.randn(21, 400))
    assert not any(tensor.shape == (21, 400) for tensor in saved)


def test_a_new_module_of_a_mixed_conv1ds_class_is_plain():
    again = type(apply_mixout(Conv1D(5, 4), 0.5))(5, 4)
    x = torch.randn(3, 4)
    assert torch.equal(again(x), Conv1D.forward(again, x))


@architectures
def test_no_parameter_is_skipped_silently(name):
    model = apply_mixout(MODELS[name](), 0.9)
    rows = mixout_report(model).rows
    assert [row.name for row in rows] == [key for key, _ in model.named_parameters(remove_duplicate=False)]
    for row in rows:
        last = row.name.rpartition(".")[2]
        if row.reason is None:
            assert row.p == 0.9
        elif row.reason == "bias or normalisation":
            assert model.get_submodule(row.name.rpartition(".")[0])._parameters[last].dim() == 1 or "bias" in last
        else:
            assert last in NOT_WEIGHTS[name], row
            assert "INPUT_DIMS has no" in row.reason
    assert {m.name for m in mixed_parameters(model)} == {row.name for row in rows if row.reason is None}


def test_gpt2s_transposed_weights_are_masked_by_input(mixes_first):
    model = gpt2().train()
    apply_mixout(model, 0.5, target={key: torch.zeros_like(value) for key, value in model.state_dict().items()})
    layer = model.transformer.h[0].mlp.c_fc
    weight = layer.mixing_weight(layer.weight)
    assert weight.shape == (32, 128)
    kept = weight != 0
    assert torch.equal(kept.any(1), kept.all(1))
    assert 0 < kept.any(1).sum() < 32


def test_gpt2s_tied_table_has_one_mask_in_a_forward_pass():
    model, inputs = gpt2().train(), batch("gpt2")
    apply_mixout(model, 0.5)
    assert model.lm_head.weight is model.transformer.wte.weight
    model(**inputs)
    assert model.lm_head.seed is model.transformer.wte.seed
    assert model.transformer.wte.columns
    first = model.lm_head.seed
    model(**inputs)
    assert not torch.equal(model.lm_head.seed, first)


def test_xlnets_raw_parameters_are_masked_by_input():
    model = xlnet().train()
    apply_mixout(model, 0.5, target={key: torch.zeros_like(value) for key, value in model.state_dict().items()})
    attention = model.transformer.layer[0].rel_attn
    assert isinstance(attention, MixedWeights)
    for key in "qkvr":
        kept = getattr(attention, key) != 0
        assert torch.equal(kept.flatten(1).any(1), kept.flatten(1).all(1)), "one draw for each of d_model"
    kept = attention.o != 0
    assert torch.equal(kept.any(0), kept.all(0)), "one draw for each (head, entry), which are o's inputs"


@pytest.mark.parametrize(("name", "inputs"), (("mixtral", 2), ("gpt_oss", 1)))
def test_experts_share_a_mask_of_their_inputs(name, inputs):
    model = MODELS[name]().train()
    apply_mixout(model, 0.5, target={key: torch.zeros_like(value) for key, value in model.state_dict().items()})
    experts = model.model.layers[0].mlp.experts
    for key in ("gate_up_proj", "down_proj"):
        kept = (getattr(experts, key) != 0).transpose(inputs, 2).flatten(0, 1)
        assert torch.equal(kept.any(0), kept.all(0))
        assert 0 < kept.any(0).sum() < kept.shape[1]
    assert experts.config._experts_implementation == "grouped_mm", "which reads a weight once; eager once an expert"
    model.set_experts_implementation("eager")
    model(**batch(name)).loss.backward()
    assert experts._parameters["gate_up_proj"].grad.any()


@architectures
def test_state_dict_and_saved_files_are_the_plain_models(name, tmp_path):
    model = MODELS[name]()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "plain")
    apply_mixout(model, 0.9, share_masks=True)
    assert list(model.state_dict()) == list(state)
    model.save_pretrained(tmp_path / "mixed")
    plain, mixed = (load_file(tmp_path / kind / "model.safetensors") for kind in ("plain", "mixed"))
    assert plain.keys() == mixed.keys()
    for key, value in plain.items():
        testing.assert_same_bits(key, mixed[key], value, name)
    configs = [json.loads((tmp_path / kind / "config.json").read_text()) for kind in ("plain", "mixed")]
    assert configs[0] == configs[1]
    loaded = type(MODELS[name]()).from_pretrained(tmp_path / "mixed")
    inputs = batch(name)
    testing.assert_same_bits("loaded", loaded.eval()(**inputs).logits, model.eval()(**inputs).logits, name)


@architectures
def test_copies_and_whole_models_saved(name, tmp_path):
    model, inputs = apply_mixout(MODELS[name]().train(), 0.9), batch(name)
    step(model, inputs)
    torch.save(model, tmp_path / "model.pt")
    others = copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)
    torch.manual_seed(1)
    want = model(**inputs).logits
    for other in others:
        torch.manual_seed(1)
        testing.assert_same_bits("logits", other(**inputs).logits, want, name)


def test_the_papers_layers_of_bert():
    model = bert(hidden_dropout_prob=0.1).train()
    apply_mixout(model, 0.9, layers="paper")
    mixed = {m.name for m in mixed_parameters(model)}
    for i in range(2):
        prefix = f"bert.encoder.layer.{i}"
        assert {f"{prefix}.attention.self.{key}.weight" for key in ("query", "key", "value")} <= mixed
        assert f"{prefix}.intermediate.dense.weight" in mixed
        assert f"{prefix}.output.dense.weight" not in mixed, "the activation feeds it, no Dropout"
    reasons = {row.name: row.reason for row in mixout_report(model).rows}
    assert reasons["classifier.weight"] == "outside the base model"
    assert not any("embeddings" in key for key in mixed)
    assert model.bert.embeddings.dropout.p == model.bert.encoder.layer[0].output.dropout.p == 0.0
    assert model.dropout.p == 0.1, "it feeds the head only"


def test_the_papers_layers_of_a_model_of_images_take_an_example():
    """transformers' dummy_inputs are token numbers, whatever the model."""
    model = vit(hidden_dropout_prob=0.1)
    with pytest.raises(ValueError, match="example: None"):
        apply_mixout(model, 0.9, layers="paper")
    apply_mixout(model, 0.9, layers="paper", example={"pixel_values": batch("vit")["pixel_values"]})
    assert mixed_parameters(model)


def test_the_papers_layers_where_dummy_inputs_lack_some():
    model = bert()
    model.__class__ = type("Bert", (type(model),), {"dummy_inputs": {**model.dummy_inputs, "token_type_ids": None}})
    assert mixed_parameters(apply_mixout(model, 0.9, layers="paper"))


def test_twenty_steps_agree_with_the_reference(device, backend):
    """The weights' error after 20 steps, against fp64: the median over runs is at most twice the reference's.

    Steps amplify a run's first errors along few directions, so a run's error is one draw, however many weights it has:
    it differs thirtyfold between runs of the reference alone.
    """
    errors = {"reference": [], "ours": []}
    for number in range(7):
        torch.manual_seed(number)
        start, inputs = bert().train().to(device), batch("bert", 16, device)
        weights = {
            "exact": weights_after_20_steps(copy.deepcopy(start).double(), inputs, "reference"),
            "reference": weights_after_20_steps(copy.deepcopy(start), inputs, "reference"),
            "ours": weights_after_20_steps(copy.deepcopy(start), inputs, backend),
        }
        for kind, seen in errors.items():
            seen.append((weights[kind] - weights["exact"]).abs().max())
        moved = weights["exact"] - torch.cat([w.detach().flatten() for w in start.parameters() if w.dim() == 2])
        assert moved.abs().max() > 1000 * errors["reference"][-1], "the weights have moved"
    assert median(errors["ours"]) <= testing.ERROR_RATIO * median(errors["reference"])


def weights_after_20_steps(model, inputs, backend):
    apply_mixout(model, 0.7, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(11)
    for _ in range(20):
        step(model, inputs, optimizer)
    return torch.cat([m.parameter.detach().double().flatten() for m in mixed_parameters(model)])
