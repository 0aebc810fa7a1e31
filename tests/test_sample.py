"""forge-sample draws the same tokens as the model without a cache, in batches of any shape."""

import contextlib
import functools
import io
import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

from pipeline import shards, tokenizer
from pipeline.errors import ForgeError
from sampler import cli, terminal
from sampler.decode import Decoder
from sampler.draw import Sampling, draw, penalize
from sampler.generate import Limits, Sample, generate
from sampler.load import open_model
from trainer import checkpoint
from trainer.config import ModelConfig
from trainer.model import LanguageModel, build_model

GREEDY = Sampling(temperature=0)
VOCABULARY = list(tokenizer.token_bytes())
CPU = torch.device("cpu")


def written(
    model: LanguageModel,
    prompts: list[list[int]],
    limits: Limits,
    sampling: Sampling = GREEDY,
    parallel: int | None = None,
) -> list[Sample]:
    decoder = Decoder(model, parallel or len(prompts), sampling, log=True)
    samples = [Sample(number, prompt, number) for number, prompt in enumerate(prompts)]
    for _ in generate(decoder, samples, VOCABULARY, limits):
        pass
    return samples


def plainly(model: LanguageModel, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens with no cache; a full context is read again from its younger half on."""
    length = model.config.context_length
    tokens = list(prompt)
    start = max(0, len(tokens) - length)
    with torch.no_grad():
        for _ in range(count):
            if len(tokens) - start > length:
                start = len(tokens) - length // 2
            x = model.hidden(torch.tensor([tokens[start:]]))[0, -1]
            tokens.append(int(model.logits(x)[: shards.EOT_TOKEN].argmax()))
    return tokens[len(prompt) :]


def made(context_length: int, family: Literal["gpt2", "qwen3"] = "gpt2") -> LanguageModel:
    """A small model that does not repeat itself, and has no <|endoftext|> to end with."""
    config = ModelConfig(2, 2, 32, context_length=context_length, vocab_size=500)
    if family == "qwen3":
        config = replace(config, family=family, bias=False, num_heads=4, num_kv_heads=2)
    model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        scale = {"wte.weight": 0.1 if family == "gpt2" else 0.3, "wpe.weight": 3.0}.get(name, 0.3)
        is_gain = weight.ndim == 1 and name.endswith("weight")
        torch.nn.init.normal_(weight, float(is_gain), scale, generator=generator)
    return model.requires_grad_(False)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_greedy_tokens_of_a_ragged_batch_match_the_model_without_a_cache(
    family: Literal["gpt2", "qwen3"],
) -> None:
    """At every position the plain model, reading the whole text with no cache, wants that token."""
    model = made(640, family)
    generator = torch.Generator().manual_seed(1)
    lengths = (1, 17, 128)
    prompts = [torch.randint(500, (n,), generator=generator).tolist() for n in lengths]
    for prompt, sample in zip(prompts, written(model, prompts, Limits(512)), strict=True):
        assert len(sample.tokens) == 512
        assert len({*sample.tokens}) > 50  # no loop over a few tokens, which would prove little
        text = torch.tensor([prompt + sample.tokens])
        wanted = model.logits(model.hidden(text[:, :-1]))[0, len(prompt) - 1 :].argmax(-1)
        assert sample.tokens == wanted.tolist()


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_full_context_slides_by_reading_its_younger_half_again(
    family: Literal["gpt2", "qwen3"],
) -> None:
    model = made(64, family)
    prompts = [[5, 6, 7], [8], list(range(100))]
    for prompt, sample in zip(prompts, written(model, prompts, Limits(150)), strict=True):
        assert sample.tokens == plainly(model, prompt, 150)
        assert sample.finish == "length"


def test_a_full_context_can_end_the_text() -> None:
    prompts = [[5] * n for n in (1, 10, 64)]
    limits = Limits(99, slides=False)
    for prompt, sample in zip(prompts, written(made(64), prompts, limits), strict=True):
        assert sample.finish == "context"
        assert len(prompt) + len(sample.tokens) == 64 + 1  # the last one is drawn, not read


def test_a_row_without_a_text_stays_within_the_context() -> None:
    model = made(64)
    alone = written(model, [[5, 6, 7]], Limits(150))
    beside = written(model, [[5, 6, 7]], Limits(150), parallel=2)
    assert beside[0].tokens == alone[0].tokens


def test_a_text_depends_on_its_seed_and_not_on_its_neighbours() -> None:
    model = made(64)
    prompts = [[7], [8, 9, 10], list(range(30)), [7]]
    sampling = Sampling(temperature=1.0, top_p=0.95)
    alone = written(model, prompts, Limits(40), sampling, parallel=1)
    assert alone[0].tokens != alone[3].tokens
    for parallel in (2, 3, 4):
        together = written(model, prompts, Limits(40), sampling, parallel)
        assert [s.tokens for s in together] == [s.tokens for s in alone]


@pytest.mark.parametrize("slides", [True, False])
def test_running_ahead_as_a_gpu_does_changes_no_text(slides: bool) -> None:
    """32 steps in a go, the next 32 queued before those are looked at: here in turns, on a CPU."""
    model, sampling = made(64), Sampling(temperature=1.0, top_p=0.95)
    prompts = [[n, n + 1] * (1 + 3 * n) for n in range(9)]
    plain = written(model, prompts, Limits(100, slides=slides), sampling, parallel=3)
    decoder = Decoder(model, 3, sampling, log=True)
    replay = functools.partial(decoder._step, decoder.context_length)
    decoder.graph = SimpleNamespace(replay=replay)  # type: ignore[assignment]
    # A text that ends early, while its row is being drawn already for nobody.
    stop = next(piece for n in range(40, 60) if len(piece := plain[4].text[n : n + 6]) == 6)
    limits = Limits(100, (stop,), slides)
    samples = [Sample(number, prompt, number) for number, prompt in enumerate(prompts)]
    for _ in generate(decoder, samples, VOCABULARY, limits):
        pass
    assert samples[4].text == plain[4].text[: plain[4].text.index(stop)]
    for ahead, wanted in zip(samples, plain, strict=True):
        assert ahead.text == wanted.text.partition(stop)[0]
        assert ahead.tokens == wanted.tokens[: len(ahead.tokens)]
        if stop not in wanted.text:
            assert (ahead.tokens, ahead.finish) == (wanted.tokens, wanted.finish)
            near = torch.tensor(ahead.logprobs) - torch.tensor(wanted.logprobs)
            assert near.abs().max() < 1e-4


def test_logprobs_are_those_of_the_model_itself() -> None:
    model = made(64)
    prompts = [[1, 2, 3], [4]]
    sampling = Sampling(temperature=0.5, top_k=7, repetition_penalty=1.5)
    for sample in written(model, prompts, Limits(20), sampling):
        tokens = sample.prompt + sample.tokens
        with torch.no_grad():
            logits = model.logits(model.hidden(torch.tensor([tokens[:-1]])))[0]
        wanted = logits.log_softmax(-1)[range(len(tokens) - 1), tokens[1:]][-20:]
        assert torch.allclose(torch.tensor(sample.logprobs), wanted, atol=1e-4)


def drawn(
    logits: list[float], sampling: Sampling, seen: list[int] | None = None
) -> dict[int, float]:
    """How often each token is drawn, over evenly spaced noise."""
    count = 2000
    rows = torch.tensor([logits]).expand(count, -1)
    if seen is not None:
        mask = torch.zeros(count, len(logits), dtype=torch.bool)
        mask[:, seen] = True
        rows = penalize(rows, mask, sampling.repetition_penalty)
    noise = torch.arange(count, dtype=torch.float64) / count
    tokens = draw(rows, sampling, noise)
    return {t: (tokens == t).sum().item() / count for t in sorted({*tokens.tolist()})}


def test_drawing_follows_the_distribution_that_the_options_leave() -> None:
    logits = [1.0, 3.0, -1.0, 2.0, 0.0]  # softmax: 0.086 0.636 0.012 0.234 0.032

    def close(found: dict[int, float], wanted: dict[int, float]) -> bool:
        total = sum(wanted.values())
        return found == pytest.approx({t: p / total for t, p in wanted.items()}, abs=2e-3)

    full = dict(enumerate(torch.tensor(logits).softmax(0).tolist()))
    assert close(drawn(logits, Sampling(temperature=1)), full)
    hot = dict(enumerate((torch.tensor(logits) / 2).softmax(0).tolist()))
    assert close(drawn(logits, Sampling(temperature=2)), hot)
    assert close(drawn(logits, Sampling(temperature=1, top_k=2)), {1: full[1], 3: full[3]})
    assert close(drawn(logits, Sampling(temperature=1, top_p=0.6)), {1: 1})
    assert close(drawn(logits, Sampling(temperature=1, top_p=0.7)), {1: full[1], 3: full[3]})
    assert close(drawn(logits, Sampling(temperature=1, min_p=0.3)), {1: full[1], 3: full[3]})
    assert close(drawn(logits, Sampling(temperature=0)), {1: 1})
    both = Sampling(temperature=1, top_k=3, top_p=0.7)  # 0.666 of the three is less than 0.7
    assert close(drawn(logits, both), {1: full[1], 3: full[3]})


def test_the_repetition_penalty_makes_earlier_tokens_less_likely() -> None:
    logits = [2.0, 1.9, -1.0]
    assert drawn(logits, Sampling(2.0, temperature=0), seen=[0]) == {1: 1}
    # Positive logits are divided, negative ones multiplied: both fall.
    wanted = torch.tensor([1.0, 1.9, -2.0]).softmax(0)
    found = drawn(logits, Sampling(2.0, temperature=1), seen=[0, 2])
    assert list(found.values()) == pytest.approx(wanted.tolist(), abs=2e-3)


def test_a_checkpoint_is_read_where_it_belongs_and_nowhere_else(run: Path, tmp_path: Path) -> None:
    step = checkpoint.steps(run)[-1]
    path = checkpoint.checkpoint_path(run, step)
    assert open_model(path, None, CPU).path == run.resolve()
    with pytest.raises(ForgeError, match="and --checkpoint"):
        open_model(path, step, CPU)
    for copy in (tmp_path / "copied", tmp_path / "other" / path.name):
        shutil.copytree(path, copy)
        with pytest.raises(ForgeError, match="outside of its run"):
            open_model(copy, None, CPU)


def test_the_model_is_the_one_that_the_checkpoint_states(run: Path, tmp_path: Path, forge) -> None:
    """Not the one in RUN/config.toml, which people edit."""
    config = Path(shutil.copytree(run, tmp_path / "run")) / "config.toml"
    config.write_text(config.read_text().replace("num_heads = 4", "num_heads = 2"))
    assert "num_heads = 2" in config.read_text()
    options = ["--temperature", 0, "--max-tokens", 3, "--json"]
    assert forge("sample", config.parent, *options).output == forge("sample", run, *options).output


def test_a_path_that_is_not_utf_8_is_one_clear_error(run: Path, tmp_path: Path, forge) -> None:
    folder = tmp_path / os.fsdecode(b"run-\xe9")
    shutil.copytree(run, folder)
    for arguments in (
        ("sample", folder),
        ("sample", checkpoint.checkpoint_path(folder, 8)),
        ("eval", folder, "--data", tmp_path),
        ("export", folder, tmp_path / "hf"),
        ("export", run, folder / "hf"),
    ):
        result = forge(*arguments)
        assert result.exit_code == 1, arguments
        assert "not valid UTF-8" in result.output
        assert "rename the folder" in result.output
    assert [*tmp_path.iterdir()] == [folder]
    assert not (folder / "hf").exists()


def test_a_stop_text_may_be_a_line_end(run: Path, forge, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(terminal.Session, "write", lambda self, *_: seen.append(self.limits.stops))
    result = forge("sample", run, "--prompt", "a", "--stop", r"\n\n", "--stop", r"a\tb")
    assert result.exit_code == 0, result.output
    assert seen == [("\n\n", "a\tb")]


def test_generation_stops_at_the_end_of_text(run: Path) -> None:
    model = open_model(run, None, CPU).model
    with torch.no_grad():  # a model that only ever wants <|endoftext|>
        model.ln_f.weight.zero_()
        model.wte.weight[shards.EOT_TOKEN] = 10
        model.ln_f.bias.fill_(1)
    (sample,) = written(model, [[1, 2]], Limits(10))
    assert (sample.tokens, sample.finish) == ([], "eot")


def taken(tokens: list[int], vocabulary: list[bytes], *stops: str) -> tuple[list[str], Sample]:
    """What a text shows after each token."""
    sample, shown = Sample(0, [], 0), []
    for token in tokens:
        if sample.finish is None:
            sample.take([token], [], vocabulary, Limits(len(tokens), stops))
            shown.append(sample.text)
    return shown, sample


def test_a_character_split_over_tokens_comes_out_whole() -> None:
    vocabulary = [*([b""] * 3), b"\xe6\x9e", b"\x9c", b"ok", b"\xe6"]
    assert taken([3, 4, 5], vocabulary)[0] == ["", "果", "果ok"]
    assert taken([5, 6], vocabulary)[0] == ["ok", "ok\ufffd"]


def test_nothing_of_a_stop_text_is_shown() -> None:
    vocabulary = [b"a", b"b", b"c", b"ab", b"\n"]
    shown, sample = taken([0, 3, 3, 2, 0], vocabulary, "abc", "zz")
    assert shown == ["", "a", "aab", "aab"]
    assert (sample.text, sample.finish, sample.tokens) == ("aab", "stop", [0, 3, 3, 2])
    shown, sample = taken([0, 1, 0], vocabulary, "abc")
    assert (shown[-1], sample.finish) == ("aba", "length")
    sample = Sample(0, [], 0)
    sample.take([0, 0, 1, 2, 4, 0], [], vocabulary, Limits(6, ("bc", "\n")))
    assert (sample.text, sample.tokens) == ("aa", [0, 0, 1, 2])


def test_prompts_that_share_a_seed_draw_different_numbers() -> None:
    one, other, again = (Sample(n, p, 7).noise(4) for n, p in enumerate(([1, 2], [2, 1], [1, 2])))
    assert np.array_equal(one, again)
    assert not np.isin(one, other).any()


def test_the_same_seed_gives_the_same_text(run: Path, forge) -> None:
    named = ["--prompt", "Fruits are good", "--max-tokens", 20]
    texts = [forge("sample", run, *named, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("Fruits are good")


def test_json_gives_text_and_tokens_that_agree(run: Path, forge) -> None:
    arguments = ["--json", "--num-samples", 2, "--max-tokens", 8, "--prompt", "A — "]
    result = forge("sample", run, *arguments)
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert [row["seed"] for row in rows] == [0, 1]
    for row in rows:
        assert row["text"] == tokenizer.decode(row["tokens"]).decode("utf-8", "replace")
        assert len(row["tokens"]) == len(row["logprobs"]) <= 8


def test_samples_are_printed_in_order_whatever_ends_first(run: Path, forge) -> None:
    few = ["--num-samples", 5, "--max-tokens", 30, "--stop", " the", "--seed", 3]
    one = [forge("sample", run, *few, "--parallel", n).output for n in (1, 3, 5)]
    assert one[0] == one[1] == one[2]
    assert [line for line in one[0].splitlines() if line.startswith("---")] == [
        f"--- sample {n} of 5, seed {n + 2}" for n in range(1, 6)
    ]


def test_a_prompts_file_is_continued_in_order_and_keeps_its_keys(
    run: Path, tmp_path: Path, forge
) -> None:
    rows = [{"prompt": text, "id": n} for n, text in enumerate(["One", "Two \u2028— ", ""] * 3)]
    path = tmp_path / "prompts.JSONL"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    out = forge("sample", run, "--prompts-file", path, "--max-tokens", 5).output.splitlines()
    found = [json.loads(line) for line in out]
    assert [{"prompt": row["prompt"], "id": row["id"]} for row in found] == rows
    assert [row["tokens"] for row in found[:3]] == [row["tokens"] for row in found[3:6]]

    plain = tmp_path / "prompts.txt"
    plain.write_bytes(b"One\r\n\r\nTwo\r\n")
    text = forge("sample", run, "--prompts-file", plain, "--max-tokens", 5).output
    assert "\r" not in text
    assert "sample 2 of 2" in text
    for bad in ('{"text": "b"}', '{"prompt": null}', '{"prompt": ["b"]}'):
        path.write_text(f'{{"prompt": "a"}}\n{bad}\n')
        result = forge("sample", run, "--prompts-file", path)
        assert result.exit_code == 1
        assert "line 2" in result.output


def test_a_byte_order_mark_is_not_part_of_the_prompt(
    tmp_path: Path,
) -> None:
    for name, content in (("a.txt", "One\nTwo\n"), ("a.jsonl", '{"prompt": "One"}\n')):
        (tmp_path / name).write_text(content, "utf-8-sig")
        assert terminal.read_prompts(tmp_path / name)[0].text == "One"


def test_an_older_checkpoint_can_be_sampled_and_a_missing_one_is_named(run: Path, forge) -> None:
    older = forge("sample", run, "--checkpoint", 4, "--max-tokens", 3)
    folder = checkpoint.checkpoint_path(run, 4)
    assert forge("sample", folder, "--max-tokens", 3).output == older.output
    result = forge("sample", run, "--checkpoint", 5)
    assert result.exit_code == 1
    assert "--checkpoint 4 or 8" in result.output


def test_sampling_reads_no_optimizer_state(run: Path, tmp_path: Path, forge) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for path in copy.rglob(checkpoint.OPTIMIZER_FILE):
        path.unlink()
    assert forge("sample", copy, "--max-tokens", 3).exit_code == 0


def test_a_folder_without_a_model_is_one_clear_error(tmp_path: Path, forge) -> None:
    for program, more in (("sample", []), ("export", [tmp_path / "out"])):
        for path in (tmp_path, tmp_path / "missing"):
            result = forge(program, path, *more)
            assert result.exit_code == 1
            assert "run of forge-train" in result.output


def test_settings_that_are_not_numbers_are_refused(run: Path, forge) -> None:
    for option in ("--temperature", "--top-p", "--min-p", "--repetition-penalty"):
        result = forge("sample", run, option, "nan")
        assert result.exit_code in (1, 2)
    assert forge("sample", run, "--stop", "").exit_code == 1
    for option in ("--temperature", "--top-p"):
        result = forge("sample", run, option, "-1")
        assert result.exit_code == 2
        assert isinstance(result.exception, SystemExit)


def test_too_many_texts_at_a_time_for_the_memory_is_one_clear_error(run: Path, forge) -> None:
    rows = ["--num-samples", 10**11, "--parallel", 10**11]
    result = forge("sample", run, *rows)
    assert result.exit_code == 1
    assert "a smaller --parallel" in result.output


def test_a_prompt_beyond_the_context_is_cut_or_refused_never_silently(run: Path, forge) -> None:
    long = ["--prompt", "word " * 100, "--max-tokens", 2]
    told = forge("sample", run, *long, "--num-samples", 3).stderr
    assert told.count("only the last 64 are read") == 1
    result = forge("sample", run, *long, "--at-context-end", "stop")
    assert result.exit_code == 1
    assert "the context has 64" in result.output


def test_a_prompt_beyond_the_context_is_named_before_any_text_is_made(
    run: Path, tmp_path: Path, forge
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("One\n\nTwo\n" + "word " * 100 + "\n")
    options = ["--at-context-end", "stop", "--max-tokens", 2, "--parallel", 1]
    result = forge("sample", run, "--prompts-file", path, *options)
    assert result.exit_code == 1
    assert f"{path}, line 4" in result.stderr
    assert not result.stdout


def session(run: Path, slides: bool = True) -> terminal.Session:
    return terminal.Session(open_model(run, None, CPU), GREEDY, Limits(2, (), slides), 1, False)


def asked(*lines: str) -> Callable[[str], str]:
    """Somebody who types these, and then Ctrl-D."""
    left = iter(lines)

    def ask(_: str) -> str:
        with contextlib.suppress(StopIteration):
            return next(left)
        raise EOFError

    return ask


def test_the_interactive_mode_outlives_an_error(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session(run, slides=False).interact(1, 0, asked("word " * 100, "It is"))
    said = capsys.readouterr()
    assert said.out.startswith("It is")
    assert "the context has 64" in said.err


def test_a_text_that_ctrl_c_ended_is_not_made_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def write(_: object, prompts: object, num_samples: int, seed: int) -> None:
        seeds.append(seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal.Session, "write", write)
    session(run).interact(2, 5, asked("a", "a"))
    assert seeds == [5, 7]


def test_a_prompt_from_standard_input_is_utf8_less_its_line_end(run: Path) -> None:
    arguments = [str(run), "--max-tokens", "1", "--json"]
    for named, data, prompt in (
        (["--prompt", "-"], b"One\n", "One"),
        ([], b"One\r\nTwo \r\n", "One\nTwo "),
        ([], "\ufeffé\n\n".encode(), "é\n"),
        ([], b"", ""),
    ):
        result = CliRunner().invoke(cli.sample, arguments + named, input=data)
        assert json.loads(result.stdout)["prompt"] == prompt
    result = CliRunner().invoke(cli.sample, arguments, input=b"caf\xe9\n")
    assert result.exit_code == 1
    assert "a text in UTF-8" in result.stderr


def test_standard_input_that_is_closed_is_one_clear_error(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit, match="1"):
        cli.sample.main([str(run)])
    assert "standard input is closed" in capsys.readouterr().err


def test_characters_that_a_terminal_cannot_show_are_replaced(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    cli.sample.main([str(run), "--max-tokens", "1", "--prompt", "café"], standalone_mode=False)
    assert shown.getvalue().startswith(b"caf?")


def test_output_that_cannot_be_written_is_one_clear_error(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit, match="1"):
            cli.sample.main([str(run), "--max-tokens", "1", "--prompt", "a"])
        assert full.closed  # or Python would try again at its end
    assert capsys.readouterr().err.splitlines() == [
        "Error: cannot read or write: No space left on device",
        "  where:      standard output",
        "  what to do: make room; run the same command again",
    ]


def test_a_reader_that_stops_early_is_not_an_error(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As head -1."""
    theirs, ours = os.pipe()
    os.close(theirs)
    output = os.fdopen(ours, "w")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # click puts others in their places
    with pytest.raises(SystemExit):
        cli.sample.main([str(run), "--max-tokens", "1", "--prompt", "a"])
    assert not capsys.readouterr().err
    with contextlib.suppress(BrokenPipeError):
        output.close()


def test_the_interactive_mode_outlives_ctrl_c(run: Path) -> None:
    """In a real terminal: a prompt, Ctrl-C in the middle of its text, another prompt, Ctrl-D."""
    ours, theirs = pty.openpty()
    arguments = [str(run), "--max-tokens", "1000000", "--stop", "zzzz"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sampler.cli", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env=os.environ | {"TERM": "dumb"},
        start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )
    os.close(theirs)
    said = b""

    def wait_for(text: bytes, after: int = 0) -> None:
        nonlocal said
        deadline = time.monotonic() + 60
        while text not in said[after:]:
            assert time.monotonic() < deadline, said[-500:]
            said += os.read(ours, 4096)

    try:
        wait_for(b"> ")
        for number in range(2):
            before = len(said)
            os.write(ours, b"The number %d\n" % number)
            wait_for(
                b"\nThe number %d" % number, before
            )  # its echo, then itself as the text's start
            before = len(said)
            wait_for(b" ", before + 50)
            os.write(ours, b"\x03")
            wait_for(b"\n> ", before)
        os.write(ours, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
