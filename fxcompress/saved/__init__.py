"""Compressed models on disk: written, read and checked, Hugging Face models among them."""
