"""What generate() of transformers adds to heronry's own decode step, and RWKV-4 beside the class of transformers.

    python examples/transformers_speed.py --dtype bfloat16
    python examples/transformers_speed.py --device cuda

All contestants alternate on the same prompt; figures are medians. The models have random weights, 12 layers of 768.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import RwkvConfig, RwkvForCausalLM

from heronry.integrations.transformers import RwkvPreTrainedModel
from heronry.models import RWKV4, RWKV7, Model, RWKV4Config, RWKV7Config


def random_model(cls: type[Model], config: object) -> Model:
    """Initialised it would be full of zeros."""
    model = cls(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1) if "ln" in name and name.endswith("weight") else p.normal_(std=0.02)
    return model.eval()


def ours(model: Model, tokens: torch.Tensor, count: int) -> None:
    """The plain loop: the best token, again and again."""
    with torch.inference_mode():
        logits, state = model(tokens, last_only=True)
        for _ in range(count - 1):
            logits, state = model(logits[:, -1].argmax(-1, keepdim=True), state, last_only=True)


def generated(model: torch.nn.Module, tokens: torch.Tensor, count: int) -> None:
    with torch.inference_mode():
        model.generate(tokens, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)


def trained(model: torch.nn.Module, tokens: torch.Tensor, dtype: torch.dtype) -> None:
    with torch.autocast(tokens.device.type, dtype, enabled=dtype == torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    model.zero_grad()


def turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds, the median of `rounds`, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:  # the first one compiles
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(turn_seconds) for name, turn_seconds in times.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--device", default="cpu")
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--width", type=int, default=768)
    options.add_argument("--vocabulary", type=int, default=50277)
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--rounds", type=int, default=5)
    args = options.parse_args()
    dtype, device, count = getattr(torch, args.dtype), args.device, args.tokens
    sizes = (args.vocabulary, args.layers, args.width)
    prompt = torch.arange(1, 9, device=device)[None]
    goose = random_model(RWKV7, RWKV7Config.sized(*sizes)).to(device, dtype)
    dove = random_model(RWKV4, RWKV4Config.sized(*sizes)).to(device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        RwkvPreTrainedModel.from_heronry(dove).save_pretrained(folder)
        config = RwkvConfig.from_pretrained(folder)
        config.rescale_every = 0
        theirs = RwkvForCausalLM.from_pretrained(Path(folder), config=config, dtype=dtype).to(device).eval()
    rows = torch.randint(args.vocabulary, (4, 256), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        expected = theirs(rows).logits.float()
        apart = (dove(rows)[0].float() - expected).abs().max() / expected.std()
    print(f"RWKV-4: logits of both at most {apart:.1g} of their spread apart")
    medians = turns(
        {
            "our step, RWKV-7": lambda: ours(goose, prompt, count),
            "generate() over it": lambda: generated(RwkvPreTrainedModel.from_heronry(goose), prompt, count),
            "our step, RWKV-4": lambda: ours(dove, prompt, count),
            "generate() over it, RWKV-4": lambda: generated(RwkvPreTrainedModel.from_heronry(dove), prompt, count),
            "RwkvForCausalLM, generate()": lambda: generated(theirs, prompt, count),
        },
        args.rounds,
    )
    for name, seconds in medians.items():
        print(f"{name}: {1000 * seconds / count:.2f} ms a token")
    print(f"added: {medians['generate() over it'] / medians['our step, RWKV-7'] - 1:.1%}")
    faster = medians["RwkvForCausalLM, generate()"] / medians["generate() over it, RWKV-4"]
    print(f"generating: {faster:.2f} times as fast as RwkvForCausalLM")

    mine = RwkvPreTrainedModel.from_heronry(dove.float())
    mine.train()
    theirs.float().train()
    medians = turns(
        {
            "training, ours": lambda: trained(mine, rows, dtype),
            "training, RwkvForCausalLM": lambda: trained(theirs, rows, dtype),
        },
        args.rounds,
    )
    for name, seconds in medians.items():
        print(f"{name}: {rows.numel() / seconds:.0f} tokens/s")
    print(f"training: {medians['training, RwkvForCausalLM'] / medians['training, ours']:.2f} times as fast")


if __name__ == "__main__":
    main()
