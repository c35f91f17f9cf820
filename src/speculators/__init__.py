"""speculators."""
