"""Interleaved f+b timing of variants of the backward."""
import os, sys, time
import jax, jax.numpy as jnp, numpy as np
from attention_shapes import find_shape
from benchmark_gpu_table import random_inputs, compile_call
from timing import interleaved_medians
import functools
name=sys.argv[1]; variants=sys.argv[2:]
shape=find_shape(name)
try: shape=shape.with_settings("bfloat16")
except Exception: pass
inputs=random_inputs(shape)
calls={}; res={}
for v in variants:
    for k in ("FUSED","CACHE"): os.environ.pop(k,None)
    impl='flash'
    if v=='cudnn': impl='jax.nn:cudnn'
    elif v!='two':
        a,b=v.split(':'); os.environ['FUSED']=a; os.environ['CACHE']=b
    mode='forward' if v=='fwd' else 'gradient'
    try:
        jax.clear_caches()
        ex=compile_call(impl,shape,mode)
        res[v]=jax.tree.map(lambda x: np.asarray(x,np.float32),jax.block_until_ready(ex(inputs))[1])
        again=jax.tree.map(lambda x: np.asarray(x,np.float32),jax.block_until_ready(ex(inputs))[1])
        same=all(np.array_equal(x,y) for x,y in zip(jax.tree.leaves(res[v]),jax.tree.leaves(again)))
        base=res.get('two')
        err=None if base is None else [float(np.abs(x-y).max()/np.abs(y).max()) for x,y in zip(jax.tree.leaves(res[v]),jax.tree.leaves(base))]
        print(name,v,'same' if same else 'DIFFERS',err,flush=True)
        calls[v]=functools.partial(ex,inputs)
    except Exception as e: print(name,v,type(e).__name__,str(e)[:200],flush=True)
for v,s in sorted(interleaved_medians(calls,repeats=5,sample_seconds=0.01).items(),key=lambda x:x[1]): print(f"RESULT {name} {v} {s*1e3:.3f} ms",flush=True)
