"""The tools around a mixed model, run for real: Trainer, accelerate, PEFT, autocast, checkpointing, compile, export."""

import copy
import itertools

import pytest
import torch

transformers = pytest.importorskip("transformers")
# ruff: noqa: E402
from stack_models import LANGUAGE_MODELS, MODELS, VOCABULARY, batch, bert, gpt2, llama, mixtral
from torch.utils.data import DataLoader, Dataset

from mixout_fast import (
    MixLinear,
    MixoutScheduler,
    apply_mixout,
    mix_linear,
    mixout_report,
    remove_mixout,
    target_state_dict,
    testing,
    wdecay,
)
from mixout_fast.apply import mixed_parameters
from mixout_fast.backends import cpu

architectures = pytest.mark.parametrize("name", MODELS)


class Examples(Dataset):
    def __init__(self, name, size=32):
        self.columns = batch(name, size)

    def __len__(self):
        return len(self.columns["labels"])

    def __getitem__(self, row):
        return {key: column[row] for key, column in self.columns.items()}


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        testing.assert_same_bits(name, ours[name], want, "weights after training")


def gradients(model, inputs, manual_seed=7):
    model.zero_grad()
    torch.manual_seed(manual_seed)
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@architectures
def test_trainer_trains_saves_resumes_and_evaluates(name, tmp_path):
    """Four steps give the same bits as two, and two more from the checkpoint with the pretrained model's targets."""
    pretrained, data = MODELS[name](), Examples(name)
    pretrained.save_pretrained(tmp_path / "pretrained")

    def trainer(model):
        pretrained = type(model).from_pretrained(tmp_path / "pretrained")
        apply_mixout(model, 0.8, target=pretrained, share_masks=True)
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path / "run", per_device_train_batch_size=8, max_steps=4, save_steps=2, learning_rate=1e-2,
            report_to=[], disable_tqdm=True, use_cpu=True, seed=3, logging_strategy="no", save_total_limit=None,
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)

    straight = trainer(copy.deepcopy(pretrained))
    straight.train()
    moved = weights(straight.model)
    mixed = [m.name for m in mixed_parameters(straight.model)]
    assert all(not torch.equal(moved[key], pretrained.get_parameter(key)) for key in mixed if "token_type" not in key)

    checkpoint = tmp_path / "run" / "checkpoint-2"
    resumed = trainer(type(pretrained).from_pretrained(checkpoint))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(weights(resumed.model), moved)

    loss = resumed.evaluate()["eval_loss"]
    plain = type(pretrained).from_pretrained(tmp_path / "run" / "checkpoint-4").eval()
    inputs = batch(name)
    want = plain(**inputs).logits
    testing.assert_same_bits("eval", resumed.model.eval()(**inputs).logits, want, name)
    assert loss == loss and loss > 0


def shaken(model):
    """The model with all its parameters changed a little, so that none is at its target or zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_loss_that_reads_the_output_layers_weight_reads_it_mixed(name):
    """As fused cross-entropies do, with the mask and the gradient of a call of the layer."""
    model, inputs = apply_mixout(MODELS[name]().train(), 0.5), batch(name)["input_ids"]
    head, seed = shaken(model).lm_head, torch.tensor(3)
    x = model.base_model(inputs).last_hidden_state.detach()
    head.seed = seed
    values, gradients = [], []
    for call in (head, lambda x: torch.nn.functional.linear(x, head.weight)):
        values.append(call(x))
        values[-1].square().sum().backward()
        gradients.append(dict(model.named_parameters(remove_duplicate=False))["lm_head.weight"].grad)
        model.zero_grad()
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert (gradients[1] == 0).all(0).any(), "columns of dropped neurons"
    head._parameters["weight"].ds_status = "available"  # as with DeepSpeed's ZeRO-3, where TRL reads it
    assert head.weight.ds_status == "available"
    assert not torch.equal(head.weight, model.eval().lm_head.weight)
    copied = copy.deepcopy(model.train()).lm_head
    testing.assert_same_bits("weight of a copy", copied.weight, head.weight, name)
    remove_mixout(model)
    assert isinstance(model.lm_head.weight, torch.nn.Parameter)


@pytest.mark.parametrize("applied", ("before", "after"))
def test_trl_trains_the_output_layer_mixed(applied, tmp_path):
    """SFTTrainer multiplies by its weight and computes no logits; at p = 1 no mixed weight has a gradient."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")),
        pad_token="w1", eos_token="w2",
    )  # fmt: skip
    model, seen = shaken(llama()), []
    if applied == "before":
        apply_mixout(model, 1.0)

    class Gradients(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, arguments, state, control, **others):
            seen.extend(m.name for m in mixed_parameters(model) if m.parameter.grad.any())
            seen.extend(name for name, p in model.named_parameters() if p.dim() == 1 and p.grad.any())

    arguments = trl.SFTConfig(str(tmp_path), max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, bf16=False)
    data = datasets.Dataset.from_dict({"input_ids": batch("llama", 8)["input_ids"].tolist()})
    trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Gradients()])
    if applied == "after":
        apply_mixout(model, 1.0)
    trainer.train()
    assert len(seen) == 5 and all("norm" in name for name in seen), "the norms alone, which are not mixed"


def test_accelerate(tmp_path):
    """Accumulation, bf16 autocast, clipping; resuming from a saved state gives the same bits."""
    accelerate = pytest.importorskip("accelerate")
    start, data = bert(), Examples("bert")

    def run(steps, load=None, save=None):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        model = apply_mixout(copy.deepcopy(start).train(), 0.8, share_masks=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        torch.manual_seed(5)
        scheduler = MixoutScheduler(model, p_factor=lambda step: 1 / (1 + step), hold=2)
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        accelerator.register_for_checkpointing(scheduler)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=4))
        wdecay(optimizer, model, 0.1)
        batches = list(loader)
        if load:
            accelerator.load_state(load)
        for number in steps:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batches[number]).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        if save:
            accelerator.save_state(save)
        return accelerator.unwrap_model(model)

    straight = run(range(8))
    run(range(4), save=tmp_path / "state")
    resumed = run(range(4, 8), load=tmp_path / "state")
    assert_same_weights(weights(resumed), weights(straight))
    assert not torch.equal(straight.classifier.weight, start.classifier.weight)


def test_lora_on_a_mixed_model(mixes_first):
    """The base weights are frozen at their targets: mixing them changes nothing."""
    peft = pytest.importorskip("peft")
    base, inputs = bert().train(), batch("bert")
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    results = []
    for mixes in (False, True):
        model = copy.deepcopy(base)
        if mixes:
            apply_mixout(model, 0.9, filter_fn=lambda module, name: name.endswith(("query", "value")))
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
        results.append(model(**inputs).logits)
    testing.assert_same_bits("logits", results[1], results[0], "with and without mixout")


@pytest.mark.parametrize("config", ("LoraConfig", "IA3Config"))
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", ("bert", "gpt2"))
def test_merging_adapters_into_mixed_layers(config, training, name):
    peft = pytest.importorskip("peft")
    layers = {"bert": ["query", "value"], "gpt2": ["c_attn", "c_fc"]}[name]
    options = {"target_modules": layers, "fan_in_fan_out": name == "gpt2", "task_type": None}
    if config == "IA3Config":
        options["feedforward_modules"] = [] if name == "bert" else ["c_fc"]
    model = peft.get_peft_model(apply_mixout(MODELS[name](), 0.9), getattr(peft, config)(**options)).double()
    for parameter_name, parameter in model.named_parameters():
        if "lora" in parameter_name or "ia3" in parameter_name:
            torch.nn.init.normal_(parameter)
    inputs = batch(name)
    adapted = model.eval()(**inputs).logits
    merged = model.train(training).merge_and_unload().eval()
    plain = MODELS[name]().double()
    plain.load_state_dict(merged.state_dict())
    torch.testing.assert_close(plain.eval()(**inputs).logits, adapted)


@pytest.mark.parametrize("first", ("mixout", "LoRA"))
def test_lora_of_experts_is_left_alone(first, mixes_first):
    """PEFT moves the experts' weights away for a forward pass, and reads LoRA's A past its layer."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"], lora_dropout=0.0)
    model, inputs = mixtral().train(), batch("mixtral")
    if first == "mixout":
        apply_mixout(model, 0.9, filter_fn=lambda module, name: name.endswith("experts"))
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config).train()
    plain = model(**inputs).loss
    if first == "LoRA":
        apply_mixout(model, 0.9, frozen=True)
        reasons = {row.name: row.reason for row in mixout_report(model).rows}
        of_gate = [reason for key, reason in reasons.items() if "lora_" in key or key.endswith("gate_up_proj")]
        assert len(of_gate) == 6
        assert set(of_gate) == {"LoRA of a parameter: PEFT reads it past its layer"}
        assert all(reason is None for key, reason in reasons.items() if key.endswith("experts.down_proj"))
    testing.assert_same_values("loss", model(**inputs).loss, plain, first)
    model(**inputs).loss.backward()


@pytest.mark.parametrize("first", ("mixout", "LoRA"))
def test_lora_of_attention_is_left_alone(first):
    """PEFT adds the products of A and B to nn.MultiheadAttention's weights before it calls it."""
    peft = pytest.importorskip("peft")
    model, x = torch.nn.TransformerEncoderLayer(8, 2, 16), torch.randn(3, 2, 8)
    if first == "mixout":
        apply_mixout(model, 0.9)
    config = peft.LoraConfig(r=2, target_modules=["self_attn", "linear1"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).train()
    if first == "mixout":
        with pytest.raises(AttributeError, match="call apply_mixout after PEFT"):
            model(x)
        return
    apply_mixout(model, 1.0)
    reasons = [row.reason for row in mixout_report(model).rows if "attn" in row.name and "lora" in row.name]
    assert reasons == 4 * ["LoRA of a parameter: PEFT reads it past its layer"]
    model(x).square().sum().backward()
    (mixed,) = mixed_parameters(model)
    assert mixed.name.endswith("linear1.lora_A.default.weight") and not mixed.parameter.grad.any()


def test_lora_of_an_embedding_is_left_alone():
    """PEFT looks tokens up in A itself, and calls no layer."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["word_embeddings", "query"]))
    reasons = {row.name: row.reason for row in mixout_report(apply_mixout(model, 0.9)).rows}
    of_table = [reason for key, reason in reasons.items() if "lora_embedding" in key]
    assert of_table == 2 * ["LoRA of a parameter: PEFT reads it past its layer"]


def test_mixout_of_lora_is_that_of_the_product(mixes_first):
    """A is mixed toward zero, so the layer's weight W + scaling · BA is mixed toward the frozen W."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], lora_dropout=0.0)
    model, inputs = peft.get_peft_model(bert(), config).train(), batch("bert")
    plain = model(**inputs).logits
    apply_mixout(model, 0.5)
    testing.assert_same_bits("logits before any step", model(**inputs).logits, plain, "B = 0")
    rows = {row.name: row.reason for row in mixout_report(model).rows}
    assert {key.rpartition(".lora_")[2] for key, reason in rows.items() if reason is None} == {"A.default.weight"}
    assert {reason for key, reason in rows.items() if ".lora_B." in key} == {
        "LoRA's B: mixing A toward zero mixes the product"
    }
    assert rows["base_model.model.classifier.weight"] == "frozen"

    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    with torch.no_grad():
        for weight in (down.weight, up.weight, layer.base_layer.weight, layer.base_layer.bias):
            weight.copy_(torch.randint(-2, 3, weight.shape))
    down.seed = torch.tensor(3)
    x = torch.randint(-2, 3, (6, 32)).float()
    frozen, bias = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
    product = frozen + layer.scaling["default"] * up.weight.detach() @ down.weight.detach()
    want = mix_linear(x, product, frozen, bias, 0.5, seed=3)
    # On small integers nothing rounds.
    testing.assert_same_values("layer", layer(x).detach(), want, "LoRA")

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs).loss.backward()
    optimizer.step()
    mixed = model.eval()(**inputs).logits
    testing.assert_same_bits("eval after removal", remove_mixout(model)(**inputs).logits, mixed, "LoRA")
    with pytest.raises(ValueError, match="an element mask of it is none of the product"):
        apply_mixout(model, 0.5, mask="element")


@architectures
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(name, dtype, mixes_first):
    model, inputs = MODELS[name]().train(), batch(name)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=2.0**8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch.autocast("cpu", dtype):
        plain = model(**inputs).logits
    apply_mixout(model, 0.8)
    if cpu.LOAD_ERROR is None and cpu.multiplies_in_fp32(dtype):
        # Products are then computed in fp32, more exactly than the plain model's; the logits still depend on no mask.
        with torch.autocast("cpu", dtype):
            plain = model(**inputs).logits
    before = weights(model)
    for number in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            outputs = model(**inputs)
        if number == 0:
            testing.assert_same_bits("logits before any step", outputs.logits, plain, f"{name}, {dtype}")
        scaler.scale(outputs.loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == (2.0**8 if dtype == torch.float16 else 1.0), "no step was skipped"
    after = weights(model)
    assert all(value.isfinite().all() for value in after.values())
    mixed = [m.name for m in mixed_parameters(model) if "token_type" not in m.name]
    assert sum(not torch.equal(after[key], before[key]) for key in mixed) > 0.9 * len(mixed)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "xlnet"])
@pytest.mark.parametrize("reentrant", (True, False))
def test_activation_checkpointing_recomputes_the_same_masks(name, reentrant):
    """XLNet is left out: its class does not support gradient checkpointing."""
    model, inputs = MODELS[name]().train(), batch(name)
    apply_mixout(model, 0.5, share_masks=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    want = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    got = gradients(model, inputs)
    assert got.keys() == want.keys()
    for key in want:
        testing.assert_same_bits(key, got[key], want[key], f"{name}, reentrant={reentrant}")


def test_gradient_accumulation_adds_up():
    model = apply_mixout(bert().train(), 0.5)
    first, second = batch("bert"), batch("bert")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    parts = gradients(model, first, 1), gradients(model, second, 2)
    model.zero_grad()
    for inputs, manual_seed in ((first, 1), (second, 2)):
        torch.manual_seed(manual_seed)
        model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        testing.assert_same_bits(name, parameter.grad, parts[0][name] + parts[1][name], "two batches")


@architectures
def test_compiles_without_a_graph_break(name):
    """One graph, and fresh masks without recompiling.

    With the eager kernels: test_apply.py generates code too. Without labels: transformers' choice of a loss breaks some
    models' graphs.
    """
    model, inputs = apply_mixout(MODELS[name]().train(), 0.5, share_masks=True), batch(name)
    del inputs["labels"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        outputs = [compiled(**inputs)[0] for _ in range(6)]
    assert len(torch.stack([output.detach().flatten() for output in outputs]).unique(dim=0)) == 6
    outputs[-1].square().mean().backward()
    for m in mixed_parameters(model):
        assert m.parameter.grad is not None or m.name.startswith("bert.pooler"), m.name


@pytest.mark.slow
@pytest.mark.parametrize("build", (bert, gpt2), ids=lambda build: build.__name__)
def test_eval_model_exports(build):
    model, inputs = apply_mixout(build(), 0.9).eval(), batch(build.__name__)
    del inputs["labels"]
    options = {"use_cache": False} if build is gpt2 else {}
    want = model(**inputs, **options).logits
    exported = torch.export.export(model, (), {**inputs, **options})
    testing.assert_same_bits("logits", exported.module()(**inputs, **options).logits, want, build.__name__)
    assert not any("mixout_fast" in str(node.target) for node in exported.graph.nodes)


def test_an_ema_copy_of_the_model():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model, inputs = apply_mixout(bert().train(), 0.8), batch("bert")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
        average.update_parameters(model)
    assert isinstance(average.module.classifier, MixLinear)
    remove_mixout(average.module)
    assert not torch.equal(average.eval()(**inputs).logits, model.eval()(**inputs).logits)
    assert isinstance(model.classifier, MixLinear)


@pytest.fixture
def process_group(tmp_path):
    """A process group with this process alone."""
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_ddp_does_not_broadcast_targets(process_group):
    model, inputs = apply_mixout(bert().train(), 0.8), batch("bert")
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    assert not any(name.endswith("target") for name in wrapped.named_module_buffers)
    assert wrapped.named_module_buffers, "BERT's own"
    wrapped(**inputs).loss.backward()
    assert model.classifier.weight.grad is not None


def sharded(model, **options):
    """The model sharded by FSDP2, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    options["mesh"] = init_device_mesh("cpu", (1,))
    for blocks in [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, **options)
    return fully_shard(model, **options)


def losses(model, inputs, steps=3):
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
    for number in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(number)
        seen.append(model(**inputs).loss)
        seen[-1].backward()
        optimizer.step()
    return torch.stack(seen).detach()


@architectures
def test_fsdp2_trains_alike(name, process_group):
    """Also with weights mixed where they are read: FSDP reads those between forward passes, sharded."""
    model, inputs = apply_mixout(MODELS[name]().train(), 0.8, share_masks=True), batch(name)
    want = losses(copy.deepcopy(model), inputs)
    testing.assert_same_bits("losses of three steps", losses(sharded(model), inputs), want, name)


def test_decay_and_moving_targets_under_fsdp2(process_group):
    """Under FSDP2 targets are whole, weights sharded."""
    start, inputs, seen = apply_mixout(bert().train(), 0.8), batch("bert"), []
    for wrap in (copy.deepcopy, lambda model: sharded(copy.deepcopy(model))):
        model = wrap(start)
        scheduler = MixoutScheduler(model, ema=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wdecay(optimizer, model, 0.5)
        for number in range(3):
            torch.manual_seed(number)
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        seen.append([getattr(w, "full_tensor", lambda w=w: w)() for w in model.parameters()])
        seen[-1] += target_state_dict(model).values()
    for want, got in zip(*seen, strict=True):
        testing.assert_same_bits("weight or target", got.detach(), want.detach(), "FSDP2")


def test_fsdp2_in_bf16_takes_targets_in_bf16(process_group, mixes_first):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    start, inputs = gpt2().train(), batch("gpt2")
    plain = losses(sharded(copy.deepcopy(start), mp_policy=policy), inputs, 1)
    mixed = apply_mixout(copy.deepcopy(start), 0.8, target_dtype=torch.bfloat16)
    testing.assert_same_bits("loss before any step", losses(sharded(mixed, mp_policy=policy), inputs, 1), plain, "bf16")
    with pytest.raises(TypeError, match=r"target: dtype torch.float32, (weight|input) has torch.bfloat16"):
        losses(sharded(apply_mixout(start, 0.8), mp_policy=policy), inputs)


def test_fsdp1_takes_no_weights_mixed_where_they_are_read(process_group):
    """FSDP1 puts tensors in the place of Parameters, as nn.DataParallel does in its replicas."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for name in ("bert", "gpt2"):
        model, inputs = apply_mixout(MODELS[name]().train(), 0.8, share_masks=True), batch(name)
        want = losses(copy.deepcopy(model), inputs)
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        testing.assert_same_bits("losses of three steps", losses(wrapped, inputs), want, name)
    with pytest.raises(AttributeError, match=r"[qkvro]: .*XLNetRelativeAttention.*DDP.*FSDP2"):
        FullyShardedDataParallel(apply_mixout(MODELS["xlnet"](), 0.8), device_id=torch.device("cpu"))


class WithoutLogits(torch.nn.Module):
    """A language model whose loss multiplies by the output layer's weight and does not call the layer."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels):
        logits = torch.nn.functional.linear(
            self.model.base_model(input_ids).last_hidden_state, self.model.lm_head.weight
        )
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss=loss)


def test_deepspeed_trains_alike(process_group, monkeypatch):
    """ZeRO-3 partitions the weights, and gathers them for a call of their layer or where they are read.

    One test, since DeepSpeed keeps the process group that it first sees.
    """
    deepspeed = pytest.importorskip("deepspeed")
    for variable, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(variable, value)
    deepspeed.init_distributed("gloo")
    options = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1e9, "zero_allow_untested_optimizer": True}
    for stage, name in itertools.product((2, 3), ("bert", "gpt2", "xlnet")):
        model, inputs = apply_mixout(MODELS[name]().train(), 0.5), batch(name)
        model = WithoutLogits(shaken(model)) if name == "gpt2" else shaken(model)
        want, got = losses(copy.deepcopy(model), inputs), []
        options["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)
        for number in range(3):
            torch.manual_seed(number)
            got.append(engine(**inputs).loss)
            engine.backward(got[-1])
            engine.step()
        torch.testing.assert_close(torch.stack(got).detach(), want)
