"""Makes `tests/` importable, so that every test folder can `import toys`."""

import os

# More threads than cores make tiny models several times slower; read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
