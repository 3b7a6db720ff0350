"""Keeps pytest from importing the generator, which needs torch."""

collect_ignore = ["make_hf.py", "make_hf_folder.py"]
