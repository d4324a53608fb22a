"""memoryllm_jax: pretrain MemoryLLM models and serve them from token-wise lookups."""
