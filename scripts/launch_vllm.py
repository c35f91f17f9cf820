"""For guides that say `python scripts/launch_vllm.py MODEL [options] -- VLLM_ARGS`: it is `speculators launch-vllm`."""

import sys

from speculators.cli.app import main

sys.exit(main(["launch-vllm", *sys.argv[1:]]))
