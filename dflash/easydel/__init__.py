"""EasyDeL behind one door: its models, its forward corrected, its trainer with our step."""

from dflash.easydel.door import EasyDelError, from_target, isolated, load, load_model, to_target

__all__ = ["EasyDelError", "from_target", "isolated", "load", "load_model", "to_target"]
