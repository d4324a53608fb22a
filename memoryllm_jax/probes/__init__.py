"""The paper's measurements of trained models, each a command of `memoryllm_jax.probe`."""
