"""Proposers that need no trained drafter (n-gram, suffix, draft models), and `build`, which makes any proposer."""
