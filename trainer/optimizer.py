"""AdamW and Muon over flat float32 masters; the model's own weights, in the precision it runs in.

Before: model.py's parameters and their gradients. After: step.py's update.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from trainer.config import Config
from trainer.cross_entropy import gpu_kernels
from trainer.model import Fused
from trainer.ranks import Ranks

MUON_MOMENTUM = (0.85, 0.95)  # at the start and the end of optimizer.muon_warmup_steps
SQUARES_BETA = 0.95  # how much of the past a step keeps of the mean squares of Muon's updates
ADD_BLOCK = 4096  # numbers that a program of the kernel adds


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Precision of the weights that the model computes with."""
    if config.precision != "auto":
        dtype: torch.dtype = getattr(torch, config.precision)
        return dtype
    if device.type != "cuda":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019), or Muon for the blocks' matrices and AdamW for the rest.

    Weights in float32 ("masters"), gradients and moments are one array each, in one order: Muon's
    matrices; other matrices; vectors (biases and gains, which are not decayed). The
    model computes with a copy of the masters in its own precision (Micikevicius et al. 2018, "Mixed
    Precision Training"), or with the masters themselves where that is float32.
    """

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks = Ranks()) -> None:  # noqa: B008
        by_muon = {
            name
            for name, p in model.named_parameters()
            if config.optimizer.name == "muon" and p.ndim == 2 and name.startswith("h.")
        }
        named = sorted(
            model.named_parameters(), key=lambda item: (item[0] not in by_muon, item[1].ndim < 2)
        )
        self.ranks = ranks
        self.parameters = dict(named)
        self.device = named[0][1].device
        dtype = compute_dtype(config, self.device)
        self.reduce_dtype = getattr(torch, config.reduce_precision)
        fused = {
            f"{name}.weight": module.sizes
            for name, module in model.named_modules()
            if isinstance(module, Fused)
        }
        starts, end, muon_end, matrices_end = [], 0, 0, 0
        # (rows, columns): where Muon's matrices of that shape start. What is fused are several.
        self.muon_starts: dict[tuple[int, int], list[int]] = {}
        for name, parameter in named:
            starts.append(end)
            if name in by_muon:
                columns = parameter.shape[1]
                for rows in fused.get(name, parameter.shape[:1]):
                    self.muon_starts.setdefault((rows, columns), []).append(muon_end)
                    muon_end += rows * columns
            end += parameter.numel()
            matrices_end = end if parameter.ndim >= 2 else matrices_end
        self._starts = dict(zip(self.parameters, starts, strict=True))
        self.masters = torch.zeros(end, device=self.device)
        self.gradients = torch.zeros_like(self.masters)
        for name, view in self.views(self.masters).items():
            view.copy_(self.parameters[name].data)
        is_master = dtype == torch.float32
        self.weights = self.masters if is_master else self.masters.to(dtype)
        for name, view in self.views(self.weights).items():
            self.parameters[name].data = view
        if is_master:  # backward adds to them by itself
            for name, view in self.views(self.gradients).items():
                self.parameters[name].grad = view
        options = config.optimizer
        self.max_norm, self.muon_warmup_steps = options.max_norm, options.muon_warmup_steps
        self.betas = options.betas
        self.lr_ratio, self.decay = options.muon_lr / options.peak_lr, options.muon_weight_decay
        self.momentum = torch.zeros(muon_end, device=self.device)
        # (n, neurons) for the n matrices of a shape.
        self.mean_squares = {
            shape: torch.zeros(len(starts), max(shape), device=self.device)
            for shape, starts in self.muon_starts.items()
            if options.muon_normalize
        }
        self.moments = {
            "exp_avg": torch.zeros(end - muon_end, device=self.device),
            "exp_avg_sq": torch.zeros(end - muon_end, device=self.device),
        }
        # What AdamW updates: (part, its decay, how many sound steps it has had).
        self.parts = [
            (slice(muon_end, matrices_end), options.weight_decay, self.masters.new_zeros(())),
            (slice(matrices_end, end), 0.0, self.masters.new_zeros(())),
        ]

    def views(self, flat: Tensor, first: int = 0) -> dict[str, Tensor]:
        """The parts of a flat array by the names and in the shapes of the model's parameters.

        `flat` holds their numbers from index `first` of the parameters' order on; parameters that
        begin outside of it are left out.
        """
        return {
            name: flat[self._starts[name] - first :][: parameter.numel()].view(parameter.shape)
            for name, parameter in self.parameters.items()
            if first <= self._starts[name] < first + len(flat)
        }

    def collect(self) -> None:
        """Add what backward left in the parameters to the gradients of the step."""
        if self.weights is self.masters:
            return
        fresh = [parameter.grad.view(-1) for parameter in self.parameters.values()]  # type: ignore[union-attr]
        add(self.gradients, torch.cat(fresh))
        for parameter in self.parameters.values():
            parameter.grad = None

    def discard(self) -> None:
        """Forget the step's gradients, wherever backward was interrupted."""
        self.gradients.zero_()
        if self.weights is not self.masters:
            for parameter in self.parameters.values():
                parameter.grad = None

    def reduce(self) -> None:
        """Add the gradients up over all ranks; on the way they are in reduce_precision."""
        if self.ranks.world_size == 1:
            return
        sent = self.gradients.to(self.reduce_dtype)  # the very same array for float32
        dist.all_reduce(sent)
        if sent is not self.gradients:
            self.gradients.copy_(sent)

    def update(self, lr: float, num_tokens: int, is_sound: Tensor) -> Tensor:
        """One update, AdamW's and Muon's, with the gradient's mean over `num_tokens`.

        Returns the gradient's norm, and clips it to max_norm. Where `is_sound` (a bool on the
        device) is false or the norm is not finite, everything stays as it was. Nothing waits for
        the GPU.
        """
        norm: Tensor = torch.linalg.vector_norm(self.gradients) / num_tokens
        is_sound = is_sound & torch.isfinite(norm)
        divisor = num_tokens * (norm / self.max_norm).clamp(min=1.0)
        self.adamw(lr, divisor, is_sound)
        self.muon(lr, divisor, is_sound)
        self.copy_to_model()
        self.gradients.zero_()
        return norm

    def adamw(self, lr: float, divisor: Tensor, is_sound: Tensor) -> None:
        """AdamW's update of what is not Muon's.

        The fused kernel divides by itself, and skips by itself, as for GradScaler. It is called
        without torch.optim.AdamW around it, which imports the compiler: that takes seconds.
        """
        first, (beta1, beta2) = len(self.momentum), self.betas
        found_inf = (~is_sound).float()
        for part, decay, step in self.parts:
            own = slice(part.start - first, part.stop - first)
            adamw(
                [self.masters[part]],
                [self.gradients[part]],
                [self.moments["exp_avg"][own]],
                [self.moments["exp_avg_sq"][own]],
                [],
                [step],
                fused=True,
                grad_scale=divisor,
                found_inf=found_inf,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=lr,
                weight_decay=decay,
                eps=1e-8,
                maximize=False,
            )

    def muon(self, lr: float, divisor: Tensor, is_sound: Tensor) -> None:
        """Muon's update (Jordan et al. 2024): momentum, made orthogonal, and weight decay.

        With muon_normalize it is NorMuon's (Li et al. 2025, arXiv:2510.05491), as it is used in
        modded-nanogpt: see neuron_scales(). Each rank takes its share of the matrices of a shape,
        and all get all of them. The update is larger for tall matrices by sqrt(rows / columns): so
        one rate fits every shape and size.
        """
        end = len(self.momentum)
        momentum, lr = self.muon_momentum(), lr * self.lr_ratio
        fresh = torch.where(is_sound, self.gradients[:end] / divisor, self.momentum)
        self.momentum.lerp_(fresh, 1 - momentum)
        fresh.lerp_(self.momentum, momentum)  # Nesterov's look ahead
        self.masters[:end] *= 1 - lr * self.decay * is_sound
        for (rows, columns), starts in self.muon_starts.items():
            spans = [slice(start, start + rows * columns) for start in starts]
            parts = [fresh[span].view(rows, columns) for span in spans]
            size = lr * math.sqrt(max(1, rows / columns))
            directions = self._orthogonal(torch.stack(parts))
            scales = size * is_sound
            if (rows, columns) in self.mean_squares:
                mean_squares = self.mean_squares[rows, columns]
                fresh_weight = (1 - SQUARES_BETA) * is_sound
                scales = scales * neuron_scales(directions, mean_squares, fresh_weight)
            updates = (directions * scales).float().flatten(1).unbind()
            torch._foreach_sub_([self.masters[span] for span in spans], updates)

    def muon_momentum(self) -> Tensor | float:
        """How much of the past a step keeps: rises over the first muon_warmup_steps."""
        low, high = MUON_MOMENTUM
        if not self.muon_warmup_steps:
            return high
        step = self.parts[0][2] - 1  # sound ones before this
        return low + (high - low) * (step / self.muon_warmup_steps).clamp(max=1)

    def _orthogonal(self, matrices: Tensor) -> Tensor:
        """orthogonalize() shared out among the ranks."""
        world_size, rank = self.ranks.world_size, self.ranks.rank
        if world_size == 1:
            return orthogonalize(matrices)
        share = math.ceil(len(matrices) / world_size)
        mine = torch.zeros(share, *matrices.shape[1:], device=self.device)
        given = matrices[rank * share : (rank + 1) * share]
        mine[: len(given)] = given
        done = orthogonalize(mine)
        everyone = done.new_empty(world_size * share, *done.shape[1:])
        dist.all_gather(list(everyone.chunk(world_size)), done.contiguous())  # NCCL insists
        return everyone[: len(matrices)]

    # -- what a checkpoint holds

    def state(self) -> dict[str, Tensor]:
        """The very tensors that a checkpoint needs beside the masters: copy into them to restore.

        Moments are `exp_avg.NAME` and `exp_avg_sq.NAME`, or `momentum.NAME` where Muon updates, and
        `mean_squares.ROWSxCOLUMNS` of all its matrices of a shape; all else is a single number.
        """
        first = len(self.momentum)
        flats = {kind: self.views(flat, first) for kind, flat in self.moments.items()}
        flats["momentum"] = self.views(self.momentum)
        tensors = {
            f"{kind}.{name}": view for kind, views in flats.items() for name, view in views.items()
        }
        tensors |= {f"mean_squares.{r}x{c}": each for (r, c), each in self.mean_squares.items()}
        tensors |= {f"step.{number}": step for number, (_, _, step) in enumerate(self.parts)}
        return tensors

    def copy_to_model(self) -> None:
        """The model takes up the masters as they are now."""
        if self.weights is not self.masters:
            self.weights.copy_(self.masters)


def add(sums: Tensor, fresh: Tensor) -> None:
    """sums (n), float32, += fresh (n): on a GPU at the speed of memory, as torch's own is not."""
    kernels = gpu_kernels() if sums.is_cuda else None
    if kernels is None:
        sums.add_(fresh)
        return
    kernels.accumulate[(-(-len(sums) // ADD_BLOCK),)](
        sums, fresh, len(sums), ADD_BLOCK, num_warps=4
    )


def orthogonalize(matrices: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T, nearly: (n, rows, columns) -> the same, singular values near 1.

    Five Newton-Schulz steps with Jordan's coefficients, which leave the singular values between
    about 0.7 and 1.2; in bfloat16 on a GPU. Jordan et al. 2024, "Muon: An optimizer for hidden
    layers in neural networks"; the iteration is Björck and Bowie's (1971).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-20)
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).to(torch.bfloat16 if x.is_cuda else x.dtype)
    for _ in range(5):
        squares = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(squares, squares, squares, beta=b, alpha=c), x, beta=a)
    done: Tensor = x.mT if tall else x
    return done


def neuron_scales(directions: Tensor, mean_squares: Tensor, weight: Tensor) -> Tensor:
    """What makes every neuron's part of an update about as large: times (n, rows, columns).

    A neuron is a row, in a wide matrix a column. Its part is divided by the root of its mean
    square, averaged over the steps in `mean_squares` (n, neurons), which takes the fresh one in
    with `weight`; the norm of each matrix stays what it was. So (n, rows, 1) or (n, 1, columns).
    """
    across = 2 if directions.shape[1] >= directions.shape[2] else 1
    norms = torch.linalg.vector_norm(directions, dim=across, dtype=torch.float32)
    squares = norms.square() / directions.shape[across]
    mean_squares.lerp_(squares, weight)
    shrinks = mean_squares.clamp(min=1e-20)
    was, now = squares.sum(1), (squares / shrinks).sum(1)
    scales: Tensor = ((was / now.clamp(min=1e-20)).unsqueeze(1) / shrinks).sqrt()
    return scales.unsqueeze(across)
