"""Makes `tests/` importable, so that every test folder can `import toys`."""
