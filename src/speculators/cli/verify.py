"""`speculators verify`: the parity gate. A checkpoint drafts the same where it is trained, measured and served."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speculators.cli.console import out, say
from speculators.cli.options import Device, Dtype, NumSpeculativeTokens, TrustRemoteCode

if TYPE_CHECKING:
    from speculators.evaluation import VllmTarget


def verify(
    checkpoint: Annotated[str, typer.Argument(help="Speculator to verify: directory or hub id.")],
    verifier: Annotated[str | None, typer.Option(help="Verifier. Default: the one the checkpoint names.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Conversations: file, directory, hf:<id> or preset. Default: built-in ones.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts to replay.")] = 6,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 48,
    num_speculative_tokens: NumSpeculativeTokens = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    vllm_python: Annotated[
        str | None,
        typer.Option(help="Python with vLLM, or its environment. Default: $SPECULATORS_VLLM_PYTHON, else this one."),
    ] = None,
    with_vllm: Annotated[bool, typer.Option("--vllm/--no-vllm", help="Replay in vLLM too, where it is found.")] = True,
    output: Annotated[Path | None, typer.Option(help="Write the report to this JSON file.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> dict[str, Any]:
    """Check that training, the engine and vLLM draft the same tokens, and that the text is the verifier's. Exit code 1
    when they do not; the first round that differs is named."""
    from speculators import assets, evaluation
    from speculators.checkpoint.io import local_directory

    checkpoint = str(local_directory(checkpoint))
    with tempfile.TemporaryDirectory() as folder:
        report = evaluation.check_parity(
            evaluation.ParityConfig(
                checkpoint=checkpoint,
                verifier=verifier,
                data=prompts or str(assets.prompts_path("heldout")),
                num_prompts=num_prompts,
                max_tokens=max_tokens,
                num_speculative_tokens=num_speculative_tokens,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                vllm=vllm_target(checkpoint, verifier, vllm_python, Path(folder)) if with_vllm else None,
            ),
            on_progress=say,
        )
    out().print(report)
    if output is not None:
        say(f"report: {report.save(output)}")
    report.raise_for_errors()
    return {"verb": "verify", **report.to_dict()}


def vllm_target(checkpoint: str, verifier: str | None, python: str | None, folder: Path) -> VllmTarget | str:
    """What vLLM is to be given: the checkpoint itself, or the directory `export` makes of it. Text: why not."""
    from speculators.checkpoint.formats import SPECULATORS
    from speculators.config import SpeculatorModelConfig
    from speculators.deploy.export import export_checkpoint
    from speculators.deploy.process import find_vllm
    from speculators.evaluation import VllmTarget
    from speculators.model import SpeculatorModel

    try:
        environment = find_vllm(python)
    except ValueError as error:
        if python is not None:
            raise
        return str(error)
    config = SpeculatorModelConfig.from_pretrained(checkpoint)
    contract = SpeculatorModel.registered_model_class_from_config(config).contract
    if contract.served_format is None:
        return f"vLLM has no class for '{config.speculators_model_type}'"
    if contract.served_format == SPECULATORS and verifier is None:  # the directory says everything itself
        return VllmTarget(str(environment.python), checkpoint)
    serving = export_checkpoint(checkpoint, folder / "served", verifier=verifier).serving
    assert serving is not None
    return VllmTarget(str(environment.python), serving.model, dict(serving.speculative_config or {}))
