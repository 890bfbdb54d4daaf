"""What the launcher's verbs share on the command line: help that ends with an example, complaints of one line."""

import argparse

from diffmoe.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is a UserError of one line, and whose help ends with an example that works."""

    def __init__(self, verb: str, description: str, example: str) -> None:
        lines = "\n".join(f"  {line.strip()}" for line in example.strip().splitlines())
        super().__init__(prog=f"python -m launcher {verb}", description=description, epilog=f"example:\n{lines}",
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")
