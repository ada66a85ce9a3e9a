"""Reads which metrics a Grafana dashboard asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# what a PromQL expression holds besides metrics: texts, label matchers, ranges, lists of labels
_OTHER = re.compile(r"""\{[^}]*\}|\[[^]]*\]|"[^"]*"|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)""")
_NAME = re.compile(r"(?<![\w:.])[a-zA-Z_:][\w:]*\b(?!\s*\()")  # a name that is not a function's
_OPERATORS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


def dashboard_metrics(dashboard: Mapping[str, Any]) -> set[str]:
    """Returns the metrics of all panels and variables."""
    return {name for expression in expressions(dashboard) for name in metrics_of(expression)}


def expressions(dashboard: Mapping[str, Any]) -> Iterator[str]:
    """Gives the PromQL expressions of the panels, and the metrics that variables take their values from."""
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]["query"])
            assert match, variable
            yield match[1]


def metrics_of(expression: str) -> set[str]:
    """Returns the metrics of a PromQL expression."""
    return {name for name in _NAME.findall(_OTHER.sub(" ", expression)) if name.lower() not in _OPERATORS}
