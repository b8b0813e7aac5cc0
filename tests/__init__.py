"""Tests of jax_native_flash_attn."""
