"""Checks checkpoints, exports them, and starts vLLM. Import the module you need."""
