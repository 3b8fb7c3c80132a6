"""BERT4Rec (Sun et al., CIKM 2019): a bidirectional transformer over the user's items."""

from torch import nn

from models.kernels import Gelu
from models.layers import Attention, Linear, Norm, hide, history_mask, look_up, query_mask, spread


class BERT4Rec(nn.Module):
    """Encoder of `bert_num_blocks` post-norm blocks; every position of a window reads the whole window.

    Where ratings are an input, the learner is trained as a cloze: it reads the ratings that are not hidden.
    """

    causal = False
    reads_queries = True

    def __init__(self, options):
        super().__init__()
        self.hidden = options.bert_hidden_units
        self.position = nn.Embedding(options.max_seq_len, self.hidden)  # 0 is the query
        self.norm = Norm(self.hidden)
        self.blocks = nn.ModuleList(
            BERTBlock(self.hidden, options.bert_num_heads) for _ in range(options.bert_num_blocks)
        )
        nn.init.normal_(self.position.weight, std=0.02)

    def read(self, history, tasks):
        """Histories (R, S, D) -> (states of the same shape, what `ask` needs of them)."""
        x = self.norm(history + look_up(self.position.weight, tasks.position))
        hidden, pasts = hide(history_mask(tasks, causal=False), x.dtype), []
        for block in self.blocks:
            attended, past = block.attention(x, hidden)
            x = block(x, attended)
            pasts.append(past)
        return x, (tuple(pasts), hide(query_mask(tasks), x.dtype))

    def ask(self, query, memory):
        """Queries (Q, D) -> states of the same shape."""
        x = self.norm(query + spread(self.position.weight[..., 0, :], query))
        pasts, hidden = memory
        for block, past in zip(self.blocks, pasts, strict=True):
            x = block(x, block.attention.ask(x, past, hidden))
        return x


class BERTBlock(nn.Module):
    """Attention and a GELU network of width 4 D, each with a residual path and a norm after it."""

    def __init__(self, hidden, heads):
        super().__init__()
        self.attention = Attention(hidden, heads)
        self.widen, self.narrow = Linear(hidden, 4 * hidden), Linear(4 * hidden, hidden)
        self.norm1, self.norm2 = Norm(hidden), Norm(hidden)

    def forward(self, x, attended):
        """x (..., D) with what its attention gave, of the same shape."""
        x = self.norm1(x + attended)
        return self.norm2(x + self.narrow(Gelu.apply(self.widen(x))))
