"""Every flag and variable that Tandem gives the engine exists in the installed SGLang."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tandem.core.layout import GroupLayout, plan_group
from tandem.core.types import Role
from tandem.engine.launch import ENVIRONMENT, RankEndpoints, launch_args
from tandem.models.catalog import load_shape

# In a process of its own, since it imports SGLang with the CPU engine's stand-ins.
_PARSE = """
import argparse, json, sys
from tandem.engine.cpu import standins
standins.install()
from sglang.srt.environ import envs
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser(allow_abbrev=False)
ServerArgs.add_cli_args(parser)
lines, variables = json.load(sys.stdin)
parsed = [vars(parser.parse_args(line)) for line in lines]
unknown = [name for name in variables if not hasattr(envs, name)]
json.dump([[{k: v for k, v in p.items() if isinstance(v, (str, int, bool))} for p in parsed], unknown], sys.stdout)
"""

# Read with os.getenv, outside SGLang's table of variables.
_UNLISTED = {"SGLANG_USE_CPU_ENGINE", "SGLANG_CPU_OMP_THREADS_BIND", "SGLANG_HOST_IP", "SGLANG_HEALTH_CHECK_TIMEOUT"}

LAYOUTS = (
    ("tiny", GroupLayout(role=Role.PREFILL, nodes=2)),
    ("tiny", GroupLayout(role=Role.DECODE, nodes=2)),
    ("r1", GroupLayout(role=Role.PREFILL, nodes=4, gpus_per_node=8, device="cuda")),
    ("r1", GroupLayout(role=Role.DECODE, nodes=18, gpus_per_node=8, device="cuda", redundant_experts=32)),
)


@pytest.mark.timeout(120)
def test_sglang_knows_every_flag_and_variable() -> None:
    endpoints = RankEndpoints(
        host="127.0.0.1", http_port=1, dist_init="127.0.0.1:2", bootstrap_port=3, kv_events_port=4, kv_topic="x"
    )
    lines = [
        launch_args("/m", layout, plan_group(load_shape(name), layout), 0, endpoints, served_model_name="tiny")
        for name, layout in LAYOUTS
    ]
    variables = sorted({row.name for row in ENVIRONMENT if row.name.startswith("SGLANG_")} - _UNLISTED)
    answer = subprocess.run(
        [sys.executable, "-c", _PARSE],
        input=json.dumps([lines, variables]),
        env=os.environ | {"SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    parsed, unknown = json.loads(answer.stdout.splitlines()[-1])
    assert unknown == []
    assert [line["attn_dp_size"] for line in parsed] == [2, 2, 32, 144]
    assert [line["dp_size"] for line in parsed] == [1, 1, 1, 1]
    assert [line["deepep_mode"] for line in parsed] == ["normal", "normal", "normal", "low_latency"]
    assert [line["moe_a2a_backend"] for line in parsed] == ["deepep"] * 4
