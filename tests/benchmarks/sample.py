"""How fast text comes out: forge-sample beside transformers, a loop without a cache, and the limit.

    python -m tests.benchmarks.sample                     # a GPU: 124M and 350M, batch 1 and 64
    python -m tests.benchmarks.sample --profile           # and which kernels a step consists of

Random weights, the same for all rows; bfloat16 on a GPU, float32 on a CPU; temperature 0.8, top-k
50. Tokens/s are new tokens over the time from reading the prompts to the last token on the host;
compilation, capture and planning happen before ("prepared", in seconds). Slow rows of others are
cut off after --seconds. The limit is the time to read the weights and the cache once a step, at the
speed at which this device copies memory.
"""

import math
import time
from collections.abc import Callable

import click
import torch
from torch import Tensor

from pipeline import tokenizer
from sampler import decode
from sampler.decode import Decoder
from sampler.draw import MAX_STEPS, Sampling
from sampler.generate import Limits, Sample, generate
from sampler.load import best_device
from trainer import config_file as configs
from trainer.layouts import model_config, transformers_weights
from trainer.model import LanguageModel, build_model

SAMPLING = Sampling(temperature=0.8, top_k=50)
VOCABULARY = list(tokenizer.token_bytes())
Run = Callable[[float], tuple[int, float]]  # most seconds -> new tokens, seconds
Make = Callable[[LanguageModel, Tensor, int], Run]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second read and written by a large copy, the best of several."""
    source = torch.zeros(
        2**31 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device
    )
    target, best = torch.empty_like(source), float("inf")
    for _ in range(8):
        wait(device)
        started = time.perf_counter()
        target.copy_(source)
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() / best


def bytes_per_step(model: LanguageModel, batch: int, length: float) -> float:
    """Weights once (of the embeddings only the head), and the cache of `length` tokens a row."""
    item = model.wte.weight.element_size()
    weights = sum(p.numel() for name, p in model.named_parameters() if name != "wpe.weight")
    cache = 2 * model.config.num_layers * model.config.kv_heads() * model.config.head_dim() * length
    return item * (weights + batch * cache)


def ours(model: LanguageModel, prompts: Tensor, count: int) -> Run:
    """forge-sample's own loop."""
    decoder = Decoder(model, len(prompts), SAMPLING)

    def run(seconds: float) -> tuple[int, float]:
        samples = [Sample(n, prompt, n) for n, prompt in enumerate(prompts.tolist())]
        started = time.perf_counter()
        for _ in generate(decoder, samples, VOCABULARY, Limits(count)):
            if time.perf_counter() - started > seconds:
                break
        return sum(len(sample.tokens) for sample in samples), time.perf_counter() - started

    return run


def without_cache(model: LanguageModel, prompts: Tensor, count: int) -> Run:
    """Everything read again for each token, as nanoGPT's sample.py does."""

    @torch.inference_mode()
    def run(seconds: float) -> tuple[int, float]:
        tokens = prompts
        started = time.perf_counter()
        for number in range(count):
            logits = model.logits(model.hidden(tokens)[:, -1]).float() / SAMPLING.temperature
            least = logits.topk(SAMPLING.top_k)[0][:, -1:]
            probabilities = logits.masked_fill(logits < least, -torch.inf).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], 1)
            if number % 8 == 7:
                wait(tokens.device)
                if time.perf_counter() - started > seconds:
                    break
        new = tokens[:, prompts.shape[1] :].cpu()
        return new.numel(), time.perf_counter() - started

    return run


def theirs(model: LanguageModel, prompts: Tensor, count: int, static: bool = False) -> Run:
    """transformers' generate on what forge-export would write."""
    import transformers

    transformers.logging.set_verbosity_error()
    settings = transformers.AutoConfig.for_model(**model_config(model.config, "bfloat16"))
    with prompts.device:
        other = transformers.AutoModelForCausalLM.from_config(settings)
    other = other.to(model.wte.weight.dtype).eval()
    other.load_state_dict(transformers_weights(model), strict=False)
    other.tie_weights()

    def run(seconds: float) -> tuple[int, float]:
        started = time.perf_counter()
        found = other.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=True,
            temperature=SAMPLING.temperature,
            top_k=SAMPLING.top_k,
            pad_token_id=0,
            max_time=seconds,
            **({"cache_implementation": "static"} if static else {}),
        )
        new = found[:, prompts.shape[1] :].cpu()
        return new.numel(), time.perf_counter() - started

    return run


def theirs_compiled(model: LanguageModel, prompts: Tensor, count: int) -> Run:
    return theirs(model, prompts, count, static=True)


def profile_step(model: LanguageModel, prompts: Tensor) -> None:
    """Kernels of one step, by time; the sum leaves out the gaps between them."""
    from torch.profiler import ProfilerActivity, profile

    decoder = Decoder(model, len(prompts), SAMPLING)
    decoder.read(dict(enumerate(prompts.tolist())))
    noise = torch.rand(MAX_STEPS, len(prompts), dtype=torch.float64)
    decoder.start(noise).read()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        decoder.start(noise).read()
    rows = [e for e in profiler.key_averages() if e.self_device_time_total]
    total = sum(e.self_device_time_total for e in rows) / MAX_STEPS
    click.echo(
        f"    {total:7.1f} us in {sum(e.count for e in rows) / MAX_STEPS:.0f} kernels a step"
    )
    for e in sorted(rows, key=lambda e: -e.self_device_time_total)[:14]:
        each = e.self_device_time_total / MAX_STEPS
        click.echo(f"    {each:7.1f} us {e.count / MAX_STEPS:6.1f} x  {e.key[:90]}")


@click.command()
@click.option("--models", help="[default: gpt2,gpt2_medium on a GPU, gpt2 on a CPU]")
@click.option("--batches", help="[default: 1,64 on a GPU, 1,8 on a CPU]")
@click.option("--prompt-tokens", default=128, show_default=True)
@click.option("--new-tokens", type=int, help="[default: 512 on a GPU, 128 on a CPU]")
@click.option("--seconds", default=8.0, show_default=True, help="At most, for each row but ours.")
@click.option("--profile", "profiles", is_flag=True, help="Which kernels a step consists of.")
@click.option("--only-ours", is_flag=True)
def main(
    models: str | None,
    batches: str | None,
    prompt_tokens: int,
    new_tokens: int | None,
    seconds: float,
    profiles: bool,
    only_ours: bool,
) -> None:
    device = best_device()
    is_gpu = device.type == "cuda"
    models = models or ("gpt2,gpt2_medium" if is_gpu else "gpt2")
    sizes = [int(n) for n in (batches or ("1,64" if is_gpu else "1,8")).split(",")]
    count = new_tokens or (512 if is_gpu else 128)
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name() if is_gpu else f"CPU, {torch.get_num_threads()} threads"
    click.echo(f"{name}, torch {torch.__version__}, copies at {bandwidth / 1e9:,.0f} GB/s")
    click.echo(f"prompt of {prompt_tokens} tokens, {count} new tokens")
    click.echo(
        f"{'':46}{'tokens/s':>10}{'of limit':>10}{'ours is':>9}{'seconds':>9}{'prepared':>10}"
    )
    for config in models.split(","):
        model = build_model(configs.load(config).model)
        model.init_weights(0)
        model.to(device, torch.bfloat16 if is_gpu else torch.float32).requires_grad_(False)
        model.wte.weight[-1] = 0  # <|endoftext|> is never among the likeliest
        for batch in sizes:
            generator = torch.Generator().manual_seed(0)
            prompts = torch.randint(50256, (batch, prompt_tokens), generator=generator).to(device)
            needed = bytes_per_step(model, batch, prompt_tokens + count / 2)
            limit = batch * bandwidth / needed
            click.echo(f"{config}, batch {batch}\n  {'limit by bandwidth':44}{limit:>10,.0f}")
            table = Table(limit)
            work = (model, prompts, count)
            table.show("forge-sample", ours, work, math.inf, math.inf)
            if profiles and is_gpu:
                profile_step(model, prompts)
            if only_ours:
                continue
            if is_gpu:
                chosen, decode.has_kernels = decode.has_kernels, lambda weight: False
                table.show("forge-sample without its kernels", ours, work, math.inf, math.inf)
                decode.has_kernels = chosen
            table.show("a loop without a cache", without_cache, work, 2, seconds)
            table.show("transformers generate, its defaults", theirs, work, 2, seconds)
            if is_gpu:
                label = "transformers generate, static and compiled"
                table.show(label, theirs_compiled, work, 120, 60)
                torch._dynamo.reset()


class Table:
    """Rows of one model and batch, beside its limit in tokens/s; the first is ours."""

    def __init__(self, limit: float) -> None:
        self.limit, self.first = limit, 0.0

    def show(
        self,
        label: str,
        make: Make,
        work: tuple[LanguageModel, Tensor, int],
        warm: float,
        most: float,
    ) -> None:
        """Measure and print a row: once for at most `warm` seconds, then for at most `most`."""
        started = time.perf_counter()
        try:
            run = make(*work)
            run(warm)
            prepared = time.perf_counter() - started
            tokens, took = run(most)
        except Exception as error:  # a peer that fails must not end the table
            click.echo(f"  {label:44}failed: {type(error).__name__}: {str(error)[:300]}")
            return
        speed = tokens / took
        self.first = self.first or speed
        click.echo(
            f"  {label:44}{speed:>10,.0f}{speed / self.limit:>10.1%}{self.first / speed:>8.1f}x"
            f"{took:>9.2f}{prepared:>10.1f}"
        )


if __name__ == "__main__":
    main()
