"""vLLM's own parser and config classes read commands.   usage: VLLM_PYTHON vllm_parse_job.py COMMANDS.json RESULT.json

COMMANDS: {name: [vllm, serve, MODEL, ...]}; RESULT: {name: what vLLM made of it, or {"error": ...}}. No weights read.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
ONLY_IN_V2 = "Model Runner V1 does not support"


def read(command: list[str]) -> dict:
    from vllm.config import ParallelConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(command[command.index("serve") + 1 :])
    args.model = args.model_tag  # as `vllm serve` does
    validate_parsed_serve_args(args)
    try:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        model, drafting = config.model_config, config.speculative_config
    except ValueError as error:
        if ONLY_IN_V2 not in str(error):
            raise
        # The last check of the whole: on this machine vLLM has no runner for the method. Everything before it is read.
        config, engine = None, AsyncEngineArgs.from_cli_args(args)
        model = engine.create_model_config()
        drafting = engine.create_speculative_config(model, ParallelConfig())
    draft = drafting.draft_model_config
    return {
        "model": model.model,
        "needs_runner_v2": config is None,
        "port": args.port,
        "max_model_len": model.max_model_len,
        "method": drafting.method,
        "num_speculative_tokens": drafting.num_speculative_tokens,
        "parallel_drafting": bool(drafting.parallel_drafting),
        "draft_architectures": list(draft.architectures) if draft is not None else None,
        "layer_ids": getattr(getattr(draft, "hf_config", None), "eagle_aux_hidden_state_layer_ids", None),
        "connector": getattr(getattr(config, "kv_transfer_config", None), "kv_connector", None),
    }


def main() -> None:
    results = {}
    with open(sys.argv[1]) as file:
        commands = json.load(file)
    for name, command in commands.items():
        try:
            results[name] = read(command)
        except (Exception, SystemExit) as error:  # what a user would see instead of a server
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    with open(sys.argv[2], "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
