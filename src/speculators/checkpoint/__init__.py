"""Checkpoints on disk: what a directory holds, in which format, what vLLM reads of it, what it was trained with.

    formats.py     `CheckpointContract`: what an algorithm says of its checkpoints; its model class names it.
                   `CheckpointFormat`: one directory format of another project, read and written
    io.py          opens a directory of any format in our terms; writes ours
    record.py      `training_record.json`, beside the weights
    findings.py    `Finding`: what is wrong with a checkpoint, and how to fix it

`model` stands on `formats`, and `io` on `model`: import from the modules.
"""
