"""For guides that say `torchrun ... scripts/train.py`: the same as `python -m speculators.train`."""

from speculators.train.__main__ import main

raise SystemExit(main())
