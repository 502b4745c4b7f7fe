"""Runs PyPI's rwkv over checkpoints, in a process of its own: it picks its classes by environment variables at import.

stdin: JSON [{"model": path of a .pth, "tokens": [...], "cut": n, "out": path of a .npy}, ...]. Each result is
float32 [3, T, V]: logits of the whole sequence, token by token, and of two parts with the state carried at `cut`.
"""

import json
import sys

import numpy as np
from rwkv.model import RWKV


def main() -> None:
    for job in json.load(sys.stdin):
        model = RWKV(model=job["model"].removesuffix(".pth"), strategy="cpu fp32")
        tokens, cut = job["tokens"], job["cut"]
        whole, _ = model.forward(tokens, None, full_output=True)
        steps, state = [], None
        for token in tokens:
            logits, state = model.forward([token], state)
            steps.append(logits.numpy().copy())
        first, state = model.forward(tokens[:cut], None, full_output=True)
        first = first.numpy().copy()
        second, _ = model.forward(tokens[cut:], state, full_output=True)
        np.save(job["out"], np.stack([whole.numpy(), np.stack(steps), np.concatenate([first, second.numpy()])]))


main()
