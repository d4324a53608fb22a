"""Export to Hugging Face directories and import from them: config.json, tensor names, safetensors files, model card."""
