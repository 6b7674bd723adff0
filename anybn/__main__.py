"""``python -m anybn``."""

import sys

from anybn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
