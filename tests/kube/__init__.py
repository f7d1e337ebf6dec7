"""Tests on a real Kubernetes API server; pods really run, as local processes. See `conftest.py` for the fixtures."""
