"""Small models of the architectures people finetune, from transformers' configuration classes, and batches for them."""

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

transformers.logging.set_verbosity_error()

VOCABULARY = 67
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(**options) -> nn.Module:
    config = transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **SIZES | NO_DROPOUT | options)
    return transformers.BertForSequenceClassification(config)


def roberta(**options) -> nn.Module:
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=32, type_vocab_size=1, **SIZES | NO_DROPOUT | options
    )
    return transformers.RobertaForSequenceClassification(config)


def xlnet(**options) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48}
    config = transformers.XLNetConfig(**sizes | {"dropout": 0.0, "summary_last_dropout": 0.0} | options)
    return transformers.XLNetForSequenceClassification(config)


def gpt2(**options) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | tokens | no_dropout | options))


def vit(**options) -> nn.Module:
    config = transformers.ViTConfig(image_size=16, patch_size=8, **SIZES | NO_DROPOUT | options)
    return transformers.ViTForImageClassification(config)


def llama(**options) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=32, num_key_value_heads=1, **SIZES | options
    )
    return transformers.LlamaForCausalLM(config)


MIXTURE = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "num_key_value_heads": 1, "num_local_experts": 3}


def mixtral(**options) -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES | MIXTURE | options))


def gpt_oss(**options) -> nn.Module:
    """A GPT-OSS, whose experts' weights are (expert, in, out)."""
    config = transformers.GptOssConfig(head_dim=16, num_experts_per_tok=2, **SIZES | MIXTURE | options)
    return transformers.GptOssForCausalLM(config)


MODELS: dict[str, Callable[..., nn.Module]] = {
    function.__name__: function for function in (bert, roberta, xlnet, gpt2, vit, llama, mixtral, gpt_oss)
}
LANGUAGE_MODELS = ("gpt2", "llama", "mixtral", "gpt_oss")


def batch(name: str, size: int = 4, device: str = "cpu") -> dict[str, Tensor]:
    """A model's arguments, labels included."""
    return {key: value.to(device) for key, value in _batch(name, size).items()}


def _batch(name: str, size: int) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(size, 3, 16, 16), "labels": torch.randint(0, 2, (size,))}
    # Above the padding token, from which RoBERTa derives positions.
    tokens = torch.randint(3, VOCABULARY, (size, 9))
    labels = tokens if name in LANGUAGE_MODELS else torch.randint(0, 2, (size,))
    return {"input_ids": tokens, "labels": labels}
