"""Text classification without training: for each class, a state that has read some examples of it.

    python examples/classify_by_state.py                   # the bundled model; --model FILE for another

A text belongs to the class whose state makes it most probable. All states run as one batch, so a text is read once for
all classes, and a new class costs a few hundred kilobytes. The second method takes the state after a text as its
features, for a linear classifier: everything that the model remembers is in one place.
"""

from __future__ import annotations

import argparse

import torch

import heronry
from heronry.models import Model, State

EXAMPLE_LINES = {
    "animals": """\
The dog ran after the cat.
A bird sat in the tree and sang.
The cat likes to sleep and drink milk.
A big bear lived in the forest.
The little fish swam in the pond.
The rabbit hopped to its mom.
The horse ate some grass.
A small mouse ran from the cat.""",
    "food": """\
Mom made a yummy cake.
They ate soup for dinner.
He put butter on the bread.
She wanted a cookie and some juice.
The pizza was hot and had cheese.
Dad cooked eggs for breakfast.
The apple pie was sweet.
Lily ate all the ice cream.""",
    "weather": """\
It was a sunny day and the sky was blue.
The rain fell all day.
A strong wind blew the leaves away.
Snow covered the ground and it was cold.
There was a storm with loud thunder.
The clouds were big and dark.
The sun came out and it was warm.
It was raining, so they stayed inside.""",
}
TEXT_LINES = {
    "animals": """\
The puppy wagged its tail.
A frog jumped into the water.
The lion was very strong.
The duck had five babies.
The monkey climbed the tree.
A bee sat on the flower.""",
    "food": """\
They had pasta and salad.
He drank a glass of milk.
She baked bread with her grandma.
The candy was too sweet.
They shared a sandwich for lunch.
The chicken and rice tasted good.""",
    "weather": """\
The wind was cold.
The snow started to melt.
It rained and the street was wet.
Lightning lit up the sky.
It was a hot day without a cloud.
The storm went away and the sun was bright.""",
}
EXAMPLES, TEXTS = ({name: x.splitlines() for name, x in texts.items()} for texts in (EXAMPLE_LINES, TEXT_LINES))


@torch.inference_mode()
def log_likelihoods(model: Model, states: State, tokens: list[int]) -> torch.Tensor:
    """Of a text after each of S states, in nats, [S]."""
    rows = torch.tensor([tokens] * states.rows)
    logits, _ = model(rows, states)
    each = logits[:, :-1].float().log_softmax(-1).gather(-1, rows[:, 1:, None])
    return each.sum((1, 2))


def by_likelihood(llm: heronry.LLM) -> list[list[str]]:
    """The classes that are found for TEXTS."""
    states = State.stack([llm.state("\n".join(examples)) for examples in EXAMPLES.values()])
    found = []
    for texts in TEXTS.values():
        each = [log_likelihoods(llm.model, states, llm.encode("\n" + text, begins=False)) for text in texts]
        found.append([list(EXAMPLES)[int(scores.argmax())] for scores in each])
    return found


def by_features(llm: heronry.LLM) -> list[list[str]]:
    """The same with a linear classifier on the state after a text: ridge regression, solved exactly."""

    def features(text: str) -> torch.Tensor:
        layers = llm.state(text).layers
        x = torch.cat([layer.wkv.flatten() for layer in layers[len(layers) // 2 :]])  # what the upper half remembers
        return x / x.norm()

    x = torch.stack([features(text) for examples in EXAMPLES.values() for text in examples])  # [n, F]
    y = torch.eye(len(EXAMPLES)).repeat_interleave(len(next(iter(EXAMPLES.values()))), 0)  # [n, classes]
    mean = x.mean(0)
    gram = (x - mean) @ (x - mean).T
    weights = torch.linalg.solve(gram + 0.1 * gram.diagonal().mean() * torch.eye(len(x)), y - y.mean(0))  # [n, classes]
    scores = [[(features(text) - mean) @ (x - mean).T @ weights for text in texts] for texts in TEXTS.values()]
    return [[list(EXAMPLES)[int(score.argmax())] for score in row] for row in scores]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; default: the bundled model")
    llm = heronry.LLM(parser.parse_args().model)
    n = sum(map(len, TEXTS.values()))
    for title, method in (("by likelihood", by_likelihood), ("by features of the state", by_features)):
        found = method(llm)
        right = sum(guess == name for name, row in zip(TEXTS, found, strict=True) for guess in row)
        print(f"{title}: {right} of {n} right")
        for name, texts, row in zip(TEXTS, TEXTS.values(), found, strict=True):
            for text, guess in zip(texts, row, strict=True):
                print(f"  {'+' if guess == name else '-'} {guess:8} {text}")


if __name__ == "__main__":
    main()
