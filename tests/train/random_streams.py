"""For test_random_streams.py: `torchrun random_streams.py OUT [SETTING]...` trains, and each process writes what its
random generator gives as each forward pass of the model begins."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from heronry.train.config import read_config
from heronry.train.trainer import Trainer


def main() -> None:
    drawn = []

    def draw(module: torch.nn.Module, inputs: object) -> None:
        if module.training:
            state = torch.get_rng_state()
            drawn.append(torch.rand((), dtype=torch.float64).item())
            torch.set_rng_state(state)

    trainer = Trainer(read_config(None, sys.argv[2:]))
    trainer.model.register_forward_pre_hook(draw)
    trainer.train()
    Path(f"{sys.argv[1]}-{trainer.accelerator.process_index}.json").write_text(json.dumps(drawn))


if __name__ == "__main__":
    main()
