"""Cross-entropy and its gradients in numpy float64, written out."""

import numpy as np


def cross_entropy(
  x, w, targets, weights, *, bias=None, scale=1.0, softcap=None, z_loss=0.0, tied=False
):
  """(total, nll, log_z) and the gradients of total by x, w, bias, weights."""
  x, w, weights = (np.asarray(a, np.float64) for a in (x, w, weights))
  w_DV = w.T if tied else w
  D, V = w_DV.shape
  bias = np.zeros(V) if bias is None else np.asarray(bias, np.float64)
  rows, flat_targets, flat_weights = x.reshape(-1, D), targets.reshape(-1), weights.reshape(-1)
  dx, dw, dbias = np.zeros_like(rows), np.zeros_like(w_DV), np.zeros(V)
  nll, log_z = np.zeros(len(rows)), np.zeros(len(rows))
  for m, row in enumerate(rows):
    logits = scale * (row @ w_DV + bias)
    slope = np.full(V, scale)
    if softcap is not None:
      logits = softcap * np.tanh(logits / softcap)
      slope = scale * (1 - np.square(logits / softcap))
    log_z[m] = np.log(np.sum(np.exp(logits)))
    nll[m] = log_z[m] - logits[flat_targets[m]]
    p = np.exp(logits - log_z[m])
    dlogits = p * (1 + 2 * z_loss * log_z[m])
    dlogits[flat_targets[m]] -= 1
    dlogits *= flat_weights[m] * slope
    dx[m] = w_DV @ dlogits
    dw += np.outer(row, dlogits)
    dbias += dlogits
  dweights = nll + z_loss * np.square(log_z)
  total = float(np.sum(flat_weights * dweights))
  values = total, nll.reshape(targets.shape), log_z.reshape(targets.shape)
  return values, (dx.reshape(x.shape), dw.T if tied else dw, dbias, dweights.reshape(targets.shape))
