"""Models in Hugging Face's layout: names of tensors, config.json, safetensors files and tokenizers, both ways."""
