"""Tool calls and reasoning in the texts of models; see formats.py."""
