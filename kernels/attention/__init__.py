"""Scaled dot-product attention, fused: the scores never reach memory."""
