"""The function of `jax.nn` that this library replaces, for what calls cuDNN."""

from typing import Any

import jax

# By the time of a call a user may have put ours in its place. Ours carries it, should this module be imported once more
# by then.
jax_attention: Any = getattr(jax.nn.dot_product_attention, "replaces", jax.nn.dot_product_attention)
