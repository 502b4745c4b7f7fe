"""A conversation with branches, as data: a tree of turns, each with the states that are kept of it, and its file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from ..files import atomic_write
from ..models import LayerState, Model, State
from ..text.chat_templates import Template, template_from

FORMAT = "heronry.chat"


@dataclass(frozen=True, eq=False)
class Turn:
    """A message, its answer, and the two moments that are kept."""

    before: Turn | None
    message: str
    asked: State  # the prompt is read; one row, like `state`
    logits: Tensor  # [V], of the answer's first token
    answer: str  # as the model wrote it, without white space at its end
    state: State
    owed: str  # what the conversation's text has beyond that of `state`


@dataclass
class ConversationTree:
    """All branches of a conversation; turns that branches share are shared in memory and in the file.

    history: the messages that came before the first turn.
    opening: the state after the history, which the first message goes on from; None = there is none.
    branch: the name of the current branch.
    heads: each branch's last turn, by name; None = it has none.
    """

    template: Template
    history: list[dict[str, str]]
    opening: State | None
    branch: str = "main"
    heads: dict[str, Turn | None] = field(default_factory=lambda: {"main": None})

    def save(self, path: str | Path, fingerprint: str) -> None:
        """Writes all branches with their states to one safetensors file (atomically). fingerprint: of the model."""
        turns: dict[Turn, int] = {}  # in the order of the file; a turn comes after the one before it
        for head in self.heads.values():
            for turn in lineage(head):
                turns.setdefault(turn, len(turns))
        states = [self.opening] if self.opening is not None else []
        states += [state for turn in turns for state in (turn.asked, turn.state)]
        description = {
            "template": asdict(self.template),
            "history": self.history,
            "branch": self.branch,
            "heads": {name: None if head is None else turns[head] for name, head in self.heads.items()},
            "turns": [
                {
                    "before": None if turn.before is None else turns[turn.before],
                    "message": turn.message,
                    "answer": turn.answer,
                    "owed": turn.owed,
                }
                for turn in turns
            ],
            "texts": [state.texts[0] for state in states],
        }
        tensors = {}
        if turns:
            tensors["logits"] = torch.stack([turn.logits.float() for turn in turns]).cpu()
        if states:
            for i, layer in enumerate(State.stack(states).layers):
                for name, x in layer._asdict().items():
                    tensors[f"blocks.{i}.{name}"] = x.cpu().contiguous()
        conversation = json.dumps(description)
        metadata = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "conversation": conversation,
            "sha256": _digest(conversation, tensors),
        }
        with atomic_write(Path(path).expanduser()) as part:
            save_file(tensors, part, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, model: Model) -> ConversationTree:
        """What `save` wrote, on the device of the model.

        Raises:
            InputError: no such file, not a conversation, of another model, or damaged.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise InputError(f"{path}: no such conversation file")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise InputError(f"{path}: not a heronry conversation")
                if metadata["fingerprint"] != model.fingerprint:
                    raise InputError(f"{path}: this conversation was held with another model")
                keys = file.keys()
                tensors = {key: file.get_tensor(key) for key in keys}
        except (SafetensorError, OSError, KeyError) as error:
            raise InputError(f"{path}: damaged or truncated conversation file ({error})") from error
        if metadata.get("sha256") != _digest(metadata["conversation"], tensors):
            raise InputError(f"{path}: damaged conversation file")
        description = json.loads(metadata["conversation"])  # whole, as the digest says
        device = model.device
        layers = [
            LayerState(*(tensors[f"blocks.{i}.{name}"].to(device) for name in LayerState._fields))
            for i in range(len(tensors) // len(LayerState._fields))
        ]
        texts = description["texts"]
        rows = State(layers, metadata["fingerprint"], texts) if texts else None
        states = iter([rows[i] for i in range(len(texts))] if rows else [])
        opening = next(states) if description["history"] else None
        turns: list[Turn] = []
        for i, turn in enumerate(description["turns"]):
            before = None if turn["before"] is None else turns[turn["before"]]
            asked, state = next(states), next(states)
            logits = tensors["logits"][i].to(device)
            turns.append(Turn(before, turn["message"], asked, logits, turn["answer"], state, turn["owed"]))
        heads = {name: None if head is None else turns[head] for name, head in description["heads"].items()}
        return cls(
            template_from(description["template"]), description["history"], opening, description["branch"], heads
        )


def lineage(turn: Turn | None) -> list[Turn]:
    """The turns from the first to this one."""
    turns = []
    while turn is not None:
        turns.append(turn)
        turn = turn.before
    return turns[::-1]


def _digest(conversation: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(conversation.encode())
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {list(tensors[key].shape)}".encode())
        digest.update(tensors[key].numpy().tobytes())
    return digest.hexdigest()
