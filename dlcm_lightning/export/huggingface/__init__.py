"""A model as Hugging Face's transformers loads it: `folder.py` writes it, `modeling_dlcm.py` is what loads it."""
