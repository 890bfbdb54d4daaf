"""What the launcher's verbs share on the command line: help that ends with an example."""

import argparse

from diffmoe.paths import PathParser


class Parser(PathParser):
    """The parser of a verb, whose help ends with an example that works."""

    def __init__(self, verb: str, description: str, example: str) -> None:
        lines = "\n".join(f"  {line.strip()}" for line in example.strip().splitlines())
        super().__init__(
            prog=f"python -m launcher {verb}",
            description=description,
            epilog=f"example:\n{lines}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
