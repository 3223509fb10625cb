"""`python -m lowmem_optim` is `lowmem doctor`."""

import sys

from lowmem_optim.cli import app

app(["doctor", *sys.argv[1:]], prog_name="lowmem")
