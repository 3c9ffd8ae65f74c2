"""Every code block of docs/guide.md runs, in order, as a reader would paste them."""

import re
from pathlib import Path

import pytest

from mixout_fast.uses import INPUT_DIMS, READ_PAST

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

GUIDE = Path(__file__).parent.parent / "docs" / "guide.md"


def test_the_guides_code_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for known in INPUT_DIMS:
        monkeypatch.setitem(INPUT_DIMS, known, INPUT_DIMS[known])
    blocks = list(re.finditer(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE))
    assert len(blocks) == GUIDE.read_text().count("```python")
    names = {}
    for block in blocks:
        line = GUIDE.read_text()[: block.start(1)].count("\n")
        code = compile("\n" * line + block.group(1), str(GUIDE), "exec")
        exec(code, names)
    INPUT_DIMS.pop("mypackage.layers.MyLinear")
    READ_PAST.pop("mypackage.layers.MyAttention")
    assert "parameters mixed" in capsys.readouterr().out
