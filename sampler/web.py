"""forge-sample --web: a page to talk to a model, or to let it write, for one's own browser.

The page is gradio's. Nothing leaves this machine: gradio's telemetry, its look for a newer version,
its tunnel and the hub are turned off, and the browser is told to fetch from this server only, or it
would load the pictures that a text names.
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
# Of W3C's Content Security Policy Level 3; gradio's page needs the unsafe ones of its own.
POLICY = (
    b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    b"frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class SelfOnly:
    """ASGI middleware: answers carry POLICY, and other sites' pages are refused.

    A request is another site's if its Origin is not its Host; and, for a server on this machine
    alone, if its Host is another name (DNS rebinding).
    """

    def __init__(self, app: Any, is_local: bool) -> None:
        self.app, self.is_local = app, is_local

    def is_own(self, headers: dict[bytes, bytes]) -> bool:
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        is_here = host.rsplit(":", 1)[0] in LOOPBACK or host in LOOPBACK
        return origin.partition("://")[2] in ("", host) and (is_here or not self.is_local)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not self.is_own(dict(scope["headers"])):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"another site's request"})
            return

        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY)
                message = message | {"headers": [*message["headers"], policy]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def import_gradio() -> Any:
    """gradio, which reads these settings when it is imported."""
    os.environ.update(OFFLINE)
    try:
        import gradio
    except ImportError as error:
        what = f"--web needs gradio: {error}"
        raise ForgeError(what, fix="pip install -e '.[web]' in the clone") from error
    return gradio


def build(session: Session, seed: int) -> Any:
    """The page, as gradio's Blocks: a chat's conversation, or a base model's text box."""
    gradio = import_gradio()
    sampling, seeds, lock = session.decoder.sampling, itertools.count(seed), threading.Lock()
    title = session.loaded.path.resolve().name

    def written(prompt: Prompt, temperature: float, top_p: float) -> Iterator[str]:
        """The text that follows, whenever it has grown; the next text has another seed."""
        wanted = replace(sampling, temperature=temperature, top_p=top_p if top_p < 1 else None)
        texts = session.stream(prompt, next(seeds))
        try:
            while True:
                with lock:  # the page's Stop does not wait for the step that is under way
                    if wanted != session.decoder.sampling:
                        session.draw_by(wanted)
                    text = next(texts, None)
                if text is None:
                    return
                yield text
        except ForgeError as error:
            raise gradio.Error(error.what, print_exception=False) from error

    def answer(
        message: str, history: list[dict[str, Any]], temperature: float, top_p: float
    ) -> Iterator[str]:
        messages = [{"role": m["role"], "content": plain(m["content"])} for m in history]
        messages.append({"role": "user", "content": message})
        yield from written(Prompt(message, {"messages": messages}), temperature, top_p)

    def continued(text: str, temperature: float, top_p: float) -> Iterator[str]:
        for more in written(Prompt(text), temperature, top_p):
            yield text + more

    with gradio.Blocks(title=title, analytics_enabled=False, fill_height=True) as page:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            temperature, top_p = sampling.temperature, sampling.top_p or 1
            settings = [
                gradio.Slider(0, 2, temperature, step=0.05, label="Temperature"),
                gradio.Slider(0.05, 1, top_p, step=0.05, label="Top-p"),
            ]
        if isinstance(session, Chat):
            # Without the button that sends a conversation to the hub.
            messages = gradio.Chatbot(
                render_markdown=False, show_label=False, scale=1, buttons=["copy", "copy_all"]
            )
            gradio.ChatInterface(
                answer,
                chatbot=messages,
                additional_inputs=settings,
                api_visibility="private",  # or it would answer beside the page, by the same decoder
            )
        else:
            text = gradio.Textbox(label="Text", lines=12, autofocus=True)
            with gradio.Row():
                write, stop = gradio.Button("Continue", variant="primary"), gradio.Button("Stop")
            writing = write.click(continued, [text, *settings], text)
            stop.click(None, cancels=writing)
    return page


def plain(content: Any) -> str:
    """The text of a message in gradio's history, which may be in parts."""
    parts = content if isinstance(content, list) else [content]
    return "".join(part if isinstance(part, str) else part["text"] for part in parts)


def serve(session: Session, seed: int, host: str, port: int) -> None:
    """Serve the page until Ctrl-C."""
    page = build(session, seed)
    from starlette.middleware import Middleware  # gradio brings it

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
            app_kwargs={"middleware": [Middleware(SelfOnly, is_local=host in LOOPBACK)]},
        )
    except (OSError, ValueError) as error:
        reason = str(error).partition(". ")[0]  # what follows is advice for other programs
        what, where = f"cannot serve the page: {reason}", f"{host}:{port}"
        raise ForgeError(what, where=where, fix="another --port or --host") from error
    tell(f"http://{host}:{port} - Ctrl-C ends it.")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        tell("")
    finally:
        page.close(verbose=False)
