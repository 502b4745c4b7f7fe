"""Compiles grammars from its input, a line of JSON each, and says of each that it has: see grammar_check.py, which runs
this file as a program. Whether a grammar is right is not its matter."""

import sys
import threading

from llguidance import LLMatcher

STACK = 1 << 28  # bytes, as in engine/constraints.py


def work() -> None:
    for line in sys.stdin:
        LLMatcher.validate_grammar(line)
        print("compiled", flush=True)


if __name__ == "__main__":
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), int(sys.argv[1])))
    except ImportError:  # Windows
        pass
    threading.stack_size(STACK)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
