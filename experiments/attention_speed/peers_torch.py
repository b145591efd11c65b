"""PyTorch's attention under FIRE and without a bias, a turn at a time, for `run.py` to measure.

    python experiments/attention_speed/peers_torch.py --threads=2 <<< 'REQUEST'

REQUEST being {"implementation": "sdpa", "encoding": "fire", "length": 2048, "backward": true,
"dtype": "float32"}. Prints a line of JSON about itself, then one for each request that it reads:
the seconds of one pass, or why there are none. Nothing of lex_fire is needed.
"""

import argparse
import functools
import json
import platform
import sys
import time

try:
  import torch
  from torch.nn import functional
except ImportError as missing:
  print(json.dumps({'reason': str(missing)}))
  sys.exit(1)

HEADS, HEAD_DIM = 12, 64
WIDTH = 32  # of FIRE's MLP
FROZEN = 'fire, frozen'  # an encoding: FIRE, of whose own parameters no gradient is asked
LEAST_TURN = (
  0.02  # seconds; shorter passes are repeated, so that the clock and the call do not count
)


def interpolation(c, length_multiplier, i, j):
  """Returns FIRE's x in [0, 1] of query positions i and key positions j, which broadcast."""
  threshold = torch.abs(length_multiplier * 512.0)

  def psi(distance):
    return torch.log(torch.abs(c) * distance + 1)

  distance, i = torch.clamp(i - j, min=0).to(torch.float32), i.to(torch.float32)
  return psi(distance) / (psi(torch.maximum(threshold, i)) + 1e-6)


class Fire(torch.nn.Module):
  """FIRE's bias, as a module does it: f_h(log(c d + 1) / (log(c max(L, i) + 1) + eps)).

  Li et al. 2023, arXiv:2310.04418, section 3 and appendix: f an MLP with one hidden layer.
  """

  def __init__(self):
    super().__init__()
    self.hidden, self.out = torch.nn.Linear(1, WIDTH), torch.nn.Linear(WIDTH, HEADS)
    self.c = torch.nn.Parameter(torch.tensor(0.1))
    self.length_multiplier = torch.nn.Parameter(torch.tensor(1.0))

  def forward(self, length: int):
    """Returns the bias [H, Q, K]; -inf hides keys after the query."""
    position = torch.arange(length, device=self.c.device)
    i, j = position[:, None], position[None]
    x = interpolation(self.c, self.length_multiplier, i, j)
    bias = self.out(torch.relu(self.hidden(x[..., None])))
    return bias.permute(2, 0, 1).masked_fill(j > i, -torch.inf)

  def score(self):
    """Returns a score with its bias, as FlexAttention wants it: of scalars alone.

    Its backward pass on GPUs adds up the gradients of arrays that are indexed, each only once, and
    by a position or the head: so each number is an array of its own, repeated for each head.
    """

    def of_heads(numbers):
      return numbers.expand(-1, HEADS).contiguous().unbind()

    c, multiplier = of_heads(torch.stack([self.c, self.length_multiplier])[:, None])
    columns = self.hidden.weight, self.hidden.bias[:, None], self.out.weight.T
    units = list(zip(*map(of_heads, columns), strict=True))
    constant = self.out.bias.clone()

    def with_bias(score, batch, head, i, j):
      del batch
      x, bias = interpolation(c[head], multiplier[head], i, j), constant[head]
      for weight, shift, out in units:
        bias = bias + torch.relu(weight[head] * x + shift[head]) * out[head]
      return score + bias

    return with_bias


def sdpa(query, key, value, fire):
  """With the module's bias, which is [H, Q, K], or with none."""
  if fire is None:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)
  bias = fire(query.shape[2])[None].to(query.dtype)
  return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)


@functools.cache
def causal(length: int, device: str):
  """Returns FlexAttention's mask."""
  from torch.nn.attention import flex_attention

  return flex_attention.create_block_mask(
    lambda batch, head, i, j: j <= i, None, None, length, length, device=device
  )


@functools.cache
def compiled_flex():
  """Returns FlexAttention, which is made for being compiled."""
  from torch.nn.attention import flex_attention

  # Anew for each length, and never given up: else, after a few, it would run uncompiled and dense.
  torch._dynamo.config.recompile_limit = 100
  torch._dynamo.config.fail_on_recompile_limit_hit = True
  return torch.compile(flex_attention.flex_attention, dynamic=False)


def flex(query, key, value, fire):
  """With the bias computed where the scores are, or with none."""
  mask, score = causal(query.shape[2], query.device.type), None if fire is None else fire.score()
  return compiled_flex()(query, key, value, score_mod=score, block_mask=mask)


IMPLEMENTATIONS = {'sdpa': sdpa, 'flex': flex}


def make(implementation: str, encoding: str, length: int, backward: bool, dtype: str, device: str):
  """Returns a function that runs one pass to its end and returns nothing."""
  torch.manual_seed(0)
  fire = None if encoding == 'nope' else Fire().to(device)
  if fire is not None:
    fire.requires_grad_(backward and encoding != FROZEN)
  shape, options = (1, HEADS, length, HEAD_DIM), {'device': device, 'dtype': getattr(torch, dtype)}
  arrays = [torch.randn(shape, **options).requires_grad_(backward) for _ in range(3)]
  d_out = torch.randn(shape, **options)
  learned = () if fire is None else fire.parameters()
  wanted = [*arrays, *(number for number in learned if number.requires_grad)]

  def run():
    with torch.set_grad_enabled(backward):
      out = IMPLEMENTATIONS[implementation](*arrays, fire)
      if backward:
        torch.autograd.grad(out, wanted, d_out)
    if device == 'cuda':
      torch.cuda.synchronize()

  return run


@functools.lru_cache(maxsize=16)
def ready(**request):
  """Returns a pass that has been compiled, and how often a turn repeats it."""
  run = make(**request)
  run()
  start = time.perf_counter()
  run()
  return run, max(1, round(LEAST_TURN / (time.perf_counter() - start)))


def turn(**request) -> dict:
  """Returns the seconds of a pass, or what the library says."""
  try:
    run, repeats = ready(**request)
  except Exception as error:  # a library says in many kinds of exceptions what it cannot do
    return {'reason': f'{type(error).__name__}: {error}'}
  start = time.perf_counter()
  for _ in range(repeats):
    run()
  return {'seconds': (time.perf_counter() - start) / repeats}


def main() -> None:
  """Answers requests until there are no more."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--threads', type=int, required=True, help='that products may use on a CPU')
  torch.set_num_threads(parser.parse_args().threads)
  answers, sys.stdout = sys.stdout, sys.stderr  # libraries print what is not JSON

  def answer(line):
    print(json.dumps(line), file=answers, flush=True)

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  name = torch.cuda.get_device_name() if device == 'cuda' else platform.processor()
  answer({'torch': torch.__version__, 'device': device, 'name': name})
  for line in sys.stdin:
    answer(turn(device=device, **json.loads(line)))


if __name__ == '__main__':
  main()
