"""`flash_attention` inside the attention layers of Flax, Equinox, Haiku and Keras: one module for each library.

Nothing of these libraries is imported before the module of the same name is.
"""
