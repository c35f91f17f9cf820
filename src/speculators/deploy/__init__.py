"""What stands between a checkpoint and a server: checks, exports, and starting vLLM. Import the module you need."""
