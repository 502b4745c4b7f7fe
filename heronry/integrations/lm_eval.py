"""Models in EleutherAI's lm-evaluation-harness:

    python -m heronry.integrations.lm_eval run --model heronry --model_args pretrained=FILE --tasks lambada_openai

is `lm_eval` with the model "heronry" added to its registry, which has no plugins. model_args: pretrained, and dtype,
device, tokenizer, quantize, adapter as for LLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import require

require("lm_eval", "lm-eval")

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from tqdm import tqdm

from ..engine.llm import LLM
from ..engine.options import check_names
from ..errors import InputError
from ..evaluate import log_likelihoods, opening_tokens
from ..faults import exit_with_a_line
from ..progress import Progress

BATCH_SIZE = 32  # texts generated together
MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
LLM_OPTIONS = ("tokenizer", "dtype", "device", "quantize", "adapter", "ln_x_eps", "progress")


class HeronryLM(TemplateLM):
    """A model for the harness: likelihoods of continuations and of whole texts, and generated texts."""

    def __init__(
        self, pretrained: str | LLM | None = None, batch_size: Any = None, max_gen_toks: int = 256, **options: Any
    ):
        """
        Args:
            pretrained: a file, a folder or a name on the hub; None = the bundled model.
            batch_size: ignored: batches are filled by number of tokens.
            options: of LLM.

        Raises:
            InputError: an unknown option, or one for a model that is loaded already; and as LLM does.
        """
        super().__init__()
        options.pop("max_batch_size", None)
        if str(options.get("device") or "cuda").startswith("cuda") and not torch.cuda.is_available():
            options["device"] = "cpu"  # cuda is the harness's own default
        if isinstance(pretrained, LLM):
            if given := options.keys() - {"device"}:
                raise InputError(f"{min(given)}= is for a model that is loaded, not for an LLM")
            self.llm = pretrained
        else:
            check_names(options, LLM_OPTIONS)
            self.llm = LLM(pretrained, **options)
        self.max_gen_toks = int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        tokens = opening_tokens(self.llm)
        if not tokens:
            raise InputError("this vocabulary has no end-of-text token, so the first token of a text cannot be scored")
        return tokens[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.llm.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(self._with_opening(context), continuation) for _, context, continuation in requests]
        with _bar(disable_tqdm) as progress:
            return log_likelihoods(self.llm.model, pairs, progress, self.llm.start)

    def _with_opening(self, context: list[int]) -> list[int]:
        """The tokens after the opening tokens of this model's texts; the harness writes the first of these alone where
        there is no context."""
        opening = opening_tokens(self.llm)
        if context == opening[:1]:
            return opening
        return context if context[: len(opening)] == opening else [*opening, *context]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        context = self._with_opening([self.eot_token_id])
        texts = [self.tok_encode(request.args[0]) for request in requests]
        with _bar(disable_tqdm) as progress:
            pairs = [(context, ids) for ids in texts if ids]
            scores = iter(log_likelihoods(self.llm.model, pairs, progress, self.llm.start))
        return [next(scores)[0] if ids else 0.0 for ids in texts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates for prompts with the same options in batches."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generating") as bar:
            for members in groups.values():
                for begin in range(0, len(members), BATCH_SIZE):
                    batch = members[begin : begin + BATCH_SIZE]
                    answers = self._generate([requests[i].args[0] for i in batch], requests[batch[0]].args[1])
                    for i, answer in zip(batch, answers, strict=True):
                        texts[i] = answer
                    bar.update(len(batch))
        return texts

    def _generate(self, prompts: list[str], gen_kwargs: dict[str, Any]) -> list[str]:
        options: dict[str, Any] = {"top_p": 1.0, **gen_kwargs}
        until = options.pop("until", None) or []
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        limits = [options.pop(name, None) for name in MAX_TOKENS]
        max_tokens = next((int(limit) for limit in limits if limit is not None), self.max_gen_toks)
        temperature = options.pop("temperature", None)
        samples = options.pop("do_sample", None)  # the harness leaves it out where the temperature says it
        if samples is None:
            samples = temperature is not None
        options["temperature"] = float(1.0 if temperature is None else temperature) if samples else 0.0
        tokens = [self._with_opening(self.tok_encode(prompt)) for prompt in prompts]
        completions = self.llm.generate(tokens, max_tokens, stop=stop or None, **options)
        return [completion.text for completion in completions]


@contextmanager
def _bar(disable: bool) -> Iterator[Progress]:
    """Shows how many tokens have been read."""
    with tqdm(disable=disable, desc="reading", unit="token", unit_scale=True) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def register() -> None:
    """Adds the model "heronry" to the harness. Can be called repeatedly."""
    if "heronry" not in model_registry:
        model_registry.register("heronry", target=HeronryLM)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    with exit_with_a_line():
        register()
        cli_evaluate()
