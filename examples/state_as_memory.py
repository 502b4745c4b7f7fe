"""A state is a memory that can be handled like any value: saved, forked, undone, blended.

    python examples/state_as_memory.py                     # the bundled model; --model FILE for another

Each part prints what it does; nothing is read twice.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import heronry
from heronry.models.state import LayerState, State


def blend(first: State, second: State, share: float) -> State:
    """A memory between two of the same model: `share` of the second, the rest of the first. What a state holds is a sum
    (RWKV-5 to 7), so the mean of two states holds a bit of both texts."""
    layers = zip(first.layers, second.layers, strict=True)
    mixed = [LayerState(*(a + share * (b - a) for a, b in zip(*pair, strict=True))) for pair in layers]
    return State(mixed, first.fingerprint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; default: the bundled model")
    llm = heronry.LLM(parser.parse_args().model)

    def tell(state: State, text: str = " One day,") -> str:
        return " ".join((text + llm.generate(text, state=state, max_tokens=24, temperature=0).text).split())

    tim = llm.state("Once upon a time there was a little boy named Tim. He had a red ball.")
    sue = llm.state("Once upon a time there was a big cat named Sue. She had a blue hat.")
    print(f"a memory takes {tim.nbytes / 1e3:.0f} KB, however long the text was\n")

    print("saved and loaded, in another process if need be:")
    with tempfile.TemporaryDirectory() as folder:
        tim.save(Path(folder) / "tim.state")
        print(f"  {tell(State.load(Path(folder) / 'tim.state'))}\n")

    print("forked: two stories from one beginning, which is read once")
    for text in (" It was a sunny day.", " It was raining."):
        print(f"  {tell(llm.state(text, tim), ' He')}")

    print("\nundone: the state from before is still there")
    bitten = llm.state(" A dog bit the ball.", tim)
    print(f"  with the dog:    {tell(bitten, ' Tim was')}")
    print(f"  without the dog: {tell(tim, ' Tim was')}\n")

    print("blended: between Tim's memory and Sue's")
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        print(f"  {share:4.0%} Sue: {tell(blend(tim, sue, share))}")


if __name__ == "__main__":
    main()
