"""Parameters as flat arrays: whole where the model computes, in shares where they are updated."""

from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from trainer.cross_entropy import gpu_kernels
from trainer.ranks import Ranks, Shared, all_gather, reduce_scatter

ALIGNED = 64  # numbers: shares begin where wide loads and stores can
ADD_BLOCK = 4096  # numbers that a program of the kernel adds


class Part:
    """Parameters of one rule. Each rank updates its share of them.

    Weights and gradients are whole on every rank, (ranks * size,), and a share of them is (size,).
    Masters and moments are those of the rank's own share alone, (size,): stage 1 of Rajbhandari et
    al. 2020, "ZeRO". Shares are equally long, as the collectives want them; gaps are zero.
    """

    def __init__(
        self, rule: str, parameters: dict[str, nn.Parameter], ranks: Ranks, dtype: torch.dtype
    ) -> None:
        """A parameter of the rule "muon" lies in one share."""
        self.parameters, self.ranks = parameters, ranks
        sizes = [parameter.numel() for parameter in parameters.values()]
        starts, self.size = layout(sizes, ranks.world_size, is_whole=rule == "muon")
        self.starts = dict(zip(parameters, starts, strict=True))
        device = next(iter(parameters.values())).device
        flat = torch.zeros(ranks.world_size * self.size, device=device)
        for name, view in self.views(flat).items():
            view.copy_(parameters[name].detach())
        self.weights = flat.to(dtype)  # in float32 the same array
        self.masters = self.own(flat) if self.weights is flat else self.own(flat).clone()
        for name, view in self.views(self.weights).items():
            parameters[name].data = view
        del flat
        self.gradients = torch.zeros_like(self.weights, dtype=torch.float32)
        for name, view in self.views(self.gradients).items():
            if self.weights.dtype == torch.float32:  # backward adds by itself
                parameters[name].grad = view
            else:
                take = partial(take_gradient, view)
                parameters[name].register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
        kinds = ("momentum",) if rule == "muon" else ("exp_avg", "exp_avg_sq")
        self.moments = {kind: torch.zeros_like(self.masters) for kind in kinds}

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters' numbers in a flat array, (ranks * size,), in their shapes."""
        return {
            name: flat[self.starts[name] :][: parameter.numel()].view(parameter.shape)
            for name, parameter in self.parameters.items()
        }

    def own(self, flat: Tensor) -> Tensor:
        """This rank's share (size,) of a flat array (ranks * size,)."""
        return flat.view(-1, self.size)[self.ranks.rank]

    def shared(self, own: Tensor) -> dict[str, Shared]:
        """Each parameter's numbers in the ranks' shares of a kind; `own` (size,) is this rank's."""
        found, rank = {}, self.ranks.rank
        for name, parameter in self.parameters.items():
            first, length = self.starts[name], parameter.numel()
            ends = range(-first, self.ranks.world_size * self.size - first + 1, self.size)
            inside = [min(max(end, 0), length) for end in ends]  # of the parameter
            spans = [slice(*pair) for pair in pairwise(inside)]
            begin = max(0, first - rank * self.size)
            mine = own[begin : begin + spans[rank].stop - spans[rank].start]
            found[name] = Shared(parameter.shape, spans, mine)
        return found

    def reduce(self, dtype: torch.dtype) -> Tensor:
        """Sum this rank's share of the gradients over all ranks, sent in `dtype`: (size,)."""
        own = self.own(self.gradients)
        if self.ranks.world_size > 1:
            sent = self.gradients.to(dtype)  # in float32 the same array
            reduce_scatter(self.own(sent), sent)
            own.copy_(self.own(sent))
        return own

    def copy_to_model(self) -> None:
        """Round the masters of all ranks to the model's weights."""
        own = self.own(self.weights)
        own.copy_(self.masters)  # in float32 the same array
        if self.ranks.world_size > 1:
            all_gather(self.weights, own)


def layout(sizes: list[int], world_size: int, is_whole: bool) -> tuple[list[int], int]:
    """Where parameters of these sizes start in a flat array, and the length of its equal shares.

    Parameters follow each other. With `is_whole` each lies in one share, that in which its middle
    would be, and shares end in gaps: half of a parameter or less.
    """
    total = sum(sizes)
    if not is_whole:
        share = -(-total // world_size)
        return list(accumulate(sizes[:-1], initial=0)), -(-share // ALIGNED) * ALIGNED
    filled, before, places = [0] * world_size, 0, []
    for size in sizes:
        owner = world_size * (2 * before + size) // (2 * total)
        places.append((owner, filled[owner]))
        filled[owner] += size
        before += size
    share = -(-max(filled) // ALIGNED) * ALIGNED
    return [owner * share + start for owner, start in places], share


def take_gradient(sums: Tensor, parameter: Tensor) -> None:
    """Add the gradient that backward left in a parameter to its float32 sums, and free it."""
    fresh, parameter.grad = parameter.grad, None
    if sums.is_cuda and (kernels := gpu_kernels()):  # at the speed of memory
        grid = (-(-sums.numel() // ADD_BLOCK),)
        kernels.accumulate[grid](sums, fresh, sums.numel(), ADD_BLOCK, num_warps=4)
    else:
        sums.add_(fresh)  # type: ignore[arg-type]
