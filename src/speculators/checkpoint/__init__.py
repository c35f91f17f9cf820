"""Reads, writes and describes checkpoints on disk: their formats, what vLLM reads of them, how they were trained.

    formats.py     `CheckpointContract`: what an algorithm says of its checkpoints; its model class names it.
                   `CheckpointFormat`: one directory format of another project, read and written
    io.py          opens a directory of any format in our terms; writes ours
    engine_profile.py  `EngineProfile`: what one release of vLLM or SGLang takes; one file each in engine_profiles/
    record.py      `training_record.json`, beside the weights
    findings.py    `Finding`: what is wrong with a checkpoint, and how to fix it

`model` imports `formats`, and `io` imports `model`: import from the modules.
"""
