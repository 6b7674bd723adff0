"""The command line, ``anybn`` or ``python -m anybn``."""
