"""Shared by the report's tests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.report.planted import planted_sweep


@pytest.fixture
def sweep() -> dict[str, Any]:
    return planted_sweep()
