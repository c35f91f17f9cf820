"""The command line: one thin file per verb. Nothing imports this package."""

VERBS: dict[str, str] = {
    "quickstart": "Build a drafter for the embedded verifier, measure and prove it: the whole path.",
    "build": "Make a drafter for one's own model: answers, training, measurement, proof, report.",
    "prepare-data": "Turn conversations into tokenised training rows with loss masks.",
    "inspect-mask": "Show which tokens of prepared rows are trained on.",
    "regenerate-responses": "Replace the answers of a dataset by the verifier's own.",
    "generate-offline-data": "Write the verifier's hidden states of a prepared dataset, in process or by a server.",
    "store": "Look after stored hidden states: info, verify (against the verifier), compact.",
    "train": "Train a speculator for a verifier.",
    "generate": "Decode prompts with draft-and-verify and show what was accepted.",
    "serve": "Serve a speculator by vLLM, with its verifier, method and number of draft tokens.",
    "serve-local": "Serve a verifier with its drafter from this process, over OpenAI's interface.",
    "playground": "Open a page on this machine: chat with drafts beside plain decoding, tokens by origin.",
    "launch-vllm": "Start a vLLM server that writes a verifier's hidden states, for training.",
    "check": "Check that a checkpoint is what was trained and what vLLM will serve, before it is served.",
    "export": "Write the directory an engine needs, in its format, with a card that says how to serve it.",
    "convert": "Turn a checkpoint of another project into a speculator.",
    "stitch-mtp": "Write a trained MTP layer into a copy of its verifier, where engines look for it.",
    "verify": "Check that training, the engine and vLLM draft the same tokens with a checkpoint.",
    "diagnose": "Name why drafts are not accepted: of a checkpoint, or of a running server.",
    "evaluate": "Measure drafting methods against plain decoding on held-out prompts.",
    "compare": "Compare two results of evaluate prompt by prompt, with intervals of the differences.",
    "report": "Write one HTML page of results of evaluate: tables, charts, who wrote each token.",
    "plan": "Choose method and draft tokens from results of evaluate, and say what more data is worth.",
}
"""Name -> one line of help. The verb `a-b` is the function `a_b` of `speculators/cli/a_b.py`, or of the file below."""

FILES = {
    **dict.fromkeys(("check", "export", "convert", "stitch-mtp", "verify", "diagnose"), "checkpoints"),
    **dict.fromkeys(("prepare-data", "inspect-mask", "generate-offline-data", "store"), "data"),
    **dict.fromkeys(("compare", "plan", "report"), "results"),
    **dict.fromkeys(("build", "quickstart"), "train"),
    "playground": "serve_local",
}
"""Verb -> the file of its function, where it has another name."""
