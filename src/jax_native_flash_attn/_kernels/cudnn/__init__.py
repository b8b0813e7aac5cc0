"""cuDNN's attention kernels, through the public `jax.nn.dot_product_attention(implementation='cudnn')`.

| module | what |
|---|---|
| `public.py` | the calls of `jax.nn`: value, log-sum-exp in float32, and gradients from saved results |
| `operands.py` | from a call to the operands of `jax.nn`: batch axes as one, masks, clean padding |
| `support.py` | what cuDNN and `jax.nn` support of a call, and where |
| `family.py` | the family itself: rows without keys, and results in their prescribed shapes |
"""
