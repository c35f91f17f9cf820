"""Makes `deploy_toys` importable."""
