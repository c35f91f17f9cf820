"""One vLLM run in its own environment.   usage: VLLM_PYTHON vllm_job.py JOB.json RESULT.json

JOB: {"model", "speculative_config" | null, "prompts": [[token ids]], "max_tokens", "temperature", "seed"}
RESULT: {"token_ids": [[...]], "accepted": [...], "drafted": [...], "rounds": [...]}  one entry a prompt; counts
are empty without speculation. Counts come from the per-request metrics.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # spinning OpenMP threads make vLLM several times slower on shared cores


def main(job_path: str, result_path: str) -> None:
    from vllm import LLM, SamplingParams

    with open(job_path) as file:
        job = json.load(file)
    kwargs = {}
    if job.get("speculative_config") is not None:  # vLLM refuses the per-request metrics without it
        kwargs = {"speculative_config": job["speculative_config"], "per_request_spec_decode_metrics": "summary"}
    llm = LLM(
        job["model"],
        dtype="float32",
        max_model_len=job.get("max_model_len", 1024),
        enforce_eager=True,
        disable_log_stats=False,
        kv_cache_memory_bytes=256 << 20,
        max_num_seqs=8,
        seed=0,
        enable_prefix_caching=False,
        **kwargs,
    )
    sampling = SamplingParams(
        max_tokens=job["max_tokens"],
        temperature=job.get("temperature", 0.0),
        seed=job.get("seed"),
        ignore_eos=job.get("ignore_eos", True),
        detokenize=False,
    )
    result: dict[str, list] = {"token_ids": [], "accepted": [], "drafted": [], "rounds": []}
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
    for output in outputs:
        completion = output.outputs[0]
        result["token_ids"].append(list(completion.token_ids))
        metrics = getattr(completion, "spec_decode_metrics", None)
        if metrics is not None:
            counts = metrics.to_dict()
            result["accepted"].append(counts["num_accepted_draft_tokens"])
            result["drafted"].append(counts["num_draft_tokens"])
            result["rounds"].append(counts["num_spec_steps"])
    with open(result_path, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
    sys.stdout.flush()
    os._exit(0)  # vLLM's threads outlive main; the result is on disk
