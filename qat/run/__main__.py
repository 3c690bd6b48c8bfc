"""`python -m qat.run <program> ...` is `qat <program> ...`."""

import sys

from qat.run import cli

sys.exit(cli.main(sys.argv[1:]))
