"""`python -m cads`: the command line, for launchers that start a module."""

import sys

from cads.cli.main import main

sys.exit(main())
