"""The command line: one thin file a verb. Nothing imports this package."""
