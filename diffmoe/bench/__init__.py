"""``run.py bench KIND …``, one module a kind with ``main(arguments) -> int``."""
