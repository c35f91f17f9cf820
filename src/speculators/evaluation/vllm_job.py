"""Runs of vLLM in its own environment.   usage: VLLM_PYTHON vllm_job.py JOB.json RESULT.json

JOB: a list of `parity_vllm.VllmRun`s, RESULT: a list of `parity_vllm.VllmResult`s. Imports nothing of this package: it
is not installed there. Counts come from the per-request metrics.
"""

import gc
import json
import os
import sys
import time
import traceback

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: starts in seconds, leaves no orphans
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # spinning OpenMP threads make vLLM several times slower on shared cores


def decode(run: dict) -> dict:
    from vllm import LLM, SamplingParams

    begun_s = time.perf_counter()
    arguments = dict(run["engine"])
    if run["speculative_config"] is not None:  # vLLM refuses the per-request metrics without it
        arguments |= {"speculative_config": run["speculative_config"], "per_request_spec_decode_metrics": "summary"}
    llm = LLM(run["model"], **arguments)
    settings = dict(run["sampling"])
    seeds = settings.pop("seeds", None) or [None] * len(run["prompts"])
    sampling = [
        SamplingParams(max_tokens=run["max_tokens"], ignore_eos=True, detokenize=False, seed=seed, **settings)
        for seed in seeds
    ]
    result: dict[str, list] = {"token_ids": [], "accepted": [], "drafted": [], "rounds": []}
    for output in llm.generate([{"prompt_token_ids": ids} for ids in run["prompts"]], sampling, use_tqdm=False):
        completion = output.outputs[0]
        result["token_ids"].append(list(completion.token_ids))
        metrics = getattr(completion, "spec_decode_metrics", None)
        if metrics is not None:
            counts = metrics.to_dict()
            result["accepted"].append(counts["num_accepted_draft_tokens"])
            result["drafted"].append(counts["num_draft_tokens"])
            result["rounds"].append(counts["num_spec_steps"])
    return {**result, "time_s": time.perf_counter() - begun_s}


def main(job_path: str, result_path: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    with open(job_path) as file:
        runs = json.load(file)
    results = []
    for run in runs:
        try:
            results.append(decode(run))
        except Exception:  # whatever stops this run is its result; the next has an engine of its own
            results.append({"error": traceback.format_exc()[-4000:]})
        cleanup_dist_env_and_memory()
        gc.collect()
    with open(result_path, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
    sys.stdout.flush()
    os._exit(0)  # vLLM's threads outlive main; the result is on disk
