"""Capacity planning: traces of requests, costs fitted from a step log, the real engine in virtual time, a search.

Nothing here touches a device or imports jax. The commands `trace`, `fit`, `simulate` and `plan` are its faces.
"""
