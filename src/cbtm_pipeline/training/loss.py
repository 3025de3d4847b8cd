"""The loss of a causal language model, without all its logits in memory.

The output layer and the cross-entropy are computed together, chunk by chunk. The hidden state of a token has
D numbers, but its logits have V. The logits of a chunk give the loss and both gradients, and are dropped. So
memory holds R x V logits and never N x V, and no product is computed twice. The cost is that of the output
layer, 6 N D V operations. This saves about eight reads and writes of N x V numbers.

Shapes: B sequences, T tokens, N = B T of them, D hidden size, V tokens in the vocabulary, R in a chunk.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from cbtm_pipeline.training import sparse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The logits of a chunk: they fit into the cache of a CPU, and are enough to keep a GPU busy (0.5 GB in bf16).
CHUNK_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 28}


def chunk_rows(vocab_size: int, device_type: str) -> int:
    """The number of tokens whose logits are in memory at once."""
    return max(64, CHUNK_LOGITS.get(device_type, CHUNK_LOGITS["cuda"]) // vocab_size)


def _chunk(
    hidden_RD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, target_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The summed loss (float32), and its gradients with respect to hidden states and logits.

    Both gradients have the dtype of the weights.
    """
    logits_RV = torch.nn.functional.linear(hidden_RD, weight_VD, bias_V)
    logp_RV = logits_RV.log_softmax(1, dtype=torch.float32)
    loss = -logp_RV.gather(1, target_R[:, None]).sum()
    p_RV = logp_RV.exp_()
    p_RV[torch.arange(len(target_R), device=target_R.device), target_R] -= 1
    gradient_RV = p_RV.to(weight_VD.dtype)
    return loss, gradient_RV @ weight_VD, gradient_RV


class _Chunked(torch.autograd.Function):
    """`cross_entropy` for autograd: the forward pass computes gradients, the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        n_rows: int,
        chunk: Callable,
    ) -> torch.Tensor:
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        with torch.autocast(device, enabled=False):
            low_VD, low_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
            d_hidden_ND, d_weight_VD = torch.empty_like(hidden_ND), torch.zeros_like(weight_VD)
            d_bias_V = None if bias_V is None else torch.zeros_like(bias_V)
            total = hidden_ND.new_zeros((), dtype=torch.float32)
            for start in range(0, len(hidden_ND), n_rows):
                rows = slice(start, start + n_rows)
                hidden_RD = hidden_ND[rows].to(dtype)
                loss, d_hidden_ND[rows], gradient_RV = chunk(hidden_RD, low_VD, low_V, target_N[rows])
                total += loss
                d_weight_VD += gradient_RV.T @ hidden_RD
                if d_bias_V is not None:
                    d_bias_V += gradient_RV.float().sum(0)
        ctx.save_for_backward(d_hidden_ND, d_weight_VD, d_bias_V)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple:
        return *(None if d is None else d * grad_outputs[0] for d in ctx.saved_tensors), None, None, None


def cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_N: torch.Tensor,
    n_rows: int,
    chunk: Callable = _chunk,
) -> torch.Tensor:
    """The sum over N tokens of -log softmax(h W^T + b)[target] (float32), in chunks of n_rows tokens.

    Matrices are multiplied in autocast's dtype. Differentiable once, with respect to h, W and b. `chunk` is
    `_chunk`, compiled or not.
    """
    return _Chunked.apply(hidden_ND, weight_VD, bias_V, target_N, n_rows, chunk)


class NextToken(torch.nn.Module):
    """A causal language model whose output is its loss. The parameters are the model's own.

    While it trains, the loss has the auxiliary loss of a router, if the model's config asks for that. It is
    that of one forward pass, as in transformers, and weighs as much for each token.
    """

    def __init__(self, net: "PreTrainedModel"):
        super().__init__()
        self.net: PreTrainedModel = net
        self.chunk: Callable = _chunk
        self.in_chunks = _has_plain_head(net)
        self.router_weight = sparse.router_loss_weight(net, "model")

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """The sum over B (T - 1) tokens of -log p(token | earlier tokens of its sequence) (nats, float32)."""
        ids_BT, target_N = tokens_BT[:, :-1], tokens_BT[:, 1:].flatten()
        with_router = self.training and self.router_weight > 0
        if with_router or not self.in_chunks:
            out = self.net(input_ids=ids_BT, use_cache=False)
            loss = torch.nn.functional.cross_entropy(
                out.logits.flatten(0, 1).float(), target_N, reduction="sum"
            )
            router_loss = sparse.router_loss(out) if with_router else None
            return loss if router_loss is None else loss + self.router_weight * len(target_N) * router_loss
        hidden_ND = self.net.base_model(input_ids=ids_BT, use_cache=False)[0].flatten(0, 1)
        head: Any = self.net.get_output_embeddings()
        n_rows = chunk_rows(head.weight.shape[0], hidden_ND.device.type)
        return cross_entropy(hidden_ND, head.weight, head.bias, target_N, n_rows, self.chunk)


def _has_plain_head(net: "PreTrainedModel") -> bool:
    """Whether the logits are just the output layer of the base model's output. This is tried out.

    Some models scale or cap their logits.
    """
    head = net.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or net.base_model is net:
        return False
    was_training = net.training
    try:
        with torch.inference_mode():
            ids = (torch.arange(8, device=head.weight.device) % head.weight.shape[0])[None]
            hidden = net.eval().base_model(input_ids=ids, use_cache=False)[0]
            return torch.equal(head(hidden), net(input_ids=ids, use_cache=False).logits)
    finally:
        net.train(was_training)
