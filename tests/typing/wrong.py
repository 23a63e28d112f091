"""Wrong uses, each of which both type checkers refuse: an ignore that nothing needs is an error itself."""

# pyright: reportUnnecessaryTypeIgnoreComment=true
import numpy as np
import torch
from rmsprop import Parameter, RMSprop, dialect
from rmsprop.torch import RMSprop as TorchRMSprop

w = np.ones(3)
dialect("adam")  # type: ignore[arg-type]
dialect("tf1", rho=0.9)  # type: ignore[call-arg]
dialect("tf1", momentum="0.9")  # type: ignore[arg-type]
RMSprop([w], lr="0.1")  # type: ignore[arg-type]
RMSprop([w], nonfinite="ignore")  # type: ignore[arg-type]
RMSprop([w], learning_rate=0.1)  # type: ignore[call-arg]
RMSprop(3)  # type: ignore[arg-type]
RMSprop(None)  # type: ignore[arg-type]

opt = RMSprop([w])
opt.step({"w": w})  # type: ignore[call-overload]
opt.step(grads=3)  # type: ignore[call-overload]
opt.lr = "fast"  # type: ignore[assignment]
opt.nonfinite = "never"  # type: ignore[assignment]
Parameter(w, name=3)  # type: ignore[arg-type]

net = torch.nn.Linear(2, 2)
TorchRMSprop(net.parameters(), nonfinite="never")  # type: ignore[arg-type]
TorchRMSprop(net.parameters(), rho=0.9)  # type: ignore[call-arg]
