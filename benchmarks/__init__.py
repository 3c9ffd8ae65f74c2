"""Benchmarks: `python -m benchmarks.run`, `.finetune` and `.report`; `pytest benchmarks`."""
