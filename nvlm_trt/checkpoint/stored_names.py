"""Translates the tensor names of other saves into those of the layout.

Training wraps modules, and the wrapper's name stays in what is saved; transformers since 4.52 nests the parts of a
vision-language model under `model.` and keeps `lm_head` outside.
"""

from __future__ import annotations

import re

# torch.compile, FSDP and activation checkpointing wrap any module; DDP, DeepSpeed, Lightning and PEFT the whole model
_INNER = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = re.compile(r"(?:module\.|base_model\.model\.|model\.)+(?=(?:vision_model|mlp1|language_model|lm_head)\.)")
_LM_HEAD = re.compile(r"lm_head\.")
# a text model without its head has no `model.` of its own
_TEXT_MODEL = re.compile(r"language_model\.(?=(?:embed_tokens|layers|norm)\.)")
_TOO_DEEP = re.compile(r"language_model\.model\.(?=(?:cross_layers|lm_head)\.)")


def layout_name(stored: str) -> str:
    """Returns the name that the layout has for a stored tensor; a name that fits no rule stays as it is."""
    name = _INNER.sub("", stored)
    if outer := _OUTER.match(name):
        name = name[outer.end() :]
    if _LM_HEAD.match(name):
        return f"language_model.{name}"
    if text_model := _TEXT_MODEL.match(name):
        return f"language_model.model.{name[text_model.end() :]}"
    return _TOO_DEEP.sub("language_model.", name, count=1) if _TOO_DEEP.match(name) else name
