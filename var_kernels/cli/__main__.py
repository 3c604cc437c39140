"""``python -m var_kernels.cli`` (and so ``torchrun -m var_kernels.cli train ...``) is the ``var-kernels`` command."""

import sys

from var_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
