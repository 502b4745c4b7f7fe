"""Our models in EleutherAI's lm-evaluation-harness:

    python -m heronry.integrations.lm_eval run --model heronry --model_args pretrained=FILE --tasks lambada_openai

is `lm_eval` with the model "heronry" put into its registry, which takes no plugins of itself. model_args: pretrained,
and dtype, device, tokenizer, quantize, adapter as for LLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from tqdm import tqdm

from ..engine.llm import LLM
from ..errors import InputError
from ..evaluate import log_likelihoods, opening_tokens

SIDE_BY_SIDE = 32  # texts that are generated together


class HeronryLM(TemplateLM):
    """What the harness asks a model for: likelihoods of one text after another, of whole texts, and generated texts."""

    def __init__(
        self, pretrained: str | LLM | None = None, batch_size: Any = None, max_gen_toks: int = 256, **options: Any
    ):
        """
        Args:
            pretrained: a file, a folder or a name of the hub; None = the bundled model.
            batch_size: taken and not needed: passes are filled by tokens.
        """
        super().__init__()
        options.pop("max_batch_size", None)
        if str(options.get("device") or "cuda").startswith("cuda") and not torch.cuda.is_available():
            options["device"] = "cpu"  # the harness says cuda where nobody says anything
        self.llm = pretrained if isinstance(pretrained, LLM) else LLM(pretrained, **options)
        self.max_gen_toks = int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        marks = opening_tokens(self.llm)
        if not marks:
            raise InputError("this vocabulary has no end of text, so no text can be measured from its first token on")
        return marks[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.llm.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(self._opened(before), after) for _, before, after in requests]
        return log_likelihoods(self.llm.model, pairs, _bar(disable_tqdm))

    def _opened(self, before: list[int]) -> list[int]:
        """With what every text of this model begins with."""
        marks = list(self.llm.opening)
        return before if before[: len(marks)] == marks else [*marks, *before]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        marks = [self.eot_token_id]
        pairs = [(marks, self.tok_encode(request.args[0])) for request in requests]
        return [total for total, _ in log_likelihoods(self.llm.model, pairs, _bar(disable_tqdm))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Prompts that are asked for in the same way are answered side by side."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generating") as bar:
            for members in groups.values():
                for begin in range(0, len(members), SIDE_BY_SIDE):
                    some = members[begin : begin + SIDE_BY_SIDE]
                    answers = self._generate([requests[i].args[0] for i in some], requests[some[0]].args[1])
                    for i, answer in zip(some, answers, strict=True):
                        texts[i] = answer
                    bar.update(len(some))
        return texts

    def _generate(self, prompts: list[str], asked: dict[str, Any]) -> list[str]:
        until = asked.get("until") or []
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        options: dict[str, Any] = {"temperature": 0.0}
        if asked.get("do_sample") and asked.get("temperature", 1.0) > 0:
            options = {"temperature": asked.get("temperature", 1.0), "top_p": asked.get("top_p", 1.0)}
        count = int(asked.get("max_gen_toks") or self.max_gen_toks)
        return [completion.text for completion in self.llm.generate(prompts, count, stop=stop or None, **options)]


def _bar(disable: bool) -> Any:
    def track(items: Iterable[Any], total: int) -> Iterable[Any]:
        return tqdm(items, disable=disable, desc="passes")

    return track


def register() -> None:
    """Puts the model "heronry" into the harness. Calling it again changes nothing."""
    if "heronry" not in model_registry:
        model_registry.register("heronry", target=HeronryLM)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()
