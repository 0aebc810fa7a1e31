"""AdamW and Muon over flat float32 masters, and the model's own copy of the weights."""

import math
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from trainer.config import Config
from trainer.cross_entropy import gpu_kernels
from trainer.ranks import Ranks

MUON_MOMENTUM = (0.85, 0.95)  # at the start and the end of optimizer.muon_warmup_steps
SQUARES_BETA = 0.95  # of the running mean squares of Muon's updates
ADD_BLOCK = 4096  # numbers that a program of the kernel adds


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Precision of the weights that the model computes with."""
    is_bfloat16 = config.precision == "bfloat16"
    if config.precision == "auto" and device.type == "cuda":
        is_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_bfloat16 else torch.float32


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019), or Muon for the blocks' matrices and AdamW for the rest.

    Weights in float32 ("masters"), gradients and moments are one array each, in one order: Muon's
    matrices; other matrices; vectors (biases and gains, which are not decayed). The model computes
    with a copy of the masters in its own precision (Micikevicius et al. 2018, "Mixed Precision
    Training"), or with the masters themselves in float32.
    """

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks = Ranks()) -> None:  # noqa: B008
        self.ranks, self.options = ranks, config.optimizer
        self.reduce_dtype = getattr(torch, config.reduce_precision)

        def group(name: str, parameter: nn.Parameter) -> int:
            by_muon = self.options.name == "muon" and name.startswith("h.")
            return 2 if parameter.ndim < 2 else int(not by_muon)

        self.parameters = dict(sorted(model.named_parameters(), key=lambda item: group(*item)))
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        self._starts = dict(zip(self.parameters, accumulate(sizes, initial=0), strict=False))
        muon_end, matrices_end, end = (
            sum(p.numel() for name, p in self.parameters.items() if group(name, p) <= last)
            for last in range(3)
        )
        # (rows, columns): where Muon's matrices of that shape start. A fused one is several.
        self.muon_starts: dict[tuple[int, int], list[int]] = {}
        for name, parameter in self.parameters.items():
            if (start := self._starts[name]) < muon_end:
                layer = model.get_submodule(name.removesuffix(".weight"))
                columns = parameter.shape[1]
                for rows in getattr(layer, "sizes", parameter.shape[:1]):
                    self.muon_starts.setdefault((rows, columns), []).append(start)
                    start += rows * columns
        self.masters = torch.cat([p.detach().flatten() for p in self.parameters.values()]).float()
        self.device = self.masters.device
        self.gradients = torch.zeros_like(self.masters)
        # In float32 this is the same array.
        self.weights = self.masters.to(compute_dtype(config, self.device))
        for name, view in self.views(self.weights).items():
            self.parameters[name].data = view
        if self.weights is self.masters:  # backward adds to the gradients by itself
            for name, view in self.views(self.gradients).items():
                self.parameters[name].grad = view
        self.momentum = torch.zeros(muon_end, device=self.device)
        # (n, neurons) for the n matrices of a shape.
        self.mean_squares = {
            shape: torch.zeros(len(starts), max(shape), device=self.device)
            for shape, starts in self.muon_starts.items()
            if self.options.muon_normalize
        }
        names = "exp_avg", "exp_avg_sq"
        self.moments = {n: torch.zeros(end - muon_end, device=self.device) for n in names}
        # AdamW's parts: (range, decay, number of sound steps).
        self.parts = [
            (slice(muon_end, matrices_end), self.options.weight_decay, self.masters.new_zeros(())),
            (slice(matrices_end, end), 0.0, self.masters.new_zeros(())),
        ]

    def views(self, flat: Tensor, first: int = 0) -> dict[str, Tensor]:
        """The parts of a flat array by the names and in the shapes of the model's parameters.

        `flat` has the numbers of the masters' order from `first` on, of whole parameters.
        """
        return {
            name: flat[self._starts[name] - first :][: parameter.numel()].view(parameter.shape)
            for name, parameter in self.parameters.items()
            if first <= self._starts[name] < first + len(flat)
        }

    def collect(self) -> None:
        """Add the gradients that backward left in the parameters to those of the step."""
        if self.weights is not self.masters:
            fresh = [parameter.grad.view(-1) for parameter in self.parameters.values()]  # type: ignore[union-attr]
            add(self.gradients, torch.cat(fresh))
            for parameter in self.parameters.values():
                parameter.grad = None

    def reduce(self) -> None:
        """Sum the gradients over all ranks, sent in reduce_precision."""
        if self.ranks.world_size > 1:
            sent = self.gradients.to(self.reduce_dtype)  # in float32 the same array
            dist.all_reduce(sent)
            self.gradients.copy_(sent)

    def update(self, lr: float, num_tokens: Tensor, is_sound: Tensor) -> Tensor:
        """One update of all masters and the model, by the gradient's mean over `num_tokens`.

        Returns the gradient's norm, and clips it to max_norm. Where `is_sound` (a bool on the
        device) is false or the norm is not finite, everything stays as it was. Nothing waits for
        the GPU.
        """
        norm: Tensor = torch.linalg.vector_norm(self.gradients) / num_tokens
        is_sound = is_sound & torch.isfinite(norm)
        divisor = num_tokens * (norm / self.options.max_norm).clamp(min=1.0)
        self.adamw(lr, divisor, is_sound)
        self.muon(lr, divisor, is_sound)
        self.copy_to_model()
        self.gradients.zero_()
        return norm

    def adamw(self, lr: float, divisor: Tensor, is_sound: Tensor) -> None:
        """AdamW's update of the parameters that are not Muon's.

        The fused kernel divides and skips by itself, as for GradScaler. It is called without
        torch.optim.AdamW around it, which imports the compiler: that takes seconds.
        """
        first, (beta1, beta2) = len(self.momentum), self.options.betas
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

        With muon_normalize it is NorMuon's (Li et al. 2025, arXiv:2510.05491) in modded-nanogpt's
        form: see neuron_scales(). Each rank computes its share of the matrices of a shape, and all
        get all of them. Tall matrices have an update larger by sqrt(rows / columns), so that one
        rate fits every shape and size.
        """
        end, momentum = len(self.momentum), self.muon_momentum()
        lr *= self.options.muon_lr / self.options.peak_lr
        fresh = torch.where(is_sound, self.gradients[:end] / divisor, self.momentum)
        self.momentum.lerp_(fresh, 1 - momentum)
        fresh.lerp_(self.momentum, momentum)  # Nesterov's look ahead
        self.masters[:end] *= 1 - lr * self.options.muon_weight_decay * is_sound
        for (rows, columns), starts in self.muon_starts.items():
            spans = [slice(start, start + rows * columns) for start in starts]
            parts = [fresh[span].view(rows, columns) for span in spans]
            directions = self._orthogonal(torch.stack(parts))
            scales = lr * math.sqrt(max(1, rows / columns)) * is_sound
            mean_squares = self.mean_squares.get((rows, columns))
            if mean_squares is not None:
                weight = (1 - SQUARES_BETA) * is_sound
                scales = scales * neuron_scales(directions, mean_squares, weight)
            updates = (directions * scales).float().flatten(1).unbind()
            torch._foreach_sub_([self.masters[span] for span in spans], updates)

    def muon_momentum(self) -> Tensor | float:
        """Rises over the first muon_warmup_steps."""
        low, high = MUON_MOMENTUM
        if not self.options.muon_warmup_steps:
            return high
        step = self.parts[0][2] - 1  # sound ones before this
        return low + (high - low) * (step / self.options.muon_warmup_steps).clamp(max=1)

    def _orthogonal(self, matrices: Tensor) -> Tensor:
        """orthogonalize() with the matrices divided among the ranks."""
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

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint has besides the masters, not copied: fill them to restore.

        Moments are `exp_avg.NAME` and `exp_avg_sq.NAME`, for Muon's matrices `momentum.NAME`, and
        `mean_squares.ROWSxCOLUMNS` for all of a shape; `step.0` and `step.1` are single numbers.
        """
        first = len(self.momentum)
        flats = {kind: self.views(flat, first) for kind, flat in self.moments.items()}
        flats["momentum"] = self.views(self.momentum)
        flats["mean_squares"] = {f"{r}x{c}": each for (r, c), each in self.mean_squares.items()}
        flats["step"] = {str(number): step for number, (_, _, step) in enumerate(self.parts)}
        return {f"{kind}.{name}": t for kind, named in flats.items() for name, t in named.items()}

    def copy_to_model(self) -> None:
        """Round the masters to the model's weights; does nothing in float32."""
        self.weights.copy_(self.masters)


def add(sums: Tensor, fresh: Tensor) -> None:
    """sums (n), float32, += fresh (n): by a kernel at the speed of memory on a GPU."""
    if sums.is_cuda and (kernels := gpu_kernels()):
        grid = (-(-len(sums) // ADD_BLOCK),)
        kernels.accumulate[grid](sums, fresh, len(sums), ADD_BLOCK, num_warps=4)
    else:
        sums.add_(fresh)


def orthogonalize(matrices: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T, approximately: (n, rows, columns) -> (n, rows, columns).

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
    """Scales (n, rows, 1) or (n, 1, columns) that even out the neurons of n matrices' updates.

    A neuron is a row, in a wide matrix a column. Its update is divided by the root of its mean
    square, averaged over the steps in `mean_squares` (n, neurons), where the new one enters with
    `weight`; the norm of each matrix stays.
    """
    across = 2 if directions.shape[1] >= directions.shape[2] else 1
    norms = torch.linalg.vector_norm(directions, dim=across, dtype=torch.float32)
    squares = norms.square() / directions.shape[across]
    mean_squares.lerp_(squares, weight)
    shrinks = mean_squares.clamp(min=1e-20)
    was, now = squares.sum(1), (squares / shrinks).sum(1)
    scales: Tensor = ((was / now.clamp(min=1e-20)).unsqueeze(1) / shrinks).sqrt()
    return scales.unsqueeze(across)
