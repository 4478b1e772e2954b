"""Attention on Hopper GPUs in Mosaic: forward, and gradients by queries and by keys and values.

A program owns a block of queries of one head (forward, dq) or a block of keys of one key/value
head (dk, dv), split over two consumer warpgroups, and goes over the blocks in which the mask leaves
something (`blocks`): first those that it cuts, where the mask is computed from indices, then those
that it does not. A third warpgroup copies what is visited to shared memory, blocks ahead; barriers
say when a buffer is full and when both consumers have done with it. Nothing has run on a GPU.

Ids of queries are [B, T], of keys [B, S]; what each head has is [N].

Letters: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N // K,
H head size of queries and keys, U that of values.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..partition import vary_with, varying_shape
from . import cudnn, gpu
from .blocks import Order
from .tiles import LOG2E, MASKED, Heads, Ids, Line

CONSUMERS = 2  # warpgroups that compute
ROWS = 64  # that each of them owns: of one product of a warpgroup
OWN = CONSUMERS * ROWS
STAGES = 2  # buffers of what is visited
WIDEST = 128  # head size

f32, i32 = jnp.float32, jnp.int32


def supports(q_BTNH, k_BSKH, v_BSKU, bias, mask, order: Order) -> str | None:
  """Why no Hopper GPU here can run these arguments, or None."""
  del mask
  if cudnn.compute_capability() != cudnn.HOPPER:
    return "there is no NVIDIA GPU of the Hopper generation"
  if max(q_BTNH.shape[-1], v_BSKU.shape[-1]) > WIDEST:
    return f"registers hold sums of head sizes up to {WIDEST}"
  dtypes = jnp.bfloat16, jnp.float16
  return gpu.supports(q_BTNH, k_BSKH, v_BSKU, bias, order, dtypes)


# ---- in the kernels ----


class _Ring(NamedTuple):
  """Buffers that the copying warpgroup fills in turn."""

  buffers: tuple[Any, ...]  # in shared memory, [stages, ...]
  full: Any  # barriers, one a stage
  free: Any

  def fill(self, step, sources) -> None:
    slot = jax.lax.rem(step, STAGES)

    @pl.when(step >= STAGES)
    def _():
      plgpu.barrier_wait(self.free.at[slot])

    for source, buffer in zip(sources, self.buffers, strict=True):
      plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.full.at[slot])

  def drain(self, steps) -> None:
    """Waits until the consumers have done with the last buffers."""

    def one(step, carry):
      plgpu.barrier_wait(self.free.at[jax.lax.rem(step, STAGES)])
      return carry

    jax.lax.fori_loop(jnp.maximum(steps - STAGES, 0), steps, one, ())

  def wait(self, step) -> list[Any]:
    slot = jax.lax.rem(step, STAGES)
    plgpu.barrier_wait(self.full.at[slot])
    return [buffer.at[slot] for buffer in self.buffers]

  def release(self, step) -> None:
    if len(self.buffers) > 1:  # numbers were read by plain loads, not by products: a fence
      plgpu.commit_smem()
    plgpu.barrier_arrive(self.free.at[jax.lax.rem(step, STAGES)])


def _product(a_ref, b_ref):
  """[m, n] of a [m, k] and b [n, k] in shared memory, float32."""

  def multiply(sum_ref):
    plgpu.wgmma(sum_ref, a_ref, b_ref.transpose((1, 0)))
    return sum_ref[...]

  return pl.run_scoped(multiply, plgpu.ACC((a_ref.shape[0], b_ref.shape[0]), f32))


def _add_product(total, a, b_ref):
  """total + a [m, k] times b [k, n] in shared memory."""
  multiply = lambda sum_ref: plgpu.wgmma(sum_ref, a.astype(b_ref.dtype), b_ref)
  return pl.run_state(multiply)(plgpu.ACC.init(total))


def _visits(plans, which, block, body, carry, step=0):
  """(steps, carry) after `body(cut)(visited, step, carry)` over the visits of a block.

  First come those that the mask cuts. `step` counts them, from the given one on.
  """
  step = jnp.int32(step)
  for cut, plan in zip((True, False), plans, strict=True):
    if plan is not None:
      start, end = plan.start[which, block], plan.end[which, block]
      run = body(cut)

      def one(v, carry, plan=plan, run=run, ahead=step - start):
        return run(v if plan.block is None else plan.block[which, v], v + ahead, carry)

      carry = jax.lax.fori_loop(start, end, one, carry)
      step = step + end - start
  return step, carry


def _down(x, shape):
  return jax.lax.broadcast_in_dim(x, shape, (0,))


def _side(
  shape, dim: int, given: Ids, loaded, start, *, length: int, indexed: bool = True
) -> gpu.Side:
  """Of a tile's rows or columns.

  Args:
    loaded: those ids that are given, in shared memory.
    length: of the row.
    indexed: whether indices, or positions that they are, will be asked for.
  """
  loaded = iter(loaded)
  line = lambda ids: None if ids is None else Line(next(loaded)[...], dim, shape)
  (position, segment), index, in_row = map(line, given), None, None
  if indexed:
    places = jax.lax.iota(i32, shape[dim])
    places = plgpu.layout_cast(places, plgpu.Layout.WGMMA.reduce(1 - dim))
    # A use that stays where a mask's own folds away: jax keeps an iota that nothing uses, and finds
    # no layout for it.
    jax.lax.optimization_barrier(places)
    places = start + places
    index = Line(places, dim, shape)
    in_row = Line(places < length, dim, shape) if length % OWN else None
  return gpu.Side(index if position is None else position, segment, index, in_row)


def _some(ids: Ids) -> list[Any]:
  return [x for x in ids if x is not None]


def _place():
  return tuple(map(jax.lax.axis_index, ("batch", "head", "block")))


class _Operands(NamedTuple):
  """Of all kernels, in global memory."""

  arrays: tuple[Any, ...]
  plans: Any
  heads: Heads
  q_ids: Ids
  kv_ids: Ids
  mask_N: Any


def _roles(copy, compute) -> None:
  """Runs one part of the kernel in the last warpgroup, the other in those before it."""
  warpgroup = jax.lax.axis_index("warpgroup")

  @pl.when(warpgroup == CONSUMERS)
  def _():
    plgpu.set_max_registers(40, action="decrease")
    copy()

  @pl.when(warpgroup < CONSUMERS)
  def _():
    plgpu.set_max_registers(232, action="increase")
    compute(warpgroup)


def _load(copies, barrier) -> None:
  """Copies (source, target) pairs to shared memory and waits."""
  for source, target in copies:
    plgpu.copy_gmem_to_smem(source, target, barrier)
  plgpu.barrier_wait(barrier)


def _ids_of(given: Ids, buffers, rows) -> list[tuple[Any, Any]]:
  return [(x.at[rows[:2]], buffer) for x, buffer in zip(_some(given), buffers, strict=True)]


def _store(copies) -> None:
  """Writes (value, buffer in shared memory, target)."""
  for value, buffer, _ in copies:
    buffer[...] = value.astype(buffer.dtype)
  plgpu.commit_smem()
  for _, buffer, target in copies:
    plgpu.copy_smem_to_gmem(buffer, target)
  plgpu.wait_smem_to_gmem(0)


def _copy_keys(static, visited, operands, keys: _Ring, values: _Ring) -> None:
  """What the copying warpgroup does where programs own queries."""
  q_ref, k_ref, v_ref = operands.arrays[:3]
  b, n, i = _place()
  kv_head = jax.lax.div(n, q_ref.shape[2] // k_ref.shape[2])

  def copy(j, step, carry):
    place = b, pl.ds(j * visited, visited), kv_head
    keys.fill(step, [k_ref.at[place], *(x.at[place[:2]] for x in _some(operands.kv_ids))])
    values.fill(step, [v_ref.at[place]])
    return carry

  which = static.which(operands.mask_N, n)
  steps, _ = _visits(operands.plans, which, i, lambda cut: copy, ())
  keys.drain(steps)
  values.drain(steps)


def _over_heads(static, operands, body, carry):
  """`_visits`, with `body(head, mask, cut)`, for each query head of a program's keys."""
  group = operands.arrays[0].shape[2] // operands.arrays[1].shape[2]
  _, kv_head, j = _place()

  def head(g, state):
    n = kv_head * group + g
    which = static.which(operands.mask_N, n)
    step, carry = state
    return _visits(operands.plans, which, j, partial(body, n, which), carry, step)

  return jax.lax.fori_loop(0, group, head, (jnp.int32(0), carry))


def _copy_queries(static, visited, operands, queries: _Ring, gradients: _Ring) -> None:
  """The same where they own keys."""
  q_ref, _, _, do_ref, lse_ref, delta_ref = operands.arrays
  b = _place()[0]

  def body(n, which, cut):
    def copy(i, step, carry):
      rows = pl.ds(i * visited, visited)
      ids = (x.at[b, rows] for x in _some(operands.q_ids))
      queries.fill(step, [q_ref.at[b, rows, n], lse_ref.at[b, n, rows], *ids])
      gradients.fill(step, [do_ref.at[b, rows, n], delta_ref.at[b, n, rows]])
      return carry

    return copy

  steps, _ = _over_heads(static, operands, body, ())
  queries.drain(steps)
  gradients.drain(steps)


def _forward_kernel(static, visited, operands, results, scratch):
  q_ref, _, v_ref = operands.arrays
  o_ref, lse_ref = results
  own, buffers, loaded, keys, values = scratch
  lse_smem, *o_smem = buffers
  heads, shape = operands.heads, (ROWS, visited)
  b, n, i = _place()
  which = static.which(operands.mask_N, n)

  def compute(warpgroup):
    start = i * OWN + warpgroup * ROWS
    rows = b, pl.ds(start, ROWS), n
    q, *ids = (x.at[warpgroup] for x in own)
    _load([(q_ref.at[rows], q), *_ids_of(operands.q_ids, ids, rows)], loaded.at[warpgroup])
    queries = _side(shape, 0, operands.q_ids, ids, start, length=static.T)

    def body(cut):
      side = partial(_side, shape, 1, operands.kv_ids, length=static.S)
      indexed = cut or heads.slope is not None

      def one(j, step, carry):
        m, total, acc = carry
        k, *ids = keys.wait(step)
        visit = side(ids, j * visited, indexed=indexed)
        product = _product(q, k)
        keys.release(step)
        s, _ = gpu.tile_logits(static, heads, n, product, queries, visit, which, cut)
        m_next = jnp.maximum(m, jnp.max(s, axis=1))
        # Where nothing was visible yet, MASKED less anything but itself is 0 in powers of two.
        top = jnp.where(m_next == MASKED, 0.0, m_next)
        p = jnp.exp2(s - _down(top, shape))
        decay = jnp.exp2(m - top)
        acc = acc * _down(decay, acc.shape)
        total = total * decay + jnp.sum(p, axis=1)
        (v,) = values.wait(step)
        acc = _add_product(acc, p, v)
        values.release(step)
        return m_next, total, acc

      return one

    m = jnp.full((ROWS,), MASKED if heads.sink is None else heads.sink[n] * LOG2E, f32)
    total = jnp.full((ROWS,), 0.0 if heads.sink is None else 1.0, f32)
    acc = jnp.zeros((ROWS, v_ref.shape[-1]), f32)
    _, (m, total, acc) = _visits(operands.plans, which, i, body, (m, total, acc))
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    # Huge where nothing was seen: probabilities are then 0 in the backward pass.
    lse = jnp.where(seen, m + jnp.log2(total), -MASKED)
    _store([
      (acc / _down(total, acc.shape), o_smem[0].at[warpgroup] if o_smem else q, o_ref.at[rows]),
      (lse, lse_smem.at[warpgroup], lse_ref.at[b, n, rows[1]]),
    ])  # fmt: skip

  _roles(partial(_copy_keys, static, visited, operands, keys, values), compute)


def _dq_kernel(static, visited, operands, results, scratch):
  q_ref, _, _, do_ref, lse_ref, delta_ref = operands.arrays
  dq_ref, *drow_ref = results
  own, row_smem, loaded, keys, values = scratch
  heads, shape = operands.heads, (ROWS, visited)
  b, n, i = _place()
  which = static.which(operands.mask_N, n)

  def compute(warpgroup):
    start = i * OWN + warpgroup * ROWS
    rows = b, pl.ds(start, ROWS), n
    q, do, lse, delta, *ids = (x.at[warpgroup] for x in own)
    numbers = b, n, rows[1]
    copies = [(q_ref.at[rows], q), (do_ref.at[rows], do)]
    copies += [(lse_ref.at[numbers], lse), (delta_ref.at[numbers], delta)]
    _load([*copies, *_ids_of(operands.q_ids, ids, rows)], loaded.at[warpgroup])
    lse, delta = (_down(x[...], shape) for x in (lse, delta))
    queries = _side(shape, 0, operands.q_ids, ids, start, length=static.T)

    def body(cut):
      side = partial(_side, shape, 1, operands.kv_ids, length=static.S)
      indexed = cut or heads.slope is not None

      def one(j, step, carry):
        dq, drow = carry
        k, *ids = keys.wait(step)
        visit = side(ids, j * visited, indexed=indexed)
        product = _product(q, k)
        s, tanh = gpu.tile_logits(static, heads, n, product, queries, visit, which, cut)
        p = jnp.exp2(s - lse)
        (v,) = values.wait(step)
        dp = _product(do, v)
        values.release(step)
        ds = p * (dp - delta)
        if drow is not None:
          distance = queries.index.spread() - visit.index.spread()
          drow = drow - jnp.sum(ds * distance.astype(f32), axis=1)
        if tanh is not None:
          ds = ds * (1 - tanh * tanh)
        dq = _add_product(dq, ds, k)
        keys.release(step)
        return dq, drow

      return one

    drow = jnp.zeros((ROWS,), f32) if drow_ref else None
    dq = jnp.zeros((ROWS, q_ref.shape[-1]), f32)
    _, (dq, drow) = _visits(operands.plans, which, i, body, (dq, drow))
    copies = [(dq * static.scale, q, dq_ref.at[rows])]
    if drow is not None:
      copies.append((drow, row_smem[0].at[warpgroup], drow_ref[0].at[numbers]))
    _store(copies)

  _roles(partial(_copy_keys, static, visited, operands, keys, values), compute)


def _dkv_kernel(static, visited, operands, results, scratch):
  """Keys go down, queries across: what is one number a query is then a row."""
  _, k_ref, v_ref, *_ = operands.arrays
  dk_ref, dv_ref = results
  own, _, loaded, queries, gradients = scratch
  heads, shape = operands.heads, (ROWS, visited)
  b, kv_head, j = _place()

  def compute(warpgroup):
    start = j * OWN + warpgroup * ROWS
    rows = b, pl.ds(start, ROWS), kv_head
    k, v, *ids = (x.at[warpgroup] for x in own)
    copies = [(k_ref.at[rows], k), (v_ref.at[rows], v)]
    _load([*copies, *_ids_of(operands.kv_ids, ids, rows)], loaded.at[warpgroup])
    keys = _side(shape, 0, operands.kv_ids, ids, start, length=static.S)

    def body(n, which, cut):
      side = partial(_side, shape, 1, operands.q_ids, length=static.T)
      indexed = cut or heads.slope is not None

      def one(i, step, carry):
        dk, dv = carry
        q, lse, *ids = queries.wait(step)
        visit = side(ids, i * visited, indexed=indexed)
        product = _product(k, q)
        s, tanh = gpu.tile_logits(static, heads, n, product, visit, keys, which, cut)
        p = jnp.exp2(s - Line(lse[...], 1, shape).spread())
        do, delta = gradients.wait(step)
        dv = _add_product(dv, p, do)
        ds = p * (_product(v, do) - Line(delta[...], 1, shape).spread())
        gradients.release(step)
        if tanh is not None:
          ds = ds * (1 - tanh * tanh)
        dk = _add_product(dk, ds, q)
        queries.release(step)
        return dk, dv

      return one

    zeros = tuple(jnp.zeros((ROWS, ref.shape[-1]), f32) for ref in (k_ref, v_ref))
    _, (dk, dv) = _over_heads(static, operands, body, zeros)
    _store([(dk * static.scale, k, dk_ref.at[rows]), (dv, v, dv_ref.at[rows])])

  _roles(partial(_copy_queries, static, visited, operands, queries, gradients), compute)


# ---- their calls ----


def _padded(x, axis: int, value: float = 0):
  """Zeros or another value behind an axis, up to a multiple of what a program owns."""
  more = -x.shape[axis] % OWN
  return jnp.pad(x, [(0, more * (n == axis)) for n in range(x.ndim)], constant_values=value)


def _call(kernel, name, static, operands, results, staged, *, visited, by_column=False):
  """Runs a kernel.

  Args:
    operands: (q, k, v, what else has rows), heads, q_ids, kv_ids, mask_N.
    results: shape and dtype of each.
    staged: the same of what a row of the results needs in shared memory.
  """
  arrays, heads, q_ids, kv_ids, mask_N = operands
  plans = gpu.plans(static, (OWN, visited), by_column=by_column)
  # With such a log-sum-exp the probabilities of queries beyond the end of the row are 0.
  beyond = (0, 0, 0, 0, -MASKED, 0)
  arrays = tuple(
    _padded(x, 1 if x.ndim == 4 else 2, value) for x, value in zip(arrays, beyond, strict=False)
  )
  q_ids, kv_ids = jax.tree.map(lambda x: _padded(x, 1), (q_ids, kv_ids))
  operands = _Operands(arrays, plans, heads, q_ids, kv_ids, mask_N)
  operands = vary_with(operands, operands)
  leaves, tree = jax.tree.flatten(operands)
  q, k, v, *more = arrays
  if by_column:
    do, lse, delta = more
    own, first, second = [k, v, *_some(kv_ids)], [q, lse, *_some(q_ids)], [do, delta]
  else:
    own, first, second = [q, *more, *_some(q_ids)], [k, *_some(kv_ids)], [v]

  def buffers(size, rows):
    return [plgpu.SMEM((*size, *x.shape[3:]), x.dtype) for x in rows]

  def ring(rows):
    full = plgpu.Barrier(num_arrivals=len(rows), num_barriers=STAGES)
    free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES)
    return _Ring(tuple(buffers((STAGES, visited), rows)), full, free)

  scratch = (
    buffers((CONSUMERS, ROWS), own),
    [plgpu.SMEM((CONSUMERS, ROWS, *shape), dtype) for shape, dtype in staged],
    plgpu.Barrier(num_arrivals=len(own), num_barriers=CONSUMERS),
    ring(first),
    ring(second),
  )

  def body(*refs):
    inputs, outputs = refs[: len(leaves)], refs[len(leaves) : len(leaves) + len(results)]
    run = partial(kernel, static, visited, jax.tree.unflatten(tree, inputs), outputs)
    pl.run_scoped(lambda *scratch: run(scratch), *scratch, collective_axes="warpgroup")

  owned = k if by_column else q
  return plgpu.kernel(
    body,
    out_type=tuple(varying_shape(shape, dtype, leaves[0]) for shape, dtype in results),
    grid=(owned.shape[2], owned.shape[1] // OWN, owned.shape[0]),
    grid_names=("head", "block", "batch"),
    num_threads=CONSUMERS + 1,
    thread_name="warpgroup",
    # The fast tanh has 11 bits.
    compiler_params=plgpu.CompilerParams(
      approx_math=static.softcap is None, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    kernel_name=name,
  )(*leaves)


def _forward(static, arrays, *rest):
  """(o [B, T, N, U], log2-sum-exp [B, N, T])."""
  q, v = arrays[0], arrays[2]
  (B, T, N, H), U = q.shape, v.shape[-1]
  length = -(-T // OWN) * OWN
  staged = [((), f32)] + [((U,), q.dtype)] * (U != H)
  results = [((B, length, N, U), q.dtype), ((B, N, length), f32)]
  call = partial(_call, _forward_kernel, "attention_forward", visited=128)
  o, lse = call(static, (arrays, *rest), results, staged)
  return o[:, :T], lse[..., :T]


def _backward_queries(static, arrays, heads, *rest):
  """(dq, what the slope gains from each query [B, N, T] or None)."""
  q = arrays[0]
  B, T, N, _ = q.shape
  length = -(-T // OWN) * OWN
  staged = [((), f32)] * (heads.slope is not None)
  results = [((B, length, *q.shape[2:]), q.dtype)]
  results += [((B, N, length), dtype) for _, dtype in staged]
  call = partial(_call, _dq_kernel, "attention_dq", visited=64)
  dq, *drow = call(static, (arrays, heads, *rest), results, staged)
  return dq[:, :T], drow[0][..., :T] if drow else None


def _backward_keys(static, arrays, *rest):
  """(dk, dv)."""
  S = arrays[1].shape[1]
  length = -(-S // OWN) * OWN
  results = [((x.shape[0], length, *x.shape[2:]), x.dtype) for x in arrays[1:3]]
  call = partial(_call, _dkv_kernel, "attention_dkv", visited=64, by_column=True)
  dk, dv = call(static, (arrays, *rest), results, [])
  return dk[:, :S], dv[:, :S]


attention = gpu.of_kernels(_forward, _backward_queries, _backward_keys)
