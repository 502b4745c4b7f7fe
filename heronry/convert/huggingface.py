"""A checkpoint of BlinkDL's as a folder in Hugging Face's layout, by the command line shown in the blog post on RWKV:

    python -m heronry.convert.huggingface --repo_id BlinkDL/rwkv-4-pile-169m \\
        --checkpoint_file RWKV-4-Pile-169M-20220807-8023.pth --output_dir rwkv-4-169m --tokenizer_file tokenizer.json

The repository may be a local folder. `heronry convert FILE OUT --to huggingface` does the same for a file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import hub
from ..errors import InputError
from ..faults import exit_with_a_line
from .conversion import convert


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and converts. arguments: None = those of the process."""
    description = "A checkpoint of BlinkDL's as a folder in Hugging Face's layout"
    parser = argparse.ArgumentParser(prog="heronry.convert.huggingface", description=description)
    parser.add_argument("--repo_id", required=True, help="repository on the hub, or a folder, with the checkpoint")
    parser.add_argument("--checkpoint_file", required=True, help="the file in it")
    parser.add_argument("--output_dir", required=True, type=Path, help="the folder to write")
    parser.add_argument("--tokenizer_file", help="a tokenizer.json; World and bytes are recognized by the vocabulary")
    parser.add_argument("--size", help="ignored, for compatibility: it is read off the weights")
    parser.add_argument("--is_world_tokenizer", action="store_true", help="ignored, for compatibility")
    parser.add_argument("--push_to_hub", action="store_true", help="upload the folder")
    parser.add_argument("--model_name", help="the repository to upload to")
    args = parser.parse_args(arguments)
    with exit_with_a_line():
        if args.push_to_hub and not args.model_name:
            raise InputError("--push_to_hub needs the name of a repository: --model_name OWNER/NAME")
        local = Path(args.repo_id).expanduser() / args.checkpoint_file
        source = local if local.exists() else hub.fetch(f"hf://{args.repo_id}/{args.checkpoint_file}")
        result = convert(source, args.output_dir, "huggingface", tokenizer=args.tokenizer_file)
        print(f"{args.output_dir}: logits of both differ by at most {result.difference:.2g}, of {result.largest:.3g}")
        if args.push_to_hub:
            hub.push(args.output_dir, args.model_name)
            print(f"uploaded to {args.model_name}")


if __name__ == "__main__":
    main()
