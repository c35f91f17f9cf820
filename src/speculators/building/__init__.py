"""`sp.build`: a drafter for one's own model from its prompts, in one call that goes on wherever it was stopped."""

DEFAULT_BUDGET = "1h"
DEFAULT_DRAFT_TOKENS = (2, 4)
"""Numbers of draft tokens per round to measure."""
AUTO = "auto"
"""The drafter that `train` has by default."""

# what it writes into its directory, beside a directory per drafter
STATE, LOCK = "build.json", ".build.lock"
PROMPTS, ANSWERS, ROWS, PILOT = "prompts", "responses.jsonl", "data", "pilot"
RESULT, REPORT, PAGE = "evaluation.json", "report.md", "report.html"
END = "end"
"""The last step."""
WRITTEN = (STATE, LOCK, PROMPTS, ROWS, PILOT, RESULT, f"{RESULT}.lock", REPORT, PAGE)
