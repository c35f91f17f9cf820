"""Prints the largest error of each rule over every enumerated case: `python tests/verification/report_errors.py`."""

from __future__ import annotations

from exact import chain_parents, emitted_law, independent_drafts, largest_error, paths
from test_exact_law import KINDS, TREE_CASES, tables

from speculators.decoding.verification import resolve_rule


def main() -> None:
    worst: dict[str, float] = {}

    def record(name: str, rule, drafts, target, num_tokens, depth, parents) -> None:
        law, _ = emitted_law(rule, drafts, target, num_tokens, parents)
        worst[name] = max(worst.get(name, 0.0), largest_error(law, target, num_tokens, depth + 1))

    for kind in KINDS:
        for num_tokens, num_slots in [(3, 1), (3, 2), (3, 3), (4, 2)]:
            target, draft = tables(kind, num_tokens, num_slots, seed=num_slots)
            drafts = independent_drafts(draft, chain_parents(num_slots), num_tokens)
            for name in ("strict", "standard", "block"):
                record(f"chain {name}", resolve_rule(name), drafts, target, num_tokens, num_slots, None)
    for drawn, kind, parents in TREE_CASES:
        depth = max(len(path) for path in paths((0,) * len(parents), parents))
        target, draft = tables(kind, 3, depth, seed=len(parents))
        drafts = drawn(draft, parents, 3)
        for name in ("strict", "standard"):
            record(f"tree {name}, {drawn.__name__}", resolve_rule(name), drafts, target, 3, depth, parents)
    for name, error in worst.items():
        print(f"{name:50s} {error:.1e}")


if __name__ == "__main__":
    main()
