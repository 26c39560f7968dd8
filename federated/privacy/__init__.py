"""Differential privacy: clipping, noise, sampling, accounts and audits.

Tensors in, tensors out: it knows no Flower, no rule and no training loop. `federated.flower` and `federated.training`
call it; import from its modules.
"""
