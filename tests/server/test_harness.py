"""The harness's own adapter of OpenAI's API against the server, and ours: the same scores and texts."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def adapters(lab, served, address, tmp_path_factory):
    """(the harness's adapter of the server, ours of the same engine)."""
    pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'memoryllm_jax[eval]'")
    pytest.importorskip("transformers", "5.0", reason="its adapter tokenizes by transformers")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from memoryllm_jax.evaluation.harness import MemoryLLM
    from memoryllm_jax.hf.export import export_model

    tokenizer = tmp_path_factory.mktemp("exported")
    export_model(lab.workdir("flex-3"), str(tokenizer))
    theirs = LocalCompletionsAPI(
        base_url=f"{address}/v1/completions",
        model="tiny",
        tokenizer=str(tokenizer),
        tokenizer_backend="huggingface",
        max_length=served.context,
        add_bos_token=True,
        batch_size=2,
        num_concurrent=2,
    )
    return theirs, MemoryLLM(served.engine)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, 0) for pair in arguments]


def test_scores_and_texts_are_those_of_our_adapter(adapters):
    pairs = [("The list of", " names"), ("def f(x): ", "return x"), ("A", "B"), ("It is", " the"), ("", "class A")]
    contexts = [context for context, _ in pairs[:4]]
    one = {"until": [], "max_gen_toks": 1, "do_sample": False}
    likeliest = adapters[1].generate_until(requests("generate_until", *((context, one) for context in contexts)))
    pairs += zip(contexts, likeliest)
    theirs, ours = (adapter.loglikelihood(requests("loglikelihood", *pairs)) for adapter in adapters)
    np.testing.assert_allclose([p for p, _ in theirs], [p for p, _ in ours], atol=1e-4)
    flags = [greedy for _, greedy in ours]
    assert [greedy for _, greedy in theirs] == flags and any(flags) and not all(flags)
    how = {"until": ["\n\n", "th"], "max_gen_toks": 12, "do_sample": False}
    to_continue = requests("generate_until", *((context, how) for context in contexts))
    theirs, ours = (adapter.generate_until(to_continue) for adapter in adapters)
    assert theirs == ours
