# %% [markdown]
# # Two kernels in a model of your own
#
# Sequences of any length one behind the other, without padding; a contrastive loss without its matrix of similarities.
# Nothing else of the package is used. A client's first half of a sequence learns to find its second half among those of
# all others.

# %%
import torch
from torch import nn

from ubp_fast.kernels import flash_attention, nt_xent

CLIENTS, ITEMS, TASTES, WIDTH, HEADS = 512, 400, 40, 32, 4
torch.manual_seed(0)


# %% [markdown]
# Every client has a taste: ten items in four hundred, from which it mostly buys. Lengths differ, some are 0.


# %%
def sequences(taste: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Items int64 [tokens] of all clients, and where each begins, int32 [clients + 1]."""
    lengths = torch.randint(0, 40, (CLIENTS,))
    owner = taste.repeat_interleave(lengths)
    favourite = owner * (ITEMS // TASTES) + torch.randint(ITEMS // TASTES, owner.shape)
    items = torch.where(torch.rand(owner.shape) < 0.7, favourite, torch.randint(ITEMS, owner.shape))
    return items, nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


class Encoder(nn.Module):
    """One layer of attention over a client's items, then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, WIDTH)
        self.inner, self.outer = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, items: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        tokens = self.items(items)
        query, key, value = self.inner(tokens).view(-1, 3, HEADS, WIDTH // HEADS).unbind(1)
        tokens = tokens + self.outer(flash_attention(query, key, value, cu_seqlens).flatten(1))
        lengths = cu_seqlens.diff()
        owner = torch.arange(CLIENTS).repeat_interleave(lengths)
        total = torch.zeros(CLIENTS, WIDTH).index_add(0, owner, tokens)
        return total / lengths.clamp_min(1)[:, None]


# %% [markdown]
# The loss compares each of 512 clients with all others in both directions; the matrix is never in memory.

# %%
model = Encoder()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for step in range(60):
    taste = torch.randint(TASTES, (CLIENTS,))
    history, future = model(*sequences(taste)), model(*sequences(taste))
    loss = nt_xent(history, future, temperature=0.2, negatives="symmetric")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if step % 15 == 14:
        print(f"step {step + 1:3d}  loss {loss.item():.3f}")

# %% [markdown]
# Clients of one taste lie close now, whatever they have bought of it.

# %%
taste = torch.randint(TASTES, (CLIENTS,))
with torch.no_grad():
    vectors = nn.functional.normalize(model(*sequences(taste)), dim=1)
likeness = vectors @ vectors.t()
likeness.fill_diagonal_(-1)
same = (taste[likeness.argmax(dim=1)] == taste).float().mean().item()
print(f"{same:.0%} of the clients have a nearest client of their own taste, {1 / TASTES:.1%} would by chance")
