"""Export of a model to Hugging Face, GGUF and PEFT formats."""
