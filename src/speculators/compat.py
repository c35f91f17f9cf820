"""Serves module paths of earlier releases whose functions stand elsewhere now: `speculators.models.utils`, say.

A path of the table that has no file is made when it is imported, and each of its names is imported when it is first
used. Importing this file installs that, once; it imports nothing else of the library.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

PACKAGE = "speculators"
VERIFIER_CONFIG = "verifier.config"
ATTENTION = ("ALL_ATTENTION_FUNCTIONS", "block_mask_to_dense_attention_mask", "flex_attention_forward")
LOSSES = ("ce_loss", "compound_loss", "dflash_loss_decay", "dpace_loss_decay", "exp_loss_decay", "kl_div_loss")
EARLIER = "convert.earlier"
NAMES_OF: dict[str, dict[str, str]] = {
    "convert.dflash": {"DFlashConverter": EARLIER},
    "convert.eagle": {"Eagle3Converter": EARLIER},
    "convert.eagle.utils": dict.fromkeys(
        ("Eagle3Converter", "detect_fusion_bias_and_layernorms", "find_vocab_size"), EARLIER
    ),
    "convert.mtp": dict.fromkeys(("MTPConverter", "MTP_EXACT_REMAP", "MTP_PREFIX_REMAP"), EARLIER),
    "convert.utils": dict.fromkeys(
        (
            "Converter",
            "download_checkpoint_from_hub",
            "ensure_checkpoint_is_local",
            "load_checkpoint_config",
            "load_checkpoint_weights",
        ),
        EARLIER,
    ),
    "models.base_components": dict.fromkeys(
        ("ModelComponents", "model_classes", "override_components"), "models.attention"
    ),
    "models.dflash.attention": {"create_anchor_block_mask_mod": "models.dflash.block_attention"},
    "models.dflash.utils": dict.fromkeys(
        ("get_base_indices_for_anchored_blocks", "select_anchors"), "models.dflash.metrics"
    ),
    "models.dspark.metrics": {"compute_metrics": "models.dspark.training"},
    "models.eagle3.attention": dict.fromkeys(
        (*ATTENTION, "create_combined_mask_mod", "extend_mask_for_draft_tokens"), "models.attention"
    ),
    "models.eagle3.data": {"shift_batch": "models.eagle3.training"},
    "models.metrics": {
        **dict.fromkeys(
            ("compute_accepted_length_counts", "compute_accuracy_multi_step", "compute_accuracy_single_step"),
            "models.supervision",
        ),
        **dict.fromkeys((*LOSSES, "LossConfig", "loss_function", "resolve_loss_config", "tv_loss"), "losses.registry"),
    },
    "models.mtp.data": {"shift_batch_mtp": "models.mtp.training"},
    "models.peagle.data": {
        "generate_cod_sample_indices": "models.peagle.training",
        "shift_batch": "models.eagle3.training",
    },
    "models.utils": {
        "conditional_torch_compile": "models.attention",
        "flatten_rope_parameters": VERIFIER_CONFIG,
        "get_verifier_config": VERIFIER_CONFIG,
        "resolve_draft_intermediate_size": VERIFIER_CONFIG,
        "resolve_target_layer_ids": VERIFIER_CONFIG,
        "resolve_verifier_norm_class": "verifier.loading",
    },
}
"""Path of an earlier release -> its public names -> the module that defines each, all below the package."""


class EarlierPaths(MetaPathFinder, Loader):
    """Makes the modules of `NAMES_OF`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name = fullname.removeprefix(f"{PACKAGE}.")
        if name not in NAMES_OF or name == fullname:
            return None
        return spec_from_loader(fullname, self, is_package=any(other.startswith(f"{name}.") for other in NAMES_OF))

    def exec_module(self, module: ModuleType) -> None:
        path = module.__name__.removeprefix(f"{PACKAGE}.")
        home_of = NAMES_OF[path]

        def get(name: str) -> Any:
            if name not in home_of:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return getattr(importlib.import_module(f"{PACKAGE}.{home_of[name]}"), name)

        module.__doc__ = f"Names of earlier releases; they are defined in {', '.join(sorted(set(home_of.values())))}."
        vars(module).update(__all__=sorted(home_of), __getattr__=get, __dir__=lambda: sorted(home_of))


if not any(type(finder).__name__ == EarlierPaths.__name__ for finder in sys.meta_path):
    sys.meta_path.append(EarlierPaths())
