"""The PyTorch side of the CPU throughput comparison: the same decoder, written as one would.

4 layers, width 256, 4 heads of 64, gated MLP of 1024, vocabulary 32,000 untied, RMSNorm, rotary
positions, scaled_dot_product_attention, AdamW (fused where it can be), clipping at 1.0.

python benchmarks/torch_dense.py [--compile]   (needs the extra `bench`)
"""

import argparse
import json
import resource
import time

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

D, LAYERS, N, H, HIDDEN, V, B, T = 256, 4, 4, 64, 1024, 32_000, 4, 256


def rotary_tables() -> tuple[torch.Tensor, torch.Tensor]:
  inv_freq = 10_000.0 ** (-torch.arange(0, H, 2) / H)
  angle = torch.arange(T)[:, None] * inv_freq[None]
  angle = torch.cat([angle, angle], -1)
  return angle.cos(), angle.sin()


def rotate(x, cos, sin):
  a, b = x.chunk(2, -1)
  return x * cos + torch.cat([-b, a], -1) * sin


class Layer(nn.Module):
  def __init__(self):
    super().__init__()
    self.norm1, self.norm2 = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6)
    self.qkv, self.out = nn.Linear(D, 3 * N * H, bias=False), nn.Linear(N * H, D, bias=False)
    self.gate, self.up = nn.Linear(D, HIDDEN, bias=False), nn.Linear(D, HIDDEN, bias=False)
    self.down = nn.Linear(HIDDEN, D, bias=False)

  def forward(self, x, cos, sin):
    q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, N, H).permute(2, 0, 3, 1, 4)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.out(o.transpose(1, 2).reshape(B, T, N * H))
    h = self.norm2(x)
    return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
  def __init__(self):
    super().__init__()
    self.table = nn.Embedding(V, D)
    self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
    self.norm, self.head = nn.RMSNorm(D, eps=1e-6), nn.Linear(D, V, bias=False)

  def forward(self, tokens, targets, cos, sin):
    x = self.table(tokens)
    for layer in self.layers:
      x = layer(x, cos, sin)
    return F.cross_entropy(self.head(self.norm(x)).view(-1, V), targets.view(-1))


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--compile", action="store_true")
  parser.add_argument("--steps", type=int, default=20)
  arguments = parser.parse_args()
  torch.manual_seed(0)
  torch.set_num_threads(torch.get_num_threads())
  model = Decoder()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
  )
  forward = torch.compile(model) if arguments.compile else model
  cos, sin = rotary_tables()

  def step() -> float:
    tokens = torch.randint(0, V, (B, T + 1))
    loss = forward(tokens[:, :-1], tokens[:, 1:].contiguous(), cos, sin)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()

  began = time.monotonic()
  for _ in range(3):
    step()
  warm = time.monotonic() - began
  times = []
  for _ in range(arguments.steps):
    began = time.monotonic()
    loss = step()
    times.append(time.monotonic() - began)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  name = f"torch {torch.__version__} {'compile' if arguments.compile else 'eager'}"
  print(json.dumps({"name": name, "seconds": times, "warm_up": warm, "loss": loss,
                    "peak_bytes": peak, "tokens": B * T}))  # fmt: skip


if __name__ == "__main__":
  main()
