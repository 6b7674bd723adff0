"""The command line, ``python -m anybn``."""
