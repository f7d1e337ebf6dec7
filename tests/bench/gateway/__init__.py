"""Measures what a gateway adds: Tandem's beside sglang-router, smg and Ray Serve, over the same stand-in
workers, in one run.

make bench-gateway        or, from the repository's root:
PYTHONPATH=tests .venv/bin/python -m bench.gateway --help
"""
