"""Training: one config, prepared data and a verifier in; a speculator directory out. `run.train` is the front door."""
