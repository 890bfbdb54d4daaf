#!/usr/bin/env python
"""The one program, from the repository: what the command ``diffmoe`` and ``python -m diffmoe`` are,
see diffmoe/__main__.py.
"""

import sys

from diffmoe.__main__ import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
