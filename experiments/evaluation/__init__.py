"""How well a model does: log-likelihoods and answers for tasks of the lm-evaluation-harness."""
