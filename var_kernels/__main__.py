"""``python -m var_kernels`` is the ``var-kernels`` command."""

import sys

from var_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
