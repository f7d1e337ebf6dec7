"""How soon does a fleet of real engines answer a load step with another group, and does a request suffer?

`PYTHONPATH=tests python -m bench.load_step`: a small fleet on this machine with one prefill and one decode group, first
without autoscaling, to find an aim between what one stream and many see; then with it.
"""
