"""The model card of a trained model."""

import contextlib
import json

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.hf import card


def test_the_card_has_sizes_recipe_and_held_out_loss(lab):
    loss = json.load(open(f"{lab.workdir('memory')}/result.json"))["validation"]["loss"]
    with contextlib.closing(TrainedModel(lab.workdir("memory"))) as model:
        text = card.text(model, "bfloat16")
        data = model.description.data.digest
    head, _, body = text.removeprefix("---\n").partition("---\n")
    assert head.splitlines()[-2:] == ["- memoryllm", "- memoryllm_jax"]
    for line in (
        "# memory",
        "- dtype: bfloat16",
        f"- training: 16 steps, {16 * 8 * 32:,} tokens, seed 0",
        f"- data: digest {data}",
        f"- held-out text: {loss:.4f} nats a token",
        "model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)",
    ):
        assert line in body


def test_the_card_of_an_untrained_model_has_no_recipe_and_no_loss(untrained):
    with contextlib.closing(TrainedModel(untrained("flex"))) as model:
        text = card.text(model, "float32")
    assert "training:" not in text and "held-out" not in text and "(2 for keys and values)" in text
