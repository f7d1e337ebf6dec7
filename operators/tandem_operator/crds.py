"""The CustomResourceDefinitions, from the classes of `tandem_operator.api`.

    python -m tandem_operator.crds [FOLDER]            write them (helm/tandem/crds)
    python -m tandem_operator.crds --check [FOLDER]    say which differ from the classes, and exit with 1
    python -m tandem_operator.crds --no-cel FOLDER     write them without CEL, for Kubernetes before 1.25

The chart has those with CEL. A server before 1.25 drops its rules, or answers a server-side apply with an error 500.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel

from tandem_operator.api import GROUP, VERSION
from tandem_operator.api.fleet import FleetSpec
from tandem_operator.api.pool import GroupSpec, PoolSpec
from tandem_operator.api.status import FleetStatus, GroupStatus, PoolStatus
from tandem_operator.structural import structural_schema

# libyaml's is many times faster, and writes the same.
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

FOLDER = Path("helm/tandem/crds")
HEADER = "# Made by `python -m tandem_operator.crds` from operators/tandem_operator/api: change those, not this.\n"


class Column(NamedTuple):
    """What `kubectl get` shows."""

    name: str
    type: str
    path: str
    description: str
    wide: bool = False
    """Only with `-o wide`."""


class Kind(NamedTuple):
    """One resource."""

    kind: str
    plural: str
    short: str
    spec: type[BaseModel]
    status: type[BaseModel]
    description: str
    columns: tuple[Column, ...]
    name_pattern: str = r"^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$"
    """A StatefulSet is named like a group, and its pods' labels have room for 52 characters of that."""
    scales: bool = False


_AGE = Column("Age", "date", ".metadata.creationTimestamp", "Since it was made.")

KINDS = (
    Kind(
        "Fleet",
        "fleets",
        "flt",
        FleetSpec,
        FleetStatus,
        "One model behind one gateway, served by one prefill pool and one decode pool.",
        (
            Column("Phase", "string", ".status.phase", "In one word."),
            Column("Groups", "string", ".status.summary", "Ready/wanted groups of prefill and decode."),
            Column("Gateways", "integer", ".status.gateways", "Replicas that listen."),
            Column("GPUs", "integer", ".status.gpus", "That its groups ask for."),
            Column("TTFT", "number", ".status.slo.ttftSeconds", "Time to first token, in seconds."),
            Column("ITL", "number", ".status.slo.itlSeconds", "Time between tokens, in seconds."),
            Column("SLO", "number", ".status.slo.attainment", "Share of requests that kept both aims."),
            Column("URL", "string", ".status.endpoints.http", "Of the HTTP API.", wide=True),
            _AGE,
        ),
        # A Service is named like the fleet and begins with a letter; <fleet>-prefill-1023 is a group's name.
        name_pattern=r"^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$",
    ),
    Kind(
        "ExpertParallelPool",
        "expertparallelpools",
        "epp",
        PoolSpec,
        PoolStatus,
        "The groups of one role of a fleet. A Fleet makes and owns its two pools.",
        (
            Column("Role", "string", ".spec.role", "Prefill or decode."),
            Column("Wanted", "integer", ".spec.replicas", "Groups that there should be."),
            Column("Groups", "integer", ".status.replicas", "Groups that exist."),
            Column("Ready", "integer", ".status.ready", "Groups that serve."),
            Column("Updated", "integer", ".status.updated", "Groups of the current revision."),
            Column("GPUs", "integer", ".status.gpus", "That its groups ask for."),
            Column("Scaling", "string", ".status.scaling.reason", "Why so many groups.", wide=True),
            Column("Held", "string", ".status.scaling.held", "What keeps it from scaling now.", wide=True),
            _AGE,
        ),
        scales=True,
    ),
    Kind(
        "ExpertParallelGroup",
        "expertparallelgroups",
        "epg",
        GroupSpec,
        GroupStatus,
        "One group: engine processes that start, serve and stop together. A pool makes and owns its groups.",
        (
            Column("Role", "string", ".spec.role", "Prefill or decode."),
            Column("Phase", "string", ".status.phase", "In one word."),
            Column("Ranks", "string", ".status.readyRanks", "Ready/all engine processes."),
            Column("Epoch", "integer", ".status.epoch", "Raised at each restart."),
            Column("Running", "integer", ".status.load.running", "Requests that run."),
            Column("Waiting", "integer", ".status.load.waiting", "Requests that wait."),
            Column("KV", "number", ".status.load.kvUse", "Share of the KV pool in use."),
            Column("Weights", "string", ".status.weightVersion", "Weight version.", wide=True),
            Column("Revision", "string", ".spec.revision", "Of template and shape.", wide=True),
            Column("Reason", "string", ".status.reason", "Why it is so.", wide=True),
            _AGE,
        ),
    ),
)


def definition(kind: Kind, *, cel: bool = True) -> dict[str, Any]:
    """The CustomResourceDefinition of `kind`. Raises SchemaError."""
    subresources: dict[str, Any] = {"status": {}}
    if kind.scales:
        subresources["scale"] = {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{kind.plural}.{GROUP}",
            "labels": {"app.kubernetes.io/name": "tandem", "app.kubernetes.io/part-of": "tandem"},
        },
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind.kind,
                "listKind": f"{kind.kind}List",
                "plural": kind.plural,
                "singular": kind.kind.lower(),
                "shortNames": [kind.short],
                "categories": ["tandem"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": [_column(column) for column in kind.columns],
                    "subresources": subresources,
                    "schema": {"openAPIV3Schema": _schema(kind, cel=cel)},
                }
            ],
        },
    }


def _column(column: Column) -> dict[str, Any]:
    priority = {"priority": 1} if column.wide else {}
    return {
        "name": column.name,
        "type": column.type,
        "jsonPath": column.path,
        "description": column.description,
        **priority,
    }


def _schema(kind: Kind, *, cel: bool) -> dict[str, Any]:
    return {
        "type": "object",
        "description": kind.description,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}."},
            "kind": {"type": "string", "description": f"{kind.kind}."},
            "metadata": {"type": "object", "properties": {"name": {"type": "string", "pattern": kind.name_pattern}}},
            "spec": structural_schema(kind.spec, cel=cel),
            # The operator alone writes it, and says all of it.
            "status": structural_schema(kind.status, defaults=False),
        },
    }


def files(*, cel: bool = True) -> dict[str, str]:
    """Content by file name."""
    return {f"{kind.plural}.yaml": _content(kind, cel=cel) for kind in KINDS}


@functools.cache
def _content(kind: Kind, *, cel: bool) -> str:
    text: str = yaml.dump(
        definition(kind, cel=cel), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True, encoding=None
    )
    return HEADER + text


def differing(folder: Path) -> list[str]:
    """Names of files in `folder` that are not what the classes say: changed, missing, or of no resource."""
    wanted = files()
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.yaml")}
    return sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))


def main(arguments: list[str] | None = None) -> int:
    """Write or check; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tandem_operator.crds", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help=f"default {FOLDER}; with --no-cel it must be given")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if files differ")
    parser.add_argument("--no-cel", action="store_true", help="without rules between fields (Kubernetes before 1.25)")
    options = parser.parse_args(arguments)
    if options.no_cel and (options.folder is None or options.check):
        parser.error("--no-cel writes into a folder that you name; the chart's have CEL, so --check cannot be with it")
    folder = options.folder or FOLDER
    if options.check:
        for name in (names := differing(folder)):
            print(f"{folder / name} differs from the classes: run python -m tandem_operator.crds", file=sys.stderr)
        return 1 if names else 0
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files(cel=not options.no_cel).items():
        (folder / name).write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
