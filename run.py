#!/usr/bin/env python
"""The one program, from the repository: what the command ``diffmoe`` and ``python -m diffmoe`` are,
see diffmoe/__main__.py.
"""

import sys

from diffmoe.__main__ import command, main

__all__ = ["command", "main"]

if __name__ == "__main__":
    sys.exit(command())
