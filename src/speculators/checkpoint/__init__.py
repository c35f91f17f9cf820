"""Checkpoints on disk: what a directory holds, in which format, what vLLM reads of it, what it was trained with.

    formats.py     `CheckpointFormat`: one directory format of another project, read and written
    contract.py    `CheckpointContract`: what an algorithm says of its checkpoints; its model class names it
    io.py          opened in our terms, whatever the format; written as ours
    record.py      `training_record.json`, beside the weights
    findings.py    `Finding`: what is wrong with a checkpoint, and how it is mended

`model` stands on `contract`, and `io` on `model`: import from the modules.
"""
