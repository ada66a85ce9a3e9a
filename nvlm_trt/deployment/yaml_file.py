"""Writes YAML with PyYAML, in the order in which keys were given."""

from __future__ import annotations

from typing import Any


def to_yaml(*documents: dict[str, Any]) -> str:
    """Write documents of one file. A text that could be read as another type is quoted; no text is folded."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True  # equal parts are written out, not referred to

        def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
            return super().increase_indent(flow, False)  # items of a list are indented

    return "---\n".join(
        yaml.dump(document, Dumper=Dumper, sort_keys=False, default_flow_style=False, width=1000)
        for document in documents
    )
