"""Benchmarks; `scripts/bench NAME` runs one. Each prints a table and exits non-zero when something was wrong."""
