"""What every drafter is taught is what its verifier says: soft caps, scales and norms of gain 1 + w included.

The target logits that reach the loss are compared with the logits of the verifier's own forward over the same tokens.
"""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.losses.chunks import HeadTargets
from speculators.model import SpeculatorModel
from speculators.verifier import capture_states

VOCAB, HIDDEN, LENGTH = 40, 16, 24
# By family: model type, fields, keys that are not on disk, so that the class's default holds.
VERIFIERS = {
    "soft cap by class default": (
        "gemma2",
        {"head_dim": 8, "sliding_window": 64, "initializer_range": 6.0},
        ["final_logit_softcapping"],
    ),
    "LayerNorm, scale by class default": ("cohere", {}, ["logit_scale", "layer_norm_eps"]),
    "LayerNorm with a bias": ("stablelm", {"tie_word_embeddings": False}, ["layer_norm_eps"]),
    "soft cap, 1 + w": ("gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8, "sliding_window": 64}, []),
    "scale": ("granite", {"logits_scaling": 2.5, "tie_word_embeddings": False}, []),
    "plain": ("llama", {"tie_word_embeddings": False}, []),
    "1 + w": (
        "qwen3_5_text",
        {
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "tie_word_embeddings": False,
        },
        [],
    ),
}
DRAFTERS = ("eagle3", "peagle", "dflash", "dspark", "eagle", "medusa", "mlp")
CASES = [(drafter, verifier) for drafter in DRAFTERS for verifier in VERIFIERS if verifier != "plain"]
# An MTP layer has its verifier's shape: of families whose layers exist, none caps or scales.
CASES += [("mtp", "plain"), ("mtp", "1 + w")]


@pytest.fixture(scope="module")
def verifiers(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            model_type, fields, missing = VERIFIERS[name]
            config = AutoConfig.for_model(
                model_type,
                vocab_size=VOCAB,
                hidden_size=HIDDEN,
                intermediate_size=24,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                eos_token_id=None,
                bos_token_id=None,
                pad_token_id=None,
                **{"initializer_range": 0.4, **fields},
            )
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            model.model.norm.weight.data += 0.5 * torch.randn(HIDDEN)
            made[name] = tmp_path_factory.mktemp(model_type), model
            if getattr(model.model.norm, "bias", None) is not None:
                model.model.norm.bias.data += 0.5 * torch.randn(HIDDEN)
            model.save_pretrained(made[name][0])
            leave_out(made[name][0] / "config.json", missing)
        return made[name]

    return make


def leave_out(file, keys):
    values = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in values.items() if key not in keys}))


def drafter_of(name, path):
    kind = Qwen3Config if name in ("dflash", "dspark") else LlamaConfig
    nested = kind(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
    )
    return SpeculatorModel.get_class(name).from_training_args(
        AutoConfig.from_pretrained(path) if name == "mtp" else nested,
        t2d=None,
        d2t=None,
        draft_vocab_size=VOCAB,
        verifier_name_or_path=str(path),
        target_layer_ids=[1, 2, 3],
        block_size=4,
        mask_token_id=VOCAB - 1,
    )


@pytest.mark.parametrize(("drafter", "verifier"), CASES)
def test_targets_are_the_verifiers_own_logits(drafter, verifier, verifiers, monkeypatch):
    path, model = verifiers(verifier)
    speculator = drafter_of(drafter, path)
    tokens = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1))
    ids = tuple(speculator.target_layer_ids) if speculator.capture.aux_layer_ids else ()
    with torch.no_grad(), capture_states(model, CaptureSpec(ids, last_hidden=True)) as captured:
        logits_TV = model(tokens[None]).logits[0]
    aux = captured.aux[0] if ids else None
    row = speculator.training_row(VerifierStates(tokens, aux, captured.last_hidden[0]))

    seen = []
    plain = HeadTargets.logits

    def listening(self, rows_C, dtype):
        out_CV = plain(self, rows_C, dtype)
        # rows are columns of the batch, whose last one is the last token's
        seen.append((rows_C + LENGTH - len(self.hidden_TH), out_CV))
        return out_CV

    monkeypatch.setattr(HeadTargets, "logits", listening)
    kwargs, _ = speculator.get_trainer_kwargs(
        loss_fn="kl_div", ttt_steps=2, ttt_step_loss_decay=1.0, num_speculative_steps=3, max_anchors=64
    )
    _, loss, _ = speculator(**row, **kwargs)
    columns = torch.cat([columns_C for columns_C, _ in seen])
    assert bool(torch.isfinite(loss)) and len(columns.unique()) >= LENGTH // 2
    torch.testing.assert_close(torch.cat([x for _, x in seen]), logits_TV[columns], atol=2e-5, rtol=1e-4)
