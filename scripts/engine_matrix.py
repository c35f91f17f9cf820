"""Rewrites the tables of engines in docs/serving.md from the profiles: `python scripts/engine_matrix.py`.

The tables lie between the marks BEGIN and END; everything in them is from src/speculators/checkpoint/engine_profiles/.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from speculators.checkpoint.engine_profile import OUR_FORMAT, VLLM, EngineProfile, profiles, releases

DOCUMENT = Path(__file__).parents[1] / "docs" / "serving.md"
BEGIN = "<!-- written by scripts/engine_matrix.py: change the profiles, not the tables -->"
END = "<!-- end of what scripts/engine_matrix.py writes -->"
NO = "-"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def drafter_cell(profile: EngineProfile, model_type: str) -> str:
    """The method, and where the engine takes it from."""
    served = profile.drafters.get(model_type)
    if served is None:
        return NO
    more = "".join(f", `{key}`" for key in served.settings if key != "method")
    where = "" if served.format == OUR_FORMAT else f" (export, format `{served.format}`)"
    return f"`{served.settings['method']}`{more}{where}"


def drafters() -> str:
    kinds = dict.fromkeys(kind for profile in profiles() for kind in profile.drafters)
    rows = [[kind, *(drafter_cell(profile, kind) for profile in profiles())] for kind in kinds]
    return table(["drafter", *(profile.title for profile in profiles())], rows)


def methods() -> str:
    """vLLM's methods that take no checkpoint of ours, settings and words: only what differs, or has no drafter type."""
    described = releases(VLLM)
    ours = {served.settings["method"] for profile in described for served in profile.drafters.values()}
    rows = []
    for method in dict.fromkeys(method for profile in described for method in profile.methods):
        if method not in ours:
            said = ["yes" if profile.takes_method(method) else NO for profile in described]
            rows.append([f"method `{method}`", *said])
    rows.append(["older names of `mtp`", *(str(len(profile.old_method_names)) for profile in described)])
    names = dict.fromkeys(name for profile in described for name in profile.settings)
    for name in names:
        said = ["yes" if name in profile.settings else NO for profile in described]
        if len(set(said)) > 1:
            rows.append([f"setting `{name}`", *said])
    words = dict.fromkeys(
        (name, word) for profile in described for name in profile.choices for word in profile.choices[name]
    )
    for name, word in words:
        said = ["yes" if word in profile.choices.get(name, ()) else NO for profile in described]
        is_lossy = name == "rejection_sample_method" and any(word in profile.lossy for profile in described)
        if len(set(said)) > 1 or is_lossy:
            rows.append([f"`{name}: {word}`" + (" (not lossless)" if is_lossy else ""), *said])
    local = ["yes" if profile.serves_local_verifiers_by_checkpoint else NO for profile in described]
    rows.append(["`vllm serve CHECKPOINT` of a verifier in a directory", *local])
    raised = [", ".join(profile.lengthens_drafts_of) for profile in described]
    rows.append(["raises a short `max_position_embeddings` of", *raised])
    kinds = ["any" if p.lengthened_rope_types is None else ", ".join(p.lengthened_rope_types) for p in described]
    rows.append(["with rope types", *kinds])
    rows.append(
        [
            "held in our tests against",
            *("the running engine" if p.held_against == "process" else "its source" for p in described),
        ]
    )
    return table(["vLLM", *(profile.version for profile in described)], rows)


def written() -> str:
    return f"{BEGIN}\n\n{drafters()}\n\n{methods()}\n\n{END}"


def with_tables(text: str) -> str:
    before, rest = text.split(BEGIN)
    return before + written() + rest.split(END)[1]


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    new = with_tables(text)
    DOCUMENT.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
