"""Proves the fused output layer on one rank: values, gradients, and the memory that it takes.

Split over tensor-parallel ranks: `tests/dist/test_update_semantics.py`. Not proved: CUDA's products
of bfloat16 matrices with a float32 result.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megatron_matpo.megatron.logprobs import vocab_parallel_logprobs

VOCAB_SIZE = 1009


def make_head(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight and labels of 40 tokens; logits reach about +-60."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(40, 32, generator=generator) * 3
    weight = torch.randn(VOCAB_SIZE, 32, generator=generator)
    labels = torch.randint(0, VOCAB_SIZE, (40,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 40, 4096])
def test_values_and_gradients_are_those_of_all_logits_at_once(chunk_tokens, temperature):
    hidden, weight, labels = make_head(torch.float32)
    logprobs, entropy = vocab_parallel_logprobs(
        hidden,
        weight,
        labels,
        vocab_size=VOCAB_SIZE,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    weights = torch.linspace(-2, 2, 40)
    (logprobs * weights).sum().backward()

    whole = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight)]
    table = (whole[0] @ whole[1].t() / temperature).log_softmax(-1)
    chosen = table.gather(1, labels[:, None]).squeeze(1)
    (chosen * weights).sum().backward()
    torch.testing.assert_close(logprobs, chosen, rtol=1e-6, atol=4e-5)
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(-1), rtol=1e-5, atol=2e-5)
    for tensor, other in zip((hidden, weight), whole, strict=True):
        tolerance = 1e-5 * float(other.grad.abs().max())
        torch.testing.assert_close(tensor.grad, other.grad, rtol=1e-5, atol=tolerance)


def test_bfloat16_weights_give_float32_logits():
    """Rounding logits of 60 to bfloat16 would be an error of 0.1; here it is below 1e-4."""
    hidden, weight, labels = make_head(torch.bfloat16)
    logprobs, entropy = vocab_parallel_logprobs(
        hidden, weight, labels, vocab_size=VOCAB_SIZE, chunk_tokens=7
    )
    logprobs.sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    table = (exact[0] @ exact[1].t()).log_softmax(-1)
    chosen = table.gather(1, labels[:, None]).squeeze(1)
    chosen.sum().backward()
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), chosen, rtol=1e-6, atol=4e-5)
    torch.testing.assert_close(
        entropy.double(), -(table.exp() * table).sum(-1), rtol=1e-5, atol=2e-5
    )
    for tensor, other in zip((hidden, weight), exact, strict=True):
        assert tensor.grad.dtype == torch.bfloat16
        tolerance = 2**-7 * float(other.grad.abs().max())
        torch.testing.assert_close(tensor.grad.double(), other.grad, rtol=0, atol=tolerance)


def test_a_bad_token_spoils_its_own_row_only():
    hidden, weight, labels = make_head(torch.float32)
    with torch.no_grad():
        hidden[3] = float("nan")
    logprobs, entropy = vocab_parallel_logprobs(
        hidden, weight, labels, vocab_size=VOCAB_SIZE, chunk_tokens=7
    )
    for values in (logprobs, entropy):
        assert torch.isfinite(values).logical_not().nonzero().tolist() == [[3]]


_MEASURE = """
import sys
import torch
from pathlib import Path
from megatron_matpo.megatron.logprobs import vocab_parallel_logprobs

V = 151936
torch.set_num_threads(1)
weight = torch.randn(V, 16, requires_grad=True)

def peak(tokens, chunk, measured=True):
    hidden, labels = torch.randn(tokens, 16, requires_grad=True), torch.randint(0, V, (tokens,))
    weight.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from here
    before = status("VmRSS")
    logprobs, _ = vocab_parallel_logprobs(
        hidden, weight, labels, vocab_size=V, chunk_tokens=chunk
    )
    logprobs.sum().backward()
    return (status("VmHWM") - before) / (chunk * V * 4 / 1024)

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

peak(2, 2)  # libraries load what they need
print(*(peak(tokens, chunk) for tokens, chunk in ((64, 16), (64, 64), (384, 16))))
"""


def test_peak_memory_grows_with_the_chunk_only():
    """In units of one chunk's float32 logits: about two, whether a chunk is all or a 24th."""
    # Freed memory goes back to the system at once, so that the peak is that of live tensors.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    small, whole, long = map(float, done.stdout.split())
    for peak in (small, whole, long):
        assert 1.5 < peak < 2.5, done.stdout
