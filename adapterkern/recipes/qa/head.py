"""The span head: start and end scores of a context's tokens, and of "no answer".

    start_i = w_s·h_i + ⟨Q_s h_z, K_s h_i⟩/√p        end_i = w_e·h_i + ⟨Q_e h_z, K_e h_i⟩/√p        none = v·h_z + c

h_i is the last hidden state of context token i, and h_z that of the window's last token; ``none`` has a start and an
end as well. The first term alone is the head that encoders use. A causal backbone needs the second, the pointer: the
state of a context token knows nothing of what follows it (an answer's first token knows neither the rest of the answer
nor the words after it), and only the last token has read everything. Its state is the query, the tokens' states are the
keys. For the same reason "no answer" is scored at the last token. Encoders score it at the first, whose state here is
one constant vector.
"""

import math

import torch
from torch import Tensor, nn


class SpanHead(nn.Module):
    """The scores above, computed in fp32 also under autocast.

    Args:
        hidden_size: d.
        pointer_dim: p; 0 leaves the pointer out.
    """

    def __init__(self, hidden_size: int, pointer_dim: int = 64) -> None:
        super().__init__()
        self.hidden_size, self.pointer_dim = hidden_size, pointer_dim
        self.token = nn.Linear(hidden_size, 2, bias=False)
        self.none = nn.Linear(hidden_size, 2)
        if pointer_dim:
            self.key = nn.Linear(hidden_size, 2 * pointer_dim, bias=False)
            self.query = nn.Linear(hidden_size, 2 * pointer_dim, bias=False)

    def forward(self, tokens: Tensor, last: Tensor) -> Tensor:
        """States of the tokens (B, K, d) and of each window's last token (B, d) → scores (B, 1 + K, 2) in fp32.

        Row 0 is "no answer", row i + 1 token i; column 0 is the start, column 1 the end.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            dtype = self.token.weight.dtype  # bf16 under DeepSpeed
            tokens, last = tokens.to(dtype), last.to(dtype)
            scores = self.token(tokens)
            if self.pointer_dim:
                key = self.key(tokens).unflatten(-1, (2, self.pointer_dim))
                query = self.query(last).unflatten(-1, (2, self.pointer_dim))
                scores = scores + torch.einsum("bkcp,bcp->bkc", key, query) / math.sqrt(self.pointer_dim)
            return torch.cat([self.none(last)[:, None], scores], dim=1).float()
