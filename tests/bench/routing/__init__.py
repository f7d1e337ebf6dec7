"""Measures the router: what a prefix index and a choice cost, and that a million prefixes take no more than they may.

PYTHONPATH=tests .venv/bin/python -m bench.routing [--prefixes 1000000] [--megabytes 64] [--json]
"""
