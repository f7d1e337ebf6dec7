"""Real fleets under traffic, whose parts are killed, stopped and cut off. `make chaos` is `python -m chaos`.

`faults.py` and `scenarios.py` are the data: what is done to which fleet, and what must hold afterwards. `stage.py` is
the fleet, `traffic.py` the clients, `inject.py` the hands (with `engine_faults.py`, `platform_faults.py` and
`wire_faults.py`), `checks.py` the judge, `measure.py` the numbers.
"""
