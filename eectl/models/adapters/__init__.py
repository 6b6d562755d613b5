"""Adapters: networks of torchvision, timm and transformers as Backbones, and the networks that no library has.

Each has a function `build`; `models.build` imports it, and with it the library, when a name needs it.
"""
