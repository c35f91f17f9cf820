"""vLLM's own parser and config classes read commands.   usage: VLLM_PYTHON vllm_parse_job.py COMMANDS.json RESULT.json

COMMANDS: {name: [vllm, serve, MODEL, ...]}; RESULT: {name: what vLLM made of it, or {"error": ...}}. No weights read.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def read(command: list[str]) -> dict:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(command[command.index("serve") + 1 :])
    args.model = args.model_tag  # as `vllm serve` does
    validate_parsed_serve_args(args)
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    drafting = config.speculative_config
    draft = drafting.draft_model_config
    return {
        "model": config.model_config.model,
        "port": args.port,
        "max_model_len": config.model_config.max_model_len,
        "method": drafting.method,
        "num_speculative_tokens": drafting.num_speculative_tokens,
        "parallel_drafting": bool(drafting.parallel_drafting),
        "draft_architectures": list(draft.architectures) if draft is not None else None,
        "layer_ids": getattr(getattr(draft, "hf_config", None), "eagle_aux_hidden_state_layer_ids", None),
        "connector": getattr(config.kv_transfer_config, "kv_connector", None),
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
