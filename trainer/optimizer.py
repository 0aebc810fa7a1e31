"""AdamW and Muon, each rank on its share of the parameters."""

import math
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from trainer.config import Config
from trainer.ranks import Ranks, Shared, sum_over_ranks
from trainer.shares import Part

MUON_MOMENTUM = (0.85, 0.95)  # at the start and the end of optimizer.muon_warmup_steps
SQUARES_BETA = 0.95  # of the running mean squares of Muon's updates
SUM_PIECE = 2**24  # numbers of a checksum at one time


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Precision of the weights that the model computes with."""
    is_bfloat16 = config.precision == "bfloat16"
    if config.precision in ("auto", "int8") and device.type == "cuda":
        is_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_bfloat16 else torch.float32


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019), or Muon for the blocks' matrices and AdamW for the rest.

    The model computes with a copy of float32 weights ("masters") in its own precision (Micikevicius
    et al. 2018, "Mixed Precision Training"), or with the masters themselves in float32. Backward
    adds to float32 sums of gradients. Each rank has the masters and moments of its share and
    updates it: shares.py.
    """

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks = Ranks()) -> None:  # noqa: B008
        self.ranks, self.options = ranks, config.optimizer
        self.reduce_dtype = getattr(torch, config.reduce_precision)
        self.device = next(model.parameters()).device
        dtype = compute_dtype(config, self.device)
        groups: dict[str, dict[str, nn.Parameter]] = {"muon": {}, "matrices": {}, "vectors": {}}
        for name, parameter in model.named_parameters():
            by_muon = self.options.name == "muon" and name.startswith("h.")
            rule = "vectors" if parameter.ndim < 2 else "muon" if by_muon else "matrices"
            groups[rule][name] = parameter
        # Vectors are biases and gains, which are not decayed.
        self.parts = {r: Part(r, named, ranks, dtype) for r, named in groups.items() if named}
        # Numbers of sound steps, of AdamW's parts.
        self.steps = {rule: torch.zeros((), device=self.device) for rule in ("matrices", "vectors")}
        # (rows, columns): where Muon's matrices of that shape start. A fused one is several.
        self.muon_starts: dict[tuple[int, int], list[int]] = {}
        for name, parameter in groups["muon"].items():
            layer = model.get_submodule(name.removesuffix(".weight"))
            start, columns = self.parts["muon"].starts[name], parameter.shape[1]
            for rows in getattr(layer, "sizes", parameter.shape[:1]):
                self.muon_starts.setdefault((rows, columns), []).append(start)
                start += rows * columns
        # (n, neurons) for this rank's n matrices of a shape.
        self.mean_squares = {
            shape: torch.zeros(len(self.own_starts(shape)), max(shape), device=self.device)
            for shape in self.muon_starts
        }

    def own_starts(self, shape: tuple[int, int]) -> list[int]:
        """Where this rank's matrices of a shape start in its share."""
        size, rank = self.parts["muon"].size, self.ranks.rank
        return [start % size for start in self.muon_starts[shape] if start // size == rank]

    def update(self, lr: float, num_tokens: Tensor, is_sound: Tensor) -> Tensor:
        """One update of all masters and the model, by the gradient's mean over `num_tokens`.

        Returns the gradient's norm, and clips it to max_norm. Where `is_sound` (a bool on the
        device) is false or the norm is not finite, everything stays as it was. Nothing waits for
        the GPU.
        """
        gradients = {rule: part.reduce(self.reduce_dtype) for rule, part in self.parts.items()}
        norms = torch.stack([torch.linalg.vector_norm(each) for each in gradients.values()])
        squares = sum_over_ranks(norms.square().sum(), self.ranks)
        norm: Tensor = squares.sqrt() / num_tokens
        is_sound = is_sound & torch.isfinite(norm)
        divisor = num_tokens * (norm / self.options.max_norm).clamp(min=1.0)
        for rule in self.steps:
            self.adamw(rule, gradients[rule], lr, divisor, is_sound)
        if "muon" in gradients:
            self.muon(gradients["muon"], lr, divisor, is_sound)
        self.copy_to_model()
        for part in self.parts.values():
            part.gradients.zero_()
        return norm

    def adamw(
        self, rule: str, gradients: Tensor, lr: float, divisor: Tensor, is_sound: Tensor
    ) -> None:
        """AdamW's update of this rank's share of a part.

        The fused kernel divides and skips by itself, as for GradScaler. It is called without
        torch.optim.AdamW around it, which imports the compiler: that takes seconds.
        """
        part, (beta1, beta2) = self.parts[rule], self.options.betas
        adamw(
            [part.masters],
            [gradients],
            [part.moments["exp_avg"]],
            [part.moments["exp_avg_sq"]],
            [],
            [self.steps[rule]],
            fused=True,
            grad_scale=divisor,
            found_inf=(~is_sound).float(),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=self.options.weight_decay if rule == "matrices" else 0.0,
            eps=1e-8,
            maximize=False,
        )

    def muon(self, gradients: Tensor, lr: float, divisor: Tensor, is_sound: Tensor) -> None:
        """Muon's update (Jordan et al. 2024): momentum, made orthogonal, and weight decay.

        With neuron_scales() it is NorMuon's (Li et al. 2025, arXiv:2510.05491) in modded-nanogpt's
        form. Each rank computes those of its share. Tall matrices have an update larger by
        sqrt(rows / columns), so that one rate fits every shape and size.
        """
        part, momentum = self.parts["muon"], self.muon_momentum()
        average = part.moments["momentum"]
        lr *= self.options.muon_lr / self.options.peak_lr
        fresh = torch.where(is_sound, gradients / divisor, average)
        average.lerp_(fresh, 1 - momentum)
        fresh.lerp_(average, momentum)  # Nesterov's look ahead
        part.masters *= 1 - lr * self.options.muon_weight_decay * is_sound
        for rows, columns in self.muon_starts:
            starts = self.own_starts((rows, columns))
            if not starts:
                continue
            spans = [slice(start, start + rows * columns) for start in starts]
            parts = [fresh[span].view(rows, columns) for span in spans]
            directions = orthogonalize(torch.stack(parts))
            mean_squares, weight = self.mean_squares[rows, columns], (1 - SQUARES_BETA) * is_sound
            scales = neuron_scales(directions, mean_squares, weight)
            scales *= lr * math.sqrt(max(1, rows / columns)) * is_sound
            updates = (directions * scales).float().flatten(1).unbind()
            torch._foreach_sub_([part.masters[span] for span in spans], updates)

    def muon_momentum(self) -> Tensor | float:
        """Rises over the first muon_warmup_steps."""
        low, high = MUON_MOMENTUM
        if not self.options.muon_warmup_steps:
            return high
        step = self.steps["matrices"] - 1  # sound ones before this
        return low + (high - low) * (step / self.options.muon_warmup_steps).clamp(max=1)

    def masters(self) -> dict[str, Shared]:
        """The float32 weights."""
        return {k: v for p in self.parts.values() for k, v in p.shared(p.masters).items()}

    def state(self) -> dict[str, Shared]:
        """The tensors that a checkpoint has besides the masters, not copied: fill them to restore.

        Moments are `exp_avg.NAME` and `exp_avg_sq.NAME`, for Muon's matrices `momentum.NAME`, and
        `mean_squares.ROWSxCOLUMNS` for all of a shape; `step.0` and `step.1` are single numbers.
        """
        found: dict[str, Shared] = {}
        for part in self.parts.values():
            for kind, own in part.moments.items():
                found |= {f"{kind}.{name}": each for name, each in part.shared(own).items()}
        for (rows, columns), own in self.mean_squares.items():
            size, starts = self.parts["muon"].size, self.muon_starts[rows, columns]
            neurons, world_size = own.shape[1], self.ranks.world_size
            counts = [[s // size for s in starts].count(rank) for rank in range(world_size)]
            ends = list(accumulate([neurons * count for count in counts], initial=0))
            spans = [slice(*pair) for pair in pairwise(ends)]
            shape = torch.Size([len(starts), neurons])
            found[f"mean_squares.{rows}x{columns}"] = Shared(shape, spans, own.view(-1))
        everywhere = [slice(0, 1)] * self.ranks.world_size
        for number, step in enumerate(self.steps.values()):
            found[f"step.{number}"] = Shared(step.shape, everywhere, step.view(1))
        return found

    def copy_to_model(self) -> None:
        """Round the masters of all ranks to the model's weights."""
        for part in self.parts.values():
            part.copy_to_model()

    def checksum(self) -> int:
        """Of the model's weights, in pieces: a sum in int64 takes four times their memory."""
        total = 0
        for part in self.parts.values():
            for piece in torch.split(part.weights.view(torch.int16), SUM_PIECE):
                total += int(piece.sum(dtype=torch.int64))
        return total


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
