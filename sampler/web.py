"""forge-sample --web: a page to talk to a model, or to let it write, for one's own browser.

The page is gradio's. Nothing leaves this machine: gradio's telemetry, its look for a newer version,
its tunnel and the hub are turned off, and what the model writes is shown as plain text, since the
pictures of Markdown would be fetched from where a text says.
"""

import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipeline.errors import ForgeError
from sampler.chat import Chat
from sampler.terminal import Prompt, Session, tell

OFFLINE = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "no_proxy": "*",  # gradio asks its own server whether it is there
}


def import_gradio() -> Any:
    """gradio, which reads these settings when it is imported."""
    os.environ.update(OFFLINE)
    try:
        import gradio
    except ImportError as error:
        raise ForgeError(
            f"--web needs gradio: {error}", fix="pip install 'llm-forge[web]'"
        ) from error
    return gradio


class Writer:
    """Writes one text at a time for all who look at the page, each with another seed."""

    def __init__(self, session: Session, seed: int) -> None:
        self.session, self.seeds, self.lock = session, itertools.count(seed), threading.Lock()

    def write(self, prompt: Prompt, temperature: float, top_p: float) -> Iterator[str]:
        """The text that follows, whenever it has grown."""
        sampling = self.session.decoder.sampling
        sampling = replace(sampling, temperature=temperature, top_p=top_p if top_p < 1 else None)
        # Held for a step at a time: a text that was stopped in the page is never continued.
        with self.lock:
            if sampling != self.session.decoder.sampling:
                self.session.draw_by(sampling)
            texts = self.session.stream(prompt, next(self.seeds))
        while True:
            with self.lock:
                text = next(texts, None)
            if text is None:
                return
            yield text


def build(session: Session, seed: int) -> Any:
    """The page, as gradio's Blocks: a chat's conversation, or a base model's text box."""
    gradio = import_gradio()
    writer, sampling = Writer(session, seed), session.decoder.sampling
    title = session.loaded.path.resolve().name

    def shown(prompt: Prompt, temperature: float, top_p: float) -> Iterator[str]:
        try:
            yield from writer.write(prompt, temperature, top_p)
        except ForgeError as error:
            raise gradio.Error(error.what) from error

    def answer(
        message: str, history: list[dict[str, Any]], temperature: float, top_p: float
    ) -> Iterator[str]:
        messages = [{"role": m["role"], "content": plain(m["content"])} for m in history]
        messages.append({"role": "user", "content": message})
        yield from shown(Prompt(message, {"messages": messages}), temperature, top_p)

    def continued(text: str, temperature: float, top_p: float) -> Iterator[str]:
        for more in shown(Prompt(text), temperature, top_p):
            yield text + more

    with gradio.Blocks(title=title, analytics_enabled=False, fill_height=True) as page:
        sliders = [
            gradio.Slider(0, 2, sampling.temperature, step=0.05, label="Temperature", render=False),
            gradio.Slider(0.05, 1, sampling.top_p or 1, step=0.05, label="Top-p", render=False),
        ]
        if isinstance(session, Chat):
            gradio.ChatInterface(
                answer,
                title=title,
                # Plain text: a browser would fetch the pictures of Markdown.
                chatbot=gradio.Chatbot(render_markdown=False, show_label=False, scale=1),
                additional_inputs=sliders,
                analytics_enabled=False,
            )
        else:
            gradio.Markdown(f"# {title}")
            text = gradio.Textbox(label="Text", lines=16, autofocus=True)
            with gradio.Row():
                for slider in sliders:
                    slider.render()
            with gradio.Row():
                write, stop = gradio.Button("Continue", variant="primary"), gradio.Button("Stop")
            writing = write.click(continued, [text, *sliders], text)
            stop.click(None, cancels=writing)
    return page


def plain(content: Any) -> str:
    """The text of a message in gradio's history, which may be in parts."""
    parts = content if isinstance(content, list) else [content]
    return "".join(part if isinstance(part, str) else part["text"] for part in parts)


def launch(page: Any, host: str, port: int) -> None:
    """Start to serve the page, and return. ForgeError where nothing can be served."""
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            mcp_server=False,
            run_history=False,
            footer_links=[],
        )
    except (OSError, ValueError) as error:
        raise ForgeError(
            f"cannot serve the page: {error}",
            where=f"{host}:{port}",
            fix="another --port or --host",
        ) from error


def serve(session: Session, seed: int, host: str, port: int) -> None:
    """Serve the page until Ctrl-C."""
    page = build(session, seed)
    launch(page, host, port)
    tell(f"http://{host}:{port} - Ctrl-C ends it.")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        tell("")
    finally:
        page.close()
