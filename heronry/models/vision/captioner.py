"""Pictures read by a language model: a picture becomes a state, and a text continues from it.

What is special about it:
- Vision-RWKV's features of the patches, projected, take the place of token embeddings
- the language model, of any generation, is not changed: having read the picture, it has an ordinary state, to generate
  from, to chat from, to branch and to save
- requires_grad of their parameters decides which of the three parts are trained
Source: the projection of LLaVA (arXiv 2304.08485), which VisualRWKV (arXiv 2406.13362) took to RWKV.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError
from ...files import atomic_write
from ..base import Model, Network, replace_embeddings
from ..fingerprint import compute_fingerprint, sample_all
from ..layers import widen
from ..state import State
from .model import VisionModel

FORMAT = "heronry.captioner"


class Captioner(nn.Module):
    """`logits, state = captioner(images, tokens)`: the language model's output for tokens [B, T], where each row
    follows a picture.

    Attributes:
        vision, language, projection: its parts; the head of `vision` is not used.
    """

    def __init__(self, vision: VisionModel, language: Model):
        super().__init__()
        if variant := getattr(language.config, "variant", ""):
            raise InputError(f"{variant} has a matrix for each token id and cannot read pictures")
        self.vision, self.language = vision, language
        like = vision.pos_embed
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        # its scale does not matter: the language model's ln0 follows
        self.projection = nn.Linear(vision.num_features, language.config.n_embd, device=like.device, dtype=dtype)

    def embed(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, height, width] -> the language model's input: a vector per patch, row by row, [B, T, C]."""
        features = self.vision.forward_features(images).flatten(2).transpose(1, 2)
        vectors: Tensor = self.projection(features.to(self.projection.weight.dtype))
        return vectors

    def look(self, images: Tensor, state: State | None = None) -> State:
        """The language model's state after the pictures, one row each. It continues from `state`, which has one row per
        picture or one for all, or from the initial state. Gradients flow through it."""
        vectors = self.embed(images)
        tokens = torch.zeros(vectors.shape[:2], dtype=torch.int64, device=vectors.device)
        if state is not None and len(state) == 1:
            state = state[[0] * len(images)]
        with replace_embeddings(self.language, tokens, vectors):
            _, state = self.language(tokens, state, last_only=True)
        assert state is not None
        return state

    def forward(
        self, images: Tensor, tokens: Tensor, *, cu_seqlens: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, State]:
        """As the language model's forward, after looking at the pictures; packed, the i-th text follows picture i."""
        logits, state = self.language(tokens, self.look(images), cu_seqlens=cu_seqlens)
        return logits, state

    def loss(self, images: Tensor, captions: Sequence[Sequence[int]], given: int = 1) -> Tensor:
        """The mean cross entropy of the captions' tokens, in nats.

        Args:
            images: [B, 3, height, width].
            captions: token ids, of any lengths, with the token that ends generation.
            given: how many leading tokens of each are read but not learned: the prompt that will ask for a caption.
        """
        if given < 1 or min(map(len, captions), default=0) <= given:
            raise InputError(f"given must be at least 1 and every caption longer, got given={given}")
        cu = [0, *accumulate(len(ids) - 1 for ids in captions)]
        device = self.projection.weight.device
        tokens = torch.tensor([*chain.from_iterable(ids[:-1] for ids in captions)], device=device)
        targets = [[-100] * (given - 1) + list(ids[given:]) for ids in captions]  # -100: counts in no loss
        logits, _ = self(images, tokens[None], cu_seqlens=cu)
        return F.cross_entropy(widen(logits[0]), torch.tensor([*chain.from_iterable(targets)], device=device))

    def save(self, path: str | Path) -> None:
        """Writes the projection as a safetensors file (atomically), with the fingerprints of the two models that it
        connects. These are saved like any model; one that was frozen need not be."""
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.projection.state_dict().items()}
        with atomic_write(Path(path).expanduser()) as part:
            save_file(tensors, part, metadata={"format": FORMAT, **self._belongs()})

    @classmethod
    def load(cls, path: str | Path, vision: VisionModel, language: Model) -> Captioner:
        """A captioner from the file of its projection and the two models that it was saved with, in eval mode.

        Raises:
            InputError: no such file, a damaged one, something else, or other models.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        captioner = cls(vision, language)
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no dictionary
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: damaged or truncated ({error})") from error
        if about.get("format") != FORMAT:
            raise InputError(f"{path}: not a captioner's projection")
        for part, its in captioner._belongs().items():
            if about.get(part) != its:
                raise InputError(f"{path}: belongs to another {part} model")
        try:
            captioner.projection.load_state_dict(tensors)
        except RuntimeError as error:
            raise InputError(f"{path}: its tensors do not fit the models") from error
        return captioner.eval()

    def _belongs(self) -> dict[str, str]:
        return {"vision": _as_it_is(self.vision), "language": _as_it_is(self.language)}


def _as_it_is(model: Network) -> str:
    """The fingerprint of the current weights, which training may have changed; packed ones cannot change, and have that
    of the file they came from."""
    if model.quantization is not None:
        return model.fingerprint
    return compute_fingerprint(model.name, model.config, sample_all(dict(model.named_parameters())))
