"""What the operator tells, Events, conditions and metrics, is in the tables of docs/kubernetes.md."""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import tandem_operator
from tandem_operator.reconcile.guest import NOT_ALLOWED
from tandem_operator.render.config import SpecError

PACKAGE = Path(tandem_operator.__file__).parent
PAGE = Path(__file__).parents[3] / "docs" / "kubernetes.md"
KINDS = {"FLEET": "Fleet", "POOL": "ExpertParallelPool", "EP_GROUP": "ExpertParallelGroup"}
CONDITIONS_OF = {
    "fleet.py": "Fleet",
    "guest.py": "Fleet",
    "pools.py": "ExpertParallelPool",
    "group.py": "ExpertParallelGroup",
    "check.py": "ExpertParallelGroup",
}
"""Whose conditions a module tells."""
COMPUTED = {
    "error.reason": {SpecError("").reason, NOT_ALLOWED},
    "status.reason": set(),  # of a rollout: docs/rollouts.md has them
}
"""Reasons that are attributes of something."""

Found = dict[str, set[str]]


@functools.cache
def functions() -> list[tuple[str, ast.AST]]:
    """All functions of the operator, with the names of their modules."""
    return [
        (path.name, node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def calls(function: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def values(argument: ast.expr, function: ast.AST) -> set[str]:
    """The words that an argument can be."""
    if isinstance(argument, ast.Constant):
        return {argument.value}
    if isinstance(argument, ast.IfExp):
        return values(argument.body, function) | values(argument.orelse, function)
    if isinstance(argument, ast.Name):
        assigned = [
            node.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == argument.id
        ]
        assert assigned, f"where does {argument.id} come from?"
        return set().union(*(values(one, function) for one in assigned))
    return COMPUTED[ast.unparse(argument)]


def told_events() -> Found:
    found: Found = defaultdict(set)
    for _, function in functions():
        for name, call in calls(function):
            if name.endswith("recorder.tell"):
                found[KINDS[ast.unparse(call.args[0])]] |= values(call.args[2], function)
    return found


def told_conditions() -> Found:
    found: Found = defaultdict(set)
    for module, function in functions():
        for name, call in calls(function):
            if name == "told" and module in CONDITIONS_OF:
                found[CONDITIONS_OF[module]] |= values(call.args[0], function)
    return found


def documented(head: str) -> Found:
    """The words in code style of each row of a table; what is in brackets is more about them."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"| {head} |")
    found: Found = {}
    for line in rest.partition("\n\n")[0].splitlines()[2:]:
        _, kind, words, _ = (part.strip() for part in line.split("|"))
        found[kind] = set(re.findall("`([^`]+)`", re.sub(r"\([^)]*\)", "", words)))
    return found


def test_every_event_is_in_the_table() -> None:
    assert documented("Events of | reasons") == told_events()


def test_every_condition_is_in_the_table() -> None:
    assert documented("conditions of | types") == told_conditions()


def test_modules_that_tell_conditions_are_known() -> None:
    telling = {module for module, function in functions() for name, _ in calls(function) if name == "told"}
    assert telling == set(CONDITIONS_OF)


def test_every_metric_is_in_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    source = (PACKAGE / "metrics.py").read_text(encoding="utf-8")
    names = re.findall(r'"(tandem_operator_\w+)"', source)
    assert names
    short = re.findall(r"`…(\w+)`", page)
    missing = [name for name in names if f"`{name}" not in page and not any(name.endswith(end) for end in short)]
    assert missing == []
