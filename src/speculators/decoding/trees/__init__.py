"""Draft trees: their shape, and growing them with any drafter. Start at `token_tree`."""
