"""log Φ against scipy's, in value and slope, from deep in one tail to deep in the other."""

import numpy as np
import scipy.special
import torch

from log_ndtr import log_ndtr


def test_log_ndtr_and_its_slope_are_scipys_at_every_depth():
    t = torch.cat([-torch.logspace(9, -3, 500), torch.zeros(1), torch.logspace(-3, 9, 500)])
    value = log_ndtr(t.requires_grad_())
    value.sum().backward()
    depth = t.detach().double().numpy()
    expected = scipy.special.log_ndtr(depth)
    np.testing.assert_allclose(value.detach(), expected, rtol=1e-6, atol=1e-6)
    # φ / Φ, by the scaled complementary error function where Φ is too small for a float
    slope = np.sqrt(2 / np.pi) / scipy.special.erfcx(-np.minimum(depth, 9) / np.sqrt(2))
    np.testing.assert_allclose(t.grad, slope, rtol=1e-5, atol=1e-6)
