"""Drafting algorithms: one folder each."""
