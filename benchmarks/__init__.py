"""Benchmarks: `python -m benchmarks.layer`, `python -m benchmarks.finetune`, `pytest benchmarks`."""
