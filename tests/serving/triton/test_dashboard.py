"""The Grafana dashboard: Grafana can load it, and it asks for metrics that nvlm_trt has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dashboard import dashboard_metrics, expressions, metrics_of

from nvlm_trt.serving.triton.models.histograms import HISTOGRAMS
from nvlm_trt.serving.triton.models.metrics import _DESCRIPTIONS

ROOT = Path(__file__).parents[3]


@pytest.fixture
def dashboard() -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "grafana_dashboard.json").read_text())


def test_it_is_a_dashboard(dashboard: dict[str, Any]) -> None:
    assert type(dashboard["schemaVersion"]) is int
    assert dashboard["title"]
    assert dashboard["uid"]
    assert "id" not in dashboard  # Grafana gives one
    assert "__inputs" not in dashboard  # its data source is a variable
    variables = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert variables == ["datasource", "instance"]


def test_its_panels_have_their_own_ids_and_places(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert panels
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert all(0 <= x < 24 for x, _ in cells)
        assert not cells & taken, panel["title"]
        taken |= cells
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) > 0
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_it_asks_for_metrics_that_exist(dashboard: dict[str, Any]) -> None:
    """tests/integration/test_server_metrics.py asks a real server for them."""
    series = {f"{histogram.name}_{part}" for histogram in HISTOGRAMS for part in ("bucket", "sum", "count")}
    assert dashboard_metrics(dashboard) <= series | set(_DESCRIPTIONS)
    for expression in expressions(dashboard):
        assert metrics_of(expression), expression
        assert expression.count("(") == expression.count(")")


@pytest.mark.parametrize(
    ("expression", "metrics"),
    [
        ('sum by (le) (rate(a_bucket{job="b"}[5m]))', {"a_bucket"}),
        ("a / on (instance) group_left (x) b and c > 1e3 or d offset 5m", {"a", "b", "c", "d"}),
        ('histogram_quantile(0.5, sum(rate(a{x="y"}[$__rate_interval])) without (z)) * b:c', {"a", "b:c"}),
    ],
)
def test_metrics_of_an_expression(expression: str, metrics: set[str]) -> None:
    assert metrics_of(expression) == metrics
