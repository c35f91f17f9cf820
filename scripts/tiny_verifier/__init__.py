"""How the embedded verifier is made: corpus, tokenizer, training, report. Run by scripts/build_tiny_verifier.py."""
