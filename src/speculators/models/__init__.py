"""Drafting algorithms, one folder each. The folder's name is the algorithm's name everywhere: in `config.json`
(`speculators_model_type`), in the registries and in `--speculator-type`. Folders are imported when first asked for.

Adding an algorithm
-------------------

1. A folder `speculators/models/<name>/` with `config.py`, `core.py` and an `__init__.py` that exports both classes.
   (Outside this package: any module; import it before use, or name it in the entry-point group `speculators.models`
   of your distribution: `<name> = "your_package.your_module"`.)

2. The config, what is written in config.json::

       @SpeculatorModelConfig.register("myalgo")
       class MyAlgoConfig(SpeculatorModelConfig):
           speculators_model_type: str = "myalgo"
           transformer_layer_config: PretrainedConfig = Field(default_factory=Qwen3Config)
           draft_vocab_size: int = 32000

3. The model::

       @SpeculatorModel.register("myalgo")
       class MyAlgoModel(DraftVocabMixin, SpeculatorModel):      # the mixin: embedding, head, draft vocabulary
           config_class = MyAlgoConfig

           def __init__(self, config):
               super().__init__(config)
               self.layers = nn.ModuleList(...)                  # memory is estimated by their number
               self.post_init()

           @classmethod
           def config_values(cls, layer_config, args): ...       # fields of a new drafter's config, of DrafterArgs

           def train_on(self, batch, args): ...                  # of PackedBatch and LossArgs: LossOutput

   From these `SpeculatorModel` makes `from_training_args`, `get_trainer_kwargs` and `forward`, which a class may also
   override (see `speculators.model_training`). `docs/adding-an-algorithm.md` has a whole algorithm in forty lines.

4. Each of these has a working default (see `SpeculatorModel`): `target_layer_ids` and `capture` (which verifier states
   it reads), `training_args` and `training_defaults` (its own keys on the command line), `align` (shifts before
   packing), `make_proposer` and `make_tree_drafter` (drafting at decode time), `draft_logits` (the parity gate compares
   drafts with them), `contract` (what its checkpoints hold, what vLLM makes of them, formats of other projects).
"""

from __future__ import annotations

from speculators.utils.names import exported_classes, lazy_attributes

FOLDER_OF = exported_classes(__path__)
"""Exported class name -> algorithm folder."""

__all__ = sorted(FOLDER_OF)
__getattr__, __dir__ = lazy_attributes(__name__, FOLDER_OF)
