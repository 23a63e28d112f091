"""Uses that both type checkers accept, with the types that come of them."""

from array import array
from collections.abc import Callable

import numpy as np
import torch
from rmsprop import Parameter, RMSprop, convert, dialect, load, save
from rmsprop.torch import RMSprop as TorchRMSprop
from typing_extensions import assert_type

w, b = np.ones((2, 3), np.float32), np.zeros(3)
RMSprop([w, b], lr=0.1, nonfinite="skip", max_grad_norm=None)
RMSprop({"w": w, "b": b}, **dialect("tf1", momentum=0.9))
RMSprop([("w", w), ("b", b)], lr=7e-4, **dialect("dqn"))
RMSprop([{"params": [w], "lr": 0.1}, {"params": {"b": b}}])
RMSprop((p for p in (Parameter(w), Parameter(b))), max_grad_norm=1.0)
RMSprop([array("f", [1, 2]), torch.ones(3)])


def closure() -> float:
    return 0.5


opt = RMSprop([w, b])
# mypy has no value for a call that returns None.
takes_nothing: Callable[[], None] = opt.step
assert_type(opt.step(closure, grads=[w, None]), float)
assert_type(opt.lr, float)
assert_type(opt.centered, bool)
assert_type(opt.clip_grad(), list[float])
assert_type(load("run", opt), dict[str, str])
opt.step(grads={"w": torch.ones(2, 3), "b": b, "c": 0.5})
opt.lr = 1e-4
save("run", opt, metadata={"update": "1"})
opt.load_state_dict(convert.from_timm(opt.state_dict()))

net = torch.nn.Linear(2, 2)
torch_opt = TorchRMSprop(net.parameters(), lr=0.1, **dialect("sb3", eps=1e-5))
optimizer: torch.optim.Optimizer = torch_opt


def torch_closure() -> torch.Tensor:
    total: torch.Tensor = net(torch.ones(2)).sum()
    return total


assert_type(torch_opt.step(torch_closure), torch.Tensor)
with torch_opt.step_in_backward():
    pass
