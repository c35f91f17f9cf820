"""`python -m speculators.train`, for torchrun: the reports of `speculators train` as lines of text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from speculators.train.config import refuse_missing_paths
from speculators.train.drafters import resolve_all
from speculators.utils.report import exit_code_of, is_first_rank

if TYPE_CHECKING:
    from speculators.train.records import TrainResult


def main(argv: Sequence[str] | None = None) -> int:
    try:
        words = sys.argv[1:] if argv is None else argv
        refuse_missing_paths(words)
        configs = resolve_all(words)
        # here, not at the top: --help must not wait for torch
        from speculators.train.events import print_event, printing
        from speculators.train.run import estimate, train_side_by_side

        if configs[0].estimate:
            found = [estimate(config, print_event) for config in configs]
            if is_first_rank():
                print(*found, sep="\n")
            return 0
        results = train_side_by_side(configs, listen=printing if len(configs) > 1 else lambda name: print_event)
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
    except KeyboardInterrupt as error:
        print(error or "interrupted", file=sys.stderr)
        return 130
    return max(map(summed_up, results)) if is_first_rank() else 0


def summed_up(result: TrainResult) -> int:
    """Prints a result and returns its exit code."""
    print(result.checkpoint)
    check, parity = result.check, result.parity
    for found in [] if check is None else check.findings:
        print(found, file=sys.stderr)
    if check is not None:
        print(f"contract check: {check.verdict}", file=sys.stderr)
    if parity is not None and not parity.passed:
        print(f"error: the parity gate failed: {'; '.join(parity.failures)}", file=sys.stderr)
        return 1
    return 0 if check is None or check.ok else 1


if __name__ == "__main__":
    sys.exit(main())
