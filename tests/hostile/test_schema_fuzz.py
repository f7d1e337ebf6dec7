"""What the gateway's own description allows, and what it forbids, is sent: answers are as described, and no 5xx."""

from __future__ import annotations

import pytest
import schemathesis
from hostile_stage import SCALE, Stage, examples
from hypothesis import HealthCheck, given, settings
from schemathesis import checks
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi import checks as openapi_checks

from tandem.gateway.api.openapi import PATHS

WITHIN_S = 10.0
CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.negative_data_rejection,
    openapi_checks.unsupported_method,
]
"""All but `positive_data_acceptance`: that fields go together, or that a grammar compiles, no schema can say."""

OPERATIONS = [
    (path, mode)
    for path, method in PATHS.items()
    for mode in schemathesis.GenerationMode
    # A page that takes nothing cannot be asked wrongly.
    if mode.is_positive or method == "POST" or "{" in path
]


@pytest.fixture
def described(gateway: Stage) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")


@pytest.mark.parametrize(("path", "mode"), OPERATIONS, ids=lambda value: getattr(value, "value", value))
def test_every_operation_answers_as_it_is_described(
    described: BaseSchema, path: str, mode: schemathesis.GenerationMode
) -> None:
    operation = described[path][PATHS[path]]
    # A page that takes nothing has nothing to vary.
    cases = examples(40) if PATHS[path] == "POST" else 2

    @given(case=operation.as_strategy(generation_mode=mode))
    # A short run asks the same each time, so that what it finds can be found again; a long one looks further.
    @settings(max_examples=cases, suppress_health_check=list(HealthCheck), database=None, derandomize=SCALE <= 1)
    def ask(case: schemathesis.Case) -> None:
        response = case.call(timeout=WITHIN_S)
        # The document says that a stream is text; schemathesis takes that for a schema of each event in it.
        whole = "text/event-stream" not in response.headers["content-type"][0]
        case.validate_response(response, checks=[*CHECKS, *([openapi_checks.response_schema_conformance] * whole)])

    ask()
