"""Generates text with onnxruntime and numpy alone: no PyTorch, no heronry.

    heronry convert MODEL step.onnx --to onnx-step
    python examples/onnx_numpy.py step.onnx tokenizer.json "Once upon a time"

The state is three arrays that go in and come out; the file's metadata holds their values before the first token.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def begin(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    """The state before the first token, of one text."""
    filling = json.loads(session.get_modelmeta().custom_metadata_map["heronry.state"])
    state = {}
    for state_input in session.get_inputs()[1:]:
        shape = [size if isinstance(size, int) else 1 for size in state_input.shape]
        values = np.array(filling[state_input.name], np.float32).reshape(1, 1, -1, *(1 for _ in shape[3:]))
        state[state_input.name] = np.zeros(shape, np.float32) + values
    return state


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("graph", help="made with --to onnx-step")
    options.add_argument("tokenizer", help="tokenizer.json")
    options.add_argument("prompt")
    options.add_argument("--tokens", type=int, default=100)
    options.add_argument("--opening", type=int, nargs="*", default=[0], help="ids that stand in front of every text")
    args = options.parse_args()

    session = onnxruntime.InferenceSession(args.graph)
    tokenizer = Tokenizer.from_file(args.tokenizer)
    state, said = begin(session), []
    waiting = [*args.opening, *tokenizer.encode(args.prompt).ids]
    while len(said) < args.tokens:
        token = waiting.pop(0) if waiting else said[-1]
        logits, *arrays = session.run(None, {"tokens": np.array([[token]]), **state})
        state = dict(zip(state, arrays, strict=True))
        if not waiting:
            said.append(int(logits[0, -1].argmax()))
            if said[-1] == 0:  # the end of the text
                break
    print(args.prompt + tokenizer.decode(said))


if __name__ == "__main__":
    main()
