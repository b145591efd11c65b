"""What holds for every test: 8 CPU devices, quick compilation, no silent broadcasting of ranks."""

import importlib.metadata
import os

_FLAGS = [
  '--xla_force_host_platform_device_count=8',
  # Tests compile hundreds of tiny programs and run each once or twice: a program compiles in an
  # eighth of the time when neither XLA nor LLVM optimises its loops.
  '--xla_backend_optimization_level=0',
  '--xla_llvm_disable_expensive_passes=true',
]
# A flag that XLA does not know ends the process, and this one, half of the gain, is gone in 0.12.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  _FLAGS.append('--xla_cpu_use_fusion_emitters=false')

# Both are read once, when jax is imported.
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *_FLAGS]).strip()
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
