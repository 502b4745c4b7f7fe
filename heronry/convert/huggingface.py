"""A checkpoint of BlinkDL's as a folder of Hugging Face's, by the command line that the blog post on RWKV shows:

    python -m heronry.convert.huggingface --repo_id BlinkDL/rwkv-4-pile-169m \\
        --checkpoint_file RWKV-4-Pile-169M-20220807-8023.pth --output_dir rwkv-4-169m --tokenizer_file tokenizer.json

The repository may be a local folder. `heronry convert FILE OUT --to huggingface` does the same for a file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import hub
from ..errors import InputError
from .conversion import convert


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(prog="heronry.convert.huggingface", description=__doc__.splitlines()[0])
    options.add_argument("--repo_id", required=True, help="repository of the hub, or a folder, that has the checkpoint")
    options.add_argument("--checkpoint_file", required=True, help="the file in it")
    options.add_argument("--output_dir", required=True, type=Path, help="the folder to write")
    options.add_argument("--tokenizer_file", help="a tokenizer.json; World and bytes are told by the vocabulary")
    options.add_argument("--size", help="read off the weights; taken for the sake of older scripts")
    options.add_argument("--is_world_tokenizer", action="store_true", help="the same")
    options.add_argument("--push_to_hub", action="store_true", help="upload the folder")
    options.add_argument("--model_name", help="the repository to upload to")
    args = options.parse_args(arguments)
    try:
        if args.push_to_hub and not args.model_name:
            raise InputError("--push_to_hub takes the name of a repository: --model_name OWNER/NAME")
        local = Path(args.repo_id).expanduser() / args.checkpoint_file
        source = local if local.exists() else hub.fetch(f"hf://{args.repo_id}/{args.checkpoint_file}")
        done = convert(source, args.output_dir, "huggingface", tokenizer=args.tokenizer_file)
        print(f"{args.output_dir}: logits of both at most {done.difference:.2g} apart, of {done.largest:.3g}")
        if args.push_to_hub:
            hub.push(args.output_dir, args.model_name)
            print(f"uploaded to {args.model_name}")
    except InputError as error:
        sys.exit(f"heronry: {error}")


if __name__ == "__main__":
    main()
