"""What the forward pass keeps for the backward pass, in bytes per rank.

Source: Korthikanti et al. 2022 (arXiv:2205.05198), section 4: equation 1 (one layer), 2 (tensor
parallelism), 4 (sequence parallelism), 5 (pipeline), and table 2 (recomputation). Differs:

* no dropout, so no masks; attention without the s x s terms of 5as^2b, because fused kernels keep
  only one number per row and head;
* SwiGLU: the first matrix product of the feed-forward part is 2f wide, and both it and the product
  of its halves are kept; RMSNorm keeps its input, its output is the next product's input;
* grouped-query attention, with queries and keys kept before and after their norm and rotation;
* tokens are those of one packed micro-batch (T) instead of s x b;
* `selective` recomputes the feed-forward part, not attention (`megatron/memory_policy.py`);
* what the backward pass itself needs at a time (`backward_bytes`) is counted, too.

FP8 keeps the inputs of its matrix products in one byte instead of two.

Experts are counted as if every one got the same number of tokens; where the router prefers some,
their ranks need more, up to E / a times the experts' part in the extreme.
"""

from __future__ import annotations

from megatron_matpo.planning.pipeline import in_flight_chunks
from megatron_matpo.planning.shape import Job


def norm_bytes_per_token(job: Job) -> float:
    """One norm of a layer: its input, which is the residual, its output, and 1 / rms in fp32.

    torch's norm also keeps the input times 1 / rms.
    """
    h, split = job.hf.hidden_size, job.layout.sequence_split
    scaled = h * job.element_bytes if job.is_local else 0
    return (h * (job.element_bytes + _input_bytes(job)) + scaled + 4) / split


def attention_bytes_per_token(job: Job) -> float:
    """Everything from the product that gives queries, keys and values to the one after attention.

    Queries, keys and values as the first product gives them; queries once more, copied out of their
    groups for the norm; queries and keys after norm and rotation; the output (with FP8 twice: for
    attention and for the product); one number per head; 1 / rms per head of queries and keys;
    cosine and sine for both, whole on every rank. torch's norms also keep queries and keys times
    1 / rms, and the local core the output of each sample beside the row that they are joined to.
    """
    hf, t = job.hf, job.layout.tensor
    q, k = hf.num_heads * hf.head_dim, hf.num_kv_heads * hf.head_dim
    elements = (q + 2 * k) + q + (q + k) + q + (2 * q + k if job.is_local else 0)
    per_head = 4 * (2 * hf.num_heads + hf.num_kv_heads)
    again = q if job.fp8_recipe else 0
    rotation = 4 * hf.head_dim * job.element_bytes
    return (elements * job.element_bytes + again + per_head) / t + rotation


def feed_forward_bytes_per_token(job: Job) -> float:
    """Both halves of the first product, and what goes into the second.

    Without the fused kernel also the gate's activation, and the other half with an offset of 0.
    """
    f, t = job.hf.ffn_size, job.layout.tensor
    unfused = 2 * job.element_bytes if job.is_local else 0
    return f * (2 * job.element_bytes + _input_bytes(job) + unfused) / t


def expert_bytes_per_token(job: Job) -> float:
    """Of the tokens that come to a rank's experts, as many as it sends: a for each of its own.

    The token as it is sent and sorted, both halves of the first product and what goes into the
    second, that with the router's weight, and the second's output, which is summed over experts;
    the router's logits and probabilities in fp32, for all experts.
    """
    moe, h = job.hf.moe, job.hf.hidden_size
    assert moe is not None, "a layer with experts"
    m, e = moe.ffn_size, job.element_bytes
    sent = h * _input_bytes(job) + 2 * m * e + m * (e + _input_bytes(job)) + h * e
    router = 2 * 4 * moe.num_experts
    return (moe.experts_per_token * sent + router) / job.layout.sequence_split


def layer_bytes_per_token(job: Job, *, is_moe: bool = False) -> float:
    """One layer without recomputation."""
    return (
        2 * norm_bytes_per_token(job)
        + attention_bytes_per_token(job)
        + (expert_bytes_per_token(job) if is_moe else feed_forward_bytes_per_token(job))
    )


def kept_bytes_per_token(job: Job, *, is_moe: bool = False) -> float:
    """One layer as `train.recompute` keeps it."""
    layer_input = job.hf.hidden_size * job.element_bytes / job.layout.sequence_split
    if job.layout.recompute == "full":
        return layer_input
    if job.layout.recompute == "selective":
        return norm_bytes_per_token(job) + attention_bytes_per_token(job) + layer_input
    return layer_bytes_per_token(job, is_moe=is_moe)


def recomputed_bytes_per_token(job: Job, *, is_moe: bool = False) -> float:
    """What one layer's backward pass makes again, at a time."""
    return layer_bytes_per_token(job, is_moe=is_moe) - kept_bytes_per_token(job, is_moe=is_moe)


def backward_bytes_per_token(job: Job, *, is_moe: bool = False) -> float:
    """Gradients of one layer's feed-forward part, where they are largest.

    Of both products' outputs and of the residual; with sequence parallelism also the gathered input
    and the gathered gradient.
    """
    hf, layout = job.hf, job.layout
    if is_moe and hf.moe is not None:
        of_experts = hf.moe.experts_per_token * (3 * hf.moe.ffn_size + hf.hidden_size)
        return (of_experts + 2 * hf.hidden_size) / layout.sequence_split * job.element_bytes
    gathered = 2 * hf.hidden_size if layout.sequence else 0
    local = 3 * hf.ffn_size / layout.tensor + 2 * hf.hidden_size / layout.sequence_split
    return (local + gathered) * job.element_bytes


def stage_activation_bytes(job: Job, stage: int, num_micro_batches: int) -> int:
    """Peak of a stage: all micro-batches in flight, and one layer's backward pass.

    What a stage has sent to the next is freed (`deallocate_pipeline_outputs`).
    """
    hf, layout = job.hf, job.layout
    chunks = in_flight_chunks(layout, stage, num_micro_batches)
    layers = [
        sum(kept_bytes_per_token(job, is_moe=hf.is_moe_layer(layer)) for layer in of_chunk)
        for of_chunk in (job.layers_of(stage, chunk) for chunk in range(layout.virtual))
    ]
    per_chunk = sum(layers) / len(layers)
    working = max(
        recomputed_bytes_per_token(job, is_moe=is_moe)
        + backward_bytes_per_token(job, is_moe=is_moe)
        for is_moe in {hf.is_moe_layer(layer) for layer in range(hf.num_layers)}
    )
    return round(job.tokens * (chunks * per_chunk + working))


def head_bytes(job: Job) -> int:
    """Output layer and log-probs, last stage: what does not depend on tokens x vocabulary.

    Two fp32 blocks of [chunk, V/t] and with bf16 one of bf16, the weight's gradient in fp32, with
    bf16 a second time while a chunk is added, and in the end in bf16 (`megatron/logprobs.py`). The
    final norm, the chosen rows of its output and their gradient are [T, h] each.
    """
    hf, e = job.hf, job.element_bytes
    width = job.padded_vocab // job.layout.tensor
    is_half = e == 2
    block = min(job.logprob_chunk_tokens, job.tokens) * width * (10 if is_half else 8)
    gradient = width * hf.hidden_size * (8 if is_half else 4)
    rows = job.tokens * hf.hidden_size * e * (2 / job.layout.sequence_split + 2)
    return block + gradient + round(rows)


def _input_bytes(job: Job) -> int:
    """Bytes of an element that is kept only as the input of a matrix product."""
    return 1 if job.fp8_recipe else job.element_bytes
