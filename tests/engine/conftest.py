"""A small random model over bytes, and a model that says what it is told to."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from heronry.checkpoint import assemble
from heronry.engine.llm import LLM
from heronry.models import LayerState, Model, State
from heronry.text.tokenizers import ByteStream


@pytest.fixture(scope="session")
def model(random_checkpoint) -> Model:
    """RWKV-7 over 256 bytes, float64: a batch and its rows alone agree far beyond what could change a draw."""
    weights = random_checkpoint("7", vocab=256, width=32, heads=2, layers=2, ffn=40, rank=3)
    return assemble({name: x.double() for name, x in weights.items()})


class Pieces:
    """Bytes, and after them pieces of one's own, the longest first when encoding; id 0 is the end of text."""

    stop_ids = frozenset({0})

    def __init__(self, *extra: str):
        self.table = [b"", *(bytes([i]) for i in range(1, 256)), *(piece.encode() for piece in extra)]
        self.vocab_size = len(self.table)

    def encode(self, text: str) -> list[int]:
        data, ids = text.encode(), []
        while data:
            best = max((piece for piece in self.table if piece and data.startswith(piece)), key=len)
            ids.append(self.table.index(best))
            data = data[len(best) :]
        return ids

    def decode(self, tokens) -> str:
        return b"".join(self.table[token] for token in tokens).decode(errors="replace")

    def stream(self):
        return ByteStream(self.table)


class Scripted(Model):
    """Remembers all it has read, and after the n-th `cue` says replies[n], then the end of text.

    reads: how many tokens each call was given.
    """

    name = "scripted"
    native_step_enabled = False

    def __init__(self, tokenizer: Pieces, replies: list[list[int]], cue: str):
        super().__init__(SimpleNamespace(vocab_size=tokenizer.vocab_size, n_layer=1, n_embd=1))
        self.emb = nn.Embedding(1, 1)
        self.tokenizer, self.replies, self.cue = tokenizer, replies, cue.encode()
        self.set_fingerprint("scripted")
        self.reads: list[int] = []

    def initial_state(self, rows: int = 1) -> State:
        return State([LayerState(torch.zeros(rows, 1), torch.zeros(rows, 2048), torch.zeros(rows, 1))], "scripted")

    def forward(self, tokens, state=None, *, cu_seqlens=None, last_only=False):
        state, cu = self.validate_inputs(tokens, state, cu_seqlens)
        self.reads.append(tokens.numel())
        rows = [tokens[0, a:b] for a, b in pairwise(cu)] if cu else list(tokens)
        count, memory = state.layers[0].att_shift.clone(), state.layers[0].wkv.clone()
        logits = []
        for i, row in enumerate(rows):
            start = int(count[i])
            memory[i, start : start + len(row)] = row.float()
            count[i] += len(row)
            logits.append(torch.full((self.config.vocab_size,), -100.0))
            logits[-1][self.answer(memory[i, : int(count[i])].long().tolist())] = 0
        shape = (1, len(rows)) if cu else (len(rows), 1)
        layer = LayerState(count, memory, state.layers[0].ffn_shift)
        return torch.stack(logits).view(*shape, -1), State([layer], "scripted")

    def answer(self, read: list[int]) -> int:
        text, since, turns = b"", 0, -1
        for token in read:
            text += self.tokenizer.table[token]
            since += 1
            if text.endswith(self.cue):
                turns, since = turns + 1, 0
        reply = self.replies[turns] if 0 <= turns < len(self.replies) else []
        return reply[since] if since < len(reply) else 0

    def read(self, state: State) -> str:
        """The text a state has read."""
        layer = state.layers[0]
        return self.tokenizer.decode(layer.wkv[0, : int(layer.att_shift[0, 0])].long().tolist())


@pytest.fixture(scope="session")
def scripted():
    """(model, tokenizer) for replies given as lists of pieces, each one token."""

    def make(*replies: list[str], cue: str = "Assistant:") -> tuple[Scripted, Pieces]:
        extra = dict.fromkeys(piece for reply in replies for piece in reply if len(piece.encode()) > 1)
        tokenizer = Pieces(*extra)
        ids = [[tokenizer.table.index(piece.encode()) for piece in reply] for reply in replies]
        return Scripted(tokenizer, ids, cue), tokenizer

    return make


@pytest.fixture(scope="module")
def llm(model) -> LLM:
    return LLM(model)
