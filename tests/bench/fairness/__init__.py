"""What a greedy tenant does to a polite one's time to first token, in real time, through a gateway process.

PYTHONPATH=tests .venv/bin/python -m bench.fairness --help
"""
