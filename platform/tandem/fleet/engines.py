"""What a rank of a group runs: the seam between the controller, which starts processes, and what these are."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from tandem.config import FleetConfig
from tandem.core.group_events import Service
from tandem.core.kv_source import KvSource
from tandem.core.layout import GroupLayout, LayoutError, ParallelPlan, plan_group
from tandem.core.shape import ModelShape, ShapeError
from tandem.core.types import GroupSpec, Role
from tandem.engine.launch import LaunchError, RankEndpoints, kv_sources, launch_args, launch_env
from tandem.fleet.plan import engine_settings, layout_of, read_shape
from tandem.fleet.ray_processes import RANK_RESOURCE, group_resource
from tandem.gateway.text.model_card import ModelError
from tandem.gateway.text.tokenize import Tokenizer

CPU_SERVER, GPU_SERVER = "tandem.engine.cpu.launch_server", "sglang.launch_server"


class NoEngineError(ValueError):
    """No engine can be started for this group; the message is one sentence."""


class Command(NamedTuple):
    """A command line, what to add to the environment, and where it will tell what its KV caches hold."""

    argv: Sequence[str]
    env: Mapping[str, str]
    kv_events: tuple[KvSource, ...] = ()


class Engines(Protocol):
    """Knows the engines of a fleet. It travels to the controller, so it must be picklable."""

    def bundle(self, spec: GroupSpec) -> Mapping[str, float]:
        """Ray resources that each rank takes on its node."""

    def check(self, spec: GroupSpec) -> None:
        """Raise NoEngineError if no engine can run this group."""

    def command(self, spec: GroupSpec, rank: int, endpoints: RankEndpoints) -> Command:
        """What to run for one rank, with the weights that `spec` names. Raises NoEngineError."""

    def service(self, spec: GroupSpec, leader: RankEndpoints) -> Service:
        """How the group is reached once it is ready. Raises NoEngineError."""

    def folder(self, path: str) -> str:
        """Where the weights are that a `weights_path` means."""

    def check_weights(self, path: str) -> None:
        """Raise NoEngineError if running engines cannot take the checkpoint in folder `path`."""

    def encode(self, path: str, text: str) -> list[int]:
        """Token ids of a prompt, by the tokenizer in folder `path`. Raises NoEngineError. Slow: it reads files."""

    def decode(self, path: str, ids: Sequence[int]) -> str:
        """Text of token ids. Raises NoEngineError. Slow: it reads files."""


class SglangEngines:
    """SGLang for a fleet's configuration; checkpoints are in the same folders on every node."""

    def __init__(self, config: FleetConfig, *, model: Path, name: str) -> None:
        """`name`: the model's name in the API."""
        self._config = config
        self._model = model
        self._name = name

    @cached_property
    def _shape(self) -> ModelShape:
        try:
            return read_shape(self._model)
        except (OSError, ShapeError, ValueError) as error:
            raise NoEngineError(f"the checkpoint in {self._model} cannot be read: {error}") from error

    def bundle(self, spec: GroupSpec) -> Mapping[str, float]:
        own = {group_resource(spec.group): 1.0} if self._config.ray.group_resources else {}
        if self._config.device == "cuda":
            return {"GPU": float(spec.gpus_per_node), "CPU": 1.0, **own}
        return {RANK_RESOURCE: 1.0, **own}

    def check(self, spec: GroupSpec) -> None:
        self._plan(spec)

    def command(self, spec: GroupSpec, rank: int, endpoints: RankEndpoints) -> Command:
        layout, plan = self._plan(spec)
        engine = engine_settings(self._config, spec)
        try:
            arguments = launch_args(
                self.folder(spec.weights_path),
                layout,
                plan,
                rank,
                endpoints,
                engine.args,
                served_model_name=self._name,
                weight_version=spec.weight_version or self._config.model.version,
            )
            env = launch_env(layout, plan, rank, endpoints)
            sources = kv_sources(layout, plan, rank, endpoints)
        except LaunchError as error:
            raise NoEngineError(str(error)) from error
        server = CPU_SERVER if self._config.device == "cpu" else GPU_SERVER
        return Command((sys.executable, "-m", server, *arguments), {**env, **engine.env}, sources)

    def service(self, spec: GroupSpec, leader: RankEndpoints) -> Service:
        prefill = spec.role is Role.PREFILL
        return Service(
            url=url_of(leader),
            bootstrap_host=leader.host if prefill else "",
            bootstrap_port=leader.bootstrap_port if prefill else 0,
            dp_size=self._plan(spec)[1].dp_ranks,
            weight_version=spec.weight_version or self._config.model.version,
        )

    def folder(self, path: str) -> str:
        return path or str(self._model)

    def check_weights(self, path: str) -> None:
        try:
            shape = read_shape(Path(path))
        except (OSError, ShapeError, ValueError) as error:
            raise NoEngineError(f"the checkpoint in {path} cannot be read: {error}") from error
        if msgspec.structs.replace(shape, name=self._shape.name) != self._shape:
            raise NoEngineError(f"the checkpoint in {path} has another shape than the fleet's ({self._model})")
        if not any(Path(path).glob("*.safetensors")):
            raise NoEngineError(f"{path} holds no weights (*.safetensors)")
        if not _same_tokenizer(Path(path), self._model):
            raise NoEngineError(f"the tokenizer in {path} is another one than the fleet's ({self._model})")

    def encode(self, path: str, text: str) -> list[int]:
        return self._tokenizer(path).encode(text)

    def decode(self, path: str, ids: Sequence[int]) -> str:
        return self._tokenizer(path).decode(ids)

    @staticmethod
    def _tokenizer(path: str) -> Tokenizer:
        try:
            return Tokenizer.load(Path(path))
        except (ModelError, OSError, ValueError) as error:
            raise NoEngineError(f"the tokenizer in {path} cannot be read: {error}") from error

    def _plan(self, spec: GroupSpec) -> tuple[GroupLayout, ParallelPlan]:
        layout = layout_of(self._config, spec.role, spec.nodes, spec.gpus_per_node, spec.engine)
        try:
            return layout, plan_group(self._shape, layout)
        except LayoutError as error:
            raise NoEngineError(f"{spec.group} cannot run: {error}") from error


def _same_tokenizer(folder: Path, other: Path) -> bool:
    """Whether both have the same tokens under the same ids: prompts are tokenized once, for groups of either. Raises
    NoEngineError."""
    found = []
    for one in (folder, other):
        file = one / "tokenizer.json"
        try:
            found.append(file.read_bytes())
        except OSError as error:
            raise NoEngineError(f"{file} cannot be read: {error}") from error
    if found[0] == found[1]:
        return True
    try:
        first, second = (msgspec.json.decode(text) for text in found)
    except msgspec.DecodeError as error:
        raise NoEngineError(f"the tokenizer in {folder} is not JSON: {error}") from error
    return bool(first == second)


def url_of(endpoints: RankEndpoints) -> str:
    """HTTP URL of a rank."""
    host = f"[{endpoints.host}]" if ":" in endpoints.host else endpoints.host
    return f"http://{host}:{endpoints.http_port}"
