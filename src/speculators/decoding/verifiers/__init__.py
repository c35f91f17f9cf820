"""Verifiers of the decode loop: Hugging Face models on a cache that drops rejected drafts. Start at `hf_verifier`."""
