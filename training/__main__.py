"""Trains tiny NVLM-D, -X and -H: `python -m training --work DIR`. Resumes a run that was cut.

Stages: tokenizer, vision encoder, language model, features of the frozen encoder, projector alignment, fine-tuning of
each model. `--models` picks models, so that several can be trained side by side once the common stages are done;
`--export DIR` writes checkpoints of finished models.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from training.recipe import RECIPE
from training.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="states, logs and cached features")
    parser.add_argument("--models", nargs="*", choices=list(RECIPE.tuning), default=list(RECIPE.tuning))
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--export", type=Path, help="write the finished models' checkpoints under this directory")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Run(options.work, torch.device(options.device))
    if options.export:
        for name in options.models:
            run.export(name, options.export / f"nvlm-{name}-tiny")
        return
    run.common_stages()
    for name in options.models:
        run.tune(name)


if __name__ == "__main__":
    main()
