"""Small tokenizers of the kind that GPT-2 and GPT-NeoX have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.normalizers import Normalizer

END = "<|endoftext|>"


def train_bpe(
    file: Path, text: str, size: int = 300, special: Sequence[str] = (END,), normalizer: Normalizer | None = None
) -> Tokenizer:
    """A tokenizer of at most `size` tokens that knows `text`, also written to `file` as a tokenizer.json."""
    bpe = Tokenizer(models.BPE())
    if normalizer is not None:
        bpe.normalizer = normalizer
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text] * 3, trainer)
    bpe.save(str(file))
    return bpe
