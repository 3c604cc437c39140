"""VARLoss in a training loop of your own: three completions of one prompt, weighted by reward. Seconds on a CPU."""

import torch

from var_kernels import VARLoss

torch.manual_seed(0)
vocabulary, hidden_size, length = 1000, 32, 12
body = torch.nn.Embedding(vocabulary, hidden_size)  # stands for everything below the lm_head
lm_head = torch.nn.Linear(hidden_size, vocabulary, bias=False)
loss_fn = VARLoss(lam=0.5)  # weights within a prompt, for completions drawn from the reference
optimizer = torch.optim.AdamW([*body.parameters(), *lm_head.parameters()], lr=1e-2)

tokens = torch.randint(vocabulary, (3, length + 1))
inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
labels[:, :4] = -100  # the prompt carries no loss
rewards = torch.tensor([1.0, 0.2, -1.0])
group_ids = torch.zeros(3, dtype=torch.long)

losses = []
for step in range(20):
    loss = loss_fn(body(inputs), lm_head.weight, labels, rewards, group_ids=group_ids)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step % 5 == 0:
        print(f"step {step:2d}  loss {loss.item():.3f}")
print(f"VAR, 20 steps on 3 rated completions, no logits made: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
