"""A run for other programs: each draw an ordinary LoRA or a merged model, and a manifest that says what they are."""

from .export import FORMATS, MANIFEST_FILE, TOKENIZER, Manifest, export, read_manifest

__all__ = ["FORMATS", "MANIFEST_FILE", "TOKENIZER", "Manifest", "export", "read_manifest"]
