"""The measured peak is a plausible rate, measured once."""

import time

import torch

from bfm.model.matmul_peak import matmul_peak


def test_peak_is_measured_once_and_quickly():
    begin_s = time.process_time()
    peak = matmul_peak("cpu")
    assert 1e8 < peak < 1e15
    assert time.process_time() - begin_s < 2.0 * torch.get_num_threads()
    assert matmul_peak("cpu") == peak
